"""L_level and the scores of the pair head on a GPU, on the products of ``sentence_table``."""

from __future__ import annotations

import torch
from torch import Tensor

from comtip_kernels.level_cross_entropy.reference import without_own_gene
from comtip_kernels.sentence_table.triton_op import as_bytes, level_loss, sampled_dot
from comtip_kernels.tl_common import operand_dtype


def level_cross_entropy_triton(
    image_BD: Tensor,
    table_GQD: Tensor,
    levels_BG: Tensor,
    mask_BG: Tensor,
    scale: Tensor,
    log_prior_GQ: Tensor | None = None,
) -> Tensor:
    """Return L_level, an fp32 scalar; see :mod:`comtip_kernels.level_cross_entropy.reference`."""
    prior = None if log_prior_GQ is None else log_prior_GQ.contiguous()
    bf16 = operand_dtype(image_BD, table_GQD) == torch.bfloat16
    scale = scale.to(image_BD.device, torch.float32)
    total = level_loss(image_BD, table_GQD, as_bytes(levels_BG), mask_BG.to(torch.uint8), scale, prior, bf16)
    return total / mask_BG.sum().clamp_min(1)


def pair_scores_triton(
    context_BD: Tensor,
    table_GQD: Tensor,
    levels_BG: Tensor,
    *,
    true_levels_BG: Tensor | None = None,
    projected_GQD: Tensor | None = None,
    weight_BG: Tensor | None = None,
) -> Tensor:
    """Return the logits of the pair head (B, G); see :mod:`comtip_kernels.level_cross_entropy.reference`."""
    bf16 = operand_dtype(context_BD, table_GQD) == torch.bfloat16
    dtype = torch.promote_types(context_BD.dtype, table_GQD.dtype)
    score_BG = sampled_dot(context_BD, table_GQD, as_bytes(levels_BG), bf16).to(dtype)
    return without_own_gene(score_BG, table_GQD, levels_BG, true_levels_BG, projected_GQD, weight_BG)
