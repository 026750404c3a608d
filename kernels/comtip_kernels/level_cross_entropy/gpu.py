"""L_level and the pair head's scores on a GPU, over the three products of ``sentence_table``."""

from __future__ import annotations

import torch
from torch import Tensor

from comtip_kernels.level_cross_entropy.reference import without_own_gene
from comtip_kernels.sentence_table.op import level_loss, table_take


def level_cross_entropy_triton(
    image_BD: Tensor, table_GQD: Tensor, levels_BG: Tensor, mask_BG: Tensor, scale: Tensor, log_prior_GQ: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Return L_level, an fp32 scalar; see :mod:`comtip_kernels.level_cross_entropy.reference`."""
    prior = None if log_prior_GQ is None else log_prior_GQ.contiguous()
    weight = mask_BG.to(torch.uint8)
    total = level_loss(image_BD.to(table_GQD.dtype), table_GQD, levels_BG, weight, scale.float(), prior)
    return total / mask_BG.sum().clamp_min(1)


def pair_scores_triton(
    context_BD: Tensor, table_GQD: Tensor, levels_BG: Tensor, *, true_levels_BG: Tensor | None = None,
    projected_GQD: Tensor | None = None, weight_BG: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the pair head's logits (B, G); see :mod:`comtip_kernels.level_cross_entropy.reference`."""
    score_BG = table_take(context_BD.to(table_GQD.dtype), table_GQD, levels_BG).to(context_BD.dtype)
    return without_own_gene(score_BG, table_GQD, levels_BG, true_levels_BG, projected_GQD, weight_BG)
