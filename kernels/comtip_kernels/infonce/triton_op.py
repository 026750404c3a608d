"""InfoNCE on Triton kernels as PyTorch operators: traced by torch.compile, with FLOP formulas, tested by opcheck."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from comtip_kernels import flops
from comtip_kernels.infonce import triton_kernels as kernels
from comtip_kernels.infonce.cpu import FLOOR, HEADROOM, LOG_FLOOR
from comtip_kernels.infonce.unit import unit_vectors
from comtip_kernels.products import add_product
from comtip_kernels.tl_common import (
    INTERPRETING,
    cdiv,
    fit_tiles,
    input_precision,
    launch,
    operand_dtype,
    product_mode,
)

RULES = {"all": kernels.ALL, "same_group": kernels.SAME_GROUP, "other_group": kernels.OTHER_GROUP}
Ids = Tensor | None
SMALL = {"BM": 32, "BN": 32, "BK": 32}
"""Tile sizes in the interpreter."""


@dataclass(frozen=True)
class MaskOperands:
    """Integers of rows and columns from which the kernels decide which pairs enter the softmax."""

    rule: int
    rows: tuple[Ids, Ids, Ids]
    """Group, class and exclusion flag of every row; None where nothing is compared."""
    columns: tuple[Ids, Ids, Ids]
    diagonal: bool
    """Whether pair (i, i) is the positive of row i."""

    def constants(self, x: Tensor) -> dict[str, Any]:
        """Return the constexprs of masks and products for operands like ``x``."""
        _, classes, excluded = self.rows
        return {
            "RULE": self.rule,
            "CLASSES": classes is not None,
            "EXCLUDED": excluded is not None,
            "DIAGONAL": self.diagonal,
            "UPCAST": INTERPRETING,
            "PRECISION": input_precision(product_mode(x.dtype)),
        }

    def pointers(self, unused: Tensor) -> list[Tensor]:
        """Return the six mask tensors, with ``unused`` for each that is None: no kernel reads it."""
        return [unused if i is None else i for both in zip(self.rows, self.columns, strict=True) for i in both]

    def swapped(self) -> MaskOperands:
        """Return the masks with rows and columns exchanged."""
        return replace(self, rows=self.columns, columns=self.rows)


def compute_lse(
    x: Tensor, y: Tensor, scale: Tensor, masks: MaskOperands, n_columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward pass.

    Parameters
    ----------
    x, y
        Operands (R, D) and (C, D) of one dtype, bf16 or fp32.
    scale
        Inverse temperature, an fp32 scalar on the device of ``x``.
    masks
        Which pairs enter the softmax.
    n_columns
        Number of leading columns that have a softmax of their own.

    Returns
    -------
    tuple of Tensor
        Log-sum-exp of the rows (R,) and of the first ``n_columns`` columns, -inf where no pair is allowed; logits of the
        positives (R,), empty unless ``masks.diagonal``. All fp32.
    """
    (R, D), C = x.shape, y.shape[0]
    mode = product_mode(x.dtype)
    tiles = fit_tiles(kernels.FORWARD[mode], D, SMALL)
    n_m, n_n = cdiv(R, tiles["BM"]), cdiv(C, tiles["BN"])
    row_sums = torch.empty(n_n, R, device=x.device, dtype=torch.float32)
    col_sums = torch.empty(n_m, C, device=x.device, dtype=torch.float32)
    positive = torch.empty(R if masks.diagonal else 0, device=x.device, dtype=torch.float32)
    strides, constants = (*x.stride(), *y.stride()), masks.constants(x)
    launch(
        kernels.lse_tiles,
        (n_m * n_n,),
        x,
        y,
        row_sums,
        col_sums,
        positive,
        scale,
        *masks.pointers(scale),
        R,
        C,
        D,
        *strides,
        n_n,
        HEADROOM=HEADROOM,
        **constants,
        **tiles,
    )
    row_lse = _exact(x, y, row_sums.sum(0), scale, masks)
    column_lse = _exact(y, x, col_sums.sum(0)[:n_columns], scale, masks.swapped())
    return row_lse, column_lse, positive


def _exact(q: Tensor, k: Tensor, sums: Tensor, scale: Tensor, masks: MaskOperands) -> Tensor:
    """Return the log-sum-exp of the leading rows of ``q`` from their ``sums``, recomputed exactly where a sum underflowed."""
    tiles = fit_tiles(kernels.EXACT[product_mode(q.dtype)], q.shape[1], SMALL)
    lse, low, excluded = sums.log() + (scale - HEADROOM), sums < FLOOR, masks.rows[2]
    if not masks.diagonal and excluded is not None:
        low &= excluded[: low.shape[0]] == 0  # no pair is allowed there, and -inf is exact
    n_rows, (n_cols, width) = low.shape[0], k.shape
    launch(
        kernels.exact_lse,
        (cdiv(n_rows, tiles["BM"]),),
        q,
        k,
        lse,
        low.to(torch.int32),
        scale,
        *masks.pointers(scale),
        n_rows,
        n_cols,
        width,
        *q.stride(),
        *k.stride(),
        **masks.constants(q),
        **tiles,
    )
    return lse


