"""Visium HD: bins of 2, 8 or 16 um, or segmented cells, pooled to square pseudo-spots of a chosen width.

Bins lie on a grid, so a pseudo-spot is a block of whole bins and its centre follows the grid, turned as it may lie
on the image. Cells are points and are pooled in squares parallel to the image. Only bins in tissue count, and a
block that is covered too little is left out and counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from comtip_shards.errors import SourceError
from comtip_shards.sections.pooling import Pooler, squares_of
from comtip_shards.sections.section import Section
from comtip_shards.sources.base import SectionSource, existing, number, pick, refuse
from comtip_shards.sources.geojson import centroid, iter_features
from comtip_shards.sources.parquet import BATCH, all_numbers, batches
from comtip_shards.sources.pooled import pooled_meta, pooled_section, setting
from comtip_shards.sources.tenx import (
    Features,
    TenxMatrix,
    appearance_note,
    choose_image,
    find_matrix,
    scale_factors,
    section_name,
    species_of,
)

POOL_UM, MIN_COVER = 128.0, 0.5
FACTORS, TABLE = "scalefactors_json.json", "tissue_positions.parquet"
COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
CELLS = ("cell_segmentations.geojson", "graphclust_annotated_cell_segmentations.geojson")
_FOLDER = re.compile(r"square_(\d{3})um")
_BIN = r"^s_(?P<um>\d{3})um_(?P<row>\d+)_(?P<col>\d+)(?:-\d+)?$"
_CELL = r"^cellid_(?P<cell>\d+)(?:-\d+)?$"


def recognise(path: Path) -> str | None:
    """Return why ``path`` is such a folder, or None."""
    bins = _bins(path)
    if bins:
        return f"bins of Visium HD in {', '.join(p.name for p in bins.values())}"
    cells = any((path / "segmented_outputs").glob("*filtered_feature_cell_matrix*"))
    return "segmented cells of Visium HD in segmented_outputs" if cells else None


def open_sections(path: Path, samples: Sequence[str] | None, overrides: Mapping[str, str]) -> list[SectionSource]:
    """Return the one section of the folder, named by it."""
    path = path.resolve()
    root = path.parents[1] if _FOLDER.fullmatch(path.name) and path.parent.name == "binned_outputs" else path
    pick(samples, [section_name(root)], path)
    refuse(overrides, ("qv", "alignment"), "it is for Xenium")
    bins = _bins(path)
    what = overrides.get("pool_from") or ("bins" if bins else "cells")
    if what not in ("bins", "cells"):
        raise SourceError(f"--pool-from {what}: Visium HD has bins and cells")
    pool_um = setting(overrides, "pool_um", POOL_UM)
    if what == "cells":
        return [_cells_source(root, pool_um, bins, overrides)]
    if not bins:
        raise SourceError(f"{path}: no binned_outputs/square_016um (or 008um, 002um); for cells give --pool-from cells")
    return [_bins_source(root, pool_um, bins, overrides)]


def _bins(path: Path) -> dict[float, Path]:
    """Return {width in um: folder}, largest first; ``path`` may be such a folder itself."""
    folders = [path] if _FOLDER.fullmatch(path.resolve().name) else []
    for parent in (path / "binned_outputs", path):
        folders += sorted(parent.glob("square_*um")) if parent.is_dir() else []
    found = {
        float(match[1]): folder
        for folder in folders
        if (match := _FOLDER.fullmatch(folder.resolve().name)) and (folder / "spatial" / TABLE).is_file()
    }
    return dict(sorted(found.items(), reverse=True))


def _pictures(folder: Path, root: Path) -> Path:
    """Return where the shrunk pictures lie: beside the positions, or once for all bins."""
    places = (folder / "spatial", root / "spatial")
    return next((p for p in places if any(p.glob("tissue_*_image.png"))), places[0])


# -- bins ---------------------------------------------------------------------------------------------------


@dataclass
class _Grid:
    """The bins that there are."""

    shape: tuple[int, int]
    """Rows, columns."""
    state: np.ndarray
    """uint8 (rows * columns,): 0 no such bin, 1 outside tissue, 2 in tissue."""
    sums: np.ndarray
    """float64 (block rows * block columns, 5): bins, and sums of their x, y, column and row."""
    side: int
    """Bins along a pseudo-spot."""

    def blocks(self) -> int:
        """Return blocks along a row."""
        return -(-self.shape[1] // self.side)


def _bins_source(root: Path, pool_um: float, bins: dict[float, Path], overrides: Mapping[str, str]) -> SectionSource:
    refuse(overrides, ("min_pooled",), "give --min-cover for bins")
    width = _bin_width(bins, pool_um, overrides, root)
    folder = bins[width]
    cover = setting(overrides, "min_cover", MIN_COVER, most=1.0)
    counts = find_matrix(folder, "filtered_feature_bc_matrix") or find_matrix(folder, "raw_feature_bc_matrix")
    if counts is None:
        raise SourceError(f"{folder}: neither filtered_feature_bc_matrix.h5 nor the folder of that name is there")
    factors = scale_factors(folder / "spatial" / FACTORS)
    if factors.get("bin_size_um", width) != width:
        raise SourceError(f"{folder}: {FACTORS} says bins of {factors['bin_size_um']:g} um; take both from one run")
    full_mpp = _scale(factors, folder / "spatial" / FACTORS, overrides)
    image, scale, notes = choose_image(root, _pictures(folder, root), factors, overrides.get("image", ""))
    features = counts.features()
    meta = pooled_meta(
        root, section_name(root), overrides, species=overrides.get("species") or species_of(features.ids, counts.path),
        platform="Visium HD", mpp=full_mpp / scale, pool_um=pool_um,
        pooling=f"bins of {width:g} um in squares of {pool_um:g} um, at least {100 * cover:g}% of them in tissue",
    )  # fmt: skip
    side = round(pool_um / width)
    table = folder / "spatial" / TABLE

    def load() -> Section:
        grid = _read_grid(table, side)
        pooler, said = _pool_bins(grid, counts, features, table, width)
        pooled = pooler.result(min_units=max(1, math.ceil(cover * side * side - 1e-9)))
        if not len(pooled.n_units):
            raise SourceError(
                f"{table}: no square of {pool_um:g} um has {100 * cover:g}% of its bins in tissue; lower --min-cover or --pool-um"
            )
        xy, lies = _centres(grid, pooled.square_N2, full_mpp, width, table)
        return pooled_section(
            meta, image, pooled, xy * scale, features.only_genes(), units="bins",
            dropped={f"pseudo-spots with under {100 * cover:g}% of their bins in tissue": pooled.dropped_squares},
            notes=[*notes, *said, lies, *features.others_note(), *appearance_note(image)],
        )  # fmt: skip

    return SectionSource(meta, (image, *counts.files, table, folder / "spatial" / FACTORS), load)


def _bin_width(bins: dict[float, Path], pool_um: float, overrides: Mapping[str, str], root: Path) -> float:
    have = ", ".join(f"{w:g}" for w in bins)
    wanted = setting(overrides, "bin_um", 0.0)
    if wanted and wanted not in bins:
        raise SourceError(f"{root}: no bins of {wanted:g} um; there are {have} um")
    for width in [wanted] if wanted else list(bins):
        if abs(pool_um / width - round(pool_um / width)) < 1e-9 and pool_um >= width:
            return width
    width = wanted or min(bins)
    raise SourceError(
        f"--pool-um {pool_um:g} is no multiple of the bins of {wanted or have} um; use e.g. "
        f"{max(1, round(pool_um / width)) * width:g}"
    )


def _scale(factors: Mapping[str, float], path: Path, overrides: Mapping[str, str]) -> float:
    """Return um per full-resolution px, from the file or as stated, where the two agree."""
    stated = number(overrides["mpp"], "--mpp") if overrides.get("mpp") else None
    mpp = factors.get("microns_per_pixel", stated)
    if mpp is None or not mpp > 0:
        raise SourceError(f"{path}: no microns_per_pixel; give --mpp, the um per px of the full-resolution image")
    width, diameter = factors.get("bin_size_um"), factors.get("spot_diameter_fullres")
    if width and diameter and not 0.95 < diameter * mpp / width < 1.05:
        raise SourceError(
            f"{path}: bins of {width:g} um are {diameter:.3f} px wide, so a px is {width / diameter:.4f} um and not "
            f"{mpp:g}; the file is not of one run"
        )
    if stated is not None and not 0.95 < stated / mpp < 1.05:
        raise SourceError(f"{path}: says {mpp:g} um per full-resolution px, --mpp says {stated:g}; leave --mpp out")
    return mpp


def _named(names: pa.Array, pattern: str, path: Path, like: str) -> dict[str, np.ndarray]:
    """Return the numbers in barcodes, int64 by group of ``pattern``."""
    found = pc.extract_regex(pc.cast(names, pa.string()), pattern)
    if found.null_count:
        bad = names[pc.index(pc.is_null(found), True).as_py()].as_py()
        raise SourceError(f"{path}: barcode {bad!r} is not like {like}")
    return {
        f.name: pc.cast(pc.struct_field(found, i), pa.int64()).to_numpy(zero_copy_only=False)
        for i, f in enumerate(found.type)
    }


def _read_grid(path: Path, side: int) -> _Grid:
    """Read which bins there are and where; batch by batch, because at 2 um there are eleven million."""
    high = np.array([-1, -1])
    for batch in batches(path, ["array_row", "array_col"]):
        rc = all_numbers(batch, ["array_row", "array_col"], path).astype(np.int64)
        if rc.size and (rc.min() < 0 or rc.max() >= 1 << 20):
            raise SourceError(f"{path}: array_row and array_col from {rc.min()} to {rc.max()} are on no slide")
        high = np.maximum(high, rc.max(axis=0, initial=-1))
    if high.min() < 0:
        raise SourceError(f"{path}: the table has no rows")
    shape = (int(high[0]) + 1, int(high[1]) + 1)
    blocks = -(-shape[0] // side) * -(-shape[1] // side)
    grid = _Grid(shape, np.zeros(shape[0] * shape[1], np.uint8), np.zeros((blocks, 5)), side)
    n = 0
    for batch in batches(path, COLUMNS):
        row, col, tissue = all_numbers(batch, ["array_row", "array_col", "in_tissue"], path).astype(np.int64).T
        xy = all_numbers(batch, ["pxl_col_in_fullres", "pxl_row_in_fullres"], path)
        names = _named(batch.column("barcode"), _BIN, path, "s_016um_00118_00105-1")
        if (names["row"] != row).any() or (names["col"] != col).any():
            raise SourceError(f"{path}: barcodes name other rows and columns than array_row and array_col")
        grid.state[row * shape[1] + col] = np.where(tissue == 1, 2, 1)
        block = (row // side) * grid.blocks() + col // side
        for i, values in enumerate((np.ones(len(row)), xy[:, 0], xy[:, 1], col, row)):
            grid.sums[:, i] += np.bincount(block, values, len(grid.sums))
        n += len(row)
    if int((grid.state > 0).sum()) != n:
        raise SourceError(f"{path}: {n - int((grid.state > 0).sum())} bins stand more than once")
    return grid


def _pool_bins(
    grid: _Grid, counts: TenxMatrix, features: Features, table: Path, width: float
) -> tuple[Pooler, list[str]]:
    """Add up the bins in tissue; returns the sums and what is to be said."""
    pooler = Pooler(len(features.genes()))
    tissue = np.flatnonzero(grid.state == 2)
    for part in np.array_split(tissue, max(1, len(tissue) // BATCH)):
        row, col = np.divmod(part, grid.shape[1])
        pooler.add_units(np.stack([col, row], axis=1) // grid.side)
    seen = outside = lost = 0
    for barcodes, matrix in counts.chunks(features, BATCH):
        names = _named(pa.array(barcodes), _BIN, counts.path, "s_016um_00118_00105-1")
        if (names["um"] != width).any():
            raise SourceError(f"{counts.path}: holds bins of {names['um'][names['um'] != width][0]} um, not {width:g}")
        row, col = names["row"], names["col"]
        inside = (row < grid.shape[0]) & (col < grid.shape[1])
        state = np.where(inside, grid.state[np.where(inside, row * grid.shape[1] + col, 0)], 0)
        if (state == 0).any():
            first = barcodes[int(np.flatnonzero(state == 0)[0])]
            raise SourceError(
                f"{counts.path}: {int((state == 0).sum())} bins are out of the grid of {table} (e.g. {first}); "
                "take both from one run"
            )
        kept = np.flatnonzero(state == 2)
        pooler.add_counts(np.stack([col, row], axis=1)[kept] // grid.side, matrix[kept])
        seen, outside = seen + len(kept), outside + int((state == 1).sum())
        lost += int(matrix[np.flatnonzero(state == 1)].sum(dtype=np.int64))
    if not seen:
        raise SourceError(f"{counts.path} and {table} share no bin in tissue; take both from one run")
    notes = [f"{len(tissue):,} bins of {width:g} um in tissue are pooled, {seen:,} of them with counts"]
    if outside:
        notes.append(f"{outside:,} bins with {lost:,} counts lie outside tissue and are left out")
    return pooler, notes


def _centres(grid: _Grid, square_N2: np.ndarray, mpp: float, width: float, path: Path) -> tuple[np.ndarray, str]:
    """Return the centres of blocks in full-resolution px, float64 (N, 2), and how the grid lies.

    The mean over the bins of a block is its centre where the block is whole; where bins are missing it is moved by
    the grid's own steps on the image.
    """
    n = grid.sums[:, 0]
    mean = grid.sums[n > 0, 1:] / n[n > 0, None]
    design = np.column_stack([mean[:, 2:], np.ones(len(mean))])
    if np.linalg.matrix_rank(design) < 3:
        bins = np.flatnonzero(grid.state)
        raise SourceError(
            f"{path}: {len(bins)} bins make too few pseudo-spots to tell how the grid lies; lower --pool-um"
        )
    fit, *_ = np.linalg.lstsq(design, mean[:, :2], rcond=None)
    step = float(np.sqrt(abs(np.linalg.det(fit[:2]))))
    if not 0.95 < step * mpp / width < 1.05:
        raise SourceError(
            f"{path}: bins of {width:g} um lie {step:.3f} px apart, which makes a px {width / max(step, 1e-9):.4f} um, but "
            f"{mpp:g} um per px is stated; positions and scale factors are not of one run"
        )
    index = square_N2[:, 1] * grid.blocks() + square_N2[:, 0]
    own = grid.sums[index, 1:] / grid.sums[index, :1]
    centre = (square_N2 + 0.5) * grid.side - 0.5
    angle = float(np.degrees(np.arctan2(fit[0, 1], fit[0, 0])))
    mirrored = " and mirrored" if np.linalg.det(fit[:2]) < 0 else ""
    note = f"the grid of bins is turned by {angle:.1f} degrees{mirrored} on the image"
    return own[:, :2] + (centre - own[:, 2:]) @ fit[:2], note


# -- cells --------------------------------------------------------------------------------------------------


def _cells_source(root: Path, pool_um: float, bins: dict[float, Path], overrides: Mapping[str, str]) -> SectionSource:
    refuse(overrides, ("min_cover", "bin_um"), "cells are pooled; give --min-pooled")
    folder = root / "segmented_outputs"
    counts = find_matrix(folder, "filtered_feature_cell_matrix")
    if counts is None:
        raise SourceError(
            f"{folder}: no filtered_feature_cell_matrix.h5; Space Ranger 4 writes it where it segments cells; or pool bins"
        )
    polygons = next((p for n in CELLS if (p := folder / n).is_file()), folder / CELLS[0])
    existing(polygons, "polygons of the cells")
    spatial = next(
        (s for s in (folder / "spatial", *(b / "spatial" for b in bins.values())) if (s / FACTORS).is_file()), None
    )
    if spatial is None:
        raise SourceError(f"{folder / 'spatial' / FACTORS}: no such file, but it holds the scale of positions")
    factors = scale_factors(spatial / FACTORS)
    full_mpp = _scale(factors, spatial / FACTORS, overrides)
    image, scale, notes = choose_image(root, _pictures(spatial.parent, root), factors, overrides.get("image", ""))
    features = counts.features()
    least = int(setting(overrides, "min_pooled", 1))
    meta = pooled_meta(
        root, section_name(root), overrides, species=overrides.get("species") or species_of(features.ids, counts.path),
        platform="Visium HD", mpp=full_mpp / scale, pool_um=pool_um,
        pooling=f"segmented cells in squares of {pool_um:g} um, at least {least}",
    )  # fmt: skip

    def load() -> Section:
        pooler, said = _pool_cells(counts, features, polygons, pool_um / full_mpp)
        pooled = pooler.result(min_units=least)
        if not len(pooled.n_units):
            raise SourceError(f"{polygons}: no square of {pool_um:g} um holds {least} cells; lower --min-pooled")
        xy = (pooled.square_N2 + 0.5) * (pool_um / full_mpp) * scale
        return pooled_section(
            meta, image, pooled, xy, features.only_genes(), units="cells",
            dropped={f"pseudo-spots with under {least} cells": pooled.dropped_squares},
            notes=[*notes, *said, *features.others_note(), *appearance_note(image)],
        )  # fmt: skip

    return SectionSource(meta, (image, *counts.files, polygons, spatial / FACTORS), load)


def _pool_cells(counts: TenxMatrix, features: Features, polygons: Path, width_px: float) -> tuple[Pooler, list[str]]:
    where: dict[int, tuple[float, float]] = {}
    for feature in iter_features(polygons):
        cell = (feature.get("properties") or {}).get("cell_id")
        digits = re.search(r"\d+", str(cell))
        if digits is None:
            raise SourceError(f"{polygons}: a feature without cell_id: {feature.get('properties')}")
        if int(digits[0]) in where:
            raise SourceError(f"{polygons}: cell {digits[0]} stands more than once")
        where[int(digits[0])] = centroid(feature, polygons)
    pooler, lost, lost_counts = Pooler(len(features.genes())), 0, 0
    for barcodes, matrix in counts.chunks(features, BATCH):
        cells = _named(pa.array(barcodes), _CELL, counts.path, "cellid_000000001-1")["cell"].tolist()
        xy = np.array([where.get(c, (np.nan, np.nan)) for c in cells], np.float64).reshape(-1, 2)
        known = np.flatnonzero(np.isfinite(xy[:, 0]))
        squares = squares_of(xy[known], width_px)
        pooler.add_units(squares)
        pooler.add_counts(squares, matrix[known])
        lost += len(cells) - len(known)
        lost_counts += int(matrix.sum(dtype=np.int64)) - int(matrix[known].sum(dtype=np.int64))
    if pooler.total_units < max(1, lost):
        raise SourceError(
            f"{counts.path}: only {pooler.total_units} of its {pooler.total_units + lost} cells have a polygon in {polygons}; "
            "take both from one run"
        )
    notes = [f"{pooler.total_units:,} segmented cells are pooled"]
    if lost:
        notes.append(f"{lost:,} cells with {lost_counts:,} counts have no polygon and are left out")
    return pooler, notes
