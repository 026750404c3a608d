"""Interface for windowed reading of a section image at any scale, its implementation in memory, and limits on image sizes.

Pixel (0, 0) covers [0, 1) x [0, 1): positions are px from the image's edge, and a downsampled image covers the same area.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image

from comtip_shards.errors import SourceError
from comtip_shards.slides.tiles import cut_windows, shrunk_size

MAX_IMAGE_PX = 100_000_000_000
"""Maximum image size in pixels; no section image is larger, but a hostile file may claim to be."""
MAX_WHOLE_PX = 1_000_000_000
"""Maximum size of an image that must be decoded completely (JPEG, PNG)."""
MAX_WHOLE_ENV = "COMTIP_MAX_IMAGE_PX"
"""Environment variable that replaces :data:`MAX_WHOLE_PX` and turns off :data:`MAX_EXPANSION`, for files of known origin."""
MAX_EXPANSION = 200
"""Maximum ratio of decoded bytes to bytes of the file; tissue compresses to about 1/30, a decompression bomb to 1/1000."""
BOMB_PX = 100_000_000
"""Images of at most this many pixels are decoded at any ratio."""
BAND_PX = 16_000_000
"""Source pixels decoded at once when a large image is downsampled."""
Box = tuple[int, int, int, int]


def whole_limit() -> int:
    """Return the maximum number of pixels of an image that is decoded completely.

    Raises
    ------
    SourceError
        The environment variable :data:`MAX_WHOLE_ENV` is not a positive integer.
    """
    stated = os.environ.get(MAX_WHOLE_ENV)
    if stated is None:
        return MAX_WHOLE_PX
    if not (stated.isascii() and stated.isdigit() and int(stated) > 0):
        raise SourceError(f"{MAX_WHOLE_ENV}={stated!r}: expected a positive number of pixels; correct or unset it")
    return int(stated)


def check_image_size(size: tuple[int, int], path: Path) -> tuple[int, int]:
    """Return ``size``, (width, height) in px, after checking that a section image can have it.

    Raises
    ------
    SourceError
        A side is 0, or there are more than :data:`MAX_IMAGE_PX` pixels.
    """
    if size[0] * size[1] > MAX_IMAGE_PX or min(size) < 1:
        raise SourceError(
            f"{path}: {size[0]} x {size[1]} px is not the size of a section (at most {MAX_IMAGE_PX:,} px); check that the "
            "file is not damaged"
        )
    return size


def check_whole_size(size: tuple[int, int], path: Path, what: str, file_bytes: int | None = None) -> None:
    """Check the size of an image that can only be decoded whole, before it is decoded.

    Parameters
    ----------
    size
        (width, height) that the header states.
    path
        The file, for messages.
    what
        Where the pixels are, such as ``in PNG``, for messages.
    file_bytes
        Size of the file, None to skip the check of the compression ratio.

    Raises
    ------
    SourceError
        There are more pixels than :func:`whole_limit`; or more than :data:`BOMB_PX` pixels whose decoded bytes exceed
        :data:`MAX_EXPANSION` times the bytes of the file, unless :data:`MAX_WHOLE_ENV` is set; or this variable is not a
        positive integer.
    """
    width, height = size
    limit, fix = (
        whole_limit(),
        "convert it to a tiled TIFF, e.g. vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg",
    )
    if width * height > limit:
        raise SourceError(
            f"{path}: {width} x {height} px {what}, which can only be decoded whole; {fix}, or set {MAX_WHOLE_ENV} (now "
            f"{limit:,} px) if there is memory for it"
        )
    trusted = MAX_WHOLE_ENV in os.environ or width * height <= BOMB_PX or file_bytes is None
    if not trusted and 3 * width * height > MAX_EXPANSION * file_bytes:  # type: ignore[operator]
        raise SourceError(
            f"{path}: claims {width} x {height} px {what}, which decode to more than {MAX_EXPANSION} times the {file_bytes:,} bytes "
            f"of the file, as a decompression bomb does; get the file again, or set {MAX_WHOLE_ENV} to at least {width * height} "
            "if its origin is known"
        )


def reading_order(xy_N2: np.ndarray, tile_px: float) -> np.ndarray:
    """Return an order, int64 (N,), that cuts tiles row by row, so that neighbouring tiles share decoded blocks of the file."""
    return np.lexsort((xy_N2[:, 0], np.round(xy_N2[:, 1] / max(tile_px, 1.0))))


class Slide(ABC):
    """An image that is read in windows; use it as a context manager, or close it."""

    path: Path
    """The file, for messages."""
    size: tuple[int, int]
    """(width, height) in px."""
    mpp: float | None = None
    """um per px from the file's tags, None if they state no plausible scale."""
    tile_limit_um: float = math.inf
    """Maximum tile width; finite if only precomputed patches around the spots are available."""
    reader: str = ""
    """Library that decodes the image, with its version if that may change pixels."""
    notes: list[str]
    """Remarks on how the image is read, for the manifest."""

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
            (x0, y0, x1, y1), in px of the downsampled image and inside it.
        size
            (width, height) of the downsampled image, at most that of the original.

        Returns
        -------
        uint8 (y1 - y0, x1 - x0, 3) RGB.

        Raises
        ------
        SourceError
            The pixels cannot be decoded.
        """

    def tiles(self, xy_N2: np.ndarray, mpp: float, tile_um: float, tile_px: int, min_mpp: float) -> np.ndarray:
        """Cut square tiles around positions.

        Parameters
        ----------
        xy_N2
            Centres, float (N, 2), x and y in px of the image.
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
        """Return the image, uint8 (H, W, 3), with its longer side at most ``max_px``, and the downsampling factor (>= 1)."""
        size, factor, _ = shrunk_size(self.size, 1.0, max(1.0, max(self.size) / max_px))
        return self.shrunk(size), factor

    def shrunk(self, size: tuple[int, int]) -> np.ndarray:
        """Return the image downsampled to ``size``, (width, height), as uint8 (H, W, 3); decoded in bands to bound memory."""
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
            The image has more than :data:`MAX_WHOLE_PX` pixels, or cannot be decoded.
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
        """Read a window; the downsampled image is cached until another ``size`` is read."""
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
