"""Readers for text tables, and parsers for their values: raw counts, numbers, yes and no."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
from scipy import sparse

from comtip_shards.errors import SourceError
from comtip_shards.not_data import text_encoding
from comtip_shards.sections.section import check_unique
from comtip_shards.sources.files.opening import existing, reading
from comtip_shards.sources.files.packaging import is_gzip, open_packed
from comtip_shards.sources.files.table_size import MAX_COUNTS_BYTES, MAX_LINE, MAX_TABLE_BYTES, check_table_size

_TRUE = {"1", "1.0", "true", "t", "yes", "y", "in tissue", "in_tissue"}
_DECIMAL_COMMA = re.compile(r"-?\d+,\d+")
_FALSE = {"0", "0.0", "false", "f", "no", "n", "", "nan", "none", "na", "<na>"}


def number(value: Any, what: str) -> float:
    """Return a value as float, NaN if it is missing; raises SourceError, which calls it ``what``, if it is not a number."""
    text = str(value).strip()
    if text in ("", "nan", "NaN", "None"):
        return float("nan")
    try:
        return float(text)
    except ValueError as error:
        raise SourceError(f"{what}: {text!r} is not a number; correct the value") from error


def read_table(path: Path, sep: str = "\t") -> pd.DataFrame:
    """Read a table with all columns as text, empty cells as "".

    Columns are separated by ``sep``, or by the most frequent of tab, comma and semicolon if the first line has no ``sep``.

    Raises
    ------
    SourceError
        The file is missing, too large, not a table in UTF-8 or UTF-16, or has no rows.
    """
    check_table_size(existing(path, "table"), MAX_TABLE_BYTES)
    with reading(path, "a table"):
        try:
            sep = _separator(path, sep)
            # By content: some tools rename or unpack files without a new suffix.
            packed: Literal["gzip"] | None = "gzip" if is_gzip(path) else None
            table = pd.read_csv(
                path, sep=sep, dtype=str, keep_default_na=False, encoding=encoding_of(path), compression=packed
            )
        except UnicodeDecodeError as error:
            raise SourceError(f"{path}: not UTF-8 text ({error.reason}); save the table as UTF-8") from error
    table = without_blank(table)
    if table.empty:
        raise SourceError(f"{path}: the table has a header but no rows; add the rows, or copy or download it again")
    return table


def encoding_of(path: Path) -> str:
    """Return the encoding of a table, compressed or not; see :func:`comtip_shards.not_data.text_encoding`."""
    with open_packed(path) as file:
        return text_encoding(file.read(2))


def with_point(value: str) -> str:
    """Return a number with its decimal comma, if any, replaced by a point; other text is unchanged.

    Spreadsheets of some languages write decimal commas.
    """
    return value.replace(",", ".") if _DECIMAL_COMMA.fullmatch(value) else value


def _separator(path: Path, expected: str) -> str:
    """Return a table's separator: ``expected`` if the first line has it, else the most frequent of tab, comma and semicolon."""
    with open_packed(path) as file:
        first = file.readline(MAX_LINE).decode(encoding_of(path), "replace")
    return expected if expected in first else max((expected, *"\t,;"), key=first.count)


