"""Pictures of sections: a small one is held in memory, a whole-slide image is read in windows, never whole.

:func:`open_slide` gives the same :class:`Slide` for both. Pixel (0, 0) covers [0, 1) x [0, 1): positions are px from
the image's edge, and a smaller copy of an image covers the same ground.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image

from comtip_shards.errors import SourceError
from comtip_shards.tiles import cut_windows, shrunk_size

MAX_IMAGE_PX = 1_000_000_000_000
"""Larger pictures are refused: nothing in this field is, and a hostile file may claim to be."""
MAX_WHOLE_PX = 1_000_000_000
"""Largest picture that is decoded whole, because its format (JPEG, PNG) leaves no choice."""
WINDOWED_PX = 100_000_000
"""A TIFF with more pixels is read in windows."""
BAND_PX = 16_000_000
"""Source pixels decoded at once when a large picture is shrunk."""
PLAUSIBLE_MPP = (0.05, 20.0)
"""um per px that a file's own resolution tag is believed for; 72 and 96 dpi are defaults of programs, not scales."""
BITS_PER_SAMPLE = 258
VENDOR_SUFFIXES = {".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi", ".dcm"}
EXTRA = "pip install 'comtip-fast[wsi]'"
Box = tuple[int, int, int, int]


def reading_order(xy_N2: np.ndarray, tile_px: float) -> np.ndarray:
    """Return the order in which to cut tiles: neighbours share blocks of the file, and row by row finds them decoded."""
    return np.lexsort((xy_N2[:, 0], np.round(xy_N2[:, 1] / max(tile_px, 1.0))))


