"""InfoNCE in blocks of rows and columns, for vectors that are distributed over devices.

A block contains R images and C texts of the whole (B, M) matrix. Pairs of one class ("the same text") are never negatives, and
an image and its own text have the same class, so the sums of a block contain no positive; the device that has both vectors
of a positive adds it. With the log-sum-exp taken over negatives, the blocks combine to

    lse_i  = log(exp(s_ii) + sum over blocks exp(row lse))      likewise per column
    g_ij   = row_weight_i exp(s_ij - lse_i) + column_weight_j exp(s_ij - lse_j)

where g_ij is the derivative of the loss with respect to the logit s_ij.

``triton`` runs the kernels of the whole loss (:mod:`.blocks_triton_op`): it stores derivatives of the logits in chunks of
rows, and the host reads nothing. ``cpu`` processes tiles of the block in turn, in plain PyTorch, on any device. ``reference`` is
the formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from comtip_kernels.dispatch import Impl, choose, with_triton
from comtip_kernels.infonce.cpu import LOG_FLOOR, Exponentials, Masks, masked_logits, row_and_column_lse, tiles, wide

__all__ = ["BlockIds", "block_gradients", "block_lse"]


@dataclass
class BlockIds(Masks):
    """Which pairs of a block are negatives; every row and column has a class. See :class:`.cpu.Masks`.

    The Triton kernels compare classes as 64-bit integers (they may be hashes) and groups as 32-bit integers.
    """

    own_pairs: ClassVar[bool] = False

    @property
    def trivial(self) -> bool:
        """False, because pairs of one class are excluded."""
        return False


def block_lse(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    ids: BlockIds,
    *,
    dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp over negatives of every row (R,) and of every column (C,); -inf where there are none.

    Parameters
    ----------
    x, y
        Unit vectors (R, D) and (C, D), rounded by :func:`comtip_kernels.unit_vectors` for this ``dtype``, so that positives
        computed from the same vectors match.
    scale
        Inverse temperature, a scalar tensor.
    ids
        Which pairs are negatives.
    dtype
        Dtype in which the Triton kernels multiply; None follows :func:`comtip_kernels.operand_dtype`.
    impl
        Implementation; see :mod:`comtip_kernels.dispatch`. ``cpu`` runs on any device.

    Returns
    -------
    tuple of Tensor
        In the dtype of the vectors, and at least fp32.

    Raises
    ------
    ValueError
        If ``ids`` has no classes, or ``impl`` does not support the operands.
    """
    run = _select("infonce_block_lse", impl, (x, y), ids, _LSE)
    return run(x, y, scale, ids, dtype)


def block_gradients(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    ids: BlockIds,
    row_weight: Tensor,
    row_lse: Tensor,
    column_weight: Tensor,
    column_lse: Tensor,
    *,
    dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Return sum_j g_ij y_j (R, D) and sum_i g_ij x_i (C, D) over the block's negatives; see the module's formula.

    Parameters
    ----------
    x, y, scale, ids, dtype, impl
        As in :func:`block_lse`, with the same output dtypes and errors.
    row_weight, column_weight
        (R,) and (C,): weight of each softmax in the loss; 0 for further columns, which have no softmax.
    row_lse, column_lse
        (R,) and (C,): log-sum-exp of the *whole* row and column including the positive, so that no exponential exceeds 1.
    """
    # A column without a softmax has no log-sum-exp; +inf makes its exponentials 0 and not NaN.
    column_lse = column_lse.masked_fill(column_weight == 0, torch.inf)
    row_lse = row_lse.masked_fill(row_weight == 0, torch.inf)
    run = _select("infonce_block_gradients", impl, (x, y), ids, _GRADIENTS)
    return run(x, y, scale, ids, row_weight, row_lse, column_weight, column_lse, dtype)


def _select(
    op: str, impl: str, vectors: tuple[Tensor, Tensor], ids: BlockIds, implementations: Mapping[str, Callable[..., Any]]
) -> Callable[..., Any]:
    """Return the implementation; raise ValueError if rows or columns have no classes."""
    if ids.class_rows is None or ids.class_columns is None:
        raise ValueError(
            f"{op}: rows and columns have no classes, which separate positives from negatives; pass class_rows and class_columns"
        )
    # Tiles run on any device and need less memory than a whole (R, C) tensor where there is no Triton.
    return choose(op, impl, vectors, implementations, ("triton", "cpu") if vectors[0].is_cuda else ("cpu",))


def _lse_reference(
    x: Tensor, y: Tensor, scale: Tensor, ids: BlockIds, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    x, y = wide(x, y)
    logits = masked_logits(x, y, scale, ids)
    return logits.logsumexp(1), logits.logsumexp(0)


def _lse_cpu(x: Tensor, y: Tensor, scale: Tensor, ids: BlockIds, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    x, y = wide(x, y)
    return row_and_column_lse(Exponentials(x, y, float(scale), ids))


def _gradients_reference(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    ids: BlockIds,
    row_weight: Tensor,
    row_lse: Tensor,
    column_weight: Tensor,
    column_lse: Tensor,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    x, y = wide(x, y)
    s = masked_logits(x, y, scale, ids)
    g = row_weight[:, None] * (s - row_lse[:, None]).exp() + column_weight * (s - column_lse).exp()
    return g @ y, g.T @ x


def _gradients_cpu(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    ids: BlockIds,
    row_weight: Tensor,
    row_lse: Tensor,
    column_weight: Tensor,
    column_lse: Tensor,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Return the sums of :func:`block_gradients`, tile by tile."""
    (x, y), s = wide(x, y), float(scale)
    dx, dy = torch.zeros_like(x), torch.zeros_like(y)
    exponentials = Exponentials(x, y, s, ids)
    shift = exponentials.shift
    underflow = bool((row_lse - shift).lt(LOG_FLOOR).any() | (column_lse - shift).lt(LOG_FLOOR).any())
    a, b = row_weight * (shift - row_lse).exp(), column_weight * (shift - column_lse).exp()
    for rows, columns in tiles(x.shape[0], y.shape[0]):
        if underflow:
            logits = masked_logits(x, y, s, ids, rows=rows, columns=columns)
            g = row_weight[rows, None] * (logits - row_lse[rows, None]).exp()
            g += column_weight[columns] * (logits - column_lse[columns]).exp()
        else:
            g = exponentials.weighted(rows, columns, a, b)
        dx[rows].addmm_(g, y[columns])
        dy[columns].addmm_(g.T, x[rows])
    return dx, dy


_LSE = {
    "reference": _lse_reference,
    "cpu": _lse_cpu,
    "triton": with_triton("comtip_kernels.infonce.blocks_triton_op", "lse_triton"),
}
_GRADIENTS = {
    "reference": _gradients_reference,
    "cpu": _gradients_cpu,
    "triton": with_triton("comtip_kernels.infonce.blocks_triton_op", "gradients_triton"),
}
