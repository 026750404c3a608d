"""InfoNCE in blocks of rows and columns, for vectors that lie on several devices: statistics and gradients of one block.

A block holds R images and C texts, any of them; what a rank has is a block of the whole (B, M) matrix. A pair of one class
("the same text") is never a negative, and an image and its own text are of one class, so the positives drop out of every
block by themselves, wherever they stand; whoever has both vectors adds them. Put together, with lse over negatives:

    lse_i  = log(exp(s_ii) + sum over blocks exp(row lse))      likewise per column
    ds_ij  = half_i exp(s_ij - lse_i) + half_j exp(s_ij - lse_j)

Neither function makes an (R, C) tensor: blocks of rows of the block are worked through in turn (:mod:`.cpu`, plain
PyTorch on any device). ``impl="reference"`` is the formula at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from comtip_kernels.infonce.cpu import FLOOR, HEADROOM, Masks, _blocks, _exponentials, _log

__all__ = ["BlockIds", "block_gradients", "block_lse"]


@dataclass
class BlockIds(Masks):
    """Which pairs of a block are negatives; every row and column has a class. See :class:`.cpu.Masks`."""

    silent_columns: Tensor | None = None
    """bool (C,): the text of a spot of weight 0, nobody's negative; None where there are none."""

    @property
    def trivial(self) -> bool:
        """A class rules something out, always."""
        return False

    def block(self, rows: Tensor, n_columns: int) -> Tensor:
        """Return the bool mask (rows, C) of negatives."""
        assert self.class_rows is not None
        assert self.class_columns is not None
        ok = self.class_rows[rows, None] != self.class_columns[None, :]
        if self.negatives != "all" and self.group_rows is not None and self.group_columns is not None:
            same = self.group_rows[rows, None] == self.group_columns[None, :]
            ok &= same if self.negatives == "same_group" else ~same
        if self.silent_rows is not None:
            ok &= ~self.silent_rows[rows, None]
        if self.silent_columns is not None:
            ok &= ~self.silent_columns
        return ok


def block_lse(x: Tensor, y: Tensor, scale: float, ids: BlockIds, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp over negatives of every row (R,) and of every column (C,); -inf where there are none.

    Parameters
    ----------
    x, y
        Unit vectors (R, D) and (C, D).
    scale
        Inverse temperature.
    ids
        Who is whose negative.
    impl
        ``auto`` or ``reference``.
    """
    if impl == "reference":
        logits = _logits(x, y, scale, ids, torch.arange(x.shape[0], device=x.device))
        return logits.logsumexp(1), logits.logsumexp(0)
    R, C = x.shape[0], y.shape[0]
    shift = scale - HEADROOM
    row, column = x.new_zeros(R), x.new_zeros(C)
    blocks = _rows(x, y)
    buffer = x.new_empty(blocks[0].numel() if blocks else 0, C)
    for rows in blocks:
        e = _exponentials(x, y, scale, shift, rows, ids, buffer)
        row[rows] = e.sum(1)
        column += e.sum(0)
    row_lse, column_lse = row.log() + shift, column.log() + shift
    # Sums that underflowed may stand for negatives far off, or for none at all: done again, each with its own maximum.
    for part in (row < FLOOR).nonzero().squeeze(1).split(1024):
        row_lse[part] = _logits(x, y, scale, ids, part).logsumexp(1)
    for part in (column < FLOOR).nonzero().squeeze(1).split(1024):
        column_lse[part] = _logits(x, y[part], scale, _columns(ids, part), None).logsumexp(0)
    return row_lse, column_lse


def block_gradients(
    x: Tensor, y: Tensor, scale: float, ids: BlockIds, half_row: Tensor, row_lse: Tensor, half_column: Tensor,
    column_lse: Tensor, *, impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return sum_j g_ij y_j (R, D) and sum_i g_ij x_i (C, D) over the block's negatives; see the module's formula.

    Parameters
    ----------
    x, y, scale, ids
        As for :func:`block_lse`.
    half_row, half_column
        Weight of each row's and column's own softmax in the loss; 0 where it has none (further columns).
    row_lse, column_lse
        Over the *whole* row and column, positive included, so that no exponential exceeds 1.
    """
    # A column without a softmax of its own has no log-sum-exp either; +inf makes its exponentials 0, not NaN.
    column_lse = torch.where(half_column != 0, column_lse, torch.inf)
    row_lse = torch.where(half_row != 0, row_lse, torch.inf)
    dx, dy = torch.zeros_like(x), torch.zeros_like(y)
    shift, floor = scale - HEADROOM, _log(FLOOR)
    low = bool((row_lse - shift).lt(floor).any() | (column_lse - shift).lt(floor).any())
    a, b = half_row * (shift - row_lse).exp(), half_column * (shift - column_lse).exp()
    blocks = [torch.arange(x.shape[0])] if impl == "reference" else _rows(x, y)
    buffer = x.new_empty(blocks[0].numel() if blocks else 0, y.shape[0])
    for rows in blocks:
        if low or impl == "reference":
            s = _logits(x, y, scale, ids, rows)
            g = half_row[rows, None] * (s - row_lse[rows, None]).exp() + half_column * (s - column_lse).exp()
        else:
            g = _exponentials(x, y, scale, shift, rows, ids, buffer).mul_(a[rows, None] + b)
        dx[rows] = g @ y
        dy.addmm_(g.T, x[rows])
    return dx, dy


def _rows(x: Tensor, y: Tensor) -> list[Tensor]:
    """Return blocks of rows whose logits fill about one block of memory; none where there is nothing to multiply."""
    if x.shape[0] == 0 or y.shape[0] == 0:
        return []
    return [rows.to(x.device) for rows in _blocks(x.shape[0], y.shape[0], x.element_size())]


def _columns(ids: BlockIds, part: Tensor) -> BlockIds:
    def of(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[part]

    return BlockIds(
        ids.negatives, ids.group_rows, of(ids.group_columns), ids.class_rows, of(ids.class_columns), ids.silent_rows,
        of(ids.silent_columns),
    )  # fmt: skip


def _logits(x: Tensor, y: Tensor, scale: float, ids: BlockIds, rows: Tensor | None) -> Tensor:
    rows = torch.arange(x.shape[0], device=x.device) if rows is None else rows
    return (scale * (x[rows] @ y.T)).masked_fill(~ids.block(rows, y.shape[0]), float("-inf"))
