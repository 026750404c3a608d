"""The encoders of a training step as lists of costs, and all parts of the step; docs/scaling.md has the formulas."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from comtip_kernels import flops
from comtip_kernels.ledger import sizes
from comtip_kernels.one_query_attention import LONGEST, MOST_HEADS
from comtip_kernels.packed_attention import LONGEST as SENTENCE_TOKENS

from comtip_fast.plan import fused
from comtip_fast.plan.cost import (
    INDEX,
    STATISTIC,
    BlockKind,
    Cost,
    Precision,
    attention,
    block,
    cast,
    checkpointed,
    forward_only,
    linear,
    mlp,
    norm,
    pointwise,
    residual,
    total,
)
from comtip_fast.plan.loss_parts import infonce, level, pair, pooling
from comtip_fast.plan.rank_share import RankShare, StepPart, on_l2
from comtip_fast.plan.sizes import Sizes


def step_parts(s: Sizes, w: RankShare) -> list[StepPart]:
    """Return all parts of the forward and backward pass of a rank."""
    n = w.micro_batches
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
            StepPart("vision, full, first pass", forward_only(full), n),
            StepPart("table, first pass", forward_only(table)),
        ]
    losses = []
    if s.has_nce:
        losses += [StepPart("pooling", pooling(s, w, w.columns)), StepPart("InfoNCE", infonce(s, w))]
    if s.has_level:
        losses.append(StepPart("L_level", level(s, w)))
    if s.mispairs:
        losses.append(StepPart("L_pair and adversary", pair(s, w)))
    if n == 1:
        return [*parts, *losses]
    return [*(replace(p, phase="pieces") for p in parts), *(replace(p, phase="losses") for p in losses)]


def vision(s: Sizes, w: RankShare, patches: int, *, masked: bool) -> list[Cost]:
    """Return the costs of the image encoder on ``patches`` patches per tile of a micro-batch."""
    p, b, d = w.precision, w.micro_batch_spots, s.d
    n = b * (patches + s.prefix)
    one_pass = masked and in_one_pass(s, w)
    if one_pass:
        # Rows of the visible patches are selected among those of all patches, which are embedded once.
        start = [pointwise(n, d, p.stream, keep=0, name="visible rows"), Cost("row indices", saved=n * INDEX)]
    else:
        # The full branch reads the features of the batch; the masked branch copies the visible ones.
        copied = masked or p.operand != 4
        start = [
            *([] if s.has_stem or masked else [patches_of(b * patches * s.patch_inputs, p)]),
            linear(b * patches, s.patch_inputs, d, p, input_grad=False, keep=copied),
            pointwise(n, d, p.stream, reads=2, keep=0, name="positions"),
            Cost("patch indices", saved=2 * b * patches * INDEX if masked else 0),
        ]
    if w.fused and s.can_fuse:
        blocks = fused.ImageBlocks(depth=s.depth, d=d, hidden=s.mlp, heads=s.heads)
        packed_images = fused.packs_images(p, (s.P if in_one_pass(s, w) else patches) + s.prefix)
        options = {"packed": packed_images, "weights": not one_pass, "checkpointing": w.checkpointing}
        every = blocks.costs(b, patches + s.prefix, p, **options)
        costs = [*start, *every, norm(n, d, p)]
        return costs if s.vision_trained else forward_only(costs)
    # Rows of the visible patches are multiplied together with those of all patches.
    kind = BlockKind(compiled=w.compiled, parts=in_one_pass(s, w), weights=not one_pass)
    vit_block = block(n, patches + s.prefix, d, s.mlp, s.heads, p, kind)
    if s.layer_scale:
        vit_block += 2 * [pointwise(n, d, p.operand, name="layer scale")]
    if w.checkpointing:
        vit_block = checkpointed(vit_block, n * d * p.stream, "block input")
    costs = [*start, *(vit_block * s.depth), norm(n, d, p)]
    return costs if s.vision_trained else forward_only(costs)


def patches_of(values: float, p: Precision) -> Cost:
    """Return the cost of normalising the pixels of a batch, cutting them into patches, and casting them.

    Bytes become fp32, which is divided by 255, centred, scaled and rearranged.
    """
    return Cost("patches", moved=values * (1 + 9 * 4 + (p.stream + p.operand if p.casts else 0)))


def in_one_pass(s: Sizes, w: RankShare) -> bool:
    """Return whether all patches and the visible ones pass through the image encoder's blocks together."""
    return s.has_mfm and s.one_pass and not w.checkpointing


