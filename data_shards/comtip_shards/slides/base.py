"""Slide interface: windowed reading of a section image at any scale; in-memory slides; pixel depth and scale.

Pixel (0, 0) covers [0, 1) x [0, 1): positions are px from the image's edge, and a downsampled image covers the same area.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image

from comtip_shards.errors import SourceError
from comtip_shards.slides.tiles import cut_windows, shrunk_size

MAX_IMAGE_PX = 1_000_000_000_000
"""Maximum image size in pixels; no section image is larger, but a hostile file may claim to be."""
MAX_WHOLE_PX = 1_000_000_000
"""Maximum size of an image that must be decoded completely (JPEG, PNG)."""
BAND_PX = 16_000_000
"""Source pixels decoded at once when a large image is downsampled."""
UNITS_UM = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "Å": 1e-4}
"""Units of OME-XML in um; others, such as ``pixel``, state no scale."""
PLAUSIBLE_MPP = (0.05, 20.0)
"""um per px for which a file's resolution tag is trusted; 72 and 96 dpi are defaults of programs, not scales."""
EXTRA = "pip install 'comtip-fast[wsi]'"
Box = tuple[int, int, int, int]


def reading_order(xy_N2: np.ndarray, tile_px: float) -> np.ndarray:
    """Return a row-by-row order in which to cut tiles, so that neighbouring tiles share decoded blocks of the file."""
    return np.lexsort((xy_N2[:, 0], np.round(xy_N2[:, 1] / max(tile_px, 1.0))))


class Slide(ABC):
    """An image of known size that is read in windows; a context manager."""

    path: Path
    size: tuple[int, int]
    """(width, height) in px."""
    mpp: float | None = None
    """um per px from the file's tags, None if it has no plausible one."""
    tile_limit_um: float = math.inf
    """Maximum tile width; finite if only precomputed patches around the spots are available."""
    reader: str = ""
    """Library that decodes the image, with its version if that may change pixels."""
    notes: list[str]

    @property
    def whole_size(self) -> tuple[int, int]:
        """(width, height) of the highest resolution at which the complete image can be read."""
        return self.size

    @abstractmethod
    def scaled(self, box: Box, size: tuple[int, int]) -> np.ndarray:
        """Read a window of the downsampled image.

        Parameters
        ----------
        box
            (x0, y0, x1, y1), px of the downsampled image, inside it.
        size
            (width, height) of the downsampled image, at most that of the original.

        Returns
        -------
        uint8 (y1 - y0, x1 - x0, 3) RGB.
        """

    def tiles(self, xy_N2: np.ndarray, mpp: float, tile_um: float, tile_px: int, min_mpp: float) -> np.ndarray:
        """Cut square tiles around positions.

        Parameters
        ----------
        xy_N2
            Centres, px of the image.
        mpp
            um per px of the image.
        tile_um, tile_px
            Width of a tile in um and in px (S).
        min_mpp
            A finer image is downsampled to this many um per px first.

        Returns
        -------
        uint8 (N, S, S, 3); white outside the image.
        """
        out = np.empty((len(xy_N2), tile_px, tile_px, 3), np.uint8)
        order = reading_order(xy_N2, tile_um / mpp)
        for i, tile in zip(order, self.iter_tiles(xy_N2[order], mpp, tile_um, tile_px, min_mpp), strict=True):
            out[i] = tile
        return out

    def iter_tiles(
        self, xy_N2: np.ndarray, mpp: float, tile_um: float, tile_px: int, min_mpp: float
    ) -> Iterator[np.ndarray]:
        """Yield the tiles of :meth:`tiles` one by one, in the order of ``xy_N2``."""
        size, small_mpp, scale = shrunk_size(self.size, mpp, min_mpp)
        yield from cut_windows(
            lambda box: self.scaled(box, size), size, np.asarray(xy_N2) * scale, tile_um / small_mpp, tile_px
        )

    def overview(self, max_px: int) -> tuple[np.ndarray, float]:
        """Return the image with its longer side at most ``max_px``, and the downsampling factor."""
        size, factor, _ = shrunk_size(self.size, 1.0, max(1.0, max(self.size) / max_px))
        return self.shrunk(size), factor

    def shrunk(self, size: tuple[int, int]) -> np.ndarray:
        """Return the image downsampled to ``size``, uint8 RGB, decoded in bands."""
        width, height = size
        pixels_per_row = self.size[0] * self.size[1] / height
        rows = max(1, int(BAND_PX / pixels_per_row))
        out = np.empty((height, width, 3), np.uint8)
        for y in range(0, height, rows):
            stop = min(y + rows, height)
            out[y:stop] = self.scaled((0, y, width, stop), size)
        return out

    def whole(self) -> np.ndarray:
        """Return all pixels, uint8 (H, W, 3) RGB.

        Raises
        ------
        SourceError
            The image is too large for memory.
        """
        if self.size[0] * self.size[1] > MAX_WHOLE_PX:
            raise SourceError(
                f"{self.path}: {self.size[0]} x {self.size[1]} px are too many to load; read windows or an overview"
            )
        return self.shrunk(self.size)

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    def __enter__(self) -> Slide:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ArraySlide(Slide):
    """An image in memory."""

    def __init__(self, pixels_HW3: np.ndarray, path: Path, *, mpp: float | None = None, reader: str = "") -> None:
        self.pixels, self.path, self.mpp, self.reader = pixels_HW3, path, mpp, reader
        self.size = (pixels_HW3.shape[1], pixels_HW3.shape[0])
        self.notes = []
        self._shrunk: tuple[tuple[int, int], np.ndarray] = (self.size, pixels_HW3)

    def scaled(self, box: Box, size: tuple[int, int]) -> np.ndarray:
        """Read a window; the downsampled image is computed once and cached."""
        if self._shrunk[0] != size:
            small = Image.fromarray(self.pixels).resize(size, Image.Resampling.LANCZOS)
            self._shrunk = (size, self.pixels if size == self.size else np.asarray(small))
        x0, y0, x1, y1 = box
        return self._shrunk[1][y0:y1, x0:x1]

    def shrunk(self, size: tuple[int, int]) -> np.ndarray:
        """Return the image downsampled to ``size``."""
        return self.scaled((0, 0, *size), size)

    def close(self) -> None:
        """Do nothing: no file is open."""


