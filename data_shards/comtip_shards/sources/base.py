"""Helpers shared by all readers: lazy sections, count tables, spot tables and their join."""

from __future__ import annotations

import difflib
import gzip
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
from scipy import sparse

from comtip_shards.errors import ShardError, SourceError, UnforeseenError, UnknownSection
from comtip_shards.not_data import not_data, refuse_not_data
from comtip_shards.sections.facts import CountOptions, SectionFacts, SourceOptions
from comtip_shards.sections.section import Section, SectionMeta, check_unique
from comtip_shards.sources.files.table_size import MAX_COUNTS_BYTES, MAX_TABLE_BYTES, check_table_size

log = logging.getLogger(__name__)
_TRUE = {"1", "1.0", "true", "t", "yes", "y", "in tissue", "in_tissue"}
_FALSE = {"0", "0.0", "false", "f", "no", "n", "", "nan", "none", "na", "<na>"}


@dataclass(frozen=True)
class SectionSource:
    """A section whose data are read on demand."""

    meta: SectionMeta
    inputs: tuple[Path, ...]
    """Input files of the section."""
    load: Callable[[], Section]
    load_spots: Callable[[], Section] | None = None
    """Loads the section without its counts; None if counts are cheap to read and always present."""
    counts: CountOptions = field(default_factory=CountOptions)
    """How counts and positions are read, where this shows neither in the metadata nor in the names of the inputs."""

    def read(self) -> Section:
        """Read the section and validate it."""
        with named(f"section {self.meta.section_id}", self.inputs):
            return self.load().check()

    def read_spots(self) -> Section:
        """Read positions and image, and validate them; counts may be missing, or not be raw."""
        with named(f"section {self.meta.section_id}", self.inputs):
            return (self.load_spots or self.load)().check()


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Registry entry for one source format."""

    name: str
    looks_for: str
    """Short description of the layout, used in error messages."""
    recognise: Callable[[Path], str | None]
    """Return a reason if a path has this format, else None. Must be fast and must not raise on other formats."""
    open: Callable[[Path, Sequence[str] | None, SourceOptions], list[SectionSource]]
    """``open(path, section ids or None for all, options)``; must not read the data."""
    catalogue: Callable[[Path, SectionFacts], list[CatalogueRow]] | None = None
    """List sections from the source's metadata table without opening them; None if opening is cheap."""
    outranks: tuple[str, ...] = ()
    """Formats over which this one takes precedence if both are detected; ``*`` means all."""
    pools: bool = False
    """Whether the reader pools bins, cells or transcripts; otherwise pooling options are refused."""
    options: tuple[str, ...] = ()
    """Fields of the options that it uses besides :data:`comtip_shards.sections.facts.FACT_KEYS`; all others are refused."""


@dataclass(frozen=True)
class CatalogueRow:
    """Metadata of a section that is known before it is opened; used for filtering."""

    section_id: str
    species: str = ""
    tissue: str = ""
    platform: str = ""
    donor: str = ""
    dataset: str = ""

    def with_facts(self, facts: SectionFacts) -> CatalogueRow:
        """Return the row with stated facts in place of the source's."""
        return replace(
            self,
            species=facts.species or self.species,
            tissue=facts.tissue or self.tissue,
            platform=facts.platform or self.platform,
            donor=facts.donor or self.donor,
        )


def stated_file(template: str | None, section_id: str) -> Path | None:
    """Return the file that the caller states for a section, None if none is stated; ``{id}`` is replaced."""
    return Path(template.replace("{id}", section_id)) if template else None


def stated_image(facts: SectionFacts, section_id: str) -> Path | None:
    """Return the image that the caller states for a section; it must exist."""
    image = stated_file(facts.image, section_id)
    return None if image is None else existing(image, "image (--image)")


def check_one_file(option: str, template: str | None, names: Sequence[str], where: Path) -> None:
    """Raise if one file is stated for several sections.

    Parameters
    ----------
    option
        The option, e.g. ``--image``.
    template
        Its value, with ``{id}`` for the section.
    names
        The sections that are read.
    where
        The source, for messages.
    """
    if template and len(names) > 1 and "{id}" not in template:
        raise SourceError(
            f"{where}: {option} is one file but there are {len(names)} sections; use {{id}} in it, or select one with --samples"
        )


def number(value: Any, what: str) -> float:
    """Parse a float; empty values give NaN, text raises."""
    text = str(value).strip()
    if text in ("", "nan", "NaN", "None"):
        return float("nan")
    try:
        return float(text)
    except ValueError as error:
        raise SourceError(f"{what}: {text!r} is not a number; correct the value") from error


