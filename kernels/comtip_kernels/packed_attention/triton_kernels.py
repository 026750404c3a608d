"""Triton kernels of packed attention: several whole sentences per tile; the backward pass needs the inputs only.

Sentences are concatenated. Tile i owns the sentences that begin in [i W, (i + 1) W), W = BT - longest + 1: all their tokens lie
in [i W, i W + BT), so the assignment needs no packing plan, only ``longest``. The products of a tile are dense; a
mask separates its sentences (a NaN among the values, which a weight of 0 does not remove, reaches every sentence of its
tile). Each token belongs to one tile: no atomics. With EQUAL, every sentence has W tokens, such as the patches of an image, and a
tile owns one: no index is read. With BIAS, a bias (3, n_heads, head_dim) is added to q, k and v when they are loaded, so that its
gradient is summed where it is computed. Tiles are on grid axis 0, whose limit no batch reaches.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from comtip_kernels.flops import attention_tile

LOG2E = tl.constexpr(1.4426950408889634)
# The number of tokens changes from step to step, the window with the longest sentence of a panel.
_SIZES = ["n_tokens", "window"]


@triton.jit
def _first(first_ptr, token, n_tokens, window, EQUAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the first token of each token's sentence; -1 behind the last token."""
    if EQUAL:  # the compiler would compare the types of two returned values
        first = tl.where(token < n_tokens, token - token % window, -1)
    else:
        first = tl.load(first_ptr + token, mask=token < n_tokens, other=-1)
    return first