Stats = tuple[Tensor, Tensor]
"""Weight of each softmax in the loss, and its log-sum-exp (+inf where there is no softmax); of the rows or the columns, fp32."""


def compute_gradients(
    x: Tensor, y: Tensor, scale: Tensor, masks: MaskOperands, rows: Stats, columns: Stats
) -> tuple[Tensor, Tensor]:
    """Compute the backward pass in chunks of rows; return sum_j g_ij y_j (R, D) and sum_i g_ij x_i (C, D), fp32.

    A kernel stores a chunk of g in the dtype of the operands (``flops.infonce_chunk_bytes``), and PyTorch's products
    multiply it with both sides. Chunks are added in their order, so that results repeat.
    """
    (R, D), C = x.shape, y.shape[0]
    tiles = fit_tiles(kernels.GRADIENT[product_mode(x.dtype)], D, SMALL)
    row_length = flops.padded(C)
    length = min(R, flops.infonce_chunk(row_length, x.element_size()))
    chunk = torch.empty(length, row_length, device=x.device, dtype=x.dtype)
    floor = LOG_FLOOR + scale - HEADROOM
    both = ((lse, weight, (lse < floor).to(torch.int32)) for weight, lse in (rows, columns))
    stats = [t for of_both in zip(*both, strict=True) for t in of_both]
    dx, dy = (torch.empty(n, D, device=x.device, dtype=torch.float32) for n in (R, C))
    for first in range(0, R, length):
        last = min(first + length, R)
        n_row_tiles = cdiv(last - first, tiles["BM"])
        launch(
            kernels.grad_tiles,
            (n_row_tiles * cdiv(C, tiles["BN"]),),
            x,
            y,
            chunk,
            *stats,
            scale,
            *masks.pointers(scale),
            last,
            C,
            first,
            n_row_tiles,
            D,
            *x.stride(),
            *y.stride(),
            chunk.stride(0),
            HEADROOM=HEADROOM,
            **masks.constants(x),
            **tiles,
        )
        g = chunk[: last - first, :C]
        add_product(dx[first:last], g, y, accumulate=False)
        add_product(dy, g.T, x[first:last], accumulate=first > 0)
    return dx, dy


def as_operands(bf16: bool, *vectors: Tensor) -> list[Tensor]:
    """Return the vectors in the dtype in which they are multiplied."""
    return [v.to(torch.bfloat16 if bf16 else torch.float32) for v in vectors]


def _masks(n_columns: int, rule: int, ids: tuple[Ids, ...]) -> MaskOperands:
    """Return the masks of the whole loss, from the groups, classes and exclusion flags ``ids``.

    Row i and column i share the exclusion flag of pair i. Flags of the further columns may follow; without them, no further column
    is excluded.
    """
    group_x, group_y, class_x, class_y, excluded_x = ids
    excluded_y = None if excluded_x is None else F.pad(excluded_x, (0, n_columns - excluded_x.shape[0]))
    return MaskOperands(rule, (group_x, class_x, excluded_y), (group_y, class_y, excluded_y), diagonal=True)


