"""The text vector of a spot as a weighted sum of rows of the sentence table: the definition of the operation.

    p[b, g] = softmax over measured g of score[g, level[b, g]]
    t[b]    = sum_g p[b, g] table[g, level[b, g]]

The sum is one product of a (B, G*Q) weight matrix with the table, so there is no (B, G, D) tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def pool_weights(scores_GQ: Tensor, levels_BG: Tensor, mask_BG: Tensor) -> Tensor:
    """Return the pooling weights of every spot.

    Parameters
    ----------
    scores_GQ, levels_BG, mask_BG
        As in :func:`comtip_kernels.table_pool`.

    Returns
    -------
    Tensor
        p (B, G) in the dtype of the scores: softmax of the spot's scores over its measured genes; 0 for a spot without any.
    """
    G, Q = scores_GQ.shape
    rows_BG = torch.arange(G, device=levels_BG.device) * Q + levels_BG.long()
    score_BG = F.embedding(rows_BG, scores_GQ.reshape(G * Q, 1)).squeeze(-1)
    score_BG = score_BG.masked_fill(~mask_BG, float("-inf"))
    if G == 0:
        return score_BG
    # Detached before the maximum, which would otherwise store its input for a gradient that nothing computes.
    top_B1 = score_BG.detach().amax(dim=1, keepdim=True)
    top_B1 = torch.where(torch.isfinite(top_B1), top_B1, torch.zeros_like(top_B1))
    weight_BG = torch.exp(score_BG - top_B1)
    return weight_BG / weight_BG.sum(dim=1, keepdim=True).clamp_min(torch.finfo(weight_BG.dtype).tiny)


def table_pool_reference(table_GQD: Tensor, scores_GQ: Tensor, levels_BG: Tensor, mask_BG: Tensor) -> Tensor:
    """Return t (B, D); see the module's formula. A spot without a measured gene gets the zero vector."""
    G, Q, D = table_GQD.shape
    weight_BG = pool_weights(scores_GQ, levels_BG, mask_BG)
    hot_BGQ = F.one_hot(levels_BG.long(), Q).to(weight_BG.dtype) * weight_BG[..., None]
    return hot_BGQ.reshape(levels_BG.shape[0], G * Q).to(table_GQD.dtype) @ table_GQD.reshape(G * Q, D)
