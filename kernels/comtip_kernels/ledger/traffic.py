"""Bytes and FLOPs of each kernel as formulas in its sizes and tiles, which need no Triton to evaluate.

``tests/kernels/interpreted/test_traffic.py`` runs every kernel at small sizes in the interpreter, counts, and requires equality;
the named sizes extrapolate. ``loaded`` counts every load request, most of which caches serve; ``memory`` is what must be
transferred from or to memory if caches hold the rest, and is compared with the lower bound.
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
        """Return the sum of two launches, the second with cold caches."""
        return Traffic(
            self.loaded + other.loaded,
            self.distinct + other.distinct,
            self.stored + other.stored,
            self.flops + other.flops,
        )

    @property
    def memory(self) -> int:
        """Bytes transferred from and to memory."""
        return self.distinct + self.stored


def _padded(D: int, t: Tiles) -> int:
    return ceil(D / t["BK"]) * int(t["BK"])


BLOCK_IDS = 12
"""Bytes per row and column of a block of InfoNCE: class and excluded flag."""


def infonce_forward(B: int, M: int, D: int, size: int, t: Tiles, ids: int = 0, *, diagonal: bool = True) -> Traffic:
    """Return the traffic of the forward pass, for elements of ``size`` bytes and masks of ``ids`` bytes per row and column."""
    rows, cols = ceil(B / t["BM"]), ceil(M / t["BN"])
    return Traffic(
        loaded=(cols * B + rows * M) * (D * size + ids) + 4 * rows * cols,
        distinct=(B + M) * (D * size + ids) + 4,
        stored=4 * (cols * B + rows * M + (B if diagonal else 0)),
        flops=rows * cols * 2 * t["BM"] * t["BN"] * _padded(D, t),
    )


def infonce_side(n: int, m: int, D: int, size: int, t: Tiles, ids: int = 0, parts: int = 1) -> Traffic:
    """Return the traffic of the gradient of n vectors of one side against m of the other, in ``parts``."""
    rows, cols, slices = ceil(n / t["BM"]), ceil(m / t["BN"]), ceil(D / t["BD"])
    masked = (cols * n + rows * m) * (D * size + ids)
    return Traffic(
        loaded=slices * (parts * (12 * n + 4 * rows) + masked + rows * 12 * m) + rows * m * D * size,
        distinct=(n + m) * (D * size + ids + 12) + 4,
        stored=4 * n * D * parts,
        flops=rows * cols * slices * 2 * t["BM"] * t["BN"] * (_padded(D, t) + t["BD"]),
    )


def sentence_rows(gene: int, name: int, value: int, D: int, size: int, tables: int) -> Traffic:
    """Return the traffic of distinct rows with LayerNorm and identities; ``tables`` is the bytes of the tables read."""
    U = gene + name + value
    loaded = U * (24 + 8 + 5 * D * size) + gene * D * size
    return Traffic(loaded=loaded, distinct=tables + U * 32, stored=U * D * size)


def copy_rows(S: int, U: int, D: int, size: int) -> Traffic:
    """Return the traffic of copying S tokens."""
    return Traffic(loaded=S * (4 + D * size), distinct=S * 4 + U * D * size, stored=S * D * size)


def sum_tokens(S: int, U: int, D: int, size: int) -> Traffic:
    """Return the traffic of the sums over equal tokens, in one round."""
    return Traffic(loaded=S * (4 + D * size) + 12 * U, distinct=S * (4 + D * size) + 8 * U + 4, stored=4 * U * D)


def norm_grads(gene: int, name: int, value: int, D: int, size: int, rows: int, tables: int) -> Traffic:
    """Return the traffic of LayerNorm's backward pass on the summed gradients, ``rows`` per program."""
    U = gene + name + value
    programs = ceil(U / rows)
    loaded = U * (24 + 8 + 3 * D * size + 4 * D) + gene * D * size + programs * D * size
    return Traffic(loaded=loaded, distinct=tables + U * (32 + 4 * D), stored=4 * D * (U + 2 * programs))


