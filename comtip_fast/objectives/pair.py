"""L_pair, the loss of the pair head, which classifies sentences as true or mispaired, and its AUC."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def pair_loss(true_BG: Tensor, false_BG: Tensor, counted_BG: Tensor) -> Tensor:
    """Return the binary cross-entropy over the counted swaps and their true sentences; 0 without counted swaps.

    Parameters
    ----------
    true_BG, false_BG
        Pair-head logits of the true and the mispaired sentence of each gene, in the same context.
    counted_BG
        bool mask from :func:`comtip_fast.objectives.mispair.counted_swaps`.
    """
    loss_BG = F.softplus(-true_BG) + F.softplus(false_BG)
    total = torch.where(counted_BG, loss_BG, torch.zeros_like(loss_BG)).sum()
    return total / (2 * counted_BG.sum().clamp_min(1))


@torch.no_grad()
def pair_auc(true_BG: Tensor, false_BG: Tensor, counted_BG: Tensor) -> float:
    """Return the area under the ROC curve of true against mispaired sentences, over the counted swaps.

    Chance level is 0.5. The value is NaN if no swap is counted or a logit is NaN. Parameters are those of :func:`pair_loss`.
    """
    true, false = true_BG[counted_BG], false_BG[counted_BG]
    if true.numel() == 0 or bool(true.isnan().any() | false.isnan().any()):
        return float("nan")
    both = torch.cat([true, false]).double()
    _, inverse, count = both.unique(sorted=True, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    rank = last - (count.double() - 1) / 2  # ties get their mean rank
    n, m = true.numel(), false.numel()
    return float((rank[inverse[:n]].sum() - n * (n + 1) / 2) / (n * m))
