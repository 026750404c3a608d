"""Pooling of each spot's sentences straight from the sentence table."""

from __future__ import annotations

from torch import Tensor

from comtip_kernels.dispatch import Impl, choose, with_triton
from comtip_kernels.table_pool.cpu import table_pool_cpu
from comtip_kernels.table_pool.reference import pool_weights, table_pool_reference

__all__ = ["pool_weights", "table_pool", "table_pool_reference"]
_HAVE = {
    "reference": table_pool_reference,
    "cpu": table_pool_cpu,
    "triton": with_triton("comtip_kernels.table_pool.gpu", "table_pool_triton"),
}


def table_pool(
    table_GQD: Tensor, scores_GQ: Tensor, levels_BG: Tensor, mask_BG: Tensor, *, impl: Impl = "auto"
) -> Tensor:
    """Softmax-weighted sum of G table rows per spot.

    Parameters
    ----------
    table_GQD
        h(g, q), one row per gene and level.
    scores_GQ
        Pooling score of each row; the query does not depend on the spot, so scores live in the table too.
    levels_BG
        Level of each gene in each spot, integers 0..Q-1.
    mask_BG
        True where the spot's section measured the gene.
    impl
        Which implementation; see :mod:`comtip_kernels.dispatch`.

    Returns
    -------
    Tensor
        (B, D); the zero vector for a spot with no measured gene.
    """
    return choose("table_pool", impl, table_GQD, _HAVE)(table_GQD, scores_GQ, levels_BG, mask_BG)
