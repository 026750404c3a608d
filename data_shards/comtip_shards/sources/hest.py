"""HEST-1k folders, complete or partial: ``st/ID.h5ad``, ``wsis/ID.tif`` or ``patches/ID.h5``, ``metadata/ID.json``.

In WSI px, ``obsm["spatial"]`` holds the centres of spots and ``coords`` the top-left corners of patches. Some spots have no
patch, so both are joined by barcode. Tiles are cut from the stated image or the WSI; without either, or with ``pixels=patches``,
they are cut from the patches (112 um wide).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from comtip_shards.errors import SourceError
from comtip_shards.genes.species import species_name
from comtip_shards.sections.facts import CountOptions, SectionFacts, SourceOptions
from comtip_shards.sections.section import Section, SectionMeta
from comtip_shards.slides.base import Slide
from comtip_shards.slides.open import mpp_by_tag
from comtip_shards.slides.pixel_scale import check_stated_mpp
from comtip_shards.sources.anndata_parts.picture import library_picture, library_slide
from comtip_shards.sources.anndata_parts.positions import centres
from comtip_shards.sources.anndata_parts.spots import read_spots
from comtip_shards.sources.anndata_parts.store import open_h5ad, read_part
from comtip_shards.sources.base import CatalogueRow, SectionSource, pick, stated_image
from comtip_shards.sources.files.opening import fix_of
from comtip_shards.sources.files.packaging import find
from comtip_shards.sources.files.tables import number, read_table
from comtip_shards.sources.geometry import MAX_RATIO_INFERRED, ScaleCheck, check_pitch, median_gap
from comtip_shards.sources.patches import Patches, PatchSlide, read_patches
from comtip_shards.storage.regular_file import read_regular

TABLE = "HEST_v*.csv"
LICENCE = "CC BY-NC-SA 4.0 (HEST-1k: not for commercial use)"
POOLED = ("xenium", "visium hd")
"""Technologies for which HEST pooled square pseudo-spots."""
NO_PATCH = "no patch: too little tissue"


def recognise(path: Path) -> str | None:
    """Return a reason if ``path`` is a HEST-1k folder, else None."""
    if not any(find(path / "st", "*.h5ad")):
        return None
    siblings = [f"{n}/" for n in ("wsis", "patches", "metadata") if (path / n).is_dir()]
    siblings += [p.name for p in sorted(find(path, TABLE))]
    return f"st/*.h5ad with {', '.join(siblings)}" if siblings else None


def catalogue(path: Path, facts: SectionFacts) -> list[CatalogueRow]:
    """List the sections in ``st/`` with their metadata; stated ``facts`` take precedence. Raises the errors of :func:`read_metadata`."""
    ids = [p.stem for p in sorted(find(path / "st", "*.h5ad"))]
    rows = read_metadata(path, ids)
    return [_row(name, rows.get(name, {})).with_facts(facts) for name in ids]


def table_rows(path: Path) -> list[CatalogueRow]:
    """List all sections of the newest metadata table, even those without files; raises SourceError if the table is invalid."""
    return [_row(name, row) for name, row in _read_csv(path).items()]


def read_metadata(path: Path, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return {id: metadata} of the newest table; for the sections ``ids``, values in ``metadata/ID.json`` take precedence.

    Raises
    ------
    SourceError
        The table or one of these JSON files cannot be read or is invalid.
    """
    rows = _read_csv(path)
    for name in ids:
        file = path / "metadata" / f"{name}.json"
        if file.is_file():
            own = {k: v for k, v in _read_json(file).items() if v is not None}
            rows[name] = rows.get(name, {}) | own
    return rows


def _read_csv(path: Path) -> dict[str, dict[str, Any]]:
    tables = sorted(find(path, TABLE), key=lambda p: [int(n) for n in p.stem.split("_v")[-1].split("_") if n.isdigit()])
    if not tables:
        return {}
    table = read_table(tables[-1], sep=",")
    if "id" not in table:
        raise SourceError(
            f"{tables[-1]}: missing column id (found {', '.join(map(str, table.columns[:8]))}); copy it from HEST-1k again"
        )
    return {str(row["id"]): {str(k): v for k, v in row.items() if v != ""} for row in table.to_dict("records")}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(read_regular(path, 1 << 28).decode("utf-8-sig"))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}); {fix_of(error, 'download it again')}") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(data, dict):
        raise SourceError(f"{path}: not a JSON object; download it again")
    return data


