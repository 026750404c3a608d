"""InfoNCE on a CPU, one tile of logits at a time, with one exponential per logit for both directions.

The vectors have length 1, so every logit lies in [-scale, scale]: a shift that is the same for all rows and columns keeps every
exponential in range, and one value e_ij = exp(s_ij - shift) is added to the sum of row i and to that of column j. With the
row and column log-sum-exp known, the gradient with respect to s_ij is

    g_ij = e_ij (a_i + b_j)          a_i = w_i exp(shift - lse_i) / 2W        b_j = w_j exp(shift - lse_j) / 2W

(b_j = 0 for the further columns j >= B), minus w_i / W on the diagonal; W is the sum of the weights. A second pass recomputes e_ij
and multiplies: four products of B x M x D in all, fewer if the first pass keeps its first tiles (``KEPT_BYTES``). Sums that
underflow (rows whose similarities are all far below the maximum) are detected by their size and recomputed exactly, with a
shift of their own.

Saved for the backward pass: the inputs, the weight of each pair, the log-sum-exp of its row and of its column, and the kept tiles
(at most ``KEPT_BYTES``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from comtip_kernels.flops import KEPT_BYTES

TILE = 1024
"""Maximum rows and columns of a tile of logits: its products run at the speed of large ones (long narrow blocks of rows take
10 % longer), and the elementwise operations between them stay in the cache."""
HEADROOM = 40.0
"""Scale minus shift: exp(HEADROOM) times any number of columns does not overflow fp32, and underflow begins this much lower."""
EPSILON = 1e-12
"""Minimum length in the normalisation, as in torch.nn.functional.normalize."""
FLOOR = 1e-20
"""A sum below this may have lost terms to underflow and is recomputed exactly."""
LOG_FLOOR = math.log(FLOOR)
LOG2_E = math.log2(math.e)
Index = Tensor | slice


@dataclass
class Masks:
    """Which pairs enter the softmax, by ids and flags of rows and columns; see :func:`comtip_kernels.infonce`."""

    negatives: str
    group_rows: Tensor | None
    group_columns: Tensor | None
    class_rows: Tensor | None
    class_columns: Tensor | None
    excluded_rows: Tensor | None = None
    """bool (B,): images that are not negatives because their weight is 0; None excludes none."""
    excluded_columns: Tensor | None = None
    """bool (M,): texts that are not negatives: the texts of excluded images, and excluded further columns; None excludes none."""
    own_pairs: ClassVar[bool] = True
    """Whether column i is the positive of row i, which is always allowed."""

    @property
    def trivial(self) -> bool:
        """True if every pair is allowed."""
        return self.negatives == "all" and self.class_rows is None and self.excluded_rows is None

    def block(self, rows: Index, columns: Index, like: Tensor) -> Tensor | None:
        """Return the bool mask of allowed pairs of these rows and columns, in the shape of ``like``; None if all are allowed."""
        if self.trivial:
            return None
        ok = torch.ones_like(like, dtype=torch.bool)
        if self.negatives != "all" and self.group_rows is not None and self.group_columns is not None:
            same = self.group_rows[rows][:, None] == self.group_columns[columns]
            ok &= same if self.negatives == "same_group" else ~same
        if self.class_rows is not None and self.class_columns is not None:
            ok &= self.class_rows[rows][:, None] != self.class_columns[columns]
        if self.excluded_rows is not None:
            ok &= ~self.excluded_rows[rows][:, None]
        if self.excluded_columns is not None:
            ok &= ~self.excluded_columns[columns]
        return ok | _same(rows, columns, like) if self.own_pairs else ok


def _same(rows: Index, columns: Index, like: Tensor) -> Tensor:
    """Return the bool mask of pairs with the same index in the complete matrix, in the shape of ``like``."""

    def numbers(index: Index, n: int) -> Tensor:
        if isinstance(index, Tensor):
            return index
        start = index.start or 0
        return torch.arange(start, start + n, device=like.device)

    return numbers(rows, like.shape[0])[:, None] == numbers(columns, like.shape[1])


def tiles(n_rows: int, n_columns: int) -> Iterator[tuple[slice, slice]]:
    """Yield the tiles of a matrix in row-major order; none if it is empty."""
    for top in range(0, n_rows, TILE):
        for left in range(0, n_columns, TILE):
            yield slice(top, min(top + TILE, n_rows)), slice(left, min(left + TILE, n_columns))


Tiles = dict[tuple[int, int], Tensor]


class Exponentials:
    """Computes exp(s_ij - shift) tile by tile in one buffer, and keeps the first tiles.

    Parameters
    ----------
    x, y
        Unit vectors (B, D) and (M, D).
    scale
        Inverse temperature.
    masks
        Which pairs are allowed.
    kept
        Tiles computed earlier, by first row and column; new tiles are added, up to ``keep_bytes`` in all.
    keep_bytes
        Maximum bytes of tiles to keep.
    """

    def __init__(
        self, x: Tensor, y: Tensor, scale: float, masks: Masks, kept: Tiles | None = None, keep_bytes: int = 0
    ) -> None:
        self.x, self.y, self.scale, self.masks = x, y, scale, masks
        self.shift = scale - HEADROOM
        self.kept = {} if kept is None else kept
        self._free = x.new_empty(min(keep_bytes // x.element_size(), x.shape[0] * y.shape[0]))
        # Powers of 2 take less than half the time of powers of e.
        self._minus = x.new_tensor(-self.shift * LOG2_E)
        self._memory = x.new_empty(2, min(TILE, x.shape[0]) * min(TILE, y.shape[0]))

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """Return e (rows, columns), read-only; 0 where a pair is not allowed. The next call overwrites a tile that is not kept."""
        index = (rows.start, columns.start)
        if index in self.kept:
            return self.kept[index]
        x, y = self.x[rows], self.y[columns]
        shape = (x.shape[0], y.shape[0])
        keep = self._free.numel() >= shape[0] * shape[1]
        out = (self._free if keep else self._memory[0])[: shape[0] * shape[1]].view(shape)
        # Scale and shift are applied after the product, so that its sums round as sums of numbers below 1.
        e = torch.addmm(self._minus.expand(shape), x, y.T, alpha=self.scale * LOG2_E, out=out).exp2_()
        ok = self.masks.block(rows, columns, e)
        if ok is not None:
            e.mul_(ok)
        if keep:
            self.kept[index] = e
            self._free = self._free[e.numel() :]
        return e

    def weighted(self, rows: slice, columns: slice, a: Tensor, b: Tensor) -> Tensor:
        """Return e_ij (a_i + b_j) of a tile, for a (B,) and b (M,)."""
        e = self.tile(rows, columns)
        out = self._memory[1, : e.numel()].view(e.shape)
        return torch.add(a[rows, None], b[columns], out=out).mul_(e)


def row_and_column_lse(exponentials: Exponentials) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp over allowed pairs of every row, and of every column that has a softmax of its own."""
    x, y, scale, masks = exponentials.x, exponentials.y, exponentials.scale, exponentials.masks
    row, column = sums(exponentials)
    if masks.own_pairs:  # columns from the B-th on are further negatives
        column = column[: x.shape[0]]
    row_lse, column_lse = row.log() + exponentials.shift, column.log() + exponentials.shift
    # Sums that underflowed are recomputed, each with its own maximum; there may also be no allowed pair.
    for part in _parts(row < FLOOR):
        row_lse[part] = masked_logits(x, y, scale, masks, rows=part).logsumexp(1)
    for part in _parts(column < FLOOR):
        column_lse[part] = masked_logits(x, y, scale, masks, columns=part).logsumexp(0)
    return row_lse, column_lse


