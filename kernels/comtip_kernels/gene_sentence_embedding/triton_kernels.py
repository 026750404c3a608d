"""Gene sentences on a GPU: rows made in one pass over the tables, copied out, and gradients summed without atomics.

``make_rows`` gathers token, type, position, level and identity rows, mixes, adds and normalises: one program per row, the sum
in registers. ``copy_rows`` writes the tokens. Backward reads the gradient once: ``sum_pieces`` adds the tokens of a row, at most
``PIECE`` per program, in fp32 and in a fixed order; rows that take several pieces are added up by the same kernel. ``norm_grads`` takes the sums
through LayerNorm.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def _sum_of_tables(  # type: ignore[no-untyped-def]
    token_ptr, type_ptr, position_ptr, level_ptr, identity_ptr, token_id, kind_id, slot_id, lo_id, hi_id, mix_ptr,
    identity_id, u, D, MIXED: tl.constexpr, IDENTITY: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Return row u before LayerNorm, fp32 (BD,); tables are contiguous (rows, D)."""
    d = tl.arange(0, BD)
    inside = d < D
    kind = tl.load(kind_id + u)
    slot = tl.load(slot_id + u)
    if kind == 2:
        word = tl.load(level_ptr + tl.load(lo_id + u).to(tl.int64) * D + d, mask=inside, other=0.0).to(tl.float32)
        if MIXED:
            mix = tl.load(mix_ptr + u).to(tl.float32)
            high = tl.load(level_ptr + tl.load(hi_id + u).to(tl.int64) * D + d, mask=inside, other=0.0).to(tl.float32)
            word = (1 - mix) * word + mix * high
    else:
        word = tl.load(token_ptr + tl.load(token_id + u).to(tl.int64) * D + d, mask=inside, other=0.0).to(tl.float32)
    if IDENTITY:
        own = tl.load(identity_id + u)
        if (kind == 0) & (own > 0):
            word += tl.load(identity_ptr + own.to(tl.int64) * D + d, mask=inside, other=0.0).to(tl.float32)
    x = word + tl.load(type_ptr + kind * D + d, mask=inside, other=0.0).to(tl.float32)
    return x + tl.load(position_ptr + slot * D + d, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def make_rows(  # type: ignore[no-untyped-def]
    token_ptr, type_ptr, position_ptr, level_ptr, identity_ptr, gain_ptr, bias_ptr, token_id, kind_id, slot_id, lo_id, hi_id,
    mix_ptr, identity_id, out_ptr, D, eps, MIXED: tl.constexpr, IDENTITY: tl.constexpr, NORM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Store one row."""
    u = tl.program_id(0)
    d = tl.arange(0, BD)
    inside = d < D
    x = _sum_of_tables(
        token_ptr, type_ptr, position_ptr, level_ptr, identity_ptr, token_id, kind_id, slot_id, lo_id, hi_id, mix_ptr,
        identity_id, u, D, MIXED, IDENTITY, BD,
    )  # fmt: skip
    if NORM:
        x = tl.where(inside, x - tl.sum(x, axis=0) / D, 0.0)
        rstd = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
        gain = tl.load(gain_ptr + d, mask=inside, other=0.0).to(tl.float32)
        x = x * rstd * gain + tl.load(bias_ptr + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + u.to(tl.int64) * D + d, x, mask=inside)


@triton.jit
def norm_grads(  # type: ignore[no-untyped-def]
    token_ptr, type_ptr, position_ptr, level_ptr, identity_ptr, gain_ptr, grad_ptr, token_id, kind_id, slot_id, lo_id, hi_id,
    mix_ptr, identity_id, out_ptr, dgain_ptr, dbias_ptr, U, D, eps, MIXED: tl.constexpr, IDENTITY: tl.constexpr,
    ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Take ROWS gradients, fp32 (U, D), through LayerNorm; store them and the program's share of dgain and dbias.

    The rows are made again from the tables, so that neither they nor their statistics are kept from the forward pass.
    """
    first = tl.program_id(0) * ROWS
    d = tl.arange(0, BD)
    inside = d < D
    gain = tl.load(gain_ptr + d, mask=inside, other=0.0).to(tl.float32)
    dgain = tl.zeros((BD,), dtype=tl.float32)
    dbias = tl.zeros((BD,), dtype=tl.float32)
    for u in range(first, tl.minimum(first + ROWS, U)):
        x = _sum_of_tables(
            token_ptr, type_ptr, position_ptr, level_ptr, identity_ptr, token_id, kind_id, slot_id, lo_id, hi_id, mix_ptr,
            identity_id, u, D, MIXED, IDENTITY, BD,
        )  # fmt: skip
        x = tl.where(inside, x - tl.sum(x, axis=0) / D, 0.0)
        rstd = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
        x = x * rstd
        at = tl.cast(u, tl.int64) * D + d
        g = tl.load(grad_ptr + at, mask=inside, other=0.0)
        dgain += g * x
        dbias += g
        g = g * gain
        g = rstd * (g - tl.sum(g, axis=0) / D - x * (tl.sum(g * x, axis=0) / D))
        tl.store(out_ptr + at, g, mask=inside)
    tl.store(dgain_ptr + tl.program_id(0) * D + d, dgain, mask=inside)
    tl.store(dbias_ptr + tl.program_id(0) * D + d, dbias, mask=inside)


@triton.jit
def copy_rows(rows_ptr, row_id, out_ptr, S, D, R: tl.constexpr, BD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store rows[row[s]] for R tokens."""
    s = tl.program_id(0) * R + tl.arange(0, R)
    d = tl.arange(0, BD)
    inside = (s[:, None] < S) & (d[None, :] < D)
    row = tl.load(row_id + s, mask=s < S, other=0).to(tl.int64)
    x = tl.load(rows_ptr + row[:, None] * D + d[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + s.to(tl.int64)[:, None] * D + d[None, :], x, mask=inside)


@triton.jit
def sum_pieces(  # type: ignore[no-untyped-def]
    x_ptr, order_ptr, first_ptr, last_ptr, place_ptr, out_ptr, D, x_s, x_d, ORDERED: tl.constexpr, R: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Store the sum of x[order[first:last]] of one piece at out[place], fp32; R rows at a time, always in one order.

    A place below 0 is a piece that does not exist.
    """
    piece = tl.program_id(0)
    place = tl.load(place_ptr + piece)
    if place >= 0:
        d = tl.arange(0, BD)
        first, last = tl.load(first_ptr + piece), tl.load(last_ptr + piece)
        acc = tl.zeros((R, BD), dtype=tl.float32)
        for start in range(first, last, R):
            at = start + tl.arange(0, R)
            row = at
            if ORDERED:
                row = tl.load(order_ptr + at, mask=at < last, other=0)
            inside = (at[:, None] < last) & (d[None, :] < D)
            x = tl.load(x_ptr + row.to(tl.int64)[:, None] * x_s + d[None, :] * x_d, mask=inside, other=0.0)
            acc += x.to(tl.float32)
        tl.store(out_ptr + place.to(tl.int64) * D + d, tl.sum(acc, axis=0), mask=d < D)


MAKE: dict[str, Any] = {"num_warps": 1, "num_stages": 1}
NORM: dict[str, Any] = {"num_warps": 2, "num_stages": 1}
NORM_ROWS = 64
"""Rows whose gradients one program takes through LayerNorm."""
COPY: dict[str, Any] = {"R": 4, "num_warps": 4, "num_stages": 1}
SUM: dict[str, Any] = {"R": 8, "num_warps": 4, "num_stages": 2}
PIECE = 256
"""Tokens that one program adds up."""
