"""A SpatialData store (``.zarr``): tables that annotate shapes or labels, and an image in the same coordinate system.

Each annotated region is a section. Its centres are brought into px of the image by the transformations of both.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from comtip_shards.errors import SourceError
from comtip_shards.sections.section import Section, SectionMeta
from comtip_shards.slides.wsi import BlockedSlide
from comtip_shards.sources.anndata_source import (
    VISIUM_DIAMETER_UM,
    VISIUM_PITCH_UM,
    annotated,
    facts_of,
    gene_names,
    median_gap,
    raw_counts,
    safe_id,
)
from comtip_shards.sources.base import SectionSource, number, pick
from comtip_shards.sources.tenx import species_of
from comtip_shards.sources.zarr_metadata import check_store

NO_SHAPE, NO_ROW = "in the table but without a shape", "shapes without a row in the table"


def recognise(path: Path) -> str | None:
    """Return why ``path`` is such a store, or None."""
    for name in ("zarr.json", ".zattrs"):
        file = path / name
        if file.is_file() and "spatialdata_attrs" in file.read_text(encoding="utf-8", errors="replace"):
            return f"{name} has spatialdata_attrs"
    return None


def open_sections(path: Path, samples: Sequence[str] | None, overrides: Mapping[str, str]) -> list[SectionSource]:
    """Return one section per annotated region."""
    data = read_store(path)
    regions = _regions(data, path)
    ids = {safe_id(region): region for region in regions}
    return [_source(path, data, regions[ids[n]], ids[n], n, overrides) for n in pick(samples, list(ids), path)]


def read_store(path: Path) -> Any:
    """Open a store whose metadata passes :func:`comtip_shards.sources.zarr_metadata.check_store`; images stay on the disk."""
    check_store(path, "a SpatialData store")
    try:
        spatialdata = import_module("spatialdata")
    except ImportError as error:
        raise SourceError(
            f"{path}: reading SpatialData needs a package: pip install 'comtip-fast[spatialdata]'"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return spatialdata.read_zarr(path)
    except Exception as error:  # zarr, anndata and pyarrow each have their own
        raise SourceError(
            f"{path}: not a SpatialData store that can be read ({type(error).__name__}: {error})"
        ) from error


def _regions(data: Any, path: Path) -> dict[str, str]:
    """Return {region: table}."""
    out: dict[str, str] = {}
    for name, table in data.tables.items():
        said = table.uns.get("spatialdata_attrs", {}).get("region")
        for region in [said] if isinstance(said, str) else list(said or []):
            if region in out:
                raise SourceError(f"{path}: the tables {out[region]} and {name} both annotate {region}; remove one")
            out[str(region)] = name
    if not out:
        raise SourceError(
            f"{path}: no table annotates a region; set region, region_key and instance_key (TableModel.parse)"
        )
    return out


def _source(
    path: Path, data: Any, table_name: str, region: str, name: str, overrides: Mapping[str, str]
) -> SectionSource:
    image, system = choose_image(data, region, overrides.get("image", ""), path)
    xy, _ = centres_in(data, region, image, system, path)
    table = data.tables[table_name]
    attrs = table.uns["spatialdata_attrs"]
    facts = facts_of(table.obs[table.obs[attrs["region_key"]].astype(str) == region], overrides)
    if not facts.get("species"):
        facts["species"] = species_of(gene_names(table.var)[0], path)
    if not facts.get("tissue"):
        raise SourceError(f"{path}: obs of {table_name} has no tissue; give --tissue")
    gap, notes = median_gap(xy), [f"tiles are cut from the image {image}, in the coordinate system {system}"]
    visium = overrides.get("platform", "").lower() == "visium"
    if overrides.get("mpp"):
        mpp = number(overrides["mpp"], "--mpp")
    elif visium:
        mpp = VISIUM_PITCH_UM / gap
        notes.append(f"scale from the {VISIUM_PITCH_UM:g} um between neighbouring Visium spots: {mpp:.4f} um per px")
    else:
        raise SourceError(f"{path}: no scale; give --mpp, um per px of the image {image}, or --platform Visium")
    meta = SectionMeta(
        section_id=name, dataset=path.stem, species=facts["species"], tissue=facts["tissue"],
        donor=facts.get("donor", ""), platform=overrides.get("platform", ""), licence=overrides.get("licence", ""),
        attribution=overrides.get("attribution", ""), mpp=mpp,
        spot_diameter_um=VISIUM_DIAMETER_UM if visium else round(gap * mpp, 3), spot_pitch_um=round(gap * mpp, 3),
    )  # fmt: skip
    parts = (f"images/{image}", f"tables/{table_name}", f"shapes/{region}", f"labels/{region}")
    files = [f for part in parts for f in sorted((path / part).rglob("*")) if f.is_file()]
    return SectionSource(meta, tuple(files), partial(_load, path, meta, table_name, region, image, system, notes))


def choose_image(data: Any, region: str, wanted: str, path: Path) -> tuple[str, str]:
    """Return (image, coordinate system): the image asked for, else the largest in colour that shares a system."""
    if region not in data:
        raise SourceError(f"{path}: the table annotates {region}, which is not there; it has {', '.join(_names(data))}")
    if wanted and wanted not in data.images:
        raise SourceError(f"{path}: no image {wanted!r}; --image takes one of {', '.join(data.images) or 'none'}")
    found = []
    for name in [wanted] if wanted else list(data.images):
        shared = sorted(set(_systems(data[name])) & set(_systems(data[region])), key=lambda s: (s != "global", s))
        array = levels_of(data[name])[0]
        if shared and array.shape[0] in (3, 4):
            found.append((array.shape[1] * array.shape[2], name, shared[0]))
    if not found:
        raise SourceError(
            f"{path}: no image of three channels shares a coordinate system with {region}; it has "
            f"{', '.join(data.images) or 'no image'}; add the H&E image with its transformation"
        )
    return max(found)[1:]


def _names(data: Any) -> list[str]:
    return [*data.shapes, *data.labels, *data.images]


def _systems(element: Any) -> list[str]:
    return list(import_module("spatialdata.transformations").get_transformation(element, get_all=True))


def levels_of(image: Any) -> list[Any]:
    """Return an image's levels as arrays (channel, y, x), finest first; they are read when they are indexed."""
    if hasattr(image, "dims") and "c" in image.dims:
        return [image.transpose("c", "y", "x").data]
    scales = sorted(image.children, key=lambda k: int(k.removeprefix("scale")))
    return [next(iter(image[k].ds.values())).transpose("c", "y", "x").data for k in scales]


