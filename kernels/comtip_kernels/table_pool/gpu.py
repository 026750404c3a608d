"""Pooling on a GPU: the weighted sum of rows is ``table_spread``, so that tensor cores do it (see ``sentence_table``)."""

from __future__ import annotations

from torch import Tensor

from comtip_kernels.sentence_table.op import table_spread
from comtip_kernels.table_pool.reference import pool_weights


def table_pool_triton(table_GQD: Tensor, scores_GQ: Tensor, levels_BG: Tensor, mask_BG: Tensor) -> Tensor:
    """Return t (B, D); see :mod:`comtip_kernels.table_pool.reference`. The softmax is (B, G) and torch's."""
    weight_BG = pool_weights(scores_GQ.float(), levels_BG, mask_BG)
    return table_spread(weight_BG, table_GQD, levels_BG).to(table_GQD.dtype)