def attention(S: int, H: int, E: int, size: int, longest: int, tile: int, *, backward: bool) -> Traffic:
    """Return the traffic of packed attention over S tokens."""
    W = tile - longest + 1
    tiles = ceil(S / W)
    width = max(16, 1 << (E - 1).bit_length())
    reads, writes, products = (4, 3, 5) if backward else (3, 1, 2)
    again = 3 if backward and size == 4 else 0  # q, k and the gradient, from a cache
    return Traffic(
        loaded=(reads + again) * S * H * E * size + 4 * _first_loads(S, W, tile, tiles) * H,
        distinct=reads * S * H * E * size + 4 * S,
        stored=writes * S * H * E * size,
        flops=products * tiles * H * 2 * tile * tile * width,
    )


def _first_loads(S: int, W: int, tile: int, tiles: int) -> int:
    """Return the number of first-token indices that all tiles load, owned or not, up to the end."""
    full = (S - tile) // W + 1 if tile <= S else 0
    return full * tile + sum(S - i * W for i in range(full, tiles))


def sampled_dot(B: int, G: int, Q: int, D: int, size: int, t: Tiles, *, loss: bool = False) -> Traffic:
    """Return the traffic of ``sampled_dot``; with ``loss``, that of L_level with its prior."""
    rows, cols = ceil(B / t["BM"]), ceil(G / t["NG"])
    loaded = (cols * B + rows * G * Q) * D * size + B * G
    distinct = (B + G * Q) * D * size + B * G
    if loss:
        loaded, distinct = loaded + B * G + rows * (G * Q * 4) + rows * cols * 4, distinct + B * G + G * Q * 4 + 4
    flops = rows * cols * 2 * t["BM"] * t["NG"] * t["QP"] * _padded(D, t)
    return Traffic(loaded, distinct, 4 * rows * cols if loss else 4 * B * G, flops)


def weighted_sum(B: int, G: int, Q: int, D: int, size: int, t: Tiles, *, loss: bool = False) -> Traffic:
    """Return the traffic of ``weighted_sum``; with ``loss``, that of L_level's gradient of the image."""
    rows, cols, slices = ceil(B / t["BM"]), ceil(G / t["NG"]), ceil(D / t["BD"])
    given = _weights(B, G, Q, D, size, t, loss=loss)
    return Traffic(
        loaded=slices * given.loaded + rows * G * Q * D * size,
        distinct=given.distinct + (0 if loss else G * Q * D * size),
        stored=4 * B * D,
        flops=slices * given.flops + rows * cols * slices * 2 * t["BM"] * t["NG"] * t["QP"] * t["BD"],
    )


def weighted_sum_transpose(B: int, G: int, Q: int, D: int, size: int, t: Tiles, *, loss: bool = False) -> Traffic:
    """Return the traffic of ``weighted_sum_transpose``; with ``loss``, that of L_level's gradients of table and prior."""
    rows, cols, slices = ceil(B / t["BM"]), ceil(G / t["NG"]), ceil(D / t["BD"])
    given = _weights(B, G, Q, D, size, t, loss=loss)
    return Traffic(
        loaded=slices * given.loaded + cols * B * D * size,
        distinct=given.distinct + (0 if loss else B * D * size),
        stored=4 * G * Q * D + (4 * G * Q if loss else 0),
        flops=slices * given.flops + rows * cols * slices * 2 * t["BM"] * t["NG"] * t["QP"] * t["BD"],
    )


def _weights(B: int, G: int, Q: int, D: int, size: int, t: Tiles, *, loss: bool) -> Traffic:
    """Return the traffic of computing each weight once: fp32 and a level if given; with ``loss``, the scores and prior."""
    if not loss:
        return Traffic(5 * B * G, 5 * B * G, 0)
    scores = sampled_dot(B, G, Q, D, size, t, loss=True)
    rows, cols = ceil(B / t["BM"]), ceil(G / t["NG"])
    return Traffic(scores.loaded + rows * cols * 4, scores.distinct + 4, 0, scores.flops)  # and the factor
