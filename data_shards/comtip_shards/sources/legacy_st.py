"""Legacy Spatial Transcriptomics folders: counts by array coordinates, an image, and spot positions.

Positions are read from ``*_spots.tsv`` (px of the image), ``*_selection.tsv`` or ``*_alignment.tsv`` (px of the image
used for alignment). Without these files they are derived from the 33 x 35 array, whose frame fills the published
images exactly.

1k arrays have 33 x 35 positions, 200 um apart. 2k arrays use every second position of a finer grid, as a chessboard, so that
neighbours are one step apart along both x and y: 150 um. The grid exceeds 33 x 35.
"""

from __future__ import annotations

import gzip
import logging
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import numpy as np

from comtip_shards.errors import SourceError
from comtip_shards.sections.facts import SectionFacts, SourceOptions
from comtip_shards.sections.section import Section, SectionMeta
from comtip_shards.slides.open import image_size
from comtip_shards.sources.base import SectionSource, check_one_file, pick, stated_image
from comtip_shards.sources.files.packaging import find, is_gzip
from comtip_shards.sources.files.spots import SpotPositions, join, read_spots_table
from comtip_shards.sources.files.tables import numbers, read_counts_table, read_table
from comtip_shards.sources.geometry import ScaleCheck, platform_pitch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Array:
    """Geometry of an array."""

    platform: str
    pitch_um: float
    """Distance between neighbouring spots."""
    diameter_um: float
    steps: float
    """Distance between neighbouring spots in units of the array coordinates."""


_1K = _Array("legacy Spatial Transcriptomics", 200.0, 100.0, 1.0)
_2K = _Array("ST 2k array", 150.0, 110.0, sqrt(2))
_GRID_1K = (33.5, 35.5)
"""Upper limits of the array coordinates on a 1k array, with half a step of tolerance."""
MAX_HEADER = 1 << 24
"""Largest number of bytes of a header that is skipped."""
_MANY_SPOTS = 50
"""Minimum number of spots from which a chessboard is inferred; fewer spots of a 1k array may form one by chance."""
MIN_PITCH_UM, MAX_PITCH_UM = 75.0, 400.0
"""Range in um of the spot pitch that a stated scale must give."""
_COUNTS = re.compile(r"(?P<id>.+?)(?:_stdata|_counts)?\.tsv(?:\.gz)?$")
_NOT_COUNTS = re.compile(r"(_spots|_selection|_alignment|_annotation|_labeled_coordinates|_onehot|genes|manifest)\b")
_CALLED_HE = re.compile(r"(?i)(?:^|[^a-z])h[&_-]?e(?:[^a-z]|$)")
_SPOT_ID = re.compile(r"(-?\d+(?:\.\d+)?)x(-?\d+(?:\.\d+)?)$")


def recognise(path: Path) -> str | None:
    """Return a reason if ``path`` is a legacy ST folder, else None."""
    found = _sections(path) if path.is_dir() else {}
    return f"count tables with images: {', '.join(found)}" if found else None


def _sections(path: Path) -> dict[str, tuple[Path, list[Path]]]:
    """Return {section id: (counts, images)}, with images that are called HE first, of the tables that have an image."""
    return {name: (counts, images) for name, (counts, images) in _tables(path).items() if images}


def without_images(path: Path) -> list[str]:
    """Return the ids of the count tables of a folder that have no image."""
    return [name for name, (counts, images) in _tables(path).items() if not images and _has_spots(counts)]


def _has_spots(table: Path) -> bool:
    """Return whether the first row of a table is named by array coordinates, as those of counts are."""
    try:
        with gzip.open(table, "rb") if is_gzip(table) else table.open("rb") as file:
            file.readline(MAX_HEADER)
            name = file.readline(64).partition(b"\t")[0]
    except (OSError, EOFError, zlib.error):
        return False
    return bool(_SPOT_ID.match(name.decode("utf-8", "replace").strip().strip('"')))


