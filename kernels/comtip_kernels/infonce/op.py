"""The Triton path as PyTorch operators: traced by torch.compile, counted by the FLOP counter, checked by opcheck."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from comtip_kernels.infonce import triton_kernels as kernels
from comtip_kernels.tl_common import INTERPRETING, fitted, power_of_2, precision

HEADROOM = 40.0
FLOOR = 1e-20
RULES = {"all": kernels.ALL, "same_group": kernels.SAME_GROUP, "other_group": kernels.OTHER_GROUP}
Ids = Tensor | None
_SMALL = {"BM": 32, "BN": 32, "BK": 32}


def _flags(rule: int, classes: Ids, silent: Ids, x: Tensor) -> dict[str, Any]:
    return {
        "RULE": rule, "CLASSES": classes is not None, "SILENT": silent is not None, "UPCAST": INTERPRETING,
        "PRECISION": precision(x),
    }  # fmt: skip


def _pointers(x: Tensor, *ids: Ids) -> list[Tensor]:
    """Return something to point at also for ids that are not there; it is never read."""
    return [x if i is None else i for i in ids]


@torch.library.custom_op("comtip::infonce_lse", mutates_args=())
def infonce_lse(
    x: Tensor, y: Tensor, scale: Tensor, rule: int, group_x: Ids, group_y: Ids, class_x: Ids, class_y: Ids, silent: Ids
) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of each row over its allowed columns and of the first B columns over rows, fp32 (B,)."""
    B, M, D = x.shape[0], y.shape[0], x.shape[1]
    if B == 0:
        return x.new_zeros(0, dtype=torch.float32), x.new_zeros(0, dtype=torch.float32)
    tiles = fitted(kernels.FORWARD, D, _SMALL)
    n_m, n_n = triton.cdiv(B, tiles["BM"]), triton.cdiv(M, tiles["BN"])
    row_sums = torch.empty(n_n, B, device=x.device, dtype=torch.float32)
    col_sums = torch.empty(n_m, M, device=x.device, dtype=torch.float32)
    flags, ids = _flags(rule, class_x, silent, x), _pointers(x, group_x, group_y, class_x, class_y, silent)
    kernels.lse_tiles[(n_m * n_n,)](
        x,
        y,
        row_sums,
        col_sums,
        scale,
        *ids,
        B,
        M,
        D,
        *x.stride(),
        *y.stride(),
        n_n,
        HEADROOM=HEADROOM,
        **flags,
        **tiles,
    )
    shift = scale - HEADROOM
    out = []
    exact = fitted(kernels.EXACT, D, _SMALL)
    swapped = _pointers(x, group_y, group_x, class_y, class_x, silent)
    for sums, q, k, own in ((row_sums.sum(0), x, y, ids), (col_sums.sum(0)[:B], y, x, swapped)):
        lse = sums.log() + shift
        low = (sums < FLOOR).to(torch.int32)
        kernels.exact_lse[(triton.cdiv(B, exact["BM"]),)](
            q, k, lse, low, scale, *own, B, k.shape[0], B, D, *q.stride(), *k.stride(), **flags, **exact
        )
        out.append(lse)
    return out[0], out[1]


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
    B, M, D = x.shape[0], y.shape[0], x.shape[1]
    dx = torch.empty(B, D, device=x.device, dtype=torch.float32)
    dy = torch.empty(M, D, device=x.device, dtype=torch.float32)
    if B == 0:
        return dx, dy.zero_()
    tiles = fitted(kernels.backward_tiles(x.dtype == torch.float32), D, _SMALL)
    tiles["BD"] = min(kernels.MAX_BD, power_of_2(D))
    flags = _flags(rule, class_x, silent, x)
    more = (0, M - B)
    floor = torch.tensor(FLOOR).log().item() + scale - HEADROOM
    rows = (half_row.float().contiguous(), row_lse, (row_lse < floor).to(torch.int32))
    columns = tuple(
        torch.nn.functional.pad(t, more).contiguous()
        for t in (half_column.float(), column_lse, (column_lse < floor).to(torch.int32))
    )
    ids, swapped = (
        _pointers(x, group_x, group_y, class_x, class_y, silent),
        _pointers(x, group_y, group_x, class_y, class_x, silent),
    )
    for q, k, out, own, other, who in ((x, y, dx, rows, columns, ids), (y, x, dy, columns, rows, swapped)):
        grid = (triton.cdiv(q.shape[0], tiles["BM"]), triton.cdiv(D, tiles["BD"]))
        kernels.grad_rows[grid](
            q, k, out, own[1], other[1], own[0], other[0], own[2], other[2], scale, *who, q.shape[0], k.shape[0], B, D,
            *q.stride(), *k.stride(), HEADROOM=HEADROOM, **flags, **tiles,
        )  # fmt: skip
    return dx, dy


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
    x, y = (torch.nn.functional.normalize(v, dim=-1) for v in (image_BD, text_MD))
    weight = torch.ones(B, device=x.device) if weight_B is None else weight_B.detach().float()
    # Groups are compared only where the rule asks; which spots are silent is data, and is never looked at on the host.
    groups = [
        None if g is None or negatives == "all" else g.to(torch.int32).contiguous() for g in (group_rows, group_columns)
    ]
    both = class_rows is not None and class_columns is not None
    classes = [c.to(torch.int32).contiguous() if both and c is not None else None for c in (class_rows, class_columns)]
    silent = None if weight_B is None else (weight == 0).to(torch.int32)
    row_lse, column_lse = infonce_lse(x, y, scale.float(), RULES[negatives], *groups, *classes, silent)
    positive = scale.float() * (x.float() * y[:B].float()).sum(-1)
    total = weight.sum().clamp_min(1e-12)
    return (weight * (row_lse + column_lse - 2 * positive)).sum() / (2 * total)
