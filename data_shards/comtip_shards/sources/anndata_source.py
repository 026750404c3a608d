"""AnnData: ``.h5ad`` or ``.zarr`` with spot centres in ``obsm`` and an image in ``uns["spatial"]`` or a file.

This is the layout of scanpy's and squidpy's Visium readers and of CELLxGENE. The image in the file is downscaled (hires
or lowres); ``image=`` states the full-resolution image, where ``{id}`` is replaced by the section.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from comtip_shards.errors import SourceError
from comtip_shards.sections.section import Section, SectionMeta, check_unique
from comtip_shards.slides.base import MAX_WHOLE_PX, ArraySlide, Slide, peak_of, to_rgb8
from comtip_shards.slides.open import mpp_by_tag
from comtip_shards.sources.anndata_parts.counts import raw_counts
from comtip_shards.sources.anndata_parts.positions import centres, read_centres
from comtip_shards.sources.anndata_parts.store import Store, files_of, open_h5ad, open_store, read_part, stem_of
from comtip_shards.sources.base import SectionSource, SpotPositions, as_counts, existing, flags, join, number, pick
from comtip_shards.sources.files.names import safe_id
from comtip_shards.sources.files.packaging import unpacked
from comtip_shards.sources.geometry import VISIUM_DIAMETER_UM, VISIUM_PITCH_UM, check_pitch, max_ratio, median_gap
from comtip_shards.sources.tenx.features import GENE_KIND, Features, for_species, species_name

__all__ = [
    "MICRONS_PER_PIXEL",
    "VISIUM_DIAMETER_UM",
    "VISIUM_PITCH_UM",
    "Picture",
    "annotated",
    "centres",
    "facts_of",
    "gene_names",
    "library_names",
    "library_picture",
    "library_slide",
    "median_gap",
    "open_h5ad",
    "raw_counts",
    "read_part",
    "read_spots",
]
MICRONS_PER_PIXEL = "microns_per_pixel"
"""Key of the scale in ``uns["spatial"][...]["scalefactors"]``, as in Visium HD."""
PICTURES = ("fullres", "hires", "lowres", "downscaled_fullres")
"""Images of ``uns["spatial"][...]["images"]`` in order of preference; the last is used by HEST."""
_IDS, _SYMBOLS = ("gene_ids", "gene_id", "ensembl_id"), ("feature_name", "gene_name", "gene_symbols", "symbol")
_FACTS = {
    "tissue": ("tissue", "organ"),
    "donor": ("donor", "donor_id", "patient"),
    "species": ("species", "organism", "organism_ontology_term_id"),
    "platform": ("platform", "assay", "technology"),
}
_LIBRARY_COLUMNS = ("library_id", "library", "sample_id", "sample")
"""Columns preferred where several tell libraries apart."""


@dataclass(frozen=True)
class Picture:
    """The selected image of a library and its scale."""

    name: str
    factor: float
    """px per px of ``obsm["spatial"]``."""
    mpp: float | None
    """um per px of ``obsm["spatial"]``, None where not stated."""
    spot_diameter_px: float | None
    """In px of ``obsm["spatial"]``."""


def library_names(spatial: Any) -> list[str]:
    """Return the libraries of ``uns["spatial"]``: entries with images or scale factors (CELLxGENE adds ``is_single``)."""
    return [
        str(name)
        for name in spatial
        if hasattr(spatial[name], "keys") and any(part in spatial[name] for part in ("images", "scalefactors"))
    ]


def library_picture(library: Any, where: str) -> Picture:
    """Select the best image of one entry of ``uns["spatial"]`` (a mapping or an open group)."""
    images = library.get("images", {})
    name = next((n for n in PICTURES if n in images), None)
    if name is None:
        raise SourceError(f"{where}: an entry of uns['spatial'] has no image (hires or lowres); set --image")
    scale = _factor(library, f"tissue_{name}_scalef")
    if scale is None and name == "fullres":
        scale = 1.0
    if scale is None:
        raise SourceError(
            f"{where}: tissue_{name}_scalef is missing in the scale factors, so the image has no scale; add it, or set --image"
        )
    if not (np.isfinite(scale) and scale > 0):
        raise SourceError(
            f"{where}: tissue_{name}_scalef is {scale:g}, expected a positive number; correct it, or set --image"
        )
    return Picture(name, scale, _factor(library, MICRONS_PER_PIXEL), _factor(library, "spot_diameter_fullres"))


def _factor(library: Any, key: str) -> float | None:
    factors = library.get("scalefactors", {})
    return float(np.asarray(factors[key])) if key in factors else None


def library_slide(library: Any, picture: Picture, path: Path) -> ArraySlide:
    """Return the pixels of a library's image; floating-point values are in [0, 1]."""
    stored = library["images"][picture.name]
    shape = tuple(int(n) for n in getattr(stored, "shape", np.shape(stored)))
    if len(shape) != 3 or shape[2] not in (3, 4):
        raise SourceError(
            f"{path}: the {picture.name} image has the shape {shape}, expected (height, width, 3); set --image to an RGB image"
        )
    if shape[0] * shape[1] > MAX_WHOLE_PX:
        raise SourceError(
            f"{path}: the {picture.name} image has {shape[1]} x {shape[0]} px, too many for memory; set --image"
        )
    pixels = np.asarray(stored[()] if hasattr(stored, "shape") and not isinstance(stored, np.ndarray) else stored)
    return ArraySlide(to_rgb8(pixels, peak_of(pixels), alpha=pixels.shape[2] == 4), path)


