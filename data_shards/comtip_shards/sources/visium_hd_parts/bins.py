"""Pooling of Visium HD bins to blocks of their grid, which may be rotated relative to the image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from comtip_shards.errors import SourceError
from comtip_shards.sections.facts import SourceOptions, refuse
from comtip_shards.sections.pooling import Pooler
from comtip_shards.sections.section import Section, SectionMeta
from comtip_shards.sources.base import SectionSource
from comtip_shards.sources.files.packaging import unpacked
from comtip_shards.sources.files.table_batches import BATCH, all_numbers, batches
from comtip_shards.sources.tenx.features import Features, for_species
from comtip_shards.sources.tenx.matrix import TenxMatrix
from comtip_shards.sources.tenx.pooled import pooled_meta, pooled_section
from comtip_shards.sources.tenx.run import appearance_note, choose_image, find_matrix, scale_factors, section_name
from comtip_shards.sources.visium_hd_parts.files import FACTORS, find_factors, find_table, numbers_in, pictures_of
from comtip_shards.sources.visium_hd_parts.scale import scale_or_pitch

MIN_COVER = 0.5
"""Default for the minimum share of a pseudo-spot's bins that are in tissue."""
COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
_BIN = r"^s_(?P<um>\d{3})um_(?P<row>\d+)_(?P<col>\d+)(?:-\d+)?$"


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


@dataclass(frozen=True)
class _Bins:
    """Inputs of one section of bins."""

    counts: TenxMatrix
    features: Features
    table: Path
    image: Path
    scale: float
    """px of the image per full-resolution px."""
    full_mpp: float
    """um per full-resolution px."""
    width: float
    """Width of a bin in um."""
    pool_um: float
    cover: float
    """Minimum share of a pseudo-spot's bins that are in tissue."""

    @property
    def side(self) -> int:
        """Bins per pseudo-spot along one axis."""
        return round(self.pool_um / self.width)


def bins_source(root: Path, pool_um: float, bins: Mapping[float, Path], options: SourceOptions) -> SectionSource:
    """Return the source of a section whose pseudo-spots are pooled from the bins of a Visium HD folder.

    Parameters
    ----------
    root
        Space Ranger output folder.
    pool_um
        Width of a pseudo-spot in um.
    bins
        {bin width in um: its folder}, widest first.
    options
        Facts (scale, image, species, ...) and options of the pooling, given by the caller.

    Raises
    ------
    SourceError
        A required file or fact is missing, an option does not apply to bins, or files, facts or options contradict each other.
    """
    refuse(options, ("min_pooled",), "it is for cells (bins have `min_cover`)")
    width = _bin_width(bins, pool_um, options.pooling.bin_um, root)
    folder = bins[width]
    counts = find_matrix(folder, "filtered_feature_bc_matrix") or find_matrix(folder, "raw_feature_bc_matrix")
    if counts is None:
        raise SourceError(
            f"{folder}: neither filtered_feature_bc_matrix.h5 nor filtered_feature_bc_matrix/matrix.mtx.gz exists; copy one of "
            "them from the Space Ranger output"
        )
    table, factors_file = find_table(folder), find_factors(folder / "spatial")
    if table is None:
        raise SourceError(f"{folder / 'spatial'}: no tissue_positions.parquet; copy it from the Space Ranger output")
    factors = scale_factors(factors_file) if factors_file is not None else {}
    if factors.get("bin_size_um", width) != width:
        raise SourceError(
            f"{folder}: {FACTORS} states bins of {factors['bin_size_um']:g} um; use files of the same Space Ranger run"
        )
    facts, name = options.facts, section_name(root)
    full_mpp, scale_notes = scale_or_pitch(factors, table, width, facts.mpp)
    image, scale, notes = choose_image(root, pictures_of(folder, root), factors, facts.image, name)
    features, species = for_species(counts.features(), facts.species, counts.path)
    cover = options.pooling.min_cover or MIN_COVER
    meta = pooled_meta(
        root,
        name,
        facts,
        species=species,
        platform="Visium HD",
        mpp=full_mpp / scale,
        pool_um=pool_um,
        pooling=f"bins of {width:g} um in squares of {pool_um:g} um, at least {100 * cover:g}% of them in tissue",
    )
    run = _Bins(counts, features, table, image, scale, full_mpp, width, pool_um, cover)
    files = (image, *counts.files, table, *([factors_file] if factors_file is not None else []))
    return SectionSource(meta, files, partial(_load, run, meta, [*notes, *scale_notes]))


