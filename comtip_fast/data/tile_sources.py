"""Tiles of one section, read in chunks so that memory does not grow with the number of spots."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from comtip_shards import ShardSet
from comtip_shards.slides.base import Slide, reading_order

from comtip_fast.data.loaders.prefetch import Prefetcher

TILES_PER_CHUNK = 128
CHUNKS_AHEAD = 2
"""Largest number of chunks that are read ahead."""


@dataclass(frozen=True)
class TileGeometry:
    """Size and resolution of a model's tiles."""

    px: int
    """Width of a tile in px, S."""
    um: float
    """Width of a tile in um."""
    min_mpp: float
    """um per px to which finer images are downsampled before tiles are cut."""


class TileChunk(NamedTuple):
    """A chunk of n tiles of a section."""

    rows: np.ndarray
    """int64 (n,), indices of the spots."""
    tiles_NSS3: np.ndarray
    """uint8 (n, S, S, 3)."""


class TileSource(ABC):
    """Tiles of N spots, which every call of :meth:`chunks` reads again."""

    tile_px: int
    """Width of a tile in px, S."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of tiles."""

    @abstractmethod
    def chunks(self, size: int = TILES_PER_CHUNK) -> Iterator[TileChunk]:
        """Yield every tile once, at most ``size`` at a time, in an order that is fast to read."""

    def ahead(self, size: int = TILES_PER_CHUNK) -> Iterator[TileChunk]:
        """Yield the chunks of :meth:`chunks`, read ahead in a background thread."""
        reader = Prefetcher(self.chunks(size), CHUNKS_AHEAD)
        try:
            yield from reader
        finally:
            reader.stop()

    def all(self) -> np.ndarray:
        """Return all tiles in the order of the spots, uint8 (N, S, S, 3)."""
        out = np.empty((len(self), self.tile_px, self.tile_px, 3), np.uint8)
        for rows, tiles in self.chunks():
            out[rows] = tiles
        return out


class ArrayTiles(TileSource):
    """Tiles in memory, uint8 (N, S, S, 3)."""

    def __init__(self, tiles_NSS3: np.ndarray) -> None:
        self._tiles, self.tile_px = tiles_NSS3, tiles_NSS3.shape[1]

    def __len__(self) -> int:
        return len(self._tiles)

    def chunks(self, size: int = TILES_PER_CHUNK) -> Iterator[TileChunk]:
        """Yield the tiles in the order of the spots."""
        for start in range(0, len(self), size):
            tiles = np.asarray(self._tiles[start : start + size])
            yield TileChunk(np.arange(start, start + len(tiles)), tiles)


class ShardTiles(TileSource):
    """Tiles of a shard set.

    Parameters
    ----------
    shards
        The shard set.
    spots
        int64 (N,), indices of the spots in the set.
    """

    def __init__(self, shards: ShardSet, spots: np.ndarray) -> None:
        self._shards, self._spots, self.tile_px = shards, np.asarray(spots, np.int64), shards.manifest.tile.px

    def __len__(self) -> int:
        return int(self._spots.size)

    def chunks(self, size: int = TILES_PER_CHUNK) -> Iterator[TileChunk]:
        """Decode the tiles in the order of the spots."""
        for start in range(0, len(self), size):
            part = self._spots[start : start + size]
            yield TileChunk(np.arange(start, start + part.size), self._shards.tiles(part))


class SlideTiles(TileSource):
    """Tiles cut from a slide, which is opened for each pass.

    Parameters
    ----------
    open_slide
        Returns a context that opens the slide; ``lambda: nullcontext(slide)`` uses a slide that is already open.
    xy_N2
        Centres of the tiles (N, 2), x and y in px of the slide.
    mpp
        um per px of the slide.
    tile
        Geometry of the tiles.
    """

    def __init__(
        self, open_slide: Callable[[], AbstractContextManager[Slide]], xy_N2: np.ndarray, mpp: float, tile: TileGeometry
    ) -> None:
        self._open, self._xy, self._mpp, self._tile = open_slide, np.asarray(xy_N2, np.float64), mpp, tile
        self.tile_px = tile.px

    def __len__(self) -> int:
        return len(self._xy)

    def chunks(self, size: int = TILES_PER_CHUNK) -> Iterator[TileChunk]:
        """Cut the tiles row by row, so that neighbouring tiles share decoded blocks of the file."""
        tile, order = self._tile, reading_order(self._xy, self._tile.um / self._mpp)
        with self._open() as slide:
            cut = slide.iter_tiles(self._xy[order], self._mpp, tile.um, tile.px, tile.min_mpp)
            for start in range(0, len(self), size):
                rows = order[start : start + size]
                tiles = np.empty((rows.size, tile.px, tile.px, 3), np.uint8)
                for i in range(rows.size):
                    tiles[i] = next(cut)
                yield TileChunk(rows, tiles)
