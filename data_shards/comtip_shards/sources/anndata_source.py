"""AnnData: ``.h5ad`` files with spot centres in ``obsm["spatial"]``, and an image in ``uns["spatial"]`` or beside them.

This is what scanpy's and squidpy's Visium readers write. The image inside is small (hires or lowres); ``image=``
names the one that the positions belong to, ``{id}`` in it standing for the section.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem
from scipy import sparse
from scipy.spatial import cKDTree

from comtip_shards.errors import SourceError
from comtip_shards.sections.section import Section, SectionMeta, check_unique
from comtip_shards.slides.base import ArraySlide, Slide, peak_of, to_rgb8
from comtip_shards.slides.open import mpp_by_tag
from comtip_shards.sources.base import SectionSource, Spots, as_counts, existing, join, number, pick
from comtip_shards.sources.hdf5 import open_hdf5
from comtip_shards.sources.tenx import species_of

MICRONS_PER_PIXEL = "microns_per_pixel"
"""Key of the scale in ``uns["spatial"][...]["scalefactors"]``, as Visium HD writes it."""
PICTURES = ("fullres", "hires", "lowres", "downscaled_fullres")
"""Images of ``uns["spatial"][...]["images"]``, best first; the last is HEST's."""
COUNTS = ("layers/counts", "X", "raw/X")
VISIUM_PITCH_UM, VISIUM_DIAMETER_UM = 100.0, 55.0
_IDS, _SYMBOLS = ("gene_ids", "gene_id", "ensembl_id"), ("feature_name", "gene_name", "gene_symbols", "symbol")
_FACTS = {"tissue": ("tissue", "organ"), "donor": ("donor", "donor_id", "patient"), "species": ("species", "organism")}
SPECIES_NAMES = {"homo sapiens": "human", "mus musculus": "mouse"}


@dataclass(frozen=True)
class Picture:
    """Which image of a library is meant, and its scale."""

    name: str
    factor: float
    """Its px per px of ``obsm["spatial"]``."""
    mpp: float | None
    """um per px of ``obsm["spatial"]``, None where not stated."""
    spot_diameter_px: float | None
    """In px of ``obsm["spatial"]``."""


def library_picture(library: Any, where: str) -> Picture:
    """Choose the best image of one entry of ``uns["spatial"]``, a mapping in memory or a group of an open file."""
    images, factors = library.get("images", {}), library.get("scalefactors", {})
    name = next((n for n in PICTURES if n in images), None)
    if name is None:
        raise SourceError(f"{where}: uns['spatial'] holds an entry without an image (hires or lowres); give --image")

    def factor(key: str) -> float | None:
        return float(np.asarray(factors[key])) if key in factors else None

    scale = factor(f"tissue_{name}_scalef")
    if scale is None and name != "fullres":
        raise SourceError(f"{where}: the scale factors lack tissue_{name}_scalef, so its image has no scale")
    return Picture(name, scale or 1.0, factor(MICRONS_PER_PIXEL), factor("spot_diameter_fullres"))


def library_slide(library: Any, picture: Picture, path: Path) -> ArraySlide:
    """Return the pixels of a library's image; floating point values run from 0 to 1."""
    pixels = np.asarray(library["images"][picture.name])
    if pixels.ndim != 3 or pixels.shape[2] not in (3, 4):
        raise SourceError(f"{path}: the {picture.name} image has the shape {pixels.shape}, expected (height, width, 3)")
    return ArraySlide(to_rgb8(pixels, peak_of(pixels), alpha=pixels.shape[2] == 4), path)


def recognise(path: Path) -> str | None:
    """Return why ``path`` is such a file, or a folder of them, or None."""
    files = _files(path)
    if not files or not h5py.is_hdf5(files[0]):
        return None
    try:
        opened = open_h5ad(files[0])
    except SourceError:
        return f"{files[0].name} is an HDF5 file"  # reading it says what is wrong with it
    with opened as file:
        if "obsm/spatial" not in file:
            return None
        return f"{files[0].name} holds obsm['spatial']" + (" and uns['spatial']" if "uns/spatial" in file else "")


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("*.h5ad"))
    return [path] if path.suffix == ".h5ad" else []