class Slide(ABC):
    """A picture of known size whose windows can be read; a context manager."""

    path: Path
    size: tuple[int, int]
    """(width, height) in px."""
    mpp: float | None = None
    """um per px by the file's own tags, None where it has none that can be."""
    tile_limit_um: float = math.inf
    """Widest tile that can be cut. Where it is finite there are pixels round spots only, in ready-made patches."""
    reader: str = ""
    """What decodes it, with its version where that may change a pixel."""
    notes: list[str]

    @property
    def whole_size(self) -> tuple[int, int]:
        """(width, height) of the largest copy of the whole picture that can be read."""
        return self.size

    @abstractmethod
    def scaled(self, box: Box, size: tuple[int, int]) -> np.ndarray:
        """Read a window of the picture as it would be if it were shrunk as a whole.

        Parameters
        ----------
        box
            (x0, y0, x1, y1), px of the shrunk picture, inside it.
        size
            (width, height) of the shrunk picture, at most its own.

        Returns
        -------
        uint8 (y1 - y0, x1 - x0, 3) RGB.
        """

    def tiles(self, xy_N2: np.ndarray, mpp: float, tile_um: float, tile_px: int, min_mpp: float) -> np.ndarray:
        """Cut square tiles round positions.

        Parameters
        ----------
        xy_N2
            Centres, px of the picture.
        mpp
            Its um per px.
        tile_um, tile_px
            Width of a tile in um, and S.
        min_mpp
            A finer picture is blurred to this many um per px first.

        Returns
        -------
        uint8 (N, S, S, 3); white outside the picture.
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
        """Return the whole picture with its longer side at most ``max_px``, and its own px per px of that."""
        size, factor, _ = shrunk_size(self.size, 1.0, max(1.0, max(self.size) / max_px))
        return self.shrunk(size), factor

    def shrunk(self, size: tuple[int, int]) -> np.ndarray:
        """Return the whole picture shrunk to ``size``, uint8 RGB, decoded in bands."""
        width, height = size
        pixels_per_row = self.size[0] * self.size[1] / height
        rows = max(1, int(BAND_PX / pixels_per_row))
        out = np.empty((height, width, 3), np.uint8)
        for y in range(0, height, rows):
            stop = min(y + rows, height)
            out[y:stop] = self.scaled((0, y, width, stop), size)
        return out

    def whole(self) -> np.ndarray:
        """Return every pixel, uint8 (H, W, 3) RGB; refused for a picture that must be read in windows."""
        if self.size[0] * self.size[1] > MAX_WHOLE_PX:
            raise SourceError(
                f"{self.path}: {self.size[0]} x {self.size[1]} px do not belong in memory; read windows or an overview"
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
    """A picture in memory."""

    def __init__(self, pixels_HW3: np.ndarray, path: Path, *, mpp: float | None = None, reader: str = "") -> None:
        self.pixels, self.path, self.mpp, self.reader = pixels_HW3, path, mpp, reader
        self.size = (pixels_HW3.shape[1], pixels_HW3.shape[0])
        self.notes = []
        self._shrunk: tuple[tuple[int, int], np.ndarray] = (self.size, pixels_HW3)

    def scaled(self, box: Box, size: tuple[int, int]) -> np.ndarray:
        """Read a window; the shrunk picture is made once and kept."""
        if self._shrunk[0] != size:
            small = Image.fromarray(self.pixels).resize(size, Image.Resampling.LANCZOS)
            self._shrunk = (size, self.pixels if size == self.size else np.asarray(small))
        x0, y0, x1, y1 = box
        return self._shrunk[1][y0:y1, x0:x1]

    def shrunk(self, size: tuple[int, int]) -> np.ndarray:
        """Return the whole picture shrunk to ``size``."""
        return self.scaled((0, 0, *size), size)

    def close(self) -> None:
        """Do nothing: no file is open."""


def open_slide(path: Path) -> Slide:
    """Open the picture of a section, whatever its format.

    Large TIFFs and scanner formats are read in windows, which needs the extra ``wsi`` (tifffile and zarr, or
    openslide); other pictures are decoded whole by Pillow.

    Raises
    ------
    SourceError
        Not a picture, damaged, absurdly large, or in need of a package that is not installed.
    """
    if not path.is_file():
        raise SourceError(f"{path}: no such image")
    if path.suffix.lower() in VENDOR_SUFFIXES or not _is_plain(path):
        from comtip_shards.wsi import open_windowed

        return open_windowed(path)
    return _open_plain(path)


def image_size(path: Path) -> tuple[int, int]:
    """Return (width, height), where possible without decoding; refuses what is no image."""
    if not path.is_file():
        raise SourceError(f"{path}: no such image")
    if path.suffix.lower() in VENDOR_SUFFIXES or not _is_plain(path):
        with open_slide(path) as slide:
            return slide.size
    try:
        with Image.open(path) as image:
            return _checked((int(image.width), int(image.height)), path)
    except (OSError, Image.DecompressionBombError, ValueError) as error:
        raise SourceError(f"{path}: not an image that can be read ({error})") from error


def mpp_by_tag(path: Path, notes: list[str]) -> float | None:
    """Return um per px by a picture's own resolution tag, and say so in ``notes``; None where it has none to believe."""
    if path.suffix.lower() in VENDOR_SUFFIXES or not _is_plain(path):
        with open_slide(path) as slide:
            mpp = slide.mpp
    else:
        try:
            with Image.open(path) as image:
                mpp = _mpp_of_dpi(image)
        except (OSError, Image.DecompressionBombError, ValueError) as error:
            raise SourceError(f"{path}: not an image that can be read ({error})") from error
    if mpp is not None:
        notes.append(f"scale from the resolution tag of {path.name}: {mpp:g} um per px")
    return mpp


def load_rgb(path: Path) -> np.ndarray:
    """Return an image as uint8 (H, W, 3) RGB."""
    with open_slide(path) as slide:
        return slide.whole()


