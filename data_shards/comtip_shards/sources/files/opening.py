"""Checks before and during the reading of a file, with errors that name the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from comtip_shards.errors import SourceError
from comtip_shards.not_data import not_data, refuse_not_data


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
        raise SourceError(f"{path}: cannot be read as {what} ({text}); copy or download it again") from error


def existing(path: Path, what: str) -> Path:
    """Return ``path``; raises SourceError if the file does not exist or its first bytes are not data.

    ``what`` names the expected content, for the message.
    """
    if path.is_dir():
        raise SourceError(f"{path}: a folder, not the {what}; give the file itself")
    if not path.is_file():
        raise SourceError(f"{path}: no such file; copy the {what} there, or correct the path")
    return refuse_not_data(path)
