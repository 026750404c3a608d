"""``spots.parquet``: metadata of each spot, so that opening a set decodes no JSON, and CRC-32 of each member of its record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from comtip_shards.errors import ShardError
from comtip_shards.names import FOREIGN

FILE = "spots.parquet"
_TEXT = ("section_id", "spot_id", "label")
_MAX_TEXT = 4096
_BROKEN = (pa.ArrowException, OSError, ValueError, LookupError, OverflowError)
"""Exceptions of pyarrow on damaged or hostile tables."""
SCHEMA = pa.schema(
    [
        ("spot_index", pa.int64()),
        ("section_id", pa.string()),
        ("spot_id", pa.string()),
        ("source_row", pa.int64()),
        ("x_px", pa.float64()),
        ("y_px", pa.float64()),
        ("array_x", pa.float64()),
        ("array_y", pa.float64()),
        ("label", pa.string()),
        ("n_pooled", pa.int64()),
        ("crc_tile", pa.uint32()),
        ("crc_expr", pa.uint32()),
        ("crc_json", pa.uint32()),
    ]
)
CRC_COLUMNS = ["crc_tile", "crc_expr", "crc_json"]


def table_of(first_spot: int, metas: Sequence[dict[str, Any]], crcs: np.ndarray) -> pa.Table:
    """Return the rows of one section, with the columns of :data:`SCHEMA`.

    Parameters
    ----------
    first_spot
        Spot index of the first row.
    metas
        Content of each record's ``.json``, in the order of spot index.
    crcs
        uint32 (n, 3): CRC-32 of each member.
    """
    nan = float("nan")
    columns: dict[str, Any] = {
        "spot_index": np.arange(first_spot, first_spot + len(metas)),
        "section_id": [m["section_id"] for m in metas],
        "spot_id": [m["spot_id"] for m in metas],
        "source_row": [m["source_row"] for m in metas],
        "x_px": [float(m["x_px"]) for m in metas],
        "y_px": [float(m["y_px"]) for m in metas],
        "array_x": [float(m.get("array_x", nan)) for m in metas],
        "array_y": [float(m.get("array_y", nan)) for m in metas],
        "label": [m.get("label", "") for m in metas],
        "n_pooled": [m.get("n_pooled", 0) for m in metas],
        **{name: crcs[:, i] for i, name in enumerate(CRC_COLUMNS)},
    }
    return pa.table(columns, schema=SCHEMA)


class SpotsWriter(pq.ParquetWriter):  # type: ignore[misc]  # PyArrow has no types
    """Writer of the table, one row group per section."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, SCHEMA, compression="zstd", use_dictionary=list(_TEXT))


def _open(data: bytes, n_spots: int, where: str) -> pq.ParquetFile:
    """Open the table without reading it; raise if it belongs to another set or would unpack to too many bytes."""
    try:
        file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=list(_TEXT))
        groups = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
    except _BROKEN as error:
        raise ShardError(f"{where}: not a readable spot table ({error}); {FOREIGN}", kind="spots") from error
    if file.schema_arrow.names != SCHEMA.names or file.metadata.num_rows != n_spots:
        raise ShardError(f"{where}: not the table of the {n_spots} spots of this set; {FOREIGN}", kind="spots")
    if sum(groups) > 2**20 * len(groups) + (256 + _MAX_TEXT) * n_spots:
        raise ShardError(
            f"{where}: unpacks to {sum(groups)} bytes, too many for {n_spots} spots; {FOREIGN}", kind="spots"
        )
    return file


def _read(data: bytes, n_spots: int, where: str, columns: Sequence[str]) -> pa.Table:
    """Read the given columns. Texts stay dictionary-encoded, so that a malicious table cannot unpack to large memory."""
    file = _open(data, n_spots, where)
    try:
        table = file.read(columns=list(columns), use_threads=False)
        table.validate(full=True)
        wrong = next((n for n in columns if not _is_sound(table.column(n), n)), None)
    except _BROKEN as error:
        raise ShardError(f"{where}: cannot be read ({error}); {FOREIGN}", kind="spots") from error
    if wrong is not None:
        column = table.column(wrong)
        raise ShardError(
            f"{where}: column {wrong} has type {column.type} and {column.null_count} nulls; expected "
            f"{SCHEMA.field(wrong).type} without nulls, texts of at most {_MAX_TEXT} characters; {FOREIGN}",
            kind="spots",
        )
    return table


def _is_sound(column: pa.ChunkedArray, name: str) -> bool:
    """Return whether a column has the right type, no nulls, and texts of at most the maximum length."""
    if column.null_count:
        return False
    if name not in _TEXT:
        return bool(column.type == SCHEMA.field(name).type)
    if not (pa.types.is_dictionary(column.type) and pa.types.is_string(column.type.value_type)):
        return False
    return all(len(v) <= _MAX_TEXT for c in column.chunks for v in c.dictionary.to_pylist())


def read_spots(data: bytes, n_spots: int, where: str) -> pd.DataFrame:
    """Return the table without checksums, indexed by ``spot_index``; ``section_id`` and ``label`` are categorical.

    Parameters
    ----------
    data
        Content of the file, already checked against its hash.
    n_spots
        Number of spots of the set.
    where
        Name of the table for error messages.

    Raises
    ------
    ShardError
        Of kind ``spots``: the table is damaged or belongs to another set.
    """
    names = [n for n in SCHEMA.names if n not in CRC_COLUMNS]
    table = _read(data, n_spots, where, names)
    frame = pd.DataFrame({n: table.column(n).to_pandas() for n in names if n not in ("spot_index", "spot_id")})
    frame.insert(1, "spot_id", table.column("spot_id").cast(pa.string()).to_pandas())
    if not np.array_equal(table.column("spot_index").to_numpy(), np.arange(n_spots)):
        raise ShardError(f"{where}: spot_index is not 0 to {n_spots - 1}; {FOREIGN}", kind="spots")
    return frame.set_index(pd.RangeIndex(n_spots, name="spot_index"))


def read_crcs(data: bytes, n_spots: int, where: str) -> np.ndarray:
    """Return the CRC-32 of every member, uint32 (n_spots, 3); parameters and errors as for :func:`read_spots`."""
    table = _read(data, n_spots, where, CRC_COLUMNS)
    return np.stack([table.column(c).to_numpy() for c in CRC_COLUMNS], axis=1)
