"""Opening of a SECTION as tiles: a section of a shard set, a source, or an AnnData with an image.

A SECTION is ``SHARDS:section_id`` (``SHARDS`` is the folder or URL of a shard set), ``SOURCE`` or ``SOURCE:section_id``
(anything that ``comtip shards build`` reads from a path), or ``FILE.h5ad`` or ``FILE.h5ad:section_id``. Tiles always have the
model's physical size and resolution, so that a model cannot distinguish sections by size or resolution.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from comtip_shards import ShardSet, SourceError
from comtip_shards.sections.facts import SectionFacts, SourceOptions, check_options, check_trust, source_options
from comtip_shards.sections.section import Section
from comtip_shards.slides.base import Slide
from comtip_shards.slides.open import open_slide
from comtip_shards.slides.pixel_scale import check_side, check_stated_mpp
from comtip_shards.slides.tiles import StainStats, stain_stats
from comtip_shards.sources import SectionSource, open_source
from comtip_shards.sources.anndata_parts.picture import MICRONS_PER_PIXEL, library_slide
from comtip_shards.sources.anndata_parts.store import MemoryStore, is_anndata_file
from comtip_shards.sources.anndata_source import view_library
from comtip_shards.sources.files.packaging import unpacked
from comtip_shards.storage.remote import is_url

from comtip_fast.data.anndata_file import chosen_library, own_entries, read_annotation
from comtip_fast.data.tile_sources import ShardTiles, SlideTiles, TileGeometry, TileSource

log = logging.getLogger("comtip_fast")
OVERVIEW_PX = 1024
MPP_RANGE = (0.05, 50.0)
"""Plausible um per px of an image that tiles are cut from."""
NO_TISSUE = "unstated"
"""Tissue with which a source is read that does not state one."""
RECORDED_FACTS = ("tissue", "donor", "platform", "licence", "attribution")
"""Facts that do not affect tiles and are recorded in ``uns["comtip"]`` of the result. The tissue selects the readout's head."""


@dataclass
class SectionTiles:
    """Tiles of one section, for the image encoder."""

    section_id: str
    species: str
    """``human`` or ``mouse``; empty for an AnnData whose species is unknown."""
    tissue: str
    """Tissue that the shard set, the source, the AnnData or the caller states; empty if it is unknown."""
    tiles: TileSource
    template: ad.AnnData
    """AnnData to which results are added: ``obs``, ``obsm["spatial"]`` and ``uns["spatial"]``, with the image if there is one."""
    stored_stain: StainStats | None = None
    """Stain statistics that a shard set states; None otherwise."""
    stated: SectionFacts = field(default_factory=SectionFacts)
    """Facts of :data:`RECORDED_FACTS` that the caller stated."""
    mpp: float = float("nan")
    """um per px of the positions in ``template.obsm["spatial"]``."""
    rows: np.ndarray | None = None
    """int64, rows of the AnnData that belong to the section; None if the section is not from an AnnData."""

    @cached_property
    def stain(self) -> StainStats:
        """Stain statistics of the section: those of the shard set, or computed in one pass over the tiles."""
        if self.stored_stain is not None:
            return self.stored_stain
        return stain_stats(tile for chunk in self.tiles.chunks() for tile in chunk.tiles_NSS3)


def open_section(
    spec: str | Path | ad.AnnData,
    tile: TileGeometry,
    overrides: SourceOptions | Mapping[str, Any] | None = None,
    fmt: str = "auto",
) -> SectionTiles:
    """Open a SECTION as tiles.

    Parameters
    ----------
    spec
        A SECTION (see the module docstring), or an AnnData with positions and an image.
    tile
        Tile geometry of the model.
    overrides
        Facts (scale, image, species, ...) and options given by the caller, or a mapping of them, e.g. ``{"mpp": "0.5", "species": "human"}``.
    fmt
        Format of a source, see :func:`comtip_shards.sources.open_source`; ``auto`` detects it.

    Raises
    ------
    FileNotFoundError
        The path does not exist.
    SourceError
        The source cannot be read or lacks metadata; it does not have the named section, or has several and none is named; a spot
        has no position or lies outside the image; the scale of the image is not plausible; the tiles of a shard set have another
        geometry; or a stated fact, option or format is invalid or has no effect.
    ShardError
        The shard set, or its table of spots or overview, is missing or damaged.
    """
    options = source_options(overrides)
    if isinstance(spec, ad.AnnData):
        _refuse_format(fmt, "the input is an AnnData")
        return _from_anndata(spec, "the AnnData", tile, options)
    if is_url(str(spec)):
        url, _, section_id = str(spec).rpartition(":")
        if "/" in section_id:
            raise SourceError(
                f"{spec}: a URL must name a section of a shard set; give SHARDS_URL:section_id, or download a file of another kind first"
            )
        _refuse_format(fmt, f"{url} is a shard set")
        _refuse_options(options, url)
        return _from_shards(ShardSet(url), section_id, tile)
    path, section_id = split_spec(str(spec))
    if is_anndata_file(path):
        _refuse_format(fmt, f"{path} is an .h5ad file", own="anndata")
        return _from_anndata(read_annotation(path), str(path), tile, options, section_id)
    if (path / "manifest.json").is_file():
        _refuse_format(fmt, f"{path} is a shard set")
        _refuse_options(options, str(path))
        return _from_shards(ShardSet(path), section_id, tile)
    sources = _open_sources(path, [section_id] if section_id else None, fmt, options)
    if len(sources) != 1:
        ids = ", ".join(s.meta.section_id for s in sources)
        raise SourceError(
            f"{path} contains {len(sources)} sections ({ids}); name one of them, e.g. {path}:{sources[0].meta.section_id}"
        )
    return _from_section(sources[0].read_spots(), tile, recorded_facts(options))


