"""Helpers shared by the readers that pool bins, cells or transcripts to pseudo-spots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from comtip_shards.errors import SourceError
from comtip_shards.sections.facts import SectionFacts
from comtip_shards.sections.pooling import Pooled, Pooler
from comtip_shards.sections.section import Section, SectionMeta
from comtip_shards.sources.files.table_batches import BATCH
from comtip_shards.sources.tenx.features import Features
from comtip_shards.sources.tenx.matrix import TenxMatrix


def pooled_meta(
    path: Path,
    name: str,
    facts: SectionFacts,
    *,
    species: str,
    platform: str,
    mpp: float,
    pool_um: float,
    pooling: str,
) -> SectionMeta:
    """Return the metadata of a section of square pseudo-spots, ``pool_um`` wide; stated ``facts`` take precedence.

    Raises
    ------
    SourceError
        The tissue is not stated.
    """
    if not facts.tissue:
        raise SourceError(f"{path}: the folder does not state the tissue; set `tissue`")
    return SectionMeta(
        section_id=name,
        dataset=name,
        species=species.lower(),
        tissue=facts.tissue,
        donor=facts.donor or "",
        platform=facts.platform or platform,
        licence=facts.licence or "",
        attribution=facts.attribution or "",
        mpp=mpp,
        spot_diameter_um=pool_um,
        spot_pitch_um=pool_um,
        pooling=pooling,
    )


def pooled_section(
    meta: SectionMeta,
    image: Path,
    pooled: Pooled,
    xy: np.ndarray,
    genes: Features,
    *,
    dropped: Mapping[str, int],
    units: str,
    notes: Sequence[str],
) -> Section:
    """Return a section of pseudo-spots.

    Parameters
    ----------
    meta, image, notes
        Metadata, image path and notes of the section.
    pooled
        The N pseudo-spots that are kept.
    xy
        float64 (N, 2), centres in image px.
    genes
        Columns of ``pooled.counts``.
    dropped
        Number of excluded pseudo-spots by reason.
    units
        Name of the pooled units, e.g. ``bins``.
    """
    held = f"excluded pseudo-spots: {pooled.dropped_units:,} {units} with {pooled.dropped_counts:,} counts"
    return Section(
        meta,
        image,
        pooled.counts,
        genes.ids,
        genes.symbols,
        pooled.ids(),
        xy,
        pooled.square_N2.astype(np.float64),
        [""] * len(xy),
        {reason: n for reason, n in dropped.items() if n},
        [*notes, held] if pooled.dropped_squares else list(notes),
        n_pooled=pooled.n_units,
    )


def pool_cells(
    counts: TenxMatrix,
    features: Features,
    locate: Callable[[list[str]], tuple[np.ndarray, np.ndarray]],
    *,
    units: str,
    located: str,
    not_located: str,
    tally: dict[str, int] | None = None,
) -> tuple[Pooler, list[str]]:
    """Sum the counts of cells in squares, batch by batch.

    Parameters
    ----------
    counts, features
        Cell-feature matrix, and its row names.
    locate
        Takes the barcodes of a batch and returns the indices of those with a known position, int64 (k,), and the square of
        each of these, int64 (k, 2).
    units
        Name of the cells in notes, e.g. ``segmented cells``.
    located, not_located
        How messages describe cells with a position, in the error (``have a polygon in FILE``), and cells without a position, in
        the note (``no polygon``).
    tally
        A dict to which the sum of counts of each feature type is added.

    Returns
    -------
    The pooler with the sums, and notes on the cells.

    Raises
    ------
    SourceError
        There are no cells, fewer than half of them have a position (the files belong to different sections), or the matrix is damaged.
    """
    pooler, lost, lost_counts = Pooler(len(features.genes()), str(counts.path)), 0, 0
    for barcodes, matrix in counts.chunks(features, BATCH, tally):
        known, squares = locate(barcodes)
        pooler.add_units(squares)
        pooler.add_counts(squares, matrix[known])
        lost += len(barcodes) - len(known)
        lost_counts += int(matrix.sum(dtype=np.int64)) - int(matrix[known].sum(dtype=np.int64))
    if not pooler.total_units + lost:
        raise SourceError(f"{counts.path}: no cells; copy the matrix from the original output folder again")
    if pooler.total_units < max(1, lost):
        raise SourceError(
            f"{counts.path}: only {pooler.total_units} of its {pooler.total_units + lost} cells {located}; "
            "use files of one output folder"
        )
    notes = [f"{pooler.total_units:,} {units} pooled"]
    if lost:
        notes.append(f"{lost:,} cells with {lost_counts:,} counts excluded: {not_located}")
    return pooler, notes