def to_rgb8(values_HWC: np.ndarray, peak: float, *, alpha: bool = False) -> np.ndarray:
    """Convert grey (C = 1 or 2) or colour (C = 3 or 4) values to uint8 RGB.

    Parameters
    ----------
    values_HWC
        Any real dtype.
    peak
        The value of white, see :func:`peak_of`.
    alpha
        Whether the last channel is opacity, with transparent pixels shown white. Otherwise a fourth channel is dropped.
    """
    values = values_HWC
    if values.dtype != np.uint8 or peak != 255:
        values = np.clip(np.rint(values * (255.0 / peak)), 0, 255).astype(np.uint8)
    colour, opacity = values, None
    if values.shape[2] in (2, 4):
        colour, opacity = values[..., :-1], values[..., -1:]
    if alpha and opacity is not None:
        part = opacity.astype(np.float32) / 255
        colour = np.rint(colour * part + 255 * (1 - part)).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(colour, (*colour.shape[:2], 3)))


def peak_of(values: np.ndarray) -> float:
    """Return the value of white: the smallest of 1, 255, 4095 (12 bits) and 65535 that no pixel exceeds.

    1 is used for floating point only, and may be slightly exceeded because filters overshoot. Cameras store 12 bits in 16;
    scaled as 16 bits, such an image would be black.

    Raises
    ------
    SourceError
        Values exceed 65535.
    """
    if values.dtype == np.uint8:
        return 255.0
    if values.dtype == np.bool_:
        return 1.0
    high = float(values.max(initial=0))
    for peak in (1.0, 255.0, 4095.0, 65535.0):
        if (high <= peak and peak > 1) or (high <= 1.02 and np.issubdtype(values.dtype, np.floating)):
            return peak
    raise SourceError(f"pixel values up to {high:g} have no known depth; convert the image to 8 or 16 bits")


def plausible_mpp(mpp: float | None) -> float | None:
    """Return um per px rounded to 6 digits, None if it is outside :data:`PLAUSIBLE_MPP`."""
    if mpp is None or not math.isfinite(mpp) or not PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1]:
        return None
    return round(mpp, 6)


def ome_mpp(xml: str) -> float | None:
    """Return um per px from the first ``Pixels`` element of OME-XML; None if it is absent or in an unknown unit."""
    pixels = re.search(r"<(?:\w+:)?Pixels\b([^>]*)>", xml)
    attributes = dict(re.findall(r"(\w+)\s*=\s*[\"']([^\"']*)[\"']", pixels[1])) if pixels else {}
    factor = UNITS_UM.get(attributes.get("PhysicalSizeXUnit", "µm").replace("&#181;", "µ").replace("&#xB5;", "µ"))
    try:
        return plausible_mpp(float(attributes["PhysicalSizeX"]) * factor) if factor else None
    except (KeyError, ValueError):
        return None
