"""Convert stored pixel values of any depth and colour space to 8-bit RGB."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from comtip_shards.errors import SourceError

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, SEPARATED, YCBCR, CIELAB = 0, 1, 2, 3, 5, 6, 8
"""Supported values of the TIFF tag PhotometricInterpretation."""
_PILLOW_MODES = {SEPARATED: ("CMYK", 4), YCBCR: ("YCbCr", 3), CIELAB: ("LAB", 3)}
STRAIGHT_ALPHA, PREMULTIPLIED_ALPHA = 2, 1
"""Values of the TIFF tag ExtraSamples."""
MAX_BITS = 64
"""Maximum number of bits per sample of a TIFF; a damaged file may state billions, and 2 to their power takes minutes."""
JPEG_COMPRESSIONS = {6, 7, 33007, 34892}
"""TIFF compressions whose decoders return RGB for YCbCr."""
APERIO_JP2000_YCBCR = 33003
Decode = Callable[[np.ndarray], np.ndarray]
"""Maps stored values (H, W, C) to values (H, W, C') for :func:`to_rgb8`."""


def to_rgb8(values_HWC: np.ndarray, peak: float, *, alpha: bool = False, premultiplied: bool = False) -> np.ndarray:
    """Convert grey (C = 1 or 2) or colour (C = 3 or 4) values to RGB, uint8 (H, W, 3).

    Parameters
    ----------
    values_HWC
        Any real dtype.
    peak
        The value of white, see :func:`peak_of`.
    alpha
        Whether the last of 2 or 4 channels is opacity. If True, transparent pixels become white; if False, that channel is
        dropped.
    premultiplied
        Whether the colour is already multiplied by the opacity (TIFF: associated alpha).
    """
    values = values_HWC
    if values.dtype != np.uint8 or peak != 255:
        values = np.clip(np.rint(values * (255.0 / peak)), 0, 255).astype(np.uint8)
    colour, opacity = values, None
    if values.shape[2] in (2, 4):
        colour, opacity = values[..., :-1], values[..., -1:]
    if alpha and opacity is not None:
        part = opacity.astype(np.float32) / 255
        shown = colour if premultiplied else colour * part
        colour = np.clip(np.rint(shown + 255 * (1 - part)), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(colour, (*colour.shape[:2], 3)))


def peak_of(values: np.ndarray, where: str = "the image") -> float:
    """Return the value of white: 255 for uint8, else the smallest of 1, 255, 4095 (12 bits) and 65535 that no pixel exceeds.

    Signed types have one bit less: 127 for int8, and 32767 as the largest of int16.

    1 applies to floating point and bool; floating-point values may exceed it by 2 %, because filters overshoot. Cameras store
    12 bits in 16; scaled as 16 bits, such an image would be black.

    Raises
    ------
    SourceError
        Values exceed 65535, include NaN, or are not real numbers; the message starts with ``where``.
    """
    if values.dtype == np.uint8:
        return 255.0
    if values.dtype == np.bool_:
        return 1.0
    if not (np.issubdtype(values.dtype, np.integer) or np.issubdtype(values.dtype, np.floating)):
        raise SourceError(
            f"{where}: pixel values of type {values.dtype} are not supported; convert the image to uint8 or uint16"
        )
    high = float(values.max(initial=0))
    signed = {np.dtype(np.int8): (1.0, 127.0), np.dtype(np.int16): (1.0, 255.0, 4095.0, 32767.0)}
    for peak in signed.get(values.dtype, (1.0, 255.0, 4095.0, 65535.0)):
        if (high <= peak and peak > 1) or (high <= 1.02 and np.issubdtype(values.dtype, np.floating)):
            return peak
    raise SourceError(
        f"{where}: pixel values up to {high:g} have no known bit depth; convert the image to uint8 or uint16"
    )


def tiff_decoder(page: Any, where: str) -> Decode | None:
    """Return the conversion of a TIFF page's stored values to grey or RGB; None if they need no conversion.

    Parameters
    ----------
    page
        A ``tifffile.TiffPage``.
    where
        The file, for messages.

    Raises
    ------
    SourceError
        The colour space or the number of bits per sample of the page is not supported. The returned function raises the same
        error for an unsupported number of channels.
    """
    photometric = int(page.photometric)
    bits = page.bitspersample if isinstance(page.bitspersample, int) else max(page.bitspersample)
    if not 1 <= bits <= MAX_BITS:
        raise SourceError(
            f"{where}: {bits:,} bits per sample, expected 1 to {MAX_BITS}; copy the file again, or convert the image to RGB"
        )
    if photometric == YCBCR and int(page.compression) in JPEG_COMPRESSIONS:
        photometric = RGB
    if photometric == RGB and int(page.compression) == APERIO_JP2000_YCBCR:
        photometric = YCBCR
    if photometric == PALETTE:
        return _palette_decoder(page, where)
    if photometric in _PILLOW_MODES:
        return _pillow_decoder(*_PILLOW_MODES[photometric], bits, where)
    if photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB):
        name = getattr(page.photometric, "name", photometric)
        raise SourceError(f"{where}: colour space {name} is not supported; convert the image to RGB")
    inverted = photometric == WHITE_IS_ZERO
    odd_depth = bits not in (1, 8, 16, 32, 64)
    if not inverted and not odd_depth:
        return None
    return lambda values: _scaled_depth(_inverted(values, bits) if inverted else values, bits if odd_depth else 0)