def _tables(path: Path) -> dict[str, tuple[Path, list[Path]]]:
    """Return {id: (counts, images)} of all tables whose name may be that of counts."""
    out: dict[str, tuple[Path, list[Path]]] = {}
    for counts in sorted(find(path, "*.tsv*")):
        match = _COUNTS.match(counts.name)
        if match is None or _NOT_COUNTS.search(counts.name):
            continue
        name = match["id"]
        images = [
            p
            for p in sorted(find(path, f"{name}[._]*"))
            if p.suffix.lower() in {".jpg", ".jpeg", ".png", ".tif", ".tiff"}
        ]
        images = [p for p in images if "overlay" not in p.stem.lower()]
        out[name] = (counts, sorted(images, key=lambda p: _CALLED_HE.search(p.stem) is None))
    return out


def open_sections(path: Path, samples: Sequence[str] | None, options: SourceOptions) -> list[SectionSource]:
    """Return the sections of the folder; raises SourceError if there are none, or species or tissue are not stated."""
    found = _sections(path)
    if not found:
        raise SourceError(
            f"{path}: no ID.tsv(.gz) with an image ID_*.jpg or .png; put each count table and its image in this folder"
        )
    facts = options.facts
    if facts.species is None or facts.tissue is None:
        missing = "species" if facts.species is None else "tissue"
        raise SourceError(f"{path}: legacy ST files have no {missing}; set `{missing}`")
    names = pick(samples, list(found), path)
    left_out = without_images(path) if samples is None else []
    if left_out:
        log.warning(
            "%s: left out, because they have no image: %s; put the H&E image of each next to its counts, as %s_HE.jpg",
            path,
            ", ".join(left_out),
            left_out[0],
        )
    check_one_file("image", facts.image, names, path)
    return [_source(path, name, *found[name], facts, facts.species, facts.tissue) for name in names]


def _source(
    path: Path, name: str, counts: Path, images: Sequence[Path], facts: SectionFacts, species: str, tissue: str
) -> SectionSource:
    stated = stated_image(facts, name)
    image = stated or images[0]
    table = next(
        (p for kind in ("spots", "selection", "alignment") if (p := path / f"{name}_{kind}.tsv").is_file()), None
    )
    spots = _read_spots(table, image) if table is not None else None
    notes = [] if table is not None else [f"no spot file: assumed that the 33 x 35 array frame fills {image.name}"]
    if stated is None and len(images) > 1:
        notes.append(
            f"{image.name} was taken as the image, not {', '.join(p.name for p in images[1:])}; `image` selects another"
        )
    array = _array_of(facts, spots)
    mpp = _scale(table or image, facts, spots, image, array, notes)
    meta = SectionMeta(
        section_id=name,
        dataset=path.name,
        species=species,
        tissue=tissue,
        donor=facts.donor or "",
        platform=facts.platform or array.platform,
        licence=facts.licence or "",
        attribution=facts.attribution or "",
        mpp=mpp,
        spot_diameter_um=array.diameter_um,
        spot_pitch_um=array.pitch_um,
    )

    def load() -> Section:
        matrix, ids, genes = read_counts_table(counts)
        if spots is None and all(_SPOT_ID.match(g) for g in genes) and not any(_SPOT_ID.match(i) for i in ids):
            raise SourceError(f"{counts}: its columns are spots, so it is genes x spots; transpose it to spots x genes")
        positions = spots if spots is not None else _from_array(ids, image, counts, name)
        return join(meta, image, matrix, ids, genes, [""] * len(genes), positions, counts, table or counts, notes)

    inputs = tuple(p for p in (image, counts, table) if p is not None)
    return SectionSource(meta, inputs, load, examine=ScaleCheck.of(facts))


def _array_of(facts: SectionFacts, spots: SpotPositions | None) -> _Array:
    """Return the array: as the platform states it, 2k if the coordinates exceed 33 x 35 or form a chessboard, else 1k."""
    if platform_pitch(facts.platform or "") == _2K.pitch_um:
        return _2K
    if spots is None or not np.isfinite(spots.array_xy).all():
        return _1K
    beyond = (spots.array_xy.max(axis=0, initial=0) > _GRID_1K).any()
    parities = np.unique(np.rint(spots.array_xy).sum(axis=1) % 2)
    return _2K if beyond or (len(spots.ids) >= _MANY_SPOTS and len(parities) == 1) else _1K


