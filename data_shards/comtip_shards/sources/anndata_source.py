"""AnnData: ``.h5ad`` or ``.zarr`` with spot centres in ``obsm`` and an image in ``uns["spatial"]`` or a file.

This is the layout that scanpy's and squidpy's Visium readers and CELLxGENE use. The image in the file is usually downscaled
(hires or lowres); the option ``image`` states the full-resolution image, and ``{id}`` in it is replaced by the section id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from comtip_shards.errors import SourceError
from comtip_shards.sections.facts import SourceOptions
from comtip_shards.sections.section import Section, SectionMeta
from comtip_shards.slides.base import Slide
from comtip_shards.slides.open import mpp_by_tag
from comtip_shards.slides.pixel_scale import check_stated_mpp
from comtip_shards.sources.anndata_parts.libraries import Library, libraries_of
from comtip_shards.sources.anndata_parts.obs_facts import ObsFacts, facts_of
from comtip_shards.sources.anndata_parts.picture import (
    DIAMETER,
    MICRONS_PER_PIXEL,
    Picture,
    library_names,
    library_picture,
    library_slide,
    scale_factor,
)
from comtip_shards.sources.anndata_parts.positions import read_centres
from comtip_shards.sources.anndata_parts.preview import preview_genes
from comtip_shards.sources.anndata_parts.spots import gene_names, in_tissue, read_spots
from comtip_shards.sources.anndata_parts.store import Store, files_of, open_store, stem_of
from comtip_shards.sources.base import Preview, SectionSource, check_one_file, pick, stated_image
from comtip_shards.sources.files.packaging import unpacked
from comtip_shards.sources.geometry import (
    MAX_RATIO,
    VISIUM_PITCH_UM,
    ScaleCheck,
    check_pitch,
    max_ratio,
    median_gap,
    visium_mpp,
)
from comtip_shards.sources.tenx.features import GENE_KIND, Features, for_species


def recognise(path: Path) -> str | None:
    """Return a reason if ``path`` is an AnnData or a folder of AnnData files, else None."""
    for file in files_of(path):
        try:
            with open_store(file) as store:
                if "obs" not in store and "var" not in store:
                    continue
                keys = [k for k in store.keys("obsm") if "spatial" in k] or ["no position"]
                found = f"obsm['{keys[0]}']" if keys[0] != "no position" else "obs and var"
                return f"{file.name} has {found}" + (" and uns['spatial']" if "uns/spatial" in store else "")
        except SourceError:
            if file.is_dir() or h5py.is_hdf5(file):
                return f"{file.name} has the attributes of an AnnData"  # open_sections reports why it cannot be read
    return None


def open_sections(path: Path, samples: Sequence[str] | None, options: SourceOptions) -> list[SectionSource]:
    """Return the sections that :func:`libraries_of` finds in the files.

    Raises
    ------
    SourceError
        There is no AnnData, one cannot be read, two sections have the same id, or positions, image, scale, species or tissue
        of a section are missing.
    """
    files = files_of(path)
    if not files:
        raise SourceError(f"{path}: no .h5ad file; write one with AnnData.write_h5ad")
    found: dict[str, tuple[Path, Library]] = {}
    for file in files:
        with open_store(file) as store:
            libraries = libraries_of(store)
        for name, library in libraries.items():
            if name in found:
                raise SourceError(
                    f"{file}: section {name} also exists in {found[name][0].name}; remove one of them, or rename its file or library"
                )
            found[name] = (file, library)
    names = pick(samples, list(found), path)
    check_one_file("image", options.facts.image, names, path)
    return [_source(*found[name], name, options) for name in names]


@dataclass(frozen=True)
class LibraryView:
    """Positions, image and metadata of one library of an AnnData; building, predicting and embedding all use this view."""

    rows: np.ndarray
    """int64, rows of ``obs``."""
    xy: np.ndarray
    """float64 (n, 2), spot centres, in px of the image that they refer to."""
    mpp: float
    """um per px of the positions."""
    image: Path | None
    """The image stated by the caller."""
    picture: Picture | None
    """The image in the file, if none is stated."""
    spot_diameter_px: float | None
    """Spot diameter in px of the positions; None if it is missing or invalid."""
    facts: ObsFacts
    notes: list[str]

    @property
    def factor(self) -> float:
        """Image px per px of the positions."""
        return self.picture.factor if self.picture is not None else 1.0


def view_library(
    store: Store, library: Library, name: str, options: SourceOptions, *, need_species: bool = True
) -> LibraryView:
    """Read the positions, scale, image and metadata (species, tissue, donor, platform) of one library.

    Parameters
    ----------
    store
        The opened AnnData.
    library
        One of the result of :func:`libraries_of`.
    name
        Section id, which replaces ``{id}`` in the option ``image``.
    options
        Facts (scale, image, species, ...) and options given by the caller; facts take precedence over the file.
    need_species
        Whether an unknown species is an error; if False, ``facts.species`` of the result is empty for an unknown species.

    Raises
    ------
    SourceError
        Positions, image, scale or species are missing or contradictory; the message names the option to set, or another fix.
    """
    path, notes = store.path, list[str]()
    obs, key = store["obs"], library.key
    rows = library.rows(obs)
    xy = read_centres(store, options.counts, notes)[rows]
    if len(xy) > 1 and 0 <= xy.min() < xy.max() <= 1:
        raise SourceError(
            f"{path}: the positions lie between 0 and 1, so they are fractions of the image size or embeddings; store x and y in "
            "image px"
        )
    image = stated_image(options.facts, name)
    if not key and image is None:
        which = f" for section {name} (obs['{library.column}'])" if library.column else ""
        also = ", or read only sections that have one" if library_names(store.group("uns/spatial")) else ""
        raise SourceError(
            f"{path}: no image in uns['spatial']{which}; set `image` to the image that the positions belong to{also}"
        )
    group = store.group(f"uns/spatial/{key}") if key else {}
    picture = library_picture(group, f"{path}: uns['spatial'][{key!r}]") if image is None else None
    facts = facts_of(obs.iloc[rows], options.facts, store)
    facts = replace(facts, species=_species(store, facts.species, need_species))
    mpp, own = options.facts.mpp, _own_scale(group, options, path) if key else None
    limit = float("inf") if options.facts.trust_mpp else max_ratio(facts.platform, obs.iloc[rows])
    if mpp is not None:
        # On a Visium slide the pitch decides (check_pitch), whatever scale the file states.
        trusted = bool(options.facts.trust_mpp) or isfinite(limit)
        check_stated_mpp(mpp, own, "uns['spatial']", str(path), trusted=trusted)
    if mpp is not None and own is not None and not 1 / MAX_RATIO <= mpp / own <= MAX_RATIO:
        notes.append(f"the stated scale of {mpp:g} um per px is used, but the file states {own:g}")
    mpp = own if mpp is None else mpp
    if mpp is None:
        mpp = _scale(facts, image, xy, path, notes)
    check_pitch(xy, mpp, limit, str(path))
    if picture is not None:
        notes.append(f"tiles from the {picture.name} image in the file, scale {picture.factor:g} of the positions")
    try:
        diameter = scale_factor(group, DIAMETER, str(path)) if key else None
    except SourceError as error:  # the width of a spot changes no tile; R writes NA where it is unknown
        diameter = None
        notes.append(f"the diameter of spots is unknown ({str(error).removeprefix(f'{path}: ')})")
    notes += [library.lost] if library.lost else []
    return LibraryView(rows, xy, mpp, image, picture, diameter, facts, notes)


def _own_scale(group: Any, options: SourceOptions, path: Path) -> float | None:
    """Return the um per px that the file states, or None; an invalid value raises SourceError unless `mpp` is stated."""
    try:
        return scale_factor(group, MICRONS_PER_PIXEL, str(path))
    except SourceError:
        if options.facts.mpp is None:
            raise
        return None


def _species(store: Store, stated: str, needed: bool) -> str:
    ids, symbols = gene_names(store["var"])
    try:
        return for_species(Features(ids, symbols, [GENE_KIND] * len(ids)), stated, store.path)[1]
    except SourceError:
        if needed or stated:
            raise
        return ""


def _source(path: Path, library: Library, name: str, options: SourceOptions) -> SectionSource:
    with open_store(path) as store:
        view = view_library(store, library, name, options)
    if not view.facts.tissue:
        raise SourceError(f"{path}: section {name}: neither obs nor uns states one tissue; set `tissue`")
    gap = median_gap(view.xy)
    meta = SectionMeta(
        section_id=name,
        dataset=stem_of(path),
        species=view.facts.species,
        tissue=view.facts.tissue,
        donor=view.facts.donor,
        platform=view.facts.platform,
        licence=options.facts.licence or "",
        attribution=options.facts.attribution or "",
        mpp=view.mpp / view.factor,
        spot_diameter_um=view.spot_diameter_px * view.mpp if view.spot_diameter_px else gap * view.mpp,
        spot_pitch_um=gap * view.mpp,
    )

    def load(counts: bool = True) -> Section:
        image = unpacked(view.image) if view.image is not None else path
        section = read_spots(path, view.rows, meta, image, view.factor, view.notes, options.counts, counts=counts)
        if view.picture is not None:
            section.slide_opener = partial(_inner_slide, path, library.key, view.picture)
        return section

    inputs = (path, view.image) if view.image is not None else (path,)
    preview = partial(_preview, path, library.key, view, options)
    examine = ScaleCheck.of(options.facts, view.factor)
    spots = partial(load, counts=False)
    return SectionSource(meta, inputs, load, spots, options.counts, preview=preview, examine=examine)


def _preview(path: Path, library: str, view: LibraryView, options: SourceOptions) -> Preview:
    with open_store(path) as store:
        spots = int(in_tissue(store["obs"].iloc[view.rows], path).sum())
        genes = preview_genes(store, path, options.counts)
        if view.picture is None:
            return Preview(spots, genes)
        height, width = store.group(f"uns/spatial/{library}")["images"][view.picture.name].shape[:2]
        return Preview(spots, genes, f"{view.picture.name} in {path.name}", (int(width), int(height)))


def _inner_slide(path: Path, library: str, picture: Picture) -> Slide:
    with open_store(path) as store:
        return library_slide(store.group(f"uns/spatial/{library}"), picture, path)


def _scale(facts: ObsFacts, image: Path | None, xy: np.ndarray, path: Path, notes: list[str]) -> float:
    """Return um per px of the positions, from the pitch of Visium or else the image's tag; raises SourceError without either."""
    if facts.is_visium:
        mpp = visium_mpp(xy, str(path))
        notes.append(f"scale: {mpp:.4f} um per px, from the {VISIUM_PITCH_UM:g} um pitch of Visium spots")
        return mpp
    tagged = mpp_by_tag(unpacked(image), notes) if image is not None else None
    if tagged is not None:
        return tagged
    raise SourceError(
        f"{path}: no scale; set `mpp`, the um per px of the positions, or, if the slide is Visium, `platform=Visium` to derive it "
        "from the 100 um spot pitch"
    )
