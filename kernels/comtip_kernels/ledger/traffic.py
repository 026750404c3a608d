"""What each kernel moves and multiplies, as formulas in its sizes and tiles; no Triton is needed to work them out.

``tests/kernels/interpreted/test_traffic.py`` runs every kernel small under the interpreter, counts, and demands equality; the
named sizes below extrapolate. ``loaded`` counts every request, which caches serve mostly; ``memory`` is what has to come from
or go to memory when caches hold the rest, and is what the floor is compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

Tiles = Mapping[str, Any]


@dataclass(frozen=True)
class Traffic:
    """Bytes and FLOPs of one launch, or of several one after another."""

    loaded: int
    distinct: int
    stored: int
    flops: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        """Return both, one after the other; the second finds nothing of the first in a cache."""
        return Traffic(
            self.loaded + other.loaded,
            self.distinct + other.distinct,
            self.stored + other.stored,
            self.flops + other.flops,
        )

    @property
    def memory(self) -> int:
        """Bytes that memory must serve."""
        return self.distinct + self.stored


def _padded(D: int, t: Tiles) -> int:
    return ceil(D / t["BK"]) * int(t["BK"])


BLOCK_IDS = 12
"""Bytes per row and column of a block of InfoNCE: class and silent flag."""


def infonce_forward(B: int, M: int, D: int, size: int, t: Tiles, ids: int = 0) -> Traffic:
    """Return the one pass over the logits; ``size`` is the bytes of an element, ``ids`` of what masks read of a row or column."""
    rows, cols = ceil(B / t["BM"]), ceil(M / t["BN"])
    return Traffic(
        loaded=(cols * B + rows * M) * (D * size + ids) + 4 * rows * cols,
        distinct=(B + M) * (D * size + ids) + 4,
        stored=4 * (cols * B + rows * M),
        flops=rows * cols * 2 * t["BM"] * t["BN"] * _padded(D, t),
    )


def infonce_side(n: int, m: int, D: int, size: int, t: Tiles, ids: int = 0, parts: int = 1) -> Traffic:
    """Return the gradient of one side's n vectors against the other's m, worked through in ``parts``."""
    rows, cols, slices = ceil(n / t["BM"]), ceil(m / t["BN"]), ceil(D / t["BD"])
    masked = (cols * n + rows * m) * (D * size + ids)
    return Traffic(
        loaded=slices * (parts * (12 * n + 4 * rows) + masked + rows * 12 * m) + rows * m * D * size,
        distinct=(n + m) * (D * size + ids + 12) + 4,
        stored=4 * n * D * parts,
        flops=rows * cols * slices * 2 * t["BM"] * t["BN"] * (_padded(D, t) + t["BD"]),
    )


def sentence_rows(gene: int, name: int, value: int, D: int, size: int, tables: int) -> Traffic:
    """Return the making of different rows, with LayerNorm and identities known; ``tables`` is their bytes."""
    U = gene + name + value
    loaded = U * (24 + 8 + 5 * D * size) + gene * D * size
    return Traffic(loaded=loaded, distinct=tables + U * 32, stored=U * D * size)


def copy_rows(S: int, U: int, D: int, size: int) -> Traffic:
    """Return the copying out of S tokens."""
    return Traffic(loaded=S * (4 + D * size), distinct=S * 4 + U * D * size, stored=S * D * size)


def sum_tokens(S: int, U: int, D: int, size: int) -> Traffic:
    """Return the sums over equal tokens where one round is enough."""
    return Traffic(loaded=S * (4 + D * size) + 12 * U, distinct=S * (4 + D * size) + 8 * U + 4, stored=4 * U * D)


def norm_grads(gene: int, name: int, value: int, D: int, size: int, rows: int, tables: int) -> Traffic:
    """Return the way of the summed gradients through LayerNorm; ``rows`` per program."""
    U = gene + name + value
    programs = ceil(U / rows)
    loaded = U * (24 + 8 + 3 * D * size + 4 * D) + gene * D * size + programs * D * size
    return Traffic(loaded=loaded, distinct=tables + U * (32 + 4 * D), stored=4 * D * (U + 2 * programs))


def attention(S: int, H: int, E: int, size: int, longest: int, tile: int, *, backward: bool) -> Traffic:
    """Return packed attention over S tokens."""
    W = tile - longest + 1
    tiles = ceil(S / W)
    width = max(16, 1 << (E - 1).bit_length())
    reads, writes, products = (4, 3, 5) if backward else (3, 1, 2)
    again = 3 if backward and size == 4 else 0  # q, k and dO, from a cache
    return Traffic(
        loaded=(reads + again) * S * H * E * size + 4 * _looked_at(S, W, tile, tiles) * H,
        distinct=reads * S * H * E * size + 4 * S,
        stored=writes * S * H * E * size,
        flops=products * tiles * H * 2 * tile * tile * width,
    )


def _looked_at(S: int, W: int, tile: int, tiles: int) -> int:
    """Return how many tokens all tiles look at, each those it owns and those it shares; the last ones reach past the end."""
    full = (S - tile) // W + 1 if tile <= S else 0
    return full * tile + sum(S - i * W for i in range(full, tiles))


def table_take(B: int, G: int, Q: int, D: int, size: int, t: Tiles, *, loss: bool = False) -> Traffic:
    """Return the scores of every (spot, gene) at its level; with ``loss`` L_level and its prior instead."""
    rows, cols = ceil(B / t["BM"]), ceil(G / t["NG"])
    loaded = (cols * B + rows * G * Q) * D * size + B * G
    distinct = (B + G * Q) * D * size + B * G
    if loss:
        loaded, distinct = loaded + B * G + rows * (G * Q * 4) + rows * cols * 4, distinct + B * G + G * Q * 4 + 4
    flops = rows * cols * 2 * t["BM"] * t["NG"] * t["QP"] * _padded(D, t)
    return Traffic(loaded, distinct, 4 * rows * cols if loss else 4 * B * G, flops)


def table_spread(B: int, G: int, Q: int, D: int, size: int, t: Tiles, *, loss: bool = False) -> Traffic:
    """Return the weighted sums of rows for every spot; with ``loss`` L_level's gradient by the image, its weights made again."""
    rows, cols, slices = ceil(B / t["BM"]), ceil(G / t["NG"]), ceil(D / t["BD"])
    given = _weights(B, G, Q, D, size, t, loss=loss)
    return Traffic(
        loaded=slices * given.loaded + rows * G * Q * D * size,
        distinct=given.distinct + (0 if loss else G * Q * D * size),
        stored=4 * B * D,
        flops=slices * given.flops + rows * cols * slices * 2 * t["BM"] * t["NG"] * t["QP"] * t["BD"],
    )


