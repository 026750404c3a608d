"""STimage-1K4M folders, complete or partial: ``TECH/coord``, ``TECH/gene_exp``, ``TECH/image``, and ``meta/``.

The dataset does not state um per px. The scale is derived from the spot pitch (Visium 100 um, legacy ST 200 um) and checked
against the radius ``r``, whose definition varies between slides. For Visium HD, the caller states the scale.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from comtip_shards.errors import SourceError
from comtip_shards.genes.species import species_name
from comtip_shards.sections.facts import SectionFacts, SourceOptions
from comtip_shards.sections.section import Section, SectionMeta
from comtip_shards.sources.base import CatalogueRow, SectionSource, pick, stated_image
from comtip_shards.sources.files.names import by_section_id, safe_id
from comtip_shards.sources.files.opening import existing, reading
from comtip_shards.sources.files.packaging import find
from comtip_shards.sources.files.spots import SpotPositions, join
from comtip_shards.sources.files.table_size import MAX_LINE
from comtip_shards.sources.files.tables import numbers, read_counts_table, read_table
from comtip_shards.sources.geometry import ScaleCheck, median_gap

TECHS = ("ST", "Visium", "VisiumHD")
TABLE = "meta/meta_all_gene*.csv"
LICENCE = "MIT (STimage-1K4M); each study's data under its own terms"
PITCH_UM = {"ST": 200.0, "Visium": 100.0}
PITCH_2K_UM = 150.0
DIAMETER_UM = {"ST": 100.0, "Visium": 55.0}
DRAWN_UM = {"ST": (80.0, 130.0), "Visium": (45.0, 75.0)}
"""Valid range of 2 ``r`` in um; Space Ranger draws the 55 um spots of Visium 65 um wide."""
_ARRAY = re.compile(r"(\d+(?:\.\d+)?)x(\d+(?:\.\d+)?)$")


@dataclass(frozen=True)
class _SlideRow:
    """Row of a slide in the metadata table."""

    species: str
    tissue: str
    tech: str
    study: str
    """PubMed id and title, if the table states them."""


def recognise(path: Path) -> str | None:
    """Return a reason if ``path`` is an STimage-1K4M folder, else None."""
    found = [t for t in TECHS if any(find(path / t / "coord", "*_coord.csv"))]
    return f"{', '.join(found)} with coord/*_coord.csv" if found else None


def catalogue(path: Path, facts: SectionFacts) -> list[CatalogueRow]:
    """List the slides of the folder with their metadata; stated ``facts`` take precedence.

    Raises
    ------
    SourceError
        The metadata table is invalid, or two slides have the same section id.
    """
    rows = {row.section_id: row for row in table_rows(path)}
    out = []
    for name, coord in _slides(path).items():
        tech = coord.parent.parent.name
        row = rows.get(name, CatalogueRow(name, platform=tech, dataset="STimage-1K4M"))
        out.append(row.with_facts(facts))
    return out


def table_rows(path: Path) -> list[CatalogueRow]:
    """List all slides of the newest metadata table, even those without files; raises SourceError if the table is invalid."""
    return [
        CatalogueRow(name, species_name(r.species), r.tissue, r.tech, dataset="STimage-1K4M")
        for name, r in _read_meta(path).items()
    ]


def _slides(path: Path) -> dict[str, Path]:
    """Return {section id: coord file}."""
    out: dict[str, Path] = {}
    for tech in TECHS:
        for coord in sorted(find(path / tech / "coord", "*_coord.csv")):
            name = safe_id(coord.name.removesuffix("_coord.csv"))
            if name in out:
                raise SourceError(f"{coord}: slide {name} also exists in {out[name].parent.parent.name}; remove one")
            out[name] = coord
    return out


def _read_meta(path: Path) -> dict[str, _SlideRow]:
    """Return {section id: row} of the newest table."""
    tables = sorted(find(path, TABLE), key=lambda p: (_date(p.stem), p.name))
    if not tables:
        return {}
    what = "table of slides"
    with reading(tables[-1], what), existing(tables[-1], what).open(encoding="utf-8-sig", errors="replace") as file:
        header = file.readline(MAX_LINE)
    # The first release is tab-separated, later ones are comma-separated; all are named .csv.
    table = read_table(tables[-1], sep="\t" if header.count("\t") > header.count(",") else ",")
    missing = [c for c in ("slide", "species", "tissue", "tech") if c not in table]
    if missing:
        raise SourceError(
            f"{tables[-1]}: missing column {', '.join(missing)} (found {', '.join(table.columns[:12])}); download it again"
        )
    by_section_id((str(name) for name in table["slide"]), "slides", tables[-1])
    return {
        safe_id(str(row["slide"])): _SlideRow(
            str(row["species"]),
            str(row["tissue"]),
            str(row["tech"]),
            "; ".join(f"{k} {row[k]}" for k in ("pmid", "title") if row.get(k)),
        )
        for row in table.to_dict("records")
    }


def _date(stem: str) -> str:
    """Return the date (MMDDYYYY) in a table's name as YYYYMMDD for sorting, "" if there is none."""
    digits = stem.removeprefix("meta_all_gene")
    return digits[4:8] + digits[:4] if len(digits) == 8 and digits.isdigit() else ""


def open_sections(path: Path, samples: Sequence[str] | None, options: SourceOptions) -> list[SectionSource]:
    """Return the slides named in ``samples``, or all; raises SourceError if files or facts are missing."""
    slides = _slides(path)
    if not slides:
        raise SourceError(
            f"{path}: no TECH/coord/SLIDE_coord.csv; give the folder that contains ST/, Visium/ or VisiumHD/"
        )
    rows = {row.section_id: row for row in catalogue(path, options.facts)}
    table = _read_meta(path)
    return [
        _source(slides[n], rows[n], table[n].study if n in table else "", options.facts)
        for n in pick(samples, list(slides), path)
    ]