def _parts(chosen: Tensor) -> tuple[Tensor, ...]:
    """Return the indices of the entries of ``chosen`` that are True, at most ``TILE`` in each part; no part if there are none."""
    index = chosen.nonzero().squeeze(1)
    return index.split(TILE) if index.numel() else ()


def sums(exponentials: Exponentials) -> tuple[Tensor, Tensor]:
    """Return the sums of exp(s_ij - shift) over allowed columns (B,) and over rows (M,)."""
    row, column = exponentials.x.new_zeros(exponentials.x.shape[0]), exponentials.x.new_zeros(exponentials.y.shape[0])
    ones = row.new_ones(TILE)
    for rows, columns in tiles(row.numel(), column.numel()):
        e = exponentials.tile(rows, columns)
        row[rows].addmv_(e, ones[: e.shape[1]])
        column[columns].addmv_(e.T, ones[: e.shape[0]])
    return row, column


_ALL = slice(None)


def masked_logits(
    x: Tensor, y: Tensor, scale: float | Tensor, masks: Masks, *, rows: Index = _ALL, columns: Index = _ALL
) -> Tensor:
    """Return the logits of these rows and columns, -inf where a pair is not allowed."""
    logits = scale * (x[rows] @ y[columns].T)
    ok = masks.block(rows, columns, logits)
    return logits if ok is None else logits.masked_fill(~ok, float("-inf"))


class _InfoNCE(torch.autograd.Function):
    """Loss of vectors of any length, which are normalised here so that no normalised copy is stored."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, weight: Tensor, masks: Masks) -> Tensor:
        s = float(scale)
        x, y = _unit(image, text)
        exponentials = Exponentials(x, y, s, masks, keep_bytes=KEPT_BYTES if any(ctx.needs_input_grad) else 0)
        row_lse, column_lse = row_and_column_lse(exponentials)
        positive = s * torch.linalg.vecdot(x, y[: x.shape[0]])
        total = weight.sum().clamp_min(1e-12)
        ctx.save_for_backward(image, text, weight, row_lse, column_lse)
        ctx.scale, ctx.masks, ctx.total, ctx.kept = s, masks, float(total), exponentials.kept
        return (weight * (row_lse + column_lse - 2 * positive)).sum() / (2 * total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        image, text, weight, row_lse, column_lse = ctx.saved_tensors
        x, y = _unit(image, text)
        exponentials = Exponentials(x, y, ctx.scale, ctx.masks, ctx.kept)
        dx, dy = _unit_gradients(exponentials, weight / (2 * ctx.total), row_lse, column_lse)
        # Every logit is linear in x, so the gradient of the scale needs no further pass over the logits.
        dscale = torch.linalg.vecdot(x, dx).sum() * grads[0]
        factor = ctx.scale * grads[0]
        return _through_norm(image, x, dx.mul_(factor)), _through_norm(text, y, dy.mul_(factor)), dscale, None, None


def wide(*vectors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in one dtype, at least fp32: statistics of logits up to 100 cannot be kept in bf16."""
    dtype = torch.float32
    for v in vectors:
        dtype = torch.promote_types(dtype, v.dtype)
    return tuple(v.to(dtype) for v in vectors)