def centres_in(data: Any, region: str, image: str, system: str, path: Path) -> tuple[np.ndarray, list[str]]:
    """Return (centres in px of the image, float64 (n, 2); instance ids) of a region."""
    spatialdata = import_module("spatialdata")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = spatialdata.get_centroids(data[region], coordinate_system=system).compute()
        transformation = spatialdata.transformations.get_transformation(data[image], system)
        matrix = np.asarray(transformation.to_affine_matrix(("x", "y"), ("x", "y")), np.float64)
    if abs(np.linalg.det(matrix)) < 1e-12:
        raise SourceError(f"{path}: the transformation of the image {image} has no inverse")
    points = np.column_stack([table[["x", "y"]].to_numpy(np.float64), np.ones(len(table))])
    return (points @ np.linalg.inv(matrix).T)[:, :2], [str(v) for v in table.index]


def _load(
    path: Path, meta: SectionMeta, table_name: str, region: str, image: str, system: str, notes: Sequence[str]
) -> Section:
    data = read_store(path)
    table = data.tables[table_name]
    attrs = table.uns["spatialdata_attrs"]
    xy, instances = centres_in(data, region, image, system, path)
    place = {instance: i for i, instance in enumerate(instances)}
    ours = np.flatnonzero(table.obs[attrs["region_key"]].astype(str).to_numpy() == region)
    ids = table.obs[attrs["instance_key"]].astype(str).to_numpy()[ours]
    placed = np.array([i in place for i in ids], bool)
    if not placed.any():
        raise SourceError(
            f"{path}: {table_name} and {region} share no id: {', '.join(ids[:3])} ... against {', '.join(instances[:3])} ...; "
            f"obs[{attrs['instance_key']!r}] must hold the index of {region}"
        )
    matrix, var, said = raw_counts(_parts(table), path)
    rows = ours[placed]
    where = xy[[place[i] for i in ids[placed]]]
    store = path / "images" / image
    section = annotated(table.obs.iloc[rows], where, matrix[rows], var, meta, store, path, [*notes, *said])
    lost = {NO_SHAPE: int((~placed).sum()), NO_ROW: len(set(instances) - set(ids))}
    section.dropped |= {reason: n for reason, n in lost.items() if n}
    section.slide_opener = partial(_open_image, path, image)
    return section


def _parts(table: Any) -> dict[str, Any]:
    """Return the elements of an AnnData by the names that they have in a file."""
    out: dict[str, Any] = {"X": table.X, "var": table.var}
    out |= {f"layers/{k}": v for k, v in table.layers.items()}
    if table.raw is not None:
        out |= {"raw/X": table.raw.X, "raw/var": pd.DataFrame(table.raw.var)}
    return out


def _open_image(path: Path, image: str) -> BlockedSlide:
    return BlockedSlide(path / "images" / image, levels_of(read_store(path)[image]), "cyx")
