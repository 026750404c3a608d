"""Tables too large for memory, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from comtip_shards.errors import SourceError
from comtip_shards.sources.base import existing, reading

BATCH = 1 << 17


def has_column(path: Path, name: str) -> bool:
    """Tell whether a table has a column."""
    return name in _open(path).schema_arrow.names


def batches(path: Path, names: Sequence[str], *, dictionary: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a Parquet file, some at a time; columns in ``dictionary`` come as codes and words.

    Raises
    ------
    SourceError
        Not Parquet, damaged, or without one of the columns.
    """
    file = _open(path, dictionary)
    missing = [c for c in names if c not in file.schema_arrow.names]
    if missing:
        raise SourceError(
            f"{path}: lacks the columns {', '.join(missing)}; it has {', '.join(file.schema_arrow.names)}"
        )
    with reading(path, "Parquet"):
        yield from file.iter_batches(BATCH, columns=list(names))


def numbers_of(batch: pa.RecordBatch, names: Sequence[str], path: Path) -> np.ndarray:
    """Return columns as float64 (n, k), NaN where there is no value; refuses text."""
    out: list[np.ndarray] = []
    for name in names:
        try:
            out.append(np.asarray(batch.column(name).to_numpy(zero_copy_only=False), np.float64))
        except (ValueError, TypeError) as error:
            raise SourceError(f"{path}: the column {name} holds {batch.column(name).type}, not numbers") from error
    return np.stack(out, axis=1)


def all_numbers(batch: pa.RecordBatch, names: Sequence[str], path: Path) -> np.ndarray:
    """Return columns as float64 (n, k); refuses gaps."""
    values = numbers_of(batch, names, path)
    gaps = ~np.isfinite(values)
    if gaps.any():
        name = names[int(np.flatnonzero(gaps.any(axis=0))[0])]
        raise SourceError(f"{path}: {int(gaps.any(axis=1).sum())} rows have no {name}")
    return values


def _open(path: Path, dictionary: Sequence[str] = ()) -> pq.ParquetFile:
    with reading(existing(path, "table"), "Parquet"):
        return pq.ParquetFile(path, read_dictionary=list(dictionary))