def _unit(*vectors: Tensor) -> tuple[Tensor, ...]:
    return tuple(v / v.norm(dim=-1, keepdim=True).clamp_min(EPSILON) for v in wide(*vectors))


def _through_norm(v: Tensor, unit: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of v from that of v / |v|; overwrites ``grad``."""
    norm = v.to(grad.dtype).norm(dim=-1, keepdim=True)
    along = torch.linalg.vecdot(unit, grad).unsqueeze(-1).masked_fill_(norm < EPSILON, 0.0)
    return grad.addcmul_(unit, along, value=-1).div_(norm.clamp_min(EPSILON)).to(v.dtype)


def _unit_gradients(
    exponentials: Exponentials, half: Tensor, row_lse: Tensor, column_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the derivatives of the loss with respect to scale * x (B, D) and scale * y (M, D); see the module's formula."""
    x, y, shift = exponentials.x, exponentials.y, exponentials.shift
    B = x.shape[0]
    # exp(shift - lse) overflows only where the sum underflowed; these rows and columns are added by _add_low.
    row_low, column_low = row_lse - shift < LOG_FLOOR, column_lse - shift < LOG_FLOOR
    a = torch.where(row_low, 0.0, half * (shift - row_lse).clamp_max(80.0).exp())
    b = torch.where(column_low, 0.0, half * (shift - column_lse).clamp_max(80.0).exp())
    b = torch.cat([b, b.new_zeros(y.shape[0] - B)])
    dx, dy = torch.zeros_like(x), torch.zeros_like(y)
    for rows, columns in tiles(B, y.shape[0]):
        g = exponentials.weighted(rows, columns, a, b)
        dx[rows].addmm_(g, y[columns])
        dy[columns].addmm_(g.T, x[rows])
    _add_low(x, y, exponentials.scale, half, row_lse, column_lse, row_low, column_low, exponentials.masks, dx, dy)
    dx.addcmul_(y[:B], half[:, None], value=-2)
    dy[:B].addcmul_(x, half[:, None], value=-2)
    return dx, dy


def _add_low(
    x: Tensor,
    y: Tensor,
    scale: float,
    half: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    row_low: Tensor,
    column_low: Tensor,
    masks: Masks,
    dx: Tensor,
    dy: Tensor,
) -> None:
    """Add to ``dx`` and ``dy`` the exact gradient of the rows and columns whose sums underflowed."""
    for part in _parts(row_low):
        logits = masked_logits(x, y, scale, masks, rows=part)
        p = (logits - row_lse[part, None]).exp_().mul_(half[part, None])
        dx[part] += p @ y
        dy += p.T @ x[part]
    for part in _parts(column_low):
        logits = masked_logits(x, y, scale, masks, columns=part)
        p = (logits - column_lse[None, part]).exp_().mul_(half[None, part])
        dx += p @ y[part]
        dy[part] += p.T @ x


def infonce_cpu(
    image_BD: Tensor,
    text_MD: Tensor,
    scale: Tensor,
    *,
    negatives: str = "all",
    group_rows: Tensor | None = None,
    group_columns: Tensor | None = None,
    class_rows: Tensor | None = None,
    class_columns: Tensor | None = None,
    weight_B: Tensor | None = None,
    excluded_further: Tensor | None = None,
) -> Tensor:
    """Return the symmetric InfoNCE loss, a scalar in at least fp32; see :func:`comtip_kernels.infonce`."""
    B, dtype = image_BD.shape[0], wide(image_BD[:0], text_MD[:0])[0].dtype
    weight = image_BD.new_ones(B, dtype=dtype) if weight_B is None else weight_B.detach().to(dtype)
    excluded = weight == 0
    masks = Masks(
        negatives, group_rows, group_columns, class_rows if class_columns is not None else None, class_columns
    )
    if excluded_further is not None or bool(excluded.any()):
        further = excluded.new_zeros(text_MD.shape[0] - B) if excluded_further is None else excluded_further
        masks.excluded_rows, masks.excluded_columns = excluded, torch.cat([excluded, further])
    with torch.autocast(image_BD.device.type, enabled=False):  # autocast would round the products to bf16
        return _InfoNCE.apply(image_BD, text_MD, scale, weight, masks)
