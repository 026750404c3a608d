"""Read the header of an encoded tile before decoding it: guards decoders against decompression bombs."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image

from comtip_shards.errors import ShardError
from comtip_shards.names import FOREIGN

_STANDALONE = {0x01, *range(0xD0, 0xD8)}
"""JPEG markers without a payload."""
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_SCAN, _END = 0xDA, b"\xff\xd9"
_JFIF, _JFIF_BYTES = 0xE0, 16
"""Marker of the JFIF segment, and the bytes that a complete one has at least."""
_PLAIN = {_JFIF, 0xC0, 0xC1, 0xC2, 0xC4, 0xDA, 0xDB, 0xDD}
"""Markers of a JPEG that has nothing but its image: JFIF, frame, tables, restart interval, scan."""


class JpegHeader(NamedTuple):
    """What a JPEG states before its first scan."""

    width: int
    height: int
    bits: int
    """Bits per channel."""
    channels: int
    plain: bool
    """Whether there are no other segments than those of the image itself (and of JFIF): no profiles, comments or further images."""


def check_size(data: bytes, px: int, codec: str, where: Callable[[], str]) -> None:
    """Check that a tile's header states px x px and, for JPEG, that the file is complete.

    Parameters
    ----------
    data
        The encoded tile.
    px
        Expected width and height.
    codec
        ``jpeg``, ``png`` or ``webp``.
    where
        Returns the name of the record for an error message.

    Raises
    ------
    ShardError
        Of kind ``tile``: the header is damaged or states another size, or a JPEG is incomplete.
    """
    try:
        size = _jpeg_size(data) if codec == "jpeg" else _other_size(data, codec)
    except (IndexError, struct.error, OSError, ValueError, Image.DecompressionBombError) as error:
        raise ShardError(
            f"{where()}: the tile cannot be decoded ({type(error).__name__}: {error}); {FOREIGN}", kind="tile"
        ) from error
    if size != (px, px):
        raise ShardError(
            f"{where()}: the tile is {size[0]} x {size[1]} px, but the manifest states {px} x {px}; {FOREIGN}",
            kind="tile",
        )


def read_jpeg_header(data: bytes) -> JpegHeader:
    """Return what the only frame header before the scan states.

    Raises
    ------
    ValueError, IndexError, struct.error
        The JPEG is incomplete or invalid.
    """
    if data[:2] != b"\xff\xd8" or data[-2:] != _END:
        raise ValueError("not a complete JPEG")
    offset, frame, plain = 2, None, True
    while True:
        if data[offset] != 0xFF:
            raise ValueError("a marker is missing")
        marker = data[offset + 1]
        if marker == 0xFF or marker in _STANDALONE:
            offset += 1 if marker == 0xFF else 2
            plain = False
            continue
        (length,) = struct.unpack_from(">H", data, offset + 2)
        plain = plain and marker in _PLAIN and (marker != _JFIF or length >= _JFIF_BYTES)
        if marker in _FRAMES:
            if frame is not None:
                raise ValueError("two frame headers")
            frame = struct.unpack_from(">BHHB", data, offset + 4)
        if marker == _SCAN:
            if frame is None:
                raise ValueError("no frame header before the scan")
            bits, height, width, channels = frame
            return JpegHeader(width, height, bits, channels, plain)
        offset += 2 + length


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) of a JPEG; raises the errors of :func:`read_jpeg_header`."""
    header = read_jpeg_header(data)
    return header.width, header.height


def _other_size(data: bytes, codec: str) -> tuple[int, int]:
    with Image.open(io.BytesIO(data), formats=[codec.upper()]) as image:
        return image.size
