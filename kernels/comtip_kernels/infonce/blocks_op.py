"""Blocks of InfoNCE on a GPU, as PyTorch operators: the whole loss's kernels without a diagonal; nothing is read on the host.

Forward only: who has the blocks puts them together, derivatives included (:mod:`comtip_kernels.infonce.blocks`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from comtip_kernels.infonce.op import RULES, Ids, Pairs, gradients_of, lse_of

if TYPE_CHECKING:
    from comtip_kernels.infonce.blocks import BlockIds


@torch.library.custom_op("comtip::infonce_block_lse", mutates_args=())
def infonce_block_lse(
    x: Tensor, y: Tensor, scale: Tensor, rule: int, group_x: Ids, group_y: Ids, class_x: Tensor, class_y: Tensor,
    silent_x: Ids, silent_y: Ids,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the log-sum-exp over negatives of every row (R,) and of every column (C,), fp32."""
    if x.shape[0] == 0 or y.shape[0] == 0:
        nothing = [v.new_full(v.shape[:1], -torch.inf, dtype=torch.float32) for v in (x, y)]
        return nothing[0], nothing[1]
    pairs = Pairs(rule, (group_x, class_x, silent_x), (group_y, class_y, silent_y), diagonal=False)
    return lse_of(x, y, scale, pairs, y.shape[0])


@infonce_block_lse.register_fake
def _(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=torch.float32), y.new_empty(y.shape[0], dtype=torch.float32)


@torch.library.custom_op("comtip::infonce_block_grads", mutates_args=())
def infonce_block_grads(
    x: Tensor, y: Tensor, scale: Tensor, half_row: Tensor, row_lse: Tensor, half_column: Tensor, column_lse: Tensor,
    rule: int, group_x: Ids, group_y: Ids, class_x: Tensor, class_y: Tensor, silent_x: Ids, silent_y: Ids,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return sum_j g_ij y_j, fp32 (R, D), and sum_i g_ij x_i, fp32 (C, D), over negatives."""
    if x.shape[0] == 0 or y.shape[0] == 0:
        nothing = [v.new_zeros(v.shape, dtype=torch.float32) for v in (x, y)]
        return nothing[0], nothing[1]
    pairs = Pairs(rule, (group_x, class_x, silent_x), (group_y, class_y, silent_y), diagonal=False)
    half_row, row_lse, half_column, column_lse = (t.contiguous() for t in (half_row, row_lse, half_column, column_lse))
    return gradients_of(x, y, scale, pairs, (half_row, row_lse), (half_column, column_lse))


@infonce_block_grads.register_fake
def _(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float32), y.new_empty(y.shape, dtype=torch.float32)


@register_flop_formula(torch.ops.comtip.infonce_block_lse)
def _lse_flops(x: Any, y: Any, *_args: Any, **_kwargs: Any) -> int:
    return int(2 * x[0] * y[0] * x[1])


@register_flop_formula(torch.ops.comtip.infonce_block_grads)
def _grad_flops(x: Any, y: Any, *_args: Any, **_kwargs: Any) -> int:
    return int(8 * x[0] * y[0] * x[1])


def lse_triton(x: Tensor, y: Tensor, scale: Tensor, ids: BlockIds) -> tuple[Tensor, Tensor]:
    """Return row and column log-sum-exp; see :func:`comtip_kernels.infonce.blocks.block_lse`."""
    return infonce_block_lse(_rows(x), _rows(y), _scale(scale, x), *_who(ids))


def gradients_triton(
    x: Tensor, y: Tensor, scale: Tensor, ids: BlockIds, half_row: Tensor, row_lse: Tensor, half_column: Tensor,
    column_lse: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients' sums; see :func:`comtip_kernels.infonce.blocks.block_gradients`."""
    numbers = (t.float() for t in (half_row, row_lse, half_column, column_lse))
    return infonce_block_grads(_rows(x), _rows(y), _scale(scale, x), *numbers, *_who(ids))


def _scale(scale: Tensor, like: Tensor) -> Tensor:
    return scale.detach().to(like.device, torch.float32)


def _rows(v: Tensor) -> Tensor:
    """Copy rows that begin anywhere where copies would begin at multiples of 16, which the kernels read 128 bits at a time."""
    anywhere = v.stride(1) == 1 and v.stride(0) % 16 != 0 and v.shape[1] % 16 == 0
    return v.contiguous() if anywhere else v


def _who(ids: BlockIds) -> tuple[int, Ids, Ids, Tensor, Tensor, Ids, Ids]:
    """Return what the operators take; classes keep their 64 bits, which may be a hash's."""

    def of(values: Ids) -> Ids:
        return None if values is None else values.to(torch.int32).contiguous()

    assert ids.class_rows is not None
    assert ids.class_columns is not None
    class_x, class_y = (c.to(torch.int64).contiguous() for c in (ids.class_rows, ids.class_columns))
    group_x, group_y = (None, None) if ids.negatives == "all" else (of(ids.group_rows), of(ids.group_columns))
    silent_x, silent_y = of(ids.silent_rows), of(ids.silent_columns)
    # The kernels ask for both or for none.
    if silent_x is None and silent_y is not None:
        silent_x = torch.zeros_like(class_x, dtype=torch.int32)
    if silent_y is None and silent_x is not None:
        silent_y = torch.zeros_like(class_y, dtype=torch.int32)
    return RULES[ids.negatives], group_x, group_y, class_x, class_y, silent_x, silent_y
