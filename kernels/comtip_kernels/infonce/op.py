"""The Triton path as PyTorch operators: traced by torch.compile, counted by the FLOP counter, checked by opcheck."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from comtip_kernels.infonce import triton_kernels as kernels
from comtip_kernels.infonce.cpu import FLOOR, HEADROOM, LOG_FLOOR
from comtip_kernels.tl_common import INTERPRETING, fitted, power_of_2, precision

RULES = {"all": kernels.ALL, "same_group": kernels.SAME_GROUP, "other_group": kernels.OTHER_GROUP}
Ids = Tensor | None
_SMALL = {"BM": 32, "BN": 32, "BK": 32}


@dataclass(frozen=True)
class Pairs:
    """Which pairs the kernels let in: what is common to both directions, and the integers of rows and of columns."""

    rule: int
    rows: tuple[Ids, Ids, Ids]
    """Groups, classes, silent flags; None where nothing is compared."""
    columns: tuple[Ids, Ids, Ids]
    diagonal: bool
    """Pair (i, i) is a positive, for every row."""

    def flags(self, x: Tensor) -> dict[str, Any]:
        """Return what kernels are compiled for."""
        _, classes, silent = self.rows
        return {
            "RULE": self.rule, "CLASSES": classes is not None, "SILENT": silent is not None, "DIAGONAL": self.diagonal,
            "UPCAST": INTERPRETING, "PRECISION": precision(x),
        }  # fmt: skip

    def pointers(self, x: Tensor) -> list[Tensor]:
        """Return something to point at also for ids that are not there; it is never read."""
        return [x if i is None else i for both in zip(self.rows, self.columns, strict=True) for i in both]

    def swapped(self) -> Pairs:
        """Return the same with rows for columns."""
        return replace(self, rows=self.columns, columns=self.rows)


def lse_of(x: Tensor, y: Tensor, scale: Tensor, pairs: Pairs, columns: int) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of every row and of the first ``columns`` columns, fp32; -inf where no pair is let in."""
    (R, D), C = x.shape, y.shape[0]
    tiles = fitted(kernels.FORWARD, D, _SMALL)
    exact = fitted(kernels.exact_tiles(x.dtype == torch.float32), D, _SMALL)
    n_m, n_n = triton.cdiv(R, tiles["BM"]), triton.cdiv(C, tiles["BN"])
    row_sums = torch.empty(n_n, R, device=x.device, dtype=torch.float32)
    col_sums = torch.empty(n_m, C, device=x.device, dtype=torch.float32)
    flags = pairs.flags(x)
    kernels.lse_tiles[(n_m * n_n,)](
        x, y, row_sums, col_sums, scale, *pairs.pointers(x), R, C, D, *x.stride(), *y.stride(), n_n, HEADROOM=HEADROOM,
        **flags, **tiles,
    )  # fmt: skip
    shift = scale - HEADROOM
    out = []
    for sums, q, k, own in ((row_sums.sum(0), x, y, pairs), (col_sums.sum(0)[:columns], y, x, pairs.swapped())):
        lse, low, silent = sums.log() + shift, sums < FLOOR, own.rows[2]
        if not pairs.diagonal and silent is not None:
            low &= silent[: low.shape[0]] == 0  # nothing is let in there: -inf is right already
        kernels.exact_lse[(triton.cdiv(low.shape[0], exact["BM"]),)](
            q, k, lse, low.to(torch.int32), scale, *own.pointers(x), low.shape[0], k.shape[0], D, *q.stride(), *k.stride(),
            **flags, **exact,
        )  # fmt: skip
        out.append(lse)
    return out[0], out[1]


Stats = tuple[Tensor, Tensor]
"""Of rows or columns: weight of the softmax in the loss, and log-sum-exp, +inf where there is no softmax; fp32."""


def gradients_of(
    x: Tensor, y: Tensor, scale: Tensor, pairs: Pairs, rows: Stats, columns: Stats
) -> tuple[Tensor, Tensor]:
    """Return sum_j g_ij y_j, fp32 (R, D), and sum_i g_ij x_i, fp32 (C, D)."""
    D = x.shape[1]
    tiles = fitted(kernels.backward_tiles(x.dtype == torch.float32), D, _SMALL)
    tiles["BD"] = min(kernels.MAX_BD, power_of_2(D))
    floor = LOG_FLOOR + scale - HEADROOM
    flags = pairs.flags(x)
    of_rows, of_columns = ((lse, half, (lse < floor).to(torch.int32)) for half, lse in (rows, columns))
    out = []
    for q, k, own, other, who in ((x, y, of_rows, of_columns, pairs), (y, x, of_columns, of_rows, pairs.swapped())):
        grid = (triton.cdiv(q.shape[0], tiles["BM"]), triton.cdiv(D, tiles["BD"]))
        # The whole loss is square enough for one program per block of rows.
        parts, per_part = (1, k.shape[0]) if pairs.diagonal else kernels.shares(grid[0] * grid[1], k.shape[0])
        made = torch.empty(parts, q.shape[0], D, device=x.device, dtype=torch.float32)
        kernels.grad_rows[(*grid, parts)](
            q, k, made, own[0], other[0], own[1], other[1], own[2], other[2], scale, *who.pointers(x), q.shape[0], k.shape[0],
            per_part, D, *q.stride(), *k.stride(), HEADROOM=HEADROOM, **flags, **tiles,
        )  # fmt: skip
        out.append(made[0] if parts == 1 else made.sum(0))
    return out[0], out[1]