def largest_block(s: Sizes, w: RankShare) -> float:
    """Return the bytes that one block stores while activation checkpointing recomputes it in the backward pass.

    The result is that of an image block or of a text block, whichever is larger.
    """
    image = block(w.micro_batch_spots * (s.P + s.prefix), s.P + s.prefix, s.d, s.mlp, s.heads, w.precision)
    text = block(w.table_rows * s.tokens, s.attended, s.width, 4 * s.width, s.text_heads, w.precision)
    return max(total(image, "saved"), total(text, "saved"))


def image_head(s: Sizes, w: RankShare) -> list[Cost]:
    """Return the costs of pooling over patches, projection and normalisation."""
    n = w.micro_batch_spots * s.P
    return [
        Cost("mean", moved=n * s.d * w.precision.stream, back_moved=n * s.d * w.precision.stream),
        *projection(w.micro_batch_spots, s.d, s.D, w.precision),
        *unit(w.micro_batch_spots, s.D, w.precision),
    ]


def projection(n: float, width: int, D: int, p: Precision) -> list[Cost]:
    """Return the costs of the projection head; its skip layer and norm share one stored input if the input needs no cast."""
    return [
        linear(n, width, D, p, keep=p.operand != p.stream),
        norm(n, width, p),
        linear(n, width, 2 * D, p),
        pointwise(n, 2 * D, p.operand, name="gelu"),
        linear(n, 2 * D, D, p),
        pointwise(n, D, p.operand, reads=2, keep=0, name="add"),
    ]


def unit(n: float, D: int, p: Precision, *, read: bool = True) -> list[Cost]:
    """Return the costs of normalisation to unit length, which stores the input and the lengths for the backward pass.

    If the vectors are ``read`` by a loss of the same graph, it stores them, too.
    """
    return [
        pointwise(n, D, p.operand, name="normalise"),
        Cost("unit vectors", saved=n * D * p.stream * read + 2 * n * STATISTIC),
    ]


def generator(s: Sizes, w: RankShare) -> list[Cost]:
    """Return the costs of the mask feature generator and L_mfm: K queries per tile attend to V visible patches."""
    p, d = w.precision, s.d
    nK, nV = w.micro_batch_spots * s.hidden_patches, w.micro_batch_spots * s.V
    cross = attention(nK, s.V, d, s.generator_heads, p)
    # There are V keys and values, and K queries.
    keys = (nV - nK) * 2 * d * p.operand
    cross = Cost(cross.name, cross.flops, cross.back_flops, cross.moved, cross.back_moved, cross.saved + keys)
    return [
        pointwise(nK, d, p.stream, reads=2, keep=0, name="queries"),
        norm(nK, d, p),
        cast(nK, d, p),
        norm(nV, d, p),
        cast(nV, d, p),
        linear(nK, d, d, p),
        linear(nV, d, 2 * d, p),
        cross,
        linear(nK, d, d, p),
        *residual(nK, d, p),
        *mlp(nK, d, 4 * d, p),
        linear(nK, d, d, p),
        pointwise(nK, d, 4, reads=2, keep=2, name="L_mfm"),
        Cost("patch indices", saved=nK * INDEX),
    ]


TABLE_REST = (315, 94)
"""Bytes per row and column of the encoded sentences, and of the whole table, that no other cost has; see :data:`.loss_parts.DRAWS`."""


def sentence_table(s: Sizes, w: RankShare) -> list[Cost]:
    """Return the costs of encoding and projecting ``w.table_rows`` sentences, and of normalisation and pair head on all rows."""
    p, d, N, rows = w.precision, s.width, w.table_rows, s.G * s.Q
    n = N * s.tokens
    keep_cast = p.operand != p.stream
    embed = Cost("embed", moved=n * d * p.stream, back_moved=n * d * p.stream, saved=n * 4)
    # The rest of what the rehearsal counts: the last block's and the head's casts, gradients of equal tokens, sums of gradients.
    rest = Cost("rest of the table", moved=TABLE_REST[0] * N * d + TABLE_REST[1] * rows * s.D)
    # Losses over several micro-batches read the table in a graph of their own, before the encoders' graph.
    own_graph = w.micro_batches > 1
    head = [
        rest,
        norm(N, d, p),
        *projection(N, d, s.D, p),
        linear(N, d, 1, p, keep=False),
        *unit(rows, s.D, p, read=not own_graph),
        linear(rows, s.D, s.D, p, keep=keep_cast),
        pointwise(rows, s.D, p.operand, keep=2 if s.has_pair and not own_graph else 1, name="pair scale"),
        *([Cost("gradients of the table", saved=table_bytes(s, p))] if own_graph else []),
    ]
    return [embed, *sentence_blocks(s, w), *head]


