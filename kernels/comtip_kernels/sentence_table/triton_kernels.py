"""Triton kernels over the sentence table; a level selects its row inside the tile by comparison, not by a gather.

A tile contains BM spots and NG genes with all their levels, QP = the next power of 2 of Q: the product of spots and rows is one
``dot``, and the selected level is a mask over its last axis. In the other direction, mask times weight is the operand.
Tensor cores compute both; each program owns its output, so results repeat bit for bit. ``sampled_dot`` computes scores
(``PICK``) or L_level (``CROSS_ENTROPY``), and ``level_gradient`` the derivative of L_level with respect to the scores.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from comtip_kernels import tiles

PICK, CROSS_ENTROPY = 0, 1
LOG2E = tl.constexpr(1.4426950408889634)
# The batch and the panel change from step to step. Values of 1 and multiples of 16 would each be compiled anew.
_SIZES = ["n_spots", "n_genes", "n_spot_tiles", "panel_genes", "part_genes"]
_UNALIGNED = ["weight_ptr", "levels_ptr", "prior_ptr", "scale_ptr", "factor_ptr", "out_ptr", "sums_ptr"]


@triton.jit
def _scores(  # type: ignore[no-untyped-def]
    vector_ptr,
    table_ptr,
    spots,
    gene,
    level,
    n_spots,
    n_genes,
    n_levels,
    width,
    v_stride_spot,
    v_stride_dim,
    t_stride_gene,
    t_stride_level,
    t_stride_dim,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return <vector_b, table[g, q]>, fp32 (BM, BN); 0 beyond the last spot, gene and level."""
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    v_row_ptr = vector_ptr + spots.to(tl.int64)[:, None] * v_stride_spot
    t_row_ptr = table_ptr + gene.to(tl.int64)[:, None] * t_stride_gene + level[:, None] * t_stride_level
    for start in range(0, width, BK):
        dim = start + tl.arange(0, BK)
        v = tl.load(
            v_row_ptr + dim[None, :] * v_stride_dim, mask=(spots[:, None] < n_spots) & (dim[None, :] < width), other=0.0
        )
        inside = (gene[:, None] < n_genes) & (level[:, None] < n_levels) & (dim[None, :] < width)
        t = tl.load(t_row_ptr + dim[None, :] * t_stride_dim, mask=inside, other=0.0)
        if UPCAST:
            # The interpreter would multiply the bit patterns of bf16; a GPU never takes this branch.
            v = v.to(tl.float32)
            t = t.to(tl.float32)
        acc = tl.dot(v, tl.trans(t), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _adjusted(  # type: ignore[no-untyped-def]
    s,
    prior_ptr,
    scale_ptr,
    genes,
    n_genes,
    n_levels,
    PRIOR: tl.constexpr,
    BM: tl.constexpr,
    NG: tl.constexpr,
    QP: tl.constexpr,
):
    """Return scale * s + prior as (BM, NG, QP), -inf for levels that do not exist."""
    q = tl.arange(0, QP)
    s = tl.reshape(s, (BM, NG, QP)) * tl.load(scale_ptr)
    if PRIOR:
        offset = genes[:, None] * n_levels + q[None, :]
        prior = tl.load(prior_ptr + offset, mask=(genes[:, None] < n_genes) & (q[None, :] < n_levels), other=0.0)
        s += prior.to(tl.float32)[None, :, :]
    return tl.where((q < n_levels)[None, None, :], s, float("-inf"))


@triton.jit
def _weights(  # type: ignore[no-untyped-def]
    weight_ptr,
    levels_ptr,
    spots,
    genes,
    n_spots,
    n_genes,
    BM: tl.constexpr,
    NG: tl.constexpr,
    QP: tl.constexpr,
):
    """Return the weight of each (spot, gene) at its level and 0 at the others, fp32 (BM, NG * QP)."""
    inside = (spots[:, None] < n_spots) & (genes[None, :] < n_genes)
    offset = spots.to(tl.int64)[:, None] * n_genes + genes[None, :]
    selected = tl.load(levels_ptr + offset, mask=inside, other=0).to(tl.int32)
    hot = selected[:, :, None] == tl.arange(0, QP)[None, None, :]
    w = tl.load(weight_ptr + offset, mask=inside, other=0).to(tl.float32)
    return tl.reshape(tl.where(hot, w[:, :, None], 0.0), (BM, NG * QP))


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_UNALIGNED)
def sampled_dot(  # type: ignore[no-untyped-def]
    vector_ptr,
    table_ptr,
    weight_ptr,
    levels_ptr,
    prior_ptr,
    scale_ptr,
    out_ptr,
    n_spots,
    n_genes,
    n_levels,
    width,
    v_stride_spot,
    v_stride_dim,
    t_stride_gene,
    t_stride_level,
    t_stride_dim,
    n_spot_tiles,
    MODE: tl.constexpr,
    PRIOR: tl.constexpr,
    BM: tl.constexpr,
    NG: tl.constexpr,
    QP: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store <vector_b, table[g, level]> (n_spots, n_genes); with CROSS_ENTROPY the sum of weight * loss of each tile."""
    pid = tl.program_id(0)
    # Neighbouring programs share their genes, so the table is read from memory once; the vectors of all spots are far smaller.
    tile_m, tile_n = pid % n_spot_tiles, pid // n_spot_tiles
    spots, genes = tile_m * BM + tl.arange(0, BM), tile_n * NG + tl.arange(0, NG)
    column = tl.arange(0, NG * QP)
    s = _scores(
        vector_ptr,
        table_ptr,
        spots,
        tile_n * NG + column // QP,
        column % QP,
        n_spots,
        n_genes,
        n_levels,
        width,
        v_stride_spot,
        v_stride_dim,
        t_stride_gene,
        t_stride_level,
        t_stride_dim,
        BM,
        NG * QP,
        BK,
        UPCAST,
        PRECISION,
    )
    inside = (spots[:, None] < n_spots) & (genes[None, :] < n_genes)
    offset = spots.to(tl.int64)[:, None] * n_genes + genes[None, :]
    selected = tl.load(levels_ptr + offset, mask=inside, other=0).to(tl.int32)
    hot = selected[:, :, None] == tl.arange(0, QP)[None, None, :]
    if MODE == 0:
        own = tl.sum(tl.where(hot, tl.reshape(s, (BM, NG, QP)), 0.0), axis=2)
        tl.store(out_ptr + offset, own, mask=inside)
    else:
        s3 = _adjusted(s, prior_ptr, scale_ptr, genes, n_genes, n_levels, PRIOR, BM, NG, QP)
        top = tl.max(s3, axis=2)
        lse = top + tl.log2(tl.sum(tl.exp2((s3 - top[:, :, None]) * LOG2E), axis=2)) / LOG2E
        own = tl.sum(tl.where(hot, s3, 0.0), axis=2)
        w = tl.load(weight_ptr + offset, mask=inside, other=0).to(tl.float32)
        loss = tl.where(w != 0, (lse - own) * w, 0.0)
        tl.store(out_ptr + pid, tl.sum(tl.sum(loss, axis=1), axis=0))


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_UNALIGNED)
def weighted_sum(  # type: ignore[no-untyped-def]
    table_ptr,
    weight_ptr,
    levels_ptr,
    out_ptr,
    n_spots,
    n_genes,
    n_levels,
    width,
    t_stride_gene,
    t_stride_level,
    t_stride_dim,
    part_genes,
    BM: tl.constexpr,
    NG: tl.constexpr,
    QP: tl.constexpr,
    BD: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store sum_gq weight[b, g, q] table[g, q] over each part of ``part_genes`` genes, fp32 (parts, n_spots, width).

    A program has one block of spots, one slice of BD columns and one part of the genes.
    """
    spots = tl.program_id(0) * BM + tl.arange(0, BM)
    dim = tl.program_id(1) * BD + tl.arange(0, BD)
    column = tl.arange(0, NG * QP)
    acc = tl.zeros((BM, BD), dtype=tl.float32)
    first = tl.program_id(2) * part_genes
    end = tl.minimum(first + part_genes, n_genes)
    for start in range(first, end, NG):
        genes, gene, level = start + tl.arange(0, NG), start + column // QP, column % QP
        w = _weights(weight_ptr, levels_ptr, spots, genes, n_spots, n_genes, BM, NG, QP).to(table_ptr.dtype.element_ty)
        inside = (gene[:, None] < n_genes) & (level[:, None] < n_levels) & (dim[None, :] < width)
        row_ptr = table_ptr + gene.to(tl.int64)[:, None] * t_stride_gene + level[:, None] * t_stride_level
        t = tl.load(row_ptr + dim[None, :] * t_stride_dim, mask=inside, other=0.0)
        if UPCAST:
            w = w.to(tl.float32)
            t = t.to(tl.float32)
        acc = tl.dot(w, t, acc, input_precision=PRECISION)
    out_ptr += tl.program_id(2).to(tl.int64) * n_spots * width
    offset = spots.to(tl.int64)[:, None] * width + dim[None, :]
    tl.store(out_ptr + offset, acc, mask=(spots[:, None] < n_spots) & (dim[None, :] < width))


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_UNALIGNED)
def weighted_sum_transpose(  # type: ignore[no-untyped-def]
    vector_ptr,
    weight_ptr,
    levels_ptr,
    out_ptr,
    n_spots,
    n_genes,
    n_levels,
    width,
    v_stride_spot,
    v_stride_dim,
    BM: tl.constexpr,
    NG: tl.constexpr,
    QP: tl.constexpr,
    BD: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store sum_b weight[b, g, q] vector[b], fp32 (n_genes, n_levels, width): NG genes and one slice of BD per program."""
    first = tl.program_id(0) * NG
    dim = tl.program_id(1) * BD + tl.arange(0, BD)
    column = tl.arange(0, NG * QP)
    genes, gene, level = first + tl.arange(0, NG), first + column // QP, column % QP
    acc = tl.zeros((NG * QP, BD), dtype=tl.float32)
    for start in range(0, n_spots, BM):
        spots = start + tl.arange(0, BM)
        w = _weights(weight_ptr, levels_ptr, spots, genes, n_spots, n_genes, BM, NG, QP).to(vector_ptr.dtype.element_ty)
        v = tl.load(
            vector_ptr + spots.to(tl.int64)[:, None] * v_stride_spot + dim[None, :] * v_stride_dim,
            mask=(spots[:, None] < n_spots) & (dim[None, :] < width),
            other=0.0,
        )
        if UPCAST:
            w = w.to(tl.float32)
            v = v.to(tl.float32)
        acc = tl.dot(tl.trans(w), v, acc, input_precision=PRECISION)
    row = gene.to(tl.int64) * n_levels + level
    exists = (gene < n_genes) & (level < n_levels)
    tl.store(out_ptr + row[:, None] * width + dim[None, :], acc, mask=exists[:, None] & (dim[None, :] < width))


@triton.jit(do_not_specialize=[*_SIZES, "first"], do_not_specialize_on_alignment=_UNALIGNED)
def level_gradient(  # type: ignore[no-untyped-def]
    vector_ptr,
    table_ptr,
    weight_ptr,
    levels_ptr,
    prior_ptr,
    scale_ptr,
    factor_ptr,
    out_ptr,
    sums_ptr,
    n_spots,
    n_genes,
    n_levels,
    width,
    v_stride_spot,
    v_stride_dim,
    t_stride_gene,
    t_stride_level,
    t_stride_dim,
    first,
    n_spot_tiles,
    out_stride_spot,
    panel_genes,
    PRIOR: tl.constexpr,
    BM: tl.constexpr,
    NG: tl.constexpr,
    QP: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store (softmax - target) * weight * factor of one tile: spots by genes ``first`` to ``n_genes``, with their levels.

    In the dtype of the vectors. With PRIOR also the sums over the tile's spots, fp32 (n_spot_tiles, panel_genes * n_levels).
    """
    pid = tl.program_id(0)
    # Neighbouring programs share their genes, so the table is read from memory once; the vectors of all spots are far smaller.
    tile_m, tile_n = pid % n_spot_tiles, pid // n_spot_tiles
    spots, local = tile_m * BM + tl.arange(0, BM), tile_n * NG + tl.arange(0, NG)
    genes, column = first + local, tl.arange(0, NG * QP)
    gene, level = first + tile_n * NG + column // QP, column % QP
    s = _scores(
        vector_ptr,
        table_ptr,
        spots,
        gene,
        level,
        n_spots,
        n_genes,
        n_levels,
        width,
        v_stride_spot,
        v_stride_dim,
        t_stride_gene,
        t_stride_level,
        t_stride_dim,
        BM,
        NG * QP,
        BK,
        UPCAST,
        PRECISION,
    )
    inside = (spots[:, None] < n_spots) & (genes[None, :] < n_genes)
    offset = spots.to(tl.int64)[:, None] * panel_genes + genes[None, :]
    selected = tl.load(levels_ptr + offset, mask=inside, other=0).to(tl.int32)
    hot = selected[:, :, None] == tl.arange(0, QP)[None, None, :]
    w = tl.load(weight_ptr + offset, mask=inside, other=0).to(tl.float32) * tl.load(factor_ptr)
    s3 = _adjusted(s, prior_ptr, scale_ptr, genes, n_genes, n_levels, PRIOR, BM, NG, QP)
    e = tl.exp2((s3 - tl.max(s3, axis=2)[:, :, None]) * LOG2E)
    p = e / tl.sum(e, axis=2)[:, :, None]
    out = (p - tl.where(hot, 1.0, 0.0)) * w[:, :, None]
    out = tl.reshape(out, (BM, NG * QP))
    exists = (gene < n_genes) & (level < n_levels)
    index = (gene - first) * n_levels + level
    tl.store(
        out_ptr + spots.to(tl.int64)[:, None] * out_stride_spot + index[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=(spots[:, None] < n_spots) & exists[None, :],
    )
    if PRIOR:
        row_ptr = sums_ptr + tile_m.to(tl.int64) * panel_genes * n_levels
        tl.store(row_ptr + gene * n_levels + level, tl.sum(out, axis=0), mask=exists)


SAMPLED_DOT, LEVEL_LOSS, LEVEL_GRADIENT = tiles.SAMPLED_DOT, tiles.LEVEL_LOSS, tiles.LEVEL_GRADIENT
WEIGHTED_SUM, WEIGHTED_SUM_TRANSPOSE = tiles.WEIGHTED_SUM, tiles.WEIGHTED_SUM_TRANSPOSE


def spills(configs: dict[str, dict[str, Any]], padded_levels: int, columns: int) -> bool:
    """Return whether a tile in bf16 with all its spots spills on sm_80 or sm_90 for this number of levels.

    Parameters
    ----------
    configs
        One of the tables above.
    padded_levels
        QP, the next power of 2 of the number of levels.
    columns
        BN of the configuration.
    """
    if configs is WEIGHTED_SUM:
        return padded_levels >= columns
    if configs is WEIGHTED_SUM_TRANSPOSE:
        return padded_levels > columns
    if configs is LEVEL_GRADIENT:
        return padded_levels < 8
    return configs is SAMPLED_DOT and padded_levels < 4