def _pairs(
    columns: int, rule: int, group_x: Ids, group_y: Ids, class_x: Ids, class_y: Ids, silent: Ids
) -> Pairs:  # fmt: skip
    """Return who is let in; ``silent`` marks pairs, no further column is silent."""
    if silent is not None:
        silent = F.pad(silent, (0, columns - silent.shape[0]))
    return Pairs(rule, (group_x, class_x, silent), (group_y, class_y, silent), diagonal=True)


@torch.library.custom_op("comtip::infonce_lse", mutates_args=())
def infonce_lse(
    x: Tensor, y: Tensor, scale: Tensor, rule: int, group_x: Ids, group_y: Ids, class_x: Ids, class_y: Ids, silent: Ids
) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of each row over its allowed columns and of the first B columns over rows, fp32 (B,)."""
    B = x.shape[0]
    if B == 0:
        return x.new_zeros(0, dtype=torch.float32), x.new_zeros(0, dtype=torch.float32)
    return lse_of(x, y, scale, _pairs(y.shape[0], rule, group_x, group_y, class_x, class_y, silent), B)


@infonce_lse.register_fake
def _(x: Tensor, y: Tensor, scale: Tensor, rule: int, *ids: Ids) -> tuple[Tensor, Tensor]:
    one, two = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    return one, two


@torch.library.custom_op("comtip::infonce_grads", mutates_args=())
def infonce_grads(
    x: Tensor, y: Tensor, scale: Tensor, half_row: Tensor, half_column: Tensor, row_lse: Tensor, column_lse: Tensor, rule: int,
    group_x: Ids, group_y: Ids, class_x: Ids, class_y: Ids, silent: Ids,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return sum_j g_ij y_j, fp32 (B, D), and sum_i g_ij x_i, fp32 (M, D)."""
    B, M = x.shape[0], y.shape[0]
    if B == 0:
        dx, dy = (torch.zeros_like(v, dtype=torch.float32, memory_format=torch.contiguous_format) for v in (x, y))
        return dx, dy
    pairs, more = _pairs(M, rule, group_x, group_y, class_x, class_y, silent), (0, M - B)
    columns = (F.pad(half_column.float(), more).contiguous(), F.pad(column_lse, more, value=math.inf).contiguous())
    return gradients_of(x, y, scale, pairs, (half_row.float().contiguous(), row_lse), columns)


@infonce_grads.register_fake
def _(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float32), y.new_empty(y.shape, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, y, scale, rule, *ids = inputs
    ctx.save_for_backward(x, y, scale, *output, *ids)
    ctx.rule = rule


def _backward(ctx: Any, grad_row: Tensor, grad_column: Tensor) -> tuple[Tensor | None, ...]:
    x, y, scale, row_lse, column_lse, *ids = ctx.saved_tensors
    dx, dy = torch.ops.comtip.infonce_grads(x, y, scale, grad_row, grad_column, row_lse, column_lse, ctx.rule, *ids)
    dscale = (x.float() * dx).sum().to(scale.dtype)
    return (dx * scale).to(x.dtype), (dy * scale).to(y.dtype), dscale, None, None, None, None, None, None


infonce_lse.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.comtip.infonce_lse)
def _lse_flops(x: Any, y: Any, *_args: Any, **_kwargs: Any) -> int:
    return int(2 * x[0] * y[0] * x[1])


@register_flop_formula(torch.ops.comtip.infonce_grads)
def _grad_flops(x: Any, y: Any, *_args: Any, **_kwargs: Any) -> int:
    return int(8 * x[0] * y[0] * x[1])


def infonce_triton(
    image_BD: Tensor, text_MD: Tensor, scale: Tensor, *, negatives: str = "all", group_rows: Ids = None,
    group_columns: Ids = None, class_rows: Ids = None, class_columns: Ids = None, weight_B: Ids = None,
) -> Tensor:  # fmt: skip
    """Symmetric InfoNCE; see :func:`comtip_kernels.infonce.infonce`. Returns a scalar, fp32."""
    B = image_BD.shape[0]
    x, y = (F.normalize(v, dim=-1) for v in (image_BD, text_MD))
    weight = torch.ones(B, device=x.device) if weight_B is None else weight_B.detach().float()
    # Groups are compared only where the rule asks; which spots are silent is data, and is never looked at on the host.
    groups = [
        None if g is None or negatives == "all" else g.to(torch.int32).contiguous() for g in (group_rows, group_columns)
    ]
    both = class_rows is not None and class_columns is not None
    # Classes keep their 64 bits, which may be a hash's.
    classes = [c.to(torch.int64).contiguous() if both and c is not None else None for c in (class_rows, class_columns)]
    silent = None if weight_B is None else (weight == 0).to(torch.int32)
    row_lse, column_lse = infonce_lse(x, y, scale.float(), RULES[negatives], *groups, *classes, silent)
    positive = scale.float() * (x.float() * y[:B].float()).sum(-1)
    total = weight.sum().clamp_min(1e-12)
    return (weight * (row_lse + column_lse - 2 * positive)).sum() / (2 * total)
