"""Parts that the Triton kernels of InfoNCE share: the logits of a tile, its mask, and the order of the tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from comtip_kernels import flops

ROW_GROUP = tl.constexpr(flops.ROW_GROUP)


@triton.jit
def logits(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    rows,
    cols,
    n_rows,
    n_cols,
    width,
    q_stride_row,
    q_stride_dim,
    k_stride_row,
    k_stride_dim,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return <q_i, k_j>, fp32 (BM, BN); 0 beyond the last row and column."""
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, width, BK):
        dim = start + tl.arange(0, BK)
        q = tl.load(
            q_ptr + rows[:, None] * q_stride_row + dim[None, :] * q_stride_dim,
            mask=(rows[:, None] < n_rows) & (dim[None, :] < width),
            other=0.0,
        )
        k = tl.load(
            k_ptr + cols[:, None] * k_stride_row + dim[None, :] * k_stride_dim,
            mask=(cols[:, None] < n_cols) & (dim[None, :] < width),
            other=0.0,
        )
        if UPCAST:
            # The interpreter would multiply the bit patterns of bf16; a GPU never takes this branch.
            q = q.to(tl.float32)
            k = k.to(tl.float32)
        acc = tl.dot(q, tl.trans(k), acc, input_precision=PRECISION)
    return acc


@triton.jit
def allowed(  # type: ignore[no-untyped-def]
    rows,
    cols,
    n_rows,
    n_cols,
    group_q_ptr,
    group_k_ptr,
    class_q_ptr,
    class_k_ptr,
    excluded_q_ptr,
    excluded_k_ptr,
    RULE: tl.constexpr,
    CLASSES: tl.constexpr,
    EXCLUDED: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """Return which pairs enter the softmax, bool (BM, BN); with DIAGONAL the positives (i, i) always do."""
    inside = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    ok = inside
    if CLASSES:
        class_q = tl.load(class_q_ptr + rows, mask=rows < n_rows, other=0)
        class_k = tl.load(class_k_ptr + cols, mask=cols < n_cols, other=0)
        ok = ok & (class_q[:, None] != class_k[None, :])
    if EXCLUDED:
        excluded_q = tl.load(excluded_q_ptr + rows, mask=rows < n_rows, other=0)
        excluded_k = tl.load(excluded_k_ptr + cols, mask=cols < n_cols, other=0)
        ok = ok & (excluded_q[:, None] == 0) & (excluded_k[None, :] == 0)
    if RULE != 0:
        group_q = tl.load(group_q_ptr + rows, mask=rows < n_rows, other=0)
        group_k = tl.load(group_k_ptr + cols, mask=cols < n_cols, other=0)
        if RULE == 1:
            ok = ok & (group_q[:, None] == group_k[None, :])
        else:
            ok = ok & (group_q[:, None] != group_k[None, :])
    if DIAGONAL:
        ok = ok | (inside & (rows[:, None] == cols[None, :]))
    return ok


@triton.jit
def grouped(pid, n_row_tiles, n_col_tiles):  # type: ignore[no-untyped-def]
    """Return row and column of tile ``pid`` in groups of ``ROW_GROUP`` rows, column by column within a group.

    Columns that exceed the L2 cache are then read from memory once per group and not once per row of tiles.
    """
    first = pid // (ROW_GROUP * n_col_tiles) * ROW_GROUP
    rows = tl.minimum(n_row_tiles - first, ROW_GROUP)
    local = pid % (ROW_GROUP * n_col_tiles)
    return first + local % rows, local // rows
