"""``manifest.tsv``: a table with one row per section and paths relative to the table."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from comtip_shards.errors import SourceError
from comtip_shards.genes.species import species_name
from comtip_shards.names import check_section_id
from comtip_shards.sections.facts import SectionFacts, SourceOptions
from comtip_shards.sections.section import RENAME, Section, SectionMeta, check_meta
from comtip_shards.slides.open import mpp_by_tag
from comtip_shards.sources.base import CatalogueRow, SectionSource, pick
from comtip_shards.sources.files.opening import existing
from comtip_shards.sources.files.spots import join, read_spots_table
from comtip_shards.sources.files.tables import encoding_of, number, read_counts_table, read_table
from comtip_shards.sources.geometry import ScaleCheck

NAME = "manifest.tsv"
MAX_HEADER = 1 << 16
"""Number of characters of the first line that are read to recognise the table: a hostile file may have no end of line."""
FILES = ("image", "counts", "spots")
REQUIRED = ("sample_id", "species", "tissue", "donor", "image", "counts", "spots", "mpp_um_per_px")


def recognise(path: Path) -> str | None:
    """Return a reason if ``path`` is a manifest table or a folder that contains one, else None."""
    table = path / NAME if path.is_dir() else path
    if not table.is_file() or table.suffix.lower() != ".tsv":
        return None
    with table.open(encoding=encoding_of(table), errors="replace") as file:
        header = [name.strip() for name in file.readline(MAX_HEADER).split("\t")]
    return f"{table.name} has the column sample_id" if "sample_id" in header else None


def open_sections(path: Path, samples: Sequence[str] | None, options: SourceOptions) -> list[SectionSource]:
    """Return the sections named in ``samples``, or all; raises SourceError if the table or a listed file is invalid."""
    where = path / NAME if path.is_dir() else path
    rows = _rows(where)
    return [_source(rows[name], where, options.facts) for name in pick(samples, list(rows), where)]


def catalogue(folder: Path) -> list[CatalogueRow]:
    """List the sections of a folder's table, whose files need not exist; raises SourceError if the table is invalid."""
    return [
        CatalogueRow(name, *(str(row.get(c, "")) for c in ("species", "tissue", "platform", "donor", "dataset")))
        for name, row in _rows(folder / NAME).items()
    ]


def files_of(folder: Path, section: str) -> tuple[str, ...]:
    """Return a section's file names relative to the table, ordered as in :data:`FILES`; raises SourceError for an invalid table."""
    row = _rows(folder / NAME)[section]
    return tuple(str(row[c]) for c in FILES)


def ids_of(folder: Path) -> list[str]:
    """Return the section ids of a folder's table; raises SourceError if the table is invalid."""
    return list(_rows(folder / NAME))


def _rows(where: Path) -> dict[str, dict[Hashable, Any]]:
    table = read_table(where)
    missing = [c for c in REQUIRED if c not in table]
    if missing:
        raise SourceError(
            f"{where}: missing columns {', '.join(missing)} (found {', '.join(table.columns)}); add them to the table"
        )
    ids = table["sample_id"].tolist()
    for row, name in enumerate(ids, 2):
        check_section_id(name, f"{where}: sample_id in row {row}", SourceError, RENAME)
    twice = sorted({i for i in ids if ids.count(i) > 1})
    if twice:
        raise SourceError(f"{where}: duplicate sample_id {', '.join(twice)}; rename or remove one")
    return {str(row["sample_id"]): row for row in table.to_dict("records")}


def _file(root: Path, cell: str) -> Path:
    """Return the path in a cell; if it does not exist, backslashes are taken for the folder separators of Windows."""
    path = root / cell
    return path if path.exists() else root / cell.replace("\\", "/")


def _source(row: Mapping[Hashable, Any], where: Path, facts: SectionFacts) -> SectionSource:
    root = where.parent
    name = str(row["sample_id"])

    def cell(column: str) -> str:
        return str(row.get(column, ""))

    image, counts, spots = (existing(_file(root, str(row[c])), f"{c} of {name} in {where.name}") for c in FILES)
    notes: list[str] = []
    mpp = facts.mpp or number(cell("mpp_um_per_px"), f"{where}: mpp_um_per_px of {name}")
    if not np.isfinite(mpp):
        mpp = mpp_by_tag(image, notes) or mpp
    meta = SectionMeta(
        section_id=name,
        dataset=cell("dataset"),
        species=facts.species or species_name(cell("species")),
        tissue=facts.tissue or cell("tissue"),
        donor=facts.donor or cell("donor"),
        platform=facts.platform or cell("platform"),
        licence=facts.licence or cell("licence"),
        attribution=facts.attribution or cell("attribution"),
        mpp=mpp,
        spot_diameter_um=number(row.get("spot_diameter_um", "100"), f"{where}: spot_diameter_um of {name}"),
        spot_pitch_um=number(row.get("spot_pitch_um", "200"), f"{where}: spot_pitch_um of {name}"),
        split=cell("split"),
    )
    check_meta(meta, where)
    if "genes x spots" in cell("counts_layout"):
        raise SourceError(
            f"{where}: {name}: counts_layout is genes x spots; transpose {counts.name} and correct the cell"
        )

    examine = replace(ScaleCheck.of(facts), pitch_is_stated=bool(cell("spot_pitch_um")))

    def load() -> Section:
        matrix, ids, genes = read_counts_table(counts)
        return join(meta, image, matrix, ids, genes, [""] * len(genes), read_spots_table(spots), counts, spots, notes)

    return SectionSource(meta, (image, counts, spots), load, examine=examine)
