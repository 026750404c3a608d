"""Triton kernels of the embedding: rows computed in one pass over the tables, copied; gradients summed without atomics.

``make_rows`` gathers token, type, position, level and identity rows, mixes, adds and normalises: one program per row, the sum
in registers, fp32. ``copy_rows`` writes the tokens. The backward pass reads the gradient once: ``sum_pieces`` adds the tokens
of a row, a piece per program, in fp32 and in a fixed order; a second launch adds the pieces of rows that have several.
``norm_grads`` propagates the sums through LayerNorm.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from comtip_kernels import tiles

# The numbers of tokens and of distinct rows change from step to step.
_SIZES = ["n_rows", "n_tokens"]
_UNALIGNED = ["token_id_ptr", "kind_id_ptr", "slot_id_ptr", "lo_id_ptr", "hi_id_ptr", "mix_ptr", "identity_id_ptr"]
_UNALIGNED += ["row_id_ptr", "order_ptr", "first_ptr", "last_ptr", "target_ptr"]


@triton.jit
def _sum_of_tables(  # type: ignore[no-untyped-def]
    token_ptr,
    type_ptr,
    position_ptr,
    level_ptr,
    identity_ptr,
    token_id_ptr,
    kind_id_ptr,
    slot_id_ptr,
    lo_id_ptr,
    hi_id_ptr,
    mix_ptr,
    identity_id_ptr,
    row,
    width,
    MIXED: tl.constexpr,
    IDENTITY: tl.constexpr,
    BD: tl.constexpr,
):
    """Return one row before LayerNorm, fp32 (BD,); tables are contiguous (rows, width)."""
    dim = tl.arange(0, BD)
    inside = dim < width
    kind = tl.load(kind_id_ptr + row)
    slot = tl.load(slot_id_ptr + row)
    if kind == 2:
        lo = tl.load(lo_id_ptr + row).to(tl.int64)
        word = tl.load(level_ptr + lo * width + dim, mask=inside, other=0.0).to(tl.float32)
        if MIXED:
            mix = tl.load(mix_ptr + row).to(tl.float32)
            hi = tl.load(hi_id_ptr + row).to(tl.int64)
            high = tl.load(level_ptr + hi * width + dim, mask=inside, other=0.0).to(tl.float32)
            word = (1 - mix) * word + mix * high
    else:
        token = tl.load(token_id_ptr + row).to(tl.int64)
        word = tl.load(token_ptr + token * width + dim, mask=inside, other=0.0).to(tl.float32)
    if IDENTITY:
        own = tl.load(identity_id_ptr + row)
        if (kind == 0) & (own > 0):
            word += tl.load(identity_ptr + own.to(tl.int64) * width + dim, mask=inside, other=0.0).to(tl.float32)
    x = word + tl.load(type_ptr + kind * width + dim, mask=inside, other=0.0).to(tl.float32)
    return x + tl.load(position_ptr + slot * width + dim, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_UNALIGNED)
def make_rows(  # type: ignore[no-untyped-def]
    token_ptr,
    type_ptr,
    position_ptr,
    level_ptr,
    identity_ptr,
    gain_ptr,
    bias_ptr,
    token_id_ptr,
    kind_id_ptr,
    slot_id_ptr,
    lo_id_ptr,
    hi_id_ptr,
    mix_ptr,
    identity_id_ptr,
    out_ptr,
    width,
    eps,
    MIXED: tl.constexpr,
    IDENTITY: tl.constexpr,
    NORM: tl.constexpr,
    BD: tl.constexpr,
):
    """Store one row, normalised with NORM."""
    row = tl.program_id(0)
    dim = tl.arange(0, BD)
    inside = dim < width
    x = _sum_of_tables(
        token_ptr,
        type_ptr,
        position_ptr,
        level_ptr,
        identity_ptr,
        token_id_ptr,
        kind_id_ptr,
        slot_id_ptr,
        lo_id_ptr,
        hi_id_ptr,
        mix_ptr,
        identity_id_ptr,
        row,
        width,
        MIXED,
        IDENTITY,
        BD,
    )
    if NORM:
        x = tl.where(inside, x - tl.sum(x, axis=0) / width, 0.0)
        rstd = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
        gain = tl.load(gain_ptr + dim, mask=inside, other=0.0).to(tl.float32)
        x = x * rstd * gain + tl.load(bias_ptr + dim, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64) * width + dim, x, mask=inside)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_UNALIGNED)
def norm_grads(  # type: ignore[no-untyped-def]
    token_ptr,
    type_ptr,
    position_ptr,
    level_ptr,
    identity_ptr,
    gain_ptr,
    grad_ptr,
    token_id_ptr,
    kind_id_ptr,
    slot_id_ptr,
    lo_id_ptr,
    hi_id_ptr,
    mix_ptr,
    identity_id_ptr,
    out_ptr,
    dgain_ptr,
    dbias_ptr,
    n_rows,
    width,
    eps,
    MIXED: tl.constexpr,
    IDENTITY: tl.constexpr,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
):
    """Propagate ROWS gradients, fp32 (n_rows, width), through LayerNorm; store them and partial sums of dgain and dbias.

    The rows are recomputed from the tables, so that neither they nor their statistics are saved by the forward pass.
    """
    first = tl.program_id(0) * ROWS
    dim = tl.arange(0, BD)
    inside = dim < width
    gain = tl.load(gain_ptr + dim, mask=inside, other=0.0).to(tl.float32)
    dgain = tl.zeros((BD,), dtype=tl.float32)
    dbias = tl.zeros((BD,), dtype=tl.float32)
    for row in range(first, tl.minimum(first + ROWS, n_rows)):
        x = _sum_of_tables(
            token_ptr,
            type_ptr,
            position_ptr,
            level_ptr,
            identity_ptr,
            token_id_ptr,
            kind_id_ptr,
            slot_id_ptr,
            lo_id_ptr,
            hi_id_ptr,
            mix_ptr,
            identity_id_ptr,
            row,
            width,
            MIXED,
            IDENTITY,
            BD,
        )
        x = tl.where(inside, x - tl.sum(x, axis=0) / width, 0.0)
        rstd = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
        x = x * rstd
        offset = tl.cast(row, tl.int64) * width + dim
        g = tl.load(grad_ptr + offset, mask=inside, other=0.0)
        dgain += g * x
        dbias += g
        g = g * gain
        g = rstd * (g - tl.sum(g, axis=0) / width - x * (tl.sum(g * x, axis=0) / width))
        tl.store(out_ptr + offset, g, mask=inside)
    tl.store(dgain_ptr + tl.program_id(0) * width + dim, dgain, mask=inside)
    tl.store(dbias_ptr + tl.program_id(0) * width + dim, dbias, mask=inside)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_UNALIGNED)
def copy_rows(rows_ptr, row_id_ptr, out_ptr, n_tokens, width, R: tl.constexpr, BD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store rows[row_id[token]] for R tokens."""
    token = tl.program_id(0) * R + tl.arange(0, R)
    dim = tl.arange(0, BD)
    inside = (token[:, None] < n_tokens) & (dim[None, :] < width)
    row = tl.load(row_id_ptr + token, mask=token < n_tokens, other=0).to(tl.int64)
    x = tl.load(rows_ptr + row[:, None] * width + dim[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + token.to(tl.int64)[:, None] * width + dim[None, :], x, mask=inside)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_UNALIGNED)
