"""The losses of a training step as lists of costs; docs/scaling.md has the formulas."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from comtip_kernels import flops
from comtip_kernels.flops import KEPT_BYTES
from comtip_kernels.ledger import sizes
from comtip_kernels.ledger.sizes import Sized

from comtip_fast.plan.cost import INDEX, STATISTIC, Cost, forward_only
from comtip_fast.plan.rank_share import RankShare, on_l2
from comtip_fast.plan.sizes import Sizes

DRAWS = 6120
"""Bytes per (spot, gene) of drawing mispaired levels, of hashes of texts, and of the adversary's choice.

Fitted, with :data:`.parts.TABLE_REST`, :data:`GATHERED` and :data:`RING`, to the steps in ``bench/rehearsal.csv``; a test compares the sum of
all costs with each of them to 2 %.
"""
GATHERED = 34
"""Bytes per (spot, gene) of all ranks of taking mispaired levels from other ranks' spots."""
RING = 104
"""Bytes per value of all ranks' image vectors of passing blocks of them around (``engine.loss_form: ring``)."""


def table_kernels(s: Sizes, spots: float, operation: str) -> tuple[Sized, Sized]:
    """Return forward and backward pass of an operation over the sentence table, as the kernels' ledger counts them in bf16."""
    passes = sizes.sentence_table(max(1, ceil(spots)), s.G, s.Q, s.D, "")
    forward, backward = (one for one in passes if one.op == operation)
    return forward, backward


def pooling(s: Sizes, w: RankShare, spots: float) -> list[Cost]:
    """Return the costs of pooling: a one-hot matrix product with the table on a GPU, an embedding bag on a CPU."""
    rows, pairs = s.G * s.Q * s.D * w.precision.operand, spots * s.G
    saved = pairs * POOL_SAVED + spots * s.D * 4
    issued = flops.table_pool(spots, s.G, s.Q, s.D, gpu=w.gpu)
    pool = Cost("pool", *issued, rows + 13 * pairs + spots * s.D * 4, 3 * rows + 26 * pairs + spots * s.D * 4, saved)
    return [on_l2(pool, w, table_kernels(s, spots, "table_pool"))]


POOL_SAVED = 3 * INDEX + 2 * 4 + 1
"""Bytes that pooling stores for the backward pass per (spot, gene): rows, offsets and bags as int64, scores and weights as fp32, the mask."""


def infonce(s: Sizes, w: RankShare) -> list[Cost]:
    """Return the costs of InfoNCE between all images and the rank's text columns.

    The backward pass recomputes the logits. A GPU stores the derivatives of the logits and multiplies them with images and
    texts. A single CPU process stores the exponentials of its first tiles.
    """
    pairs = w.images * w.columns
    vectors = (w.images + w.columns) * s.D * w.precision.operand
    single_process = not w.gpu and w.images == w.spots
    saved = min(pairs, KEPT_BYTES // 4) if single_process else 0
    issued = flops.infonce(w.images, w.columns, s.D, gpu=w.gpu, blocks=not single_process)
    # Written once and read by two products.
    derivatives = 3 * pairs * w.precision.operand if w.gpu else 0
    kept = (w.images + w.columns) * STATISTIC + 4 * saved
    cost = Cost("logits", *issued, vectors, 3 * vectors + derivatives, kept)
    ring = [Cost("ring", moved=RING * w.images * s.D)] if w.ring else []
    return [on_l2(cost, w, sizes.infonce(w.images, w.columns, s.D, "")), *ring]


def level(s: Sizes, w: RankShare) -> list[Cost]:
    """Return the costs of L_level; on a CPU, the forward pass also computes and stores the gradients."""
    p, rows = w.precision, s.G * s.Q * s.D
    moved = rows * p.operand + w.spots * (s.D * p.operand + s.G * (INDEX + 1))
    issued = flops.level_cross_entropy(w.spots, s.G, s.Q, s.D, gpu=w.gpu)
    if w.gpu:
        # Derivatives are written once and read by two products.
        derivatives = 3 * w.spots * s.G * s.Q * p.operand
        cost = Cost("scores", *issued, moved, 2 * moved + rows * 4 + derivatives, w.spots * s.G)
        return [on_l2(cost, w, table_kernels(s, w.spots, "level_cross_entropy"))]
    return [Cost("scores", *issued, 3 * moved, 2 * rows * 4, (rows + w.spots * s.D) * 4)]


def pair(s: Sizes, w: RankShare) -> list[Cost]:
    """Return the costs of L_pair and of the adversary, which scores all candidates.

    If a text vector is the context, the scored gene is removed from the text.
    """
    p, pairs, issued = w.precision, w.spots * s.G, flops.pair_scores(w.spots, s.G, s.Q, s.D)
    moved = s.G * s.Q * s.D * p.operand + w.spots * s.D * p.operand + pairs * (INDEX + 4)
    scored = s.candidates if s.candidates > 1 else 0
    once = on_l2(Cost("adversary", *issued, moved, 2 * moved), w, table_kernels(s, w.spots, "pair_scores"))
    costs = [
        Cost("draws", moved=DRAWS * pairs + (GATHERED * s.B * s.G if s.other_spots and w.images > w.spots else 0)),
        *forward_only([once.repeated(scored)]),
    ]
    if s.has_pair:
        costs.append(replace(once.repeated(2), name="true and mispaired", saved=pairs * PAIR_SAVED))
    if s.text_context:
        own_gene, trained = 2.0 * s.G * s.Q**2 * s.D, 2 if s.has_pair else 0
        costs += [Cost("own gene", (scored + trained) * own_gene, 2 * trained * own_gene)]
        costs += forward_only(pooling(s, w, w.spots * scored)) + pooling(s, w, w.spots * trained)
    return costs


PAIR_SAVED = 3 * INDEX + 2 * 4 + 1
"""Bytes that L_pair stores for the backward pass per (spot, gene): true and mispaired levels as int64, two logits, the mask."""