def recognise(path: Path) -> str | None:
    """Return a reason if ``path`` is such a file or a folder of them, else None."""
    for file in files_of(path):
        try:
            with open_store(file) as store:
                if "obs" not in store and "var" not in store:
                    continue
                keys = [k for k in store.keys("obsm") if "spatial" in k] or ["no position"]
                found = f"obsm['{keys[0]}']" if keys[0] != "no position" else "obs and var"
                return f"{file.name} has {found}" + (" and uns['spatial']" if "uns/spatial" in store else "")
        except SourceError:
            if file.is_dir():
                return f"{file.name} has the attributes of an AnnData"  # why it cannot be opened is reported then
    return None


def open_sections(path: Path, samples: Sequence[str] | None, overrides: Mapping[str, str]) -> list[SectionSource]:
    """Return the sections: one per library of ``uns["spatial"]``, or one per file."""
    files = files_of(path)
    if not files:
        raise SourceError(f"{path}: no .h5ad file; write one with AnnData.write_h5ad")
    found: dict[str, tuple[Path, str]] = {}
    for file in files:
        for name, library in _libraries(file).items():
            if name in found:
                raise SourceError(f"{file}: section {name} also exists in {found[name][0].name}; rename one")
            found[name] = (file, library)
    names = pick(samples, list(found), path)
    if len(names) > 1 and overrides.get("image") and "{id}" not in overrides["image"]:
        raise SourceError(
            f"{path}: --image is one file but there are {len(names)} sections; use {{id}} in it, or select one with --samples"
        )
    return [_source(*found[name], name, overrides) for name in names]


def _libraries(path: Path) -> dict[str, str]:
    """Return {section id: key in uns["spatial"], "" where there is none}."""
    with open_store(path) as store:
        keys = library_names(store.group("uns/spatial"))
    if len(keys) <= 1:
        return {safe_id(stem_of(path)): keys[0] if keys else ""}
    return {safe_id(key): key for key in keys}


@dataclass(frozen=True)
class LibraryView:
    """Positions, image and facts of one library of an AnnData; the same for building, predicting and embedding."""

    rows: np.ndarray
    """int64, rows of ``obs``."""
    xy: np.ndarray
    """float64 (n, 2), px of the positions."""
    mpp: float
    """um per px of the positions."""
    image: Path | None
    """The image stated by the caller."""
    picture: Picture | None
    """The image in the file, if none is stated."""
    spot_diameter_px: float | None
    facts: dict[str, str]
    """Tissue, donor, species and platform, as far as known."""
    notes: list[str]

    @property
    def factor(self) -> float:
        """Image px per px of the positions."""
        return self.picture.factor if self.picture is not None else 1.0


