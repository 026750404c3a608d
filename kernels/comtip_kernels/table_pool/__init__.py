"""Pooling of the sentences of each spot, directly from the sentence table."""

from __future__ import annotations

from torch import Tensor

from comtip_kernels.dispatch import Impl, choose, with_triton
from comtip_kernels.table_pool.cpu import table_pool_cpu
from comtip_kernels.table_pool.reference import pool_weights, table_pool_reference

__all__ = ["pool_weights", "table_pool", "table_pool_reference"]
_IMPLEMENTATIONS = {
    "reference": table_pool_reference,
    "cpu": table_pool_cpu,
    "triton": with_triton("comtip_kernels.table_pool.triton_op", "table_pool_triton"),
}


def table_pool(
    table_GQD: Tensor, scores_GQ: Tensor, levels_BG: Tensor, mask_BG: Tensor, *, impl: Impl = "auto"
) -> Tensor:
    """Return the softmax-weighted sum of G table rows per spot; see :mod:`comtip_kernels.table_pool.reference` for the formula.

    Parameters
    ----------
    table_GQD
        Sentence embeddings h(g, q), one row per gene and level. The Triton kernels multiply in bf16 if the table is bf16 or
        bf16 autocast is enabled.
    scores_GQ
        Pooling score of each row, floating point; it does not depend on the spot.
    levels_BG
        Level of each gene in each spot, integers 0..Q-1.
    mask_BG
        bool: True if the gene was measured in the spot's section.
    impl
        Implementation; see :mod:`comtip_kernels.dispatch`.

    Returns
    -------
    Tensor
        (B, D) in the dtype of the table; the zero vector for a spot without a measured gene.

    Raises
    ------
    ValueError
        If ``impl`` does not support the operands, or there are more than 256 levels for the Triton kernels.
    """
    out: Tensor = choose("table_pool", impl, (table_GQD, scores_GQ), _IMPLEMENTATIONS)(
        table_GQD, scores_GQ, levels_BG, mask_BG
    )
    return out