def _load(run: _Bins, meta: SectionMeta, notes: list[str]) -> Section:
    grid = _read_grid(run.table, run.side)
    tally: dict[str, int] = {}
    pooler, pool_notes = _pool_bins(grid, run.counts, run.features, run.table, run.width, tally)
    pooled = pooler.result(min_units=max(1, math.ceil(run.cover * run.side * run.side - 1e-9)))
    if not len(pooled.n_units):
        raise SourceError(
            f"{run.table}: no square of {run.pool_um:g} um has {100 * run.cover:g}% of its bins in tissue; reduce "
            "`min_cover` or `pool_um`"
        )
    xy, grid_note = _centres(grid, pooled.square_N2, run.full_mpp, run.width, run.table)
    plain = unpacked(run.image)
    return pooled_section(
        meta,
        plain,
        pooled,
        xy * run.scale,
        run.features.only_genes(),
        units="bins",
        dropped={f"pseudo-spots with under {100 * run.cover:g}% of their bins in tissue": pooled.dropped_squares},
        notes=[*notes, *pool_notes, grid_note, *run.features.others_note(tally), *appearance_note(plain)],
    )


def _bin_width(bins: Mapping[float, Path], pool_um: float, wanted: float | None, root: Path) -> float:
    have = ", ".join(f"{w:g}" for w in bins)
    if wanted is not None and wanted not in bins:
        raise SourceError(f"{root}: no bins of {wanted:g} um; set `bin_um` to one of {have}")
    for width in list(bins) if wanted is None else [wanted]:
        if abs(pool_um / width - round(pool_um / width)) < 1e-9 and pool_um >= width:
            return width
    width = wanted or min(bins)
    raise SourceError(
        f"`pool_um` {pool_um:g} is not a multiple of a bin width ({have if wanted is None else f'{wanted:g}'} um); use e.g. "
        f"{max(1, round(pool_um / width)) * width:g}"
    )


