"""Turning and mapping tiles on a CPU by code that numba compiles: one pass over the pixels, without Python's lock.

Where numba is installed (the ``dali-*`` extras bring it) :func:`comtip_fast.data.augment.apply_views.apply_views` takes this path;
the same is done without it in several passes.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module, util
from typing import Any

import numpy as np


@cache
def is_installed() -> bool:
    """Say whether numba is there."""
    return util.find_spec("numba") is not None


def turn_and_map(planes_N3SS: np.ndarray, turn_N: np.ndarray, table_N3V: np.ndarray, out_N3SS: np.ndarray) -> None:
    """Write each tile turned, its values mapped.

    Parameters
    ----------
    planes_N3SS
        uint8; decoders lay out (N, S, S, 3), which costs no copy.
    turn_N
        int64, as :func:`comtip_fast.data.augment.views.turn_tile` numbers them.
    table_N3V
        uint8 (N, 3, 256).
    out_N3SS
        uint8, contiguous.
    """
    N, _, S, _ = planes_N3SS.shape
    pixels = planes_N3SS.transpose(0, 2, 3, 1)
    if pixels.flags.c_contiguous:  # as decoders lay them out
        flat, right, deep = pixels.reshape(N, 3 * S * S), 3, 1
    else:
        flat, right, deep = np.ascontiguousarray(planes_N3SS).reshape(N, 3 * S * S), 1, S * S
    _compiled()(flat, right, deep, turn_N, table_N3V, out_N3SS)


@cache
def _compiled() -> Any:
    """Compile once in a process: a second; a cache on disk would need a place that may be written to."""
    njit: Any = import_module("numba").njit
    return njit(nogil=True)(_turn_and_map)


def _turn_and_map(flat: Any, pixel: Any, deep: Any, turn: Any, table: Any, out: Any) -> None:
    """Read tiles (N, 3 S S) at ``pixel`` values from one pixel to the next and ``deep`` from one colour to the next."""
    S = out.shape[2]
    for i in range(out.shape[0]):
        # Where the view's first pixel lies, and how far its next pixel and its next row are from there, in pixels.
        quarters = turn[i] % 4
        if quarters == 0:
            first, down, right = 0, S, 1
        elif quarters == 1:
            first, down, right = S - 1, -1, S
        elif quarters == 2:
            first, down, right = S * S - 1, -S, -1
        else:
            first, down, right = (S - 1) * S, 1, -S
        if turn[i] >= 4:
            first, right = first + (S - 1) * right, -right
        tile, red, green, blue = flat[i], table[i, 0], table[i, 1], table[i, 2]
        out_red, out_green, out_blue = out[i, 0], out[i, 1], out[i, 2]
        for y in range(S):
            at = pixel * (first + y * down)
            for x in range(S):
                out_red[y, x] = red[tile[at]]
                out_green[y, x] = green[tile[at + deep]]
                out_blue[y, x] = blue[tile[at + 2 * deep]]
                at += pixel * right
