"""Three Triton kernels over the sentence table; a level picks its row inside the tile, by comparison, not by a gather.

A tile holds BM spots and NG genes with all their levels, QP = the next power of 2 of Q: the product of spots with those
rows is one ``dot``, and what the level picks is a mask over its last axis. Where weights go the other way, the mask times the
weight is the operand. Both ways tensor cores do the sum, each program owns its output, and nothing is added to by two
programs: results repeat to the bit. ``MODE`` says what a weight is: given (``PICK``), or the gradient of L_level, made again
from the scores (``CROSS_ENTROPY``).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

PICK, CROSS_ENTROPY = 0, 1
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scores(  # type: ignore[no-untyped-def]
    c_ptr, t_ptr, spots, gene, level, B, G, Q, D, c_b, c_d, t_g, t_q, t_d,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return <c_b, table[g, q]>, fp32 (BM, BN); past the ends it is 0."""
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    c_row = c_ptr + spots.to(tl.int64)[:, None] * c_b
    t_row = t_ptr + gene.to(tl.int64)[:, None] * t_g + level[:, None] * t_q
    for start in range(0, D, BK):
        d = start + tl.arange(0, BK)
        c = tl.load(c_row + d[None, :] * c_d, mask=(spots[:, None] < B) & (d[None, :] < D), other=0.0)
        inside = (gene[:, None] < G) & (level[:, None] < Q) & (d[None, :] < D)
        t = tl.load(t_row + d[None, :] * t_d, mask=inside, other=0.0)
        if UPCAST:
            # The interpreter multiplies the bit patterns of bf16; a GPU never takes this branch.
            c = c.to(tl.float32)
            t = t.to(tl.float32)
        acc = tl.dot(c, tl.trans(t), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _weights(  # type: ignore[no-untyped-def]
    c_ptr, t_ptr, w_ptr, levels_ptr, prior_ptr, scale_ptr, factor_ptr, spots, genes, gene, level, B, G, Q, D, c_b, c_d, t_g,
    t_q, t_d, MODE: tl.constexpr, PRIOR: tl.constexpr, BM: tl.constexpr, NG: tl.constexpr, QP: tl.constexpr,
    BK: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the weight of each (spot, gene, level), fp32 (BM, NG * QP)."""
    inside = (spots[:, None] < B) & (genes[None, :] < G)
    where = spots.to(tl.int64)[:, None] * G + genes[None, :]
    picked = tl.load(levels_ptr + where, mask=inside, other=0).to(tl.int32)
    q = tl.arange(0, QP)
    hot = picked[:, :, None] == q[None, None, :]
    w = tl.load(w_ptr + where, mask=inside, other=0).to(tl.float32)
    if MODE == 0:
        out = tl.where(hot, w[:, :, None], 0.0)
    else:
        s = _scores(
            c_ptr, t_ptr, spots, gene, level, B, G, Q, D, c_b, c_d, t_g, t_q, t_d, BM, NG * QP, BK, UPCAST, PRECISION
        )
        s = _adjusted(s, prior_ptr, scale_ptr, genes, G, Q, PRIOR, BM, NG, QP)
        e = tl.exp2((s - tl.max(s, axis=2)[:, :, None]) * LOG2E)
        p = e / tl.sum(e, axis=2)[:, :, None]
        out = (p - tl.where(hot, 1.0, 0.0)) * (w * tl.load(factor_ptr))[:, :, None]
        # A gene past the end has no score at all; its softmax is 0 / 0.
        out = tl.where(inside[:, :, None], out, 0.0)
    return tl.reshape(out, (BM, NG * QP))


@triton.jit
def _adjusted(  # type: ignore[no-untyped-def]
    s, prior_ptr, scale_ptr, genes, G, Q, PRIOR: tl.constexpr, BM: tl.constexpr, NG: tl.constexpr, QP: tl.constexpr,
):  # fmt: skip
    """Return scale * s + prior as (BM, NG, QP), -inf for levels that do not exist."""
    q = tl.arange(0, QP)
    s = tl.reshape(s, (BM, NG, QP)) * tl.load(scale_ptr)
    if PRIOR:
        at = genes[:, None] * Q + q[None, :]
        prior = tl.load(prior_ptr + at, mask=(genes[:, None] < G) & (q[None, :] < Q), other=0.0)
        s += prior.to(tl.float32)[None, :, :]
    return tl.where((q < Q)[None, None, :], s, float("-inf"))


@triton.jit
def take_tiles(  # type: ignore[no-untyped-def]
    c_ptr, t_ptr, w_ptr, levels_ptr, prior_ptr, scale_ptr, out_ptr, B, G, Q, D, c_b, c_d, t_g, t_q, t_d, n_gene_tiles,
    MODE: tl.constexpr, PRIOR: tl.constexpr, BM: tl.constexpr, NG: tl.constexpr, QP: tl.constexpr, BK: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store <c_b, table[g, level]> (B, G); with CROSS_ENTROPY one number per tile, the sum of w * loss."""
    pid = tl.program_id(0)
    tile_m, tile_n = pid // n_gene_tiles, pid % n_gene_tiles
    spots, genes = tile_m * BM + tl.arange(0, BM), tile_n * NG + tl.arange(0, NG)
    column = tl.arange(0, NG * QP)
    s = _scores(
        c_ptr, t_ptr, spots, tile_n * NG + column // QP, column % QP, B, G, Q, D, c_b, c_d, t_g, t_q, t_d, BM, NG * QP, BK,
        UPCAST, PRECISION,
    )  # fmt: skip
    inside = (spots[:, None] < B) & (genes[None, :] < G)
    where = spots.to(tl.int64)[:, None] * G + genes[None, :]
    picked = tl.load(levels_ptr + where, mask=inside, other=0).to(tl.int32)
    hot = picked[:, :, None] == tl.arange(0, QP)[None, None, :]
    if MODE == 0:
        own = tl.sum(tl.where(hot, tl.reshape(s, (BM, NG, QP)), 0.0), axis=2)
        tl.store(out_ptr + where, own, mask=inside)
    else:
        s3 = _adjusted(s, prior_ptr, scale_ptr, genes, G, Q, PRIOR, BM, NG, QP)
        top = tl.max(s3, axis=2)
        lse = top + tl.log2(tl.sum(tl.exp2((s3 - top[:, :, None]) * LOG2E), axis=2)) / LOG2E
        own = tl.sum(tl.where(hot, s3, 0.0), axis=2)
        w = tl.load(w_ptr + where, mask=inside, other=0).to(tl.float32)
        loss = tl.where(w != 0, (lse - own) * w, 0.0)
        tl.store(out_ptr + pid, tl.sum(tl.sum(loss, axis=1), axis=0))


@triton.jit
def spread_rows(  # type: ignore[no-untyped-def]
    c_ptr, t_ptr, w_ptr, levels_ptr, prior_ptr, scale_ptr, factor_ptr, out_ptr, B, G, Q, D, c_b, c_d, t_g, t_q, t_d,
    MODE: tl.constexpr, PRIOR: tl.constexpr, BM: tl.constexpr, NG: tl.constexpr, QP: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store sum_gq weight[b, g, q] table[g, q], fp32 (B, D): one block of spots, one slice of D per program."""
    spots = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    column = tl.arange(0, NG * QP)
    acc = tl.zeros((BM, BD), dtype=tl.float32)
    for start in range(0, G, NG):
        genes, gene, level = start + tl.arange(0, NG), start + column // QP, column % QP
        w = _weights(
            c_ptr, t_ptr, w_ptr, levels_ptr, prior_ptr, scale_ptr, factor_ptr, spots, genes, gene, level, B, G, Q, D, c_b,
            c_d, t_g, t_q, t_d, MODE, PRIOR, BM, NG, QP, BK, UPCAST, PRECISION,
        )  # fmt: skip
        inside = (gene[:, None] < G) & (level[:, None] < Q) & (d[None, :] < D)
        t = tl.load(
            t_ptr + gene.to(tl.int64)[:, None] * t_g + level[:, None] * t_q + d[None, :] * t_d, mask=inside, other=0.0
        )
        if UPCAST:
            t = t.to(tl.float32)
        acc = tl.dot(w.to(t.dtype), t, acc, input_precision=PRECISION)
    tl.store(out_ptr + spots.to(tl.int64)[:, None] * D + d[None, :], acc, mask=(spots[:, None] < B) & (d[None, :] < D))


@triton.jit
def collect_rows(  # type: ignore[no-untyped-def]
    c_ptr, t_ptr, w_ptr, levels_ptr, prior_ptr, scale_ptr, factor_ptr, out_ptr, dprior_ptr, B, G, Q, D, c_b, c_d, t_g, t_q,
    t_d, MODE: tl.constexpr, PRIOR: tl.constexpr, BM: tl.constexpr, NG: tl.constexpr, QP: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store sum_b weight[b, g, q] c[b], fp32 (G, Q, D): NG genes, one slice of D per program."""
    first = tl.program_id(0) * NG
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    column = tl.arange(0, NG * QP)
    genes, gene, level = first + tl.arange(0, NG), first + column // QP, column % QP
    acc = tl.zeros((NG * QP, BD), dtype=tl.float32)
    total = tl.zeros((NG * QP,), dtype=tl.float32)
    for start in range(0, B, BM):
        spots = start + tl.arange(0, BM)
        w = _weights(
            c_ptr, t_ptr, w_ptr, levels_ptr, prior_ptr, scale_ptr, factor_ptr, spots, genes, gene, level, B, G, Q, D, c_b,
            c_d, t_g, t_q, t_d, MODE, PRIOR, BM, NG, QP, BK, UPCAST, PRECISION,
        )  # fmt: skip
        c = tl.load(
            c_ptr + spots.to(tl.int64)[:, None] * c_b + d[None, :] * c_d, mask=(spots[:, None] < B) & (d[None, :] < D),
            other=0.0,
        )  # fmt: skip
        if UPCAST:
            c = c.to(tl.float32)
        acc = tl.dot(tl.trans(w.to(c.dtype)), c, acc, input_precision=PRECISION)
        if PRIOR:
            total += tl.sum(w, axis=0)
    row = gene.to(tl.int64) * Q + level
    exists = (gene < G) & (level < Q)
    tl.store(out_ptr + row[:, None] * D + d[None, :], acc, mask=exists[:, None] & (d[None, :] < D))
    if PRIOR:  # noqa: SIM102
        # A branch, not a mask: Triton 3.9's interpreter takes no mask that a scalar comparison went into.
        if tl.program_id(1) == 0:
            tl.store(dprior_ptr + row, total, mask=exists)


# Tiles that the ledger passes (no spills on sm_80 and sm_90). BN is genes of a tile times padded levels; BD is the width of
# the output that a program keeps in registers.
TAKE: dict[str, Any] = {"BM": 64, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3}
SPREAD: dict[str, Any] = {"BM": 64, "BN": 32, "BK": 64, "BD": 256, "num_warps": 8, "num_stages": 2}
COLLECT: dict[str, Any] = {"BM": 64, "BN": 64, "BK": 64, "BD": 256, "num_warps": 8, "num_stages": 2}
FP32: dict[str, Any] = {"BM": 32, "BN": 32, "BK": 32}
"""Operands of 4 bytes take half the room: these tiles replace those of the gradients."""