def open_sections(path: Path, samples: Sequence[str] | None, overrides: Mapping[str, str]) -> list[SectionSource]:
    """Return the sections of the file or folder: one per entry of ``uns["spatial"]``, one per file without it."""
    files = _files(path)
    if not files:
        raise SourceError(f"{path}: no .h5ad file; write one with AnnData.write_h5ad")
    found: dict[str, tuple[Path, str]] = {}
    for file in files:
        for name, library in _libraries(file).items():
            if name in found:
                raise SourceError(f"{file}: section {name} is in {found[name][0].name} too; rename one")
            found[name] = (file, library)
    names = pick(samples, list(found), path)
    if len(names) > 1 and overrides.get("image") and "{id}" not in overrides["image"]:
        raise SourceError(f"{path}: --image for {len(names)} sections; write {{id}} in it, or take one with --samples")
    return [_source(*found[name], name, overrides) for name in names]


def _libraries(path: Path) -> dict[str, str]:
    """Return {section id: key in uns["spatial"], "" where there is none}."""
    with open_h5ad(path) as file:
        if "obsm/spatial" not in file:
            raise SourceError(f"{path}: no obsm['spatial']; put the spots' centres there, x and y in px of the image")
        keys = list(file["uns/spatial"]) if "uns/spatial" in file else []
    if len(keys) <= 1:
        return {safe_id(path.name.removesuffix(".h5ad")): keys[0] if keys else ""}
    return {safe_id(key): key for key in keys}