def _open_sources(path: Path, samples: list[str] | None, fmt: str, options: SourceOptions) -> list[SectionSource]:
    """Open a source, also one that does not state the tissue, on which tiles do not depend."""
    try:
        return open_source(path, samples=samples, fmt=fmt, overrides=options)
    except SourceError:
        if options.facts.tissue:
            raise
        options = replace(options, facts=replace(options.facts, tissue=NO_TISSUE))
        return open_source(path, samples=samples, fmt=fmt, overrides=options)


def recorded_facts(options: SourceOptions) -> SectionFacts:
    """Return the stated facts that are recorded in the result (:data:`RECORDED_FACTS`)."""
    return SectionFacts(**{name: getattr(options.facts, name) for name in RECORDED_FACTS})


def _refuse_format(fmt: str, what: str, own: str = "") -> None:
    """Raise SourceError if a format other than ``own`` is stated for an input whose format is known."""
    if fmt not in ("auto", own):
        raise SourceError(f"`fmt` {fmt} has no effect here: {what}, whose format is known; leave `fmt` out")


def _refuse_options(options: SourceOptions, where: str) -> None:
    """Raise SourceError if facts or options are stated for a section of a shard set, whose manifest states the facts."""
    stated = [f"`{name}`" for name in options.stated()]
    if stated:
        has, it = ("has", "it") if len(stated) == 1 else ("have", "them")
        raise SourceError(
            f"{where}: {', '.join(stated)} {has} no effect here: a shard set states the facts of its sections; leave {it} out"
        )


def split_spec(spec: str) -> tuple[Path, str]:
    """Split ``PATH:section_id`` into path and section id; the id is empty if ``spec`` is a path.

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
        raise FileNotFoundError(f"{path} does not exist; check the path")
    return path, section_id


def _from_shards(shards: ShardSet, section_id: str, tile: TileGeometry) -> SectionTiles:
    """Return the tiles of a section of a shard set, whose tiles must have the model's geometry."""
    own = shards.manifest.tile
    if (own.px, own.um, own.min_mpp) != (tile.px, tile.um, tile.min_mpp):
        raise SourceError(
            f"{shards.name}: tiles of {own.um!r} um in {own.px} px with min_mpp {own.min_mpp!r}, but the model reads "
            f"{tile.um!r} um in {tile.px} px with min_mpp {tile.min_mpp!r}; build the set again with `tile_um={tile.um!r}` "
            f"`tile_px={tile.px}` `min_mpp={tile.min_mpp!r}`"
        )
    template, spots, number = section_template(shards, section_id)
    meta = shards.manifest.sections[number]
    return SectionTiles(
        section_id, meta.species, meta.tissue, ShardTiles(shards, spots), template, shards.stain(number), mpp=meta.mpp
    )


def section_template(shards: ShardSet, section_id: str) -> tuple[ad.AnnData, np.ndarray, int]:
    """Return a section of a shard set as an AnnData without expression, its spots, int64 (N,), and its index in the set.

    Raises
    ------
    SourceError
        The set has no such section, or none is named.
    ShardError
        The table of spots or the overview is damaged.
    """
    ids = [s.section_id for s in shards.manifest.sections]
    if section_id not in ids:
        problem = f"has no section {section_id!r}" if section_id else "is a shard set, and no section is named"
        raise SourceError(f"{shards.name}: {problem}; give SHARDS:section_id with one of {', '.join(ids)}")
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
    attach_image(template, section_id, overview, meta.mpp, overview_mpp, meta.spot_diameter_um)
    return template, spots, number


def _from_section(section: Section, tile: TileGeometry, stated: SectionFacts) -> SectionTiles:
    """Return the tiles of a section of a source, cut from its slide."""
    meta = section.meta
    template = _template(section.spot_ids, section.xy, section.array_xy, section.labels, meta.section_id)
    with section.open_slide() as slide:
        small, factor = slide.overview(OVERVIEW_PX)
        attach_image(template, meta.section_id, small, meta.mpp, meta.mpp * factor, meta.spot_diameter_um)
    tiles = SlideTiles(section.open_slide, section.xy, meta.mpp, tile)
    tissue = "" if meta.tissue == NO_TISSUE else meta.tissue
    return SectionTiles(meta.section_id, meta.species, tissue, tiles, template, stated=stated, mpp=meta.mpp)


