"""What an encoded tile says of its size, before anything decodes it: decoders would believe a bomb's header."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable

from PIL import Image

from comtip_shards.errors import ShardError

_ALONE = {0x01, *range(0xD0, 0xD8)}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_SCAN, _END = 0xDA, b"\xff\xd9"


def check_size(data: bytes, px: int, codec: str, where: Callable[[], str]) -> None:
    """Refuse a tile that does not say it is px x px, or (JPEG) has no end.

    Raises
    ------
    ShardError
        ``where`` gives the name of the record, when it is needed.
    """
    try:
        size = _jpeg_size(data) if codec == "jpeg" else _other_size(data, codec)
    except (IndexError, struct.error, OSError, ValueError) as error:
        raise ShardError(
            f"{where()}: the tile cannot be decoded ({type(error).__name__}: {error})", kind="tile"
        ) from error
    if size != (px, px):
        raise ShardError(f"{where()}: the tile is {size[0]} x {size[1]} px, the manifest says {px} x {px}", kind="tile")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Walk the segments up to the scan; exactly one of them may be a frame header."""
    if data[:2] != b"\xff\xd8" or data[-2:] != _END:
        raise ValueError("no JPEG from start to end")
    at, size = 2, None
    while True:
        if data[at] != 0xFF:
            raise ValueError("no marker where one must be")
        marker = data[at + 1]
        if marker == 0xFF or marker in _ALONE:
            at += 1 if marker == 0xFF else 2
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        if marker in _FRAMES:
            if size is not None:
                raise ValueError("two frames")
            height, width = struct.unpack_from(">HH", data, at + 5)
            size = (width, height)
        if marker == _SCAN:
            if size is None:
                raise ValueError("a scan before its frame")
            return size
        at += 2 + length


def _other_size(data: bytes, codec: str) -> tuple[int, int]:
    with Image.open(io.BytesIO(data), formats=[codec.upper()]) as image:
        return image.size
