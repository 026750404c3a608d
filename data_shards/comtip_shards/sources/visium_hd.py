"""Visium HD: bins of 2, 8 or 16 um, or segmented cells, pooled to square pseudo-spots.

Bins form a grid, which may be rotated against the image. A pseudo-spot is a block of bins, and its centre follows the
grid. Cells are pooled in squares parallel to the image. Only bins in tissue are counted; blocks with too few of them
are excluded and reported.
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
from comtip_shards.sources.files.geojson import centroid, iter_features
from comtip_shards.sources.files.packaging import by_prefix, find, unpacked
from comtip_shards.sources.files.table_batches import BATCH, all_numbers, batches
from comtip_shards.sources.tenx.features import Features, for_species
from comtip_shards.sources.tenx.matrix import TenxMatrix
from comtip_shards.sources.tenx.pooled import pooled_meta, pooled_section, setting
from comtip_shards.sources.tenx.run import (
    appearance_note,
    choose_image,
    find_matrix,
    find_pictures,
    scale_factors,
    section_name,
)

POOL_UM, MIN_COVER = 128.0, 0.5
FACTORS, TABLE = "scalefactors_json.json", r"tissue_positions\.(?:parquet|csv)"
COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
CELLS = ("cell_segmentations.geojson", "graphclust_annotated_cell_segmentations.geojson")
_FOLDER = re.compile(r"square_(\d{3})um")
_BIN = r"^s_(?P<um>\d{3})um_(?P<row>\d+)_(?P<col>\d+)(?:-\d+)?$"
_CELL = r"^cellid_(?P<cell>\d+)(?:-\d+)?$"


def recognise(path: Path) -> str | None:
    """Return a reason if ``path`` is a Visium HD folder, else None."""
    bins = _bins(path)
    if bins:
        return f"bins of Visium HD in {', '.join(p.name for p in bins.values())}"
    cells = bool(find(path / "segmented_outputs", "*filtered_feature_cell_matrix*"))
    return "segmented cells of Visium HD in segmented_outputs" if cells else None


def open_sections(path: Path, samples: Sequence[str] | None, overrides: Mapping[str, str]) -> list[SectionSource]:
    """Return the section of the folder, named after it."""
    path = path.resolve()
    root = path.parents[1] if _FOLDER.fullmatch(path.name) and path.parent.name == "binned_outputs" else path
    pick(samples, [section_name(root)], path)
    refuse(overrides, ("qv", "alignment"), "this option is for Xenium")
    bins = _bins(path)
    what = overrides.get("pool_from") or ("bins" if bins else "cells")
    if what not in ("bins", "cells"):
        raise SourceError(f"unknown --pool-from {what}; use bins or cells for Visium HD")
    pool_um = setting(overrides, "pool_um", POOL_UM)
    if what == "cells":
        return [_cells_source(root, pool_um, bins, overrides)]
    if not bins:
        raise SourceError(
            f"{path}: no binned_outputs/square_016um, 008um or 002um; to pool cells set --pool-from cells"
        )
    return [_bins_source(root, pool_um, bins, overrides)]


def _bins(path: Path) -> dict[float, Path]:
    """Return {bin width in um: folder}, largest first; ``path`` may be one of these folders."""
    folders = [path] if _FOLDER.fullmatch(path.resolve().name) else []
    for parent in (*find(path, "*binned_outputs"), path):
        folders += find(parent, "square_*um")
    found = {
        float(match[1]): folder
        for folder in folders
        if (match := _FOLDER.fullmatch(folder.resolve().name)) and _table(folder) is not None
    }
    return dict(sorted(found.items(), reverse=True))


def _table(folder: Path) -> Path | None:
    """Return the table of positions of one bin width; Parquet has precedence over csv."""
    found = [p for files in by_prefix(folder / "spatial", TABLE).values() for p in files]
    return next((p for p in found if ".parquet" in p.name), found[0] if found else None)


def _factors(spatial: Path) -> Path | None:
    """Return the file of scale factors, which early Visium HD data sets lack."""
    found = [p for files in by_prefix(spatial, re.escape(FACTORS)).values() for p in files]
    return found[0] if found else None


def _pictures(folder: Path, root: Path) -> dict[str, Path]:
    """Return the downscaled images: next to the positions, or shared by all bins."""
    return find_pictures(folder / "spatial") or find_pictures(root / "spatial")


# -- bins ---------------------------------------------------------------------------------------------------


@dataclass
class _Grid:
    """Occupancy and positions of the bin grid."""

    shape: tuple[int, int]
    """Rows, columns."""
    state: np.ndarray
    """uint8 (rows * columns,): 0 absent, 1 outside tissue, 2 in tissue."""
    sums: np.ndarray
    """float64 (block rows * block columns, 5): bins, and sums of their x, y, column and row."""
    side: int
    """Bins per pseudo-spot along one axis."""

    def blocks(self) -> int:
        """Return the number of blocks per row."""
        return -(-self.shape[1] // self.side)


def _bins_source(root: Path, pool_um: float, bins: dict[float, Path], overrides: Mapping[str, str]) -> SectionSource:
    refuse(overrides, ("min_pooled",), "for bins set --min-cover")
    width = _bin_width(bins, pool_um, overrides, root)
    folder = bins[width]
    cover = setting(overrides, "min_cover", MIN_COVER, most=1.0)
    counts = find_matrix(folder, "filtered_feature_bc_matrix") or find_matrix(folder, "raw_feature_bc_matrix")
    if counts is None:
        raise SourceError(
            f"{folder}: neither filtered_feature_bc_matrix.h5 nor a folder of that name exists; copy it from the run"
        )
    table, factors_file = _table(folder), _factors(folder / "spatial")
    if table is None:
        raise SourceError(f"{folder / 'spatial'}: no tissue_positions.parquet; copy it from the run")
    factors = scale_factors(factors_file) if factors_file is not None else {}
    if factors.get("bin_size_um", width) != width:
        raise SourceError(
            f"{folder}: {FACTORS} states bins of {factors['bin_size_um']:g} um; use files of the same run"
        )
    full_mpp, scale_notes = _scale_or_pitch(factors, table, width, overrides)
    image, scale, notes = choose_image(root, _pictures(folder, root), factors, overrides.get("image", ""))
    notes += scale_notes
    features, species = for_species(counts.features(), overrides.get("species", ""), counts.path)
    meta = pooled_meta(
        root,
        section_name(root),
        overrides,
        species=species,
        platform="Visium HD",
        mpp=full_mpp / scale,
        pool_um=pool_um,
        pooling=f"bins of {width:g} um in squares of {pool_um:g} um, at least {100 * cover:g}% of them in tissue",
    )
    side = round(pool_um / width)

    def load() -> Section:
        grid = _read_grid(table, side)
        tally: dict[str, int] = {}
        pooler, pool_notes = _pool_bins(grid, counts, features, table, width, tally)
        pooled = pooler.result(min_units=max(1, math.ceil(cover * side * side - 1e-9)))
        if not len(pooled.n_units):
            raise SourceError(
                f"{table}: no square of {pool_um:g} um has {100 * cover:g}% of its bins in tissue; reduce --min-cover or --pool-um"
            )
        xy, grid_note = _centres(grid, pooled.square_N2, full_mpp, width, table)
        plain = unpacked(image)
        return pooled_section(
            meta,
            plain,
            pooled,
            xy * scale,
            features.only_genes(),
            units="bins",
            dropped={f"pseudo-spots with under {100 * cover:g}% of their bins in tissue": pooled.dropped_squares},
            notes=[*notes, *pool_notes, grid_note, *features.others_note(tally), *appearance_note(plain)],
        )

    files = (image, *counts.files, table, *([factors_file] if factors_file is not None else []))
    return SectionSource(meta, files, load)


def _bin_width(bins: dict[float, Path], pool_um: float, overrides: Mapping[str, str], root: Path) -> float:
    have = ", ".join(f"{w:g}" for w in bins)
    wanted = setting(overrides, "bin_um", 0.0)
    if wanted and wanted not in bins:
        raise SourceError(f"{root}: no bins of {wanted:g} um; available: {have} um")
    for width in [wanted] if wanted else list(bins):
        if abs(pool_um / width - round(pool_um / width)) < 1e-9 and pool_um >= width:
            return width
    width = wanted or min(bins)
    raise SourceError(
        f"--pool-um {pool_um:g} is not a multiple of the bin width ({wanted or have} um); use e.g. "
        f"{max(1, round(pool_um / width)) * width:g}"
    )


def _scale(factors: Mapping[str, float], path: Path, overrides: Mapping[str, str]) -> float:
    """Return um per full-resolution px from the file or --mpp, which must agree."""
    stated = number(overrides["mpp"], "--mpp") if overrides.get("mpp") else None
    mpp = factors.get("microns_per_pixel", stated)
    if mpp is None or not mpp > 0:
        raise SourceError(f"{path}: no microns_per_pixel; give --mpp, the um per px of the full-resolution image")
    width, diameter = factors.get("bin_size_um"), factors.get("spot_diameter_fullres")
    if width and diameter and not 0.95 < diameter * mpp / width < 1.05:
        raise SourceError(
            f"{path}: bins of {width:g} um are {diameter:.3f} px wide, which gives {width / diameter:.4f} um per px instead of "
            f"{mpp:g}; copy the file from the run again"
        )
    if stated is not None and not 0.95 < stated / mpp < 1.05:
        raise SourceError(f"{path}: states {mpp:g} um per full-resolution px, but --mpp is {stated:g}; omit --mpp")
    return mpp


def _scale_or_pitch(
    factors: Mapping[str, float], table: Path, width: float, overrides: Mapping[str, str]
) -> tuple[float, list[str]]:
    """Return um per full-resolution px and notes; without scale factors it is the bin width over the pitch of bins."""
    if factors:
        return _scale(factors, table.parent / FACTORS, overrides), []
    mpp = width / _pitch_px(table)
    stated = number(overrides["mpp"], "--mpp") if overrides.get("mpp") else mpp
    if not 0.95 < stated / mpp < 1.05:
        raise SourceError(
            f"{table}: bins of {width:g} um with this pitch have {mpp:.4f} um per full-resolution px, but --mpp is {stated:g}; "
            "omit --mpp"
        )
    return stated, [f"no {FACTORS}; scale: {mpp:.4f} um per full-resolution px, from the pitch of bins of {width:g} um"]


def _pitch_px(table: Path) -> float:
    """Return px between neighbouring bins by a least-squares fit of positions to rows and columns."""
    gram, moment, n = np.zeros((3, 3)), np.zeros((3, 2)), 0
    for batch in batches(table, COLUMNS[2:]):
        rc = all_numbers(batch, ["array_col", "array_row"], table)
        xy = all_numbers(batch, ["pxl_col_in_fullres", "pxl_row_in_fullres"], table)
        design = np.column_stack([rc, np.ones(len(rc))])
        gram, moment, n = gram + design.T @ design, moment + design.T @ xy, n + len(rc)
    if n < 3 or np.linalg.matrix_rank(gram) < 3:
        raise SourceError(f"{table}: too few bins to estimate the scale; copy {FACTORS} from the run")
    return float(np.sqrt(abs(np.linalg.det(np.linalg.solve(gram, moment)[:2]))))


def _named(names: pa.Array, pattern: str, path: Path, like: str) -> dict[str, np.ndarray]:
    """Parse the numbers in barcodes, int64 per group of ``pattern``."""
    found = pc.extract_regex(pc.cast(names, pa.string()), pattern)
    if found.null_count:
        bad = names[pc.index(pc.is_null(found), True).as_py()].as_py()
        raise SourceError(f"{path}: barcode {bad!r} is not of the form {like}; use the files of one Visium HD run")
    return {
        f.name: pc.cast(pc.struct_field(found, i), pa.int64()).to_numpy(zero_copy_only=False)
        for i, f in enumerate(found.type)
    }


def _read_grid(path: Path, side: int) -> _Grid:
    """Read the bin grid in batches; there are eleven million bins of 2 um."""
    high = np.array([-1, -1])
    for batch in batches(path, ["array_row", "array_col"]):
        rc = all_numbers(batch, ["array_row", "array_col"], path).astype(np.int64)
        if rc.size and (rc.min() < 0 or rc.max() >= 1 << 20):
            raise SourceError(f"{path}: array_row and array_col range from {rc.min()} to {rc.max()}, outside any slide")
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
            raise SourceError(f"{path}: barcodes and array_row, array_col differ; copy the table from the run again")
        grid.state[row * shape[1] + col] = np.where(tissue == 1, 2, 1)
        block = (row // side) * grid.blocks() + col // side
        for i, values in enumerate((np.ones(len(row)), xy[:, 0], xy[:, 1], col, row)):
            grid.sums[:, i] += np.bincount(block, values, len(grid.sums))
        n += len(row)
    if int((grid.state > 0).sum()) != n:
        raise SourceError(
            f"{path}: {n - int((grid.state > 0).sum())} duplicate bins; copy the table from the run again"
        )
    return grid


def _pool_bins(
    grid: _Grid, counts: TenxMatrix, features: Features, table: Path, width: float, tally: dict[str, int]
) -> tuple[Pooler, list[str]]:
    """Sum the bins in tissue; returns (sums, notes)."""
    pooler = Pooler(len(features.genes()))
    tissue = np.flatnonzero(grid.state == 2)
    for part in np.array_split(tissue, max(1, len(tissue) // BATCH)):
        row, col = np.divmod(part, grid.shape[1])
        pooler.add_units(np.stack([col, row], axis=1) // grid.side)
    seen = outside = lost = 0
    for barcodes, matrix in counts.chunks(features, BATCH, tally):
        names = _named(pa.array(barcodes), _BIN, counts.path, "s_016um_00118_00105-1")
        if (names["um"] != width).any():
            raise SourceError(
                f"{counts.path}: contains bins of {names['um'][names['um'] != width][0]} um instead of {width:g}; use files of the same bin width"
            )
        row, col = names["row"], names["col"]
        inside = (row < grid.shape[0]) & (col < grid.shape[1])
        state = np.where(inside, grid.state[np.where(inside, row * grid.shape[1] + col, 0)], 0)
        if (state == 0).any():
            first = barcodes[int(np.flatnonzero(state == 0)[0])]
            raise SourceError(
                f"{counts.path}: {int((state == 0).sum())} bins are outside the grid of {table} (e.g. {first}); "
                "use files of the same run"
            )
        kept = np.flatnonzero(state == 2)
        pooler.add_counts(np.stack([col, row], axis=1)[kept] // grid.side, matrix[kept])
        seen, outside = seen + len(kept), outside + int((state == 1).sum())
        lost += int(matrix[np.flatnonzero(state == 1)].sum(dtype=np.int64))
    if not seen:
        raise SourceError(f"{counts.path} and {table} have no bin in tissue in common; use files of the same run")
    notes = [f"{len(tissue):,} bins of {width:g} um in tissue pooled, {seen:,} with counts"]
    if outside:
        notes.append(f"{outside:,} bins with {lost:,} counts excluded: outside tissue")
    return pooler, notes


def _centres(grid: _Grid, square_N2: np.ndarray, mpp: float, width: float, path: Path) -> tuple[np.ndarray, str]:
    """Return block centres in full-resolution px, float64 (N, 2), and a note on the grid's orientation.

    The centre of a complete block is the mean of its bins. For incomplete blocks the mean is shifted by the fitted
    grid vectors.
    """
    n = grid.sums[:, 0]
    mean = grid.sums[n > 0, 1:] / n[n > 0, None]
    design = np.column_stack([mean[:, 2:], np.ones(len(mean))])
    if np.linalg.matrix_rank(design) < 3:
        bins = np.flatnonzero(grid.state)
        raise SourceError(f"{path}: {len(bins)} bins give too few pseudo-spots to fit the grid; reduce --pool-um")
    fit, *_ = np.linalg.lstsq(design, mean[:, :2], rcond=None)
    step = float(np.sqrt(abs(np.linalg.det(fit[:2]))))
    if not 0.95 < step * mpp / width < 1.05:
        raise SourceError(
            f"{path}: bins of {width:g} um have a pitch of {step:.3f} px, which gives {width / max(step, 1e-9):.4f} um per px, but "
            f"{mpp:g} um per px is stated; use positions and scale factors of the same run"
        )
    index = square_N2[:, 1] * grid.blocks() + square_N2[:, 0]
    own = grid.sums[index, 1:] / grid.sums[index, :1]
    centre = (square_N2 + 0.5) * grid.side - 0.5
    angle = float(np.degrees(np.arctan2(fit[0, 1], fit[0, 0])))
    mirrored = " and mirrored" if np.linalg.det(fit[:2]) < 0 else ""
    note = f"bin grid: rotated by {angle:.1f} degrees{mirrored}"
    return own[:, :2] + (centre - own[:, 2:]) @ fit[:2], note


# -- cells --------------------------------------------------------------------------------------------------


def _cells_source(root: Path, pool_um: float, bins: dict[float, Path], overrides: Mapping[str, str]) -> SectionSource:
    refuse(overrides, ("min_cover", "bin_um"), "for cells set --min-pooled")
    folder = root / "segmented_outputs"
    counts = find_matrix(folder, "filtered_feature_cell_matrix")
    if counts is None:
        raise SourceError(
            f"{folder}: no filtered_feature_cell_matrix.h5 (written by Space Ranger 4 with cell segmentation); copy it, or pool bins"
        )
    polygons = next((p for n in CELLS if (p := folder / n).is_file()), folder / CELLS[0])
    existing(polygons, "cell polygons")
    folders = [folder / "spatial", *(b / "spatial" for b in bins.values())]
    spatial = next((s for s in folders if _factors(s) is not None), folders[0])
    factors_file = _factors(spatial)
    factors = scale_factors(factors_file) if factors_file is not None else {}
    if factors_file is None and not overrides.get("mpp"):
        raise SourceError(f"{spatial / FACTORS}: no such file; copy it from the run, or set --mpp")
    full_mpp = _scale(factors, spatial / FACTORS, overrides)
    image, scale, notes = choose_image(root, _pictures(spatial.parent, root), factors, overrides.get("image", ""))
    features, species = for_species(counts.features(), overrides.get("species", ""), counts.path)
    least = int(setting(overrides, "min_pooled", 1))
    meta = pooled_meta(
        root,
        section_name(root),
        overrides,
        species=species,
        platform="Visium HD",
        mpp=full_mpp / scale,
        pool_um=pool_um,
        pooling=f"segmented cells in squares of {pool_um:g} um, at least {least}",
    )

    def load() -> Section:
        tally: dict[str, int] = {}
        pooler, pool_notes = _pool_cells(counts, features, polygons, pool_um / full_mpp, tally)
        pooled = pooler.result(min_units=least)
        if not len(pooled.n_units):
            raise SourceError(f"{polygons}: no square of {pool_um:g} um contains {least} cells; reduce --min-pooled")
        xy = (pooled.square_N2 + 0.5) * (pool_um / full_mpp) * scale
        plain = unpacked(image)
        return pooled_section(
            meta,
            plain,
            pooled,
            xy,
            features.only_genes(),
            units="cells",
            dropped={f"pseudo-spots with under {least} cells": pooled.dropped_squares},
            notes=[*notes, *pool_notes, *features.others_note(tally), *appearance_note(plain)],
        )

    files = (image, *counts.files, polygons, *([factors_file] if factors_file is not None else []))
    return SectionSource(meta, files, load)


def _pool_cells(
    counts: TenxMatrix, features: Features, polygons: Path, width_px: float, tally: dict[str, int]
) -> tuple[Pooler, list[str]]:
    where: dict[int, tuple[float, float]] = {}
    for feature in iter_features(polygons):
        cell = (feature.get("properties") or {}).get("cell_id")
        digits = re.search(r"\d+", str(cell))
        if digits is None:
            raise SourceError(
                f"{polygons}: a feature has no cell_id: {feature.get('properties')}; copy the file from the run again"
            )
        if int(digits[0]) in where:
            raise SourceError(f"{polygons}: duplicate cell {digits[0]}; copy the file from the run again")
        where[int(digits[0])] = centroid(feature, polygons)
    pooler, lost, lost_counts = Pooler(len(features.genes())), 0, 0
    for barcodes, matrix in counts.chunks(features, BATCH, tally):
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
            "use files of the same run"
        )
    notes = [f"{pooler.total_units:,} segmented cells pooled"]
    if lost:
        notes.append(f"{lost:,} cells with {lost_counts:,} counts excluded: no polygon")
    return pooler, notes
