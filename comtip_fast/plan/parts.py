"""A step, part by part, as lists of costs; docs/scaling.md has the same in symbols."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from comtip_kernels.infonce.cpu import KEPT_BYTES

from comtip_fast.plan.cost import (
    INDEX,
    STATISTIC,
    Cost,
    Precision,
    attention,
    block,
    checkpointed,
    forward_only,
    linear,
    mlp,
    norm,
    pointwise,
    total,
)
from comtip_fast.plan.sizes import Sizes

SPREAD_WIDTH = 256
"""Width of the output that one program of L_level's GPU backward makes; it makes the scores again for each."""


@dataclass(frozen=True)
class StepPart:
    """One part of a step on one rank."""

    name: str
    costs: Sequence[Cost]
    times: int = 1
    """How often it runs in a step."""

    def sum(self, field: str) -> float:
        """Return FLOPs or bytes moved in a step."""
        return self.times * total(self.costs, field)

    @property
    def kept(self) -> float:
        """Bytes kept for the backward pass, each time anew."""
        return total(self.costs, "saved")


@dataclass(frozen=True, kw_only=True)
class Work:
    """One rank's share of a step, and how it is computed."""

    spots: int
    """b, its spots."""
    pieces: int = 1
    """Micro-batches: spots are embedded in so many pieces, twice, and meet in the losses."""
    images: int
    """Rows of the logits that its text columns are compared with."""
    columns: int
    """Its own text columns, mispaired ones included."""
    table_rows: int
    """Sentences it encodes: N, or its share of a sharded table."""
    precision: Precision
    gpu: bool
    checkpointing: bool = False

    @property
    def piece(self) -> int:
        """Spots that are embedded at once."""
        return ceil(self.spots / self.pieces)


def step_parts(s: Sizes, w: Work) -> list[StepPart]:
    """Return every part of one forward and backward pass over ``w``."""
    n = w.pieces
    full, table = vision(s, w, s.P, masked=False) + image_head(s, w), sentence_table(s, w)
    parts = [StepPart("vision, full", full, n)]
    if s.has_mfm:
        parts += [
            StepPart("vision, masked", vision(s, w, s.V, masked=True), n),
            StepPart("mask generator", generator(s, w), n),
        ]
        if s.has_teacher:
            parts.append(StepPart("teacher", forward_only(vision(s, w, s.P, masked=False)), n))
    parts.append(StepPart("sentence table", table))
    if n > 1:
        parts += [
            StepPart("vision, full, first look", forward_only(full), n),
            StepPart("table, first look", forward_only(table)),
        ]
    if s.has_nce:
        parts += [StepPart("pooling", pooling(s, w, w.columns)), StepPart("InfoNCE", infonce(s, w))]
    if s.has_level:
        parts.append(StepPart("L_level", level(s, w)))
    if s.mispairs:
        parts.append(StepPart("L_pair and adversary", pair(s, w)))
    return parts


def vision(s: Sizes, w: Work, patches: int, *, masked: bool) -> list[Cost]:
    """E over ``patches`` of each tile of a piece: embed, add positions, blocks, norm."""
    p, b, d = w.precision, w.piece, s.d
    n = b * (patches + s.prefix)
    # The full branch reads the batch's own features; the masked branch reads a copy of the visible ones.
    copied = masked or p.operand != 4
    costs = [
        linear(b * patches, s.patch_inputs, d, p, input_grad=False, keep=copied),
        pointwise(n, d, p.stream, reads=2, keep=0, name="positions"),
    ]
    one = block(n, patches + s.prefix, d, s.mlp, s.heads, p)
    if s.layer_scale:
        one += 2 * [pointwise(n, d, p.operand, name="layer scale")]
    if w.checkpointing:
        one = checkpointed(one, n * d * p.stream, "block input")
    costs += one * s.depth
    index = 2 * b * patches * INDEX if masked else 0
    return [*costs, norm(n, d, p), Cost("patch numbers", saved=index)]


