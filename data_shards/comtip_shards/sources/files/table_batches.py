"""Batched reader for tables that may exceed memory: Parquet and csv, compressed with gzip or not."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from comtip_shards.errors import SourceError
from comtip_shards.sources.files.opening import existing, reading
from comtip_shards.sources.files.packaging import check_growth, is_gzip, unpacked

BATCH = 1 << 17
"""Rows of a batch of Parquet."""
TEXT_COLUMNS = {"barcode": pa.string(), "cell_id": pa.string(), "feature_name": pa.string(), "is_gene": pa.bool_()}
"""Types of csv columns; all others are numbers."""
_CSV_BLOCK = 1 << 24


def has_column(path: Path, name: str) -> bool:
    """Return whether a table has a column; raises SourceError if it cannot be read."""
    return name in _columns(path)


def batches(path: Path, names: Sequence[str], *, dictionary: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
    """Iterate over batches of rows with the columns ``names``; in Parquet, columns in ``dictionary`` are dictionary-encoded.

    Raises
    ------
    SourceError
        The file cannot be read, or a column is missing.
    """
    have = _columns(path)
    missing = [c for c in names if c not in have]
    if missing:
        raise SourceError(
            f"{path}: missing columns {', '.join(missing)} (found {', '.join(have)}); copy or export the table again"
        )
    if is_csv(path):
        with reading(path, "csv"):
            yield from _open_csv(path, names)
        return
    with reading(path, "Parquet"):
        yield from _open(path, dictionary).iter_batches(BATCH, columns=list(names))


def numbers_of(batch: pa.RecordBatch, names: Sequence[str], path: Path) -> np.ndarray:
    """Return k columns as float64 (n, k), with NaN for missing values; raises SourceError if a column is not numeric."""
    out: list[np.ndarray] = []
    for name in names:
        try:
            out.append(np.asarray(batch.column(name).to_numpy(zero_copy_only=False), np.float64))
        except (ValueError, TypeError) as error:
            raise SourceError(
                f"{path}: the column {name} has type {batch.column(name).type}, expected numbers; export the table again"
            ) from error
    return np.stack(out, axis=1)


def all_numbers(batch: pa.RecordBatch, names: Sequence[str], path: Path) -> np.ndarray:
    """Return k columns as float64 (n, k); raises SourceError if a column is not numeric or a value is missing or infinite."""
    values = numbers_of(batch, names, path)
    gaps = ~np.isfinite(values)
    if gaps.any():
        name = names[int(np.flatnonzero(gaps.any(axis=0))[0])]
        raise SourceError(f"{path}: the column {name} has missing or infinite values; export the table again")
    return values


def is_csv(path: Path) -> bool:
    """Return whether a file is csv by its suffix; ``.gz`` at the end is ignored."""
    return path.name.lower().removesuffix(".gz").endswith(".csv")


def _columns(path: Path) -> list[str]:
    if not is_csv(path):
        return list(_open(path).schema_arrow.names)
    with reading(existing(path, "table"), "csv"):
        return list(_open_csv(path, ()).schema.names)


def _open_csv(path: Path, names: Sequence[str]) -> pa_csv.CSVStreamingReader:
    types = {name: TEXT_COLUMNS.get(name, pa.float64()) for name in names}
    convert = pa_csv.ConvertOptions(include_columns=list(names) or None, column_types=types, strings_can_be_null=True)
    stream = _Unpacking(path) if is_gzip(path) else pa.input_stream(str(path), compression=None)
    return pa_csv.open_csv(stream, read_options=pa_csv.ReadOptions(block_size=_CSV_BLOCK), convert_options=convert)


class _Unpacking(io.RawIOBase):
    """Decompressed content of a gzip file; implausibly much of it, such as blank lines without end, is an error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self._stream, self._total = path, pa.input_stream(str(path), compression="gzip"), 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Return up to ``size`` bytes; raise SourceError if the content is implausibly larger than the file."""
        data: bytes = self._stream.read(None if size < 0 else size)
        self._total += len(data)
        check_growth(self._total, self._path)
        return data


def _open(path: Path, dictionary: Sequence[str] = ()) -> pq.ParquetFile:
    with reading(existing(path, "table"), "Parquet"):
        return pq.ParquetFile(unpacked(path), read_dictionary=list(dictionary))