def view_library(
    store: Store, library: str, name: str, overrides: Mapping[str, str], *, need_species: bool = True
) -> LibraryView:
    """Read positions, scale, image and facts of one library.

    Parameters
    ----------
    store
        Elements of the AnnData.
    library
        Key of ``uns["spatial"]``, or "".
    name
        Section id, which replaces ``{id}`` in ``image``.
    overrides
        Stated facts and options.
    need_species
        Whether an unknown species raises; otherwise it is missing in the facts.

    Raises
    ------
    SourceError
        Something is missing or contradictory; the message names the option that helps.
    """
    path, notes = store.path, list[str]()
    obs, keys = store["obs"], library_names(store.group("uns/spatial"))
    rows = rows_of(obs, library, path, keys) if library and len(keys) > 1 else np.arange(len(obs))
    xy = read_centres(store, overrides, notes)[rows]
    image = _stated_image(overrides, name)
    if not library and image is None:
        raise SourceError(f"{path}: no image in uns['spatial']; set --image to the image of obsm['spatial']")
    group = store.group(f"uns/spatial/{library}") if library else {}
    picture = library_picture(group, str(path)) if image is None else None
    facts = facts_of(obs.iloc[rows], overrides, store)
    species = _species(store, facts.get("species", ""), need_species)
    facts = {**facts, "species": species} if species else facts
    mpp = _scale(overrides, facts, _factor(group, MICRONS_PER_PIXEL) if library else None, image, xy, path, notes)
    check_pitch(xy, mpp, max_ratio(facts.get("platform", ""), obs.iloc[rows], overrides), str(path))
    if picture is not None:
        notes.append(f"tiles from the {picture.name} image in the file, scale {picture.factor:g} of the positions")
    diameter = _factor(group, "spot_diameter_fullres") if library else None
    return LibraryView(rows, xy, mpp, image, picture, diameter, facts, notes)


def _species(store: Store, stated: str, needed: bool) -> str:
    ids, symbols = gene_names(store["var"])
    try:
        return for_species(Features(ids, symbols, [GENE_KIND] * len(ids)), stated, store.path)[1]
    except SourceError:
        if needed or stated:
            raise
        return ""


def _source(path: Path, library: str, name: str, overrides: Mapping[str, str]) -> SectionSource:
    with open_store(path) as store:
        view = view_library(store, library, name, overrides)
    if not view.facts.get("tissue"):
        raise SourceError(f"{path}: obs has no tissue column; set --tissue")
    gap = median_gap(view.xy)
    meta = SectionMeta(
        section_id=name,
        dataset=stem_of(path),
        species=view.facts["species"],
        tissue=view.facts["tissue"],
        donor=view.facts.get("donor", ""),
        platform=view.facts.get("platform", ""),
        licence=overrides.get("licence", ""),
        attribution=overrides.get("attribution", ""),
        mpp=view.mpp / view.factor,
        spot_diameter_um=view.spot_diameter_px * view.mpp if view.spot_diameter_px else gap * view.mpp,
        spot_pitch_um=gap * view.mpp,
    )

    def load(counts: bool = True) -> Section:
        image = unpacked(view.image) if view.image is not None else path
        section = read_spots(path, view.rows, meta, image, view.factor, view.notes, overrides, counts=counts)
        if view.picture is not None:
            section.slide_opener = partial(_inner_slide, path, library, view.picture)
        return section

    inputs = (path, view.image) if view.image is not None else (path,)
    return SectionSource(meta, inputs, load, partial(load, counts=False))


def _stated_image(overrides: Mapping[str, str], name: str) -> Path | None:
    stated = overrides.get("image", "").replace("{id}", name)
    return existing(Path(stated), "image (--image)") if stated else None


def _inner_slide(path: Path, library: str, picture: Picture) -> Slide:
    with open_store(path) as store:
        return library_slide(store.group(f"uns/spatial/{library}"), picture, path)


