"""A Xenium output folder: transcripts or cells pooled to square pseudo-spots on an H&E image that was aligned to it.

Positions are um of the run. They are taken to px of the DAPI image (``pixel_size`` in ``experiment.xenium``), from
there to px of the H&E (see :mod:`comtip_shards.sources.alignment`), and pooled in squares parallel to the H&E, so
that a tile shows the ground whose transcripts were counted.
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
from comtip_shards.sources.alignment import Alignment, read_alignment
from comtip_shards.sources.base import SectionSource, existing, number, pick, reading, refuse
from comtip_shards.sources.parquet import BATCH, all_numbers, batches, has_column, numbers_of
from comtip_shards.sources.pooled import pooled_meta, pooled_section, setting
from comtip_shards.sources.tenx import (
    GENE_KIND,
    Features,
    TenxMatrix,
    appearance_note,
    find_matrix,
    only,
    read_json,
    section_name,
    species_of,
)

EXPERIMENT, TRANSCRIPTS, CELLS, PANEL = "experiment.xenium", "transcripts.parquet", "cells.parquet", "gene_panel.json"
POOL_UM, MIN_QV = 100.0, 20.0
DENSE, MIN_OF_DENSE = 0.9, 0.05
"""Stray transcripts lie on bare glass too: a pseudo-spot must hold this share of what a dense one (quantile) holds."""
MAX_OUTSIDE = 0.5
"""Share of pseudo-spots that may lie beside the H&E before its alignment is called wrong."""
CONTROL = re.compile(r"(NegControl|BLANK|antisense|Unassigned|Deprecated|Intergenic)", re.IGNORECASE)
_HE = ("*he_image.ome.tif", "*he_image.ome.tiff", "*he_image.tif", "*he_image.tiff", "*he_image.btf")
_ALIGNED = ("*he_imagealignment.csv", "*he_image_alignment.csv", "*alignment.csv", "*keypoints.csv")


def recognise(path: Path) -> str | None:
    """Return why ``path`` is such a folder, or None."""
    if not (path / EXPERIMENT).is_file():
        return None
    found = [n for n in (EXPERIMENT, TRANSCRIPTS, CELLS) if (path / n).is_file()]
    return f"a Xenium run: {', '.join(found)}"


@dataclass(frozen=True)
class _Run:
    """What the pools of transcripts and of cells share."""

    path: Path
    pixel_size: float
    alignment: Alignment
    image: Path
    pool_um: float
    features: Features
    notes: list[str] = field(default_factory=list)

    @property
    def mpp(self) -> float:
        """Scale of the H&E in um per px."""
        return self.pixel_size * self.alignment.scale()

    def squares(self, um_N2: np.ndarray) -> np.ndarray:
        """Return the square of the H&E's grid that each position of the run lies in."""
        return squares_of(self.alignment.to_image(um_N2 / self.pixel_size), self.pool_um / self.mpp)


def open_sections(path: Path, samples: Sequence[str] | None, overrides: Mapping[str, str]) -> list[SectionSource]:
    """Return the one section of the folder, named by it."""
    name = section_name(path)
    pick(samples, [name], path)
    refuse(overrides, ("bin_um", "min_cover"), "it is for Visium HD; give --min-pooled")
    what = overrides.get("pool_from") or ("transcripts" if (path / TRANSCRIPTS).is_file() else "cells")
    if what not in ("transcripts", "cells"):
        raise SourceError(f"--pool-from {what}: Xenium has transcripts and cells")
    experiment = read_json(path / EXPERIMENT, "description of the run")
    run = _open(path, experiment, overrides)
    panel = find_matrix(path, "cell_feature_matrix")
    qv = setting(overrides, "qv", MIN_QV)
    least = int(setting(overrides, "min_pooled", 0)) or None
    if what == "cells":
        refuse(overrides, ("qv",), "cells were counted by the instrument, at qv 20")
        if panel is None:
            raise SourceError(f"{path}: no cell_feature_matrix.h5, the counts of the cells; or pool transcripts")
    table = existing(path / (CELLS if what == "cells" else TRANSCRIPTS), f"table of {what}")
    units = what if what == "cells" else f"transcripts of qv {qv:g} or more"
    enough = str(least or 1) if least or what == "cells" else f"{MIN_OF_DENSE:.0%} of a dense one"
    meta = pooled_meta(
        path, name, overrides, species=_species(run.features, experiment, path, overrides), platform="Xenium", mpp=run.mpp,
        pool_um=run.pool_um, pooling=f"{units} in squares of {run.pool_um:g} um, at least {enough}",
    )  # fmt: skip

    def load() -> Section:
        _check_scale(run, overrides.get("mpp", ""))
        if what == "cells" and panel is not None:
            pooler, notes = _pool_cells(run, table, panel)
            return _section(run, meta, pooler, least or 1, what, notes)
        pooler, notes = _pool_transcripts(run, table, qv)
        dense = float(np.quantile(pooler.units, DENSE)) if len(pooler.units) else 0.0
        return _section(run, meta, pooler, least or max(1, int(np.ceil(MIN_OF_DENSE * dense))), what, notes)

    files = [run.image, run.alignment.path, path / EXPERIMENT, table, *(panel.files if panel else ())]
    if panel is None and (path / PANEL).is_file():
        files.append(path / PANEL)
    return [SectionSource(meta, tuple(files), load)]


