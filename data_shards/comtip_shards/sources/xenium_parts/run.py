"""Inputs of one Xenium run: pixel size, alignment to the H&E image, panel and species."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from comtip_shards.errors import SourceError
from comtip_shards.genes.species import species_name
from comtip_shards.sections.facts import SourceOptions
from comtip_shards.sections.pooling import squares_of
from comtip_shards.slides.open import open_slide
from comtip_shards.sources.files.packaging import unpacked
from comtip_shards.sources.files.tables import number
from comtip_shards.sources.tenx.alignment import Alignment, read_alignment
from comtip_shards.sources.tenx.features import Features, for_species
from comtip_shards.sources.tenx.run import read_json
from comtip_shards.sources.xenium_parts.files import EXPERIMENT, XeniumFiles, alignment_file, he_image
from comtip_shards.sources.xenium_parts.panel import panel_of

PIXEL_SIZE_UM = 0.2125
"""um per px of the DAPI image of every Xenium Analyzer, used if experiment.xenium is missing."""


@dataclass(frozen=True)
class XeniumRun:
    """Inputs shared by the pooling of transcripts and of cells."""

    path: Path
    """Xenium output folder, for messages."""
    pixel_size: float
    """um per px of the DAPI image."""
    alignment: Alignment
    image: Path
    """The H&E image."""
    pool_um: float
    """Width of a square in um."""
    features: Features
    species: str
    notes: list[str] = field(default_factory=list)

    @property
    def mpp(self) -> float:
        """Pixel size of the H&E image in um."""
        return self.pixel_size * self.alignment.scale()

    def squares(self, um_N2: np.ndarray, path: Path) -> np.ndarray:
        """Return the square of each position, int64 (N, 2), from positions of the table ``path`` in um, float (N, 2)."""
        return squares_of(self.alignment.to_image(um_N2 / self.pixel_size), self.pool_um / self.mpp, str(path))


def open_run(files: XeniumFiles, options: SourceOptions, pool_um: float) -> XeniumRun:
    """Read the inputs of a Xenium section; raises SourceError if one is missing or invalid, or the species is unknown."""
    experiment = read_json(files.experiment, "description of the run") if files.experiment is not None else {}
    path, notes = files.root, []
    where = files.experiment or path / EXPERIMENT
    if files.experiment is None:
        notes.append(f"no {EXPERIMENT}: assumed {PIXEL_SIZE_UM} um per px of the DAPI image")
    size = experiment.get("pixel_size", "") if files.experiment is not None else PIXEL_SIZE_UM
    pixel_size = number(size, f"{where}: pixel_size")
    if not 0.05 <= pixel_size <= 2:
        raise SourceError(
            f"{where}: pixel_size is {experiment.get('pixel_size')!r}, expected about {PIXEL_SIZE_UM}; copy the file from "
            "the Xenium output again"
        )
    image = he_image(files, options.facts)
    alignment = read_alignment(alignment_file(files, image, options.pooling), pixel_size)
    features, panel_notes = panel_of(files)
    features, species = for_species(features, options.facts.species or _organism(experiment), path)
    run = XeniumRun(path, pixel_size, alignment, image, pool_um, features, species)
    matrix = alignment.matrix_33
    angle = float(np.degrees(np.arctan2(matrix[1, 0], matrix[0, 0])))
    mirrored = ", mirrored" if np.linalg.det(matrix[:2, :2]) < 0 else ""
    orientation = f"H&E: {run.mpp:.4f} um per px, rotated by {angle:.1f} degrees{mirrored}"
    run.notes.extend([*notes, *panel_notes, *features.others_note(), *alignment.notes, orientation])
    return run


def _organism(experiment: Mapping[str, Any]) -> str:
    organism = species_name(str(experiment.get("panel_organism", "")))
    return organism if organism in ("human", "mouse") else ""


def check_scale(run: XeniumRun, stated: float | None) -> None:
    """Check the scale that the alignment gives against the stated scale or, if none is stated, the scale of the image.

    Raises
    ------
    SourceError
        They differ by more than 10 %.
    """
    with open_slide(unpacked(run.image)) as slide:
        expected = slide.mpp if stated is None else stated
    if expected is None or 0.9 < expected / run.mpp < 1.1:
        return
    origin = run.image.name if stated is None else "`mpp`"
    inverted = 0.9 < expected / (run.pixel_size / run.alignment.scale()) < 1.1
    raise SourceError(
        f"{run.alignment.path}: gives {run.mpp:.4f} um per H&E px, but {origin} states {expected:g}; "
        + (
            "the matrix maps DAPI px to H&E px; export or use its inverse"
            if inverted
            else f"use alignment, image and {EXPERIMENT} of the same Xenium run; if {origin} is wrong, set `mpp` to {run.mpp:.4f}"
        )
    )
