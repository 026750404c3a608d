"""Check a Zarr store before it is opened: codecs in an allow list, no symbolic links, no array that claims far more than is stored.

The metadata of a Zarr array name the codecs that decode it, and the Zarr library runs any installed codec of that name. The
codec ``pickle`` executes code from the store. The names are therefore compared with a fixed list before the store is opened,
independently of the installed versions of ``zarr`` and ``numcodecs``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from comtip_shards.errors import SourceError
from comtip_shards.names import shown
from comtip_shards.sources.files.opening import MAX_RATIO, MAX_UNPACKED

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
"""Allowed codecs; they only convert bytes to numbers and text."""
_KEYS = ("codecs", "compressor", "filters", "index_codecs", "serializer", "storage_transformers")
_IN_WINDOWS = ("images", "labels")
"""Groups of SpatialData whose arrays are read in windows; all other arrays are read whole."""
_FREE = ("attributes", "fill_value")
"""Keys with user data, which do not name codecs."""
MAX_BYTES = 256 * 2**20
"""Maximum size of a metadata file in bytes; consolidated metadata of 100,000 arrays take about 100 MB."""


def head_text(file: Path) -> str:
    """Return the first 16 MiB of a metadata file as text; attributes come before consolidated metadata."""
    with file.open("rb") as opened:
        return opened.read(1 << 24).decode("utf-8", "replace")


def check_store(path: Path, what: str = "a Zarr store") -> None:
    """Check that a Zarr store (format 2 or 3) is safe to open. Call it before any library opens the store.

    Parameters
    ----------
    path
        Folder of the store. It may itself be a link, but must not contain links.
    what
        Expected content, for messages.

    Raises
    ------
    SourceError
        A codec is not one of :data:`CODECS`, a metadata file is invalid or too large, an array claims far more bytes than are
        stored, a folder cannot be listed, or the store contains a link. The message names the file.
    """
    for root, folders, files in os.walk(path, followlinks=False, onerror=_unreadable):
        for name in (*folders, *files):
            file = Path(root, name)
            if file.is_symlink():
                raise SourceError(
                    f"{_shown(file)}: is a link, and links in a store are not followed; replace it by a copy of what it links to"
                )
            if name in METADATA:
                _check_file(file, path, what)


def _unreadable(error: OSError) -> None:
    raise SourceError(f"{error.filename}: cannot be listed ({error.strerror}); fix its permissions") from error


def _shown(file: Path) -> str:
    return str(file) if str(file).isprintable() else ascii(str(file))


def _check_file(file: Path, store: Path, what: str) -> None:
    if not file.is_file():
        raise SourceError(f"{_shown(file)}: not a regular file, which metadata of Zarr must be; copy the store again")
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise SourceError(
            f"{_shown(file)}: {size} bytes of metadata are more than the maximum of {MAX_BYTES}; copy the store again"
        )
    try:
        # The parser that zarr uses: another one might read other codecs from the same bytes.
        data = json.loads(file.read_bytes())
        for codec in _codecs(data):
            if not isinstance(codec, str) or codec.removeprefix("numcodecs.") not in CODECS:
                raise SourceError(
                    f"{_shown(file)}: the codec {shown(str(codec))} is not allowed, because a codec can execute code from the "
                    "store; if you trust the store, write it again with blosc, zstd or gzip, and strings as vlen-utf8"
                )
        _check_claim(data, file, store)
    except (ValueError, RecursionError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(
            f"{_shown(store)}: cannot be read as {what} ({_shown(file.relative_to(store))} is not the metadata of a Zarr array or "
            f"group: {error}); copy the store again"
        ) from error


def _check_claim(data: Any, file: Path, store: Path) -> None:
    """Check that an array that is read whole does not claim many times the bytes that are stored for it."""
    shape = data.get("shape") if isinstance(data, dict) else None
    if not isinstance(shape, list) or file.relative_to(store).parts[0] in _IN_WINDOWS:
        return
    try:
        width = np.dtype(data.get("dtype", data.get("data_type"))).itemsize or 8
    except TypeError:  # text
        width = 8
    size = width * math.prod(n for n in shape if isinstance(n, int))
    if size <= MAX_UNPACKED:
        return
    stored = sum(chunk.stat().st_size for chunk in file.parent.rglob("*") if chunk.is_file())
    if size > MAX_RATIO * stored:
        raise SourceError(
            f"{_shown(file)}: claims {size / 2**30:.1f} GiB in {tuple(shape)}, but only {stored} bytes are stored; copy or download "
            "the store again, or write it again with empty chunks (write_empty_chunks=True)"
        )


def _codecs(value: Any) -> Iterator[Any]:
    """Yield the name of every codec in (nested or consolidated) metadata; None for a codec without a name."""
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
    """Yield the names of one codec: a string or ``name`` in format 3, ``id`` in format 2; both if both are present."""
    if not isinstance(codec, dict):
        yield codec
        return
    names = [codec[key] for key in ("id", "name") if key in codec]
    yield from names or [None]
