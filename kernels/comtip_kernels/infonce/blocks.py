"""InfoNCE in blocks of rows and columns, for vectors that lie on several devices: statistics and gradients of one block.

A block holds R images and C texts, any of them; what a rank has is a block of the whole (B, M) matrix. A pair of one class
("the same text") is never a negative, and an image and its own text are of one class, so the positives drop out of every
block by themselves, wherever they stand; whoever has both vectors adds them. Put together, with lse over negatives:

    lse_i  = log(exp(s_ii) + sum over blocks exp(row lse))      likewise per column
    ds_ij  = half_i exp(s_ij - lse_i) + half_j exp(s_ij - lse_j)

``triton`` has the kernels of the whole loss (:mod:`.blocks_op`): no (R, C) tensor, and nothing is read on the host. ``cpu``
makes none either: it works through tiles of the block in turn, in plain PyTorch, on any device. ``reference`` is the formula.
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

    Classes are compared as 64-bit integers (they may be hashes), groups as 32-bit ones.
    """

    own_pairs: ClassVar[bool] = False

    @property
    def trivial(self) -> bool:
        """A class rules something out, always."""
        return False


def block_lse(x: Tensor, y: Tensor, scale: Tensor, ids: BlockIds, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp over negatives of every row (R,) and of every column (C,); -inf where there are none.

    Parameters
    ----------
    x, y
        Unit vectors (R, D) and (C, D).
    scale
        Inverse temperature, a scalar tensor.
    ids
        Who is whose negative.
    impl
        Which implementation; see :mod:`comtip_kernels.dispatch`. ``cpu`` runs on any device.

    Returns
    -------
    tuple of Tensor
        In the vectors' dtype, and at least fp32.

    Raises
    ------
    ValueError
        If ``ids`` has no classes, or ``impl`` cannot run.
    """
    return _chosen("infonce_block_lse", impl, x, ids, _LSE)(x, y, scale, ids)


def block_gradients(
    x: Tensor, y: Tensor, scale: Tensor, ids: BlockIds, half_row: Tensor, row_lse: Tensor, half_column: Tensor,
    column_lse: Tensor, *, impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return sum_j g_ij y_j (R, D) and sum_i g_ij x_i (C, D) over the block's negatives; see the module's formula.

    Parameters
    ----------
    x, y, scale, ids, impl
        As for :func:`block_lse`; so are dtypes and errors.
    half_row, half_column
        Weight of each row's and column's own softmax in the loss; 0 where it has none (further columns).
    row_lse, column_lse
        Over the *whole* row and column, positive included, so that no exponential exceeds 1.
    """
    # A column without a softmax of its own has no log-sum-exp either; +inf makes its exponentials 0, not NaN.
    column_lse = torch.where(half_column != 0, column_lse, torch.inf)
    row_lse = torch.where(half_row != 0, row_lse, torch.inf)
    run = _chosen("infonce_block_gradients", impl, x, ids, _GRADIENTS)
    return run(x, y, scale, ids, half_row, row_lse, half_column, column_lse)


def _chosen(op: str, impl: str, x: Tensor, ids: BlockIds, have: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    if ids.class_rows is None or ids.class_columns is None:
        raise ValueError(f"{op}: a block's rows and columns need classes, by which positives are told from negatives")
    # The blocks of rows run on any device, and are better than a whole (R, C) tensor where there is no Triton.
    return choose(op, impl, x, have, ("triton", "cpu") if x.is_cuda else ("cpu",))


def _lse_reference(x: Tensor, y: Tensor, scale: Tensor, ids: BlockIds) -> tuple[Tensor, Tensor]:
    logits = masked_logits(wide(x), wide(y), scale, ids)
    return logits.logsumexp(1), logits.logsumexp(0)


def _lse_cpu(x: Tensor, y: Tensor, scale: Tensor, ids: BlockIds) -> tuple[Tensor, Tensor]:
    return row_and_column_lse(Exponentials(wide(x), wide(y), float(scale), ids))


def _gradients_reference(
    x: Tensor, y: Tensor, scale: Tensor, ids: BlockIds, half_row: Tensor, row_lse: Tensor, half_column: Tensor,
    column_lse: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, y = wide(x), wide(y)
    s = masked_logits(x, y, scale, ids)
    g = half_row[:, None] * (s - row_lse[:, None]).exp() + half_column * (s - column_lse).exp()
    return g @ y, g.T @ x


def _gradients_cpu(
    x: Tensor, y: Tensor, scale: Tensor, ids: BlockIds, half_row: Tensor, row_lse: Tensor, half_column: Tensor,
    column_lse: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, y, s = wide(x), wide(y), float(scale)
    dx, dy = torch.zeros_like(x), torch.zeros_like(y)
    make = Exponentials(x, y, s, ids)
    shift = make.shift
    low = bool((row_lse - shift).lt(LOG_FLOOR).any() | (column_lse - shift).lt(LOG_FLOOR).any())
    a, b = half_row * (shift - row_lse).exp(), half_column * (shift - column_lse).exp()
    for rows, columns in tiles(x.shape[0], y.shape[0]):
        if low:
            logits = masked_logits(x, y, s, ids, rows=rows, columns=columns)
            g = half_row[rows, None] * (logits - row_lse[rows, None]).exp()
            g += half_column[columns] * (logits - column_lse[columns]).exp()
        else:
            g = make.weighted(rows, columns, a, b)
        dx[rows].addmm_(g, y[columns])
        dy[columns].addmm_(g.T, x[rows])
    return dx, dy


_LSE = {
    "reference": _lse_reference,
    "cpu": _lse_cpu,
    "triton": with_triton("comtip_kernels.infonce.blocks_op", "lse_triton"),
}
_GRADIENTS = {
    "reference": _gradients_reference,
    "cpu": _gradients_cpu,
    "triton": with_triton("comtip_kernels.infonce.blocks_op", "gradients_triton"),
}