def _open(path: Path, experiment: Mapping[str, Any], overrides: Mapping[str, str]) -> _Run:
    pixel_size = number(experiment.get("pixel_size", ""), f"{path / EXPERIMENT}: pixel_size")
    if not 0.05 <= pixel_size <= 2:
        raise SourceError(
            f"{path / EXPERIMENT}: pixel_size is {experiment.get('pixel_size')!r}; a Xenium's DAPI image has 0.2125 um per px"
        )
    image = (
        Path(overrides["image"]) if overrides.get("image") else _find(path, _HE, "H&E image (say which with --image)")
    )
    if image is None:
        raise SourceError(
            f"{path}: no H&E image (*he_image.ome.tif); the morphology images of a Xenium are fluorescence, so give the "
            "H&E of the same section with --image, and its alignment with --alignment"
        )
    existing(image, "H&E image (--image)")
    beside = image.with_name(re.sub(r"(\.ome)?\.\w+$", "", image.name) + "alignment.csv")
    file = (
        Path(overrides["alignment"]) if overrides.get("alignment") else beside if beside.is_file()
        else _find(path, _ALIGNED, "alignment (say which with --alignment)")
    )  # fmt: skip
    if file is None:
        raise SourceError(
            f"{path}: no alignment of {image.name} to the DAPI image (*he_imagealignment.csv); align them in Xenium "
            "Explorer, export the matrix or the keypoints as csv, and give it with --alignment"
        )
    alignment = read_alignment(file, pixel_size)
    features, notes = _panel(path)
    run = _Run(path, pixel_size, alignment, image, setting(overrides, "pool_um", POOL_UM), features)
    matrix = alignment.matrix_33
    angle = float(np.degrees(np.arctan2(matrix[1, 0], matrix[0, 0])))
    mirrored = ", mirrored" if np.linalg.det(matrix[:2, :2]) < 0 else ""
    run.notes.extend(
        [
            *notes,
            *alignment.notes,
            f"the H&E has {run.mpp:.4f} um per px and is turned by {angle:.1f} degrees{mirrored}",
        ]
    )
    return run


def _find(path: Path, patterns: Sequence[str], what: str) -> Path | None:
    for pattern in patterns:
        found = only(sorted(path.glob(pattern)), what)
        if found is not None:
            return found
    return None


def _panel(path: Path) -> tuple[Features, list[str]]:
    """Return every gene that the run could see, also those it did not: their zeros are measured."""
    matrix = find_matrix(path, "cell_feature_matrix")
    if matrix is not None:
        features = matrix.features()
        return features, features.others_note()
    if (path / PANEL).is_file():
        return _gene_panel(path / PANEL), []
    if not (path / TRANSCRIPTS).is_file():
        raise SourceError(f"{path}: neither {TRANSCRIPTS} nor cell_feature_matrix.h5 is there; one of them is needed")
    names: set[str] = set()
    for batch in batches(path / TRANSCRIPTS, ["feature_name"], dictionary=["feature_name"]):
        names |= set(_words(batch, path / TRANSCRIPTS)[0])
    genes = sorted(n for n in names if not CONTROL.match(n))
    note = "no cell_feature_matrix.h5 or gene_panel.json: genes of the panel that were never seen count as not measured"
    return Features(genes, genes, [GENE_KIND] * len(genes)), [note]


def _gene_panel(path: Path) -> Features:
    try:
        targets = [t["type"] for t in read_json(path, "gene panel")["payload"]["targets"]]
        genes = [t["data"] for t in targets if t["descriptor"] == "gene"]
        return Features(
            [str(g.get("id", g["name"])) for g in genes], [str(g["name"]) for g in genes], [GENE_KIND] * len(genes)
        )
    except (KeyError, TypeError) as error:
        raise SourceError(f"{path}: no payload.targets with type and data ({error}); this is no gene panel") from error


def _species(features: Features, experiment: Mapping[str, Any], path: Path, overrides: Mapping[str, str]) -> str:
    organism = str(experiment.get("panel_organism", "")).lower()
    stated = overrides.get("species") or (organism if organism in ("human", "mouse") else "")
    return stated or species_of(features.ids, path)