@torch.library.custom_op("comtip::infonce_lse", mutates_args=())
def infonce_lse(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    rule: int,
    group_x: Ids,
    group_y: Ids,
    class_x: Ids,
    class_y: Ids,
    excluded: Ids,
    bf16: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return row log-sum-exp, log-sum-exp of the first B columns, and logits of the positives, fp32 (B,) each.

    With ``bf16``, products are computed in bf16; ``x`` and ``y`` then hold numbers that bf16 represents exactly (:mod:`.unit`).
    """
    B = x.shape[0]
    if B == 0:
        empty = [x.new_zeros(0, dtype=torch.float32) for _ in range(3)]
        return empty[0], empty[1], empty[2]
    masks = _masks(y.shape[0], rule, (group_x, group_y, class_x, class_y, excluded))
    xs, ys = as_operands(bf16, x, y)
    return compute_lse(xs, ys, scale, masks, B)


@infonce_lse.register_fake
def _(x: Tensor, y: Tensor, scale: Tensor, rule: int, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    one, two, three = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(3))
    return one, two, three


@torch.library.custom_op("comtip::infonce_grads", mutates_args=())
def infonce_grads(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_weight: Tensor,
    column_weight: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    rule: int,
    group_x: Ids,
    group_y: Ids,
    class_x: Ids,
    class_y: Ids,
    excluded: Ids,
    bf16: bool,
) -> tuple[Tensor, Tensor]:
    """Return sum_j g_ij y_j, fp32 (B, D), and sum_i g_ij x_i, fp32 (M, D); see ``grad_tiles`` for g."""
    B, M = x.shape[0], y.shape[0]
    if B == 0:
        dx, dy = (torch.zeros_like(v, dtype=torch.float32, memory_format=torch.contiguous_format) for v in (x, y))
        return dx, dy
    masks, more = _masks(M, rule, (group_x, group_y, class_x, class_y, excluded)), (0, M - B)
    columns = (F.pad(column_weight.float(), more).contiguous(), F.pad(column_lse, more, value=math.inf).contiguous())
    xs, ys = as_operands(bf16, x, y)
    return compute_gradients(xs, ys, scale, masks, (row_weight.float().contiguous(), row_lse.contiguous()), columns)


@infonce_grads.register_fake
def _(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float32), y.new_empty(y.shape, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, scale, ctx.rule, *ids, ctx.bf16 = inputs
    ctx.save_for_backward(x, y, scale, *output[:2], *ids)


def _backward(ctx: Any, grad_row: Tensor, grad_column: Tensor, grad_positive: Tensor) -> tuple[Tensor | None, ...]:
    x, y, scale, row_lse, column_lse, *ids = ctx.saved_tensors
    dx, dy = torch.ops.comtip.infonce_grads(
        x, y, scale, grad_row, grad_column, row_lse, column_lse, ctx.rule, *ids, ctx.bf16
    )
    B = x.shape[0]
    at_positive = grad_positive[:, None]
    dx = dx + at_positive * y[:B]
    dy = dy + F.pad(at_positive * x, (0, 0, 0, y.shape[0] - B))
    # Every logit is linear in x, so the gradient of the scale needs no further pass over the logits.
    dscale = (x * dx).sum().to(scale.dtype)
    return (dx * scale).to(x.dtype), (dy * scale).to(y.dtype), dscale, *([None] * 7)


infonce_lse.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.comtip.infonce_lse)
def _lse_flops(x: Any, y: Any, *_args: Any, **_kwargs: Any) -> int:
    return int(flops.infonce(x[0], y[0], x[1], gpu=True).forward)


@register_flop_formula(torch.ops.comtip.infonce_grads)
def _grad_flops(x: Any, y: Any, *_args: Any, **_kwargs: Any) -> int:
    return int(flops.infonce(x[0], y[0], x[1], gpu=True).backward)


def infonce_triton(
    image_BD: Tensor,
    text_MD: Tensor,
    scale: Tensor,
    *,
    negatives: str = "all",
    group_rows: Ids = None,
    group_columns: Ids = None,
    class_rows: Ids = None,
    class_columns: Ids = None,
    weight_B: Ids = None,
    excluded_further: Ids = None,
) -> Tensor:
    """Return the symmetric InfoNCE loss, an fp32 scalar; see :func:`comtip_kernels.infonce`."""
    B, device = image_BD.shape[0], image_BD.device
    dtype = operand_dtype(image_BD, text_MD)
    with torch.autocast(device.type, enabled=False):  # the dtype is chosen; normalising and summing stay in fp32
        x, y = unit_vectors(image_BD, text_MD, dtype=dtype)
        scale = scale.to(device, torch.float32)
        weight = torch.ones(B, device=device) if weight_B is None else weight_B.detach().float()
        # Groups are compared only if the rule needs them. Exclusion depends on data, which the host never reads.
        group_ids = (None, None) if negatives == "all" else (group_rows, group_columns)
        groups = [None if g is None else g.to(torch.int32).contiguous() for g in group_ids]
        class_ids = (None, None) if class_rows is None or class_columns is None else (class_rows, class_columns)
        # Classes can be hashes and keep their 64 bits.
        classes = [None if c is None else c.to(torch.int64).contiguous() for c in class_ids]
        excluded = None if weight_B is None else (weight == 0).to(torch.int32)
        if excluded_further is not None:
            excluded = torch.cat([(weight == 0).to(torch.int32), excluded_further.to(torch.int32)])
        bf16 = dtype == torch.bfloat16
        row_lse, column_lse, positive = infonce_lse(x, y, scale, RULES[negatives], *groups, *classes, excluded, bf16)
        total = weight.sum().clamp_min(1e-12)
        return (weight * (row_lse + column_lse - 2 * positive)).sum() / (2 * total)
