"""InfoNCE on a GPU: Triton kernels, no B x M matrix, no atomics, nothing that depends on the order of programs.

Forward, one pass over the logits: each program owns one tile, makes e = exp(s - shift) once, and stores the tile's row
sums and column sums; a sum over tiles in fixed order finishes both directions (u = 2 B M D FLOPs). Rows or columns
whose sum underflowed are done again by ``exact_lse``, which returns at once where there are none: the choice is made
on the device. Backward: ``grad_rows`` makes dX with one program per block of rows, and, with its arguments swapped,
dY (2u each). Vectors come in at length 1; see ``op.py``.

DIAGONAL says whether pair (i, i) is a positive, as in the whole loss. Without it the same kernels work on a block of rows and
columns of a larger matrix, which may hold no positive and no negative at all; see ``blocks_op.py``.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

ALL, SAME_GROUP, OTHER_GROUP = 0, 1, 2
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _logits(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, rows, cols, n_rows, n_cols, D, q_row, q_d, k_row, k_d,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return <q_i, k_j>, fp32 (BM, BN); past the ends it is 0."""
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, D, BK):
        d = start + tl.arange(0, BK)
        q = tl.load(
            q_ptr + rows[:, None] * q_row + d[None, :] * q_d,
            mask=(rows[:, None] < n_rows) & (d[None, :] < D),
            other=0.0,
        )
        k = tl.load(
            k_ptr + cols[:, None] * k_row + d[None, :] * k_d,
            mask=(cols[:, None] < n_cols) & (d[None, :] < D),
            other=0.0,
        )
        if UPCAST:
            # The interpreter multiplies the bit patterns of bf16; a GPU never takes this branch.
            q = q.to(tl.float32)
            k = k.to(tl.float32)
        acc = tl.dot(q, tl.trans(k), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _allowed(  # type: ignore[no-untyped-def]
    rows, cols, n_rows, n_cols, group_q, group_k, class_q, class_k, silent_q, silent_k,
    RULE: tl.constexpr, CLASSES: tl.constexpr, SILENT: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Return which pairs enter the softmax: bool (BM, BN); with DIAGONAL (i, i) is the positive, and always does."""
    inside = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    ok = inside
    if CLASSES:
        cq = tl.load(class_q + rows, mask=rows < n_rows, other=0)
        ck = tl.load(class_k + cols, mask=cols < n_cols, other=0)
        ok = ok & (cq[:, None] != ck[None, :])
    if SILENT:
        sq = tl.load(silent_q + rows, mask=rows < n_rows, other=0)
        sk = tl.load(silent_k + cols, mask=cols < n_cols, other=0)
        ok = ok & (sq[:, None] == 0) & (sk[None, :] == 0)
    if RULE != 0:
        gq = tl.load(group_q + rows, mask=rows < n_rows, other=0)
        gk = tl.load(group_k + cols, mask=cols < n_cols, other=0)
        if RULE == 1:
            ok = ok & (gq[:, None] == gk[None, :])
        else:
            ok = ok & (gq[:, None] != gk[None, :])
    if DIAGONAL:
        ok = ok | (inside & (rows[:, None] == cols[None, :]))
    return ok


@triton.jit
def lse_tiles(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, row_sums, col_sums, scale_ptr, group_x, group_y, class_x, class_y, silent_x, silent_y, B, M, D, x_row, x_d,
    y_row, y_d, n_col_tiles, HEADROOM: tl.constexpr, RULE: tl.constexpr, CLASSES: tl.constexpr, SILENT: tl.constexpr,
    DIAGONAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the row sums (n_col_tiles, B) and the column sums (n_row_tiles, M) of one tile of exp(s - shift)."""
    pid = tl.program_id(0)
    tile_m, tile_n = pid // n_col_tiles, pid % n_col_tiles
    rows, cols = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    scale = tl.load(scale_ptr)
    s = _logits(x_ptr, y_ptr, rows, cols, B, M, D, x_row, x_d, y_row, y_d, BM, BN, BK, UPCAST, PRECISION)
    e = tl.exp2((s * scale - (scale - HEADROOM)) * LOG2E)
    ok = _allowed(
        rows, cols, B, M, group_x, group_y, class_x, class_y, silent_x, silent_y, RULE, CLASSES, SILENT, DIAGONAL
    )
    e = tl.where(ok, e, 0.0)
    tl.store(row_sums + tile_n.to(tl.int64) * B + rows, tl.sum(e, axis=1), mask=rows < B)
    tl.store(col_sums + tile_m.to(tl.int64) * M + cols, tl.sum(e, axis=0), mask=cols < M)


@triton.jit
def exact_lse(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, lse_ptr, low_ptr, scale_ptr, group_q, group_k, class_q, class_k, silent_q, silent_k, n_out, n_cols, D, q_row,
    q_d, k_row, k_d, RULE: tl.constexpr, CLASSES: tl.constexpr, SILENT: tl.constexpr, DIAGONAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Do the log-sum-exp of the rows marked ``low`` again, with a running maximum; nothing to do, nothing done."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    low = tl.load(low_ptr + rows, mask=rows < n_out, other=0)
    if tl.max(low, axis=0) > 0:
        scale = tl.load(scale_ptr)
        top = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        for start in range(0, n_cols, BN):
            cols = start + tl.arange(0, BN)
            ok = _allowed(
                rows, cols, n_out, n_cols, group_q, group_k, class_q, class_k, silent_q, silent_k, RULE,
                CLASSES, SILENT, DIAGONAL,
            )  # fmt: skip
            s = scale * _logits(
                q_ptr, k_ptr, rows, cols, n_out, n_cols, D, q_row, q_d, k_row, k_d, BM, BN, BK, UPCAST, PRECISION
            )
            s = tl.where(ok, s, float("-inf"))
            new = tl.maximum(top, tl.max(s, axis=1))
            # A row that has met no allowed pair yet keeps -inf, and must not make NaN of it.
            safe = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp2((top - safe) * LOG2E) + tl.sum(tl.exp2((s - safe[:, None]) * LOG2E), axis=1)
            top = new
        tl.store(lse_ptr + rows, top + tl.log2(total) / LOG2E, mask=(rows < n_out) & (low > 0))


@triton.jit
def grad_rows(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, out_ptr, lse_q, lse_k, half_q, half_k, low_q, low_k, scale_ptr, group_q, group_k, class_q, class_k, silent_q,
    silent_k, n_rows, n_cols, per_part, D, q_row, q_d, k_row, k_d, HEADROOM: tl.constexpr, RULE: tl.constexpr, CLASSES: tl.constexpr,
    SILENT: tl.constexpr, DIAGONAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store sum_j g_ij k_j, fp32 (n_rows, D), for one block of rows and one slice of BD columns of D.

    Without DIAGONAL: (parts, n_rows, D), each over ``per_part`` columns.

    g_ij = half_q[i] exp(s_ij - lse_q[i]) + half_k[j] exp(s_ij - lse_k[j]), both from one exponential unless a sum of
    this tile had underflowed.
    """
    if not DIAGONAL:
        # A block may be long and thin: programs share out its columns, each part is stored by itself.
        first = tl.program_id(2) * per_part
        n_cols = tl.minimum(n_cols - first, per_part)
        k_ptr += first.to(tl.int64) * k_row
        out_ptr += (tl.program_id(2) * n_rows).to(tl.int64) * D
        lse_k += first
        half_k += first
        low_k += first
        group_k += first
        class_k += first
        silent_k += first
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    d_out = tl.program_id(1) * BD + tl.arange(0, BD)
    scale = tl.load(scale_ptr)
    shift = scale - HEADROOM
    own_lse = tl.load(lse_q + rows, mask=rows < n_rows, other=0.0)
    own_half = tl.load(half_q + rows, mask=rows < n_rows, other=0.0)
    own_low = tl.max(tl.load(low_q + rows, mask=rows < n_rows, other=0), axis=0)
    a = own_half * tl.exp2(tl.minimum(shift - own_lse, 80.0) * LOG2E)
    acc = tl.zeros((BM, BD), dtype=tl.float32)
    for start in range(0, n_cols, BN):
        cols = start + tl.arange(0, BN)
        s = scale * _logits(
            q_ptr, k_ptr, rows, cols, n_rows, n_cols, D, q_row, q_d, k_row, k_d, BM, BN, BK, UPCAST, PRECISION
        )
        lse = tl.load(lse_k + cols, mask=cols < n_cols, other=0.0)
        half = tl.load(half_k + cols, mask=cols < n_cols, other=0.0)
        low = tl.max(tl.load(low_k + cols, mask=cols < n_cols, other=0), axis=0)
        if tl.maximum(own_low, low) > 0:
            g = own_half[:, None] * tl.exp2((s - own_lse[:, None]) * LOG2E)
            # A weight of 0 stands for a further column, whose log-sum-exp was never made: its exponential may be infinite.
            other = tl.where(half[None, :] != 0, (s - lse[None, :]) * LOG2E, 0.0)
            g += half[None, :] * tl.exp2(other)
        else:
            b = half * tl.exp2(tl.minimum(shift - lse, 80.0) * LOG2E)
            g = tl.exp2((s - shift) * LOG2E) * (a[:, None] + b[None, :])
        ok = _allowed(
            rows, cols, n_rows, n_cols, group_q, group_k, class_q, class_k, silent_q, silent_k, RULE,
            CLASSES, SILENT, DIAGONAL,
        )  # fmt: skip
        g = tl.where(ok, g, 0.0)
        k = tl.load(
            k_ptr + cols[:, None] * k_row + d_out[None, :] * k_d, mask=(cols[:, None] < n_cols) & (d_out[None, :] < D),
            other=0.0,
        )  # fmt: skip
        if UPCAST:
            k = k.to(tl.float32)
        acc = tl.dot(g.to(k.dtype), k, acc, input_precision=PRECISION)
    tl.store(
        out_ptr + rows[:, None].to(tl.int64) * D + d_out[None, :],
        acc,
        mask=(rows[:, None] < n_rows) & (d_out[None, :] < D),
    )


# Tiles that the ledger passes on sm_80 and sm_90 (no spills, shared memory within the limit); no autotuning, so that a
# result does not depend on what else the GPU was doing.
FORWARD: dict[str, Any] = {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3}
EXACT: dict[str, Any] = {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 3}
EXACT_FP32: dict[str, Any] = {"BM": 64, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 3}
BACKWARD: dict[str, Any] = {"BM": 64, "BN": 32, "BK": 64, "num_warps": 8, "num_stages": 2}
BACKWARD_FP32: dict[str, Any] = {"BM": 32, "BN": 32, "BK": 32, "num_warps": 8, "num_stages": 2}


def exact_tiles(fp32: bool) -> dict[str, Any]:
    """Return the exact pass' tiles; masks of 64-bit classes leave fewer registers."""
    return dict(EXACT_FP32 if fp32 else EXACT)


def backward_tiles(fp32: bool) -> dict[str, Any]:
    """Return the backward's tiles: operands of 4 bytes take half the room."""
    return dict(BACKWARD_FP32 if fp32 else BACKWARD)


MAX_BD = 512
"""Width of the gradient that a program keeps in registers; wider vectors make the logits again per slice."""
PROGRAMS, LEAST_PART = 256, 512
"""A block's gradient is shared out among about so many programs, two for each multiprocessor of a large GPU, over at least so
many columns each. Constants: the order of a sum must not depend on the GPU."""


def shares(programs: int, n_cols: int) -> tuple[int, int]:
    """Return in how many parts ``programs`` blocks of rows work through a block's columns, and how long a part is."""
    per_part = max(LEAST_PART, triton.cdiv(n_cols * programs, PROGRAMS))
    # Multiples of every tile and of 16, so that a part is read as quickly as the whole.
    per_part = 64 * triton.cdiv(per_part, 64)
    return triton.cdiv(n_cols, per_part), per_part