def _from_anndata(
    data: ad.AnnData, where: str, tile: TileGeometry, options: SourceOptions, section_id: str = ""
) -> SectionTiles:
    """Return the tiles of an AnnData, cut from its library's image or from a stated image."""
    check_trust(options.facts)
    check_options(options, ("image", "positions", "trust_mpp"), "an AnnData whose counts are not read")
    store = MemoryStore(data, Path(where))
    name, library = chosen_library(store, section_id)
    if library.lost:
        log.warning("%s: %s", where, library.lost)
    own = data.uns.get("comtip", {})
    if own.get("species") and options.facts.species is None:
        known = source_options({"species": str(own["species"])}).facts.species
        options = replace(options, facts=replace(options.facts, species=known))
    view = view_library(store, library, name, options, need_species=False)
    xy, mpp = view.xy * view.factor, view.mpp / view.factor

    def opener() -> Slide:
        if view.picture is not None:
            return library_slide(data.uns["spatial"][library.key], view.picture, Path(where))
        return open_slide(unpacked(view.image or Path(where)))

    with opener() as slide:
        _check_positions(xy, mpp, slide, where)
        if options.facts.mpp is not None:
            trusted = bool(options.facts.trust_mpp)
            check_side(slide.size, mpp, where, trusted=trusted)
            check_stated_mpp(mpp, slide.mpp, slide.path.name, where, trusted=trusted)
    template = ad.AnnData(
        obs=data.obs.iloc[view.rows].copy(),
        obsm={"spatial": view.xy.copy()},
        uns={"spatial": own_entries(data, library)},
    )
    return SectionTiles(
        library.value or library.key or name,
        view.facts.species,
        view.facts.tissue,
        SlideTiles(opener, xy, mpp, tile),
        template,
        stated=recorded_facts(options),
        mpp=view.mpp,
        rows=view.rows,
    )


def is_anndata(section: str | Path | ad.AnnData) -> bool:
    """Return whether a SECTION is an AnnData in memory or in an ``.h5ad``, with or without the name of a section.

    Raises
    ------
    FileNotFoundError
        The path does not exist.
    """
    if isinstance(section, ad.AnnData):
        return True
    return not is_url(str(section)) and is_anndata_file(split_spec(str(section))[0])


def _check_positions(xy: np.ndarray, mpp: float, slide: Slide, where: str) -> None:
    """Raise SourceError if a position is missing or outside the image, or if the scale is not plausible."""
    lost = int((~np.isfinite(xy)).any(1).sum())
    if lost:
        raise SourceError(
            f"{where}: {lost} of {len(xy)} spots have no position; remove these spots or set their positions"
        )
    if not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
        raise SourceError(
            f"{where}: {mpp:.10g} um per px of the image is not plausible ({MPP_RANGE[0]:g} to {MPP_RANGE[1]:g}); set "
            "`mpp` to the um per px of the positions"
        )
    outside = (xy < 0).any(1) | (xy[:, 0] > slide.size[0]) | (xy[:, 1] > slide.size[1])
    if outside.any():
        raise SourceError(
            f"{where}: {outside.sum()} of {len(xy)} spots lie outside the image ({slide.size[0]} x {slide.size[1]} px); "
            "use the image that the positions belong to (`image`), or positions in px of this image"
        )


def _template(
    spot_ids: list[str], xy: np.ndarray, array_xy: np.ndarray, labels: list[str], section_id: str
) -> ad.AnnData:
    """Return an AnnData without expression, with names, section, positions in px and, if known, array positions and labels."""
    obs = pd.DataFrame(
        {"section_id": pd.Categorical([section_id] * len(spot_ids))}, index=pd.Index(spot_ids, dtype=object)
    )
    if np.isfinite(array_xy).all():
        obs["array_col"], obs["array_row"] = array_xy[:, 0], array_xy[:, 1]
    if any(labels):
        obs["label"] = pd.Categorical(labels)
    return ad.AnnData(obs=obs, obsm={"spatial": xy.copy()})


def attach_image(
    template: ad.AnnData,
    section_id: str,
    small: np.ndarray,
    mpp: float,
    small_mpp: float,
    spot_diameter_um: float,
) -> None:
    """Store an image and its scale factors in ``uns["spatial"]``, where scanpy and squidpy read them.

    Parameters
    ----------
    template
        AnnData of the section; changed in place.
    section_id
        Name of the library.
    small, small_mpp
        RGB image (H, W, 3), and its um per px.
    mpp
        um per px of the positions.
    spot_diameter_um
        Diameter of a spot in um.
    """
    factors: dict[str, Any] = {
        "tissue_hires_scalef": mpp / small_mpp,
        "spot_diameter_fullres": spot_diameter_um / mpp,
        MICRONS_PER_PIXEL: mpp,
    }
    template.uns["spatial"] = {section_id: {"images": {"hires": small}, "scalefactors": factors}}