def facts_of(obs: pd.DataFrame, overrides: Mapping[str, str], store: Store | None = None) -> dict[str, str]:
    """Return stated facts, or facts from columns of ``obs`` (or entries of ``uns``) with a single value."""
    facts = {}
    for key, columns in _FACTS.items():
        found = [str(obs[c].iloc[0]) for c in columns if c in obs and len(obs) and obs[c].astype(str).nunique() == 1]
        if store is not None:
            found += [str(store[f"uns/{c}"]) for c in columns if f"uns/{c}" in store and not store.keys(f"uns/{c}")]
        value = overrides.get(key) or next((v for v in found if v not in ("", "nan", "unknown")), "")
        if value:
            facts[key] = species_name(value) if key == "species" else value
    if facts.get("platform") and not overrides.get("platform"):
        facts["platform"] = _platform(facts["platform"])
    return facts


def _platform(assay: str) -> str:
    """Return the usual name of an assay, e.g. of ``Visium Spatial Gene Expression V1``."""
    plain = assay.lower()
    return "Visium HD" if "visium hd" in plain else "Visium" if "visium" in plain else assay


def _scale(
    overrides: Mapping[str, str],
    facts: Mapping[str, str],
    stated: float | None,
    image: Path | None,
    xy: np.ndarray,
    path: Path,
    notes: list[str],
) -> float:
    """Return um per px of the positions."""
    if overrides.get("mpp"):
        return number(overrides["mpp"], "--mpp")
    if stated is not None:
        return stated
    if facts.get("platform", "").lower() == "visium":
        mpp = VISIUM_PITCH_UM / median_gap(xy)
        notes.append(f"scale: {mpp:.4f} um per px, from the {VISIUM_PITCH_UM:g} um pitch of Visium spots")
        return mpp
    tagged = mpp_by_tag(unpacked(image), notes) if image is not None else None
    if tagged is not None:
        return tagged
    raise SourceError(
        f"{path}: no scale; set --mpp, the um per px of obsm['spatial'], or --platform Visium to derive it "
        "from the 100 um spot pitch"
    )


def rows_of(obs: pd.DataFrame, library: str, path: Path, libraries: Sequence[str]) -> np.ndarray:
    """Return the rows of one library, by the column of ``obs`` whose values are the libraries.

    Raises
    ------
    SourceError
        No column, or several columns that differ, tell the libraries apart.
    """
    fits = [str(c) for c in obs if set(libraries) <= set(obs[c].astype(str).unique()) and obs[c].nunique() < len(obs)]
    fits = [c for c in _LIBRARY_COLUMNS if c in fits] or fits
    if not fits:
        raise SourceError(
            f"{path}: several libraries in uns['spatial'], but no obs['library_id'] or other column with the values "
            f"{', '.join(libraries)}; add it, or write one file per section"
        )
    values = obs[fits[0]].astype(str).to_numpy()
    differing = next((c for c in fits[1:] if (obs[c].astype(str).to_numpy() != values).any()), None)
    if differing is not None and fits[0] not in _LIBRARY_COLUMNS:
        raise SourceError(
            f"{path}: obs['{fits[0]}'] and obs['{differing}'] assign spots to libraries differently; add obs['library_id']"
        )
    return np.flatnonzero(values == library)


