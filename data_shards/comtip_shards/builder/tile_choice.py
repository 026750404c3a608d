"""Choice of a set's tile, and the cost of a common scale for each section.

The default is the usual tile of the field, 112 um in 224 px, 0.5 um per px (20x), as in HEST-1k and the encoders trained on it;
if the images are coarser, the nearest resolution that they have. All tiles of a set have one width in um and in px, and no
section is finer than ``min_mpp``, so that a model cannot distinguish sections by their scanner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from comtip_shards.errors import SourceError
from comtip_shards.format import record
from comtip_shards.format.manifest import TileSpec
from comtip_shards.slides.tiles import FIELD_PX, FIELD_UM

PX_STEP = 32
"""A default width in px is a multiple of this, and so of the usual patch sizes (8, 16, 32)."""
ALIKE = 1.05
"""Largest ratio of um per px of sections that count as equally scaled."""
MOST_UPSAMPLED = 2.0
"""Largest number of px of a tile for one px of the image, along a side, that is not reported."""
CHANGE = "`tile_um`, `tile_px` and `min_mpp` change this; a section of another scale can be built into another set"


class Scaled(Protocol):
    """A section with a scale, such as :class:`comtip_shards.sections.section.SectionMeta`."""

    @property
    def section_id(self) -> str:
        """Name of the section."""

    @property
    def mpp(self) -> float:
        """Scale of the section's image in um per px."""


def choose_tile(
    sections: Sequence[Scaled],
    *,
    px: int | None = None,
    um: float | None = None,
    min_mpp: float | None = None,
    codec: str = "jpeg",
    quality: int = 95,
) -> TileSpec:
    """Return the tile of a set; arguments that are None are derived from the scales of the sections' images.

    Parameters
    ----------
    sections
        All sections of the set.
    px, um
        Width in px and in um. Default: 112 um, in the smallest multiple of 32 px whose um per px is at most that of the
        coarsest image (within 5 %), but at most 224 px.
    min_mpp
        Finer images are downsampled to this many um per px. For the default, each image counts with its own um per px or
        that of the tile, whichever is coarser. If these values differ by more than 5 %, the default is the coarsest of them,
        otherwise the finest.
    codec, quality
        Encoding of the tiles.

    Raises
    ------
    SourceError
        A value is out of range, or ``codec`` is unknown.
    """
    um = FIELD_UM if um is None else um
    check_tile(TileSpec(FIELD_PX if px is None else px, float(um), FIELD_UM / FIELD_PX, codec, quality))
    scales = [s.mpp for s in sections] or [um / FIELD_PX]
    if px is None:
        coarsest = max(scales)
        px = min(FIELD_PX, PX_STEP * max(1, math.ceil(um / (ALIKE * coarsest) / PX_STEP)))
    if min_mpp is None:
        fine, coarse = _seen(scales, um / px)
        min_mpp = fine if coarse <= ALIKE * fine else coarse
    return check_tile(TileSpec(px, float(um), round(float(min_mpp), 6), codec, quality))


def _seen(scales: Sequence[float], tile_mpp: float) -> tuple[float, float]:
    """Return the finest and the coarsest um per px that a tile of ``tile_mpp`` um per px shows."""
    seen = [max(mpp, tile_mpp) for mpp in scales]
    return min(seen), max(seen)


def check_tile(tile: TileSpec) -> TileSpec:
    """Return the tile; raises :class:`SourceError` if a value is out of range or the codec is unknown."""
    if tile.codec not in record.CODECS:
        raise SourceError(f"`codec` {tile.codec!r} is unknown; use {', '.join(record.CODECS)}")
    if not 1 <= tile.quality <= 100:
        raise SourceError(f"`quality` {tile.quality} is out of range; use 1 to 100")
    if not 8 <= tile.px <= 4096:
        raise SourceError(f"`tile_px` {tile.px} is out of range; use 8 to 4096")
    if not 1 <= tile.um <= 10_000:
        raise SourceError(f"`tile_um` {tile.um:g} is out of range; use 1 to 10000")
    if not 0 < tile.min_mpp <= 100:
        raise SourceError(f"`min_mpp` {tile.min_mpp:g} is out of range; use a value above 0 and at most 100")
    return tile


def scale_cost(section: Scaled, tile: TileSpec) -> str | None:
    """Return what the tile costs a section: resolution that the image has and the set loses, or tiles that are upsampled.

    ``None`` if the tile keeps the image's resolution within 5 %, with at most :data:`MOST_UPSAMPLED` px for one px of the image along a
    side, or if the image is only downsampled to the tile's own um per px, and this is at most that of the default tile (0.5, within 5 %).
    """
    tile_mpp = tile.um / tile.px
    kept = max(tile_mpp, tile.min_mpp)
    if section.mpp > ALIKE * kept:
        return f"{section.mpp:.3g} um/px, coarser than the set's {kept:.3g}: its tiles are upsampled"
    blurred = tile.min_mpp / max(section.mpp, tile_mpp)
    if blurred > ALIKE:
        return (
            f"{section.mpp:.3g} um/px, blurred to {tile.min_mpp:.3g}: one resolved px covers {blurred**2:.1f} px of the tile"
            if section.mpp <= tile_mpp
            else f"{section.mpp:.3g} um/px, blurred to {tile.min_mpp:.3g}: one px of the set covers {blurred**2:.1f} of the image"
        )
    if tile_mpp > ALIKE * max(section.mpp, FIELD_UM / FIELD_PX):
        return f"{section.mpp:.3g} um/px, resampled to the tile's {tile_mpp:.3g}: finer detail is lost"
    if section.mpp > MOST_UPSAMPLED * tile_mpp:
        return f"{section.mpp:.3g} um/px: one px of the image covers {(section.mpp / tile_mpp) ** 2:.1f} px of the tile"
    return None


def tile_text(sections: Sequence[Scaled], tile: TileSpec) -> list[str]:
    """Return lines that state the tile geometry and the sections that lose resolution or are upsampled."""
    costs = {s.section_id: scale_cost(s, tile) for s in sections}
    lines = [
        f"tiles of {tile.um:g} um in {tile.px} px ({tile.um / tile.px:.3g} um/px), images not finer than {tile.min_mpp:g} um/px"
    ]
    lines += [f"  {name}: {cost}" for name, cost in costs.items() if cost is not None]
    if len(lines) > 1:
        lines.append(f"  {CHANGE}")
    return lines
