"""Spots of an AnnData as a section: names, positions, labels and raw counts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from comtip_shards.errors import SourceError
from comtip_shards.genes.identifiers import sum_columns
from comtip_shards.sections.facts import CountOptions
from comtip_shards.sections.section import Section, SectionMeta, check_unique
from comtip_shards.sources.anndata_parts.counts import raw_counts
from comtip_shards.sources.anndata_parts.positions import read_centres
from comtip_shards.sources.anndata_parts.store import open_store
from comtip_shards.sources.files.spots import SpotPositions, join
from comtip_shards.sources.files.tables import as_counts, flags
from comtip_shards.sources.tenx.features import GENE_KIND, Features, counts_by_kind, for_species

_IDS = ("gene_ids", "gene_id", "ensembl_id")
_SYMBOLS = (
    "feature_name",
    "gene_name",
    "gene_symbols",
    "symbol",
    "gene_symbol",
    "gene_short_name",
    "hgnc_symbol",
    "gene",
)
"""Columns of ``var``, in lower case and in order of preference."""
_ENSEMBL = re.compile(r"(?:\S+[-_.])?ENS(?:MUS)?G\d{11}(?:\.\d+)?", re.IGNORECASE)
_SAMPLE = 1000
"""Number of genes by which a column of Ensembl ids is recognised."""
_MISSING = {"", "nan", "none", "<na>", "na"}


def gene_names(var: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Return (ids, symbols) of the genes; 10x stores ids in a column and symbols, with duplicates, in the index.

    Ids are taken from a column with a name for ids or, if the index holds no Ensembl ids, from a column that does; the index then
    has the symbols, which replace missing ids. Otherwise the index has the ids, and symbols are taken from a column with a name
    for symbols, or are "".
    """
    index = [str(v) for v in var.index]
    by_name = {str(c).lower(): c for c in reversed(var.columns)}
    for name in _IDS:
        if name in by_name and var[by_name[name]].astype(str).str.len().min() > 0:
            return _filled(var[by_name[name]], index), index
    if not _are_ensembl(index):
        for column in var:
            if var[column].dtype.kind not in "iufb" and _are_ensembl(var[column].iloc[:_SAMPLE].astype(str)):
                return _filled(var[column], index), index
    symbols = next((var[by_name[c]].astype(str).tolist() for c in _SYMBOLS if c in by_name), [""] * len(index))
    return index, symbols


def _are_ensembl(names: Sequence[str] | pd.Series) -> bool:
    """Return whether most of the first names are Ensembl ids."""
    first = list(names)[:_SAMPLE]
    return sum(bool(_ENSEMBL.match(name)) for name in first) > 0.5 * len(first)


def _filled(column: pd.Series, index: Sequence[str]) -> list[str]:
    """Return a column as text, with the name in the index where a value is missing: genes with equal ids would be summed."""
    return [i if v.lower() in _MISSING else v for v, i in zip(column.astype(str), index, strict=True)]


def read_spots(
    path: Path,
    rows: np.ndarray,
    meta: SectionMeta,
    image: Path,
    factor: float,
    notes: list[str],
    options: CountOptions,
    *,
    counts: bool = True,
) -> Section:
    """Read positions and raw counts of some rows of an AnnData file.

    Parameters
    ----------
    path
        Path of the ``.h5ad`` file or ``.zarr`` folder.
    rows
        int64, rows of ``obs`` to take.
    meta, image, notes
        Metadata, image path and notes of the section.
    factor
        px of the image per px of the positions.
    options
        Where counts and positions are.
    counts
        Whether to read counts; if False, the section has no genes.

    Raises
    ------
    SourceError
        Positions or counts are missing or invalid.
    """
    with open_store(path) as store:
        table = store["obs"]
        obs = table.iloc[rows]
        xy = read_centres(store, options, [])[rows] * factor
        matrix, var, count_notes = raw_counts(store, path, options) if counts else no_counts(len(table))
        if matrix.shape != (len(table), len(var)):
            raise SourceError(
                f"{path}: counts of shape {matrix.shape}, but obs has {len(table)} rows and var {len(var)}; write the file "
                "again with anndata"
            )
    return annotated(obs, xy, matrix[rows], var, meta, image, path, [*notes, *count_notes])