def _source(coord: Path, row: CatalogueRow, study: str, facts: SectionFacts) -> SectionSource:
    tech, slide = coord.parent.parent, coord.name.removesuffix("_coord.csv")
    counts = existing(tech / "gene_exp" / f"{slide}_count.csv", f"counts of {slide}")
    image = _image(tech, slide, facts)
    for key, value in (("species", row.species), ("tissue", row.tissue)):
        if not value:
            raise SourceError(f"{coord}: no {key} for {slide} in {TABLE}; download meta/ or set `{key}`")
    spots, radius = read_coord(coord, slide)
    notes: list[str] = []
    mpp = facts.mpp or _scale(coord, spots, radius, tech.name, notes)
    meta = SectionMeta(
        section_id=row.section_id,
        dataset=row.dataset,
        species=row.species,
        tissue=row.tissue,
        donor=row.donor,
        platform=row.platform,
        licence=facts.licence or LICENCE,
        attribution=facts.attribution or f"STimage-1K4M; {study}".rstrip("; "),
        mpp=mpp,
        spot_diameter_um=DIAMETER_UM.get(tech.name, round(2 * radius * mpp, 3)),
        spot_pitch_um=PITCH_UM.get(tech.name, round(median_gap(spots.xy) * mpp, 3)),
    )
    load = partial(_load, meta, image, counts, coord, slide, spots, notes)
    return SectionSource(meta, (image, counts, coord), load, examine=ScaleCheck.of(facts))


def _image(tech: Path, slide: str, facts: SectionFacts) -> Path:
    stated = stated_image(facts, safe_id(slide))
    if stated is not None:
        return stated
    # Files are named .png whatever their format; the format is detected by content.
    found = sorted(p for p in find(tech / "image", f"{slide}.*") if p.is_file())
    return found[0] if found else existing(tech / "image" / f"{slide}.png", f"image of {slide}")


def read_coord(path: Path, slide: str) -> tuple[SpotPositions, float]:
    """Read a coord table, with the columns spot id, ``yaxis``, ``xaxis`` and ``r``.

    Returns
    -------
    spots, radius
        In image px; ids have no slide prefix, and the radius is the median of ``r``.

    Raises
    ------
    SourceError
        The table cannot be read, a column is missing, a value is not a number, or the radius is not positive.
    """
    table = read_table(path, sep=",")
    missing = [c for c in ("yaxis", "xaxis", "r") if c not in table]
    if missing:
        raise SourceError(
            f"{path}: missing column {', '.join(missing)} (found {', '.join(table.columns)}); download it again"
        )
    ids = bare_ids(table.iloc[:, 0].tolist(), slide)
    values = numbers(table, ["xaxis", "yaxis", "r"], path)
    radius = float(np.median(values[:, 2]))
    if not radius > 0:
        raise SourceError(f"{path}: the radius r is {radius:g} px, expected a positive value; download the file again")
    parsed = [_ARRAY.match(i) for i in ids]
    array = np.array([(float(m[1]), float(m[2])) if m else (np.nan, np.nan) for m in parsed])
    return SpotPositions(ids, values[:, :2], array, [""] * len(ids), np.ones(len(ids), bool)), radius


def bare_ids(ids: Sequence[str], slide: str) -> list[str]:
    """Return spot ids without the prefix ``SLIDE_``."""
    return [i.removeprefix(slide).lstrip("_") if i.startswith(f"{slide}_") else i for i in ids]


def _scale(path: Path, spots: SpotPositions, radius: float, tech: str, notes: list[str]) -> float:
    """Return um per px from the spot pitch of ``tech``, and append a note on this assumption.

    Raises SourceError if ``tech`` has no fixed pitch, the positions give none, or the radius contradicts it.
    """
    if tech not in PITCH_UM:
        raise SourceError(f"{path}: no scale; set `mpp`, because the bin width of {tech} varies")
    gap = median_gap(spots.xy)
    if not gap > 0:
        problem = (
            "most spots have the same position as another one" if gap == 0 else "fewer than two spots have a position"
        )
        raise SourceError(f"{path}: {problem}, so the scale cannot be estimated; correct the table, or set `mpp`")
    mpp = PITCH_UM[tech] / gap
    low, high = DRAWN_UM[tech]
    drawn = 2 * radius * mpp
    if not low <= drawn <= high:
        raise SourceError(
            f"{path}: the spot pitch is {gap:.1f} px and r is {radius:.1f} px; with the pitch of {PITCH_UM[tech]:g} um of "
            f"{tech} slides, the spot diameter is {drawn:.0f} um instead of {DIAMETER_UM[tech]:g}; set `mpp`"
            + (f" (to {PITCH_2K_UM / gap:.4g} if this is a 2k array, with {PITCH_2K_UM:g} um)" if tech == "ST" else "")
        )
    also = f" (1k arrays; for 2k arrays with {PITCH_2K_UM:g} um set `mpp`)" if tech == "ST" else ""
    notes.append(
        f"no scale in the source: assumed a spot pitch of {PITCH_UM[tech]:g} um{also}: {mpp:.4f} um per px; r and "
        f"spots of {DIAMETER_UM[tech]:g} um give {DIAMETER_UM[tech] / (2 * radius):.4f}"
    )
    return mpp


def _load(
    meta: SectionMeta, image: Path, counts: Path, coord: Path, slide: str, spots: SpotPositions, notes: Sequence[str]
) -> Section:
    matrix, ids, genes = read_counts_table(counts, sep=",")
    names = bare_ids(ids, slide)
    return join(meta, image, matrix, names, genes, [""] * len(genes), spots, counts, coord, list(notes))
