"""A HEST-1k folder, or a part of one: ``st/ID.h5ad`` with ``wsis/ID.tif`` or ``patches/ID.h5``, and ``metadata/ID.json``.

``obsm["spatial"]`` is a spot's centre, ``coords`` of the patches their top-left corner, both in px of the WSI. There
are fewer patches than spots, so the two are joined by barcode. Tiles are cut from the WSI where it is there, else
from the patches, if these are wide enough (112 um).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from comtip_shards.errors import SourceError
from comtip_shards.sections.section import Section, SectionMeta
from comtip_shards.slides.base import Slide
from comtip_shards.slides.open import mpp_by_tag
from comtip_shards.sources.anndata_source import (
    SPECIES_NAMES,
    centres,
    library_picture,
    library_slide,
    median_gap,
    open_h5ad,
    read_part,
    read_spots,
)
from comtip_shards.sources.base import CatalogueRow, SectionSource, existing, number, pick, read_table
from comtip_shards.sources.patches import Patches, PatchSlide, read_patches

TABLE = "HEST_v*.csv"
LICENCE = "CC BY-NC-SA 4.0 (HEST-1k: not for commercial use)"
PIXELS = ("wsi", "patches")
POOLED = ("xenium", "visium hd")
"""Technologies whose spots are squares that HEST pooled."""
NO_PATCH = "without a patch: too little tissue under it"


def recognise(path: Path) -> str | None:
    """Return why ``path`` is such a folder, or None."""
    if not any((path / "st").glob("*.h5ad")):
        return None
    beside = [f"{n}/" for n in ("wsis", "patches", "metadata") if (path / n).is_dir()]
    beside += [p.name for p in sorted(path.glob(TABLE))]
    return f"st/*.h5ad beside {', '.join(beside)}" if beside else None


def catalogue(path: Path, overrides: Mapping[str, str]) -> list[CatalogueRow]:
    """Return the sections of the table, or of ``metadata/``, that the folder holds."""
    ids = [p.stem for p in sorted((path / "st").glob("*.h5ad"))]
    facts = read_facts(path, ids)
    return [_row(name, facts.get(name, {}), overrides) for name in ids]


def table_rows(path: Path) -> list[CatalogueRow]:
    """Return all sections of the table, those included whose files are not in the folder."""
    return [_row(name, row, {}) for name, row in _read_csv(path).items()]


def read_facts(path: Path, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return {id: facts} of the newest table, and over them those of ``metadata/ID.json``."""
    facts = _read_csv(path)
    for name in ids:
        file = path / "metadata" / f"{name}.json"
        if file.is_file():
            stated = {k: v for k, v in _read_json(file).items() if v is not None}
            facts[name] = facts.get(name, {}) | stated
    return facts


def _read_csv(path: Path) -> dict[str, dict[str, Any]]:
    tables = sorted(path.glob(TABLE), key=lambda p: [int(n) for n in p.stem.split("_v")[-1].split("_") if n.isdigit()])
    if not tables:
        return {}
    table = read_table(tables[-1], sep=",")
    if "id" not in table:
        raise SourceError(f"{tables[-1]}: lacks the column id; it has {', '.join(map(str, table.columns[:8]))}")
    return {str(row["id"]): {str(k): v for k, v in row.items() if v != ""} for row in table.to_dict("records")}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: not JSON ({error}); download it again") from error
    if not isinstance(data, dict):
        raise SourceError(f"{path}: not a JSON object; download it again")
    return data


def _row(name: str, facts: Mapping[str, Any], overrides: Mapping[str, str]) -> CatalogueRow:
    species = overrides.get("species") or str(facts.get("species", ""))
    title = " ".join(str(facts.get("dataset_title", "")).split())
    patient = str(facts.get("patient", "")).strip()
    # "Patient 1" is somebody else in every study.
    donor = f"{title[:60]}: {patient}" if patient and title else patient
    return CatalogueRow(
        name, SPECIES_NAMES.get(species.lower(), species.lower()),
        overrides.get("tissue") or str(facts.get("organ") or facts.get("tissue") or ""),
        overrides.get("platform") or str(facts.get("st_technology", "")), overrides.get("donor") or donor, "HEST-1k",
    )  # fmt: skip


def open_sections(path: Path, samples: Sequence[str] | None, overrides: Mapping[str, str]) -> list[SectionSource]:
    """Return the sections of the folder that ``samples`` names, all where it is None."""
    if overrides.get("pixels", PIXELS[0]) not in PIXELS:
        raise SourceError(f"--pixels {overrides['pixels']}: use {' or '.join(PIXELS)}")
    rows = {row.section_id: row for row in catalogue(path, overrides)}
    if not rows:
        raise SourceError(f"{path}: no st/ID.h5ad; give the folder that holds st/, wsis/ or patches/, and metadata/")
    facts = read_facts(path, list(rows))
    return [_source(path, rows[name], facts.get(name, {}), overrides) for name in pick(samples, list(rows), path)]