def pick(wanted: Sequence[str] | None, have: Sequence[str], where: Path) -> list[str]:
    """Return the requested sections, or all; an unknown id raises with the closest match."""
    if wanted is None:
        return list(have)
    for name in wanted:
        if name not in have:
            near = difflib.get_close_matches(name, have, n=1, cutoff=0)
            raise UnknownSection(
                f"{where}: no section {name!r}; {f'did you mean {near[0]}? It has' if near else 'it has'}: {', '.join(have[:20]) or 'none'}"
                + (f" and {len(have) - 20} more" if len(have) > 20 else "")
            )
    return list(wanted)


@contextmanager
def named(what: str, inputs: Sequence[Path]) -> Iterator[None]:
    """Context in which every error names the section or one of its files.

    Parameters
    ----------
    what
        The section or the source.
    inputs
        Its files; a message that names one of them is not changed.

    Raises
    ------
    SourceError
        With ``what`` before a message that names no file.
    UnforeseenError
        Instead of any other error but OSError, which names its file.
    """
    try:
        yield
    except SourceError as error:
        text = str(error)
        if "section " in text or "/" in text or any(p.name in text for p in inputs):
            raise
        raise type(error)(f"{what}: {text}") from error
    except (OSError, ShardError):
        raise
    except Exception as error:  # the last resort: every known cause is refused where it occurs
        log.debug("%s: unforeseen error", what, exc_info=True)
        text = str(error).splitlines()[0] if str(error) else "no message"
        raise UnforeseenError(
            f"{what}: cannot be read ({type(error).__name__}: {text}); check that its files are complete and unchanged, and "
            "report this if they are"
        ) from error


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
    """Return the path, or raise if the file does not exist or its first bytes are not data."""
    if not path.is_file():
        raise SourceError(f"{path}: no such file; copy the {what} there, or correct the path")
    return refuse_not_data(path)