def table_collect(B: int, G: int, Q: int, D: int, size: int, t: Tiles, *, loss: bool = False) -> Traffic:
    """Return the weighted sums of spots for every row; with ``loss`` L_level's gradient by the table, and by the prior."""
    rows, cols, slices = ceil(B / t["BM"]), ceil(G / t["NG"]), ceil(D / t["BD"])
    given = _weights(B, G, Q, D, size, t, loss=loss)
    return Traffic(
        loaded=slices * given.loaded + cols * B * D * size,
        distinct=given.distinct + (0 if loss else B * D * size),
        stored=4 * G * Q * D + (4 * G * Q if loss else 0),
        flops=slices * given.flops + rows * cols * slices * 2 * t["BM"] * t["NG"] * t["QP"] * t["BD"],
    )


def _weights(B: int, G: int, Q: int, D: int, size: int, t: Tiles, *, loss: bool) -> Traffic:
    """Return what it takes to know every weight once: fp32 and a level where given, the scores and their prior where made again."""
    if not loss:
        return Traffic(5 * B * G, 5 * B * G, 0)
    scores = table_take(B, G, Q, D, size, t, loss=True)
    rows, cols = ceil(B / t["BM"]), ceil(G / t["NG"])
    return Traffic(scores.loaded + rows * cols * 4, scores.distinct + 4, 0, scores.flops)  # and the factor