def _row(name: str, row: Mapping[str, Any]) -> CatalogueRow:
    title = " ".join(str(row.get("dataset_title", "")).split())
    patient = str(row.get("patient", "")).strip()
    return CatalogueRow(
        name,
        species_name(str(row.get("species", ""))),
        str(row.get("organ") or row.get("tissue") or ""),
        str(row.get("st_technology", "")),
        f"{title[:60]}: {patient}" if patient and title else patient,  # numbers are unique within a study only
        "HEST-1k",
    )


def open_sections(path: Path, samples: Sequence[str] | None, options: SourceOptions) -> list[SectionSource]:
    """Return the sections named in ``samples``, or all; raises SourceError if files or facts are missing."""
    rows = {row.section_id: row for row in catalogue(path, options.facts)}
    if not rows:
        raise SourceError(f"{path}: no st/ID.h5ad; give the folder that contains st/, wsis/ or patches/, and metadata/")
    names = pick(samples, list(rows), path)
    metadata = read_metadata(path, list(rows))
    return [_source(path, rows[name], metadata.get(name, {}), options.facts) for name in names]


def _source(path: Path, row: CatalogueRow, metadata: Mapping[str, Any], facts: SectionFacts) -> SectionSource:
    name = row.section_id
    table, patches = path / "st" / f"{name}.h5ad", path / "patches" / f"{name}.h5"
    wsi = _wsi(path, name, facts)
    if wsi is None and not patches.is_file():
        if facts.pixels == "patches":
            raise SourceError(
                f"{patches}: no such file, but `pixels=patches` requires it; download it, or set `pixels=wsi` for wsis/{name}.tif"
            )
        raise SourceError(
            f"{path}: neither wsis/{name}.tif nor patches/{name}.h5 exists; download one, set `pixels=patches` if a URL has only "
            "patches, or set `image`"
        )
    notes: list[str] = []
    if not metadata:
        notes.append(f"no metadata for {name}, neither in metadata/{name}.json nor in {TABLE}")
    mpp = _scale(path, name, metadata, wsi, notes) if facts.mpp is None else facts.mpp
    if facts.mpp is not None:
        own = next((v for _, v in _own_scales(path, name, metadata)), None)
        check_stated_mpp(mpp, own, "the metadata of HEST", str(table), trusted=bool(facts.trust_mpp))
    visium = row.platform.lower() == "visium" and not facts.trust_mpp
    limit = MAX_RATIO_INFERRED if visium else float("inf")
    pitch, diameter = _geometry(table, mpp, metadata, row.platform, limit, notes)
    if not row.tissue:
        raise SourceError(f"{path}: no tissue for {name}; download metadata/{name}.json or set `tissue`")
    licence = f"{LICENCE}; the study's own: {metadata['license']}" if metadata.get("license") else LICENCE
    study = "; ".join(str(metadata[k]) for k in ("dataset_title", "study_link") if metadata.get(k))
    meta = SectionMeta(
        section_id=name,
        dataset=row.dataset,
        species=row.species,
        tissue=row.tissue,
        donor=row.donor,
        platform=row.platform,
        licence=facts.licence or licence,
        attribution=facts.attribution or "; ".join(filter(None, ["HEST-1k (MahmoodLab/hest)", study])),
        mpp=mpp,
        spot_diameter_um=diameter,
        spot_pitch_um=pitch,
        pooling=f"squares of {pitch:g} um, pooled by HEST" if row.platform.lower() in POOLED else "",
    )
    inputs = [p for p in (table, path / "metadata" / f"{name}.json", patches, wsi) if p is not None and p.is_file()]
    load = partial(_load, meta, table, patches, wsi, dict(metadata), notes)
    return SectionSource(meta, tuple(inputs), load, examine=ScaleCheck.of(facts))


def _wsi(path: Path, name: str, facts: SectionFacts) -> Path | None:
    if facts.image:
        return stated_image(facts, name)
    if facts.pixels == "patches":
        return None
    wsi = next(iter(sorted(find(path / "wsis", f"{name}.tif*"))), None)
    if wsi is None and facts.pixels == "wsi":
        raise SourceError(
            f"{path / 'wsis' / name}.tif: no such file, but `pixels=wsi` requires it; download it, or set `pixels=patches`"
        )
    return wsi


