"""Open section images: small ones are held in memory, whole-slide images are read in windows.

:func:`open_slide` returns a :class:`Slide` for both. Pixel (0, 0) covers [0, 1) x [0, 1): positions are px from the
image's edge, and a downsampled image covers the same area.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from comtip_shards.errors import SourceError
from comtip_shards.not_data import OME_TIFF, is_zarr_folder, not_data
from comtip_shards.slides.base import ArraySlide, Slide, check_image_size, check_whole_size
from comtip_shards.slides.bounded_file import BoundedFile
from comtip_shards.slides.colour import flattened
from comtip_shards.slides.pixel_scale import square_mpp, tiff_mpp
from comtip_shards.slides.wsi import open_windowed, orientation_note, scanner_format

WINDOWED_PX = 100_000_000
"""TIFFs with more pixels are read in windows."""
BITS_PER_SAMPLE, COMPRESSION, IMAGE_DESCRIPTION, ORIENTATION = 258, 259, 270, 274
X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 282, 283, 296
"""Tags of TIFF."""
PILLOW_COMPRESSIONS = {1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946}
"""TIFF compressions that every build of Pillow decodes; others depend on how its libtiff was built."""
PILLOW_FORMATS = ("TIFF", "PNG", "JPEG", "JPEG2000", "WEBP", "BMP", "GIF", "PPM")
"""Formats that Pillow may decode. No section is stored in the other formats of Pillow, and one of them (EPS) starts a program."""
IMAGE_SUFFIXES = {".tif", ".tiff", ".btf", ".qptiff", ".png", ".jpg", ".jpeg", ".jp2", ".webp", ".bmp"}
"""Suffixes by which images in a folder are found."""
VENDOR_SUFFIXES = {".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi", ".dcm"}
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MAGIC = (
    *_TIFF_MAGIC,
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"\0\0\0\x0cjP  ",
    b"\xff\x4f\xff\x51",
    b"ZISRAWFILE",
)
"""First bytes of TIFF, BigTIFF, JPEG, PNG, JPEG 2000 and CZI."""


def open_slide(path: Path) -> Slide:
    """Open the image of a section.

    Scanner formats, and TIFFs that are large or that Pillow would decode differently, are read in windows, which requires the
    extra ``wsi`` (tifffile and zarr, or openslide); Pillow decodes other images completely.

    Raises
    ------
    SourceError
        The file is missing, not an image, damaged or too large, or a required package is not installed.
    """
    _refuse_missing(path)
    return open_windowed(path) if _is_windowed(path) else _open_plain(path)


def is_image(path: Path) -> bool:
    """Return whether a regular file begins like a TIFF, JPEG, PNG, JPEG 2000, CZI, WebP or DICOM, whatever its suffix."""
    if not path.is_file():  # opening a pipe waits for a writer
        return False
    try:
        with path.open("rb") as file:
            head = file.read(132)
    except OSError:
        return False
    return head.startswith(_MAGIC) or (head[:4], head[8:12]) == (b"RIFF", b"WEBP") or head[128:132] == b"DICM"


def image_size(path: Path) -> tuple[int, int]:
    """Return (width, height) of an image in px from its header.

    Raises
    ------
    SourceError
        The file is missing, is not an image, is damaged or too large (:func:`.base.check_image_size`), or a required package is
        not installed.
    """
    _refuse_missing(path)
    if _is_windowed(path):
        with open_windowed(path) as slide:
            return slide.size
    with _pillow(path) as image:
        return check_image_size((int(image.width), int(image.height)), path)


def mpp_by_tag(path: Path, notes: list[str]) -> float | None:
    """Return um per px from the metadata of an existing image, None without a plausible scale.

    If a scale is found, a note is appended to ``notes``. Raises :class:`SourceError` if the image cannot be opened.
    """
    if _is_windowed(path):
        with open_windowed(path) as slide:
            mpp = slide.mpp
    else:
        with _pillow(path) as image:
            mpp = _mpp_of(image)
    if mpp is not None:
        notes.append(f"scale from the resolution tag of {path.name}: {mpp:g} um per px")
    return mpp


def load_rgb(path: Path) -> np.ndarray:
    """Return a complete image as uint8 (H, W, 3) RGB; raises the errors of :func:`open_slide` and :meth:`Slide.whole`."""
    with open_slide(path) as slide:
        return slide.whole()


def _refuse_missing(path: Path) -> None:
    """Raise :class:`SourceError` if ``path`` is not a regular file."""
    if not path.is_file():
        what = "a folder, not an image" if path.is_dir() else not_data(path) if path.exists() else "no such image"
        if is_zarr_folder(path):
            raise SourceError(f"{path}: {what}; OME-Zarr cannot be read, convert it to {OME_TIFF}")
        raise SourceError(f"{path}: {what}; check the path")


def _is_windowed(path: Path) -> bool:
    return path.suffix.lower() in VENDOR_SUFFIXES or not _is_plain(path)


@contextmanager
def _pillow(path: Path) -> Iterator[Image.Image]:
    """Open an image with Pillow; errors of Pillow, also inside the block, are raised as SourceError."""
    # Pillow's default limit is too small for sections; check_image_size and check_whole_size apply instead.
    Image.MAX_IMAGE_PIXELS = None
    try:
        with BoundedFile(path) as file, Image.open(file, formats=PILLOW_FORMATS) as image:
            file.allow((int(image.width), int(image.height)))
            yield image
    except SourceError:
        raise
    except Exception as error:  # on damaged files also SyntaxError, struct.error, EOFError and others
        raise SourceError(f"{path}: {_problem(path, error)}") from error


def _problem(path: Path, error: Exception) -> str:
    """Return what an error of Pillow means, and the fix."""
    if isinstance(error, MemoryError):
        return "too large for the memory of this machine; convert it to a tiled TIFF, which is read in windows"
    if isinstance(error, PermissionError):
        return f"cannot be read ({error.strerror}); change its permissions"
    known = f"none of {', '.join(PILLOW_FORMATS)}"
    text = known if isinstance(error, UnidentifiedImageError) else f"{type(error).__name__}: {error}"
    return not_data(path) or (
        f"not an image that can be read, or it is truncated or damaged ({text}); copy it again, or convert it to TIFF"
    )


def _is_plain(path: Path) -> bool:
    """Return whether Pillow should decode the image: it is not a TIFF, or one that Pillow decodes like the windowed reader.

    Also True for a file that is no TIFF and that Pillow cannot open, so that Pillow's error is reported.
    """
    try:
        with _pillow(path) as image:
            return image.format != "TIFF" or (_is_plain_tiff(image) and scanner_format(path) is None)
    except SourceError:
        with path.open("rb") as file:
            return not file.read(4).startswith(_TIFF_MAGIC)


def _is_plain_tiff(image: Image.Image) -> bool:
    tags = image.tag_v2  # type: ignore[attr-defined]
    # Channels may be separate pages, and values may have 16 bits: Pillow would read one page, or clip. Pillow also turns
    # the pixels by the orientation tag, to which spot positions do not refer.
    if set(tags.get(BITS_PER_SAMPLE, (1,))) - {1, 8} or tags.get(ORIENTATION, 1) != 1:
        return False
    if tags.get(COMPRESSION, 1) not in PILLOW_COMPRESSIONS:
        return False
    colour = image.mode in {"RGB", "RGBA", "P", "CMYK", "YCbCr", "LAB"}
    gray = image.mode in {"1", "L", "LA"} and getattr(image, "n_frames", 1) == 1
    small = image.width * image.height <= WINDOWED_PX
    return (colour or gray) and small and _first_page_is_largest(image)


def _first_page_is_largest(image: Image.Image) -> bool:
    """Return whether all later pages of a TIFF are smaller; otherwise the first may be a thumbnail or one plane of many."""
    first = image.width * image.height
    for page in range(1, getattr(image, "n_frames", 1)):
        image.seek(page)
        if image.width * image.height >= first:
            return False
    image.seek(0)
    return True


def _open_plain(path: Path) -> Slide:
    with _pillow(path) as image:
        size = check_image_size((int(image.width), int(image.height)), path)
        check_whole_size(size, path, f"in {image.format}", path.stat().st_size)
        _refuse_frames(image, path)
        halved = _is_reduced_from_16_bits(image)
        try:
            pixels = flattened(image)
        except SourceError as error:
            raise SourceError(f"{path}: {str(error).removeprefix('the image: ')}") from error
        if halved and pixels.max(initial=0) < 17:
            raise SourceError(
                f"{path}: 16-bit values of which at most 12 bits are used, so this PNG would be read as nearly black; "
                "save it as TIFF, whose values are scaled"
            )
        slide = ArraySlide(pixels, path, mpp=_mpp_of(image), reader="Pillow")
        turn = image.getexif().get(ORIENTATION, 1) if image.format != "TIFF" else 1
        slide.notes.extend(orientation_note(turn, path))
    return slide


def _refuse_frames(image: Image.Image, path: Path) -> None:
    """Refuse animations; further pages are accepted in a TIFF (where they are smaller) and an MPO (where they are previews)."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format not in ("TIFF", "MPO"):
        raise SourceError(
            f"{path}: {frames} frames in {image.format}, not a single image; save the one to use as TIFF or PNG"
        )


def _is_reduced_from_16_bits(image: Image.Image) -> bool:
    """Return whether Pillow keeps only the upper byte of 16-bit values, as in colour PNGs; call it before decoding."""
    parts = getattr(image, "tile", [])
    return image.format == "PNG" and any("16" in str(part[3]) for part in parts) and not image.mode.startswith("I")


def _mpp_of(image: Image.Image) -> float | None:
    """Return um per px of a TIFF by :func:`tiff_mpp`, of other images by their dpi; None without a plausible scale."""
    if image.format != "TIFF":
        dpi = image.info.get("dpi") or (0, 0)
        x, y = (25_400 / float(d) if d else None for d in dpi)
        return square_mpp(x, y)
    tags = image.tag_v2  # type: ignore[attr-defined]
    text = tags.get(IMAGE_DESCRIPTION)
    # Pillow decodes tags as Latin-1, OME-XML is UTF-8.
    text = text.encode("latin-1", "replace").decode("utf-8", "replace") if isinstance(text, str) else ""
    unit = tags.get(RESOLUTION_UNIT)
    return tiff_mpp(text, image.size, (tags.get(X_RESOLUTION), tags.get(Y_RESOLUTION)), unit)