def _check_scale(run: _Run, stated: str) -> None:
    """Refuse an alignment that contradicts the scale that the image or the caller states."""
    with open_slide(run.image) as slide:
        said = number(stated, "--mpp") if stated else slide.mpp
    if said is None or 0.9 < said / run.mpp < 1.1:
        return
    who = "--mpp says" if stated else f"{run.image.name} says"
    back = 0.9 < said / (run.pixel_size / run.alignment.scale()) < 1.1
    raise SourceError(
        f"{run.alignment.path}: makes an H&E px {run.mpp:.4f} um, but {who} {said:g}; "
        + ("the matrix takes DAPI px to H&E px, the other way round: invert it" if back
           else f"take alignment, image and {EXPERIMENT} from one run; if {who.split()[0]} is wrong, say --mpp {run.mpp:.4f}")
    )  # fmt: skip


# -- transcripts --------------------------------------------------------------------------------------------


def _words(batch: pa.RecordBatch, path: Path) -> tuple[list[str], np.ndarray]:
    """Return the different feature names of a batch and, per row, which it is (-1 for none)."""
    column = batch.column("feature_name")
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    words = _texts(column.dictionary, path)
    return words, column.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def _texts(column: pa.Array, path: Path) -> list[str]:
    """Return values as text; version 1 wrote bytes, or numbers."""
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
        gene = kinds[code]  # -1 is a control, -2 no gene of the panel; code -1 is the last, -2
        if flagged:
            gene[(gene >= 0) & ~np.asarray(batch.column("is_gene").fill_null(True), bool)] = -1
        xyq = numbers_of(batch, ["x_location", "y_location", "qv"], path)
        bad = {
            "control probes": gene == -1,
            "of no gene of the panel": gene == -2,
            "without a position": ~np.isfinite(xyq[:, :2]).all(axis=1),
            f"of a quality under qv {qv:g}": ~(xyq[:, 2] >= qv),
        }
        keep = np.ones(len(gene), bool)
        for reason, mask in bad.items():
            left[reason] += int((mask & keep).sum())
            keep &= ~mask
        pooler.add_transcripts(run.squares(xyq[keep, :2]), gene[keep])
    said = [f"{n:,} transcripts left out: {reason}" for reason, n in left.items() if n]
    if not pooler.total_units:
        raise SourceError(
            f"{path}: no transcript is left ({'; '.join(said) or 'the table is empty'}); lower --qv, or check the panel"
        )
    return pooler, [f"{pooler.total_units:,} transcripts of qv {qv:g} or more are pooled", *said]


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
        raise SourceError(f"{path}: {n - len(where)} cells stand more than once")
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
            "take both from one run"
        )
    notes = [f"{pooler.total_units:,} cells are pooled"]
    if lost:
        notes.append(f"{lost:,} cells with {lost_counts:,} counts are not in {path.name} and are left out")
    return pooler, notes


# -- both ---------------------------------------------------------------------------------------------------


def _section(run: _Run, meta: SectionMeta, pooler: Pooler, least: int, what: str, notes: list[str]) -> Section:
    pooled = pooler.result(min_units=least)
    if not len(pooled.n_units):
        raise SourceError(f"{run.path}: no square of {run.pool_um:g} um holds {least} {what}; lower --min-pooled")
    dropped = {f"pseudo-spots with under {least:,} {what}": pooled.dropped_squares}
    xy = (pooled.square_N2 + 0.5) * (run.pool_um / run.mpp)
    with open_slide(run.image) as slide:
        width, height = slide.size
    inside = np.asarray(((xy >= 0) & (xy <= [width, height])).all(axis=1), bool)
    if inside.sum() < MAX_OUTSIDE * len(xy):
        raise SourceError(
            f"{run.alignment.path}: puts {int((~inside).sum())} of {len(xy)} pseudo-spots beside the H&E {run.image} ({width} x "
            f"{height} px); take image and alignment of one section; a matrix must take H&E px to DAPI px, not back"
        )
    dropped["pseudo-spots beside the H&E image"] = int((~inside).sum())
    pooled = _keep(pooled, inside)
    return pooled_section(
        meta, run.image, pooled, xy[inside], run.features.only_genes(), dropped=dropped, units=what,
        notes=[*run.notes, *notes, *appearance_note(run.image)],
    )  # fmt: skip


def _keep(pooled: Pooled, mask: np.ndarray) -> Pooled:
    """Leave out squares, counting what they held."""
    kept = np.flatnonzero(mask)
    counts, units = pooled.counts[kept], pooled.n_units[kept]
    return replace(
        pooled, square_N2=pooled.square_N2[kept], counts=counts, n_units=units,
        dropped_squares=pooled.dropped_squares + len(mask) - len(kept),
        dropped_units=pooled.dropped_units + int(pooled.n_units.sum() - units.sum()),
        dropped_counts=pooled.dropped_counts + int(pooled.counts.sum(dtype=np.int64) - counts.sum(dtype=np.int64)),
    )  # fmt: skip
