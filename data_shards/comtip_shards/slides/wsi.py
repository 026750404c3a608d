"""Windowed reading of whole-slide images: TIFF (BigTIFF, OME, pyramids) with tifffile, scanner formats with openslide.

Both packages are optional (extra ``wsi``). A window is read from the coarsest pyramid level that is fine enough and then
downsampled with an anti-aliasing filter.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import OrderedDict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from comtip_shards.errors import SourceError, install_extra
from comtip_shards.not_data import not_data
from comtip_shards.slides.base import Box, Slide, check_image_size
from comtip_shards.slides.colour import (
    PREMULTIPLIED_ALPHA,
    STRAIGHT_ALPHA,
    Decode,
    peak_of,
    tiff_decoder,
    to_rgb8,
)
from comtip_shards.slides.pixel_scale import square_mpp, tiff_mpp
from comtip_shards.slides.tiff_tags import check_tiff_tags

CACHE_BYTES = 192 << 20
"""Size in bytes of the cache of decoded blocks, per open slide."""
MAX_BLOCK_BYTES = 512 << 20
"""Maximum decoded size in bytes of a block; a file with larger blocks is refused."""
MAPPED_BLOCK = 1024
"""Width in px of the blocks in which a memory-mapped level is read."""
PEAK_WINDOWS = 400
"""Maximum number of windows of 1024 px, evenly spaced, in which the depth of 16-bit values is determined."""
LANCZOS_SUPPORT = 3
"""Support of the resampling filter, in px of the downsampled image."""
RETILE = "convert it, e.g. vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg --bigtiff"


def open_windowed(path: Path) -> Slide:
    """Open an image for windowed reading.

    Raises
    ------
    SourceError
        Neither package can read the image, it is damaged or too large, or the required package is not installed.
    """
    check_tiff_tags(path)
    openslide = _optional("openslide")
    vendor = openslide.OpenSlide.detect_format(str(path)) if openslide else None
    if openslide and scanner_format(path) is not None:
        return OpenSlideSlide(path, openslide)
    tried = [] if openslide else ["openslide-python is not installed"]
    tifffile = _optional("tifffile")
    if tifffile and _optional("zarr"):
        try:
            return TiffSlide(path, tifffile)
        except SourceError:
            raise
        except Exception as error:  # tifffile raises many kinds of errors on damaged headers
            tried.append(f"tifffile: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    else:
        tried.append("tifffile or zarr is not installed")
    if openslide and vendor:
        return OpenSlideSlide(path, openslide)
    reason = not_data(path)
    if reason is not None:
        raise SourceError(f"{path}: {reason}")
    missing = any("not installed" in t for t in tried)
    fix = install_extra("wsi") if missing else f"check that it is a complete image; if so, {RETILE}"
    raise SourceError(f"{path}: cannot be read as a slide ({'; '.join(tried)}); {fix}")


def scanner_format(path: Path) -> str | None:
    """Return the scanner format that openslide detects; None for other images, or if openslide is not installed."""
    openslide = _optional("openslide")
    vendor = openslide.OpenSlide.detect_format(str(path)) if openslide else None
    return None if vendor == "generic-tiff" else vendor


def orientation_note(orientation: object, path: Path) -> list[str]:
    """Return a note if an image has an orientation tag, which is not applied: positions are px of the stored image."""
    if orientation in (0, 1, None):
        return []
    return [f"{path.name}: orientation tag {orientation} is ignored; positions are px of the image as stored"]


def _optional(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        return None


class PyramidSlide(Slide):
    """An image stored at several resolutions."""

    levels: list[tuple[int, int]]
    """(width, height) of each level, finest first."""

    @abstractmethod
    def _read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Return a window inside a level, uint8 RGB."""

    def scaled(self, box: Box, size: tuple[int, int]) -> np.ndarray:
        """Read a window of the downsampled image from the coarsest level that is fine enough."""
        level = self._level_for(size[0])
        lw, lh = self.levels[level]
        x0, y0, x1, y1 = box
        if (lw, lh) == size:
            return self._read(level, x0, y0, x1 - x0, y1 - y0)
        fx, fy = lw / size[0], lh / size[1]
        left, top = max(0, math.floor((x0 - LANCZOS_SUPPORT) * fx)), max(0, math.floor((y0 - LANCZOS_SUPPORT) * fy))
        right = min(lw, math.ceil((x1 + LANCZOS_SUPPORT) * fx))
        bottom = min(lh, math.ceil((y1 + LANCZOS_SUPPORT) * fy))
        window = Image.fromarray(self._read(level, left, top, right - left, bottom - top))
        source = (x0 * fx - left, y0 * fy - top, min(x1 * fx, lw) - left, min(y1 * fy, lh) - top)
        return np.asarray(window.resize((x1 - x0, y1 - y0), Image.Resampling.LANCZOS, box=source))

    def _level_for(self, width: int) -> int:
        # A level may be one px narrower than requested because of rounding.
        fine = [i for i, (w, _) in enumerate(self.levels) if w >= width - 1]
        return fine[-1] if fine else 0


