"""Scores of spots against every level of every gene, L_level, and the logits of the pair head: the definition of the operations.

    s[b, g, q] = scale * <c_b, table[g, q]> + log_prior[g, q]
    L_level    = sum_{b,g measured} (logsumexp_q s[b, g, q] - s[b, g, level[b, g]]) / number of measured (b, g)

c_b is the image vector of spot b. ``pair_scores`` are the logits of the pair head: products of the projected vector of a sentence and
the context of the spot, its image vector or its text vector t = sum_g p_g h_g (h_g the vector of the sentence of gene g, p_g its
pooling weight). From a text, the scored sentence's own gene is removed: the context is (t - p_g h_g) / (1 - p_g), so the score needs
only products of rows of the table. The denominator is at least 0.001.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def level_scores(context_BD: Tensor, table_GQD: Tensor) -> Tensor:
    """Return <c_b, table[g, q]> as (B, G, Q); operands of two dtypes are promoted to the wider one."""
    G, Q, D = table_GQD.shape
    dtype = torch.promote_types(context_BD.dtype, table_GQD.dtype)
    scores = context_BD.to(dtype) @ table_GQD.to(dtype).reshape(G * Q, D).T
    return scores.reshape(context_BD.shape[0], G, Q)


def take_level(scores_BGQ: Tensor, levels_BG: Tensor) -> Tensor:
    """Return scores[b, g, levels[b, g]] as (B, G)."""
    return scores_BGQ.gather(2, levels_BG.long()[..., None]).squeeze(-1)


def level_cross_entropy_reference(
    image_BD: Tensor,
    table_GQD: Tensor,
    levels_BG: Tensor,
    mask_BG: Tensor,
    scale: Tensor,
    log_prior_GQ: Tensor | None = None,
) -> Tensor:
    """Return L_level, a scalar; see the module's formula. 0 if nothing is measured."""
    scores_BGQ = scale * level_scores(image_BD, table_GQD)
    if log_prior_GQ is not None:
        scores_BGQ = scores_BGQ + log_prior_GQ
    loss_BG = torch.logsumexp(scores_BGQ, dim=2) - take_level(scores_BGQ, levels_BG)
    count = mask_BG.sum().clamp_min(1)
    return torch.where(mask_BG, loss_BG, torch.zeros_like(loss_BG)).sum() / count


def pair_scores_reference(
    context_BD: Tensor,
    table_GQD: Tensor,
    levels_BG: Tensor,
    *,
    true_levels_BG: Tensor | None = None,
    projected_GQD: Tensor | None = None,
    weight_BG: Tensor | None = None,
) -> Tensor:
    """Return the logits of the pair head (B, G); the arguments are those of :func:`comtip_kernels.pair_scores`."""
    score_BG = take_level(level_scores(context_BD, table_GQD), levels_BG)
    return without_own_gene(score_BG, table_GQD, levels_BG, true_levels_BG, projected_GQD, weight_BG)


def without_own_gene(
    score_BG: Tensor,
    table_GQD: Tensor,
    levels_BG: Tensor,
    true_levels_BG: Tensor | None,
    projected_GQD: Tensor | None,
    weight_BG: Tensor | None,
) -> Tensor:
    """Return the scores with gene g removed from the pooled text, or ``score_BG`` if one of the last three arguments is None."""
    if weight_BG is None or projected_GQD is None or true_levels_BG is None:
        return score_BG
    dtype = torch.promote_types(table_GQD.dtype, projected_GQD.dtype)
    own_GQQ = table_GQD.to(dtype) @ projected_GQD.to(dtype).transpose(1, 2)  # [g, claimed level, true level]
    G, Q, _ = own_GQQ.shape
    row_BG = (torch.arange(G, device=levels_BG.device) * Q + levels_BG.long()) * Q + true_levels_BG.long()
    # The gradient of a lookup is summed in a fixed order on every device; that of a gather is not.
    own_BG = F.embedding(row_BG, own_GQQ.reshape(-1, 1)).squeeze(-1)
    return (score_BG - weight_BG * own_BG) / (1 - weight_BG).clamp_min(1e-3)
