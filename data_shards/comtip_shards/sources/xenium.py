"""Xenium output folders: transcripts or cells pooled to square pseudo-spots on an aligned H&E image.

Positions are in um. They are mapped to DAPI px (``pixel_size`` in ``experiment.xenium``), then to H&E px (see
:mod:`comtip_shards.sources.tenx.alignment`), and pooled in squares parallel to the H&E, so that a tile and its counts cover
the same area.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from comtip_shards.errors import SourceError
from comtip_shards.sections.facts import SourceOptions, refuse
from comtip_shards.sections.pooling import Pooled, Pooler
from comtip_shards.sections.section import Section, SectionMeta
from comtip_shards.slides.open import open_slide
from comtip_shards.sources.base import SectionSource, check_one_file, pick
from comtip_shards.sources.files.packaging import by_prefix, find, unpacked
from comtip_shards.sources.tenx.matrix import TenxMatrix
from comtip_shards.sources.tenx.pooled import pooled_meta, pooled_section
from comtip_shards.sources.tenx.run import appearance_note
from comtip_shards.sources.xenium_parts.files import CELLS, ROLES, TRANSCRIPTS, XeniumFiles, find_runs
from comtip_shards.sources.xenium_parts.pool import pool_cells, pool_transcripts
from comtip_shards.sources.xenium_parts.run import XeniumRun, check_scale, open_run

POOL_UM, MIN_QV = 100.0, 20.0
"""Default width of a pseudo-spot in um, and default minimum quality of a transcript."""
DENSE, MIN_OF_DENSE = 0.9, 0.05
"""Quantile that defines a dense pseudo-spot, and minimum share of its transcripts for a pseudo-spot to be kept: a few
transcripts are also found outside tissue."""
MAX_OUTSIDE = 0.5
"""Maximum share of pseudo-spots outside the H&E image; above it the alignment is refused."""


def recognise(path: Path) -> str | None:
    """Return a reason if ``path`` is a Xenium folder, else None."""
    if not path.is_dir():
        return None
    found = {role: [p for files in by_prefix(path, like).values() for p in files] for role, like in ROLES.items()}
    names = [p.name for role in ("experiment", "transcripts", "cells") for p in found[role]]
    matrix = bool(find(path, "*cell_feature_matrix*"))
    if not found["experiment"] and not (matrix and (found["transcripts"] or found["cells"])):
        return None
    return f"Xenium run with {', '.join(names[:6])}"


def open_sections(path: Path, samples: Sequence[str] | None, options: SourceOptions) -> list[SectionSource]:
    """Return the sections of the folder: one named after it, or one per prefix of the file names.

    Raises
    ------
    SourceError
        Files, facts or options are missing or contradict each other.
    """
    refuse(options, ("bin_um", "min_cover"), "it is for Visium HD (Xenium has `min_pooled`)")
    runs = {run.name: run for run in find_runs(path)}
    names = pick(samples, list(runs), path)
    check_one_file("image", options.facts.image, names, path)
    check_one_file("alignment", options.pooling.alignment, names, path)
    return [_source(runs[name], options) for name in names]


def _source(files: XeniumFiles, options: SourceOptions) -> SectionSource:
    path, pooling = files.root, options.pooling
    what = pooling.pool_from or ("transcripts" if files.transcripts is not None else "cells")
    if what == "bins":
        raise SourceError(f"`pool_from={what}` is for Visium HD; use transcripts or cells for Xenium")
    run = open_run(files, options, pooling.pool_um or POOL_UM)
    if what == "cells":
        refuse(options, ("qv",), "the counts of cells contain only transcripts of qv 20 or more")
        if files.matrix is None:
            also = ", or set `pool_from` to transcripts" if files.transcripts is not None else ""
            raise SourceError(
                f"{path}: no cell_feature_matrix.h5 with the counts of the cells; copy it from the Xenium output{also}"
            )
    table = files.cells if what == "cells" else files.transcripts
    if table is None:
        name = CELLS if what == "cells" else TRANSCRIPTS
        raise SourceError(
            f"{path / name}: no such file; copy the table of {what} (or its csv.gz) from the Xenium output"
        )
    qv, least = MIN_QV if pooling.qv is None else pooling.qv, pooling.min_pooled
    units = what if what == "cells" else f"transcripts of qv {qv:g} or more"
    enough = str(least or 1) if least or what == "cells" else f"{MIN_OF_DENSE:.0%} of a dense one"
    meta = pooled_meta(
        path,
        files.name,
        options.facts,
        species=run.species,
        platform="Xenium",
        mpp=run.mpp,
        pool_um=run.pool_um,
        pooling=f"{units} in squares of {run.pool_um:g} um, at least {enough}",
    )
    inputs = [run.image, run.alignment.path, table, *(files.matrix.files if files.matrix else ())]
    inputs += [p for p in (files.experiment, files.panel if files.matrix is None else None) if p is not None]
    if what == "cells" and files.matrix is not None:
        load = partial(_load_cells, run, meta, table, files.matrix, least or 1, options.facts.mpp)
    else:
        load = partial(_load_transcripts, run, meta, table, qv, least, options.facts.mpp)
    return SectionSource(meta, tuple(inputs), load)


def _load_cells(
    run: XeniumRun, meta: SectionMeta, table: Path, matrix: TenxMatrix, least: int, mpp: float | None
) -> Section:
    check_scale(run, mpp)
    pooler, notes = pool_cells(run, table, matrix)
    return _section(run, meta, pooler, least, "cells", notes)


def _load_transcripts(
    run: XeniumRun, meta: SectionMeta, table: Path, qv: float, least: int | None, mpp: float | None
) -> Section:
    check_scale(run, mpp)
    pooler, notes = pool_transcripts(run, table, qv)
    dense = float(np.quantile(pooler.units, DENSE)) if len(pooler.units) else 0.0
    return _section(run, meta, pooler, least or max(1, math.ceil(MIN_OF_DENSE * dense)), "transcripts", notes)


def _section(run: XeniumRun, meta: SectionMeta, pooler: Pooler, least: int, what: str, notes: list[str]) -> Section:
    pooled = pooler.result(min_units=least)
    if not len(pooled.n_units):
        raise SourceError(f"{run.path}: no square of {run.pool_um:g} um contains {least} {what}; reduce `min_pooled`")
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
    """Return the squares in ``mask``, bool (N,); the content of the others is added to the dropped totals."""
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