class OpenSlideSlide(PyramidSlide):
    """A scanner file, read with openslide."""

    def __init__(self, path: Path, openslide: Any) -> None:
        self.path, self.notes, self._error = path, [], openslide.OpenSlideError
        try:
            self._slide = openslide.OpenSlide(str(path))
        except openslide.OpenSlideError as error:
            raise SourceError(f"{path}: openslide cannot read it ({error}); check that the file is complete") from error
        self._slide.set_cache(openslide.OpenSlideCache(CACHE_BYTES))
        self.levels = [(int(w), int(h)) for w, h in self._slide.level_dimensions]
        self.size = self.levels[0]
        self.reader = f"openslide {openslide.__library_version__}"
        self.notes.append(f"{path.name}: read in windows by {self.reader}")
        tags = (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)
        self.mpp = square_mpp(*(_number(self._slide.properties.get(tag)) for tag in tags))
        check_image_size(self.size, path)

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        fx, fy = self.size[0] / self.levels[level][0], self.size[1] / self.levels[level][1]
        try:
            rgba = self._slide.read_region((round(x * fx), round(y * fy)), level, (width, height))
        except self._error as error:
            raise SourceError(
                f"{self.path}: {width} x {height} px at ({x}, {y}) of level {level} cannot be decoded ({error}); check that the file is complete"
            ) from error
        return to_rgb8(np.asarray(rgba), 255.0, alpha=True)

    def close(self) -> None:
        """Close the file."""
        self._slide.close()


