"""A Space Ranger ``outs`` folder of a Visium slide, versions 1 to 4: h5 or MEX, positions with or without a header.

Positions are px of the image that the pipeline was given, which it does not keep: it is asked for (``image=``). The
shrunk pictures in ``spatial/`` are taken only where the caller says ``hires`` or ``lowres``.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from comtip_shards.errors import SourceError
from comtip_shards.sections.section import Section, SectionMeta, check_unique
from comtip_shards.sources.base import SectionSource, Spots, join, number, numbers, pick, reading
from comtip_shards.sources.tenx import (
    TenxMatrix,
    appearance_note,
    choose_image,
    find_matrix,
    only,
    scale_factors,
    section_name,
    species_of,
)

PITCH_UM, DIAMETER_UM = 100.0, 55.0
SLIDES = {4_992: "6.5 mm", 14_336: "11 mm"}
"""Spots of a capture area by its width."""
COARSE_MPP = 2.0
"""um per px from which on a "full-resolution" image is no microscope scan."""
POSITIONS = ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv")
COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
FACTORS = "scalefactors_json.json"


def recognise(path: Path) -> str | None:
    """Return why ``path`` is such a folder, or None."""
    spatial = path / "spatial"
    if not spatial.is_dir() or (path / "binned_outputs").is_dir():
        return None
    found = [p.name for p in (*_positions_files(spatial), spatial / FACTORS) if p.is_file()]
    if not found or (
        (spatial / FACTORS).is_file() and "bin_size_um" in (spatial / FACTORS).read_text(errors="replace")
    ):
        return None  # bins of Visium HD
    return f"spatial/ holds {', '.join(found)}"


def open_sections(path: Path, samples: Sequence[str] | None, overrides: Mapping[str, str]) -> list[SectionSource]:
    """Return the one section of the folder, named by it."""
    name = section_name(path)
    pick(samples, [name], path)
    spatial = path / "spatial"
    counts, notes = _matrix(path)
    positions = only(_positions_files(spatial), "table of positions")
    if positions is None:
        raise SourceError(f"{spatial}: none of {', '.join(POSITIONS)} is there")
    factors = scale_factors(spatial / FACTORS)
    spots = read_positions(positions)
    features = counts.features()
    full_mpp = _scale(spots, factors, positions, overrides.get("mpp", ""), notes)
    if not overrides.get("tissue"):
        raise SourceError(f"{path}: Space Ranger does not say the tissue; give --tissue")
    image, scale, image_notes = choose_image(path, spatial, factors, overrides.get("image", ""))
    notes += image_notes + features.others_note()
    meta = SectionMeta(
        section_id=name, dataset=name, species=(overrides.get("species") or species_of(features.ids, counts.path)).lower(),
        tissue=overrides["tissue"], donor=overrides.get("donor", ""), platform=overrides.get("platform", "Visium"),
        licence=overrides.get("licence", ""), attribution=overrides.get("attribution", ""), mpp=full_mpp / scale,
        spot_diameter_um=DIAMETER_UM, spot_pitch_um=PITCH_UM,
    )  # fmt: skip
    placed = Spots(spots.ids, spots.xy * scale, spots.array_xy, spots.labels, spots.in_tissue)

    def load() -> Section:
        matrix, barcodes, genes = counts.read()
        aligned = _align_suffix(placed, barcodes)
        said = notes + appearance_note(image)
        return join(meta, image, matrix, barcodes, genes.ids, genes.symbols, aligned, counts.path, positions, said)

    return [SectionSource(meta, (image, *counts.files, positions, spatial / FACTORS), load)]


def _matrix(path: Path) -> tuple[TenxMatrix, list[str]]:
    for stem in ("filtered_feature_bc_matrix", "filtered_gene_bc_matrices"):
        found = find_matrix(path, stem)
        if found is not None:
            return found, []
    found = find_matrix(path, "raw_feature_bc_matrix")
    if found is None:
        raise SourceError(
            f"{path}: neither filtered_feature_bc_matrix.h5 nor the folder filtered_feature_bc_matrix is there"
        )
    return found, [
        f"counts from {found.path.name}: the filtered matrix is not there; spots in tissue are taken from it"
    ]


def _positions_files(spatial: Path) -> list[Path]:
    """Return the tables of positions; one may be named ``ID_tissue_positions.csv`` and be packed with gzip."""
    exact = [p for n in POSITIONS for end in ("", ".gz") if (p := spatial / (n + end)).is_file()]
    return exact or sorted(p for n in POSITIONS for p in spatial.glob(f"*_{n}*"))


def read_positions(path: Path) -> Spots:
    """Read positions, with or without a header, as csv (packed or not) or parquet."""
    with reading(path, "tissue positions"):
        if path.suffix == ".parquet":
            table = pd.read_parquet(path).astype(str)
        else:
            # The file's name does not tell whether there is a header: some "list" files have one.
            with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
                header = file.readline().decode("utf-8-sig").lower().lstrip('"').startswith("barcode")
            table = pd.read_csv(
                path, header=0 if header else None, dtype=str, keep_default_na=False, encoding="utf-8-sig"
            )
    if set(COLUMNS) <= set(table.columns):
        table = table[COLUMNS]
    elif table.shape[1] != len(COLUMNS) or "barcode" in table.columns:
        have = ", ".join(map(str, table.columns))
        raise SourceError(f"{path}: {table.shape[1]} columns ({have}), expected six: {', '.join(COLUMNS)}")
    else:
        table.columns = pd.Index(COLUMNS)
    if table.empty:
        raise SourceError(f"{path}: the table has no rows")
    check_unique(table["barcode"].tolist(), f"{path}: barcodes")
    tissue = numbers(table, ["in_tissue"], path)[:, 0] == 1
    return Spots(
        table["barcode"].tolist(), numbers(table, ["pxl_col_in_fullres", "pxl_row_in_fullres"], path),
        numbers(table, ["array_col", "array_row"], path), [""] * len(table), tissue,
    )  # fmt: skip


def _scale(spots: Spots, factors: Mapping[str, float], path: Path, stated: str, notes: list[str]) -> float:
    """Return um per full-resolution px from the 100 um between neighbours, checked against what is stated."""
    if len(spots.ids) not in SLIDES:
        notes.append(
            f"{path.name} has {len(spots.ids):,} spots; a whole slide has {' or '.join(f'{n:,}' for n in SLIDES)}"
        )
    given = number(stated, "--mpp") if stated else factors.get("microns_per_pixel")
    pitch = _pitch_px(spots, path)
    mpp = PITCH_UM / pitch
    notes.append(f"scale from the {PITCH_UM:g} um between neighbouring spots: {mpp:.4f} um per full-resolution px")
    diameter = factors.get("spot_diameter_fullres")
    if diameter and not 0.7 < diameter * mpp / DIAMETER_UM < 1.5:
        raise SourceError(
            f"{path}: neighbours are {pitch:.1f} px apart but spot_diameter_fullres is {diameter:.1f} px; on a Visium slide "
            "these are 100 and 55 (or 65) um, so positions and scale factors are not of one run; take both from one"
        )
    if given is not None and not 0.95 < given / mpp < 1.05:
        raise SourceError(
            f"{path}: {given:g} um per px is stated, but neighbours are {pitch:.1f} px apart, which is 100 um, so a "
            f"full-resolution px is {mpp:.4f} um; leave --mpp out, or give the table of positions that belongs to it"
        )
    if mpp > COARSE_MPP:
        notes.append(
            f"the positions belong to an image of {mpp:.2f} um per px, coarser than a microscope's: no separate scan "
            "seems to have been given to Space Ranger, and this is the CytAssist instrument's own picture"
        )
    return mpp if given is None else given


def _pitch_px(spots: Spots, path: Path) -> float:
    """Return px between neighbours, by least squares of positions on the hexagonal array."""
    # Neighbours in a row are two columns apart; rows are sqrt(3) / 2 of a pitch apart.
    array = spots.array_xy * [0.5, 0.75**0.5]
    design = np.column_stack([array - array.mean(axis=0), np.ones(len(array))])
    if not (np.isfinite(design).all() and np.isfinite(spots.xy).all()) or np.linalg.matrix_rank(design) < 3:
        raise SourceError(f"{path}: too few spots with array coordinates and positions to work out the scale")
    fit, *_ = np.linalg.lstsq(design, spots.xy, rcond=None)
    pitch = float(np.sqrt(abs(np.linalg.det(fit[:2]))))
    off = float(np.sqrt(((design @ fit - spots.xy) ** 2).sum(axis=1).mean()))
    if not pitch > 0 or off > 0.2 * pitch:
        raise SourceError(
            f"{path}: positions lie {off:.0f} px from where array_row and array_col put them on a Visium slide "
            f"(neighbours {pitch:.0f} px apart); the columns are mixed up, or this is no Visium slide"
        )
    return pitch


def _align_suffix(spots: Spots, barcodes: list[str]) -> Spots:
    """Add or take the "-1" that one file writes after a barcode and the other does not."""
    if not barcodes or set(spots.ids) & set(barcodes):
        return spots
    full_name = {re.sub(r"-\d+$", "", b): b for b in barcodes}
    if len(full_name) < len(barcodes):
        return spots  # several runs in one matrix: the suffix tells them apart and must not be guessed
    ids = [full_name.get(re.sub(r"-\d+$", "", i), i) for i in spots.ids]
    return Spots(ids, spots.xy, spots.array_xy, spots.labels, spots.in_tissue)
