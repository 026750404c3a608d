"""Atomic writing of AnnData files: an earlier file is kept until the new one is complete, even if the disk is full."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
from comtip_shards.storage.atomic import atomic_path


@dataclass(frozen=True)
class MatrixRows:
    """A dense float32 matrix that is written in blocks of rows, so that memory never holds all of it."""

    shape: tuple[int, int]
    blocks: Callable[[], Iterator[tuple[slice, np.ndarray]]]
    """Returns an iterator over (slice of consecutive rows, values)."""

    def write(self, file: h5py.File, key: str) -> None:
        """Write the matrix to ``key`` in AnnData's encoding of an array."""
        stored = file.create_dataset(key, self.shape, np.float32)
        stored.attrs["encoding-type"], stored.attrs["encoding-version"] = "array", "0.2.0"
        for rows, values in self.blocks():
            stored[rows] = values


def write_h5ad(data: ad.AnnData, target: Path, matrices: Mapping[str, MatrixRows] | None = None) -> None:
    """Write an ``.h5ad`` file to a temporary path, then rename it to ``target``.

    Parameters
    ----------
    data
        The AnnData to write.
    target
        Path of the file; an existing file is replaced.
    matrices
        Matrices to write in blocks, by their key in the file, e.g. ``X`` or ``layers/log1p_raw``; a matrix of ``data`` with the
        same key is replaced.

    Raises
    ------
    OSError
        ``target`` cannot be written, e.g. because the disk is full; an earlier file is unchanged.
    """
    with atomic_path(target) as tmp_path, tmp_path.open("r+b", buffering=0) as raw:
        file = _DiskFile(raw)
        try:
            with h5py.File(file, "w") as h5:
                ad.io.write_elem(h5, "/", data)
                for key, matrix in (matrices or {}).items():
                    if key in h5:
                        del h5[key]
                    matrix.write(h5, key)
        finally:
            if file.error is not None:
                raise OSError(file.error.errno, os.strerror(file.error.errno or 0), str(target)) from file.error


class _DiskFile:
    """File for h5py that stores the first error of a write in :attr:`error` instead of raising it.

    The HDF5 library can crash the process if a write fails while it closes a file. Failed writes are therefore reported
    to the library as successful, and the caller checks :attr:`error` afterwards.
    """

    def __init__(self, raw: io.FileIO) -> None:
        self._raw = raw
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all data, or only advance the position after an error; return the size of the data in bytes."""
        view = memoryview(data).cast("B")
        if self.error is not None:
            self._raw.seek(len(view), os.SEEK_CUR)
            return len(view)
        at, done = self._raw.tell(), 0
        try:
            while done < len(view):
                done += self._raw.write(view[done:]) or 0
        except OSError as error:
            self.error = error
            self._raw.seek(at + len(view))
        return len(view)

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, with zeros beyond the end of the file; return the buffer's size in bytes."""
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view):
            n = self._raw.readinto(view[done:])
            if not n:
                break
            done += n
        view[done:] = bytes(len(view) - done)
        return len(view)

    def read(self, size: int) -> bytes:
        """Return ``size`` bytes; see :meth:`readinto`."""
        buffer = bytearray(size)
        self.readinto(buffer)
        return bytes(buffer)

    def truncate(self, size: int | None = None) -> int:
        """Set the size of the file, by default to the current position, and return the size; an error is stored."""
        try:
            return self._raw.truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position and return it."""
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        """Return the position."""
        return self._raw.tell()

    def flush(self) -> None:
        """Do nothing: writes are not buffered."""
