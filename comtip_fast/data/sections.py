"""Open a SECTION as tiles: a section of a shard set, a source folder, or an AnnData with an image.

A SECTION is ``SHARDS_DIR:section_id``, ``SOURCE`` or ``SOURCE:section_id`` (anything that ``comtip shards build``
reads), or a path to an ``.h5ad``. Tiles always have the model's physical size and resolution, so that a model cannot
distinguish sections by either.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from comtip_shards import ShardSet, SourceError
from comtip_shards.sections.section import Section
from comtip_shards.slides.base import Slide
from comtip_shards.slides.tiles import StainStats, stain_stats
from comtip_shards.sources import open_source
from comtip_shards.sources.anndata_source import MICRONS_PER_PIXEL, centres, library_picture, library_slide
from comtip_shards.sources.hdf5 import check_hdf5
from comtip_shards.storage.remote import is_url

OVERVIEW_PX = 1024


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
    spec: str | Path | ad.AnnData, tile: TileGeometry, overrides: dict[str, str] | None = None
) -> SectionTiles:
    """Open a SECTION.

    Parameters
    ----------
    spec
        A SECTION as in the module docstring, or an AnnData.
    tile
        Tile geometry of the model.
    overrides
        Metadata that the source does not provide, e.g. ``{"mpp": "0.5", "species": "human"}``.

    Raises
    ------
    FileNotFoundError
        The path does not exist.
    SourceError
        The source cannot be read, lacks metadata, or has tiles of another geometry.
    ShardError
        A record of the shard set is damaged.
    """
    overrides = overrides or {}
    if isinstance(spec, ad.AnnData):
        return _from_anndata(spec, "the AnnData", tile, overrides)
    if is_url(str(spec)):
        url, _, section_id = str(spec).rpartition(":")
        if "/" in section_id:
            raise SourceError(f"{spec}: no section is named; give {spec}:section_id")
        return _from_shards(ShardSet(url), section_id, tile)
    path, section_id = split_spec(str(spec))
    if path.suffix == ".h5ad":
        return _from_anndata(read_h5ad(path), str(path), tile, overrides)
    if (path / "manifest.json").is_file():
        return _from_shards(ShardSet(path), section_id, tile)
    sources = open_source(path, samples=[section_id] if section_id else None, overrides=overrides)
    if len(sources) != 1:
        ids = ", ".join(s.meta.section_id for s in sources)
        raise SourceError(
            f"{path} contains {len(sources)} sections ({ids}); name one of them, e.g. {path}:{sources[0].meta.section_id}"
        )
    return _from_section(sources[0].read(), tile)


def read_h5ad(path: Path | str) -> ad.AnnData:
    """Read an AnnData file that names no other file; raises :class:`SourceError` if it is not one."""
    fix = "write it with AnnData.write_h5ad"
    check_hdf5(Path(path), "an .h5ad", fix)
    try:
        return ad.read_h5ad(path)
    except (OSError, KeyError) as error:
        raise SourceError(f"{path}: not a readable .h5ad file ({error}); {fix}") from error


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


def _from_anndata(data: ad.AnnData, where: str, tile: TileGeometry, overrides: dict[str, str]) -> SectionTiles:
    if "spatial" not in data.obsm or not data.uns.get("spatial"):
        raise SourceError(
            f"{where}: obsm['spatial'] or an image in uns['spatial'] is missing; add them as scanpy.read_visium does"
        )
    libraries = list(data.uns["spatial"])
    if len(libraries) != 1:
        raise SourceError(f"{where}: uns['spatial'] has {len(libraries)} libraries; subset to one section")
    library = data.uns["spatial"][libraries[0]]
    picture = library_picture(library, where)
    stated = overrides.get("mpp") or picture.mpp
    if stated is None:
        raise SourceError(
            f"{where}: the image has no scale; give --mpp, um per px of the coordinates in obsm['spatial']"
        )
    species = overrides.get("species") or str(data.uns.get("comtip", {}).get("species", ""))
    slide = library_slide(library, picture, Path(where))
    xy = centres(data.obsm["spatial"], Path(where)) * picture.factor
    outside = (xy < 0).any(1) | (xy[:, 0] > slide.size[0]) | (xy[:, 1] > slide.size[1])
    if outside.any():
        raise SourceError(
            f"{where}: {outside.sum()} of {len(xy)} spots lie outside the {picture.name} image ({slide.size[0]} x "
            f"{slide.size[1]} px) at scale factor {picture.factor:g}; correct obsm['spatial'] or the image"
        )
    template = ad.AnnData(
        obs=data.obs.copy(),
        obsm={"spatial": np.asarray(data.obsm["spatial"])},
        uns={"spatial": data.uns["spatial"]},
    )
    return _cut(slide, xy, float(stated) / picture.factor, tile, str(libraries[0]), species, template)


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
