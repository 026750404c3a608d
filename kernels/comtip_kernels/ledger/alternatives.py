"""Algorithms that were not chosen, under the same three limits as the ledger's operations.

The sums and products over the sentence table could gather the selected rows, or multiply a one-hot matrix in memory; attention could
give every length of sentence tiles of its own. Nothing here is compiled or measured: bytes and FLOPs are formulas, as in
:mod:`comtip_kernels.ledger.traffic`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from comtip_kernels.flops import attention_tile
from comtip_kernels.ledger.sizes import BF16, busy_share, sentence_table
from comtip_kernels.ledger.traffic import Traffic, library_product
from comtip_kernels.rates import Rates

SMALLEST_TILE = 16
"""Rows of the smallest product of tensor cores (m16n8k16), and the smallest side of a tile in Triton."""


@dataclass(frozen=True)
class Way:
    """One way to compute an operation, forward and backward pass together."""

    name: str
    moved: Traffic
    programs: int = 0
    """Fewest programs of a kernel; 0 assumes, in favour of a way that was not written, that every multiprocessor has one."""
    tensor_cores: bool = True
    """Whether products run on tensor cores; otherwise at the rate of fp32."""

    def seconds(self, rates: Rates) -> dict[str, float]:
        """Return the predicted seconds for each of the three rates; see :meth:`comtip_kernels.ledger.sizes.Sized.seconds`."""
        busy = busy_share(self.programs, rates.multiprocessors) if self.programs else 1.0
        return {
            "compute": self.moved.flops / (rates.bf16 if self.tensor_cores else rates.fp32) / busy,
            "l2": self.moved.loaded / rates.l2 / busy,
            "memory": self.moved.memory / rates.reachable_memory,
        }


def pooling_ways(B: int, G: int, Q: int, D: int) -> list[Way]:
    """Return the ways of :func:`comtip_kernels.table_pool` with its gradients: mask in the tile (chosen), gather, one-hot matrix."""
    forward, backward = (s for s in sentence_table(B, G, Q, D, "") if s.op == "table_pool")
    chosen = Way("mask in the tile", forward.moved + backward.moved, min(forward.programs, backward.programs))
    return [chosen, Way("gather", gather(B, G, Q, D), tensor_cores=False), one_hot(B, G, Q, D)]


def gather(B: int, G: int, Q: int, D: int) -> Traffic:
    """Return the traffic of pooling and its gradients if each (spot, gene) loads its row of the table.

    A program has one spot and all columns. The gradient of the table adds the vectors of the spots of each (gene, level), which are
    assumed to be sorted already. The table is read from memory once, although a table beyond the L2 cache is read more often.
    """
    each, table, vectors = B * G, G * Q * D * BF16, B * D
    summed = Traffic(each * (D * BF16 + 5), table + 5 * each, 4 * vectors, 2 * each * D)
    weights = Traffic(each * (D * BF16 + 1) + vectors * BF16, table + each + vectors * BF16, 4 * each, 2 * each * D)
    rows = Traffic(each * (D * BF16 + 9), vectors * BF16 + 9 * each, 4 * G * Q * D, 2 * each * D)
    return summed + weights + rows


def one_hot(B: int, G: int, Q: int, D: int) -> Way:
    """Return the way with a (B, G Q) matrix of weights in bf16 and library products; its gradient is a product and a selection."""
    matrix, each = B * G * Q * BF16, B * G
    fill = Traffic(5 * each, 5 * each, matrix)
    select = Traffic(each * (BF16 + 1), each * (BF16 + 1), 4 * each)
    products = (
        library_product(B, D, G * Q, BF16) + library_product(B, G * Q, D, BF16) + library_product(G * Q, D, B, BF16)
    )
    # The scores' gradients of all levels are written in bf16 instead of fp32.
    products += Traffic(0, 0, matrix - 4 * B * G * Q)
    return Way("one-hot matrix", fill + products + select)


@dataclass(frozen=True)
class AttentionTiles:
    """Padded products of packed attention for one choice of tiles."""

    name: str
    ratio: float
    """(query, key) pairs that the tiles compute, relative to those within sentences."""
    programs: int


def attention_tiles(lengths: Sequence[int], each: int, heads: int) -> list[AttentionTiles]:
    """Return the choices for ``each`` sentences of every length: one window for all (chosen), and tiles per length.

    A tile of one length holds as many whole sentences as fit into 16 tokens, the fewest that tensor cores multiply; larger tiles hold
    more sentences, but compute more pairs.
    """
    tokens, useful = each * sum(lengths), each * sum(n * n for n in lengths)
    longest = max(lengths)
    out = []
    for tile in (attention_tile(longest), 2 * attention_tile(longest)):
        tiles = ceil(tokens / (tile - longest + 1))
        out.append(AttentionTiles(f"one window of {tile} tokens", tiles * tile * tile / useful, tiles * heads))
    tiles = sum(ceil(each / (SMALLEST_TILE // n)) for n in lengths)
    out.append(AttentionTiles(f"{SMALLEST_TILE} tokens per length", tiles * SMALLEST_TILE**2 / useful, tiles * heads))
    return out