def without_blank(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of text without its empty rows and its empty unnamed columns, which spreadsheets write for cleared cells."""
    table = table.fillna("")
    filled = (table.map(str.strip) != "").to_numpy()
    named = np.array([isinstance(c, str) and not c.startswith("Unnamed:") for c in table.columns], bool)
    rows, columns = np.flatnonzero(filled.any(axis=1)), np.flatnonzero(filled.any(axis=0) | named)
    return table.iloc[rows].iloc[:, columns].reset_index(drop=True)


def read_counts_table(path: Path, sep: str = "\t") -> tuple[sparse.csr_matrix, list[str], list[str]]:
    """Read a table of raw counts, spots x genes, with a header and an id column.

    Returns
    -------
    counts, spot ids, gene ids
        int32 CSR (n_spots, n_genes), and the names of its rows and columns.

    Raises
    ------
    SourceError
        The table cannot be read, has duplicate ids, or holds values that are not raw counts.
    """
    check_table_size(existing(path, "count table"), MAX_COUNTS_BYTES)
    # pyarrow reads tables of 20,000 columns several times faster than pandas and keeps duplicate names.
    options = pa_csv.ReadOptions(skip_rows=1, autogenerate_column_names=True, block_size=1 << 27)
    with reading(path, "a table of spots x genes"), open_packed(path) as unpacked:
        sep = _separator(path, sep)
        names = _header(path, sep)
        # pyarrow decompresses by suffix, which some tools leave unchanged.
        source = path if is_gzip(path) == (path.suffix == ".gz") else unpacked
        body = pa_csv.read_csv(source, read_options=options, parse_options=pa_csv.ParseOptions(delimiter=sep))
    body = _without_blank_tail(body)
    # R omits the name of the id column; other programs write a name or an empty field.
    genes = names[1:] if len(names) == body.num_columns else names
    if body.num_columns < 2:
        raise SourceError(
            f"{path}: only one column if separated by {sep!r}; export the table again with an id column and one column per gene"
        )
    if body.num_columns - 1 != len(genes):
        raise SourceError(
            f"{path}: {len(names)} names in the header, but {body.num_columns} columns below it; export the table again"
        )
    check_unique(genes, f"{path}: genes in the header")
    spots = [str(v) for v in body.column(0).to_pylist()]
    check_unique(spots, f"{path}: spot ids")
    columns = body.columns[1:]
    for gene, column in zip(genes, columns, strict=True):
        if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_null(column.type)):
            raise SourceError(f"{path}: gene {gene} holds text, not counts; export the table again with raw counts")
    return as_counts(_sparse(columns), path, spots, genes), spots, genes


def _without_blank_tail(body: pa.Table) -> pa.Table:
    """Return a table without empty rows at its end, which spreadsheets write for cleared cells."""
    n_rows = body.num_rows
    while n_rows and all(column[n_rows - 1].as_py() in (None, "") for column in body.columns):
        n_rows -= 1
    return body.slice(0, n_rows)


def _sparse(columns: Sequence[pa.ChunkedArray]) -> sparse.csr_matrix:
    """Return numeric columns as float64 CSR, without an intermediate dense matrix."""
    values, rows, pointer = [], [], [0]
    for column in columns:
        # safe=False: integers above 2^53 are rounded here and refused as counts later.
        dense = column.cast(pa.float64(), safe=False).to_numpy()
        rows.append(np.flatnonzero(dense))
        values.append(dense[rows[-1]])
        pointer.append(pointer[-1] + len(rows[-1]))
    shape = (len(columns[0]), len(columns))
    return sparse.csc_matrix((np.concatenate(values), np.concatenate(rows), pointer), shape).tocsr()


def _header(path: Path, sep: str) -> list[str]:
    with open_packed(path) as file:
        line = file.readline(MAX_LINE + 1).decode("utf-8-sig").rstrip("\r\n")
    if len(line) > MAX_LINE:
        raise SourceError(
            f"{path}: the first line has more than {MAX_LINE:,} bytes, so this is not a table; copy the file again"
        )
    return [n.strip().strip('"') for n in line.split(sep)]


def as_counts(
    matrix: sparse.csr_matrix, path: Path, spots: Sequence[str], genes: Sequence[str], *, what: str = "", fix: str = ""
) -> sparse.csr_matrix:
    """Return raw counts as int32 CSR after validating them; floats with integer values are accepted, doubled entries are summed.

    Parameters
    ----------
    matrix
        Spots x genes.
    path, what
        File and element for messages.
    spots, genes
        Names of rows and columns for messages.
    fix
        What to do about values that are not counts, for messages.

    Raises
    ------
    SourceError
        A value is not finite, negative, fractional or above 2^31 - 1, or a sum of doubled entries is above it.
    """
    matrix = sparse.csr_matrix(matrix)
    _check_entries(matrix, path, spots, genes, what, fix)
    if not matrix.has_canonical_format:  # every entry is below 2^31 now, so that int64 holds their sums
        matrix = matrix.astype(np.int64)
        matrix.sum_duplicates()
        _check_entries(matrix, path, spots, genes, what, fix)
    out = sparse.csr_matrix(matrix, dtype=np.int32)
    out.eliminate_zeros()
    out.sort_indices()
    return out


def _check_entries(
    matrix: sparse.csr_matrix, path: Path, spots: Sequence[str], genes: Sequence[str], what: str, fix: str
) -> None:
    """Raise SourceError unless every stored value is an integer from 0 to 2^31 - 1; parameters as for :func:`as_counts`."""
    data = matrix.data
    # 2^31, not 2^31 - 1: in float32 the latter is rounded to the former.
    bad = ~np.isfinite(data) | (data < 0) | (data != np.rint(data)) | (data >= 2.0**31)
    if not bad.any():
        return
    first = int(np.flatnonzero(bad)[0])
    row = int(np.searchsorted(matrix.indptr, first, side="right") - 1)
    value, gene = float(data[first]), genes[int(matrix.indices[first])]
    kind = (
        "missing or infinite"
        if not np.isfinite(value)
        else "negative"
        if value < 0
        else "not an integer"
        if value != np.rint(value)
        else "too large"
    )
    where = f"{kind}; spot {spots[row]}, gene {gene}"
    raise SourceError(
        f"{path}: {f'{what} has ' if what else ''}{int(bad.sum())} values that are not counts, the first is {value:.12g} ({where}); "
        f"raw counts are needed: integers from 0 to 2^31 - 1, not normalised values{f'; {fix}' if fix else ''}"
    )


def flags(values: Any, where: str) -> np.ndarray:
    """Parse a column of yes and no, written as numbers, booleans or text, to bool (n,); missing values are no.

    Parameters
    ----------
    values
        A pandas Series, or a sequence.
    where
        Name of the column for messages.

    Raises
    ------
    SourceError
        A value is neither yes nor no.
    """
    column = pd.Series(values)
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(object)
    plain = [str(v).strip().lower() for v in column.tolist()]
    unknown = sorted({v for v in plain if v not in _TRUE | _FALSE})
    if unknown:
        raise SourceError(f"{where}: {unknown[0]!r} is not yes or no; use 1 and 0, or TRUE and FALSE")
    return np.array([v in _TRUE for v in plain], bool)


def numbers(table: pd.DataFrame, columns: list[str], path: Path) -> np.ndarray:
    """Return k columns of text as float64 (n, k), with NaN for empty cells; raises SourceError for other text."""
    out = table[columns].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    text = np.isnan(out) & (table[columns] != "").to_numpy()
    if text.any():
        row, column = np.argwhere(text)[0]
        raise SourceError(
            f"{path}: {columns[column]} of row {row + 2} is {table[columns].iat[row, column]!r}, not a number; correct it"
        )
    return out
