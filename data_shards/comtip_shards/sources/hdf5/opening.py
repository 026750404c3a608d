"""Open HDF5 files after a check that all data are in the file itself.

An HDF5 file can refer to other files by external links, external storage and virtual datasets. The HDF5 library opens them
silently, so the content of any local file could become part of a shard set. Files on which the library hangs or crashes are
refused first (:mod:`comtip_shards.sources.hdf5.probe`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from comtip_shards.errors import SourceError
from comtip_shards.names import shown
from comtip_shards.sources.files.opening import MAX_RATIO, MAX_UNPACKED, fix_of
from comtip_shards.sources.hdf5.lengths import check_lengths
from comtip_shards.sources.hdf5.probe import probe_hdf5

MAX_OBJECTS, MAX_DEPTH = 1_000_000, 64
"""Maximum number of groups and datasets, and maximum nesting: the objects of a file of a few MB can exceed memory."""
COPY = "an .h5ad with anndata.read_h5ad and write_h5ad, another file by copying each dataset with h5py"
"""How to write a file without references to other files, for messages."""


def open_hdf5(path: Path, what: str, fix: str) -> h5py.File:
    """Open an HDF5 file for reading, after a check that all its data are in the file itself.

    Parameters
    ----------
    path
        Path of the file.
    what
        Expected content, for messages: ``an .h5ad``.
    fix
        What to do if it is not HDF5, for messages.

    Returns
    -------
    h5py.File
        Close it, or use it as a context manager.

    Raises
    ------
    SourceError
        The file is missing or not HDF5, hangs or crashes the HDF5 library, has more objects or deeper groups than allowed, a dataset
        that claims far more bytes than are stored or an element that is longer than the file, or contains a soft or external link,
        external storage or a virtual dataset. Files that it refers to are never opened.
    """
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or a device"
        raise SourceError(f"{path}: {kind}, not {what}; give the file itself")
    try:
        if h5py.is_hdf5(path):
            probe_hdf5(path)
        file = h5py.File(path, "r")
    except OSError as error:
        raise SourceError(f"{path}: not {what} that can be read ({error}); {fix_of(error, fix)}") from error
    try:
        _check(file, path)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        file.close()
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{path}: not {what} that can be read ({error}); {fix_of(error, fix)}") from error
    return file


def _check(file: h5py.File, path: Path) -> None:
    seen = set()
    left: list[tuple[str, h5py.Group]] = [("", file)]
    while left:
        location, group = left.pop()
        for name, child in _children(group, location, path):
            address = h5py.h5o.get_info(child.id).addr
            if address in seen:  # hard links can form a cycle
                continue
            seen.add(address)
            inner = f"{location}/{name}"
            if len(seen) > MAX_OBJECTS or inner.count("/") > MAX_DEPTH:
                limit = f"{MAX_OBJECTS:,} objects" if len(seen) > MAX_OBJECTS else f"{MAX_DEPTH} levels of groups"
                raise SourceError(
                    f"{path}: more than {limit}, exceeded at {shown(inner)}; write the file again without the groups that are "
                    "not needed"
                )
            if isinstance(child, h5py.Group):
                left.append((inner, child))
            elif isinstance(child, h5py.Dataset):
                _check_dataset(child, inner, path)


def _children(
    group: h5py.Group, location: str, path: Path
) -> Iterator[tuple[str, h5py.Group | h5py.Dataset | h5py.Datatype]]:
    for name in group:
        link = group.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            kind = {h5py.ExternalLink: "an external link", h5py.SoftLink: "a soft link"}.get(
                type(link), "a link of another kind"
            )
            raise SourceError(
                f"{path}: {shown(f'{location}/{name}')} is {kind}, and links are not followed; write the file again with the data in place "
                f"of the link ({COPY}; h5repack keeps links)"
            )
        yield name, group[name]


def check_entries(indptr: np.ndarray, length: int, where: str) -> None:
    """Check the entries of each row (CSR) or column (CSC) of a sparse matrix before they are read.

    Compressed zeros take a thousandth of their size, so a small file may claim billions of entries. A matrix has at most one entry
    per element.

    Parameters
    ----------
    indptr
        Offsets of the rows or columns, integers (n + 1,).
    length
        Number of elements of a row or column.
    where
        File and matrix, for the message.

    Raises
    ------
    SourceError
        Offsets do not ascend from 0, or a row or column has more entries than elements.
    """
    entries = np.diff(indptr)
    if len(indptr) == 0 or indptr[0] != 0 or (entries < 0).any():
        raise SourceError(f"{where}: indptr is not ascending offsets from 0; copy or download the file again")
    if len(entries) and int(entries.max()) > length:
        raise SourceError(
            f"{where}: {int(entries.max()):,} entries in row or column {int(entries.argmax())} of {length:,} elements; copy or download "
            "the file again"
        )


def _check_dataset(data: h5py.Dataset, location: str, path: Path) -> None:
    size, stored = data.nbytes if data.shape is not None else 0, data.id.get_storage_size()
    if size > MAX_UNPACKED and size > MAX_RATIO * stored:
        raise SourceError(
            f"{path}: {shown(location)} claims {size / 2**30:.1f} GiB in {data.shape}, but only {stored} bytes are in the file; "
            "copy or download it again, or write it again with its values"
        )
    kind = (
        "a virtual dataset" if data.is_virtual else "stored in another file (external storage)" if data.external else ""
    )
    if kind:
        raise SourceError(
            f"{path}: {shown(location)} is {kind}, and other files are not read; write the file again with the data in it ({COPY})"
        )
    check_lengths(data, location, path)