def table_bytes(s: Sizes, p: Precision) -> float:
    """Return the bytes of what losses read of the sentence table: rows, unit vectors, pair vectors and pooling scores."""
    return s.G * s.Q * (s.D * (2 * p.operand + p.stream) + p.operand)


def sentence_blocks(s: Sizes, w: RankShare) -> list[Cost]:
    """Return the costs of the blocks of the sentence encoder."""
    p, d, N = w.precision, s.width, w.table_rows
    n = N * s.tokens
    attend, by_length = text_attention(s, w), results_by_length(s, w)
    kind = BlockKind(compiled=w.compiled and not w.fused, stacks=not packed(s, w))
    bias = not adds_bias(s, w)

    def block_of(*, branch: bool = False, projects: bool = True) -> list[Cost]:
        if not w.fused:
            layer = block(n, s.attended, d, 4 * d, s.text_heads, p, replace(kind, projects=projects))
            return [by_length, *(attend if c.name == attend.name else c for c in layer)]
        projection = [*fused.start(n, d, p, branch=branch), linear(n, d, 3 * d, p, bias=bias)]
        stack = [Cost("stack gradients", back_moved=6 * n * d * p.operand)] if kind.stacks else []
        return [*(projection if projects else []), attend, *stack, *fused.after_attention(n, d, 4 * d, p)]

    # With activation checkpointing, a branch is added before the next block.
    branch = w.fused and not w.checkpointing
    single = [
        *fused.start(n, d, p, branch=branch and s.text_depth > 1, used_again=False),
        linear(n, d, 3 * d, p, bias=bias),
    ]
    once = first_qkv(s, w, bias=bias) if s.equal_tokens else single
    first = [*once, *block_of(projects=False)] if s.equal_tokens else block_of()
    after = [linear(N, d, d, p), *residual(N, d, p), *mlp(N, d, 4 * d, p)]
    last = [
        *(one_query(s, w) if has_one_query(s) else every_query(s, w, once if s.text_depth == 1 else single)),
        *(fused.after_attention(N, d, 4 * d, p) if w.fused else after),
        Cost("first tokens", saved=N * INDEX),
    ]
    blocks = [first, *([block_of(branch=branch)] * (s.text_depth - 2)), last] if s.text_depth > 1 else [last]
    if w.checkpointing:
        stream = d * p.stream
        stored = [distinct_tokens(s, w) if s.equal_tokens else n, *([n] * (s.text_depth - 1))]
        blocks = [checkpointed(b, tokens * stream, "block input") for b, tokens in zip(blocks, stored, strict=True)]
    added = fused.whole(N, d, p) if w.fused else []
    if w.fused and w.checkpointing:
        added += (s.text_depth - 1) * fused.whole(n, d, p)
    return [*(cost for b in blocks for cost in b), *added]


def adds_bias(s: Sizes, w: RankShare) -> bool:
    """Return whether attention within sentences adds the bias of q, k and v, and sums its gradient."""
    return w.fused and packed(s, w) and s.text_attention in ("auto", "triton")


def results_by_length(s: Sizes, w: RankShare) -> Cost:
    """Return the bytes that attention stores per sentence length on a CPU, in addition to the concatenated result."""
    tokens = 0 if w.gpu else w.table_rows * s.tokens
    return Cost("by length", saved=tokens * s.width * w.precision.operand)


def every_query(s: Sizes, w: RankShare, projection: list[Cost]) -> list[Cost]:
    """Return the costs of the last block's attention for all tokens after ``projection``, and of selecting the first tokens."""
    p, d, N = w.precision, s.width, w.table_rows
    n = N * s.tokens
    return [
        *projection,
        text_attention(s, w),
        *([] if packed(s, w) else [Cost("stack gradients", back_moved=6 * n * d * p.operand)]),
        results_by_length(s, w),
        first_rows(n, N, d, p.stream + p.operand, p),
    ]


