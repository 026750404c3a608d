"""Checks of a Zarr store's metadata before anything opens it: which codecs it asks for, and whether it holds links.

A Zarr array names the codecs that decode it, and the Zarr library runs whichever of these names is installed. One
of them, ``pickle``, runs code that the store contains. So the names are compared with a list before the store is
opened, and the versions of ``zarr`` and ``numcodecs`` do not matter.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comtip_shards.errors import SourceError
from comtip_shards.names import shown

METADATA = {".zarray", ".zgroup", ".zmetadata", "zarr.json"}
"""Files that can name a codec, in formats 2 and 3; ``.zattrs`` cannot."""
CODECS = frozenset(
    {
        "blosc",
        "bz2",
        "gzip",
        "lz4",
        "lzma",
        "zlib",
        "zstd",  # compression
        "adler32",
        "crc32",
        "crc32c",
        "fletcher32",  # checksums
        "bytes",
        "delta",
        "sharding_indexed",
        "shuffle",
        "transpose",
        "vlen-bytes",
        "vlen-utf8",  # layout
    }
)
"""Codecs that turn bytes into numbers and text and do nothing else."""
_KEYS = ("codecs", "compressor", "filters", "index_codecs", "serializer", "storage_transformers")
_FREE = ("attributes", "fill_value")
"""Keys of what is the user's own, in which nothing names a codec."""
MAX_BYTES = 256 * 2**20
"""Largest metadata file; a consolidated one of 100,000 arrays has about 100 MB."""


def check_store(path: Path, what: str = "a Zarr store") -> None:
    """Refuse a Zarr store (format 2 or 3) that is not safe to open. Call it before any library opens the store.

    Parameters
    ----------
    path
        Folder of the store. It may be a link itself; nothing below it may be one.
    what
        What it should be, for messages.

    Raises
    ------
    SourceError
        A codec is not one of :data:`CODECS`, a metadata file cannot be understood, or the store holds a link. The
        message names the file.
    """
    for root, folders, files in os.walk(path, followlinks=False, onerror=_unreadable):
        for name in (*folders, *files):
            file = Path(root, name)
            if file.is_symlink():
                raise SourceError(
                    f"{_shown(file)}: is a link; links in a store are not followed, copy the file itself there"
                )
            if name in METADATA:
                _check_file(file, path, what)


def _unreadable(error: OSError) -> None:
    raise SourceError(f"{error.filename}: cannot be listed ({error.strerror}); allow reading it") from error


def _shown(file: Path) -> str:
    return str(file) if str(file).isprintable() else ascii(str(file))


def _check_file(file: Path, store: Path, what: str) -> None:
    if not file.is_file():
        raise SourceError(
            f"{_shown(file)}: is no regular file, but the metadata of a Zarr array or group; copy the store again"
        )
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise SourceError(
            f"{_shown(file)}: {size} bytes of metadata, at most {MAX_BYTES} are read; copy the store again"
        )
    try:
        # As zarr does it: another parser might see other codecs in the same bytes.
        data = json.loads(file.read_bytes())
        for codec in _codecs(data):
            if not isinstance(codec, str) or codec.removeprefix("numcodecs.") not in CODECS:
                raise SourceError(
                    f"{_shown(file)}: the codec {shown(str(codec))} is not one that is run, because a codec can run code from the "
                    "store; if you trust the store, write it again with blosc, zstd or gzip and strings as vlen-utf8"
                )
    except (ValueError, RecursionError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(
            f"{_shown(store)}: not {what} that can be read ({_shown(file.relative_to(store))} is not the metadata of a Zarr array or "
            f"group: {error}); copy the store again"
        ) from error


def _codecs(value: Any) -> Iterator[Any]:
    """Yield every codec's name in some metadata, nested and consolidated ones too; what has no name yields None."""
    if isinstance(value, list):
        for item in value:
            yield from _codecs(item)
    if not isinstance(value, dict):
        return
    for key, inner in value.items():
        if key in _KEYS:
            for codec in inner if isinstance(inner, list) else [inner]:
                if codec is not None:
                    yield from _names(codec)
        if key not in _FREE and not key.endswith(".zattrs"):
            yield from _codecs(inner)


def _names(codec: Any) -> Iterator[Any]:
    """Yield the name of one codec: format 3 has a text or ``name``, format 2 ``id``; with both, both count."""
    if not isinstance(codec, dict):
        yield codec
        return
    names = [codec[key] for key in ("id", "name") if key in codec]
    yield from names or [None]