def _inverted(values: np.ndarray, bits: int) -> np.ndarray:
    if values.dtype == np.bool_:
        return ~values
    if np.issubdtype(values.dtype, np.floating):
        return np.asarray(1.0 - values, values.dtype)
    top = min(2**bits - 1, np.iinfo(values.dtype).max)  # values of signed types have one bit less
    return np.asarray(top - np.clip(values, 0, top), values.dtype)


def _scaled_depth(values: np.ndarray, bits: int) -> np.ndarray:
    """Scale values of unusual depth, such as 4 or 10 bits, to 8 or 16 bits."""
    if not bits or not np.issubdtype(values.dtype, np.integer):
        return values
    depth, top = (np.uint8, 255.0) if bits < 8 else (np.uint16, 65535.0)
    return np.clip(np.rint(values * (top / (2**bits - 1))), 0, top).astype(depth)


def _palette_decoder(page: Any, where: str) -> Decode:
    colours = None if page.colormap is None else np.asarray(page.colormap)
    if colours is None or colours.ndim != 2 or colours.shape[0] != 3:
        raise SourceError(f"{where}: a palette image without a colour map; convert the image to RGB")
    # Colour maps have 16 bits; some programs write 8.
    shift = 8 if colours.max(initial=0) > 255 else 0
    table = (colours.T.astype(np.int64) >> shift).astype(np.uint8)
    return lambda values: table[np.minimum(values[..., 0].astype(np.int64), len(table) - 1)]


def _pillow_decoder(mode: str, channels: int, bits: int, where: str) -> Decode:
    def decode(values: np.ndarray) -> np.ndarray:
        if values.shape[2] != channels or bits not in (8, 16):
            raise SourceError(
                f"{where}: {mode} with {values.shape[2]} channels of {bits} bits is not supported; convert the image to RGB"
            )
        eight = values if bits == 8 else values >> 8
        size = (values.shape[1], values.shape[0])
        data = np.ascontiguousarray(eight.astype(np.uint8)).tobytes()
        return np.asarray(Image.frombytes(mode, size, data, "raw", mode).convert("RGB"))

    return decode


def flattened(image: Image.Image) -> np.ndarray:
    """Decode a Pillow image to uint8 RGB: transparent pixels become white, and 16 bits become 8.

    Raises
    ------
    SourceError
        The bit depth of the pixel values is unknown.
    """
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        return to_rgb8(values[..., None], peak_of(values))
    image.load()
    transparent = image.has_transparency_data
    out = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, 16_000_000 // max(1, image.width))
    # In bands: each conversion needs 4 bytes per pixel.
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        out[top : top + rows] = _band_rgb(band, transparent)
    return out


def _band_rgb(band: Image.Image, transparent: bool) -> np.ndarray:
    if not transparent:
        return np.asarray(band.convert("RGB"))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # Pillow advises RGBA for transparency given as bytes, which is what is done here
        rgba = band.convert("RGBA")
    clear = Image.new("RGBA", band.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(clear, rgba).convert("RGB"))