def _scale(
    path: Path, facts: SectionFacts, spots: SpotPositions | None, image: Path, array: _Array, notes: list[str]
) -> float:
    """Return um per px: the stated scale, or else the scale at which the array has its pitch.

    Raises SourceError if no scale is stated and the pitch in px is unknown, if this pitch is less than 1 px, or if a stated scale
    gives an implausible pitch and the caller does not trust it.
    """
    pitch_px = _pitch_px(spots, image)
    if pitch_px is None:
        few = spots is not None and len(spots.ids) < 3
        why = "fewer than three spots" if few else "spots without array coordinates or position"
        if facts.mpp is None:
            raise SourceError(f"{path}: {why}, so the scale cannot be derived; complete the table, or set `mpp`")
        notes.append(f"the stated scale was not compared with the array: {path.name} has {why}")
        return facts.mpp
    pitch_px *= array.steps
    if not 1 <= pitch_px < np.inf:
        raise SourceError(
            f"{path}: spots on the array are {pitch_px:g} px apart, expected at least one; "
            + (
                "correct positions and array coordinates"
                if spots is not None
                else "give the image of the complete array"
            )
        )
    stated = facts.mpp
    if stated is None:
        mpp = array.pitch_um / pitch_px
        notes.append(
            f"scale from the {array.pitch_um:g} um between spots of the array ({array.platform}): {mpp:.4f} um per px"
        )
        return mpp
    pitch = pitch_px * stated
    if not facts.trust_mpp and not MIN_PITCH_UM < pitch < MAX_PITCH_UM:
        raise SourceError(
            f"{path}: with {stated:g} um per px the spot pitch is {pitch:.0f} um, but arrays have {_2K.pitch_um:g} or {_1K.pitch_um:g} um; "
            f"set `mpp` to {array.pitch_um * stated / pitch:.4g} or omit it, or set `trust_mpp=yes` for an array of another pitch"
        )
    return stated


def _read_spots(path: Path, image: Path) -> SpotPositions:
    if path.name.endswith("_spots.tsv"):
        return read_spots_table(path)
    table = read_table(path)
    missing = [c for c in ("x", "y", "pixel_x", "pixel_y") if c not in table]
    if missing:
        raise SourceError(
            f"{path}: missing columns {', '.join(missing)} (found {', '.join(table.columns)}); add them to the table"
        )
    array = numbers(table, ["new_x", "new_y"] if {"new_x", "new_y"} <= set(table) else ["x", "y"], path)
    chosen = np.array([v.strip() != "0" for v in table.get("selected", ["1"] * len(table))], bool)
    ids = [f"{x}x{y}" for x, y in zip(table["x"], table["y"], strict=True)]
    return SpotPositions(ids, numbers(table, ["pixel_x", "pixel_y"], path), array, [""] * len(ids), chosen)


def _from_array(ids: list[str], image: Path, counts: Path, name: str) -> SpotPositions:
    parsed = [_SPOT_ID.match(i) for i in ids]
    bad = [i for i, m in zip(ids, parsed, strict=True) if m is None]
    if bad:
        raise SourceError(
            f"{counts}: spot id {bad[0]!r} is not of the form 12x7; provide positions in {name}_spots.tsv"
        )
    array = np.array([[float(m[1]), float(m[2])] for m in parsed if m is not None])
    if array.min() < 0.5 or (array.max(axis=0) > _GRID_1K).any():
        raise SourceError(f"{counts}: array coordinates exceed 33 x 35; provide positions in {name}_spots.tsv")
    width, height = image_size(image)
    xy = np.stack([(array[:, 0] - 1) / 32 * width, (array[:, 1] - 1) / 34 * height], axis=1)
    return SpotPositions(ids, xy, array, [""] * len(ids), np.ones(len(ids), bool))


def _pitch_px(spots: SpotPositions | None, image: Path) -> float | None:
    """Return px per array step, by a least-squares fit of positions to array coordinates, or from the image width without spots.

    None if there are fewer than three spots, or if a spot has no position or array coordinates.
    """
    if spots is None:
        return image_size(image)[0] / 32
    design = np.column_stack([spots.array_xy, np.ones(len(spots.ids))])
    if len(spots.ids) < 3 or not (np.isfinite(design).all() and np.isfinite(spots.xy).all()):
        return None
    fit, *_ = np.linalg.lstsq(design, spots.xy, rcond=None)
    return float(np.sqrt(abs(np.linalg.det(fit[:2]))))