def has_one_query(s: Sizes) -> bool:
    """Return whether attention in the last block has one query per sentence (``SentenceBlock.one_query``)."""
    return s.text_attention in ("auto", "triton") and s.longest <= LONGEST and s.text_heads <= MOST_HEADS


def one_query(s: Sizes, w: RankShare) -> list[Cost]:
    """Return the costs of the last block's attention with one query per sentence and head.

    The norm of all tokens is both keys and values; queries and results have the stream's width per head.
    """
    p, d, N, H = w.precision, s.width, w.table_rows, s.text_heads
    n, E = N * s.tokens, d // H
    issued = flops.one_query_attention(N, H, d, s.longest) if w.gpu else flops.Flops(4 * n * H * d, 8 * n * H * d)
    vectors = N * H * d
    moved = (n * d + 2 * vectors) * p.operand
    attend = Cost(
        "one query", *issued, moved, 2 * n * d * p.operand + 3 * vectors * p.operand, (n * d + vectors) * p.operand
    )
    if w.gpu:
        attend = on_l2(attend, w, sizes.one_query_attention(ceil(N), ceil(n), H, d, s.longest, ""))
    per_head = linear(N * H, E, d, p, bias=False, weights=False)
    branch = w.fused and not w.checkpointing and s.text_depth > 1
    return [
        *fused.start(n, d, p, branch=branch, used_again=False),
        first_rows(n, N, d, p.stream, p),
        norm(N, d, p),
        linear(N, d, d, p),
        per_head,
        attend,
        linear(N * H, d, E, p, weights=False),
    ]


def distinct_tokens(s: Sizes, w: RankShare) -> float:
    """Return an upper bound of the distinct tokens of a rank's sentences: per gene, per token of a name, and per level and slot."""
    return min(w.table_rows * s.tokens, w.table_rows / s.Q * (s.tokens - 1) + s.Q * s.longest)


def first_qkv(s: Sizes, w: RankShare, *, bias: bool = True) -> list[Cost]:
    """Return the costs of q, k and v of the distinct tokens in the first block, and of copying them to all tokens."""
    d, p, U = s.width, w.precision, distinct_tokens(s, w)
    copied = (w.table_rows * s.tokens + U) * 3 * d * p.operand
    return [
        norm(U, d, p),
        cast(U, d, p),
        linear(U, d, 3 * d, p, bias=bias),
        Cost("copy q, k, v", moved=copied, back_moved=copied),
    ]


def first_rows(n: float, N: float, d: int, size: int, p: Precision) -> Cost:
    """Return the cost of selecting the N first tokens of n in tensors with ``size`` bytes per element in all, the stream among them.

    The gradients are scattered into zeros, and that of the stream is added to that of the norm over all tokens.
    """
    return Cost("first rows", moved=(n + N) * d * size, back_moved=3 * n * d * size + 3 * (n - N) * d * p.stream)


def packed(s: Sizes, w: RankShare) -> bool:
    """Return whether sentences are short enough for this package's kernel of attention on a GPU.

    If ``text.attention`` names another one, its costs are assumed to be the same.
    """
    limit = SENTENCE_TOKENS["bf16" if w.precision.is_bf16 else "tf32x3"]
    return w.gpu and s.longest <= limit


def text_attention(s: Sizes, w: RankShare) -> Cost:
    """Return the cost of attention within sentences; on a GPU, the packed kernel also multiplies what its mask removes."""
    n = w.table_rows * s.tokens
    cost = attention(n, s.attended, s.width, s.text_heads, w.precision)
    if not packed(s, w):
        return cost
    E = s.width // s.text_heads
    issued = flops.packed_attention(n, s.text_heads, E, s.longest)
    # The backward pass reads q, k, v and the gradient, and stores three gradients.
    moved = 7 * n * s.width * w.precision.operand
    cost = replace(cost, flops=issued.forward, back_flops=issued.backward, back_moved=moved)
    cost = on_l2(cost, w, sizes.packed_attention(ceil(n), s.text_heads, E, s.longest, 0, ""))
    window = flops.attention_tile(s.longest) - s.longest + 1
    return fused.bias_sums(cost, ceil(n / window), s.width) if adds_bias(s, w) else cost
