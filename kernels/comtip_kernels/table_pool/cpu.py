"""Pooling on a CPU: a weighted bag of table rows per spot, without a (B, G, D) tensor in either direction."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def table_pool_cpu(table_GQD: Tensor, scores_GQ: Tensor, levels_BG: Tensor, mask_BG: Tensor) -> Tensor:
    """Return t (B, D); see :mod:`comtip_kernels.table_pool.reference`."""
    G, Q, D = table_GQD.shape
    if levels_BG.numel() == 0:
        return table_GQD.new_zeros(levels_BG.shape[0], D) + 0 * (table_GQD.sum() + scores_GQ.sum())
    rows_BG = torch.arange(G, device=levels_BG.device) * Q + levels_BG.long()
    score_BG = F.embedding(rows_BG, scores_GQ.reshape(G * Q, 1)).squeeze(-1)
    # The smallest number instead of -inf: a spot without a measured gene gives no NaN, and its weights are zeroed below.
    weight_BG = score_BG.masked_fill(~mask_BG, torch.finfo(score_BG.dtype).min).softmax(1)
    weight_BG = (weight_BG * mask_BG.any(1, keepdim=True)).to(table_GQD.dtype)
    # The backward pass of the weighted bag sorts the rows and is deterministic.
    return F.embedding_bag(rows_BG, table_GQD.reshape(G * Q, D), per_sample_weights=weight_BG, mode="sum")
