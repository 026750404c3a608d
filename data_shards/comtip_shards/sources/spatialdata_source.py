"""SpatialData stores (``.zarr``) with a table that annotates shapes or labels, and an image in the same coordinate system.

Each annotated region is one section. Its centroids are mapped to image px by the transformations of region and image.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from comtip_shards.errors import SourceError, install_extra
from comtip_shards.sections.facts import CountOptions, SourceOptions
from comtip_shards.sections.section import Section, SectionMeta
from comtip_shards.slides.wsi import BlockedSlide
from comtip_shards.sources.anndata_parts.counts import raw_counts
from comtip_shards.sources.anndata_parts.obs_facts import ObsFacts, facts_of
from comtip_shards.sources.anndata_parts.spots import annotated, gene_names, no_counts
from comtip_shards.sources.anndata_parts.store import MemoryStore
from comtip_shards.sources.base import SectionSource, pick
from comtip_shards.sources.files.names import by_section_id
from comtip_shards.sources.files.opening import fix_of
from comtip_shards.sources.files.zarr_metadata import check_store, head_text
from comtip_shards.sources.geometry import (
    VISIUM_DIAMETER_UM,
    VISIUM_PITCH_UM,
    ScaleCheck,
    check_pitch,
    max_ratio,
    median_gap,
    visium_mpp,
)
from comtip_shards.sources.tenx.features import GENE_KIND, Features, for_species

NO_SHAPE, NO_ROW = "table rows without a shape", "shapes without a table row"


def recognise(path: Path) -> str | None:
    """Return a reason if ``path`` is a SpatialData store, else None."""
    for name in ("zarr.json", ".zattrs"):
        file = path / name
        if file.is_file() and "spatialdata_attrs" in head_text(file):
            return f"{name} has spatialdata_attrs"
    return None


def open_sections(path: Path, samples: Sequence[str] | None, options: SourceOptions) -> list[SectionSource]:
    """Return one section per annotated region; raises SourceError if the store or a required element is invalid or missing."""
    data = read_store(path)
    regions = _regions(data, path)
    ids = by_section_id(regions, "regions", path)
    return [_source(path, data, regions[ids[n]], ids[n], n, options) for n in pick(samples, list(ids), path)]


def read_store(path: Path) -> Any:
    """Open a store with lazily read images.

    Raises
    ------
    SourceError
        The store is refused by :func:`comtip_shards.sources.files.zarr_metadata.check_store`, cannot be read, or the package
        spatialdata is not installed.
    """
    check_store(path, "a SpatialData store")
    try:
        spatialdata = import_module("spatialdata")
    except ImportError as error:
        raise SourceError(
            f"{path}: SpatialData stores need an optional dependency: {install_extra('spatialdata')}"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return spatialdata.read_zarr(path)
    except Exception as error:  # zarr, anndata and pyarrow raise errors of their own
        raise SourceError(
            f"{path}: cannot be read as SpatialData ({type(error).__name__}: {error}); "
            f"{fix_of(error, 'write it again with SpatialData.write')}"
        ) from error


def _regions(data: Any, path: Path) -> dict[str, str]:
    """Return {region: name of its table}; raises SourceError if no table annotates a region, or two annotate the same one."""
    out: dict[str, str] = {}
    for name, table in data.tables.items():
        regions = table.uns.get("spatialdata_attrs", {}).get("region")
        for region in [regions] if isinstance(regions, str) else list(regions or []):
            if region in out:
                raise SourceError(
                    f"{path}: the tables {out[region]} and {name} annotate the same region {region}; remove one"
                )
            out[str(region)] = name
    if not out:
        raise SourceError(
            f"{path}: no table annotates a region; set region, region_key and instance_key (TableModel.parse)"
        )
    return out


def _source(path: Path, data: Any, table_name: str, region: str, name: str, options: SourceOptions) -> SectionSource:
    image, system = choose_image(data, region, options.facts.image, path)
    xy, _ = centres_in(data, region, image, system, path)
    table = data.tables[table_name]
    attrs = table.uns["spatialdata_attrs"]
    own = table.obs[table.obs[attrs["region_key"]].astype(str) == region]
    facts = facts_of(own, options.facts, MemoryStore(table, path))
    ids, symbols = gene_names(table.var)
    features = Features(ids, symbols, [GENE_KIND] * len(ids))
    species = for_species(features, facts.species, path)[1]
    if not facts.tissue:
        raise SourceError(f"{path}: neither obs nor uns of {table_name} states one tissue for {region}; set `tissue`")
    gap, notes = median_gap(xy), [f"tiles are cut from the image {image}, in the coordinate system {system}"]
    units = units_per_px(data, image, system)
    if options.facts.mpp is not None:
        mpp = _stated_scale(options.facts.mpp, units, notes)
    else:
        mpp = _scale(facts, xy, f"{path}: image {image}", system, notes)
    limit = float("inf") if options.facts.trust_mpp else max_ratio(facts.platform, own)
    check_pitch(xy * units, mpp / units, limit, str(path))
    meta = SectionMeta(
        section_id=name,
        dataset=path.stem,
        species=species,
        tissue=facts.tissue,
        donor=facts.donor,
        platform=facts.platform,
        licence=options.facts.licence or "",
        attribution=options.facts.attribution or "",
        mpp=mpp,
        spot_diameter_um=VISIUM_DIAMETER_UM if facts.is_visium else round(gap * mpp, 3),
        spot_pitch_um=round(gap * mpp, 3),
    )
    parts = (f"images/{image}", f"tables/{table_name}", f"shapes/{region}", f"labels/{region}")
    files = [f for part in parts for f in sorted((path / part).rglob("*")) if f.is_file()]
    load = partial(_load, path, meta, table_name, region, image, system, notes, options.counts)
    spots = partial(load, counts=False)
    examine = ScaleCheck.of(options.facts, 1 / units)
    return SectionSource(meta, tuple(files), load, spots, options.counts, examine=examine)


def _stated_scale(mpp: float, units: float, notes: list[str]) -> float:
    """Return um per image px from a stated ``mpp``, which refers to px of the positions, as in every other format."""
    if abs(units - 1) > 1e-6:
        notes.append(
            f"scale: {mpp * units:g} um per image px, from `mpp` and {units:g} px of the positions per image px"
        )
    return mpp * units


def _scale(facts: ObsFacts, xy: np.ndarray, where: str, system: str, notes: list[str]) -> float:
    """Return um per image px from the pitch of Visium; raises SourceError for other platforms, whose pitch is not known."""
    if facts.is_visium:
        mpp = visium_mpp(xy, where)
        notes.append(f"scale: {mpp:.4f} um per px, from the {VISIUM_PITCH_UM:g} um pitch of Visium spots")
        return mpp
    raise SourceError(
        f"{where}: no scale; set `mpp`, the um per px of the positions in the coordinate system {system}, or, if the slide is "
        "Visium, `platform=Visium`"
    )


def units_per_px(data: Any, image: str, system: str) -> float:
    """Return the number of units of the coordinate system per px of the image."""
    transformation = import_module("spatialdata.transformations").get_transformation(data[image], system)
    matrix = np.asarray(transformation.to_affine_matrix(("x", "y"), ("x", "y")), np.float64)
    return float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))


def choose_image(data: Any, region: str, wanted: str | None, path: Path) -> tuple[str, str]:
    """Return (image, coordinate system): the image ``wanted``, or the largest RGB image that shares a system with ``region``.

    Of several shared systems, ``global`` is chosen, or else the first by name.

    Raises
    ------
    SourceError
        ``region`` or ``wanted`` does not exist, no RGB image is in a coordinate system of ``region``, or ``wanted`` is not such an
        image.
    """
    if region not in data:
        raise SourceError(
            f"{path}: the table annotates {region}, which does not exist (elements: {', '.join(_names(data))}); add the "
            "element, or correct spatialdata_attrs of the table"
        )
    if wanted and wanted not in data.images:
        fix = f"set `image` to one of {', '.join(data.images)}" if data.images else "add the H&E image to the store"
        raise SourceError(f"{path}: no image {wanted!r}; {fix}")
    found = []
    for name in [wanted] if wanted else list(data.images):
        shared = sorted(set(_systems(data[name])) & set(_systems(data[region])), key=lambda s: (s != "global", s))
        array = levels_of(data[name])[0]
        if shared and array.shape[0] in (3, 4):
            found.append((array.shape[1] * array.shape[2], name, shared[0]))
    if not found and wanted:
        others = ", ".join(name for name in data.images if name != wanted)
        fix = f"set `image` to one of {others}" if others else "add the H&E image to the store"
        raise SourceError(
            f"{path}: the image {wanted} is not a three-channel image in a coordinate system of {region}; {fix}, or correct its "
            "transformation"
        )
    if not found:
        raise SourceError(
            f"{path}: no three-channel image shares a coordinate system with {region} (images: "
            f"{', '.join(data.images) or 'none'}); add the H&E image with its transformation"
        )
    return max(found)[1:]


def _names(data: Any) -> list[str]:
    return [*data.shapes, *data.labels, *data.images]


def _systems(element: Any) -> list[str]:
    return list(import_module("spatialdata.transformations").get_transformation(element, get_all=True))


def levels_of(image: Any) -> list[Any]:
    """Return the levels of an image as lazy arrays (channel, y, x), finest first."""
    if hasattr(image, "dims") and "c" in image.dims:
        return [image.transpose("c", "y", "x").data]
    scales = sorted(image.children, key=lambda k: int(k.removeprefix("scale")))
    return [next(iter(image[k].ds.values())).transpose("c", "y", "x").data for k in scales]


def centres_in(data: Any, region: str, image: str, system: str, path: Path) -> tuple[np.ndarray, list[str]]:
    """Return the centroids of a region in image px, float64 (n, 2), and their instance ids.

    Raises
    ------
    SourceError
        The transformation of the image is not invertible.
    """
    spatialdata = import_module("spatialdata")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = spatialdata.get_centroids(data[region], coordinate_system=system).compute()
        transformation = spatialdata.transformations.get_transformation(data[image], system)
        matrix = np.asarray(transformation.to_affine_matrix(("x", "y"), ("x", "y")), np.float64)
    if abs(np.linalg.det(matrix)) < 1e-12:
        raise SourceError(f"{path}: the transformation of the image {image} is not invertible; set it again")
    points = np.column_stack([table[["x", "y"]].to_numpy(np.float64), np.ones(len(table))])
    return (points @ np.linalg.inv(matrix).T)[:, :2], [str(v) for v in table.index]


def _load(
    path: Path,
    meta: SectionMeta,
    table_name: str,
    region: str,
    image: str,
    system: str,
    notes: Sequence[str],
    options: CountOptions,
    counts: bool = True,
) -> Section:
    data = read_store(path)
    table = data.tables[table_name]
    attrs = table.uns["spatialdata_attrs"]
    xy, instances = centres_in(data, region, image, system, path)
    index = {instance: i for i, instance in enumerate(instances)}
    ours = np.flatnonzero(table.obs[attrs["region_key"]].astype(str).to_numpy() == region)
    ids = table.obs[attrs["instance_key"]].astype(str).to_numpy()[ours]
    has_shape = np.array([i in index for i in ids], bool)
    if not has_shape.any():
        raise SourceError(
            f"{path}: {table_name} and {region} share no id: {', '.join(ids[:3])} ... and {', '.join(instances[:3])} ...; "
            f"obs[{attrs['instance_key']!r}] must contain the index of {region}"
        )
    matrix, var, count_notes = raw_counts(MemoryStore(table, path), path, options) if counts else no_counts(table.n_obs)
    rows = ours[has_shape]
    where = xy[[index[i] for i in ids[has_shape]]]
    store = path / "images" / image
    section = annotated(table.obs.iloc[rows], where, matrix[rows], var, meta, store, path, [*notes, *count_notes])
    lost = {NO_SHAPE: int((~has_shape).sum()), NO_ROW: len(set(instances) - set(ids))}
    section.dropped |= {reason: n for reason, n in lost.items() if n}
    section.slide_opener = partial(_open_image, path, image)
    return section


def _open_image(path: Path, image: str) -> BlockedSlide:
    smaller = "write the image again in smaller chunks, e.g. of 1024 px"
    return BlockedSlide(path / "images" / image, levels_of(read_store(path)[image]), "cyx", smaller=smaller)