def _read_grid(path: Path, side: int) -> _Grid:
    """Read the bin grid in batches, because a slide has eleven million bins of 2 um."""
    high = np.array([-1, -1])
    for batch in batches(path, ["array_row", "array_col"]):
        rc = all_numbers(batch, ["array_row", "array_col"], path).astype(np.int64)
        if rc.size and (rc.min() < 0 or rc.max() >= 1 << 20):
            raise SourceError(
                f"{path}: array_row and array_col range from {rc.min()} to {rc.max()}, outside any slide; copy the table from "
                "the Space Ranger output again"
            )
        high = np.maximum(high, rc.max(axis=0, initial=-1))
    if high.min() < 0:
        raise SourceError(f"{path}: the table has no rows; copy it from the Space Ranger output again")
    shape = (int(high[0]) + 1, int(high[1]) + 1)
    blocks = -(-shape[0] // side) * -(-shape[1] // side)
    grid = _Grid(shape, np.zeros(shape[0] * shape[1], np.uint8), np.zeros((blocks, 5)), side)
    n = 0
    for batch in batches(path, COLUMNS):
        row, col, tissue = all_numbers(batch, ["array_row", "array_col", "in_tissue"], path).astype(np.int64).T
        xy = all_numbers(batch, ["pxl_col_in_fullres", "pxl_row_in_fullres"], path)
        names = numbers_in(batch.column("barcode"), _BIN, path, "s_016um_00118_00105-1")
        if (names["row"] != row).any() or (names["col"] != col).any():
            raise SourceError(
                f"{path}: barcodes and array_row, array_col differ; copy the table from the Space Ranger output again"
            )
        grid.state[row * shape[1] + col] = np.where(tissue == 1, 2, 1)
        block = (row // side) * grid.blocks() + col // side
        for i, values in enumerate((np.ones(len(row)), xy[:, 0], xy[:, 1], col, row)):
            grid.sums[:, i] += np.bincount(block, values, len(grid.sums))
        n += len(row)
    if int((grid.state > 0).sum()) != n:
        raise SourceError(
            f"{path}: {n - int((grid.state > 0).sum())} duplicate bins; copy the table from the Space Ranger output again"
        )
    return grid


def _pool_bins(
    grid: _Grid, counts: TenxMatrix, features: Features, table: Path, width: float, tally: dict[str, int]
) -> tuple[Pooler, list[str]]:
    """Sum the bins in tissue per pseudo-spot; returns the pooler and notes on the bins."""
    pooler = Pooler(len(features.genes()), str(counts.path))
    tissue = np.flatnonzero(grid.state == 2)
    for part in np.array_split(tissue, max(1, len(tissue) // BATCH)):
        row, col = np.divmod(part, grid.shape[1])
        pooler.add_units(np.stack([col, row], axis=1) // grid.side)
    seen = outside = lost = 0
    for barcodes, matrix in counts.chunks(features, BATCH, tally):
        names = numbers_in(pa.array(barcodes), _BIN, counts.path, "s_016um_00118_00105-1")
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
                f"{counts.path}: has bins that {table} does not list (e.g. {first}); use files of the same Space Ranger run"
            )
        kept = np.flatnonzero(state == 2)
        pooler.add_counts(np.stack([col, row], axis=1)[kept] // grid.side, matrix[kept])
        seen, outside = seen + len(kept), outside + int((state == 1).sum())
        lost += int(matrix[np.flatnonzero(state == 1)].sum(dtype=np.int64))
    if not seen:
        raise SourceError(f"{counts.path} and {table} share no bin in tissue; use files of the same Space Ranger run")
    notes = [f"{len(tissue):,} bins of {width:g} um in tissue pooled, {seen:,} with counts"]
    if outside:
        notes.append(f"{outside:,} bins with {lost:,} counts excluded: outside tissue")
    return pooler, notes


def _centres(grid: _Grid, square_N2: np.ndarray, mpp: float, width: float, path: Path) -> tuple[np.ndarray, str]:
    """Return block centres in full-resolution px, float64 (N, 2), and a note on the grid's orientation.

    The centre of a complete block is the mean of its bins. For incomplete blocks the mean is shifted by the fitted
    grid vectors. Raises SourceError if there are too few blocks for the fit, or its pitch contradicts ``mpp``.
    """
    n = grid.sums[:, 0]
    mean = grid.sums[n > 0, 1:] / n[n > 0, None]
    design = np.column_stack([mean[:, 2:], np.ones(len(mean))])
    if np.linalg.matrix_rank(design) < 3:
        bins = np.flatnonzero(grid.state)
        fix = "reduce `pool_um`" if grid.side > 1 else "copy the table from the Space Ranger output again"
        raise SourceError(f"{path}: {len(bins)} bins give too few pseudo-spots to fit the grid; {fix}")
    fit, *_ = np.linalg.lstsq(design, mean[:, :2], rcond=None)
    step = float(np.sqrt(abs(np.linalg.det(fit[:2]))))
    if not 0.95 < step * mpp / width < 1.05:
        raise SourceError(
            f"{path}: bins of {width:g} um have a pitch of {step:.3f} px, which gives {width / max(step, 1e-9):.4f} um per px, but "
            f"the scale is {mpp:g}; use positions and scale factors of the same Space Ranger run, or correct `mpp` if it is set"
        )
    index = square_N2[:, 1] * grid.blocks() + square_N2[:, 0]
    own = grid.sums[index, 1:] / grid.sums[index, :1]
    centre = (square_N2 + 0.5) * grid.side - 0.5
    angle = float(np.degrees(np.arctan2(fit[0, 1], fit[0, 0])))
    mirrored = " and mirrored" if np.linalg.det(fit[:2]) < 0 else ""
    note = f"bin grid: rotated by {angle:.1f} degrees{mirrored}"
    return own[:, :2] + (centre - own[:, 2:]) @ fit[:2], note
