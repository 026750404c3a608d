"""InfoNCE on a CPU, one block of rows at a time: no (B, M) tensor, one exponential per logit for both directions.

The vectors are of length 1, so every logit lies in [-scale, scale]: a shift that is the same for all rows and
columns keeps every exponential in range, and one value e_ij = exp(s_ij - shift) adds to row i's sum and to column
j's. With the row and column log-sum-exp known, the gradient with respect to s_ij is

    g_ij = e_ij (a_i + b_j)          a_i = w_i exp(shift - lse_i) / 2W        b_j = w_j exp(shift - lse_j) / 2W

(b_j = 0 for the further columns j >= B), minus w_i / W on the diagonal: a second pass makes e_ij again and multiplies.
That is four products of B x M x D in all. Sums that underflow (a row whose every similarity is far below the
best there can be) are found by their size and done again exactly, with a shift of their own.

Saved for the backward: the inputs, two numbers per row and one per column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK_BYTES = 12 << 20
"""Bytes of one block of logits: small beside what must be kept, large enough for the matrix products to run at speed."""
HEADROOM = 40.0
"""exp(HEADROOM) times any number of columns is far from overflow in fp32; what it adds below, it adds to the range."""
EPSILON = 1e-12
"""Length under which a vector is not normalised, as in torch.nn.functional.normalize."""
FLOOR = 1e-20
"""A sum below this may have lost terms to underflow; it is done again exactly."""


@dataclass
class Masks:
    """Which pairs enter the softmax, by integers per row and column."""

    negatives: str
    group_rows: Tensor | None
    group_columns: Tensor | None
    class_rows: Tensor | None
    class_columns: Tensor | None
    silent_rows: Tensor | None
    """bool (B,): spots of weight 0, nobody's negatives; None where there are none."""

    @property
    def trivial(self) -> bool:
        """Every pair is allowed."""
        return self.negatives == "all" and self.class_rows is None and self.silent_rows is None

    def block(self, rows: Tensor, n_columns: int) -> Tensor | None:
        """Return the bool mask (rows, M) of allowed pairs, positives included; None where all are."""
        if self.trivial:
            return None
        ok = torch.ones(rows.numel(), n_columns, dtype=torch.bool, device=rows.device)
        if self.negatives != "all" and self.group_rows is not None and self.group_columns is not None:
            same = self.group_rows[rows, None] == self.group_columns[None, :]
            ok = same if self.negatives == "same_group" else ~same
        if self.class_rows is not None and self.class_columns is not None:
            ok = ok & (self.class_rows[rows, None] != self.class_columns[None, :])
        if self.silent_rows is not None:
            ok[:, : self.silent_rows.numel()] &= ~self.silent_rows
            ok &= ~self.silent_rows[rows, None]
        ok[torch.arange(rows.numel(), device=rows.device), rows] = True
        return ok