@triton.jit
def _load(  # type: ignore[no-untyped-def]
    ptr,
    token,
    head,
    owned,
    stride_token,
    stride_head,
    stride_dim,
    head_dim,
    BE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return the rows of one head, (BT, BE); 0 where another tile owns the token."""
    dim = tl.arange(0, BE)
    offset = token.to(tl.int64)[:, None] * stride_token + head * stride_head + dim[None, :] * stride_dim
    x = tl.load(ptr + offset, mask=owned[:, None] & (dim[None, :] < head_dim), other=0.0)
    if UPCAST:
        # The interpreter would multiply the bit patterns of bf16; a GPU never takes this branch.
        x = x.to(tl.float32)
    return x


@triton.jit
def _biased(  # type: ignore[no-untyped-def]
    x, ptr, bias_ptr, part, head, n_heads, head_dim, BE: tl.constexpr, UPCAST: tl.constexpr, BIAS: tl.constexpr
):
    """Return queries (part 0), keys (1) or values (2) of one head plus their bias, rounded as they are; without BIAS, unchanged."""
    if BIAS:
        dim = tl.arange(0, BE)
        offset = (part * n_heads + head) * head_dim + dim
        bias = tl.load(bias_ptr + offset, mask=dim < head_dim, other=0.0).to(tl.float32)
        # Rows that another tile owns get it, too: their weights are 0.
        x = _rounded(x.to(tl.float32) + bias[None, :], ptr, UPCAST)
    return x


@triton.jit
def _store_sum(ptr, x, tile, part, head, n_heads, head_dim, BE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store the sum over the tokens of a tile into (tiles, 3, n_heads, head_dim)."""
    dim = tl.arange(0, BE)
    row = (tile.to(tl.int64) * 3 + part) * n_heads + head
    tl.store(ptr + row * head_dim + dim, tl.sum(x, axis=0), mask=dim < head_dim)


@triton.jit
def _store(ptr, x, token, head, owned, n_heads, head_dim, BE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store into (S, H, E), where ``n_heads`` heads, perhaps of several tensors, lie between two tokens."""
    dim = tl.arange(0, BE)
    offset = (token.to(tl.int64)[:, None] * n_heads + head) * head_dim + dim[None, :]
    tl.store(ptr + offset, x, mask=owned[:, None] & (dim[None, :] < head_dim))


@triton.jit
def _softmax(q, k, first, owned, scale, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the attention weights, fp32 (BT, BT): 0 between sentences; rows that are not owned are 0 too."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
    same = (first[:, None] == first[None, :]) & owned[:, None] & owned[None, :]
    s = tl.where(same, s, float("-inf"))
    top = tl.where(owned, tl.max(s, axis=1), 0.0)
    p = tl.exp2(s - top[:, None])
    total = tl.where(owned, tl.sum(p, axis=1), 1.0)
    return p / total[:, None]


@triton.jit
def _rounded(x, ptr, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return ``x`` rounded to the element type of ``ptr``, as an operand of a product."""
    x = x.to(ptr.dtype.element_ty)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["first_ptr"])
def attention_forward(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    first_ptr,
    out_ptr,
    n_tokens,
    n_heads,
    head_dim,
    window,
    scale,
    q_stride_token,
    q_stride_head,
    q_stride_dim,
    k_stride_token,
    k_stride_head,
    k_stride_dim,
    v_stride_token,
    v_stride_head,
    v_stride_dim,
    EQUAL: tl.constexpr,
    BIAS: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store softmax(q k^T scale) v of one tile and head."""
    tile, head = tl.program_id(0) // n_heads, tl.program_id(0) % n_heads
    token = tile * window + tl.arange(0, BT)
    first = _first(first_ptr, token, n_tokens, window, EQUAL)
    owned = (first >= tile * window) & (first < (tile + 1) * window)
    q = _load(q_ptr, token, head, owned, q_stride_token, q_stride_head, q_stride_dim, head_dim, BE, UPCAST)
    q = _biased(q, q_ptr, bias_ptr, 0, head, n_heads, head_dim, BE, UPCAST, BIAS)
    k = _load(k_ptr, token, head, owned, k_stride_token, k_stride_head, k_stride_dim, head_dim, BE, UPCAST)
    k = _biased(k, k_ptr, bias_ptr, 1, head, n_heads, head_dim, BE, UPCAST, BIAS)
    v = _load(v_ptr, token, head, owned, v_stride_token, v_stride_head, v_stride_dim, head_dim, BE, UPCAST)
    v = _biased(v, v_ptr, bias_ptr, 2, head, n_heads, head_dim, BE, UPCAST, BIAS)
    p = _rounded(_softmax(q, k, first, owned, scale, PRECISION), v_ptr, UPCAST)
    _store(out_ptr, tl.dot(p, v, input_precision=PRECISION), token, head, owned, n_heads, head_dim, BE)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["first_ptr"])
def attention_grads(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,
    bias_ptr,
    first_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    sums_ptr,
    n_tokens,
    n_heads,
    head_dim,
    window,
    scale,
    q_stride_token,
    q_stride_head,
    q_stride_dim,
    k_stride_token,
    k_stride_head,
    k_stride_dim,
    v_stride_token,
    v_stride_head,
    v_stride_dim,
    g_stride_token,
    g_stride_head,
    g_stride_dim,
    PARTS: tl.constexpr,
    EQUAL: tl.constexpr,
    BIAS: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store dq, dk and dv of one tile and head; the weights are recomputed from q and k.

    The three results are PARTS = 1 part of a tensor each, or with PARTS = 3 one tensor (n_tokens, 3, n_heads, head_dim). With BIAS,
    ``sums`` (tiles, 3, n_heads, head_dim) gets their sums over the tokens of each tile, in fp32.
    """
    heads_apart = n_heads * PARTS
    tile, head = tl.program_id(0) // n_heads, tl.program_id(0) % n_heads
    token = tile * window + tl.arange(0, BT)
    first = _first(first_ptr, token, n_tokens, window, EQUAL)
    owned = (first >= tile * window) & (first < (tile + 1) * window)
    q = _load(q_ptr, token, head, owned, q_stride_token, q_stride_head, q_stride_dim, head_dim, BE, UPCAST)
    q = _biased(q, q_ptr, bias_ptr, 0, head, n_heads, head_dim, BE, UPCAST, BIAS)
    k = _load(k_ptr, token, head, owned, k_stride_token, k_stride_head, k_stride_dim, head_dim, BE, UPCAST)
    k = _biased(k, k_ptr, bias_ptr, 1, head, n_heads, head_dim, BE, UPCAST, BIAS)
    p = _softmax(q, k, first, owned, scale, PRECISION)
    g = _load(g_ptr, token, head, owned, g_stride_token, g_stride_head, g_stride_dim, head_dim, BE, UPCAST)
    dv = tl.dot(tl.trans(_rounded(p, g_ptr, UPCAST)), g, input_precision=PRECISION)
    _store(dv_ptr, dv, token, head, owned, heads_apart, head_dim, BE)
    if BIAS:
        _store_sum(sums_ptr, dv, tile, 2, head, n_heads, head_dim, BE)
    # fp32 and biased operands are loaded again from the cache: keeping them needs more registers than there are.
    if BIAS or q_ptr.dtype.element_ty == tl.float32:
        g = _load(g_ptr, token, head, owned, g_stride_token, g_stride_head, g_stride_dim, head_dim, BE, UPCAST)
    v = _load(v_ptr, token, head, owned, v_stride_token, v_stride_head, v_stride_dim, head_dim, BE, UPCAST)
    v = _biased(v, v_ptr, bias_ptr, 2, head, n_heads, head_dim, BE, UPCAST, BIAS)
    dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    # The row sum in the softmax gradient uses this p and dp, so no saved output is needed.
    ds = _rounded(p * (dp - tl.sum(p * dp, axis=1)[:, None]) * scale, q_ptr, UPCAST)
    if BIAS or q_ptr.dtype.element_ty == tl.float32:
        k = _load(k_ptr, token, head, owned, k_stride_token, k_stride_head, k_stride_dim, head_dim, BE, UPCAST)
        k = _biased(k, k_ptr, bias_ptr, 1, head, n_heads, head_dim, BE, UPCAST, BIAS)
    dq = tl.dot(ds, k, input_precision=PRECISION)
    _store(dq_ptr, dq, token, head, owned, heads_apart, head_dim, BE)
    if BIAS:
        _store_sum(sums_ptr, dq, tile, 0, head, n_heads, head_dim, BE)
    if BIAS or q_ptr.dtype.element_ty == tl.float32:
        q = _load(q_ptr, token, head, owned, q_stride_token, q_stride_head, q_stride_dim, head_dim, BE, UPCAST)
        q = _biased(q, q_ptr, bias_ptr, 0, head, n_heads, head_dim, BE, UPCAST, BIAS)
    dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
    _store(dk_ptr, dk, token, head, owned, heads_apart, head_dim, BE)
    if BIAS:
        _store_sum(sums_ptr, dk, tile, 1, head, n_heads, head_dim, BE)


LAUNCH: dict[tuple[str, int], dict[str, dict[str, Any]]] = {
    ("bf16", 32): {"forward": {"num_warps": 2}, "backward": {"num_warps": 2}},
    ("bf16", 64): {"forward": {"num_warps": 4}, "backward": {"num_warps": 4}},
    ("tf32", 32): {"forward": {"num_warps": 2}, "backward": {"num_warps": 2}},
    ("tf32", 64): {"forward": {"num_warps": 4}, "backward": {"num_warps": 8}},
    ("tf32x3", 32): {"forward": {"num_warps": 4}, "backward": {"num_warps": 4}},
}
"""Launch options by mode and tokens of a tile, for the combinations that compile without spills on sm_80 and sm_90. Tiles of 128
tokens spill in the backward pass, and so do tiles of 64 for fp32 without tf32."""


def config(mode: str, tile: int, *, backward: bool) -> dict[str, Any]:
    """Return the launch options of a tile of ``tile`` tokens."""
    return {"num_stages": 1} | LAUNCH[mode, tile]["backward" if backward else "forward"]


def best_tile(mode: str, longest: int) -> int:
    """Return the tile of a mode with the fewest products per owned token; raises ValueError if ``longest`` exceeds every tile."""
    return attention_tile(longest, tiles_of(mode))


def tiles_of(mode: str) -> tuple[int, ...]:
    """Return the tiles of a mode."""
    return tuple(tile for m, tile in LAUNCH if m == mode)
