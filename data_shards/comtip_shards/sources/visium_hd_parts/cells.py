"""Pooling of segmented Visium HD cells in squares parallel to the image."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from comtip_shards.errors import SourceError
from comtip_shards.sections.facts import SourceOptions, refuse
from comtip_shards.sections.pooling import Pooler, squares_of
from comtip_shards.sections.section import Section, SectionMeta
from comtip_shards.sources.base import SectionSource
from comtip_shards.sources.files.geojson import centroid, iter_features
from comtip_shards.sources.files.opening import existing
from comtip_shards.sources.files.packaging import unpacked
from comtip_shards.sources.tenx.features import Features, for_species
from comtip_shards.sources.tenx.matrix import TenxMatrix
from comtip_shards.sources.tenx.pooled import pool_cells, pooled_meta, pooled_section
from comtip_shards.sources.tenx.run import appearance_note, choose_image, find_matrix, scale_factors, section_name
from comtip_shards.sources.visium_hd_parts.files import FACTORS, find_factors, numbers_in, pictures_of
from comtip_shards.sources.visium_hd_parts.scale import scale_of

CELLS = ("cell_segmentations.geojson", "graphclust_annotated_cell_segmentations.geojson")
_CELL = r"^cellid_(?P<cell>\d+)(?:-\d+)?$"


@dataclass(frozen=True)
class _Cells:
    """Inputs of one section of segmented cells."""

    counts: TenxMatrix
    features: Features
    polygons: Path
    image: Path
    scale: float
    """px of the image per full-resolution px."""
    full_mpp: float
    """um per full-resolution px."""
    pool_um: float
    least: int
    """Minimum number of cells of a pseudo-spot."""


def cells_source(root: Path, pool_um: float, bins: Mapping[float, Path], options: SourceOptions) -> SectionSource:
    """Return the source of a section whose pseudo-spots are pooled from the segmented cells of a Visium HD folder.

    Parameters and errors as for :func:`comtip_shards.sources.visium_hd_parts.bins.bins_source`.
    """
    refuse(options, ("min_cover", "bin_um"), "it is for bins (cells have `min_pooled`)")
    folder = root / "segmented_outputs"
    counts = find_matrix(folder, "filtered_feature_cell_matrix")
    if counts is None:
        raise SourceError(
            f"{folder}: no filtered_feature_cell_matrix.h5 (written by Space Ranger 4 with cell segmentation); copy it from the "
            f"Space Ranger output{', or set `pool_from` to bins' if bins else ''}"
        )
    polygons = next((p for n in CELLS if (p := folder / n).is_file()), folder / CELLS[0])
    existing(polygons, "cell polygons")
    folders = [folder / "spatial", *(b / "spatial" for b in bins.values())]
    spatial = next((s for s in folders if find_factors(s) is not None), folders[0])
    factors_file, facts, name = find_factors(spatial), options.facts, section_name(root)
    factors = scale_factors(factors_file) if factors_file is not None else {}
    if factors_file is None and facts.mpp is None:
        raise SourceError(f"{spatial / FACTORS}: no such file; copy it from the Space Ranger output, or set `mpp`")
    full_mpp = scale_of(factors, spatial / FACTORS, facts.mpp)
    image, scale, notes = choose_image(root, pictures_of(spatial.parent, root), factors, facts.image, name)
    features, species = for_species(counts.features(), facts.species, counts.path)
    least = options.pooling.min_pooled or 1
    meta = pooled_meta(
        root,
        name,
        facts,
        species=species,
        platform="Visium HD",
        mpp=full_mpp / scale,
        pool_um=pool_um,
        pooling=f"segmented cells in squares of {pool_um:g} um, at least {least}",
    )
    run = _Cells(counts, features, polygons, image, scale, full_mpp, pool_um, least)
    files = (image, *counts.files, polygons, *([factors_file] if factors_file is not None else []))
    return SectionSource(meta, files, partial(_load, run, meta, notes))


def _load(run: _Cells, meta: SectionMeta, notes: list[str]) -> Section:
    tally: dict[str, int] = {}
    pooler, pool_notes = _pool_cells(run.counts, run.features, run.polygons, run.pool_um / run.full_mpp, tally)
    pooled = pooler.result(min_units=run.least)
    if not len(pooled.n_units):
        raise SourceError(
            f"{run.polygons}: no square of {run.pool_um:g} um contains {run.least} cells; reduce `min_pooled`"
        )
    plain = unpacked(run.image)
    return pooled_section(
        meta,
        plain,
        pooled,
        (pooled.square_N2 + 0.5) * (run.pool_um / run.full_mpp) * run.scale,
        run.features.only_genes(),
        units="cells",
        dropped={f"pseudo-spots with under {run.least} cells": pooled.dropped_squares},
        notes=[*notes, *pool_notes, *run.features.others_note(tally), *appearance_note(plain)],
    )


def _pool_cells(
    counts: TenxMatrix, features: Features, polygons: Path, width_px: float, tally: dict[str, int]
) -> tuple[Pooler, list[str]]:
    """Sum the counts of cells per square, by the centroids of their polygons; returns the pooler and notes on the cells."""
    centroids = _read_centroids(polygons)

    def locate(barcodes: list[str]) -> tuple[np.ndarray, np.ndarray]:
        cells = numbers_in(pa.array(barcodes), _CELL, counts.path, "cellid_000000001-1")["cell"].tolist()
        xy = np.array([centroids.get(c, (np.nan, np.nan)) for c in cells], np.float64).reshape(-1, 2)
        known = np.flatnonzero(np.isfinite(xy[:, 0]))
        return known, squares_of(xy[known], width_px, str(polygons))

    return pool_cells(
        counts,
        features,
        locate,
        units="segmented cells",
        located=f"have a polygon in {polygons}",
        not_located="no polygon",
        tally=tally,
    )


def _read_centroids(polygons: Path) -> dict[int, tuple[float, float]]:
    """Return {cell number: centroid of its polygon in full-resolution px}."""
    out: dict[int, tuple[float, float]] = {}
    for feature in iter_features(polygons):
        cell = (feature.get("properties") or {}).get("cell_id")
        digits = re.search(r"\d+", str(cell))
        if digits is None:
            raise SourceError(
                f"{polygons}: a feature has no cell_id: {feature.get('properties')}; copy the file from the Space Ranger output again"
            )
        if int(digits[0]) in out:
            raise SourceError(
                f"{polygons}: duplicate cell {digits[0]}; copy the file from the Space Ranger output again"
            )
        out[int(digits[0])] = centroid(feature, polygons)
    return out
