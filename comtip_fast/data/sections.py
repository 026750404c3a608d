"""Open a SECTION as tiles: a section of a shard set, a source folder, or an AnnData with an image.

A SECTION is ``SHARDS_DIR:section_id``, ``SOURCE`` or ``SOURCE:section_id`` (anything that ``comtip shards build``
reads), or a path to an ``.h5ad``. Tiles always have the model's physical size and resolution, so that a model cannot
distinguish sections by either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from comtip_shards import ShardSet, SourceError
from comtip_shards.sections.facts import SourceOptions, check_options, flag, source_options
from comtip_shards.sections.section import Section
from comtip_shards.slides.base import Slide
from comtip_shards.slides.open import open_slide
from comtip_shards.slides.tiles import StainStats, stain_stats
from comtip_shards.sources import open_source
from comtip_shards.sources.anndata_parts.picture import MICRONS_PER_PIXEL, library_names, library_slide
from comtip_shards.sources.anndata_parts.store import SUFFIXES as H5AD_SUFFIXES
from comtip_shards.sources.anndata_parts.store import MemoryStore, open_h5ad
from comtip_shards.sources.anndata_source import view_library
from comtip_shards.sources.files.packaging import unpacked
from comtip_shards.storage.remote import is_url

OVERVIEW_PX = 1024
MPP_RANGE = (0.05, 50.0)
"""um per px of an image that tiles are cut from."""


@dataclass(frozen=True)
class TileGeometry:
    """Size and resolution of a model's tiles."""

    px: int
    """Side of a tile in pixels, S."""
    um: float
    """Width of a tile in um."""
    min_mpp: float
    """Images with a higher resolution are first resampled to this many um per px."""


@dataclass
class SectionTiles:
    """Tiles of one section, for the image encoder."""

    section_id: str
    species: str
    tiles_NSS3: np.ndarray
    """uint8 (n_spots, S, S, 3)."""
    stain: StainStats
    template: ad.AnnData
    """The AnnData to add results to: obs (names, positions, labels), ``obsm["spatial"]`` and the image."""


def open_section(
    spec: str | Path | ad.AnnData, tile: TileGeometry, overrides: SourceOptions | Mapping[str, Any] | None = None
) -> SectionTiles:
    """Open a SECTION.

    Parameters
    ----------
    spec
        A SECTION as in the module docstring, or an AnnData.
    tile
        Tile geometry of the model.
    overrides
        Facts and options that the caller states, or a mapping of them, e.g. ``{"mpp": "0.5", "species": "human"}``.

    Raises
    ------
    FileNotFoundError
        The path does not exist.
    SourceError
        The source cannot be read, lacks metadata, or has tiles of another geometry.
    ShardError
        A record of the shard set is damaged.
    """
    options = source_options(overrides)
    if isinstance(spec, ad.AnnData):
        return _from_anndata(spec, "the AnnData", tile, options)
    if is_url(str(spec)):
        url, _, section_id = str(spec).rpartition(":")
        if "/" in section_id:
            raise SourceError(f"{spec}: no section is named; give {spec}:section_id")
        _refuse_options(options, url)
        return _from_shards(ShardSet(url), section_id, tile)
    path, section_id = split_spec(str(spec))
    if path.name.endswith(H5AD_SUFFIXES):
        return _from_anndata(read_h5ad(path), str(path), tile, options, section_id)
    if (path / "manifest.json").is_file():
        _refuse_options(options, str(path))
        return _from_shards(ShardSet(path), section_id, tile)
    # The tissue does not matter here, so a source that does not state it is not refused.
    options = replace(options, facts=replace(options.facts, tissue=options.facts.tissue or "unstated"))
    sources = open_source(path, samples=[section_id] if section_id else None, overrides=options)
    if len(sources) != 1:
        ids = ", ".join(s.meta.section_id for s in sources)
        raise SourceError(
            f"{path} contains {len(sources)} sections ({ids}); name one of them, e.g. {path}:{sources[0].meta.section_id}"
        )
    return _from_section(sources[0].read_spots(), tile)


def _refuse_options(options: SourceOptions, where: str) -> None:
    """Raise for facts about a section of a shard set, which states them itself."""
    if options.stated():
        raise SourceError(
            f"{where}: {', '.join(map(flag, options.stated()))} has no effect here: a shard set states the facts of its "
            "sections; leave it out"
        )


def read_h5ad(path: Path | str) -> ad.AnnData:
    """Read an AnnData file that names no other file; raises :class:`SourceError` if it is not one."""
    open_h5ad(Path(path)).close()  # names files that are no data, and refuses data in other files
    try:
        return ad.read_h5ad(unpacked(Path(path)))
    except Exception as error:  # anndata raises many kinds of errors
        raise SourceError(
            f"{path}: not a readable .h5ad file ({type(error).__name__}: {error}); write it with AnnData.write_h5ad"
        ) from error


def split_spec(spec: str) -> tuple[Path, str]:
    """Return (path, section id) of ``PATH:section_id``; the id is empty if the string is a path.

    Raises
    ------
    FileNotFoundError
        The path does not exist.
    """
    if Path(spec).exists() or ":" not in spec:
        path, section_id = Path(spec), ""
    else:
        head, section_id = spec.rsplit(":", 1)
        path = Path(head)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give SHARDS_DIR:section_id, a source folder or an .h5ad file")
    return path, section_id