def no_counts(n_spots: int) -> tuple[sparse.csr_matrix, pd.DataFrame, list[str]]:
    """Return an empty result in the form of :func:`raw_counts`, for callers that need images and positions only."""
    return sparse.csr_matrix((n_spots, 0), dtype=np.float32), pd.DataFrame(index=pd.Index([], dtype=object)), []


def annotated(
    obs: pd.DataFrame,
    xy: np.ndarray,
    matrix: sparse.csr_matrix,
    var: pd.DataFrame,
    meta: SectionMeta,
    image: Path,
    path: Path,
    notes: list[str],
) -> Section:
    """Return a section from parts of an AnnData with the same row order.

    Parameters
    ----------
    obs
        Table of the spots; ``in_tissue``, ``array_col``, ``array_row`` and ``label`` are used if present.
    xy
        float64 (n, 2), spot centres in px of the image.
    matrix, var
        Raw counts, (n, n_genes), and the table of the genes.
    meta, image, notes
        Metadata, image path and notes of the section.
    path
        File name for messages.

    Raises
    ------
    SourceError
        Names are not unique, values are not counts, genes are not of the species, or there are no spots.
    """
    names = [str(v) for v in obs.index]
    check_unique(names, f"{path}: obs names")
    ids, symbols = gene_names(var)
    kinds = column_or(var, "feature_types", GENE_KIND)
    features, _ = for_species(Features(ids, symbols, kinds), meta.species, path)
    genes = features.only_genes()
    counts = as_counts(sparse.csr_matrix(matrix[:, features.genes()]), path, names, genes.ids)
    tally = counts_by_kind(features.kinds, np.asarray(matrix.sum(axis=0)).ravel())
    counts, genes, doubles = _merged(counts, genes, path)
    spots = SpotPositions(names, xy, _array(obs), _labels(obs), in_tissue(obs, path))
    notes = [*notes, *features.others_note(tally), *doubles]
    return join(meta, image, counts, names, genes.ids, genes.symbols, spots, path, path, notes)


def column_or(table: pd.DataFrame, name: str, default: str) -> list[str]:
    """Return a column as text, with ``default`` if the column is absent and in rows without a value, as after a concatenation."""
    if name not in table:
        return [default] * len(table)
    return [default if lost else str(v) for v, lost in zip(table[name], table[name].isna(), strict=True)]


def _merged(counts: sparse.csr_matrix, genes: Features, path: Path) -> tuple[sparse.csr_matrix, Features, list[str]]:
    """Sum columns with the same gene identifier; returns the counts, their genes, and a note if columns were summed."""
    first = {name: i for i, name in reversed(list(enumerate(genes.ids)))}
    if len(first) == len(genes.ids):
        return counts, genes, []
    kept = sorted(first.values())
    column = {genes.ids[i]: k for k, i in enumerate(kept)}
    to = np.array([column[name] for name in genes.ids])
    merged = Features([genes.ids[i] for i in kept], [genes.symbols[i] for i in kept], [GENE_KIND] * len(kept))
    note = f"{len(genes.ids) - len(kept)} columns have the identifier of another one and are summed with it"
    return sum_columns(counts, to, merged.ids, str(path)), merged, [note]


def _array(obs: pd.DataFrame) -> np.ndarray:
    if not {"array_col", "array_row"} <= set(obs):
        return np.full((len(obs), 2), np.nan)
    columns = [pd.to_numeric(obs[c].astype(str), errors="coerce") for c in ("array_col", "array_row")]
    return np.column_stack([np.asarray(c, np.float64) for c in columns])


def _labels(obs: pd.DataFrame) -> list[str]:
    if "label" not in obs:
        return [""] * len(obs)
    return ["" if missing else str(v) for v, missing in zip(obs["label"], obs["label"].isna(), strict=True)]


def in_tissue(obs: pd.DataFrame, path: Path) -> np.ndarray:
    """Return which spots are in tissue, bool (n,): all if the table does not state it."""
    return flags(obs["in_tissue"], f"{path}: obs['in_tissue']") if "in_tissue" in obs else np.ones(len(obs), bool)
