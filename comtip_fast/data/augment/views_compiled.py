"""Rotation of tiles and mapping of their pixel values on a CPU in one pass, compiled by numba to run without the GIL.

:func:`comtip_fast.data.augment.apply_views.apply_views` uses this module for tiles on a CPU if pixel values are mapped and numba is
installed (the ``dali-*`` extras include it). Without numba, NumPy computes the same values in several passes.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module, util
from typing import Any

import numpy as np


@cache
def is_installed() -> bool:
    """Return whether numba is installed."""
    return util.find_spec("numba") is not None


def rotate_and_map(
    tiles_NCSS: np.ndarray, orientation_N: np.ndarray, lut_N3V: np.ndarray, out_N3SS: np.ndarray
) -> None:
    """Rotate, mirror and map each tile into ``out_N3SS``.

    Parameters
    ----------
    tiles_NCSS
        uint8, of which the first three channels are used; a permuted view of an (N, S, S, C) array, as decoders return it, is read
        without a copy.
    orientation_N
        int64, as in :func:`comtip_fast.data.augment.views.rotate_flip`.
    lut_N3V
        uint8 (N, 3, 256).
    out_N3SS
        uint8, contiguous.
    """
    N, C, S, _ = tiles_NCSS.shape
    channels_last = tiles_NCSS.transpose(0, 2, 3, 1)
    if channels_last.flags.c_contiguous:
        flat, pixel_stride, channel_stride = channels_last.reshape(N, C * S * S), C, 1
    else:
        flat, pixel_stride, channel_stride = np.ascontiguousarray(tiles_NCSS).reshape(N, C * S * S), 1, S * S
    _compiled()(flat, pixel_stride, channel_stride, orientation_N, lut_N3V, out_N3SS)


@cache
def _compiled() -> Any:
    """Return the loop, which numba compiles at its first call.

    Compilation takes about a second per process; a cache on disk would need a writable folder.
    """
    njit: Any = import_module("numba").njit
    return njit(nogil=True)(_rotate_and_map)


def _rotate_and_map(flat: Any, pixel_stride: Any, channel_stride: Any, orientation: Any, lut: Any, out: Any) -> None:
    """Fill ``out`` (N, 3, S, S) pixel by pixel from the tiles, which are the rows of ``flat`` (N, C S S)."""
    S = out.shape[2]
    to_green, to_blue = np.uintp(channel_stride), np.uintp(2 * channel_stride)
    for i in range(out.shape[0]):
        # Source offset of the first output pixel, and the steps to the next output row and column, in pixels.
        quarters = orientation[i] % 4
        if quarters == 0:
            first, row_step, column_step = 0, S, 1
        elif quarters == 1:
            first, row_step, column_step = S - 1, -1, S
        elif quarters == 2:
            first, row_step, column_step = S * S - 1, -S, -1
        else:
            first, row_step, column_step = (S - 1) * S, 1, -S
        if orientation[i] >= 4:
            first, column_step = first + (S - 1) * column_step, -column_step
        tile, red, green, blue = flat[i], lut[i, 0], lut[i, 1], lut[i, 2]
        out_red, out_green, out_blue = out[i, 0], out[i, 1], out[i, 2]
        for y in range(S):
            source = pixel_stride * (first + y * row_step)
            for x in range(S):
                # With a signed index, numba would check at every pixel whether it counts from the end.
                at = np.uintp(source)
                out_red[y, x] = red[tile[at]]
                out_green[y, x] = green[tile[at + to_green]]
                out_blue[y, x] = blue[tile[at + to_blue]]
                source += pixel_stride * column_step