def _scale(path: Path, name: str, metadata: Mapping[str, Any], wsi: Path | None, notes: list[str]) -> float:
    """Return um per px of the WSI: HEST's estimate from spots, else HEST's embedded value, else the WSI's resolution tag."""
    for key, value in _own_scales(path, name, metadata):
        if key.endswith("embedded"):
            notes.append("scale from pixel_size_um_embedded: HEST has no estimate from spots")
        return value
    tagged = mpp_by_tag(wsi, notes) if wsi is not None else None
    if tagged is not None:
        return tagged
    raise SourceError(
        f"{path}: no scale (pixel_size_um_estimated) of {name} in metadata/{name}.json or {TABLE}; download the file that is "
        "missing, or set `mpp`"
    )


def _own_scales(path: Path, name: str, metadata: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield (key, um per px) of the scales that HEST states, the estimate from spots first."""
    for key in ("pixel_size_um_estimated", "pixel_size_um_embedded"):
        value = number(metadata.get(key, ""), f"{path}: {key} of {name}")
        if np.isfinite(value) and value > 0:
            yield key, value


def _geometry(
    table: Path,
    mpp: float,
    metadata: Mapping[str, Any],
    platform: str,
    limit: float,
    notes: list[str],
) -> tuple[float, float]:
    """Return (spot pitch, spot diameter) in um; the measured pitch takes precedence, and a difference is noted."""
    with open_h5ad(table) as file:
        if "obsm/spatial" not in file:
            raise SourceError(f"{table}: missing obsm['spatial']; download it again")
        xy = centres(read_part(file, "obsm/spatial", table), table)
    check_pitch(xy, mpp, limit, str(table))
    gap = median_gap(xy) * mpp
    stated = number(metadata.get("inter_spot_dist", ""), f"{table.parents[1]}: inter_spot_dist of {table.stem}")
    diameter = number(metadata.get("spot_diameter", ""), f"{table.parents[1]}: spot_diameter of {table.stem}")
    if np.isfinite(stated) and np.isfinite(gap) and abs(gap / stated - 1) > 0.1:
        notes.append(f"the spot pitch is {gap:.1f} um at {mpp:.4f} um per px, but inter_spot_dist is {stated:g} um")
    pitch = gap if np.isfinite(gap) else stated
    square = platform.lower() in POOLED or not np.isfinite(diameter)
    return round(pitch, 3), round(pitch if square else diameter, 3)


def _load(
    meta: SectionMeta,
    table: Path,
    patches_path: Path,
    wsi: Path | None,
    metadata: Mapping[str, Any],
    notes: Sequence[str],
) -> Section:
    with open_h5ad(table) as file:
        n = len(read_part(file, "obs", table))
    section = read_spots(table, np.arange(n), meta, wsi or patches_path, 1.0, list(notes), CountOptions())
    if patches_path.is_file():
        patches = read_patches(patches_path, meta.mpp)
        section = section.keep(np.array([s in patches.row_of for s in section.spot_ids], bool), NO_PATCH)
        section.notes += patches.check(section.spot_ids, section.xy)
        if wsi is None:
            section.notes.append(f"tiles are cut from patches of {patches.width_um:g} um ({patches_path.name})")
            section.slide_opener = partial(_open_patches, patches, section.spot_ids, section.xy, table, dict(metadata))
    else:
        section.notes.append(f"no patches/{patches_path.name}: spots with little tissue are included")
    return section


def _open_patches(
    patches: Patches, spot_ids: Sequence[str], xy: np.ndarray, table: Path, metadata: Mapping[str, Any]
) -> Slide:
    """Open patches as a slide, with the image in the h5ad as overview."""
    with open_h5ad(table) as file:
        group = file.get("uns/spatial", {})
        if not isinstance(group, h5py.Group) or not len(group):
            raise SourceError(
                f"{table}: no image in uns['spatial']; download it again, or download wsis/{table.stem}.tif and set `pixels=wsi`"
            )
        key = next(iter(group))
        library = group[key]
        picture = library_picture(library, f"{table}: uns['spatial'][{key!r}]")
        small = library_slide(library, picture, table)
    size = [
        number(metadata.get(f"fullres_px_{side}", ""), f"{table.parents[1]}: fullres_px_{side} of {table.stem}")
        for side in ("width", "height")
    ]
    if not np.isfinite(size).all():
        size = [side / picture.factor for side in small.size]
    return PatchSlide(patches, spot_ids, xy, small, (round(size[0]), round(size[1])))
