"""Triton kernels of InfoNCE: at most 256 MiB (or 128 rows) of a B x M matrix are stored; results do not depend on the order of programs.

Forward, one pass over the logits: each program owns one tile, computes e = exp(s - shift) once, and stores the row sums and
the column sums of the tile; a sum over tiles in a fixed order completes both directions (u = 2 B M D FLOPs). Rows and columns
whose sum underflowed are recomputed by ``exact_lse``, which does nothing if there are none, so that the decision
is taken on the device. Backward: ``grad_tiles`` stores the derivatives g of the logits of a chunk of rows (u), which library
products multiply with both sides (u each). The vectors have length 1; see ``triton_op.py``.

DIAGONAL selects the whole loss, in which every pair (i, i) is a positive. The same pass stores the logits of these pairs, so that
positives and log-sum-exp share every rounding. Without DIAGONAL the kernels work on a block of rows and columns of a larger
matrix, whose rows and columns may have no allowed pair; see ``blocks_triton_op.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from comtip_kernels import tiles
from comtip_kernels.infonce.logit_tiles import allowed, grouped, logits

ALL, SAME_GROUP, OTHER_GROUP = 0, 1, 2
LOG2E = tl.constexpr(1.4426950408889634)
# The batch and the number of texts change from step to step. Values of 1 and multiples of 16 would each be compiled anew.
_SIZES = ["n_rows", "n_cols", "n_col_tiles", "n_row_tiles"]
_VECTORS = ["group_q_ptr", "group_k_ptr", "class_q_ptr", "class_k_ptr", "excluded_q_ptr", "excluded_k_ptr"]
_VECTORS += ["lse_ptr", "low_ptr", "lse_q_ptr", "lse_k_ptr", "weight_q_ptr", "weight_k_ptr", "low_q_ptr", "low_k_ptr"]
_VECTORS += ["row_sums_ptr", "col_sums_ptr", "positive_ptr", "scale_ptr"]


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_VECTORS)
def lse_tiles(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    row_sums_ptr,
    col_sums_ptr,
    positive_ptr,
    scale_ptr,
    group_q_ptr,
    group_k_ptr,
    class_q_ptr,
    class_k_ptr,
    excluded_q_ptr,
    excluded_k_ptr,
    n_rows,
    n_cols,
    width,
    q_stride_row,
    q_stride_dim,
    k_stride_row,
    k_stride_dim,
    n_col_tiles,
    HEADROOM: tl.constexpr,
    RULE: tl.constexpr,
    CLASSES: tl.constexpr,
    EXCLUDED: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store row sums (n_col_tiles, n_rows) and column sums (n_row_tiles, n_cols) of one tile of exp(s - shift).

    With DIAGONAL also the positives' logits s_ii (n_rows,).
    """
    tile_m, tile_n = grouped(tl.program_id(0), tl.cdiv(n_rows, BM), n_col_tiles)
    rows, cols = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    scale = tl.load(scale_ptr)
    s = scale * logits(
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
        BM,
        BN,
        BK,
        UPCAST,
        PRECISION,
    )
    if DIAGONAL:  # noqa: SIM102
        if (tile_m * BM < tile_n * BN + BN) & (tile_n * BN < tile_m * BM + BM):
            positive = tl.sum(tl.where(rows[:, None] == cols[None, :], s, 0.0), axis=1)
            in_tile = (rows >= tile_n * BN) & (rows < tile_n * BN + BN) & (rows < n_rows)
            tl.store(positive_ptr + rows, positive, mask=in_tile)
    e = tl.exp2((s - (scale - HEADROOM)) * LOG2E)
    ok = allowed(
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
        RULE,
        CLASSES,
        EXCLUDED,
        DIAGONAL,
    )
    e = tl.where(ok, e, 0.0)
    tl.store(row_sums_ptr + tile_n.to(tl.int64) * n_rows + rows, tl.sum(e, axis=1), mask=rows < n_rows)
    tl.store(col_sums_ptr + tile_m.to(tl.int64) * n_cols + cols, tl.sum(e, axis=0), mask=cols < n_cols)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_VECTORS)