class BlockedSlide(PyramidSlide):
    """An image whose levels are zarr, dask or memory-mapped arrays, such as (y, x, 3), (3 or 4, y, x), (1, y, x, 3) or (y, x).

    Values of any depth that :func:`comtip_shards.slides.colour.peak_of` accepts are scaled to 8 bits.
    """

    def __init__(
        self,
        path: Path,
        arrays: list[Any],
        axes: str,
        *,
        alpha: int = 0,
        decode: Decode | None = None,
        smaller: str = RETILE,
    ) -> None:
        """Check the levels and determine the value of white.

        Parameters
        ----------
        path
            The file, for messages.
        arrays
            The levels, finest first.
        axes
            Names of the axes: ``y`` for rows, ``x`` for columns, ``c`` or ``s`` for channels, ``z`` for planes, ``t`` for
            time points.
        alpha
            Kind of opacity in the last channel: :data:`STRAIGHT_ALPHA`, :data:`PREMULTIPLIED_ALPHA`, or 0 without opacity.
        decode
            Converts stored values to grey or RGB; None if they are grey or RGB already.
        smaller
            How to write the image in smaller blocks, for messages.

        Raises
        ------
        SourceError
            The axes are not those of one grey or colour image, the size is out of range, or the blocks are too large.
        """
        self.path, self.notes, self.reader, self._arrays, self._alpha = path, [], "zarr", arrays, alpha
        self._decode = decode
        axes = axes.lower()
        self._y, self._x, self._c = axes.index("y"), axes.index("x"), _channel_axis(axes, arrays[0].shape, path)
        self.levels = [(int(a.shape[self._x]), int(a.shape[self._y])) for a in arrays]
        self.size = self.levels[0]
        check_image_size(self.size, path)
        self._cache: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self._cached = 0
        self._blocks = [_block_size(a, self._y, self._x) for a in arrays]
        if min(n for part in (*self.levels, *self._blocks) for n in part) < 1:
            raise SourceError(
                f"{path}: the file states a width or height of zero (levels, width x height: {self.levels}; blocks, height x width: "
                f"{self._blocks}), so it is damaged; copy it again"
            )
        block = max(
            a.nbytes // (a.shape[self._y] * a.shape[self._x]) * h * w
            for a, (h, w) in zip(arrays, self._blocks, strict=True)
        )
        if block > MAX_BLOCK_BYTES:
            raise SourceError(
                f"{path}: stored in blocks of {block:,} bytes (at most {MAX_BLOCK_BYTES:,}), so it cannot be read in windows; {smaller}"
            )
        self._peak = self._find_peak()

    def _find_peak(self) -> float:
        if self._arrays[0].dtype == np.uint8 and self._decode is None:
            return 255.0
        # All windows must use one peak. The brightest pixel may be averaged away in the coarsest level, but the order of
        # magnitude still shows the bit depth.
        last = len(self._arrays) - 1
        width, height = self.levels[last]
        peak = 0.0
        corners = [(left, top) for top in range(0, height, 1024) for left in range(0, width, 1024)]
        for left, top in corners[:: math.ceil(len(corners) / PEAK_WINDOWS)]:
            window = self._raw(last, left, top, min(1024, width - left), min(1024, height - top))
            peak = max(peak, peak_of(window, str(self.path)))
            if window.dtype == np.uint8:
                return 255.0
        self.notes.append(f"{self.path.name}: {self._arrays[0].dtype} pixels, with {peak:g} as white")
        return peak

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        values = self._raw(level, x, y, width, height)
        return to_rgb8(values, self._peak, alpha=self._alpha > 0, premultiplied=self._alpha == PREMULTIPLIED_ALPHA)

    def _raw(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Return a window of grey or colour values, (height, width, channels)."""
        bh, bw = self._blocks[level]
        first = self._block(level, y // bh, x // bw)
        out = np.empty((height, width, first.shape[2]), first.dtype)
        for row in range(y // bh, (y + height - 1) // bh + 1):
            for column in range(x // bw, (x + width - 1) // bw + 1):
                block = self._block(level, row, column)
                top, left = row * bh, column * bw
                y0, y1 = max(y, top), min(y + height, top + block.shape[0])
                x0, x1 = max(x, left), min(x + width, left + block.shape[1])
                out[y0 - y : y1 - y, x0 - x : x1 - x] = block[y0 - top : y1 - top, x0 - left : x1 - left]
        return out

    def _block(self, level: int, row: int, column: int) -> np.ndarray:
        key = (level, row, column)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        array = self._arrays[level]
        bh, bw = self._blocks[level]
        where: list[Any] = [slice(None) if i == self._c else 0 for i in range(array.ndim)]
        where[self._y] = slice(row * bh, (row + 1) * bh)
        where[self._x] = slice(column * bw, (column + 1) * bw)
        try:
            values = np.asarray(array[tuple(where)])
        except Exception as error:  # codecs raise many kinds of errors on damaged bytes
            raise SourceError(
                f"{self.path}: the block at row {row}, column {column} of level {level} cannot be decoded "
                f"({type(error).__name__}: {error}); check that the file is complete"
            ) from error
        values = self._channels_last(values)
        if self._decode is not None:
            values = self._decode(values)
        self._cache[key] = values
        self._cached += values.nbytes
        while self._cached > CACHE_BYTES and len(self._cache) > 1:
            self._cached -= self._cache.popitem(last=False)[1].nbytes
        return values

    def _channels_last(self, values: np.ndarray) -> np.ndarray:
        if self._c is None:
            order = [0, 1] if self._y < self._x else [1, 0]
            return np.ascontiguousarray(values.transpose(order))[..., None]
        kept = sorted((self._y, self._x, self._c))
        return np.ascontiguousarray(values.transpose([kept.index(a) for a in (self._y, self._x, self._c)]))

    def close(self) -> None:
        """Release the decoded blocks."""
        self._cache.clear()


class TiffSlide(BlockedSlide):
    """A TIFF, read with tifffile."""

    def __init__(self, path: Path, tifffile: Any) -> None:
        self._file = tifffile.TiffFile(path)
        try:
            series = max(self._file.series, key=lambda s: _extent(s.axes, s.shape))
            arrays = _levels_of(self._file, series, path, tifffile)
            page = series.levels[0].pages[0]
            alpha = int(page.extrasamples[0]) if page.extrasamples else 0
            alpha = alpha if alpha in (STRAIGHT_ALPHA, PREMULTIPLIED_ALPHA) else 0
            super().__init__(path, arrays, series.axes, alpha=alpha, decode=tiff_decoder(page, str(path)))
            self.reader = f"tifffile {version('tifffile')}"
            self.notes.append(f"{path.name}: read in windows by {self.reader}")
            self.notes.extend(orientation_note(_tag(page, "Orientation"), path))
            self.mpp = self._scale(page)
        except BaseException:
            self._file.close()
            raise

    def _scale(self, page: Any) -> float | None:
        text = self._file.pages.first.description
        resolution = (_tag(page, "XResolution"), _tag(page, "YResolution"))
        return tiff_mpp(text if isinstance(text, str) else "", self.size, resolution, _tag(page, "ResolutionUnit"))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _tag(page: Any, name: str) -> Any:
    """Return the value of a tag, None where it is absent; enumerations become numbers."""
    value = page.tags[name].value if name in page.tags else None
    return int(value) if isinstance(value, int) else value


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _levels_of(file: Any, series: Any, path: Path, tifffile: Any) -> list[Any]:
    """Return the levels of a series as arrays that decode only the requested blocks."""
    import zarr

    for level in series.levels:
        for page in level.pages:
            listed, needed = len(page.dataoffsets), math.prod(page.chunked)
            if listed < needed:
                raise SourceError(
                    f"{path}: {page.imagewidth} x {page.imagelength} px need {needed:,} tiles or strips, but {listed:,} are "
                    "listed; the file is damaged, copy it again"
                )
    number = file.series.index(series)
    # tifffile treats a contiguous uncompressed level as a single chunk; a memory map reads only the pages needed.
    return [
        zarr.open(series.aszarr(level=i), mode="r")
        if level.dataoffset is None
        else tifffile.memmap(path, series=number, level=i, mode="r")
        for i, level in enumerate(series.levels)
    ]


def _block_size(array: Any, y: int, x: int) -> tuple[int, int]:
    """Return (rows, columns) of a decoded block: a chunk of a zarr or dask array, a square of a memory-mapped one."""
    chunks = getattr(array, "chunksize", None) or getattr(array, "chunks", (MAPPED_BLOCK,) * array.ndim)
    return min(int(chunks[y]), int(array.shape[y])), min(int(chunks[x]), int(array.shape[x]))


def _extent(axes: str, shape: tuple[int, ...]) -> int:
    sizes = dict(zip(axes, shape, strict=True))
    return int(sizes.get("Y", 0)) * int(sizes.get("X", 0))


def _channel_axis(axes: str, shape: tuple[int, ...], path: Path) -> int | None:
    """Return the channel axis, or None if there is none; all other axes except x and y must have length 1.

    Two channels are grey and opacity if they are samples of a pixel. Planes in z and time points are never channels.
    """
    rest = [i for i, name in enumerate(axes) if name not in "yx" and shape[i] > 1]
    if not rest:
        return None
    if (
        len(rest) == 1
        and axes[rest[0]] not in "zt"
        and (shape[rest[0]] in (3, 4) or (axes[rest[0]], shape[rest[0]]) == ("s", 2))
    ):
        return rest[0]
    raise SourceError(
        f"{path}: axes {axes} of shape {shape} are not a single colour or grey image; give an H&E image with three channels"
    )