def _blocks(n_rows: int, n_columns: int, item: int) -> list[Tensor]:
    size = max(16, BLOCK_BYTES // max(1, n_columns * item))
    return [torch.arange(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


def _exponentials(x: Tensor, y: Tensor, scale: float, shift: float, rows: Tensor, masks: Masks, out: Tensor) -> Tensor:
    """Return e (rows, M), in the memory of ``out``."""
    own = x[int(rows[0]) : int(rows[-1]) + 1]
    # Scale and shift come in at the end of the product, so that its sums round as those of numbers below 1.
    minus = x.new_tensor(-shift).expand(own.shape[0], y.shape[0])
    e = torch.addmm(minus, own, y.T, alpha=scale, out=out[: rows.numel()]).exp_()
    ok = masks.block(rows, y.shape[0])
    return e if ok is None else e.mul_(ok)


def row_and_column_lse(x: Tensor, y: Tensor, scale: float, masks: Masks) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of every row over its allowed columns (B,), and of the first B columns over rows (B,)."""
    B, M = x.shape[0], y.shape[0]
    shift = scale - HEADROOM
    row, column = x.new_zeros(B), x.new_zeros(M)
    blocks = _blocks(B, M, x.element_size())
    ones = x.new_ones(max(B, M))
    buffer = x.new_empty(blocks[0].numel() if blocks else 0, M)
    for rows in blocks:
        e = _exponentials(x, y, scale, shift, rows, masks, buffer)
        row[rows[0] : rows[-1] + 1] = e.mv(ones[:M])
        column.addmv_(e.T, ones[: rows.numel()])
    column = column[:B]
    row_lse, column_lse = row.log() + shift, column.log() + shift
    low = (row < FLOOR).nonzero().squeeze(1)
    for part in low.split(1024):
        row_lse[part] = _masked_logits(x, y, scale, part, masks).logsumexp(1)
    low = (column < FLOOR).nonzero().squeeze(1)
    for part in low.split(1024):
        column_lse[part] = _masked_columns(x, y, scale, part, masks).logsumexp(0)
    return row_lse, column_lse


def _masked_logits(x: Tensor, y: Tensor, scale: float, rows: Tensor, masks: Masks) -> Tensor:
    logits = scale * (x[rows] @ y.T)
    ok = masks.block(rows, y.shape[0])
    return logits if ok is None else logits.masked_fill(~ok, float("-inf"))


def _masked_columns(x: Tensor, y: Tensor, scale: float, columns: Tensor, masks: Masks) -> Tensor:
    logits = scale * (x @ y[columns].T)
    if masks.trivial:
        return logits
    parts = [
        ok[:, columns]
        for rows in _blocks(x.shape[0], y.shape[0], 1)
        if (ok := masks.block(rows, y.shape[0])) is not None
    ]
    return logits.masked_fill(~torch.cat(parts), float("-inf"))


class _InfoNCE(torch.autograd.Function):
    """Vectors of any length in, loss out; they are normalised in here, so that no copy of them is kept."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, weight: Tensor, masks: Masks) -> Tensor:
        s = float(scale)
        x, y = _unit(image), _unit(text)
        row_lse, column_lse = row_and_column_lse(x, y, s, masks)
        positive = s * torch.linalg.vecdot(x, y[: x.shape[0]])
        total = weight.sum().clamp_min(1e-12)
        ctx.save_for_backward(image, text, weight, row_lse, column_lse)
        ctx.scale, ctx.masks, ctx.total = s, masks, float(total)
        return (weight * (row_lse + column_lse - 2 * positive)).sum() / (2 * total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        image, text, weight, row_lse, column_lse = ctx.saved_tensors
        x, y = _unit(image), _unit(text)
        dx, dy = _unit_gradients(x, y, ctx.scale, weight / (2 * ctx.total), row_lse, column_lse, ctx.masks)
        # Every logit is linear in x, so d loss / d scale needs no further pass over the logits.
        dscale = torch.linalg.vecdot(x, dx).sum() * grads[0]
        factor = ctx.scale * grads[0]
        return _through_norm(image, x, dx.mul_(factor)), _through_norm(text, y, dy.mul_(factor)), dscale, None, None


def _unit(v: Tensor) -> Tensor:
    return v / v.norm(dim=-1, keepdim=True).clamp_min(EPSILON)


def _through_norm(v: Tensor, unit: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of v from that of v / |v|, in the memory of ``grad``."""
    norm = v.norm(dim=-1, keepdim=True)
    along = torch.linalg.vecdot(unit, grad).unsqueeze(-1).masked_fill_(norm < EPSILON, 0.0)
    return grad.addcmul_(unit, along, value=-1).div_(norm.clamp_min(EPSILON))


def _unit_gradients(
    x: Tensor, y: Tensor, s: float, half: Tensor, row_lse: Tensor, column_lse: Tensor, masks: Masks
) -> tuple[Tensor, Tensor]:
    """Return d loss / d(s x) and d loss / d(s y); see the module's formula."""
    B, shift = x.shape[0], s - HEADROOM
    # exp(shift - lse) overflows only where the sum underflowed; those rows and columns come in a pass of their own.
    row_low, column_low = row_lse - shift < _log(FLOOR), column_lse - shift < _log(FLOOR)
    a = torch.where(row_low, 0.0, half * (shift - row_lse).clamp_max(80.0).exp())
    b = torch.where(column_low, 0.0, half * (shift - column_lse).clamp_max(80.0).exp())
    b = torch.cat([b, b.new_zeros(y.shape[0] - B)])
    dx, dy = torch.empty_like(x), torch.zeros_like(y)
    blocks = _blocks(B, y.shape[0], x.element_size())
    buffer = x.new_empty(2, blocks[0].numel() if blocks else 0, y.shape[0])
    for rows in blocks:
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        e = _exponentials(x, y, s, shift, rows, masks, buffer[0])
        e.mul_(torch.add(a[part, None], b[None, :], out=buffer[1, : rows.numel()]))
        torch.mm(e, y, out=dx[part])
        dy.addmm_(e.T, x[part])
    _add_low(x, y, s, half, row_lse, column_lse, row_low, column_low, masks, dx, dy)
    dx.addcmul_(y[:B], half[:, None], value=-2)
    dy[:B].addcmul_(x, half[:, None], value=-2)
    return dx, dy


def _add_low(
    x: Tensor, y: Tensor, scale: float, half: Tensor, row_lse: Tensor, column_lse: Tensor, row_low: Tensor,
    column_low: Tensor, masks: Masks, dx: Tensor, dy: Tensor,
) -> None:  # fmt: skip
    """Add the gradient of rows and columns whose sums underflowed, exactly."""
    for part in row_low.nonzero().squeeze(1).split(1024):
        p = (_masked_logits(x, y, scale, part, masks) - row_lse[part, None]).exp_().mul_(half[part, None])
        dx[part] += p @ y
        dy += p.T @ x[part]
    for part in column_low.nonzero().squeeze(1).split(1024):
        p = (_masked_columns(x, y, scale, part, masks) - column_lse[None, part]).exp_().mul_(half[None, part])
        dx += p @ y[part]
        dy[part] += p.T @ x


def _log(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).log())


def infonce_cpu(
    image_BD: Tensor, text_MD: Tensor, scale: Tensor, *, negatives: str = "all", group_rows: Tensor | None = None,
    group_columns: Tensor | None = None, class_rows: Tensor | None = None, class_columns: Tensor | None = None,
    weight_B: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Symmetric InfoNCE; see :func:`comtip_kernels.infonce.infonce`. Returns a scalar."""
    B = image_BD.shape[0]
    weight = image_BD.new_ones(B) if weight_B is None else weight_B.detach().to(image_BD.dtype)
    silent = weight == 0
    masks = Masks(
        negatives, group_rows, group_columns, class_rows if class_columns is not None else None, class_columns,
        silent if bool(silent.any()) else None,
    )  # fmt: skip
    return _InfoNCE.apply(image_BD, text_MD, scale, weight, masks)