def largest_block(s: Sizes, w: Work) -> float:
    """Return the bytes that the block which keeps most keeps: there for a moment when blocks are computed again."""
    image = block(w.piece * (s.P + s.prefix), s.P + s.prefix, s.d, s.mlp, s.heads, w.precision)
    text = block(w.table_rows * s.tokens, s.reach, s.width, 4 * s.width, s.text_heads, w.precision)
    return max(total(image, "saved"), total(text, "saved"))


def image_head(s: Sizes, w: Work) -> list[Cost]:
    """Mean over patches, projection, length 1."""
    n = w.piece * s.P
    return [
        Cost("mean", moved=n * s.d * w.precision.stream, back_moved=n * s.d * w.precision.stream),
        *projection(w.piece, s.d, s.D, w.precision),
        *unit(w.piece, s.D, w.precision),
    ]


def projection(n: float, width: int, D: int, p: Precision) -> list[Cost]:
    """Two-layer head with a skip; skip and norm keep one input between them where it needs no cast."""
    return [
        linear(n, width, D, p, keep=p.operand != p.stream),
        norm(n, width, p),
        linear(n, width, 2 * D, p),
        pointwise(n, 2 * D, p.operand, name="gelu"),
        linear(n, 2 * D, D, p),
        pointwise(n, D, p.operand, reads=2, keep=0, name="add"),
    ]


def unit(n: float, D: int, p: Precision) -> list[Cost]:
    """Vectors to length 1: keeps what went in, what came out, and the lengths."""
    return [
        pointwise(n, D, p.operand, name="normalise"),
        Cost("unit vectors", saved=n * D * p.stream + 2 * n * STATISTIC),
    ]


def generator(s: Sizes, w: Work) -> list[Cost]:
    """Mask feature generator and its loss: K queries per tile attend to V visible patches."""
    p, d = w.precision, s.d
    nK, nV = w.piece * s.hidden_patches, w.piece * s.V
    cross = attention(nK, s.V, d, s.generator_heads, p)
    # Keys and values are V long, queries K long.
    keys = (nV - nK) * 2 * d * p.operand
    cross = Cost(cross.name, cross.flops, cross.back_flops, cross.moved, cross.back_moved, cross.saved + keys)
    return [
        pointwise(nK, d, p.stream, reads=2, keep=0, name="queries"),
        norm(nK, d, p),
        norm(nV, d, p),
        linear(nK, d, d, p),
        linear(nV, d, 2 * d, p),
        cross,
        linear(nK, d, d, p),
        pointwise(nK, d, p.stream, reads=2, keep=0, name="add"),
        *mlp(nK, d, 4 * d, p),
        linear(nK, d, d, p),
        pointwise(nK, d, 4, reads=2, keep=2, name="L_mfm"),
        Cost("patch numbers", saved=nK * INDEX),
    ]


def sentence_table(s: Sizes, w: Work) -> list[Cost]:
    """Embed, encode, project and score ``w.table_rows`` sentences; bring all rows to length 1 and through the pair head's form."""
    p, d, N, rows = w.precision, s.width, w.table_rows, s.G * s.Q
    n, L, heads = N * s.tokens, s.reach, s.text_heads
    keep_cast = p.operand != p.stream
    # On a CPU attention runs length by length, and keeps each result beside all of them joined.
    by_length = Cost("by length", saved=0 if w.gpu else n * d * p.operand)
    one = [by_length, *block(n, L, d, 4 * d, heads, p)]
    if w.checkpointing:
        one = checkpointed(one, n * d * p.stream, "block input")
    last = [
        norm(n, d, p),
        linear(n, d, 3 * d, p),
        attention(n, L, d, heads, p),
        by_length,
        linear(N, d, d, p),
        pointwise(N, d, p.stream, reads=2, keep=0, name="add"),
        *mlp(N, d, 4 * d, p),
        Cost("first tokens", saved=N * INDEX),
    ]
    if w.checkpointing:
        last = checkpointed(last, n * d * p.stream, "block input")
    embed = Cost("embed", moved=n * d * p.stream, back_moved=n * d * p.stream, saved=n * 4)
    head = [
        norm(N, d, p),
        *projection(N, d, s.D, p),
        linear(N, d, 1, p, keep=False),
        *unit(rows, s.D, p),
        linear(rows, s.D, s.D, p, keep=keep_cast),
        pointwise(rows, s.D, p.operand, keep=2 if s.has_pair else 1, name="pair scale"),
    ]
    return [embed, *(one * (s.text_depth - 1)), *last, *head]


