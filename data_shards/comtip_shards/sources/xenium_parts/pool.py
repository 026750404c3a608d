"""Pooling of the transcripts or cells of a Xenium run in squares parallel to the H&E image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from comtip_shards.errors import SourceError
from comtip_shards.sections.pooling import Pooler
from comtip_shards.sections.section import check_unique
from comtip_shards.sources.files.table_batches import all_numbers, batches, has_column, numbers_of
from comtip_shards.sources.tenx import pooled
from comtip_shards.sources.tenx.matrix import TenxMatrix
from comtip_shards.sources.xenium_parts.panel import CONTROL, feature_words, texts_of
from comtip_shards.sources.xenium_parts.run import XeniumRun


def pool_transcripts(run: XeniumRun, path: Path, qv: float) -> tuple[Pooler, list[str]]:
    """Sum the transcripts of genes per square; returns the pooler and notes on the transcripts.

    Parameters
    ----------
    run
        Inputs of the section.
    path
        Table of transcripts.
    qv
        Minimum quality of a transcript.

    Raises
    ------
    SourceError
        The table cannot be read, two genes of the panel have the same name, or no transcript is left.
    """
    genes = run.features.only_genes()
    check_unique(genes.symbols, f"{run.path}: gene names of the panel")
    row_of = {name: i for i, name in enumerate(genes.symbols)}
    pooler, left = Pooler(len(genes.ids), str(path)), Counter[str]()
    flagged = has_column(path, "is_gene")
    columns = ["feature_name", "x_location", "y_location", "qv", *(["is_gene"] if flagged else [])]
    for batch in batches(path, columns, dictionary=["feature_name"]):
        words, code = feature_words(batch, path)
        kinds = np.array([*(_kind(w, row_of) for w in words), -2], np.int64)
        gene = kinds[code]  # -1: control, -2: not in the panel; code -1 selects the last entry, -2
        if flagged:
            gene[(gene >= 0) & ~_is_gene(batch, path)] = -1
        xyq = numbers_of(batch, ["x_location", "y_location", "qv"], path)
        bad = {
            "control probes": gene == -1,
            "not in the panel": gene == -2,
            "no position": ~np.isfinite(xyq[:, :2]).all(axis=1),
            f"qv below {qv:g}": ~(xyq[:, 2] >= qv),
        }
        keep = np.ones(len(gene), bool)
        for reason, mask in bad.items():
            left[reason] += int((mask & keep).sum())
            keep &= ~mask
        pooler.add_transcripts(run.squares(xyq[keep, :2], path), gene[keep])
    excluded = [f"{n:,} transcripts excluded: {reason}" for reason, n in left.items() if n]
    if not pooler.total_units:
        raise SourceError(
            f"{path}: no transcript is left ({'; '.join(excluded) or 'the table is empty'}); reduce `qv` or check the panel"
        )
    return pooler, [f"{pooler.total_units:,} transcripts with qv of at least {qv:g} pooled", *excluded]


def _is_gene(batch: pa.RecordBatch, path: Path) -> np.ndarray:
    """Return the column ``is_gene``, bool; a missing value counts as true.

    Raises
    ------
    SourceError
        The column has values that are not true and false.
    """
    column = batch.column("is_gene")
    try:
        return np.asarray(column.cast(pa.bool_()).fill_null(True), bool)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise SourceError(
            f"{path}: column is_gene is {column.type}, not true and false; convert it, or remove the column"
        ) from error


def _kind(word: str, row_of: Mapping[str, int]) -> int:
    return -1 if CONTROL.match(word) else row_of.get(word, -2)


def pool_cells(run: XeniumRun, path: Path, counts: TenxMatrix) -> tuple[Pooler, list[str]]:
    """Sum the counts of cells per square, by the centroids in the table ``path``; returns the pooler and notes on the cells.

    Raises
    ------
    SourceError
        The table cannot be read, has duplicate ids or lacks more than half of the cells, or the matrix is damaged or empty.
    """
    centroids = _read_centroids(path)

    def locate(barcodes: list[str]) -> tuple[np.ndarray, np.ndarray]:
        known = np.array([i for i, b in enumerate(barcodes) if b in centroids], np.int64)
        um = np.array([centroids[barcodes[i]] for i in known], np.float64).reshape(-1, 2)
        return known, run.squares(um, path)

    return pooled.pool_cells(
        counts, run.features, locate, units="cells", located=f"are in {path}", not_located=f"not in {path.name}"
    )


def _read_centroids(path: Path) -> dict[str, tuple[float, float]]:
    """Return {cell id: centroid (x, y) in um}."""
    out: dict[str, tuple[float, float]] = {}
    n = 0
    for batch in batches(path, ["cell_id", "x_centroid", "y_centroid"]):
        cells = texts_of(batch.column("cell_id"), path)
        xy = all_numbers(batch, ["x_centroid", "y_centroid"], path)
        out.update(zip(cells, map(tuple, xy.tolist()), strict=True))
        n += len(cells)
    if len(out) < n:
        raise SourceError(f"{path}: {n - len(out)} duplicate cell ids; copy the table from the Xenium output again")
    return out