def exact_lse(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    lse_ptr,
    low_ptr,
    scale_ptr,
    group_q_ptr,
    group_k_ptr,
    class_q_ptr,
    class_k_ptr,
    excluded_q_ptr,
    excluded_k_ptr,
    n_rows,
    n_cols,
    width,
    q_stride_row,
    q_stride_dim,
    k_stride_row,
    k_stride_dim,
    RULE: tl.constexpr,
    CLASSES: tl.constexpr,
    EXCLUDED: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Recompute, with a running maximum, the log-sum-exp of the rows marked in ``low``; a program without marked rows does nothing."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    low = tl.load(low_ptr + rows, mask=rows < n_rows, other=0)
    if tl.max(low, axis=0) > 0:
        scale = tl.load(scale_ptr)
        top = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        for start in range(0, n_cols, BN):
            cols = start + tl.arange(0, BN)
            ok = allowed(
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
                RULE,
                CLASSES,
                EXCLUDED,
                DIAGONAL,
            )
            s = scale * logits(
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
                BM,
                BN,
                BK,
                UPCAST,
                PRECISION,
            )
            s = tl.where(ok, s, float("-inf"))
            new = tl.maximum(top, tl.max(s, axis=1))
            # A row without an allowed pair so far keeps -inf; subtracting it would give NaN.
            safe = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp2((top - safe) * LOG2E) + tl.sum(tl.exp2((s - safe[:, None]) * LOG2E), axis=1)
            top = new
        tl.store(lse_ptr + rows, top + tl.log2(total) / LOG2E, mask=(rows < n_rows) & (low > 0))


@triton.jit(do_not_specialize=[*_SIZES, "first"], do_not_specialize_on_alignment=_VECTORS)
def grad_tiles(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    out_ptr,
    lse_q_ptr,
    lse_k_ptr,
    weight_q_ptr,
    weight_k_ptr,
    low_q_ptr,
    low_k_ptr,
    scale_ptr,
    group_q_ptr,
    group_k_ptr,
    class_q_ptr,
    class_k_ptr,
    excluded_q_ptr,
    excluded_k_ptr,
    n_rows,
    n_cols,
    first,
    n_row_tiles,
    width,
    q_stride_row,
    q_stride_dim,
    k_stride_row,
    k_stride_dim,
    out_stride_row,
    HEADROOM: tl.constexpr,
    RULE: tl.constexpr,
    CLASSES: tl.constexpr,
    EXCLUDED: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store one tile of g in rows ``first`` to ``first + n_row_tiles * BM``, in the dtype of the vectors; 0 where masked.

    g_ij = weight_q[i] exp(s_ij - lse_q[i]) + weight_k[j] exp(s_ij - lse_k[j]), both terms from one exponential
    unless a sum of this tile underflowed.
    """
    pid = tl.program_id(0)
    # Neighbouring programs share their columns: the rows of a chunk stay in the L2 cache, and each column is read once.
    tile_m, tile_n = pid % n_row_tiles, pid // n_row_tiles
    local = tile_m * BM + tl.arange(0, BM)
    rows, cols = first + local, tile_n * BN + tl.arange(0, BN)
    low_q = tl.max(tl.load(low_q_ptr + rows, mask=rows < n_rows, other=0), axis=0)
    low_k = tl.max(tl.load(low_k_ptr + cols, mask=cols < n_cols, other=0), axis=0)
    scale = tl.load(scale_ptr)
    shift = scale - HEADROOM
    s = scale * logits(
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
        BM,
        BN,
        BK,
        UPCAST,
        PRECISION,
    )
    lse_q = tl.load(lse_q_ptr + rows, mask=rows < n_rows, other=0.0)
    lse_k = tl.load(lse_k_ptr + cols, mask=cols < n_cols, other=0.0)
    weight_q = tl.load(weight_q_ptr + rows, mask=rows < n_rows, other=0.0)
    weight_k = tl.load(weight_k_ptr + cols, mask=cols < n_cols, other=0.0)
    if tl.maximum(low_q, low_k) > 0:
        g = weight_q[:, None] * tl.exp2((s - lse_q[:, None]) * LOG2E)
        # A weight of 0 marks a further column, whose log-sum-exp does not exist: its exponential may be infinite.
        exponent = tl.where(weight_k[None, :] != 0, (s - lse_k[None, :]) * LOG2E, 0.0)
        g += weight_k[None, :] * tl.exp2(exponent)
    else:
        a = weight_q * tl.exp2(tl.minimum(shift - lse_q, 80.0) * LOG2E)
        b = weight_k * tl.exp2(tl.minimum(shift - lse_k, 80.0) * LOG2E)
        g = tl.exp2((s - shift) * LOG2E) * (a[:, None] + b[None, :])
    ok = allowed(
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
        RULE,
        CLASSES,
        EXCLUDED,
        DIAGONAL,
    )
    g = tl.where(ok, g, 0.0)
    tl.store(
        out_ptr + local[:, None].to(tl.int64) * out_stride_row + cols[None, :],
        g.to(out_ptr.dtype.element_ty),
        mask=(rows[:, None] < n_rows) & (cols[None, :] < n_cols),
    )


FORWARD, EXACT, GRADIENT = tiles.INFONCE_FORWARD, tiles.INFONCE_EXACT, tiles.INFONCE_GRADIENT
