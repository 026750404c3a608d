"""Bytes and FLOPs of the kernels as formulas in their sizes and tiles, which need no Triton to evaluate.

``tests/kernels/interpreted/test_traffic.py`` runs the kernels at small sizes in the interpreter, counts, and requires equality;
the named sizes extrapolate. ``exact_lse`` of InfoNCE is not included: it does nothing unless a sum underflowed.
``loaded`` counts every load request, most of which caches serve; ``memory`` is what must be transferred from or to memory if caches
serve the rest, and is compared with the lower bound. Operands that a kernel sweeps once per tile of the others, and that do not fit
into the L2 cache, are read from memory in every sweep (``again``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from comtip_kernels.flops import ROW_GROUP

Tiles = Mapping[str, Any]


@dataclass(frozen=True)
class Traffic:
    """Bytes and FLOPs of one launch, or of several one after another."""

    loaded: int
    """Bytes of all load requests."""
    distinct: int
    """Bytes of distinct addresses loaded."""
    stored: int
    flops: int = 0
    again: int = 0
    """Bytes that are read from memory more than once, because the L2 cache does not hold them until they are read again."""

    def __add__(self, other: Traffic) -> Traffic:
        """Return the sum of two launches, the second with cold caches."""
        return Traffic(
            self.loaded + other.loaded,
            self.distinct + other.distinct,
            self.stored + other.stored,
            self.flops + other.flops,
            self.again + other.again,
        )

    @property
    def once(self) -> int:
        """Bytes of every operand and every result."""
        return self.distinct + self.stored

    @property
    def memory(self) -> int:
        """Bytes transferred from and to memory."""
        return self.once + self.again


def _padded(D: int, t: Tiles) -> int:
    return ceil(D / t["BK"]) * int(t["BK"])


L2_BYTES = 40 << 20
"""L2 cache of an A100; an H100 has 50 MiB."""


def read_again(size: int, sweeps: int) -> int:
    """Return the bytes of an operand of ``size`` bytes that are read from memory again, if a kernel sweeps it ``sweeps`` times."""
    return (sweeps - 1) * size if size > L2_BYTES else 0


BLOCK_IDS = 12
"""Bytes per row and column of a block of InfoNCE: class and excluded flag."""


def infonce_forward(B: int, M: int, D: int, size: int, t: Tiles, ids: int = 0, *, diagonal: bool = True) -> Traffic:
    """Return the traffic of the forward pass, for elements of ``size`` bytes and masks of ``ids`` bytes per row and column."""
    rows, cols = ceil(B / t["BM"]), ceil(M / t["BN"])
    vector = D * size + ids
    return Traffic(
        loaded=(cols * B + rows * M) * vector + 4 * rows * cols,
        distinct=(B + M) * vector + 4,
        stored=4 * (cols * B + rows * M + (B if diagonal else 0)),
        flops=rows * cols * 2 * t["BM"] * t["BN"] * _padded(D, t),
        again=read_again(M * vector, ceil(rows / ROW_GROUP)),
    )


def infonce_gradient(n: int, m: int, D: int, size: int, t: Tiles, ids: int = 0) -> Traffic:
    """Return the traffic of the derivatives of the logits in one chunk of n rows and m columns."""
    rows, cols = ceil(n / t["BM"]), ceil(m / t["BN"])
    return Traffic(
        loaded=(cols * n + rows * m) * (D * size + ids + 12) + 4 * rows * cols,
        distinct=(n + m) * (D * size + ids + 12) + 4,
        stored=n * m * size,
        flops=rows * cols * 2 * t["BM"] * t["BN"] * _padded(D, t),
    )


REGISTER_SUMS = 65536
"""Sums in fp32 that fill the registers of a multiprocessor, and so the most that a tile of a product can have."""


def fewest_loads(loads: Callable[[int, int], int], unit: int = 1) -> int:
    """Return the fewest bytes that the programs of an operation load with tiles of any shape whose sides are powers of 2.

    Parameters
    ----------
    loads
        Returns the bytes that all programs load with tiles of this height and width, fewer for larger tiles.
    unit
        Sums of a tile of height and width 1, a power of 2. Tiles have :data:`REGISTER_SUMS` sums.
    """
    tiles = REGISTER_SUMS // unit
    heights = [1 << power for power in range(tiles.bit_length())]
    return min(loads(height, tiles // height) for height in heights)


LIBRARY_TILE = (128, 256)
"""Assumed tile of a library product, which loads each operand once per tile of the other; with clusters it loads less."""


def library_product(
    n: int, m: int, k: int, size: int, *, accumulate: bool = False, tile: tuple[int, int] = LIBRARY_TILE
) -> Traffic:
    """Return the assumed traffic of a library's (n, k) by (k, m) product with a result in fp32.

    The longer side of the tile lies along the longer side of the result.
    """
    rows, cols = sorted(tile) if n <= m else sorted(tile, reverse=True)
    added = 4 * n * m if accumulate else 0
    loaded = (ceil(m / cols) * n + ceil(n / rows) * m) * k * size + added
    return Traffic(loaded, (n + m) * k * size + added, 4 * n * m, 2 * n * m * k)


def infonce_backward(n: int, m: int, D: int, size: int, t: Tiles, chunk: int, ids: int = 0) -> Traffic:
    """Return the traffic of the backward pass in chunks of ``chunk`` rows: the kernel, and one library product per side."""
    moved = Traffic(0, 0, 0)
    for first in range(0, n, chunk):
        rows = min(chunk, n - first)
        moved += infonce_gradient(rows, m, D, size, t, ids)
        moved += library_product(rows, D, m, size) + library_product(m, D, rows, size, accumulate=first > 0)
    return moved


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
    """Return the number of first-token indices that all tiles load together, for owned and other tokens."""
    full = (S - tile) // W + 1 if tile <= S else 0
    return full * tile + sum(S - i * W for i in range(full, tiles))


def image_attention(
    images: int, T: int, H: int, E: int, size: int, tile: int, *, backward: bool, bias: bool = True
) -> Traffic:
    """Return the traffic of attention within images of T tokens, one per tile, with or without a bias of q, k and v in fp32."""
    width = max(16, 1 << (E - 1).bit_length())
    reads, writes, products = (4, 3, 5) if backward else (3, 1, 2)
    again = 3 if backward and (bias or size == 4) else 0  # q, k and the gradient, from a cache
    biases = (5 if backward else 3) * bias  # those of q and k again
    return Traffic(
        loaded=(reads + again) * images * T * H * E * size + 4 * biases * images * H * E,
        distinct=reads * images * T * H * E * size + 4 * 3 * bias * H * E,
        stored=writes * images * T * H * E * size + 4 * 3 * (bias and backward) * images * H * E,
        flops=products * images * H * 2 * tile * tile * width,
    )


def residual_norm(N: int, d: int, stream: int, branch: int, t: Tiles) -> Traffic:
    """Return the traffic of residual sum and LayerNorm of N rows; ``stream`` and ``branch`` are bytes of an element."""
    moved, vectors = N * d * (stream + branch), 3 * 4 * d  # both biases and the gain
    return Traffic(moved + ceil(N / t["R"]) * vectors, moved + vectors, moved + 8 * N)


def residual_norm_grads(N: int, d: int, stream: int, branch: int, rows: int) -> Traffic:
    """Return the traffic of its gradients, with that of the stream, ``rows`` per program; sums of parts are not included."""
    programs, copy = ceil(N / rows), branch if branch != stream else 0
    loaded = N * (d * (2 * stream + branch) + 8)
    return Traffic(loaded + 4 * programs * d, loaded + 4 * d, N * d * (stream + copy) + 4 * 3 * programs * d)


def bias_gelu(N: int, d: int, size: int, t: Tiles) -> Traffic:
    """Return the traffic of bias and GELU of N rows."""
    return Traffic(N * d * size + 4 * ceil(N / t["R"]) * d, N * d * size + 4 * d, N * d * size)


def bias_gelu_grads(N: int, d: int, size: int, rows: int) -> Traffic:
    """Return the traffic of its gradients, ``rows`` per program; sums of parts are not included."""
    programs, loaded = ceil(N / rows), 2 * N * d * size
    return Traffic(loaded + 4 * programs * d, loaded + 4 * d, N * d * size + 4 * programs * d)


def one_query_attention(N: int, S: int, H: int, D: int, size: int, t: Tiles, *, backward: bool) -> Traffic:
    """Return the traffic of attention with one query per sentence and head, for N sentences of S tokens in all.

    Tokens are read in slices twice: for the scores, and for what the weights multiply. So are the queries in the backward pass.
    """
    if backward:
        distinct, loaded, writes, products = S + 2 * N * H, 2 * (S + 2 * N * H), S + N * H, 5
    else:
        distinct, loaded, writes, products = S + N * H, 2 * S + N * H, N * H, 2
    return Traffic(
        loaded=loaded * D * size + 16 * N,
        distinct=distinct * D * size + 16 * N,
        stored=writes * D * size,
        flops=products * N * 2 * t["BH"] * t["BT"] * ceil(D / t["BD"]) * t["BD"],
    )


def sampled_dot(B: int, G: int, Q: int, D: int, size: int, t: Tiles, *, loss: bool = False) -> Traffic:
    """Return the traffic of ``sampled_dot``; with ``loss``, that of L_level with its prior.

    Neighbouring programs share their genes: each tile of genes sweeps the vectors.
    """
    rows, cols = ceil(B / t["BM"]), ceil(G / t["NG"])
    loaded = (cols * B + rows * G * Q) * D * size + B * G
    distinct = (B + G * Q) * D * size + B * G
    if loss:
        loaded, distinct = loaded + B * G + rows * (G * Q * 4) + rows * cols * 4, distinct + B * G + G * Q * 4 + 4
    flops = rows * cols * 2 * t["BM"] * t["NG"] * t["QP"] * _padded(D, t)
    return Traffic(loaded, distinct, 4 * rows * cols if loss else 4 * B * G, flops, read_again(B * D * size, cols))


def level_gradient(B: int, G: int, Q: int, D: int, size: int, t: Tiles) -> Traffic:
    """Return the traffic of the score derivatives of L_level in one chunk of G genes, and of their sums over spots."""
    rows, cols = ceil(B / t["BM"]), ceil(G / t["NG"])
    return Traffic(
        loaded=(cols * B + rows * G * Q) * D * size + 2 * B * G + rows * (G * Q * 4) + rows * cols * 8,
        distinct=(B + G * Q) * D * size + 2 * B * G + G * Q * 4 + 8,
        stored=B * G * Q * size + 4 * rows * G * Q,
        flops=rows * cols * 2 * t["BM"] * t["NG"] * t["QP"] * _padded(D, t),
        again=read_again(B * D * size, cols),
    )


def level_backward(B: int, G: int, Q: int, D: int, size: int, t: Tiles, chunk: int) -> Traffic:
    """Return the traffic of the backward pass of L_level in chunks of genes: the kernel, and one library product per side."""
    moved = Traffic(0, 0, 0)
    for first in range(0, G, chunk):
        genes = min(chunk, G - first)
        moved += level_gradient(B, genes, Q, D, size, t)
        moved += library_product(B, D, genes * Q, size, accumulate=first > 0) + library_product(genes * Q, D, B, size)
    sums = 4 * ceil(B / t["BM"]) * G * Q
    return moved + Traffic(sums, sums, 4 * G * Q)


def weighted_sum(B: int, G: int, Q: int, D: int, size: int, t: Tiles, parts: int = 1) -> Traffic:
    """Return the traffic of the weighted sums of rows per spot, over each of ``parts`` parts of the panel."""
    rows, cols, slices = ceil(B / t["BM"]), ceil(G / t["NG"]), ceil(D / t["BD"])
    return Traffic(
        loaded=slices * 5 * B * G + rows * G * Q * D * size,
        distinct=5 * B * G + G * Q * D * size,
        stored=4 * B * D * parts,
        flops=rows * cols * slices * 2 * t["BM"] * t["NG"] * t["QP"] * t["BD"],
    )


def weighted_sum_transpose(B: int, G: int, Q: int, D: int, size: int, t: Tiles) -> Traffic:
    """Return the traffic of the weighted sums of spots per row."""
    rows, cols, slices = ceil(B / t["BM"]), ceil(G / t["NG"]), ceil(D / t["BD"])
    return Traffic(
        loaded=slices * 5 * B * G + cols * B * D * size,
        distinct=5 * B * G + B * D * size,
        stored=4 * G * Q * D,
        flops=rows * cols * slices * 2 * t["BM"] * t["NG"] * t["QP"] * t["BD"],
        again=read_again(5 * B * G, slices),
    )