def safe_id(text: str) -> str:
    """Return a text as a section id."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._-") or "section"


def open_h5ad(path: Path) -> h5py.File:
    """Open an AnnData file, checked by :func:`comtip_shards.sources.hdf5.open_hdf5`."""
    return open_hdf5(path, "an .h5ad", "is the file whole?")


def read_part(file: h5py.File, key: str, path: Path) -> Any:
    """Read one element of an AnnData file."""
    try:
        return read_elem(file[key])
    except Exception as error:  # anndata wraps what it meets in errors of many kinds
        raise SourceError(
            f"{path}: {key} cannot be read ({type(error).__name__}: {error}); is the file whole?"
        ) from error


def _source(path: Path, library: str, name: str, overrides: Mapping[str, str]) -> SectionSource:
    notes: list[str] = []
    with open_h5ad(path) as file:
        obs = read_part(file, "obs", path)
        rows = rows_of(obs, library, path) if library and len(file["uns/spatial"]) > 1 else np.arange(len(obs))
        xy = centres(read_part(file, "obsm/spatial", path), path)[rows]
        image = (
            existing(Path(overrides["image"].replace("{id}", name)), "image (--image)")
            if overrides.get("image")
            else None
        )
        if not library and image is None:
            raise SourceError(
                f"{path}: no image in uns['spatial']; give the one that obsm['spatial'] belongs to, --image"
            )
        picture = library_picture(file[f"uns/spatial/{library}"], str(path)) if image is None else None
        stated = _stated(file, library)
        facts = facts_of(obs.iloc[rows], overrides)
        facts.setdefault("species", species_of(gene_names(read_part(file, "var", path))[0], path))
    mpp = _scale(overrides, stated[0], image, xy, path, notes)
    factor = 1.0
    if picture is not None:
        factor = picture.factor
        notes.append(f"tiles are cut from the {picture.name} image inside the file, {factor:g} of the positions' scale")
    if not facts.get("tissue"):
        raise SourceError(f"{path}: obs has no tissue; give --tissue")
    gap = median_gap(xy)
    meta = SectionMeta(
        section_id=name, dataset=path.stem, species=facts["species"], tissue=facts["tissue"], donor=facts.get("donor", ""),
        platform=overrides.get("platform", ""), licence=overrides.get("licence", ""),
        attribution=overrides.get("attribution", ""), mpp=mpp / factor,
        spot_diameter_um=stated[1] * mpp if stated[1] else gap * mpp, spot_pitch_um=gap * mpp,
    )  # fmt: skip

    def load() -> Section:
        section = read_spots(path, rows, meta, image or path, factor, notes)
        if picture is not None:
            section.slide_opener = partial(_inner_slide, path, library, picture)
        return section

    return SectionSource(meta, (path, image) if image is not None else (path,), load)


def _inner_slide(path: Path, library: str, picture: Picture) -> Slide:
    with open_h5ad(path) as file:
        return library_slide(file[f"uns/spatial/{library}"], picture, path)


def _stated(file: h5py.File, library: str) -> tuple[float | None, float | None]:
    """Return (um per px, spot diameter in px) by the scale factors."""
    key = f"uns/spatial/{library}/scalefactors"
    factors = file[key] if library and key in file else {}
    found = [
        float(np.asarray(factors[k])) if k in factors else None for k in (MICRONS_PER_PIXEL, "spot_diameter_fullres")
    ]
    return found[0], found[1]


def facts_of(obs: pd.DataFrame, overrides: Mapping[str, str]) -> dict[str, str]:
    """Return what is stated, or what a column of ``obs`` says alike of all spots."""
    facts = {}
    for key, columns in _FACTS.items():
        said = [str(obs[c].iloc[0]) for c in columns if c in obs and len(obs) and obs[c].astype(str).nunique() == 1]
        value = overrides.get(key) or (said[0] if said else "")
        if value:
            facts[key] = SPECIES_NAMES.get(value.lower(), value.lower()) if key == "species" else value
    return facts


def _scale(
    overrides: Mapping[str, str], stated: float | None, image: Path | None, xy: np.ndarray, path: Path, notes: list[str]
) -> float:
    """Return um per px of the positions."""
    if overrides.get("mpp"):
        return number(overrides["mpp"], "--mpp")
    if stated is not None:
        return stated
    if overrides.get("platform", "").lower() == "visium":
        mpp = VISIUM_PITCH_UM / median_gap(xy)
        notes.append(f"scale from the {VISIUM_PITCH_UM:g} um between neighbouring Visium spots: {mpp:.4f} um per px")
        return mpp
    tagged = mpp_by_tag(image, notes) if image is not None else None
    if tagged is not None:
        return tagged
    raise SourceError(
        f"{path}: no scale; give --mpp, the um per px of the positions in obsm['spatial'], or --platform Visium to take "
        "it from the 100 um between its spots"
    )


def rows_of(obs: pd.DataFrame, library: str, path: Path) -> np.ndarray:
    """Return the rows of one library of several, by ``obs["library_id"]``."""
    if "library_id" not in obs:
        raise SourceError(
            f"{path}: several libraries in uns['spatial'], but no obs['library_id'] says which spot is whose"
        )
    rows = np.flatnonzero(obs["library_id"].astype(str).to_numpy() == library)
    if not rows.size:
        raise SourceError(f"{path}: no spot has the library_id {library!r}, which is in uns['spatial']")
    return rows


def centres(spatial: Any, path: Path) -> np.ndarray:
    """Return ``obsm["spatial"]`` as float64 (n, 2), x and y."""
    values = np.asarray(spatial, np.float64)
    if values.ndim != 2 or values.shape[1] < 2:
        raise SourceError(f"{path}: obsm['spatial'] has the shape {values.shape}, expected spots x 2")
    return values[:, :2]


def median_gap(xy: np.ndarray) -> float:
    """Return the median distance to the nearest neighbour, NaN for fewer than two positions."""
    xy = xy[np.isfinite(xy).all(1)]
    return float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1])) if len(xy) > 1 else float("nan")


def gene_names(var: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Return (ids, symbols): 10x keeps ids in a column and symbols, which may stand twice, in the index."""
    index = [str(v) for v in var.index]
    for column in _IDS:
        if column in var and var[column].astype(str).str.len().min() > 0:
            return var[column].astype(str).tolist(), index
    symbols = next((var[c].astype(str).tolist() for c in _SYMBOLS if c in var), [""] * len(index))
    return index, symbols