def _source(path: Path, row: CatalogueRow, facts: Mapping[str, Any], overrides: Mapping[str, str]) -> SectionSource:
    name = row.section_id
    table, patches = path / "st" / f"{name}.h5ad", path / "patches" / f"{name}.h5"
    wsi = _wsi(path, name, overrides)
    if wsi is None and not patches.is_file():
        raise SourceError(
            f"{path}: neither wsis/{name}.tif nor patches/{name}.h5 is there; download one, or give --image"
        )
    notes: list[str] = []
    if not facts:
        notes.append(f"neither metadata/{name}.json nor a {TABLE} says anything of {name}")
    mpp = _scale(path, name, facts, overrides, wsi, notes)
    pitch, diameter = _geometry(table, mpp, facts, row.platform, notes)
    if not row.tissue:
        raise SourceError(f"{path}: nothing says the tissue of {name}; download metadata/{name}.json, or give --tissue")
    licence = f"{LICENCE}; the study's own: {facts['license']}" if facts.get("license") else LICENCE
    study = "; ".join(str(facts[k]) for k in ("dataset_title", "study_link") if facts.get(k))
    meta = SectionMeta(
        section_id=name, dataset=row.dataset, species=row.species, tissue=row.tissue, donor=row.donor,
        platform=row.platform, licence=overrides.get("licence") or licence,
        attribution=overrides.get("attribution") or "; ".join(filter(None, ["HEST-1k (MahmoodLab/hest)", study])),
        mpp=mpp, spot_diameter_um=diameter, spot_pitch_um=pitch,
        pooling=f"squares of {pitch:g} um, pooled by HEST" if row.platform.lower() in POOLED else "",
    )  # fmt: skip
    inputs = [p for p in (table, path / "metadata" / f"{name}.json", patches, wsi) if p is not None and p.is_file()]
    return SectionSource(meta, tuple(inputs), partial(_load, meta, table, patches, wsi, dict(facts), notes))


def _wsi(path: Path, name: str, overrides: Mapping[str, str]) -> Path | None:
    if overrides.get("image"):
        return existing(Path(overrides["image"].replace("{id}", name)), "image (--image)")
    if overrides.get("pixels") == "patches":
        return None
    wsi = next(iter(sorted((path / "wsis").glob(f"{name}.tif*"))), None)
    if wsi is None and overrides.get("pixels") == "wsi":
        raise SourceError(f"{path / 'wsis' / name}.tif: no such file, and --pixels wsi asks for it; download it")
    return wsi


def _scale(
    path: Path, name: str, facts: Mapping[str, Any], overrides: Mapping[str, str], wsi: Path | None, notes: list[str]
) -> float:
    """Return um per px of the WSI: estimated by HEST from the spots, else what the file had embedded, or has."""
    where = path / "metadata" / f"{name}.json"
    if overrides.get("mpp"):
        return number(overrides["mpp"], "--mpp")
    for key in ("pixel_size_um_estimated", "pixel_size_um_embedded"):
        value = number(facts.get(key, ""), f"{where}: {key}")
        if np.isfinite(value):
            if key.endswith("embedded"):
                notes.append("scale from pixel_size_um_embedded: HEST could not estimate it from the spots")
            return value
    tagged = mpp_by_tag(wsi, notes) if wsi is not None else None
    if tagged is not None:
        return tagged
    raise SourceError(f"{where}: no pixel_size_um_estimated of {name}; download it, or give --mpp")


def _geometry(
    table: Path, mpp: float, facts: Mapping[str, Any], platform: str, notes: list[str]
) -> tuple[float, float]:
    """Return (um between spots, um of a spot); what is measured wins over what is stated, and a difference is said."""
    with open_h5ad(table) as file:
        if "obsm/spatial" not in file:
            raise SourceError(f"{table}: no obsm['spatial']; download it again")
        gap = median_gap(centres(read_part(file, "obsm/spatial", table), table)) * mpp
    stated = number(facts.get("inter_spot_dist", ""), f"{table.stem}: inter_spot_dist")
    diameter = number(facts.get("spot_diameter", ""), f"{table.stem}: spot_diameter")
    if np.isfinite(stated) and np.isfinite(gap) and abs(gap / stated - 1) > 0.1:
        notes.append(f"spots are {gap:.1f} um apart at {mpp:.4f} um per px, but inter_spot_dist says {stated:g} um")
    pitch = gap if np.isfinite(gap) else stated
    square = platform.lower() in POOLED or not np.isfinite(diameter)
    return round(pitch, 3), round(pitch if square else diameter, 3)


def _load(
    meta: SectionMeta, table: Path, patches_path: Path, wsi: Path | None, facts: Mapping[str, Any], notes: Sequence[str]
) -> Section:
    with open_h5ad(table) as file:
        n = len(read_part(file, "obs", table))
    section = read_spots(table, np.arange(n), meta, wsi or patches_path, 1.0, list(notes))
    if patches_path.is_file():
        patches = read_patches(patches_path, meta.mpp)
        section = section.keep(np.array([s in patches.row_of for s in section.spot_ids], bool), NO_PATCH)
        section.notes += patches.check(section.spot_ids, section.xy)
        if wsi is None:
            section.notes.append(f"tiles are cut from patches of {patches.width_um:g} um ({patches_path.name})")
            section.slide_opener = partial(_open_patches, patches, section.spot_ids, section.xy, table, dict(facts))
    else:
        section.notes.append(f"no patches/{patches_path.name}: spots with little tissue are among them")
    return section


def _open_patches(
    patches: Patches, spot_ids: Sequence[str], xy: np.ndarray, table: Path, facts: Mapping[str, Any]
) -> Slide:
    """Return patches as a slide, with the small picture inside the h5ad as its overview."""
    with open_h5ad(table) as file:
        group = file.get("uns/spatial", {})
        if not isinstance(group, h5py.Group) or not len(group):
            raise SourceError(f"{table}: no picture in uns['spatial']; download it again, or wsis/{table.stem}.tif too")
        library = group[next(iter(group))]
        picture = library_picture(library, str(table))
        small = library_slide(library, picture, table)
    size = [
        number(facts.get(f"fullres_px_{side}", ""), f"{table.stem}: fullres_px_{side}") for side in ("width", "height")
    ]
    if not np.isfinite(size).all():
        size = [side / picture.factor for side in small.size]
    return PatchSlide(patches, spot_ids, xy, small, (round(size[0]), round(size[1])))
