"""Open section images: small ones are held in memory, whole-slide images are read in windows.

:func:`open_slide` returns a :class:`Slide` for both. Pixel (0, 0) covers [0, 1) x [0, 1): positions are px from the
image's edge, and a downsampled image covers the same area.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from comtip_shards.errors import SourceError
from comtip_shards.not_data import not_data
from comtip_shards.slides.base import (
    MAX_IMAGE_PX,
    MAX_WHOLE_PX,
    ArraySlide,
    Slide,
    ome_mpp,
    peak_of,
    plausible_mpp,
    to_rgb8,
)
from comtip_shards.slides.wsi import open_windowed

WINDOWED_PX = 100_000_000
"""TIFFs with more pixels are read in windows."""
BITS_PER_SAMPLE, IMAGE_DESCRIPTION = 258, 270
IMAGE_SUFFIXES = {".tif", ".tiff", ".btf", ".png", ".jpg", ".jpeg", ".jp2", ".webp", ".bmp"}
"""Suffixes of images, by which slides in a folder are found."""
VENDOR_SUFFIXES = {".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi", ".dcm"}


def open_slide(path: Path) -> Slide:
    """Open the image of a section.

    Large TIFFs and scanner formats are read in windows, which requires the extra ``wsi`` (tifffile and zarr, or
    openslide); Pillow decodes other images completely.

    Raises
    ------
    SourceError
        Not an image, damaged, too large, or a required package is not installed.
    """
    if not path.is_file():
        raise SourceError(f"{path}: no such image; check the path")
    if path.suffix.lower() in VENDOR_SUFFIXES or not _is_plain(path):
        return open_windowed(path)
    return _open_plain(path)


def image_size(path: Path) -> tuple[int, int]:
    """Return (width, height), if possible without decoding pixels.

    Raises
    ------
    SourceError
        The file is missing or not an image.
    """
    if not path.is_file():
        raise SourceError(f"{path}: no such image; check the path")
    if path.suffix.lower() in VENDOR_SUFFIXES or not _is_plain(path):
        with open_slide(path) as slide:
            return slide.size
    try:
        with Image.open(path) as image:
            return _checked((int(image.width), int(image.height)), path)
    except (OSError, Image.DecompressionBombError, ValueError) as error:
        raise SourceError(
            f"{path}: {not_data(path) or f'not an image that can be read ({error}); copy it again, or convert it to TIFF'}"
        ) from error


def mpp_by_tag(path: Path, notes: list[str]) -> float | None:
    """Return um per px from an image's resolution tag and append a note to ``notes``; None without a plausible tag."""
    if path.suffix.lower() in VENDOR_SUFFIXES or not _is_plain(path):
        with open_slide(path) as slide:
            mpp = slide.mpp
    else:
        try:
            with Image.open(path) as image:
                mpp = _mpp_of(image)
        except (OSError, Image.DecompressionBombError, ValueError) as error:
            raise SourceError(
                f"{path}: {not_data(path) or f'not an image that can be read ({error}); copy it again, or convert it to TIFF'}"
            ) from error
    if mpp is not None:
        notes.append(f"scale from the resolution tag of {path.name}: {mpp:g} um per px")
    return mpp


def load_rgb(path: Path) -> np.ndarray:
    """Return an image as uint8 (H, W, 3) RGB."""
    with open_slide(path) as slide:
        return slide.whole()


def _is_plain(path: Path) -> bool:
    """Return whether Pillow decodes the image correctly and in bounded memory."""
    _allow_large()
    try:
        with Image.open(path) as image:
            if image.format != "TIFF":
                return True
            # Channels may be separate pages, and values may have 16 bits: Pillow would read one page, or clip.
            if set(image.tag_v2.get(BITS_PER_SAMPLE, (1,))) - {1, 8}:  # type: ignore[attr-defined]
                return False
            colour = image.mode in {"RGB", "RGBA", "P", "CMYK", "YCbCr", "LAB"}
            gray = image.mode in {"1", "L", "LA"} and getattr(image, "n_frames", 1) == 1
            small = image.width * image.height <= WINDOWED_PX
            return (colour or gray) and small and _first_page_is_largest(image)
    except (OSError, Image.DecompressionBombError, ValueError):
        with path.open("rb") as file:
            tiff = file.read(4) in {b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"}
        return not tiff


def _first_page_is_largest(image: Image.Image) -> bool:
    """Return whether no later page of a TIFF is as large as the first, which may be a thumbnail or one plane of many."""
    first = image.width * image.height
    for page in range(1, getattr(image, "n_frames", 1)):
        image.seek(page)
        if image.width * image.height >= first:
            return False
    image.seek(0)
    return True


def _open_plain(path: Path) -> Slide:
    try:
        with Image.open(path) as image:
            size = _checked((int(image.width), int(image.height)), path)
            if size[0] * size[1] > MAX_WHOLE_PX:
                raise SourceError(
                    f"{path}: {size[0]} x {size[1]} px in {image.format}, which can only be decoded whole; convert it to a "
                    "tiled TIFF, e.g. vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg"
                )
            mpp, pixels = _mpp_of(image), _flatten(image)
    except (OSError, Image.DecompressionBombError, ValueError) as error:
        reason = not_data(path) or (
            f"not an image that can be read, or it is truncated or damaged ({error}); copy it again, or convert it to TIFF"
        )
        raise SourceError(f"{path}: {reason}") from error
    return ArraySlide(pixels, path, mpp=mpp, reader="Pillow")


def _mpp_of(image: Image.Image) -> float | None:
    """Return um per px by OME-XML or by the resolution tag."""
    description = image.tag_v2.get(IMAGE_DESCRIPTION) if image.format == "TIFF" else None  # type: ignore[attr-defined]
    mpp = None
    if isinstance(description, str) and "OME" in description:
        # Pillow decodes tags as Latin-1, OME-XML is UTF-8.
        mpp = ome_mpp(description.encode("latin-1", "replace").decode("utf-8", "replace"))
    return mpp if mpp is not None else _mpp_of_dpi(image)


def _mpp_of_dpi(image: Image.Image) -> float | None:
    dpi = image.info.get("dpi")
    return plausible_mpp(25_400 / float(dpi[0]) if dpi and dpi[0] else None)


def _flatten(image: Image.Image) -> np.ndarray:
    """Convert to uint8 RGB: transparent pixels become white, and 16 bits become 8."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        return to_rgb8(values[..., None], peak_of(values))
    if image.mode in {"RGBA", "LA", "PA"} or (image.mode == "P" and "transparency" in image.info):
        clear = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return np.asarray(Image.alpha_composite(clear, image.convert("RGBA")).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def _checked(size: tuple[int, int], path: Path) -> tuple[int, int]:
    if size[0] * size[1] > MAX_IMAGE_PX or min(size) < 1:
        raise SourceError(
            f"{path}: {size[0]} x {size[1]} px is not the size of a section; check that the file is not damaged"
        )
    return size


def _allow_large() -> None:
    # Pillow's default limit is too small for sections; the limits above apply instead.
    Image.MAX_IMAGE_PIXELS = None