def read_spots(
    path: Path, rows: np.ndarray, meta: SectionMeta, image: Path, factor: float, notes: list[str]
) -> Section:
    """Read positions and raw counts of some rows of an AnnData file.

    Parameters
    ----------
    path
        The ``.h5ad``.
    rows
        int64, rows of ``obs`` to take.
    meta, image, notes
        Of the section.
    factor
        px of the image per px of ``obsm["spatial"]``.
    """
    with open_h5ad(path) as file:
        obs = read_part(file, "obs", path).iloc[rows]
        xy = centres(read_part(file, "obsm/spatial", path), path)[rows] * factor
        matrix, var, said = raw_counts(_Parts(file, path), path)
    return annotated(obs, xy, matrix[rows], var, meta, image, path, [*notes, *said])


def annotated(
    obs: pd.DataFrame, xy: np.ndarray, matrix: sparse.csr_matrix, var: pd.DataFrame, meta: SectionMeta, image: Path,
    path: Path, notes: list[str],
) -> Section:  # fmt: skip
    """Return a section from the parts of an AnnData, row by row alike: ``in_tissue``, array and labels are in ``obs``."""
    names = [str(v) for v in obs.index]
    check_unique(names, f"{path}: obs names")
    ids, symbols = gene_names(var)
    kinds = var["feature_types"].astype(str) if "feature_types" in var else pd.Series(["Gene Expression"] * len(ids))
    genes = np.flatnonzero(kinds.to_numpy() == "Gene Expression")
    others = kinds[kinds.to_numpy() != "Gene Expression"].value_counts()
    notes = notes + [f"{n} features are not genes: {kind}" for kind, n in others.items()]
    ids, symbols = [ids[i] for i in genes], [symbols[i] for i in genes]
    counts = as_counts(sparse.csr_matrix(matrix[:, genes]), path, names, ids)
    has_array = {"array_col", "array_row"} <= set(obs)
    array = obs[["array_col", "array_row"]].to_numpy(np.float64) if has_array else np.full((len(obs), 2), np.nan)
    tissue = obs["in_tissue"].astype(float).to_numpy() == 1 if "in_tissue" in obs else np.ones(len(obs), bool)
    labels = obs["label"].astype(str).tolist() if "label" in obs else [""] * len(obs)
    spots = Spots(names, xy, array, labels, tissue)
    return join(meta, image, counts, names, ids, symbols, spots, path, path, notes)


class _Parts:
    """Elements of an open file by name, read when asked for."""

    def __init__(self, file: h5py.File, path: Path) -> None:
        self._file, self._path = file, path

    def __contains__(self, key: str) -> bool:
        return key in self._file

    def __getitem__(self, key: str) -> Any:
        return read_part(self._file, key, self._path)


def raw_counts(parts: Any, path: Path) -> tuple[sparse.csr_matrix, pd.DataFrame, list[str]]:
    """Return (spots x genes, var, notes): the first of ``layers["counts"]``, ``X`` and ``raw.X`` that holds counts.

    Parameters
    ----------
    parts
        Has the elements that an AnnData has, by the names that they have in a file: ``X``, ``raw/var``.
    path
        For messages.
    """
    found = [key for key in COUNTS if key in parts]
    if not found:
        raise SourceError(f"{path}: neither layers['counts'] nor X is there; raw counts are needed")
    for key in found:
        matrix = sparse.csr_matrix(parts[key])
        data = matrix.data
        if data.size == 0 or (np.isfinite(data).all() and data.min() >= 0 and (data == np.rint(data)).all()):
            break
    else:
        key = found[0]  # none is raw: the caller's check says what is wrong with the first
        matrix = sparse.csr_matrix(parts[key])
    var = parts["raw/var" if key.startswith("raw/") else "var"]
    return matrix, var, [] if key == "X" == found[0] else [f"counts are those of {key} ({path.name})"]
