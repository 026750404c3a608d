"""Tile sizes of the Triton kernels, which the ledger and ``comtip plan`` also read where Triton is not installed.

By mode (``tl_common.product_mode``): sizes that compile without spills and within the shared memory of sm_80 and sm_90, and of sm_86 and
sm_89, which run the code of sm_80 but give a program 99 KiB at most. Nothing is autotuned: a result must not depend on what else the GPU was doing.

BM and BN are the rows and columns of a tile of the result, BK is the slice of the inner dimension that is loaded at a time. In the
kernels over the sentence table, BN is the number of genes of a tile times padded levels, and BD the width of the output that one
program holds in registers. Tiles of packed attention are in :mod:`comtip_kernels.flops`.
"""

from __future__ import annotations

from typing import Any

from comtip_kernels.tl_common import power_of_2

INFONCE_FORWARD: dict[str, dict[str, Any]] = {
    "bf16": {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
    "tf32": {"BM": 128, "BN": 128, "BK": 32, "num_warps": 8, "num_stages": 3},
    "tf32x3": {"BM": 64, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 2},
}
INFONCE_EXACT: dict[str, dict[str, Any]] = {
    "bf16": {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 3},
    "tf32": {"BM": 64, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 3},
    "tf32x3": {"BM": 64, "BN": 32, "BK": 16, "num_warps": 4, "num_stages": 3},
}
INFONCE_GRADIENT: dict[str, dict[str, Any]] = {
    "bf16": {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
    "tf32": {"BM": 128, "BN": 128, "BK": 32, "num_warps": 8, "num_stages": 3},
    "tf32x3": {"BM": 64, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 2},
}

SAMPLED_DOT: dict[str, dict[str, Any]] = {
    "bf16": {"BM": 256, "BN": 128, "BK": 32, "num_warps": 8, "num_stages": 3},
    "tf32": {"BM": 64, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
    "tf32x3": {"BM": 32, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 2},
}
LEVEL_LOSS: dict[str, dict[str, Any]] = {
    "bf16": {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
    "tf32": {"BM": 64, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
    "tf32x3": {"BM": 32, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 2},
}
LEVEL_GRADIENT: dict[str, dict[str, Any]] = {
    "bf16": {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
    "tf32": {"BM": 64, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
    "tf32x3": {"BM": 32, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 2},
}
WEIGHTED_SUM: dict[str, dict[str, Any]] = {
    "bf16": {"BM": 128, "BN": 64, "BK": 64, "BD": 128, "num_warps": 8, "num_stages": 2},
    "tf32": {"BM": 32, "BN": 32, "BK": 32, "BD": 256, "num_warps": 8, "num_stages": 2},
    "tf32x3": {"BM": 32, "BN": 32, "BK": 16, "BD": 256, "num_warps": 8, "num_stages": 2},
}
WEIGHTED_SUM_TRANSPOSE: dict[str, dict[str, Any]] = {
    "bf16": {"BM": 64, "BN": 128, "BK": 64, "BD": 128, "num_warps": 8, "num_stages": 2},
    "tf32": {"BM": 32, "BN": 32, "BK": 32, "BD": 256, "num_warps": 8, "num_stages": 2},
    "tf32x3": {"BM": 32, "BN": 32, "BK": 16, "BD": 256, "num_warps": 8, "num_stages": 2},
}

NORM_ROWS = 64
"""Rows per program of ``norm_grads``, the backward pass of the embedding's LayerNorm."""

ONE_QUERY: dict[str, dict[str, Any]] = {
    "bf16": {"BD": 128, "num_warps": 4, "num_stages": 2},
    "tf32": {"BD": 64, "num_warps": 4, "num_stages": 2},
    "tf32x3": {"BD": 32, "num_warps": 4, "num_stages": 2},
}
"""BD and launch options of ``one_query_attention``, of which one program reads one sentence."""


def one_query_tiles(mode: str, heads: int, width: int, longest: int) -> dict[str, Any]:
    """Return tile sizes BH, BT and BD and launch options of ``one_query_attention``, for queries (N, heads, width).

    Parameters
    ----------
    mode
        How operands are multiplied (``tl_common.product_mode``).
    heads, width
        Sizes H and D.
    longest
        Tokens of the longest sentence.
    """
    chosen = ONE_QUERY[mode]
    sizes = {"BH": power_of_2(heads), "BT": power_of_2(longest), "BD": min(chosen["BD"], power_of_2(width))}
    return chosen | sizes


POINTWISE_ROWS = 128
"""Rows per program in the backward passes of ``residual_norm`` and ``bias_gelu``, whose sums over rows are added afterwards."""
GELU: dict[str, Any] = {"R": 4, "BD": 512, "num_warps": 4, "num_stages": 1}
GELU_GRADS: dict[str, Any] = {"R": 4, "BD": 512, "num_warps": 8, "num_stages": 1}


def norm_tiles(width: int) -> dict[str, Any]:
    """Return the tile and launch options of ``residual_norm``: whole rows of ``width`` elements, about 2,048 elements."""
    BD = power_of_2(width)
    return {"R": max(1, 2048 // BD), "BD": BD, "num_warps": 4, "num_stages": 1}


def norm_grads_tiles(width: int) -> dict[str, Any]:
    """Return the tile and launch options of ``residual_norm_grads``, which holds three tiles of sums in registers."""
    BD = power_of_2(width)
    return {"R": max(1, 2048 // BD), "BD": BD, "num_warps": 8, "num_stages": 1}
