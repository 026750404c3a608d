"""Storage of the features of all tiles of a section, in memory or in a temporary file, and access to some of their columns."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from types import TracebackType
from typing import Protocol

import numpy as np


class FeatureStore(Protocol):
    """Features of all tiles of a section."""

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the features of the tiles ``rows`` (int64, ascending), float32 (n, W)."""


class SpooledFeatures:
    """Features in memory, or all of them in a temporary file once they exceed ``in_memory`` bytes; a context manager.

    Parameters
    ----------
    width
        Number of features per tile, W.
    in_memory
        Largest number of bytes that are kept in memory.
    """

    def __init__(self, width: int, in_memory: int) -> None:
        self._width = width
        self._file = tempfile.SpooledTemporaryFile(max_size=in_memory)  # noqa: SIM115  closed by __exit__

    def write(self, rows: np.ndarray, values_nW: np.ndarray) -> None:
        """Store features (n, W) of the tiles ``rows``, int64 in any order, as float32."""
        values = np.ascontiguousarray(values_nW, np.float32)
        order = np.argsort(rows, kind="stable")
        for run in _runs(rows[order]):
            self._file.seek(int(rows[order[run.start]]) * self._width * 4)
            self._file.write(values[order[run]].tobytes())

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the features of the tiles ``rows`` (int64, ascending), float32 (n, W)."""
        out = np.empty((rows.size, self._width), np.float32)
        for run in _runs(rows):
            self._file.seek(int(rows[run.start]) * self._width * 4)
            data = self._file.read((run.stop - run.start) * self._width * 4)
            out[run] = np.frombuffer(data, np.float32).reshape(-1, self._width)
        return out

    def close(self) -> None:
        """Delete the features."""
        self._file.close()

    def __enter__(self) -> SpooledFeatures:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class FeatureColumns:
    """Some columns of stored features.

    Parameters
    ----------
    store
        The stored features, or an array of them in memory.
    columns
        The columns, as a slice or as indices.
    """

    def __init__(self, store: FeatureStore | np.ndarray, columns: slice | np.ndarray = slice(None)) -> None:
        self._store, self._columns = store, columns

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the selected columns (n, W) of the tiles ``rows`` (int64, ascending)."""
        values = self._store[rows] if isinstance(self._store, np.ndarray) else self._store.read(rows)
        return values[:, self._columns]


def _runs(rows: np.ndarray) -> Iterator[slice]:
    """Yield the maximal slices of an ascending array that contain consecutive numbers."""
    ends = np.flatnonzero(np.diff(rows) != 1) + 1
    for start, stop in zip([0, *ends.tolist()], [*ends.tolist(), rows.size], strict=True):
        if start < stop:
            yield slice(start, stop)
