"""What every reader shares: the lazy section, count tables, spot tables, and joining the two."""

from __future__ import annotations

import difflib
import gzip
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
from scipy import sparse

from comtip_shards.errors import SourceError
from comtip_shards.sections.section import Section, SectionMeta, check_unique

POOL_KEYS = ("pool_um", "pool_from", "bin_um", "min_cover", "min_pooled", "qv", "alignment")
META_KEYS = (
    "species", "tissue", "donor", "platform", "licence", "attribution", "mpp", "image", "pixels", *POOL_KEYS,
)  # fmt: skip
"""Facts that a caller may state where the source does not, and how bins, cells and transcripts are pooled."""


@dataclass(frozen=True)
class SectionSource:
    """A section that can be read when it is its turn."""

    meta: SectionMeta
    inputs: tuple[Path, ...]
    """Files that the section is read from."""
    load: Callable[[], Section]

    def read(self) -> Section:
        """Read and check everything."""
        return self.load().check()


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One source format: an entry of the table in :mod:`comtip_shards.sources`."""

    name: str
    looks_for: str
    """The layout in a few words, for the message about a folder that no reader knows."""
    recognise: Callable[[Path], str | None]
    """Return why a path is of this format, or None. It must be quick and must not raise on other formats."""
    open: Callable[[Path, Sequence[str] | None, Mapping[str, str]], list[SectionSource]]
    """``open(path, section ids or None for all, overrides)``; lazy, so that it costs little for many sections."""
    catalogue: Callable[[Path, Mapping[str, str]], list[CatalogueRow]] | None = None
    """List the sections from a table of the source without opening them; None where opening is cheap anyway."""
    outranks: tuple[str, ...] = ()
    """Formats that this one refines: where both are recognised this one is meant. ``*`` means all others."""
    pools: bool = False
    """It pools bins, cells or transcripts to spots; elsewhere settings of pooling are refused."""


@dataclass(frozen=True)
class CatalogueRow:
    """What a source's own table says of a section before it is opened: enough to choose by."""

    section_id: str
    species: str = ""
    tissue: str = ""
    platform: str = ""
    donor: str = ""
    dataset: str = ""


def check_overrides(overrides: Mapping[str, str]) -> None:
    """Refuse facts that no reader uses."""
    for key in overrides:
        if key not in META_KEYS:
            raise SourceError(f"unknown fact {key!r}; {', '.join(META_KEYS)} can be stated")


def refuse(overrides: Mapping[str, str], keys: Sequence[str], why: str) -> None:
    """Refuse settings that would be without effect."""
    for key in keys:
        if overrides.get(key):
            raise SourceError(f"--{key.replace('_', '-')} has no effect here: {why}")


def number(value: Any, what: str) -> float:
    """Return a float, NaN for an empty value; refuse text."""
    text = str(value).strip()
    if text in ("", "nan", "NaN", "None"):
        return float("nan")
    try:
        return float(text)
    except ValueError as error:
        raise SourceError(f"{what}: {text!r} is not a number") from error


