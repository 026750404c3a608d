"""Blocks of InfoNCE on Triton kernels as PyTorch operators: the kernels of the whole loss without a diagonal.

Nothing is read on the host. The operators have no autograd formula: the caller combines the blocks and their gradients
(:mod:`comtip_kernels.infonce.blocks`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from comtip_kernels import flops
from comtip_kernels.infonce.triton_op import RULES, Ids, MaskOperands, as_operands, compute_gradients, compute_lse
from comtip_kernels.tl_common import operand_dtype

if TYPE_CHECKING:
    from comtip_kernels.infonce.blocks import BlockIds


@torch.library.custom_op("comtip::infonce_block_lse", mutates_args=())
def infonce_block_lse(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    rule: int,
    group_x: Ids,
    group_y: Ids,
    class_x: Tensor,
    class_y: Tensor,
    excluded_x: Ids,
    excluded_y: Ids,
    bf16: bool,
) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp over negatives of every row (R,) and of every column (C,), fp32."""
    if x.shape[0] == 0 or y.shape[0] == 0:
        empty = [v.new_full(v.shape[:1], -torch.inf, dtype=torch.float32) for v in (x, y)]
        return empty[0], empty[1]
    masks = MaskOperands(rule, (group_x, class_x, excluded_x), (group_y, class_y, excluded_y), diagonal=False)
    xs, ys = as_operands(bf16, x, y)
    return compute_lse(xs, ys, scale, masks, y.shape[0])[:2]


@infonce_block_lse.register_fake
def _(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=torch.float32), y.new_empty(y.shape[0], dtype=torch.float32)


@torch.library.custom_op("comtip::infonce_block_grads", mutates_args=())
def infonce_block_grads(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_weight: Tensor,
    row_lse: Tensor,
    column_weight: Tensor,
    column_lse: Tensor,
    rule: int,
    group_x: Ids,
    group_y: Ids,
    class_x: Tensor,
    class_y: Tensor,
    excluded_x: Ids,
    excluded_y: Ids,
    bf16: bool,
) -> tuple[Tensor, Tensor]:
    """Return sum_j g_ij y_j, fp32 (R, D), and sum_i g_ij x_i, fp32 (C, D), over negatives."""
    if x.shape[0] == 0 or y.shape[0] == 0:
        empty = [v.new_zeros(v.shape, dtype=torch.float32) for v in (x, y)]
        return empty[0], empty[1]
    masks = MaskOperands(rule, (group_x, class_x, excluded_x), (group_y, class_y, excluded_y), diagonal=False)
    xs, ys = as_operands(bf16, x, y)
    rows, columns = (
        (row_weight.contiguous(), row_lse.contiguous()),
        (column_weight.contiguous(), column_lse.contiguous()),
    )
    return compute_gradients(xs, ys, scale, masks, rows, columns)


@infonce_block_grads.register_fake
def _(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float32), y.new_empty(y.shape, dtype=torch.float32)


@register_flop_formula(torch.ops.comtip.infonce_block_lse)
def _lse_flops(x: Any, y: Any, *_args: Any, **_kwargs: Any) -> int:
    return int(flops.infonce(x[0], y[0], x[1], gpu=True).forward)


@register_flop_formula(torch.ops.comtip.infonce_block_grads)
def _grad_flops(x: Any, y: Any, *_args: Any, **_kwargs: Any) -> int:
    return int(flops.infonce(x[0], y[0], x[1], gpu=True).backward)


def lse_triton(x: Tensor, y: Tensor, scale: Tensor, ids: BlockIds, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Return row and column log-sum-exp; see :func:`comtip_kernels.infonce.blocks.block_lse`."""
    bf16 = (dtype or operand_dtype(x, y)) == torch.bfloat16
    return infonce_block_lse(_rows(x), _rows(y), _scale(scale, x), *mask_arguments(ids), bf16)


def gradients_triton(
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
    """Return the sums of the gradients; see :func:`comtip_kernels.infonce.blocks.block_gradients`."""
    bf16 = (dtype or operand_dtype(x, y)) == torch.bfloat16
    stats = (t.float() for t in (row_weight, row_lse, column_weight, column_lse))
    return infonce_block_grads(_rows(x), _rows(y), _scale(scale, x), *stats, *mask_arguments(ids), bf16)


def _scale(scale: Tensor, like: Tensor) -> Tensor:
    return scale.detach().to(like.device, torch.float32)


def _rows(v: Tensor) -> Tensor:
    """Return ``v``, or a contiguous copy if its stride alone misaligns the rows: kernels load aligned rows 128 bits at a time."""
    misaligned = v.stride(1) == 1 and v.stride(0) % 16 != 0 and v.shape[1] % 16 == 0
    return v.contiguous() if misaligned else v


def mask_arguments(ids: BlockIds) -> tuple[int, Ids, Ids, Tensor, Tensor, Ids, Ids]:
    """Return the arguments by which the operators decide which pairs are negatives, in the order of their parameters.

    These are the rule for groups as an integer, then group ids, class ids and exclusion flags, each of rows and of columns. Class
    ids may be 64-bit hashes and stay int64; the others become int32. Group ids are None if the rule compares no groups, and
    flags are None if nothing is excluded.
    """

    def flags(values: Ids) -> Ids:
        return None if values is None else values.to(torch.int32).contiguous()

    assert ids.class_rows is not None
    assert ids.class_columns is not None
    class_x, class_y = (c.to(torch.int64).contiguous() for c in (ids.class_rows, ids.class_columns))
    group_x, group_y = (None, None) if ids.negatives == "all" else (flags(ids.group_rows), flags(ids.group_columns))
    excluded_x, excluded_y = flags(ids.excluded_rows), flags(ids.excluded_columns)
    # The kernels expect both or neither.
    if excluded_x is None and excluded_y is not None:
        excluded_x = torch.zeros_like(class_x, dtype=torch.int32)
    if excluded_y is None and excluded_x is not None:
        excluded_y = torch.zeros_like(class_y, dtype=torch.int32)
    return RULES[ids.negatives], group_x, group_y, class_x, class_y, excluded_x, excluded_y
