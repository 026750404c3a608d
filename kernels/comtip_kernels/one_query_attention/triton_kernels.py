"""Triton kernels of attention with one query per sentence and head: one program per sentence.

A program reads its queries (H, D) and tokens (T, D) in slices of BD columns, first for the scores, then for what is summed with the
weights. Each token belongs to one program: no atomics. Programs are on grid axis 0, whose limit no batch reaches.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Number of queries changes from step to step; starts of sentences are a view of any offset.
_FREE: dict[str, Any] = {
    "do_not_specialize": ["n_queries"],
    "do_not_specialize_on_alignment": ["first_ptr", "length_ptr"],
}


@triton.jit
def _load(  # type: ignore[no-untyped-def]
    ptr, row, inside, start, stride_row, stride_dim, width, BD: tl.constexpr, UPCAST: tl.constexpr
):
    """Return columns ``start`` to ``start + BD`` of the rows, 0 outside."""
    dim = start + tl.arange(0, BD)
    offset = row.to(tl.int64)[:, None] * stride_row + dim[None, :] * stride_dim
    x = tl.load(ptr + offset, mask=inside[:, None] & (dim[None, :] < width), other=0.0)
    if UPCAST:
        # The interpreter would multiply the bit patterns of bf16; a GPU never takes this branch.
        x = x.to(tl.float32)
    return x


@triton.jit
def _store(ptr, x, row, inside, start, width, BD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store columns ``start`` to ``start + BD`` of contiguous rows."""
    dim = start + tl.arange(0, BD)
    offset = row.to(tl.int64)[:, None] * width + dim[None, :]
    tl.store(ptr + offset, x, mask=inside[:, None] & (dim[None, :] < width))


@triton.jit
def _rounded(x, ptr, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return ``x`` rounded to the element type of ``ptr``, as an operand of a product."""
    x = x.to(ptr.dtype.element_ty)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _softmax(s, own, scale):  # type: ignore[no-untyped-def]
    """Return the weights of each head's tokens, fp32 (BH, BT), from the products ``s``; 0 for tokens that are not the sentence's."""
    s = tl.where(own[None, :], s * (scale * LOG2E), float("-inf"))
    top = tl.max(s, axis=1)
    p = tl.exp2(s - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(p, axis=1)
    return p / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit(**_FREE)
def one_query_forward(  # type: ignore[no-untyped-def]
    query_ptr,
    x_ptr,
    first_ptr,
    length_ptr,
    out_ptr,
    n_heads,
    width,
    scale,
    q_stride_row,
    q_stride_head,
    q_stride_dim,
    x_stride_row,
    x_stride_dim,
    BH: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store softmax(query x^T scale) x of one sentence."""
    sentence = tl.program_id(0).to(tl.int64)
    token = tl.load(first_ptr + sentence) + tl.arange(0, BT)
    own = tl.arange(0, BT) < tl.load(length_ptr + sentence)
    head = tl.arange(0, BH)
    queries = query_ptr + sentence * q_stride_row
    s = tl.zeros((BH, BT), tl.float32)
    for start in range(0, width, BD):
        q = _load(queries, head, head < n_heads, start, q_stride_head, q_stride_dim, width, BD, UPCAST)
        x = _load(x_ptr, token, own, start, x_stride_row, x_stride_dim, width, BD, UPCAST)
        s = tl.dot(q, tl.trans(x), s, input_precision=PRECISION)
    p = _rounded(_softmax(s, own, scale), x_ptr, UPCAST)
    results = out_ptr + sentence * n_heads * width
    for start in range(0, width, BD):
        x = _load(x_ptr, token, own, start, x_stride_row, x_stride_dim, width, BD, UPCAST)
        _store(results, tl.dot(p, x, input_precision=PRECISION), head, head < n_heads, start, width, BD)


@triton.jit(**_FREE)
def one_query_grads(  # type: ignore[no-untyped-def]
    query_ptr,
    x_ptr,
    g_ptr,
    first_ptr,
    length_ptr,
    dquery_ptr,
    dx_ptr,
    n_queries,
    n_heads,
    width,
    scale,
    q_stride_row,
    q_stride_head,
    q_stride_dim,
    x_stride_row,
    x_stride_dim,
    g_stride_row,
    g_stride_head,
    g_stride_dim,
    BH: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store the gradients of one sentence's queries and tokens; that of tokens of a sentence without a query is 0."""
    sentence = tl.program_id(0).to(tl.int64)
    token = tl.load(first_ptr + sentence) + tl.arange(0, BT)
    own = tl.arange(0, BT) < tl.load(length_ptr + sentence)
    head = tl.arange(0, BH)
    asked = (head < n_heads) & (sentence < n_queries)
    queries, grads = query_ptr + sentence * q_stride_row, g_ptr + sentence * g_stride_row
    s, dp = tl.zeros((BH, BT), tl.float32), tl.zeros((BH, BT), tl.float32)
    for start in range(0, width, BD):
        x = tl.trans(_load(x_ptr, token, own, start, x_stride_row, x_stride_dim, width, BD, UPCAST))
        q = _load(queries, head, asked, start, q_stride_head, q_stride_dim, width, BD, UPCAST)
        s = tl.dot(q, x, s, input_precision=PRECISION)
        g = _load(grads, head, asked, start, g_stride_head, g_stride_dim, width, BD, UPCAST)
        dp = tl.dot(g, x, dp, input_precision=PRECISION)
    p = _softmax(s, own, scale)
    # The row sum in the softmax gradient uses this p and dp, so no saved output is needed.
    ds = _rounded(p * (dp - tl.sum(p * dp, axis=1)[:, None]) * scale, query_ptr, UPCAST)
    p = _rounded(p, g_ptr, UPCAST)
    dqueries = dquery_ptr + sentence * n_heads * width
    for start in range(0, width, BD):
        x = _load(x_ptr, token, own, start, x_stride_row, x_stride_dim, width, BD, UPCAST)
        _store(dqueries, tl.dot(ds, x, input_precision=PRECISION), head, asked, start, width, BD)
        q = _load(queries, head, asked, start, q_stride_head, q_stride_dim, width, BD, UPCAST)
        dx = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
        g = _load(grads, head, asked, start, g_stride_head, g_stride_dim, width, BD, UPCAST)
        dx = tl.dot(tl.trans(p), g, dx, input_precision=PRECISION)
        _store(dx_ptr, dx, token, own, start, width, BD)