def pick(wanted: Sequence[str] | None, have: Sequence[str], where: Path) -> list[str]:
    """Return the sections asked for, all where none is; an unknown one is refused with the nearest name."""
    if wanted is None:
        return list(have)
    for name in wanted:
        if name not in have:
            near = difflib.get_close_matches(name, have, n=1, cutoff=0)
            raise SourceError(
                f"{where}: no section {name!r}; did you mean {near[0] if near else '?'}? It has: {', '.join(have[:20])}"
                + (f" and {len(have) - 20} more" if len(have) > 20 else "")
            )
    return list(wanted)


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Say of a file that cannot be read which it is and what it should be; libraries raise all kinds of errors."""
    try:
        yield
    except SourceError:
        raise
    except (OSError, EOFError, KeyError, ValueError, TypeError, RuntimeError, MemoryError, zlib.error) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceError(f"{path}: cannot be read as {what} ({text}); is the file whole?") from error


def existing(path: Path, what: str) -> Path:
    """Return the path of a file that must be there."""
    if not path.is_file():
        raise SourceError(f"{path}: no such file, but it is the {what}")
    return path


def read_table(path: Path, sep: str = "\t") -> pd.DataFrame:
    """Read a small table as text."""
    existing(path, "table")
    try:
        # Spreadsheets and HEST begin their tables with a byte order mark.
        table = pd.read_csv(path, sep=sep, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise SourceError(f"{path}: cannot be read as a table ({error})") from error
    if table.empty:
        raise SourceError(f"{path}: the table has no rows")
    return table


def read_counts_table(path: Path, sep: str = "\t") -> tuple[sparse.csr_matrix, list[str], list[str]]:
    """Read spots x genes with a header and an id column: (int32 counts, spot ids, gene ids)."""
    existing(path, "count table")
    # pyarrow reads tables of 20,000 columns several times faster than pandas, and keeps repeated names.
    options = pa_csv.ReadOptions(skip_rows=1, autogenerate_column_names=True, block_size=1 << 27)
    try:
        names = _header(path, sep)
        body = pa_csv.read_csv(path, read_options=options, parse_options=pa_csv.ParseOptions(delimiter=sep))
    except (OSError, EOFError, UnicodeDecodeError, pa.ArrowInvalid) as error:
        text = str(error).splitlines()[0]
        raise SourceError(
            f"{path}: cannot be read as spots x genes, separated by {sep!r} ({text}); is the file whole?"
        ) from error
    # R writes one name fewer than there are columns; others name the id column or leave it empty.
    genes = names[1:] if len(names) == body.num_columns else names
    if body.num_columns - 1 != len(genes) or not genes:
        raise SourceError(f"{path}: {len(names)} names in the header, {body.num_columns} columns below it")
    check_unique(genes, f"{path}: genes in the header")
    spots = [str(v) for v in body.column(0).to_pylist()]
    check_unique(spots, f"{path}: spot ids")
    columns = body.columns[1:]
    for gene, column in zip(genes, columns, strict=True):
        if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_null(column.type)):
            raise SourceError(f"{path}: gene {gene} holds text, not counts")
    values = np.stack([c.cast(pa.float64()).to_numpy() for c in columns], axis=1)
    return as_counts(sparse.csr_matrix(values), path, spots, genes), spots, genes


def _header(path: Path, sep: str) -> list[str]:
    with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
        line = file.readline().decode("utf-8").rstrip("\r\n")
    return [n.strip().strip('"') for n in line.split(sep)]


def as_counts(matrix: sparse.csr_matrix, path: Path, spots: Sequence[str], genes: Sequence[str]) -> sparse.csr_matrix:
    """Check that values are raw counts (1.0 is one) and return int32 CSR."""
    matrix = sparse.csr_matrix(matrix)
    data = matrix.data
    bad = ~np.isfinite(data) | (data < 0) | (data != np.rint(data)) | (data > np.iinfo(np.int32).max)
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        row = int(np.searchsorted(matrix.indptr, first, side="right") - 1)
        gene = genes[int(matrix.indices[first])]
        what = (
            "missing values" if not np.isfinite(data[first]) else "negative values" if data[first] < 0
            else "values that are not integers" if data[first] != np.rint(data[first]) else "values that are too large"
        )  # fmt: skip
        raise SourceError(
            f"{path}: {int(bad.sum())} {what}, first {data[first]!r:.12} (spot {spots[row]}, gene {gene}); "
            "raw counts are needed, not normalised ones"
        )
    out = sparse.csr_matrix(matrix, dtype=np.int32)
    out.eliminate_zeros()
    out.sort_indices()
    return out


@dataclass
class Spots:
    """A spot table, before it is joined to counts."""

    ids: list[str]
    xy: np.ndarray
    array_xy: np.ndarray
    labels: list[str]
    in_tissue: np.ndarray


def read_spots_table(path: Path) -> Spots:
    """Read ``spot_id, array_x, array_y, pixel_x, pixel_y, in_tissue[, label]``."""
    table = read_table(path)
    missing = [c for c in ("spot_id", "pixel_x", "pixel_y") if c not in table]
    if missing:
        raise SourceError(f"{path}: lacks the column {', '.join(missing)}; it has {', '.join(table.columns)}")
    ids = table["spot_id"].tolist()
    check_unique(ids, f"{path}: spot ids")
    array = ["array_x", "array_y"] if {"array_x", "array_y"} <= set(table) else None
    tissue = np.array([number(v, f"{path}: in_tissue") == 1 for v in table.get("in_tissue", ["1"] * len(ids))], bool)
    return Spots(
        ids, numbers(table, ["pixel_x", "pixel_y"], path),
        numbers(table, array, path) if array else np.full((len(ids), 2), np.nan),
        table["label"].tolist() if "label" in table else [""] * len(ids), tissue,
    )  # fmt: skip


def numbers(table: pd.DataFrame, columns: list[str], path: Path) -> np.ndarray:
    """Return columns as float64 (n, k); refuse text."""
    out = table[columns].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    text = np.isnan(out) & (table[columns] != "").to_numpy()
    if text.any():
        row, column = np.argwhere(text)[0]
        raise SourceError(
            f"{path}: {columns[column]} of row {row + 2} is {table[columns].iat[row, column]!r}, not a number"
        )
    return out


def join(
    meta: SectionMeta, image: Path, counts: sparse.csr_matrix, count_ids: list[str], genes: list[str],
    symbols: list[str], spots: Spots, counts_path: Path, spots_path: Path, notes: list[str] | None = None,
) -> Section:  # fmt: skip
    """Join spots to counts by id, in the order of the spot table; spots in tissue only; drops are counted."""
    row_of = {spot: i for i, spot in enumerate(count_ids)}
    both = np.array([s in row_of for s in spots.ids], bool)
    if not both.any():
        raise SourceError(
            f"{counts_path} and {spots_path} share no spot id: {', '.join(count_ids[:3])} ... against "
            f"{', '.join(spots.ids[:3])} ...; the two files must name spots alike"
        )
    lost = int((spots.in_tissue & ~both).sum())
    if both.sum() < 0.5 * min(len(count_ids), len(spots.ids)):
        example = next(s for s, b in zip(spots.ids, both, strict=True) if not b)
        raise SourceError(
            f"{spots_path}: only {int(both.sum())} of its {len(spots.ids)} spots are among the {len(count_ids)} of "
            f"{counts_path} (e.g. {example} is not); these files are not of one section"
        )
    keep = np.flatnonzero(both & spots.in_tissue)
    dropped = {
        "not in tissue": int((both & ~spots.in_tissue).sum()),
        "in tissue but not in the counts": lost,
        "in the counts but without a position": len(count_ids) - int(both.sum()),
    }
    rows = [row_of[spots.ids[i]] for i in keep]
    return Section(
        meta, image, counts[rows], genes, symbols, [spots.ids[i] for i in keep], spots.xy[keep], spots.array_xy[keep],
        [spots.labels[i] for i in keep], {k: v for k, v in dropped.items() if v}, notes or [],
    )  # fmt: skip