def read_table(path: Path, sep: str = "\t") -> pd.DataFrame:
    """Read a small table with all columns as text."""
    check_table_size(existing(path, "table"), MAX_TABLE_BYTES)
    with reading(path, "a table"):
        # Spreadsheets and HEST write a byte order mark.
        table = pd.read_csv(path, sep=sep, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    if table.empty:
        raise SourceError(f"{path}: the table has no rows; copy or download it again")
    return table


def read_counts_table(path: Path, sep: str = "\t") -> tuple[sparse.csr_matrix, list[str], list[str]]:
    """Read a spots x genes table with a header and an id column: (int32 counts, spot ids, gene ids)."""
    check_table_size(existing(path, "count table"), MAX_COUNTS_BYTES)
    # pyarrow reads tables of 20,000 columns several times faster than pandas and keeps duplicate names.
    options = pa_csv.ReadOptions(skip_rows=1, autogenerate_column_names=True, block_size=1 << 27)
    with reading(path, f"spots x genes, separated by {sep!r}"):
        names = _header(path, sep)
        body = pa_csv.read_csv(path, read_options=options, parse_options=pa_csv.ParseOptions(delimiter=sep))
    # R omits the name of the id column; other programs write a name or an empty field.
    genes = names[1:] if len(names) == body.num_columns else names
    if body.num_columns - 1 != len(genes) or not genes:
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


def _sparse(columns: Sequence[pa.ChunkedArray]) -> sparse.csr_matrix:
    """Return numeric columns as float64 CSR without a dense matrix between."""
    values, rows, pointer = [], [], [0]
    for column in columns:
        # safe=False: integers beyond 2^53 are rounded, and refused as counts.
        dense = column.cast(pa.float64(), safe=False).to_numpy()
        rows.append(np.flatnonzero(dense))
        values.append(dense[rows[-1]])
        pointer.append(pointer[-1] + len(rows[-1]))
    shape = (len(columns[0]), len(columns))
    return sparse.csc_matrix((np.concatenate(values), np.concatenate(rows), pointer), shape).tocsr()


def _header(path: Path, sep: str) -> list[str]:
    with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
        line = file.readline().decode("utf-8").rstrip("\r\n")
    return [n.strip().strip('"') for n in line.split(sep)]


def as_counts(
    matrix: sparse.csr_matrix, path: Path, spots: Sequence[str], genes: Sequence[str], *, what: str = "", fix: str = ""
) -> sparse.csr_matrix:
    """Validate raw counts (floats with integer values are accepted) and return int32 CSR.

    Parameters
    ----------
    matrix
        Spots x genes.
    path, what
        File and element for messages.
    spots, genes
        Names of rows and columns for messages.
    fix
        What to do about values that are no counts.
    """
    matrix = sparse.csr_matrix(matrix)
    data = matrix.data
    bad = ~np.isfinite(data) | (data < 0) | (data != np.rint(data)) | (data > np.iinfo(np.int32).max)
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        row = int(np.searchsorted(matrix.indptr, first, side="right") - 1)
        value, gene = float(data[first]), genes[int(matrix.indices[first])]
        kind = (
            "missing values"
            if not np.isfinite(value)
            else "negative values"
            if value < 0
            else "values that are not integers"
            if value != np.rint(value)
            else "values that are too large"
        )
        raise SourceError(
            f"{path}: {f'{what} has ' if what else ''}{int(bad.sum())} {kind}, first {value:g} (spot {spots[row]}, gene {gene}); "
            f"raw counts are needed, not normalised ones{f'; {fix}' if fix else ''}"
        )
    out = sparse.csr_matrix(matrix, dtype=np.int32)
    out.eliminate_zeros()
    out.sort_indices()
    return out


def flags(values: Any, where: str) -> np.ndarray:
    """Return a column of yes and no as bool: numbers, booleans, text as written by R; missing values are no.

    Parameters
    ----------
    values
        A pandas Series, or a sequence.
    where
        Name of the column for messages.
    """
    column = pd.Series(values)
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(object)
    plain = [str(v).strip().lower() for v in column.tolist()]
    unknown = sorted({v for v in plain if v not in _TRUE | _FALSE})
    if unknown:
        raise SourceError(f"{where}: {unknown[0]!r} is not yes or no; use 1 and 0, or TRUE and FALSE")
    return np.array([v in _TRUE for v in plain], bool)


@dataclass
class SpotPositions:
    """Spot positions, before the join with counts."""

    ids: list[str]
    xy: np.ndarray
    array_xy: np.ndarray
    labels: list[str]
    in_tissue: np.ndarray


def read_spots_table(path: Path) -> SpotPositions:
    """Read ``spot_id, array_x, array_y, pixel_x, pixel_y, in_tissue[, label]``."""
    table = read_table(path)
    missing = [c for c in ("spot_id", "pixel_x", "pixel_y") if c not in table]
    if missing:
        raise SourceError(
            f"{path}: missing column {', '.join(missing)} (found {', '.join(table.columns)}); add it to the table"
        )
    ids = table["spot_id"].tolist()
    check_unique(ids, f"{path}: spot ids")
    array = ["array_x", "array_y"] if {"array_x", "array_y"} <= set(table) else None
    tissue = flags(table.get("in_tissue", ["1"] * len(ids)), f"{path}: in_tissue")
    return SpotPositions(
        ids,
        numbers(table, ["pixel_x", "pixel_y"], path),
        numbers(table, array, path) if array else np.full((len(ids), 2), np.nan),
        table["label"].tolist() if "label" in table else [""] * len(ids),
        tissue,
    )


def numbers(table: pd.DataFrame, columns: list[str], path: Path) -> np.ndarray:
    """Return columns as float64 (n, k); text raises."""
    out = table[columns].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    text = np.isnan(out) & (table[columns] != "").to_numpy()
    if text.any():
        row, column = np.argwhere(text)[0]
        raise SourceError(
            f"{path}: {columns[column]} of row {row + 2} is {table[columns].iat[row, column]!r}, not a number; correct it"
        )
    return out


def join(
    meta: SectionMeta,
    image: Path,
    counts: sparse.csr_matrix,
    count_ids: list[str],
    genes: list[str],
    symbols: list[str],
    spots: SpotPositions,
    counts_path: Path,
    spots_path: Path,
    notes: list[str] | None = None,
) -> Section:
    """Join spots in tissue with their counts by id, in the order of the spot table; dropped spots are counted."""
    row_of = {spot: i for i, spot in enumerate(count_ids)}
    both = np.array([s in row_of for s in spots.ids], bool)
    if not both.any():
        raise SourceError(
            f"{counts_path} and {spots_path} share no spot id: {', '.join(count_ids[:3])} ... against "
            f"{', '.join(spots.ids[:3])} ...; use the same spot ids in both files"
        )
    lost = int((spots.in_tissue & ~both).sum())
    if both.sum() < 0.5 * min(len(count_ids), len(spots.ids)):
        example = next(s for s, b in zip(spots.ids, both, strict=True) if not b)
        raise SourceError(
            f"{spots_path}: only {int(both.sum())} of its {len(spots.ids)} spots are among the {len(count_ids)} of "
            f"{counts_path} (e.g. {example} is not); use files of the same section"
        )
    keep = np.flatnonzero(both & spots.in_tissue)
    dropped = {
        "not in tissue": int((both & ~spots.in_tissue).sum()),
        "in tissue but not in the counts": lost,
        "in the counts but without a position": len(count_ids) - int(both.sum()),
    }
    rows = [row_of[spots.ids[i]] for i in keep]
    return Section(
        meta,
        image,
        counts[rows],
        genes,
        symbols,
        [spots.ids[i] for i in keep],
        spots.xy[keep],
        spots.array_xy[keep],
        [spots.labels[i] for i in keep],
        {k: v for k, v in dropped.items() if v},
        notes or [],
    )