def sum_pieces(  # type: ignore[no-untyped-def]
    x_ptr,
    order_ptr,
    first_ptr,
    last_ptr,
    target_ptr,
    out_ptr,
    width,
    x_stride_row,
    x_stride_dim,
    ORDERED: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
):
    """Store the sum of x[order[first:last]] of one piece at out[target], fp32; R rows at a time, in a fixed order.

    A negative target marks a piece that does not exist.
    """
    piece = tl.program_id(0)
    target = tl.load(target_ptr + piece)
    if target >= 0:
        dim = tl.arange(0, BD)
        first, last = tl.load(first_ptr + piece), tl.load(last_ptr + piece)
        acc = tl.zeros((R, BD), dtype=tl.float32)
        for start in range(first, last, R):
            index = start + tl.arange(0, R)
            row = index
            if ORDERED:
                row = tl.load(order_ptr + index, mask=index < last, other=0)
            inside = (index[:, None] < last) & (dim[None, :] < width)
            offset = row.to(tl.int64)[:, None] * x_stride_row + dim[None, :] * x_stride_dim
            acc += tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + target.to(tl.int64) * width + dim, tl.sum(acc, axis=0), mask=dim < width)


MAKE: dict[str, Any] = {"num_warps": 1, "num_stages": 1}
NORM: dict[str, Any] = {"num_warps": 2, "num_stages": 1}
NARROW_NORM: dict[str, Any] = {"num_warps": 1, "num_stages": 1}
"""``norm_grads`` for rows of up to 128 elements: two warps spill there on sm_90."""
NORM_ROWS = tiles.NORM_ROWS
COPY: dict[str, Any] = {"R": 4, "num_warps": 4, "num_stages": 1}
SUM: dict[str, Any] = {"R": 8, "num_warps": 4, "num_stages": 2}
WIDEST = 8192
"""Most elements of a tile of ``copy_rows`` and ``sum_pieces``: wider rows, such as those of q, k and v, are taken fewer at once."""
PIECE = 256
"""Shortest length of a piece, in tokens; ``triton_op.sum_equal_tokens`` uses longer pieces for very frequent rows."""


def rows_options(options: dict[str, Any], width: int) -> dict[str, Any]:
    """Return the options of ``copy_rows`` or ``sum_pieces`` (``COPY``, ``SUM``) for rows padded to ``width`` elements."""
    return options | {"R": max(1, min(int(options["R"]), WIDEST // width)), "BD": width}


def norm_options(width: int) -> dict[str, Any]:
    """Return the launch options of ``norm_grads`` for rows padded to ``width`` elements."""
    return NARROW_NORM if width <= 128 else NORM