def _product(spots: float, s: Sizes) -> float:
    """FLOPs of spots against every row of the table."""
    return 2.0 * spots * s.G * s.Q * s.D


def pooling(s: Sizes, w: Work, spots: float) -> list[Cost]:
    """Weighted sums of rows: a one-hot product with the whole table on a GPU, a bag of rows on a CPU."""
    p, u = w.precision, _product(spots, s) if w.gpu else 0.0
    rows, each = s.G * s.Q * s.D * p.operand, spots * s.G
    kept = each * POOL_KEPT + spots * s.D * 4
    return [Cost("pool", u, 2 * u, rows + 13 * each + spots * s.D * 4, 3 * rows + 26 * each + spots * s.D * 4, kept)]


POOL_KEPT = 3 * INDEX + 2 * 4 + 1
"""Bytes kept per (spot, gene) by pooling: rows, offsets and bags as int64, scores and weights as fp32, the mask."""


def infonce(s: Sizes, w: Work) -> list[Cost]:
    """Own text columns against all images, one pass; backward makes the logits again, on a GPU once per side.

    One CPU process keeps the exponentials of its first tiles instead.
    """
    pairs = w.images * w.columns
    u = 2.0 * pairs * s.D
    vectors = (w.images + w.columns) * s.D * w.precision.operand
    alone = not w.gpu and w.images == w.spots
    kept = min(pairs, KEPT_BYTES // 4) if alone else 0
    back = 4 * u if w.gpu else (3 - kept / max(1, pairs)) * u
    return [Cost("logits", u, back, vectors, 3 * vectors, (w.images + w.columns) * STATISTIC + 4 * kept)]


def level(s: Sizes, w: Work) -> list[Cost]:
    """L_level: on a CPU the forward pass makes the gradients too and keeps them."""
    u, p = _product(w.spots, s), w.precision
    rows = s.G * s.Q * s.D
    moved = rows * p.operand + w.spots * (s.D * p.operand + s.G * (INDEX + 1))
    if w.gpu:
        slices = -(-s.D // SPREAD_WIDTH)
        return [Cost("scores", u, (2 + 2 * slices) * u, moved, 2 * moved + rows * 4, w.spots * s.G)]
    return [Cost("scores", 3 * u, 0.0, 3 * moved, 2 * rows * 4, (rows + w.spots * s.D) * 4)]


def pair(s: Sizes, w: Work) -> list[Cost]:
    """L_pair, and the adversary's look at each candidate; with the text as context also what takes a gene out of it."""
    u, p, each = _product(w.spots, s), w.precision, w.spots * s.G
    moved = s.G * s.Q * s.D * p.operand + w.spots * s.D * p.operand + each * (INDEX + 4)
    looks = s.candidates if s.candidates > 1 else 0
    costs = [Cost("adversary", looks * u, 0.0, looks * moved, 0.0)]
    if s.has_pair:
        costs.append(Cost("true and mispaired", 2 * u, 4 * u, 2 * moved, 4 * moved, each * PAIR_KEPT))
    if s.text_context:
        own, judged = 2.0 * s.G * s.Q**2 * s.D, 2 if s.has_pair else 0
        costs += [Cost("own gene", (looks + judged) * own, 2 * judged * own)]
        costs += forward_only(pooling(s, w, w.spots * looks)) + pooling(s, w, w.spots * judged)
    return costs


PAIR_KEPT = 3 * INDEX + 2 * 4 + 1
"""Bytes kept per (spot, gene) by L_pair: true and mispaired levels, two logits, the mask."""
