"""Xenium output folders: transcripts or cells pooled to square pseudo-spots on an aligned H&E image.

Positions are in um. They are mapped to DAPI px (``pixel_size`` in ``experiment.xenium``), then to H&E px (see
:mod:`comtip_shards.sources.tenx.alignment`), and pooled in squares parallel to the H&E, so that a tile and its counts cover
the same area.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from comtip_shards.errors import SourceError
from comtip_shards.sections.pooling import Pooled, Pooler, squares_of
from comtip_shards.sections.section import Section, SectionMeta, check_unique
from comtip_shards.slides.open import open_slide
from comtip_shards.sources.base import SectionSource, existing, number, pick, reading, refuse
from comtip_shards.sources.files.names import safe_id
from comtip_shards.sources.files.packaging import by_prefix, find, unpacked
from comtip_shards.sources.files.table_batches import BATCH, all_numbers, batches, has_column, numbers_of
from comtip_shards.sources.tenx.alignment import Alignment, read_alignment
from comtip_shards.sources.tenx.features import GENE_KIND, Features, for_species
from comtip_shards.sources.tenx.matrix import TenxMatrix
from comtip_shards.sources.tenx.pooled import pooled_meta, pooled_section, setting
from comtip_shards.sources.tenx.run import appearance_note, find_matrices, only, read_json, section_name

EXPERIMENT, TRANSCRIPTS, CELLS, PANEL = "experiment.xenium", "transcripts.parquet", "cells.parquet", "gene_panel.json"
PIXEL_SIZE_UM = 0.2125
"""um per px of the DAPI image of every Xenium Analyzer, used if experiment.xenium is missing."""
_ROLES = {
    "experiment": r"experiment\.xenium",
    "transcripts": r"transcripts\.(?:parquet|csv)",
    "cells": r"cells\.(?:parquet|csv)",
    "panel": r"gene_panel\.json",
}
POOL_UM, MIN_QV = 100.0, 20.0
DENSE, MIN_OF_DENSE = 0.9, 0.05
"""Transcripts also occur outside tissue: a pseudo-spot needs this share of the transcripts of a dense one (quantile)."""
MAX_OUTSIDE = 0.5
"""Maximum share of pseudo-spots outside the H&E image; above it the alignment is refused."""
CONTROL = re.compile(r"(NegControl|BLANK|antisense|Unassigned|Deprecated|Intergenic)", re.IGNORECASE)
_HE = ("*he_image.ome.tif*", "*he_image.tif*", "*he_image.btf*")
_ALIGNED = ("*he_imagealignment.csv*", "*he_image_alignment.csv*", "*alignment.csv*", "*keypoints.csv*")


@dataclass
class XeniumFiles:
    """Files of one run; names may have a prefix (``Xenium_V1_Breast_experiment.xenium``)."""

    name: str
    root: Path
    prefix: str = ""
    """Prefix of the file names if the folder contains several runs."""
    experiment: Path | None = None
    transcripts: Path | None = None
    cells: Path | None = None
    panel: Path | None = None
    matrix: TenxMatrix | None = None


def recognise(path: Path) -> str | None:
    """Return a reason if ``path`` is a Xenium folder, else None."""
    if not path.is_dir():
        return None
    found = {role: [p for files in by_prefix(path, like).values() for p in files] for role, like in _ROLES.items()}
    names = [p.name for role in ("experiment", "transcripts", "cells") for p in found[role]]
    matrix = bool(find(path, "*cell_feature_matrix*"))
    if not found["experiment"] and not (matrix and (found["transcripts"] or found["cells"])):
        return None
    return f"Xenium run with {', '.join(names[:6])}"


def find_runs(path: Path) -> list[XeniumFiles]:
    """Return the runs of a folder: one, or one per prefix of the file names."""
    found = {role: by_prefix(path, like) for role, like in _ROLES.items()}
    matrices = find_matrices(path, "cell_feature_matrix")
    prefixes = sorted(found["experiment"] or found["transcripts"] or found["cells"])
    if len(prefixes) <= 1:
        files = {
            role: _preferred([p for group in groups.values() for p in group], role) for role, groups in found.items()
        }
        only([m.path for m in matrices.values()], "cell_feature_matrix")
        return [XeniumFiles(section_name(path), path, "", **files, matrix=next(iter(matrices.values()), None))]
    return [
        XeniumFiles(
            safe_id(prefix),
            path,
            prefix,
            **{role: _preferred(groups.get(prefix, []), role) for role, groups in found.items()},
            matrix=matrices.get(prefix),
        )
        for prefix in prefixes
    ]


def _preferred(files: Sequence[Path], what: str) -> Path | None:
    """Return the Parquet file of several forms of one table; several files of one form raise."""
    parquet = [p for p in files if ".parquet" in p.name]
    plain = [p for p in files if not p.name.endswith(".gz")]
    return only(parquet or plain or files, f"file of {what}")


@dataclass(frozen=True)
class _Run:
    """Inputs shared by transcript and cell pooling."""

    path: Path
    pixel_size: float
    alignment: Alignment
    image: Path
    pool_um: float
    features: Features
    species: str
    notes: list[str] = field(default_factory=list)

    @property
    def mpp(self) -> float:
        """Pixel size of the H&E image in um."""
        return self.pixel_size * self.alignment.scale()

    def squares(self, um_N2: np.ndarray) -> np.ndarray:
        """Map positions in um to squares of the H&E grid."""
        return squares_of(self.alignment.to_image(um_N2 / self.pixel_size), self.pool_um / self.mpp)


def open_sections(path: Path, samples: Sequence[str] | None, overrides: Mapping[str, str]) -> list[SectionSource]:
    """Return the sections of the folder: one named after it, or one per prefix of the file names."""
    refuse(overrides, ("bin_um", "min_cover"), "this option is for Visium HD; for Xenium set --min-pooled")
    runs = {run.name: run for run in find_runs(path)}
    names = pick(samples, list(runs), path)
    for option in ("image", "alignment"):
        if len(names) > 1 and overrides.get(option) and "{id}" not in overrides[option]:
            raise SourceError(
                f"{path}: --{option} is one file but there are {len(names)} sections; use {{id}} in it, or select one with "
                "--samples"
            )
    return [_source(runs[name], overrides) for name in names]


def _source(files: XeniumFiles, overrides: Mapping[str, str]) -> SectionSource:
    path = files.root
    what = overrides.get("pool_from") or ("transcripts" if files.transcripts is not None else "cells")
    if what not in ("transcripts", "cells"):
        raise SourceError(f"unknown --pool-from {what}; use transcripts or cells for Xenium")
    experiment = read_json(files.experiment, "description of the run") if files.experiment is not None else {}
    run, species = _open(files, experiment, overrides)
    qv = setting(overrides, "qv", MIN_QV)
    least = int(setting(overrides, "min_pooled", 0)) or None
    if what == "cells":
        refuse(overrides, ("qv",), "the instrument counts cells with qv 20")
        if files.matrix is None:
            raise SourceError(
                f"{path}: no cell_feature_matrix.h5 with the counts of the cells; copy it, or set --pool-from transcripts"
            )
    table = files.cells if what == "cells" else files.transcripts
    if table is None:
        name = CELLS if what == "cells" else TRANSCRIPTS
        raise SourceError(
            f"{path / name}: no such file, but it is the table of {what}; copy it (or its csv.gz) from the run"
        )
    units = what if what == "cells" else f"transcripts of qv {qv:g} or more"
    enough = str(least or 1) if least or what == "cells" else f"{MIN_OF_DENSE:.0%} of a dense one"
    meta = pooled_meta(
        path,
        files.name,
        overrides,
        species=species,
        platform="Xenium",
        mpp=run.mpp,
        pool_um=run.pool_um,
        pooling=f"{units} in squares of {run.pool_um:g} um, at least {enough}",
    )

    def load() -> Section:
        _check_scale(run, overrides.get("mpp", ""))
        if what == "cells" and files.matrix is not None:
            pooler, notes = _pool_cells(run, table, files.matrix)
            return _section(run, meta, pooler, least or 1, what, notes)
        pooler, notes = _pool_transcripts(run, table, qv)
        dense = float(np.quantile(pooler.units, DENSE)) if len(pooler.units) else 0.0
        return _section(run, meta, pooler, least or max(1, int(np.ceil(MIN_OF_DENSE * dense))), what, notes)

    inputs = [run.image, run.alignment.path, table, *(files.matrix.files if files.matrix else ())]
    inputs += [p for p in (files.experiment, files.panel if files.matrix is None else None) if p is not None]
    return SectionSource(meta, tuple(inputs), load)


def _open(files: XeniumFiles, experiment: Mapping[str, Any], overrides: Mapping[str, str]) -> tuple[_Run, str]:
    """Return the inputs of a run and its species."""
    path, notes = files.root, []
    where = files.experiment or path / EXPERIMENT
    if files.experiment is None:
        notes.append(f"no {EXPERIMENT}: assumed {PIXEL_SIZE_UM} um per px of the DAPI image")
    size = experiment.get("pixel_size", "") if files.experiment is not None else PIXEL_SIZE_UM
    pixel_size = number(size, f"{where}: pixel_size")
    if not 0.05 <= pixel_size <= 2:
        raise SourceError(
            f"{where}: pixel_size is {experiment.get('pixel_size')!r}, expected about {PIXEL_SIZE_UM}; copy the file from "
            "the run again"
        )
    image = _image(files, overrides)
    alignment = read_alignment(_alignment(files, image, overrides), pixel_size)
    features, panel_notes = _panel(files)
    features, species = for_species(features, overrides.get("species") or _organism(experiment), path)
    run = _Run(path, pixel_size, alignment, image, setting(overrides, "pool_um", POOL_UM), features, species)
    matrix = alignment.matrix_33
    angle = float(np.degrees(np.arctan2(matrix[1, 0], matrix[0, 0])))
    mirrored = ", mirrored" if np.linalg.det(matrix[:2, :2]) < 0 else ""
    orientation = f"H&E: {run.mpp:.4f} um per px, rotated by {angle:.1f} degrees{mirrored}"
    run.notes.extend([*notes, *panel_notes, *features.others_note(), *alignment.notes, orientation])
    return run, species


def _image(files: XeniumFiles, overrides: Mapping[str, str]) -> Path:
    stated = overrides.get("image", "").replace("{id}", files.name)
    image = Path(stated) if stated else _find(files, _HE, "H&E image (select one with --image)")
    if image is None:
        raise SourceError(
            f"{files.root}: no H&E image (*he_image.ome.tif), and the morphology images of a Xenium are fluorescence; set "
            "--image to the H&E image of the section and --alignment to its alignment"
        )
    return existing(image, "H&E image (--image)")


def _alignment(files: XeniumFiles, image: Path, overrides: Mapping[str, str]) -> Path:
    stated = overrides.get("alignment", "").replace("{id}", files.name)
    sibling = image.with_name(re.sub(r"(\.ome)?\.\w+$", "", image.name.removesuffix(".gz")) + "alignment.csv")
    file = (
        Path(stated)
        if stated
        else sibling
        if sibling.is_file()
        else _find(files, _ALIGNED, "alignment (select one with --alignment)")
    )
    if file is None:
        raise SourceError(
            f"{files.root}: no alignment of {image.name} to the DAPI image (*he_imagealignment.csv); align them in Xenium "
            "Explorer, export the matrix or the keypoints as csv, and set --alignment"
        )
    return file


def _find(files: XeniumFiles, patterns: Sequence[str], what: str) -> Path | None:
    for pattern in patterns:
        found = only([p for p in find(files.root, pattern) if p.name.startswith(files.prefix)], what)
        if found is not None:
            return found
    return None


def _panel(files: XeniumFiles) -> tuple[Features, list[str]]:
    """Return all genes of the panel, including undetected ones, whose zeros are measurements."""
    if files.matrix is not None:
        return files.matrix.features(), []
    if files.panel is not None:
        return _gene_panel(files.panel), []
    if files.transcripts is None:
        raise SourceError(
            f"{files.root}: neither {TRANSCRIPTS} nor cell_feature_matrix.h5 exists; copy one of them from the run"
        )
    names: set[str] = set()
    for batch in batches(files.transcripts, ["feature_name"], dictionary=["feature_name"]):
        names |= set(_words(batch, files.transcripts)[0])
    genes = sorted(n for n in names if not CONTROL.match(n))
    note = "no cell_feature_matrix.h5 or gene_panel.json: undetected genes of the panel are treated as not measured"
    return Features(genes, genes, [GENE_KIND] * len(genes)), [note]


def _gene_panel(path: Path) -> Features:
    try:
        targets = [t["type"] for t in read_json(path, "gene panel")["payload"]["targets"]]
        genes = [t["data"] for t in targets if t["descriptor"] == "gene"]
        return Features(
            [str(g.get("id", g["name"])) for g in genes], [str(g["name"]) for g in genes], [GENE_KIND] * len(genes)
        )
    except (KeyError, TypeError) as error:
        raise SourceError(
            f"{path}: no payload.targets with type and data ({error}); copy gene_panel.json from the run again"
        ) from error


def _organism(experiment: Mapping[str, Any]) -> str:
    organism = str(experiment.get("panel_organism", "")).lower()
    return organism if organism in ("human", "mouse") else ""


def _check_scale(run: _Run, stated: str) -> None:
    """Raise if the alignment contradicts the scale of the image or the caller."""
    with open_slide(unpacked(run.image)) as slide:
        expected = number(stated, "--mpp") if stated else slide.mpp
    if expected is None or 0.9 < expected / run.mpp < 1.1:
        return
    origin = "--mpp" if stated else run.image.name
    inverted = 0.9 < expected / (run.pixel_size / run.alignment.scale()) < 1.1
    raise SourceError(
        f"{run.alignment.path}: gives {run.mpp:.4f} um per H&E px, but {origin} states {expected:g}; "
        + (
            "the matrix maps DAPI px to H&E px; export or use its inverse"
            if inverted
            else f"use alignment, image and {EXPERIMENT} of the same run; if {origin} is wrong, set --mpp {run.mpp:.4f}"
        )
    )


# -- transcripts --------------------------------------------------------------------------------------------


def _words(batch: pa.RecordBatch, path: Path) -> tuple[list[str], np.ndarray]:
    """Return the distinct feature names of a batch, and their index per row (-1 for missing)."""
    column = batch.column("feature_name")
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    words = _texts(column.dictionary, path)
    return words, column.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def _texts(column: pa.Array, path: Path) -> list[str]:
    """Return values as text; version 1 wrote bytes or numbers."""
    with reading(path, "Parquet"):
        return [v.decode() if isinstance(v, bytes) else str(v) for v in column.to_pylist()]


def _pool_transcripts(run: _Run, path: Path, qv: float) -> tuple[Pooler, list[str]]:
    genes = run.features.only_genes()
    check_unique(genes.symbols, f"{run.path}: gene names of the panel")
    row_of = {name: i for i, name in enumerate(genes.symbols)}
    pooler, left = Pooler(len(genes.ids)), Counter[str]()
    flagged = has_column(path, "is_gene")
    columns = ["feature_name", "x_location", "y_location", "qv", *(["is_gene"] if flagged else [])]
    for batch in batches(path, columns, dictionary=["feature_name"]):
        words, code = _words(batch, path)
        kinds = np.array([*(_kind(w, row_of) for w in words), -2], np.int64)
        gene = kinds[code]  # -1: control, -2: not in the panel; code -1 selects the last entry, -2
        if flagged:
            gene[(gene >= 0) & ~np.asarray(batch.column("is_gene").fill_null(True), bool)] = -1
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
        pooler.add_transcripts(run.squares(xyq[keep, :2]), gene[keep])
    excluded = [f"{n:,} transcripts excluded: {reason}" for reason, n in left.items() if n]
    if not pooler.total_units:
        raise SourceError(
            f"{path}: no transcript is left ({'; '.join(excluded) or 'the table is empty'}); reduce --qv or check the panel"
        )
    return pooler, [f"{pooler.total_units:,} transcripts with qv of at least {qv:g} pooled", *excluded]


def _kind(word: str, row_of: Mapping[str, int]) -> int:
    return -1 if CONTROL.match(word) else row_of.get(word, -2)


# -- cells --------------------------------------------------------------------------------------------------


def _pool_cells(run: _Run, path: Path, counts: TenxMatrix) -> tuple[Pooler, list[str]]:
    where: dict[str, tuple[float, float]] = {}
    n = 0
    for batch in batches(path, ["cell_id", "x_centroid", "y_centroid"]):
        cells = _texts(batch.column("cell_id"), path)
        xy = all_numbers(batch, ["x_centroid", "y_centroid"], path)
        where.update(zip(cells, map(tuple, xy.tolist()), strict=True))
        n += len(cells)
    if len(where) < n:
        raise SourceError(f"{path}: {n - len(where)} duplicate cells; copy the table from the run again")
    pooler, lost, lost_counts = Pooler(len(run.features.genes())), 0, 0
    for barcodes, matrix in counts.chunks(run.features, BATCH):
        known = np.array([i for i, b in enumerate(barcodes) if b in where], np.int64)
        squares = run.squares(np.array([where[barcodes[i]] for i in known], np.float64).reshape(-1, 2))
        pooler.add_units(squares)
        pooler.add_counts(squares, matrix[known])
        lost += len(barcodes) - len(known)
        lost_counts += int(matrix.sum(dtype=np.int64)) - int(matrix[known].sum(dtype=np.int64))
    if pooler.total_units < max(1, lost):
        raise SourceError(
            f"{counts.path}: only {pooler.total_units} of its {pooler.total_units + lost} cells are in {path}; "
            "use files of the same run"
        )
    notes = [f"{pooler.total_units:,} cells pooled"]
    if lost:
        notes.append(f"{lost:,} cells with {lost_counts:,} counts excluded: not in {path.name}")
    return pooler, notes


# -- both ---------------------------------------------------------------------------------------------------


def _section(run: _Run, meta: SectionMeta, pooler: Pooler, least: int, what: str, notes: list[str]) -> Section:
    pooled = pooler.result(min_units=least)
    if not len(pooled.n_units):
        raise SourceError(f"{run.path}: no square of {run.pool_um:g} um contains {least} {what}; reduce --min-pooled")
    dropped = {f"pseudo-spots with under {least:,} {what}": pooled.dropped_squares}
    xy = (pooled.square_N2 + 0.5) * (run.pool_um / run.mpp)
    plain = unpacked(run.image)
    with open_slide(plain) as slide:
        width, height = slide.size
    inside = np.asarray(((xy >= 0) & (xy <= [width, height])).all(axis=1), bool)
    if inside.sum() < MAX_OUTSIDE * len(xy):
        raise SourceError(
            f"{run.alignment.path}: maps {int((~inside).sum())} of {len(xy)} pseudo-spots outside the H&E {run.image} ({width} x "
            f"{height} px); use image and alignment of the same section, and a matrix from H&E px to DAPI px"
        )
    dropped["pseudo-spots outside the H&E image"] = int((~inside).sum())
    pooled = _keep(pooled, inside)
    return pooled_section(
        meta,
        plain,
        pooled,
        xy[inside],
        run.features.only_genes(),
        dropped=dropped,
        units=what,
        notes=[*run.notes, *notes, *appearance_note(plain)],
    )


def _keep(pooled: Pooled, mask: np.ndarray) -> Pooled:
    """Exclude squares and count their contents."""
    kept = np.flatnonzero(mask)
    counts, units = pooled.counts[kept], pooled.n_units[kept]
    return replace(
        pooled,
        square_N2=pooled.square_N2[kept],
        counts=counts,
        n_units=units,
        dropped_squares=pooled.dropped_squares + len(mask) - len(kept),
        dropped_units=pooled.dropped_units + int(pooled.n_units.sum() - units.sum()),
        dropped_counts=pooled.dropped_counts + int(pooled.counts.sum(dtype=np.int64) - counts.sum(dtype=np.int64)),
    )
