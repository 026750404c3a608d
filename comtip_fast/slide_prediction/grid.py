"""Grid of tiles on the tissue of a slide."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import numpy as np

MAX_TILES = 20_000_000


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """Lattice of tiles on a slide, and the share of tissue that a tile needs.

    Raises
    ------
    ValueError
        ``shape`` is not a known lattice, or a number is out of bounds.
    """

    shape: Literal["square", "hexagonal"] = "square"
    """Lattice of the tiles."""
    step_um: float | None = None
    """Distance between tile centres in um; None uses the width of a tile."""
    min_tissue: float = 0.2
    """Smallest share of tissue in a tile; 0 predicts the complete image."""

    def __post_init__(self) -> None:
        if self.shape not in ("square", "hexagonal"):
            raise ValueError(f"shape {self.shape!r}: no such lattice; give square or hexagonal")
        step = self.step_um
        if step is not None and not (isinstance(step, Real) and step > 0 and math.isfinite(step)):
            raise ValueError(
                f"`step_um` {self.step_um!r}: not a positive number; give the distance between tile centres in um"
            )
        if not (isinstance(self.min_tissue, Real) and 0 <= self.min_tissue <= 1):
            raise ValueError(f"`min_tissue` {self.min_tissue!r}: not a share of tissue; give a number from 0 to 1")


@dataclass(frozen=True)
class TileGrid:
    """N tiles on tissue, row by row."""

    xy_N2: np.ndarray
    """float64 centres, px of the slide."""
    array_N2: np.ndarray
    """int64 (column, row) on the lattice. On a hexagonal lattice, columns have steps of 2, as on Visium slides."""
    tissue_N: np.ndarray
    """float32 share of tissue in each tile."""


def tissue_grid(
    mask_HW: np.ndarray, size: tuple[int, int], mpp: float, tile_um: float, options: GridOptions
) -> TileGrid:
    """Return the tiles of a lattice with at least ``options.min_tissue`` tissue.

    The lattice begins half a step from the left and upper edges; along a side of the slide that is shorter than a step, the only
    tile is in the middle. Every second row of a hexagonal lattice is shifted by half a step.

    Parameters
    ----------
    mask_HW
        Tissue mask that covers the slide at a lower resolution.
    size
        (width, height) of the slide in px.
    mpp
        um per px of the slide.
    tile_um
        Width of a tile in um.
    options
        The lattice, and the smallest share of tissue.

    Raises
    ------
    ValueError
        The lattice has too many tiles.
    """
    step = (options.step_um or tile_um) / mpp
    hexagonal = options.shape == "hexagonal"
    row_step = step * (math.sqrt(3) / 2 if hexagonal else 1.0)
    n_tiles = size[0] * size[1] / (step * row_step)
    if n_tiles > MAX_TILES:
        raise ValueError(
            f"tiles every {step * mpp:g} um at {mpp:g} um per px would be {math.ceil(n_tiles):,} tiles, but at most "
            f"{MAX_TILES:,} are allowed; set a larger `step_um`, or check `mpp`"
        )
    height, width = mask_HW.shape
    total = np.zeros((height + 1, width + 1))
    total[1:, 1:] = mask_HW.cumsum(0, dtype=np.float64).cumsum(1)
    scale, half = (width / size[0], height / size[1]), tile_um / mpp / 2
    centres, cells, shares = [], [], []
    for row in range(math.ceil(size[1] / row_step)):
        y, shift = min(row_step, size[1]) / 2 + row * row_step, step / 2 if hexagonal and row % 2 else 0.0
        x = np.arange(min(step, size[0]) / 2 + shift, size[0], step)
        share = _share(total, x, y, half, scale)
        kept = np.flatnonzero((share >= options.min_tissue) & (y < size[1]))
        centres.append(np.column_stack([x[kept], np.full(kept.size, y)]))
        column = 2 * kept + row % 2 if hexagonal else kept
        cells.append(np.column_stack([column, np.full(kept.size, row)]))
        shares.append(share[kept].astype(np.float32))
    return TileGrid(np.concatenate(centres), np.concatenate(cells).astype(np.int64), np.concatenate(shares))


def _share(total: np.ndarray, x: np.ndarray, y: float, half: float, scale: tuple[float, float]) -> np.ndarray:
    """Return the share of tissue in squares around (x, y), from the summed-area table; the area outside the image has no tissue."""
    height, width = total.shape[0] - 1, total.shape[1] - 1
    x0, x1 = (_inner(x + side, scale[0], width) for side in (-half, half))
    y0, y1 = (_inner(np.array([y + side]), scale[1], height) for side in (-half, half))
    inside = _at(total, x1, y1) - _at(total, x0, y1) - _at(total, x1, y0) + _at(total, x0, y0)
    share: np.ndarray = inside / (4 * half * half * scale[0] * scale[1])
    return np.clip(share, 0.0, 1.0)


def _inner(value: np.ndarray, scale: float, limit: int) -> np.ndarray:
    return np.clip(value * scale, 0, limit)


def _at(total: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Interpolate the summed-area table linearly, so that squares smaller than a pixel of the mask get a share too."""
    x0, y0 = np.minimum(x.astype(int), total.shape[1] - 2), np.minimum(y.astype(int), total.shape[0] - 2)
    fx, fy = x - x0, y - y0
    top = total[y0, x0] * (1 - fx) + total[y0, x0 + 1] * fx
    bottom = total[y0 + 1, x0] * (1 - fx) + total[y0 + 1, x0 + 1] * fx
    out: np.ndarray = top * (1 - fy) + bottom * fy
    return out
