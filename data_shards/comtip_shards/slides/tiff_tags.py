"""Check of the tags of a TIFF before a library reads them: a tag may claim gigabytes, which the libraries read into memory."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

from comtip_shards.errors import SourceError

MAX_TAG_BYTES = 256 << 20
"""Maximum size of a tag: offsets of 16 million tiles have 128 MB."""
MAX_PAGES = 100_000
"""Maximum number of pages that are checked."""
SUB_IFDS = 330
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Bytes per value, by type."""
_CLASSIC, _BIG, _NDPI = ("H", "HHII", "I"), ("Q", "HHQQ", "Q"), ("H", "HHII", "Q")
""":mod:`struct` codes of three fields: number of tags, one tag, and offset of a page."""


def check_tiff_tags(path: Path) -> None:
    """Check the sizes of all tags of a TIFF or BigTIFF; other files, and damaged ones, are left to the libraries.

    Raises
    ------
    SourceError
        A tag claims more than :data:`MAX_TAG_BYTES` bytes; the message names the file.
    """
    with path.open("rb") as file:
        head = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(head[:2])
        if order is None or len(head) < 16:
            return
        version = struct.unpack_from(f"{order}H", head, 2)[0]
        if version not in (42, 43):
            return
        big = version == 43
        # NDPI is a TIFF whose offsets of pages have 64 bits, because most slides are larger than 4 GiB.
        layout = _BIG if big else _NDPI if path.suffix.lower() == ".ndpi" and order == "<" else _CLASSIC
        left = [struct.unpack_from(f"{order}{layout[2]}", head, 8 if big else 4)[0]]
        seen: set[int] = set()
        end = path.stat().st_size
        while left and len(seen) < MAX_PAGES:
            offset = left.pop()
            if 0 < offset < end and offset not in seen:
                seen.add(offset)
                left += _check_page(file, offset, order, layout, path)


def _check_page(file: BinaryIO, offset: int, order: str, layout: tuple[str, str, str], path: Path) -> list[int]:
    """Check the tags of one page; return the offsets of the next page and of inner pages."""
    count_of, entry_of, offset_of = (f"{order}{code}" for code in layout)
    file.seek(offset)
    head = file.read(struct.calcsize(count_of))
    if len(head) < struct.calcsize(count_of):
        return []
    n, width = struct.unpack(count_of, head)[0], struct.calcsize(entry_of)
    tail = struct.calcsize(offset_of)
    if n > 4096:  # the libraries refuse such a page
        return []
    data = file.read(n * width + tail)
    further: list[int] = []
    for i in range(min(n, len(data) // width)):
        tag, kind, count, value = struct.unpack_from(entry_of, data, i * width)
        size = count * _SIZES.get(kind, 1)
        if size > MAX_TAG_BYTES:
            raise SourceError(
                f"{path}: the tag {tag} of a page claims {size:,} bytes; the file is damaged, copy or download it again"
            )
        if tag == SUB_IFDS:
            inline = 8 if layout is _BIG else 4
            where = value if size > inline else offset + struct.calcsize(count_of) + (i + 1) * width - inline
            further += _offsets(file, count, where, size, order)
    if len(data) == n * width + tail:
        further.append(struct.unpack_from(offset_of, data, n * width)[0])
    return further


def _offsets(file: BinaryIO, count: int, where: int, size: int, order: str) -> list[int]:
    """Return the offsets of inner pages that are stored at ``where``; none if this is outside the file."""
    if where >= file.seek(0, os.SEEK_END):
        return []
    file.seek(where)
    data = file.read(min(size, 8 * MAX_PAGES))
    code, width = ("Q", 8) if size == 8 * count else ("I", 4)
    return [struct.unpack_from(f"{order}{code}", data, i * width)[0] for i in range(min(count, len(data) // width))]
