"""Pooling on a GPU: the weighted sum of rows on tensor cores (``sentence_table``); the softmax is torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from comtip_kernels.sentence_table.triton_op import as_bytes, weighted_sum
from comtip_kernels.table_pool.reference import pool_weights
from comtip_kernels.tl_common import operand_dtype


def table_pool_triton(table_GQD: Tensor, scores_GQ: Tensor, levels_BG: Tensor, mask_BG: Tensor) -> Tensor:
    """Return t (B, D) in the dtype of the table; see :mod:`comtip_kernels.table_pool.reference`."""
    bf16 = operand_dtype(table_GQD) == torch.bfloat16
    weight_BG = pool_weights(scores_GQ.float(), levels_BG, mask_BG)
    return weighted_sum(weight_BG, table_GQD, as_bytes(levels_BG), bf16).to(table_GQD.dtype)
