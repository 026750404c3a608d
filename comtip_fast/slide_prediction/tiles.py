"""Crop and resize tiles that were cut by other software to the size of a model's tiles."""

from __future__ import annotations

import numpy as np
from comtip_shards.slides.tiles import limit_resolution
from PIL import Image

from comtip_fast.data.sections import MPP_RANGE
from comtip_fast.data.tile_sources import TileGeometry

TOLERANCE = 0.01
"""Relative amount by which a tile may be smaller than the model's."""


def check_tiles(tiles: np.ndarray, mpp: float, tile: TileGeometry) -> np.ndarray:
    """Check tiles and their scale, and return the tiles as an array.

    Raises
    ------
    TypeError
        The tiles are not uint8.
    ValueError
        The tiles are not square RGB images (N, H, H, 3), their scale is not plausible, or they are smaller than those of the model.
    """
    found = np.asarray(tiles)
    if found.dtype != np.uint8:
        raise TypeError(f"tiles: dtype {found.dtype}; convert to uint8 with values from 0 to 255")
    if found.ndim != 4 or found.shape[3] != 3 or found.shape[1] != found.shape[2] or found.shape[1] == 0:
        hint = "; transpose channels to the end" if found.ndim == 4 and found.shape[1] == 3 else ""
        hint = "; add a first axis to a single tile, tiles[None]" if found.ndim == 3 else hint
        raise ValueError(f"tiles: shape {found.shape}; expected square RGB tiles (N, H, H, 3){hint}")
    if not isinstance(mpp, (int, float, np.floating, np.integer)) or not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
        raise ValueError(f"`mpp`: {mpp!r} um per px; give a number from {MPP_RANGE[0]:g} to {MPP_RANGE[1]:g}")
    width = found.shape[1] * mpp
    if width < tile.um * (1 - TOLERANCE):
        raise ValueError(
            f"tiles: {found.shape[1]} px at {mpp:g} um per px are {width:g} um wide, but the model reads tiles of "
            f"{tile.um:g} um; cut tiles of at least {np.ceil(tile.um / mpp):g} px"
        )
    return found


def fit_tiles(tiles: np.ndarray, mpp: float, tile: TileGeometry) -> np.ndarray:
    """Return the centres of tiles at the model's width and resolution.

    Parameters
    ----------
    tiles
        uint8 RGB (N, H, H, 3).
    mpp
        um per px.
    tile
        Geometry of the model's tiles.

    Returns
    -------
    uint8 (N, S, S, 3); the tiles themselves if they already have the model's width and resolution.

    Raises
    ------
    TypeError, ValueError
        See :func:`check_tiles`.
    """
    found = check_tiles(tiles, mpp, tile)
    if found.shape[1] == tile.px and mpp >= tile.min_mpp and abs(found.shape[1] * mpp / tile.um - 1) <= TOLERANCE:
        return found
    out = np.empty((len(found), tile.px, tile.px, 3), np.uint8)
    for i, one in enumerate(found):
        small, small_mpp, _ = limit_resolution(one, mpp, tile.min_mpp)
        side = small.shape[0]
        width = min(tile.um / small_mpp, side)
        box = ((side - width) / 2, (side - width) / 2, (side + width) / 2, (side + width) / 2)
        out[i] = np.asarray(Image.fromarray(small).resize((tile.px, tile.px), Image.Resampling.BICUBIC, box=box))
    return out