def _from_shards(shards: ShardSet, section_id: str, tile: TileGeometry) -> SectionTiles:
    ids = [s.section_id for s in shards.manifest.sections]
    if section_id not in ids:
        raise SourceError(f"{shards.path} has no section {section_id!r}; it has: {', '.join(ids)}")
    own = shards.manifest.tile
    if (own.px, own.um, own.min_mpp) != (tile.px, tile.um, tile.min_mpp):
        raise SourceError(
            f"{shards.path}: tiles of {own.um:g} um in {own.px} px at {own.min_mpp:g} um/px, but the model reads "
            f"{tile.um:g} um in {tile.px} px at {tile.min_mpp:g} um/px; build shards with --tile-um {tile.um:g} "
            f"--tile-px {tile.px} --min-mpp {tile.min_mpp:g}"
        )
    number = ids.index(section_id)
    meta = shards.manifest.sections[number]
    spots = shards.source_order(number)
    table = shards.spots.loc[spots]
    template = _template(
        table["spot_id"].tolist(),
        table[["x_px", "y_px"]].to_numpy(float),
        table[["array_x", "array_y"]].to_numpy(float),
        table["label"].tolist(),
        section_id,
    )
    overview, overview_mpp = shards.overview(number)
    _attach_image(template, section_id, overview, meta.mpp, overview_mpp, meta.spot_diameter_um)
    return SectionTiles(section_id, meta.species, shards.tiles(spots), shards.stain(number), template)


def _from_section(section: Section, tile: TileGeometry) -> SectionTiles:
    meta = section.meta
    template = _template(section.spot_ids, section.xy, section.array_xy, section.labels, meta.section_id)
    with section.open_slide() as slide:
        small, factor = slide.overview(OVERVIEW_PX)
        _attach_image(template, meta.section_id, small, meta.mpp, meta.mpp * factor, meta.spot_diameter_um)
        return _cut(slide, section.xy, meta.mpp, tile, meta.section_id, meta.species, template)


def _from_anndata(
    data: ad.AnnData, where: str, tile: TileGeometry, options: SourceOptions, section_id: str = ""
) -> SectionTiles:
    check_options(options, ("image", "positions"), "an AnnData whose counts are not read")
    store = MemoryStore(data, Path(where))
    libraries = library_names(data.uns.get("spatial", {}))
    if section_id and section_id not in libraries:
        raise SourceError(
            f"{where}: no section {section_id!r} in uns['spatial']; it has: {', '.join(libraries) or 'none'}"
        )
    if len(libraries) > 1:
        raise SourceError(
            f"{where}: uns['spatial'] holds {len(libraries)} libraries ({', '.join(libraries)}); subset to one section first"
        )
    own = data.uns.get("comtip", {})
    if own.get("species") and options.facts.species is None:
        known = source_options({"species": str(own["species"])}).facts.species
        options = replace(options, facts=replace(options.facts, species=known))
    library = libraries[0] if libraries else ""
    view = view_library(store, library, Path(where).stem, options, need_species=False)
    xy, mpp = view.xy * view.factor, view.mpp / view.factor
    slide: Slide
    if view.picture is not None:
        slide = library_slide(data.uns["spatial"][library], view.picture, Path(where))
    else:
        slide = open_slide(unpacked(view.image or Path(where)))
    with slide:
        _check_positions(xy, mpp, slide, where)
        template = ad.AnnData(
            obs=data.obs.copy(), obsm={"spatial": view.xy.copy()}, uns={"spatial": data.uns.get("spatial", {})}
        )
        return _cut(slide, xy, mpp, tile, library or Path(where).stem, view.facts.species, template)


def _check_positions(xy: np.ndarray, mpp: float, slide: Slide, where: str) -> None:
    """Raise for positions or a scale from which no tile can be cut."""
    lost = int((~np.isfinite(xy)).any(1).sum())
    if lost:
        raise SourceError(f"{where}: {lost} of {len(xy)} spots have no position; remove them, or give them one")
    if not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
        raise SourceError(
            f"{where}: {mpp:g} um per px of the image is not plausible ({MPP_RANGE[0]:g} to {MPP_RANGE[1]:g}); set --mpp"
        )
    outside = (xy < 0).any(1) | (xy[:, 0] > slide.size[0]) | (xy[:, 1] > slide.size[1])
    if outside.any():
        raise SourceError(
            f"{where}: {outside.sum()} of {len(xy)} spots lie outside the image ({slide.size[0]} x {slide.size[1]} px); "
            "use the image that the positions belong to (--image), or positions in px of this image"
        )


def _cut(
    slide: Slide,
    xy: np.ndarray,
    mpp: float,
    tile: TileGeometry,
    section_id: str,
    species: str,
    template: ad.AnnData,
) -> SectionTiles:
    tiles = slide.tiles(xy, mpp, tile.um, tile.px, tile.min_mpp)
    return SectionTiles(section_id, species, tiles, stain_stats(tiles), template)


def _template(
    spot_ids: list[str], xy: np.ndarray, array_xy: np.ndarray, labels: list[str], section_id: str
) -> ad.AnnData:
    obs = pd.DataFrame(
        {"section_id": pd.Categorical([section_id] * len(spot_ids))}, index=pd.Index(spot_ids, dtype=object)
    )
    if np.isfinite(array_xy).all():
        obs["array_col"], obs["array_row"] = array_xy[:, 0], array_xy[:, 1]
    if any(labels):
        obs["label"] = pd.Categorical(labels)
    return ad.AnnData(obs=obs, obsm={"spatial": xy.copy()})


def _attach_image(
    template: ad.AnnData,
    section_id: str,
    small: np.ndarray,
    mpp: float,
    small_mpp: float,
    spot_diameter_um: float,
) -> None:
    """Store the overview image in ``uns["spatial"]``, where scanpy and squidpy read it."""
    factors: dict[str, Any] = {
        "tissue_hires_scalef": mpp / small_mpp,
        "spot_diameter_fullres": spot_diameter_um / mpp,
        MICRONS_PER_PIXEL: mpp,
    }
    template.uns["spatial"] = {section_id: {"images": {"hires": small}, "scalefactors": factors}}
