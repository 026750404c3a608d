"""Check of the stored lengths of text and arrays of variable length in an HDF5 file, before the HDF5 library reads them.

The library allocates and clears as many bytes as an element claims, up to 4 GiB, before it finds that the element is not stored. An
element of variable length is a reference: 4 bytes of length, the address of a heap, and an index in it. Elements are stored
uncompressed in heaps, so none can be longer than its file. Not checked are attributes, compact datasets, contiguous datasets of files
with a user block, filters other than deflate and shuffle, and chunks above 256 MiB.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from comtip_shards.errors import SourceError
from comtip_shards.names import shown

_BLOCK = 1 << 24
"""Bytes of references that are read at a time."""
_DEFLATE, _SHUFFLE = 1, 2
"""HDF5 filters that are undone here; references under other filters are not checked."""
_MAX_ARRAY = 4096
"""Elements of an array within an element that are checked."""
_MAX_CHUNK = 1 << 28
"""Bytes of references above which a chunk is not checked."""


def check_lengths(data: h5py.Dataset, location: str, path: Path) -> None:
    """Check that no element of variable length claims more bytes than the file has.

    Parameters
    ----------
    data
        A dataset; without elements of variable length, nothing is read.
    location, path
        Its name and its file, for messages.

    Raises
    ------
    SourceError
        An element is longer than the file.
    """
    reference = 8 + data.file.id.get_create_plist().get_sizes()[0]
    width, at = _layout(data.id.get_type(), reference)
    if not at or not data.size:
        return
    limit = path.stat().st_size
    for block in _blocks(data, width, path):
        rows = np.frombuffer(block, np.uint8)[: len(block) // width * width].reshape(-1, width)
        for offset, size in at:
            longest = int(np.ascontiguousarray(rows[:, offset : offset + 4]).view("<u4").max(initial=0))
            if longest * size > limit:
                raise SourceError(
                    f"{path}: {shown(location)} claims an element of {longest * size:,} bytes, but the file has {limit:,}; copy or "
                    "download it again"
                )


def _layout(kind: h5py.h5t.TypeID, reference: int) -> tuple[int, list[tuple[int, int]]]:
    """Return the stored bytes per element, and (offset, bytes per item) of every reference in an element.

    HDF5 gives sizes and offsets in memory, where a reference is shorter than in the file; padding is the same in both.
    """
    if isinstance(kind, h5py.h5t.TypeStringID) and kind.is_variable_str():
        return reference, [(0, 1)]
    if isinstance(kind, h5py.h5t.TypeVlenID):
        return reference, [(0, kind.get_super().get_size())]
    if isinstance(kind, h5py.h5t.TypeArrayID):
        n, (size, inner) = prod(kind.get_array_dims()), _layout(kind.get_super(), reference)
        repeated = range(min(n, _MAX_ARRAY) if inner else 0)
        return n * size, [(i * size + offset, item) for i in repeated for offset, item in inner]
    if not isinstance(kind, h5py.h5t.TypeCompoundID):
        return kind.get_size(), []
    grown, at = 0, list[tuple[int, int]]()
    for i in sorted(range(kind.get_nmembers()), key=kind.get_member_offset):
        member = kind.get_member_type(i)
        size, inner = _layout(member, reference)
        at += [(kind.get_member_offset(i) + grown + offset, item) for offset, item in inner]
        grown += size - member.get_size()
    return kind.get_size() + grown, at


def _blocks(data: h5py.Dataset, width: int, path: Path) -> Iterator[bytes]:
    """Iterate over the stored elements of a dataset that can be found and decoded here (see the module)."""
    if data.chunks is None:
        start, stored = data.id.get_offset(), data.id.get_storage_size()
        if start is None or stored != data.size * width or data.file.userblock_size:
            return
        step = max(1, _BLOCK // width) * width
        with path.open("rb") as file:
            file.seek(start)
            for done in range(0, stored, step):
                yield file.read(min(step, stored - done))
        return
    plist = data.id.get_create_plist()
    filters = [plist.get_filter(i) for i in range(plist.get_nfilters())]
    size = prod(data.chunks) * width
    if {number for number, *_ in filters} - {_DEFLATE, _SHUFFLE} or size > _MAX_CHUNK:
        return
    chunks: list[tuple[int, ...]] = []
    # One walk: asking for the chunk with an index walks from the first one, which is quadratic.
    data.id.chunk_iter(lambda chunk: chunks.append(chunk.chunk_offset) if chunk.filter_mask == 0 else None)
    for where in chunks:
        block = _unfiltered(data.id.read_direct_chunk(where)[1], filters, size)
        if len(block) == size:
            yield block


def _unfiltered(raw: bytes, filters: list[Any], size: int) -> bytes:
    """Undo the filters of a chunk of ``size`` bytes; empty if it is damaged."""
    for number, _, values, *_ in reversed(filters):
        if number == _DEFLATE:
            try:
                raw = zlib.decompressobj().decompress(raw, size)
            except zlib.error:
                return b""
        elif values and len(raw) % values[0] == 0:
            raw = np.frombuffer(raw, np.uint8).reshape(values[0], -1).T.tobytes()
    return raw