def _is_plain(path: Path) -> bool:
    """Tell whether Pillow decodes the picture rightly and in bounded memory."""
    _allow_large()
    try:
        with Image.open(path) as image:
            if image.format != "TIFF":
                return True
            # Channels may be pages of their own, values may have 16 bits: Pillow would show one page, or clip.
            if set(image.tag_v2.get(BITS_PER_SAMPLE, (1,))) - {1, 8}:  # type: ignore[attr-defined]
                return False
            colour = image.mode in {"RGB", "RGBA", "P", "CMYK", "YCbCr", "LAB"}
            gray = image.mode in {"1", "L", "LA"} and getattr(image, "n_frames", 1) == 1
            return (colour or gray) and image.width * image.height <= WINDOWED_PX
    except (OSError, Image.DecompressionBombError, ValueError):
        with path.open("rb") as file:
            tiff = file.read(4) in {b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"}
        return not tiff


def _open_plain(path: Path) -> Slide:
    try:
        with Image.open(path) as image:
            size = _checked((int(image.width), int(image.height)), path)
            if size[0] * size[1] > MAX_WHOLE_PX:
                raise SourceError(
                    f"{path}: {size[0]} x {size[1]} px in {image.format}, which can only be decoded whole; convert it to a "
                    "tiled TIFF, e.g. vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg"
                )
            mpp, pixels = _mpp_of_dpi(image), _flatten(image)
    except (OSError, Image.DecompressionBombError, ValueError) as error:
        raise SourceError(f"{path}: not an image that can be read, or it is truncated or damaged ({error})") from error
    return ArraySlide(pixels, path, mpp=mpp, reader="Pillow")


def _mpp_of_dpi(image: Image.Image) -> float | None:
    dpi = image.info.get("dpi")
    return plausible_mpp(25_400 / float(dpi[0]) if dpi and dpi[0] else None)


def _flatten(image: Image.Image) -> np.ndarray:
    """Return uint8 RGB; what is transparent shows white, as on glass, and 16 bits become 8."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        return to_rgb8(values[..., None], peak_of(values))
    if image.mode in {"RGBA", "LA", "PA"} or (image.mode == "P" and "transparency" in image.info):
        clear = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return np.asarray(Image.alpha_composite(clear, image.convert("RGBA")).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def to_rgb8(values_HWC: np.ndarray, peak: float, *, alpha: bool = False) -> np.ndarray:
    """Return uint8 RGB of gray (C = 1 or 2) or colour (C = 3 or 4) values.

    Parameters
    ----------
    values_HWC
        Any real dtype.
    peak
        The value that is white, see :func:`peak_of`.
    alpha
        The last channel is opacity: what is transparent shows white. Otherwise a fourth channel is left out.
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
    """Return the value that is white: the least of 1, 255, 4095 (12 bits) and 65535 that nothing exceeds.

    1 is for floating point only, and what a filter rings may exceed it. A camera writes 12 bits into 16: taken as 16
    bits, its picture would be black.
    """
    if values.dtype == np.uint8:
        return 255.0
    if values.dtype == np.bool_:
        return 1.0
    high = float(values.max(initial=0))
    for peak in (1.0, 255.0, 4095.0, 65535.0):
        if (high <= peak and peak > 1) or (high <= 1.02 and np.issubdtype(values.dtype, np.floating)):
            return peak
    raise SourceError(f"pixel values up to {high:g} are of no known depth; convert the image to 8 or 16 bits")


def plausible_mpp(mpp: float | None) -> float | None:
    """Return um per px rounded to 6 digits, None where no microscope makes such a picture."""
    if mpp is None or not math.isfinite(mpp) or not PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1]:
        return None
    return round(mpp, 6)


def _checked(size: tuple[int, int], path: Path) -> tuple[int, int]:
    if size[0] * size[1] > MAX_IMAGE_PX or min(size) < 1:
        raise SourceError(f"{path}: {size[0]} x {size[1]} px cannot be a section; is the file damaged?")
    return size


def _allow_large() -> None:
    # Pillow's own limit is for web pages; sections are larger, and the limits above guard instead.
    Image.MAX_IMAGE_PIXELS = None
