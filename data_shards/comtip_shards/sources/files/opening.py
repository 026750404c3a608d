"""Checks before and during the reading of a file, with errors that name the file."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from comtip_shards.errors import SourceError
from comtip_shards.not_data import OME_TIFF, is_zarr_folder, not_data, refuse_not_data
from comtip_shards.storage.disk import disk_fix, disk_trouble, error_number

MAX_UNPACKED, MAX_RATIO = 2**30, 1100
"""Size in bytes above which an array of HDF5 or Zarr is checked, and its maximum compression ratio. Deflate compresses zeros by 1,032."""
MAX_HOLE = 1 << 30
"""Maximum bytes in holes of a file that is hashed. A complete file has holes only where a copy left out zeros."""


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Convert any library error during a read into a :class:`SourceError` that names the file."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:  # h5py, anndata, pandas, pyarrow and zlib raise many kinds of errors on damaged files
        reason = not_data(path)
        if reason is not None:
            raise SourceError(f"{path}: {reason}") from error
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceError(f"{path}: cannot be read as {what} ({text}); {fix_of(error)}") from error


def fix_of(error: Exception, damaged: str = "copy or download it again") -> str:
    """Return what to do about an error during a read; ``damaged`` is the fix if only the content of the file can be wrong."""
    if isinstance(error, MemoryError):
        return "close other programs, or use a machine with more memory"
    if isinstance(error, UnicodeDecodeError):
        return "save it as UTF-8 text"
    if disk_trouble(error) is not None and error_number(error) != errno.EFBIG:  # a file that exists can be read
        return f"{disk_fix(error)}, then run again"
    if error_number(error) in (errno.EACCES, errno.EPERM):
        return "change its permissions, so that you may read it"
    return damaged


def existing(path: Path, what: str) -> Path:
    """Return ``path``; raises SourceError if it is missing or a folder, or if its first bytes are not data.

    ``what`` names the expected content, for the message.
    """
    if path.is_dir():
        fix = f"convert it to {OME_TIFF}" if is_zarr_folder(path) else "give the file itself"
        raise SourceError(f"{path}: a folder, not the {what}; {fix}")
    if not path.exists():
        problem = "a link to a file that does not exist" if path.is_symlink() else "no such file"
        raise SourceError(f"{path}: {problem}; copy the {what} there, or correct the path")
    return refuse_not_data(path)


def input_sha256(path: Path) -> str:
    """Return the SHA-256 of an input in hex.

    Raises
    ------
    SourceError
        More than ``MAX_HOLE`` bytes of the file were never written (holes): a download reserved the space and did not finish, or
        the size is damaged. Reading 1 TB of holes would take an hour.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_HOLE and (hole := _hole_bytes(file.fileno(), size)) > MAX_HOLE:
            raise SourceError(
                f"{path}: {hole:,} of its {size:,} bytes were never written, because its download or copy did not finish; copy or "
                "download it again"
            )
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hole_bytes(descriptor: int, size: int) -> int:
    """Return the bytes of a file that are in holes; 0 where the file system does not tell."""
    at, hole = 0, 0
    while at < size:
        begin = os.lseek(descriptor, at, os.SEEK_HOLE)  # the end of the file is a hole, too
        try:
            at = os.lseek(descriptor, begin, os.SEEK_DATA)
        except OSError:  # no data after this hole
            at = size
        hole += at - begin
    os.lseek(descriptor, 0, os.SEEK_SET)
    return hole