def gene_names(var: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Return (ids, symbols); 10x keeps ids in a column and (possibly duplicate) symbols in the index."""
    index = [str(v) for v in var.index]
    for column in _IDS:
        if column in var and var[column].astype(str).str.len().min() > 0:
            return var[column].astype(str).tolist(), index
    symbols = next((var[c].astype(str).tolist() for c in _SYMBOLS if c in var), [""] * len(index))
    return index, symbols


def read_spots(
    path: Path,
    rows: np.ndarray,
    meta: SectionMeta,
    image: Path,
    factor: float,
    notes: list[str],
    options: Mapping[str, str] | None = None,
    *,
    counts: bool = True,
) -> Section:
    """Read positions and raw counts of some rows of an AnnData file.

    Parameters
    ----------
    path
        The ``.h5ad`` or ``.zarr``.
    rows
        int64, rows of ``obs`` to take.
    meta, image, notes
        Metadata, image path and notes of the section.
    factor
        px of the image per px of ``obsm["spatial"]``.
    options
        ``layer``, ``positions`` and ``round_counts``.
    counts
        Whether to read counts; a section without genes is returned otherwise.
    """
    with open_store(path) as store:
        obs = store["obs"].iloc[rows]
        xy = read_centres(store, options or {}, [])[rows] * factor
        matrix, var, count_notes = raw_counts(store, path, options) if counts else no_counts(len(store["obs"]))
    return annotated(obs, xy, matrix[rows], var, meta, image, path, [*notes, *count_notes])


def no_counts(n_spots: int) -> tuple[sparse.csr_matrix, pd.DataFrame, list[str]]:
    """Return the counts of no gene, for readers that need images and positions only."""
    return sparse.csr_matrix((n_spots, 0), dtype=np.float32), pd.DataFrame(index=pd.Index([], dtype=object)), []


def annotated(
    obs: pd.DataFrame,
    xy: np.ndarray,
    matrix: sparse.csr_matrix,
    var: pd.DataFrame,
    meta: SectionMeta,
    image: Path,
    path: Path,
    notes: list[str],
) -> Section:
    """Return a section from aligned parts of an AnnData; ``in_tissue``, array positions and labels are in ``obs``."""
    names = [str(v) for v in obs.index]
    check_unique(names, f"{path}: obs names")
    ids, symbols = gene_names(var)
    kinds = var["feature_types"].astype(str).tolist() if "feature_types" in var else [GENE_KIND] * len(ids)
    features, _ = for_species(Features(ids, symbols, kinds), meta.species, path)
    genes = features.only_genes()
    counts = as_counts(sparse.csr_matrix(matrix[:, features.genes()]), path, names, genes.ids)
    excluded = np.array([k or GENE_KIND for k in features.kinds])
    sums = np.asarray(matrix.sum(axis=0)).ravel()
    tally = {kind: int(sums[excluded == kind].sum()) for kind in set(excluded.tolist())}
    counts, genes, doubles = _merged(counts, genes)
    spots = SpotPositions(names, xy, _array(obs), _labels(obs), _in_tissue(obs, path))
    notes = [*notes, *features.others_note(tally), *doubles]
    return join(meta, image, counts, names, genes.ids, genes.symbols, spots, path, path, notes)


def _merged(counts: sparse.csr_matrix, genes: Features) -> tuple[sparse.csr_matrix, Features, list[str]]:
    """Sum columns of one gene identifier."""
    first = {name: i for i, name in reversed(list(enumerate(genes.ids)))}
    if len(first) == len(genes.ids):
        return counts, genes, []
    kept = sorted(first.values())
    column = {genes.ids[i]: k for k, i in enumerate(kept)}
    to = [column[name] for name in genes.ids]
    sums = sparse.csr_matrix((np.ones(len(to), np.int64), (np.arange(len(to)), to)), (len(to), len(kept)))
    merged = Features([genes.ids[i] for i in kept], [genes.symbols[i] for i in kept], [GENE_KIND] * len(kept))
    note = f"{len(genes.ids) - len(kept)} columns have the identifier of another one and are summed with it"
    return sparse.csr_matrix(counts @ sums, dtype=np.int32), merged, [note]


def _array(obs: pd.DataFrame) -> np.ndarray:
    if not {"array_col", "array_row"} <= set(obs):
        return np.full((len(obs), 2), np.nan)
    columns = [pd.to_numeric(obs[c].astype(str), errors="coerce") for c in ("array_col", "array_row")]
    return np.column_stack([np.asarray(c, np.float64) for c in columns])


def _labels(obs: pd.DataFrame) -> list[str]:
    return obs["label"].astype(str).tolist() if "label" in obs else [""] * len(obs)


def _in_tissue(obs: pd.DataFrame, path: Path) -> np.ndarray:
    return flags(obs["in_tissue"], f"{path}: obs['in_tissue']") if "in_tissue" in obs else np.ones(len(obs), bool)
