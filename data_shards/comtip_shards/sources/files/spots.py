"""Spot positions, and their join with counts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse

from comtip_shards.errors import SourceError
from comtip_shards.sections.section import Section, SectionMeta, check_unique
from comtip_shards.sources.files.tables import flags, numbers, read_table

NO_COUNTS, NO_POSITION = "in tissue but not in the counts", "in the counts but without a position"
"""Reasons for which :func:`join` drops spots that are in only one of the two files."""


@dataclass
class SpotPositions:
    """Spot positions, before the join with counts."""

    ids: list[str]
    xy: np.ndarray
    """float64 (n, 2), centres, x and y in px of the image."""
    array_xy: np.ndarray
    """float64 (n, 2), positions on the array, NaN if unknown."""
    labels: list[str]
    """Annotations, "" if there is none."""
    in_tissue: np.ndarray
    """bool (n,)."""


def read_spots_table(path: Path) -> SpotPositions:
    """Read a table of spots, separated by tabs, or else by commas or semicolons.

    The columns ``spot_id``, ``pixel_x`` and ``pixel_y`` are required; ``array_x``, ``array_y``, ``in_tissue`` (default: yes)
    and ``label`` are optional.

    Raises
    ------
    SourceError
        The table cannot be read, lacks a required column, or has duplicate ids or invalid values.
    """
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
    """Join spots in tissue with their counts by id, in the order of the spot table; dropped spots are counted.

    Parameters
    ----------
    meta, image, notes
        Metadata, image path and notes of the section.
    counts, count_ids
        Raw counts, int32 (m, n_genes), and the spot id of each row.
    genes, symbols
        Identifier and symbol of each column.
    spots
        Positions of the spots.
    counts_path, spots_path
        Files of counts and positions, for messages.

    Raises
    ------
    SourceError
        A file has no spots, the ids have nothing in common, or fewer than half of the smaller list match.
    """
    if not count_ids or not spots.ids:
        raise SourceError(f"{spots_path if count_ids else counts_path}: no spots; copy or download the file again")
    row_of = {spot: i for i, spot in enumerate(count_ids)}
    both = np.array([s in row_of for s in spots.ids], bool)
    if not both.any():
        if set(genes) & set(spots.ids):
            raise SourceError(
                f"{counts_path}: the spot ids of {spots_path.name} are its columns, so it is genes x spots; transpose it to spots x genes"
            )
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
        NO_COUNTS: lost,
        NO_POSITION: len(count_ids) - int(both.sum()),
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
