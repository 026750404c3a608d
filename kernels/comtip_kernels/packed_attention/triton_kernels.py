"""Packed attention on a GPU: several whole sentences to a tile, nothing saved for the backward but the inputs.

Sentences lie end to end. Tile i owns the sentences that begin in [i W, (i + 1) W), W = BT - longest + 1: all of their tokens lie
in [i W, i W + BT), so that which tile does what needs no packing plan and no word from the host. A tile's products are dense;
a mask keeps tokens of one sentence together (a NaN among the values, which weight 0 does not silence, shows in every sentence of
its tile; it would have ended in the loss anyway). Each token belongs to one tile: no atomics, and tiles on grid axis 0, which
has no limit that a batch could meet.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(ptr, token, head, owned, x_s, x_h, x_e, E, BE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the tile's rows of one head, (BT, BE); 0 where the token is another tile's."""
    e = tl.arange(0, BE)
    at = ptr + token.to(tl.int64)[:, None] * x_s + head * x_h + e[None, :] * x_e
    return tl.load(at, mask=owned[:, None] & (e[None, :] < E), other=0.0)


@triton.jit
def _store(ptr, x, token, head, owned, H, E, BE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store into a contiguous (S, H, E)."""
    e = tl.arange(0, BE)
    at = ptr + (token.to(tl.int64)[:, None] * H + head) * E + e[None, :]
    tl.store(at, x, mask=owned[:, None] & (e[None, :] < E))


@triton.jit
def _softmax(q, k, first, owned, scale, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the weights fp32 (BT, BT): 0 between sentences. A row that is not owned attends to itself alone."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
    same = (first[:, None] == first[None, :]) & owned[:, None] & owned[None, :]
    s = tl.where(same, s, float("-inf"))
    top = tl.where(owned, tl.max(s, axis=1), 0.0)
    p = tl.exp2(s - top[:, None])
    total = tl.where(owned, tl.sum(p, axis=1), 1.0)
    return p / total[:, None]


@triton.jit
def attend_tiles(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, first_ptr, out_ptr, S, H, E, W, scale, q_s, q_h, q_e, k_s, k_h, k_e, v_s, v_h, v_e,
    BT: tl.constexpr, BE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store softmax(q k^T scale) v of one tile and head."""
    tile, head = tl.program_id(0) // H, tl.program_id(0) % H
    token = tile * W + tl.arange(0, BT)
    first = tl.load(first_ptr + token, mask=token < S, other=-1)
    owned = (first >= tile * W) & (first < (tile + 1) * W)
    q = _load(q_ptr, token, head, owned, q_s, q_h, q_e, E, BE)
    k = _load(k_ptr, token, head, owned, k_s, k_h, k_e, E, BE)
    v = _load(v_ptr, token, head, owned, v_s, v_h, v_e, E, BE)
    if UPCAST:
        # The interpreter multiplies the bit patterns of bf16; a GPU never takes this branch.
        q = q.to(tl.float32)
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    p = _softmax(q, k, first, owned, scale, PRECISION)
    _store(out_ptr, tl.dot(p.to(v.dtype), v, input_precision=PRECISION), token, head, owned, H, E, BE)


@triton.jit
def attend_grads(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, g_ptr, first_ptr, dq_ptr, dk_ptr, dv_ptr, S, H, E, W, scale, q_s, q_h, q_e, k_s, k_h, k_e, v_s, v_h,
    v_e, g_s, g_h, g_e, BT: tl.constexpr, BE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store dq, dk, dv of one tile and head; the weights are made again from q and k."""
    tile, head = tl.program_id(0) // H, tl.program_id(0) % H
    token = tile * W + tl.arange(0, BT)
    first = tl.load(first_ptr + token, mask=token < S, other=-1)
    owned = (first >= tile * W) & (first < (tile + 1) * W)
    q = _load(q_ptr, token, head, owned, q_s, q_h, q_e, E, BE)
    k = _load(k_ptr, token, head, owned, k_s, k_h, k_e, E, BE)
    if UPCAST:
        q = q.to(tl.float32)
        k = k.to(tl.float32)
    p = _softmax(q, k, first, owned, scale, PRECISION)
    g = _load(g_ptr, token, head, owned, g_s, g_h, g_e, E, BE)
    if UPCAST:
        g = g.to(tl.float32)
    _store(dv_ptr, tl.dot(tl.trans(p.to(g.dtype)), g, input_precision=PRECISION), token, head, owned, H, E, BE)
    if q_ptr.dtype.element_ty == tl.float32:
        # Four bytes an element: loaded again, from a cache, as keeping it asks for more registers than there are. So below.
        g = _load(g_ptr, token, head, owned, g_s, g_h, g_e, E, BE)
    v = _load(v_ptr, token, head, owned, v_s, v_h, v_e, E, BE)
    if UPCAST:
        v = v.to(tl.float32)
    dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    # d softmax; the sum over the row is of this very p and dp, so that no saved output is needed.
    ds = (p * (dp - tl.sum(p * dp, axis=1)[:, None]) * scale).to(q.dtype)
    if q_ptr.dtype.element_ty == tl.float32:
        k = _load(k_ptr, token, head, owned, k_s, k_h, k_e, E, BE)
    _store(dq_ptr, tl.dot(ds, k, input_precision=PRECISION), token, head, owned, H, E, BE)
    if q_ptr.dtype.element_ty == tl.float32:
        q = _load(q_ptr, token, head, owned, q_s, q_h, q_e, E, BE)
    _store(dk_ptr, tl.dot(tl.trans(ds), q, input_precision=PRECISION), token, head, owned, H, E, BE)


TILES: dict[int, dict[str, Any]] = {
    32: {"num_warps": 2, "num_stages": 1},
    64: {"num_warps": 4, "num_stages": 1},
}
"""What the ledger passes, by tokens of a tile; a backward of 128 tokens spills on sm_80, whatever its warps."""
FP32_GRADS: dict[int, dict[str, Any]] = {32: {}, 64: {"num_warps": 8}}
"""What is different for gradients of four bytes."""


def config(tile: int, fp32: bool, backward: bool) -> dict[str, Any]:
    """Return warps and stages for a tile of so many tokens."""
    return TILES[tile] | (FP32_GRADS[tile] if fp32 and backward else {})


def best_tile(longest: int) -> int:
    """Return the tokens of a tile: the fewest products per token that is owned, BT^2 / W."""
    return min((bt for bt in TILES if bt >= longest), key=lambda bt: bt * bt // (bt - longest + 1))
