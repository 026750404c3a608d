"""Conversion of a section, a prediction or an embedding to SpatialData, or to a folder in Space Ranger's layout."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from comtip_shards import ShardSet, SourceError
from comtip_shards.names import is_formula, shown
from comtip_shards.sections.facts import CountOptions
from comtip_shards.sources.anndata_parts.picture import (
    DIAMETER,
    MICRONS_PER_PIXEL,
    PICTURES,
    Picture,
    library_names,
    library_picture,
    library_slide,
    scale_factor,
)
from comtip_shards.sources.anndata_parts.positions import read_centres
from comtip_shards.sources.anndata_parts.store import MemoryStore
from comtip_shards.storage.atomic import atomic_folder
from comtip_shards.storage.remote import is_url
from PIL import Image

from comtip_fast.constants import UNS
from comtip_fast.data.anndata_file import chosen_library, own_entries, read_h5ad
from comtip_fast.data.sections import section_template, split_spec
from comtip_fast.data.space_ranger_files import (
    MATRIX,
    array_notes,
    features_of,
    first_changed,
    positions_table,
    write_matrix,
)

log = logging.getLogger("comtip_fast")
REGION, IMAGE, TABLE, MICRONS = "spots", "hires", "table", "micrometre"
"""Names of the SpatialData elements, and of the coordinate system in um; ``global`` is in px of the full-resolution image. The
image element has the name that the image has in ``uns["spatial"]``."""
REGION_KEY, INSTANCE_KEY = "region", "spot"
CORRECT = "correct it in uns['spatial']"
"""What to do about an invalid image or scale factor: a conversion has no option that replaces it."""


def read_section(spec: str | Path, positions: str | None = None) -> ad.AnnData:
    """Return a section as AnnData with positions and, if the input has them, image and scale.

    Parameters
    ----------
    spec
        An ``.h5ad`` with ``obsm["spatial"]``, e.g. of ``comtip predict`` or ``comtip embed``, or ``FILE.h5ad:SECTION`` if it has several
        sections; or ``SET:SECTION`` of a shard set in a folder, whose raw counts are read into ``X``.
    positions
        Key of ``obsm`` with the positions; by default ``spatial``, else another usual name.

    Raises
    ------
    SourceError
        There is no such section, or there are several and none is named; the file cannot be read; there are no spots, or a spot has
        no position; ``positions`` does not exist, or ``spec`` is a shard set, which has no such keys; or ``spec`` is a URL or a
        folder that is not a shard set.
    ShardError
        The shard set is damaged.
    FileNotFoundError
        The path does not exist.
    """
    if is_url(str(spec)):
        raise SourceError(
            f"{spec}: a URL, but a conversion reads local files only; download the shard set or file first"
        )
    path, section_id = split_spec(str(spec))
    if (path / "manifest.json").is_file():
        if positions is not None:
            raise SourceError(f"{path}: a shard set, whose positions are known; leave `positions` out")
        return _from_shards(ShardSet(path), section_id)
    if path.is_dir():
        raise SourceError(
            f"{path}: a folder without manifest.json, so not a shard set; give an .h5ad, or build a shard set of this folder first"
        )
    data = read_h5ad(path)
    store = MemoryStore(data, path)
    library = chosen_library(store, section_id)[1]
    if library.lost:
        log.warning("%s: %s", path, library.lost)
    xy = read_centres(store, CountOptions(positions=positions), [])
    rows = library.rows(data.obs)
    if not len(rows):
        raise SourceError(f"{path}: the section has no spots; give a file with spots")
    if len(rows) < data.n_obs:
        data = data[rows].copy()
    lost = int((~np.isfinite(xy[rows])).any(axis=1).sum())
    if lost:
        raise SourceError(
            f"{path}: {lost} of {len(rows)} spots have no position; remove these spots or set their positions"
        )
    data.obsm["spatial"] = xy[rows]
    if "spatial" in data.uns:
        data.uns["spatial"] = own_entries(data, library)
    return data


def _from_shards(shards: ShardSet, section_id: str) -> ad.AnnData:
    """Return a section of a shard set with the raw counts of its measured genes."""
    template, spots, number = section_template(shards, section_id)
    measured = np.flatnonzero(shards.measured(number))
    genes = [shards.genes[i] for i in measured]
    var = pd.DataFrame(
        {"gene_ids": [g.ensembl or g.key for g in genes]},
        index=pd.Index([g.symbol or g.key for g in genes], dtype=object),
    )
    data = ad.AnnData(shards.counts(spots)[:, measured], template.obs, var, template.uns)
    data.obsm["spatial"] = template.obsm["spatial"]
    data.var_names_make_unique()
    return data


@dataclass(frozen=True)
class _Library:
    """Image and scale of a section."""

    name: str
    picture: Picture | None
    """Name and scale factor of the image that readers use; None if the section has no image."""
    image: np.ndarray | None
    """Pixels of this image, uint8 (H, W, 3)."""
    factors: dict[str, float]
    """Valid scale factors by name."""


def _library(data: ad.AnnData) -> _Library:
    """Return the image that readers of sections use, and the scale factors, of an AnnData with at most one library."""
    spatial = data.uns.get("spatial", {})
    names = library_names(spatial)
    if len(names) > 1:
        raise SourceError(
            f"the AnnData holds {len(names)} sections ({', '.join(names[:3])}); keep one section and its library"
        )
    if not names:
        return _Library("section", None, None, {})
    name, entry = names[0], spatial[names[0]]
    factors: dict[str, float] = {}
    for key in entry.get("scalefactors", {}):
        try:
            value = scale_factor(entry, key, name, CORRECT)
        except SourceError as error:
            log.warning("%s; the output is written without this scale factor", error)
            continue
        factors[str(key)] = float(value or 0)
    if not any(kind in entry.get("images", {}) for kind in PICTURES):
        return _Library(name, None, None, factors)
    picture = library_picture(entry, name, CORRECT)
    return _Library(name, picture, library_slide(entry, picture, Path(name), CORRECT).pixels, factors)


def _free_key(data: ad.AnnData, wanted: str) -> str:
    """Return ``wanted`` as the name of a new column of ``obs``, with a number appended if a column has this name."""
    taken = {str(name).lower() for name in (*data.obs, data.obs.index.name)}
    names = (wanted, *(f"{wanted}_{i}" for i in range(1, len(taken) + 2)))
    return next(name for name in names if name not in taken)


def _named_for_spatialdata(data: ad.AnnData, sanitise: Callable[..., Any]) -> ad.AnnData:
    """Return a copy whose columns and keys have names that SpatialData allows; names that change are logged."""
    parts = ("obs", "var", "obsm", "obsp", "varm", "varp", "layers", "uns")
    table = data.copy()
    before = {part: [str(name) for name in getattr(table, part)] for part in parts}
    sanitise(table)
    for part in parts:
        changed = [
            f"{old!r} to {new!r}"
            for old, new in zip(before[part], map(str, getattr(table, part)), strict=True)
            if old != new
        ]
        if changed:
            log.warning(
                "%s: SpatialData allows only letters, digits, '_', '-' and '.' in names, and no two that differ only in case; renamed %s",
                part,
                ", ".join(changed),
            )
    return table


def to_spatialdata(data: ad.AnnData) -> Any:
    """Return a section, prediction or embedding as SpatialData.

    Spots are circles in px of the full-resolution image, of radius 1 px if the diameter of a spot is unknown. The image is scaled
    to these px, and the table annotates the circles. If there is an image whose scale factors state its um per px, there is also a
    coordinate system ``micrometre`` in um.

    Parameters
    ----------
    data
        AnnData with ``obsm["spatial"]`` and, if there is an image, ``uns["spatial"]``, as ``comtip predict`` writes it.

    Returns
    -------
    ``spatialdata.SpatialData``

    Raises
    ------
    SourceError
        spatialdata is not installed, several sections have an image, or the image or its scale factor is invalid.

    Examples
    --------
    >>> to_spatialdata(comtip_fast.load("run").predict("set:x1")).write("x1.zarr")  # doctest: +SKIP
    """
    try:
        spatialdata = import_module("spatialdata")
    except ImportError as error:
        raise SourceError(
            "the package spatialdata is not installed; run pip install 'comtip-fast[spatialdata]'"
        ) from error
    models, transformations = import_module("spatialdata.models"), import_module("spatialdata.transformations")
    library = _library(data)
    mpp = library.factors.get(MICRONS_PER_PIXEL, 0.0)

    def systems(scale: float) -> dict[str, Any]:
        known = {"global": scale} | ({MICRONS: scale * mpp} if mpp > 0 else {})
        return {name: transformations.Scale([s, s], axes=("x", "y")) for name, s in known.items()}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = _named_for_spatialdata(data, import_module("spatialdata").sanitize_table)
        table.uns.pop("spatial", None)
        region_key, instance_key = _free_key(table, REGION_KEY), _free_key(table, INSTANCE_KEY)
        table.obs[region_key] = pd.Categorical([REGION] * table.n_obs)
        table.obs[instance_key] = np.arange(table.n_obs)
        xy = np.asarray(data.obsm["spatial"], np.float64)
        shapes = models.ShapesModel.parse(xy, geometry=0, radius=_radius(library), transformations=systems(1.0))
        parsed = models.TableModel.parse(table, region=REGION, region_key=region_key, instance_key=instance_key)
        images = {}
        if library.picture is not None and library.image is not None:
            pixels = np.moveaxis(library.image, 2, 0)
            scales = systems(1 / library.picture.factor)
            images[library.picture.name] = models.Image2DModel.parse(
                pixels, dims=("c", "y", "x"), c_coords=["r", "g", "b"], transformations=scales
            )
        return spatialdata.SpatialData(images=images, shapes={REGION: shapes}, tables={TABLE: parsed})


def _radius(library: _Library) -> float:
    """Return the radius of a spot in px of the positions."""
    diameter = library.factors.get(DIAMETER)
    if diameter is None:
        log.warning("the diameter of spots is unknown (%s in uns['spatial']); circles have a radius of 1 px", DIAMETER)
    return 1.0 if diameter is None else diameter / 2


def write_spatialdata(data: ad.AnnData, target: Path) -> None:
    """Write the result of :func:`to_spatialdata` to a temporary folder, then rename it to ``target``, which it replaces.

    Raises
    ------
    SourceError
        As :func:`to_spatialdata`.
    OSError
        ``target`` cannot be written.
    """
    store = to_spatialdata(data)
    with atomic_folder(target) as tmp_path, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store.write(tmp_path)


def write_space_ranger(data: ad.AnnData, target: Path) -> None:
    """Write a folder that scanpy, squidpy and Seurat read as the output of Space Ranger.

    Parameters
    ----------
    data
        A section with expression and an image, and unique spot names. Whole numbers are written as int32, other values, such as
        predictions, as float32. If ``array_row`` or ``array_col`` is missing, spots are numbered, with a warning.
    target
        Folder to write, with ``filtered_feature_bc_matrix.h5`` and ``spatial/``; an existing folder is replaced.

    Raises
    ------
    SourceError
        There is no expression or no image, several sections have an image, the image or its scale factor is invalid, spot names
        are not unique, would be evaluated as formulas by a spreadsheet, or would be read as numbers or as missing by pandas, a
        spot, gene or gene id has a name that is not ASCII, or ``array_row`` or ``array_col`` has no value for a spot.
    OSError
        ``target`` cannot be written.
    """
    library = _library(data)
    if not data.n_vars or data.X is None:
        raise SourceError(
            "the section has no expression, which a Space Ranger folder needs; write a .zarr (SpatialData) instead"
        )
    if library.image is None:
        raise SourceError(
            "the section has no image in uns['spatial'], which a Space Ranger folder needs; write a .zarr (SpatialData) instead"
        )
    if not data.obs_names.is_unique:
        raise SourceError("spot names are not unique; make them unique (obs_names_make_unique)")
    formulas = [name for name in data.obs_names.astype(str) if is_formula(name)]
    if formulas:  # with an apostrophe in front, as in other tables, the name would differ from that in the matrix
        raise SourceError(
            f"the spot name {shown(formulas[0])} would be evaluated as a formula if tissue_positions.csv is opened in a "
            "spreadsheet; rename the spots, or write a .zarr (SpatialData)"
        )
    changed = first_changed(data.obs_names.astype(str).tolist())
    if changed is not None:  # their positions would be lost without an error
        raise SourceError(
            f"scanpy and squidpy would read the spot name {shown(changed)} in tissue_positions.csv as a number or as missing; rename "
            "the spots (e.g. with a letter in front), or write a .zarr (SpatialData)"
        )
    features = features_of(data)
    for what, names in (("spot name", data.obs_names), *((f"gene {key}", features[key]) for key in ("name", "id"))):
        other = next((str(name) for name in names if not str(name).isascii()), None)
        if other is not None:
            raise SourceError(
                f"the {what} {shown(other)} has characters outside ASCII, with which scanpy and squidpy cannot read a Space Ranger "
                "matrix; rename it, or write a .zarr (SpatialData)"
            )
    positions = positions_table(data)
    for note in array_notes(data):
        log.warning("%s: %s", target, note)
    with atomic_folder(target) as tmp_path:
        (tmp_path / "spatial").mkdir(parents=True)
        write_matrix(data, features, library.name, tmp_path / MATRIX)
        positions.to_csv(tmp_path / "spatial/tissue_positions.csv", index=False)
        _write_pictures(data, library, tmp_path / "spatial")


def _write_pictures(data: ad.AnnData, library: _Library, folder: Path) -> None:
    """Write the image as hires, the lowres image (the same image if there is none), and the scale factors."""
    if library.picture is None or library.image is None:
        return
    small, scale = library.image, library.picture.factor
    entry = data.uns["spatial"][library.name]
    lowres = library.factors.get("tissue_lowres_scalef")
    if lowres is not None and "lowres" in entry["images"]:
        small, scale = library_slide(entry, Picture("lowres", lowres), Path(library.name), CORRECT).pixels, lowres
    factors = {k: v for k, v in library.factors.items() if not (k.startswith("tissue_") and k.endswith("_scalef"))}
    factors |= {f"tissue_{IMAGE}_scalef": library.picture.factor, "tissue_lowres_scalef": scale}
    factors.setdefault("fiducial_diameter_fullres", factors.get(DIAMETER, 1.0))
    (folder / "scalefactors_json.json").write_text(json.dumps(factors))
    for name, pixels in ((IMAGE, library.image), ("lowres", small)):
        Image.fromarray(pixels).save(folder / f"tissue_{name}_image.png")


def provenance(data: ad.AnnData) -> str:
    """Return what an AnnData holds: ``prediction`` or ``embedding`` if this package wrote it as such, otherwise ``section``."""
    return "prediction" if UNS in data.uns and data.n_vars else "embedding" if UNS in data.uns else "section"
