"""Floating-point operations (FLOPs) of each operation in the forward and the backward pass, recomputation included.

The Triton operators register these functions with ``torch.utils.flop_counter``, so ``FlopCounterMode`` counts them, and
``comtip plan`` uses the same functions. Pointwise operations, exponentials and reductions are not counted. An (n, d) times
(d, m) product has 2 n m d FLOPs: n m d multiplications and as many additions.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from comtip_kernels.tl_common import power_of_2

KEPT_BYTES = 16 << 20
"""Bytes of exponentials that the CPU path of InfoNCE keeps from its forward pass instead of computing them again."""

CHUNK_BYTES = 256 << 20
"""Most bytes of derivatives that the backward passes of InfoNCE and L_level store at once on a GPU. A chunk has at least 128 rows
(InfoNCE) or 64 genes (L_level), even if they take more bytes: beyond 1 M columns (M) or 2 M scores per gene (B Q) in bf16, or half
as many in fp32. A constant: the order of a sum must not depend on the GPU."""

ROW_GROUP = 8
"""Rows of tiles that the forward pass of InfoNCE processes together, so that they share one read of each column from memory."""

FULL_GPU = 512
"""Programs that occupy a GPU well: 3.9 waves on an H100 (132 multiprocessors), 4.7 on an A100 (108).
A constant: the order of a sum must not depend on the GPU."""

PART_GENES, MAX_PARTS = 64, 16
"""Minimum number of genes in a part of the panel, and maximum number of parts (:func:`panel_parts`)."""

ATTENTION_TILES = (32, 64)
"""Tokens of a tile of the packed attention kernel in bf16."""


class Flops(NamedTuple):
    """FLOPs of the forward and the backward pass of an operation."""

    forward: float
    backward: float


def product(n: float, m: float, d: float) -> float:
    """Return the FLOPs of an (n, d) times (d, m) product."""
    return 2.0 * n * m * d


def infonce(images: float, columns: float, width: float, *, gpu: bool, blocks: bool = False) -> Flops:
    """Return the FLOPs of InfoNCE between ``images`` and ``columns`` vectors of ``width`` elements.

    The backward pass computes the logits again and multiplies their derivatives with both sides. The CPU path keeps the
    exponentials of its first tiles (``KEPT_BYTES``).

    Parameters
    ----------
    images, columns, width
        Sizes B, M and D.
    gpu
        True for the Triton path, False for the CPU path.
    blocks
        True for the form over ranks (``comtip_kernels.infonce.blocks``), which keeps no exponentials.
    """
    u = product(images, columns, width)
    if gpu:
        return Flops(u, 3 * u)
    kept = 0.0 if blocks else min(1.0, KEPT_BYTES / 4 / max(1.0, images * columns))
    return Flops(u, (3 - kept) * u)


def infonce_chunk(columns: int, element: int) -> int:
    """Return the number of rows of the logits' derivatives that are stored at a time: a multiple of 128, the height of a tile.

    Parameters
    ----------
    columns
        Numbers in one stored row.
    element
        Bytes of a number.
    """
    return max(128, CHUNK_BYTES // (element * max(1, columns)) // 128 * 128)


def level_chunk(spots: int, levels: int, element: int) -> int:
    """Return for how many genes L_level stores score derivatives at once, a multiple of 64 (the genes of the widest tile).

    Parameters
    ----------
    spots, levels
        Sizes B and Q.
    element
        Bytes of a number.
    """
    return max(64, CHUNK_BYTES // (element * max(1, spots * levels)) // 64 * 64)


def panel_parts(blocks: int, genes: int, tile_genes: int) -> tuple[int, int]:
    """Return the number of parts into which ``weighted_sum`` divides a panel, and the genes of a part.

    A small batch has few blocks of output: 32 for 1,024 spots of width 512. For each block, every part of the panel is a program
    of its own, and the sums of the parts are added afterwards.

    Parameters
    ----------
    blocks
        Blocks of the output.
    genes
        Genes of the panel.
    tile_genes
        Genes of a tile; a part has whole tiles.
    """
    parts = max(1, min(MAX_PARTS, FULL_GPU // max(1, blocks), genes // PART_GENES))
    length = max(1, ceil(ceil(genes / parts) / tile_genes)) * tile_genes
    return max(1, ceil(genes / length)), length


def infonce_chunk_bytes(rows: int, columns: int, element: int) -> int:
    """Return the bytes of the buffer for one chunk of derivatives of ``rows`` x ``columns`` logits, ``element`` bytes each."""
    length = padded(columns)
    return min(rows, infonce_chunk(length, element)) * length * element


def level_chunk_bytes(spots: int, genes: int, levels: int, element: int) -> int:
    """Return the bytes of the buffer that holds a chunk of score derivatives for a panel of ``genes``; see :func:`level_chunk`."""
    return spots * padded(min(genes, level_chunk(spots, levels, element)) * levels) * element


def padded(columns: int) -> int:
    """Return the length of a stored row: ``columns`` rounded up to a multiple of 64, because aligned rows make products fast."""
    return 64 * ceil(columns / 64)


def table_product(spots: float, genes: float, levels: float, width: float) -> float:
    """Return the FLOPs of the products of ``spots`` vectors with every row of a (genes, levels, width) table.

    One such product is ``sampled_dot``, ``weighted_sum``, ``weighted_sum_transpose`` or the forward pass of ``level_loss``.
    """
    return product(spots, genes * levels, width)


def level_cross_entropy(spots: float, genes: float, levels: float, width: float, *, gpu: bool) -> Flops:
    """Return the FLOPs of L_level, the cross-entropy over levels.

    The backward pass of the Triton path computes the scores again and multiplies their derivatives with both sides. The CPU path
    computes both gradients in its forward pass.
    """
    u = table_product(spots, genes, levels, width)
    return Flops(u, 3 * u) if gpu else Flops(3 * u, 0.0)


def table_pool(spots: float, genes: float, levels: float, width: float, *, gpu: bool) -> Flops:
    """Return the FLOPs of pooling: a one-hot product with the table in Triton, an embedding bag (not counted) on a CPU."""
    u = table_product(spots, genes, levels, width) if gpu else 0.0
    return Flops(u, 2 * u)


def pair_scores(spots: float, genes: float, levels: float, width: float) -> Flops:
    """Return the FLOPs of the scores of one level per spot and gene."""
    u = table_product(spots, genes, levels, width)
    return Flops(u, 2 * u)


def attention_tile(longest: int, tiles: tuple[int, ...] = ATTENTION_TILES) -> int:
    """Return the tile size in tokens with the fewest products per owned token, for sentences of at most ``longest`` tokens.

    Raises
    ------
    ValueError
        If ``longest`` exceeds every tile.
    """
    fitting = [t for t in tiles if t >= longest]
    if not fitting:
        raise ValueError(
            f"packed_attention: a sentence has {longest} tokens and the largest Triton tile has {max(tiles)}; use impl='auto'"
        )
    return min(fitting, key=lambda t: t * t // (t - longest + 1))


def packed_attention(tokens: float, heads: int, head_width: int, longest: int) -> Flops:
    """Return the FLOPs of the packed attention kernel, including those of masked (query, key) pairs.

    Each program computes one tile and owns the sentences that begin in its first ``tile - longest + 1`` tokens. The width of a
    head is padded to a power of 2. There are two matrix products in the forward and five in the backward pass, which recomputes the
    attention weights.

    Raises
    ------
    ValueError
        If ``longest`` exceeds the largest tile.
    """
    tile = attention_tile(longest)
    u = ceil(tokens / (tile - longest + 1)) * heads * product(tile, tile, power_of_2(head_width))
    return Flops(2 * u, 5 * u)


def image_attention(tiles: float, heads: int, head_width: int, tokens: int) -> Flops:
    """Return the FLOPs of the packed attention kernel for images of ``tokens`` tokens each, one image per tile of the kernel.

    Raises
    ------
    ValueError
        If ``tokens`` exceeds the largest tile.
    """
    tile = image_tile(tokens)
    u = tiles * heads * product(tile, tile, power_of_2(head_width))
    return Flops(2 * u, 5 * u)


def image_tile(tokens: int, tiles: tuple[int, ...] = ATTENTION_TILES) -> int:
    """Return the smallest tile of the packed attention kernel for an image of ``tokens`` tokens.

    Raises
    ------
    ValueError
        If ``tokens`` exceeds every tile.
    """
    fitting = [t for t in tiles if t >= tokens]
    if not fitting:
        raise ValueError(
            f"image_attention: an image has {tokens} tokens, and the largest tile has {max(tiles)}; use impl='auto'"
        )
    return min(fitting)


def one_query_attention(sentences: float, heads: int, width: float, longest: int) -> Flops:
    """Return the FLOPs of the kernel of attention with one query per sentence and head, padding included.

    Heads and tokens are padded to powers of 2 of at least 16. There are two products in the forward pass, and five in the backward
    pass, which recomputes the scores.
    """
    u = sentences * product(power_of_2(heads), power_of_2(longest), width)
    return Flops(2 * u, 5 * u)


def sentence_rows_backward(rows: float, width: float, small_rows: float) -> float:
    """Return the FLOPs of the embedding's gradient: the one-hot product for the tables of type, position and level.

    Parameters
    ----------
    rows
        Distinct rows, U.
    width
        Width D.
    small_rows
        Rows of the three tables together.
    """
    return product(rows, small_rows, width)
