"""Conversion of a section, a prediction or an embedding to SpatialData, or to a folder in Space Ranger's layout."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from comtip_shards import ShardSet, SourceError
from comtip_shards.names import is_formula, shown
from comtip_shards.sections.facts import CountOptions
from comtip_shards.sources.anndata_parts.picture import Picture, library_names, library_slide, scale_factor
from comtip_shards.sources.anndata_parts.positions import read_centres
from comtip_shards.sources.anndata_parts.store import MemoryStore
from comtip_shards.storage.atomic import atomic_folder
from comtip_shards.storage.remote import is_url
from PIL import Image
from scipy import sparse

from comtip_fast.constants import UNS
from comtip_fast.data.anndata_file import chosen_library, own_entries, read_h5ad
from comtip_fast.data.sections import section_template, split_spec

log = logging.getLogger("comtip_fast")
REGION, IMAGE, TABLE, MICRONS = "spots", "hires", "table", "micrometre"
"""Names of the SpatialData elements, and of the coordinate system in um; ``global`` is in px of the full-resolution image."""
REGION_KEY, INSTANCE_KEY = "region", "spot"
ARRAY = ("array_row", "array_col")
MATRIX = "filtered_feature_bc_matrix.h5"
CORRECT = "correct it in uns['spatial']"
"""Fix of an invalid scale factor; a conversion has no options for the image and its scale."""


def read_section(spec: str | Path) -> ad.AnnData:
    """Return a section as AnnData with positions and, if the input has them, image and scale.

    Parameters
    ----------
    spec
        An ``.h5ad`` with ``obsm["spatial"]``, e.g. of ``comtip predict`` or ``comtip embed``, or ``FILE.h5ad:SECTION`` if it has several
        sections; or ``SET:SECTION`` of a shard set in a folder, whose raw counts are read into ``X``.

    Raises
    ------
    SourceError
        There is no such section, or there are several and none is named; the file cannot be read; a spot has no position; or
        ``spec`` is a URL or a folder that is no shard set.
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
        return _from_shards(ShardSet(path), section_id)
    if path.is_dir():
        raise SourceError(
            f"{path}: a folder without manifest.json, so no shard set; give an .h5ad, or build a shard set of this folder first"
        )
    data = read_h5ad(path)
    store = MemoryStore(data, path)
    library = chosen_library(store, section_id)[1]
    if library.lost:
        log.warning("%s: %s", path, library.lost)
    xy = read_centres(store, CountOptions(), [])
    rows = library.rows(data.obs)
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


def _library(data: ad.AnnData) -> tuple[str, np.ndarray, dict[str, float]] | None:
    """Return (name, RGB image, scale factors) of the only library with a hires image, or None if no library has one.

    Raise SourceError if several have one, or if the image or its scale factor is invalid. Other invalid factors are left out.
    """
    spatial = data.uns.get("spatial", {})
    names = [n for n in library_names(spatial) if IMAGE in spatial[n].get("images", {})]
    if len(names) > 1:
        raise SourceError(
            f"the AnnData holds {len(names)} sections ({', '.join(names[:3])}); keep one section and its library"
        )
    if not names:
        return None
    name, entry = names[0], spatial[names[0]]
    picture = Picture(IMAGE, scale_factor(entry, f"tissue_{IMAGE}_scalef", name, CORRECT) or 1.0)
    factors: dict[str, float] = {}
    for key in entry.get("scalefactors", {}):
        try:
            value = scale_factor(entry, key, name, CORRECT)
        except SourceError as error:
            log.warning("%s; the output is written without this scale factor", error)
            continue
        factors[str(key)] = float(value or 0)
    return name, library_slide(entry, picture, Path(name)).pixels, factors


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
    factors: Mapping[str, float] = {} if library is None else library[2]
    mpp = float(factors.get("microns_per_pixel", 0))

    def systems(scale: float) -> dict[str, Any]:
        known = {"global": scale} | ({MICRONS: scale * mpp} if mpp > 0 else {})
        return {name: transformations.Scale([s, s], axes=("x", "y")) for name, s in known.items()}

    table = data.copy()
    table.uns.pop("spatial", None)
    table.obs[REGION_KEY] = pd.Categorical([REGION] * table.n_obs)
    table.obs[INSTANCE_KEY] = np.arange(table.n_obs)
    radius = float(factors.get("spot_diameter_fullres", 0)) / 2 or 1.0
    xy = np.asarray(data.obsm["spatial"], np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = models.ShapesModel.parse(xy, geometry=0, radius=radius, transformations=systems(1.0))
        parsed = models.TableModel.parse(table, region=REGION, region_key=REGION_KEY, instance_key=INSTANCE_KEY)
        images = {}
        if library is not None:
            px = 1 / float(factors.get(f"tissue_{IMAGE}_scalef", 1.0))
            pixels = np.moveaxis(library[1], 2, 0)
            images[IMAGE] = models.Image2DModel.parse(
                pixels, dims=("c", "y", "x"), c_coords=["r", "g", "b"], transformations=systems(px)
            )
        return spatialdata.SpatialData(images=images, shapes={REGION: shapes}, tables={TABLE: parsed})


def write_spatialdata(data: ad.AnnData, target: Path) -> None:
    """Write the result of :func:`to_spatialdata` to a temporary folder next to ``target`` and rename it; replaces ``target``.

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
        predictions, as float32. Without both ``array_row`` and ``array_col``, spots are numbered, with a warning.
    target
        Folder to write, with ``filtered_feature_bc_matrix.h5`` and ``spatial/``; an existing folder is replaced.

    Raises
    ------
    SourceError
        There is no expression or no image, several sections have an image, the image or its scale factor is invalid, spot names
        are not unique or begin as a formula, or ``array_row`` or ``array_col`` has no value for a spot.
    OSError
        ``target`` cannot be written.
    """
    library = _library(data)
    if not data.n_vars or data.X is None:
        raise SourceError(
            "the section has no expression, which a Space Ranger folder needs; write a .zarr (SpatialData) instead"
        )
    if library is None:
        raise SourceError(
            f"the section has no {IMAGE} image in uns['spatial'], which a Space Ranger folder needs; write a .zarr (SpatialData) "
            "instead"
        )
    if not data.obs_names.is_unique:
        raise SourceError("spot names are not unique; make them unique (obs_names_make_unique)")
    formulas = [name for name in data.obs_names.astype(str) if is_formula(name)]
    if formulas:  # with an apostrophe in front, as in other tables, the name would differ from that in the matrix
        raise SourceError(
            f"the spot name {shown(formulas[0])} would be evaluated as a formula if tissue_positions.csv is opened in a "
            "spreadsheet; rename the spots, or write a .zarr (SpatialData)"
        )
    name, image, factors = library
    for note in array_notes(data):
        log.warning("%s: %s", target, note)
    with atomic_folder(target) as tmp_path:
        (tmp_path / "spatial").mkdir(parents=True)
        _write_matrix(data, name, tmp_path / MATRIX)
        _positions(data).to_csv(tmp_path / "spatial/tissue_positions.csv", index=False)
        scale = dict(factors)
        scale.setdefault("tissue_lowres_scalef", scale.get(f"tissue_{IMAGE}_scalef", 1.0))
        scale.setdefault("fiducial_diameter_fullres", scale.get("spot_diameter_fullres", 1.0))
        (tmp_path / "spatial/scalefactors_json.json").write_text(json.dumps(scale))
        for size in (IMAGE, "lowres"):
            Image.fromarray(image).save(tmp_path / f"spatial/tissue_{size}_image.png")


def _write_matrix(data: ad.AnnData, name: str, path: Path) -> None:
    """Write expression in the h5 layout of Cell Ranger 3: features x barcodes, in compressed sparse columns (barcodes)."""
    matrix = sparse.csr_matrix(data.X)
    matrix.eliminate_zeros()
    counts = np.issubdtype(matrix.dtype, np.integer) or bool((matrix.data == np.rint(matrix.data)).all())
    ids = data.var["gene_ids"] if "gene_ids" in data.var else data.var.get("gene_key", data.var_names)
    columns = {"id": ids, "name": data.var_names, "feature_type": ["Gene Expression"] * data.n_vars}
    columns["genome"] = ["unknown"] * data.n_vars
    with h5py.File(path, "w") as file:
        file.attrs["filetype"], file.attrs["version"] = "matrix", 2
        file.attrs["library_ids"] = np.array([name.encode()])
        group = file.create_group("matrix")
        group["barcodes"] = np.array([str(v).encode() for v in data.obs_names])
        group.create_dataset("data", data=matrix.data.astype(np.int32 if counts else np.float32), compression="gzip")
        group.create_dataset("indices", data=matrix.indices.astype(np.int64), compression="gzip")
        group["indptr"] = matrix.indptr.astype(np.int64)
        group["shape"] = np.array([data.n_vars, data.n_obs], np.int32)
        for column, values in columns.items():
            group[f"features/{column}"] = np.array([str(v).encode() for v in values])


def _positions(data: ad.AnnData) -> pd.DataFrame:
    """Return the table ``tissue_positions.csv`` of Space Ranger; without both array columns, spots are numbered."""
    xy = np.asarray(data.obsm["spatial"], np.float64)
    table = pd.DataFrame({"barcode": data.obs_names.astype(str), "in_tissue": 1})
    known = all(name in data.obs for name in ARRAY)
    for name in ARRAY:
        values = _array(data, name) if known else np.arange(data.n_obs, dtype=float)
        table[name] = np.rint(values).astype(np.int64)
    table["pxl_row_in_fullres"], table["pxl_col_in_fullres"] = xy[:, 1], xy[:, 0]
    return table


def _array(data: ad.AnnData, name: str) -> np.ndarray:
    """Return a column of array positions, float64 (n,), NaN where it is no number; it may be text or a category."""
    return np.asarray(pd.to_numeric(data.obs[name].astype(str), errors="coerce"), np.float64)


def array_notes(data: ad.AnnData) -> list[str]:
    """Return warnings about array positions: absent, fractional, not unique, or not those of a hexagonal array.

    Raises
    ------
    SourceError
        Both columns exist, and ``array_row`` or ``array_col`` has no value for a spot.
    """
    absent = [name for name in ARRAY if name not in data.obs]
    if absent:
        return [
            f"obs has no {' and no '.join(absent)}: spots are numbered instead, so use pixel positions for neighbours"
        ]
    given = np.column_stack([_array(data, name) for name in ARRAY])
    lost = int((~np.isfinite(given)).any(1).sum())
    if lost:
        raise SourceError(
            f"array_row or array_col has no value for {lost} of {len(given)} spots; remove these columns of obs, or set whole numbers"
        )
    whole, notes = np.rint(given), []
    if np.abs(whole - given).max(initial=0) > 1e-6:
        notes.append("array_row and array_col are fractions and were rounded; pixel positions are exact")
    if len(np.unique(whole, axis=0)) < len(whole):
        notes.append("several spots have the same array_row and array_col; use pixel positions for neighbours")
    elif (whole.sum(1) % 2 != 0).any():  # Visium numbers columns of even rows 0, 2, ... and of odd rows 1, 3, ...
        notes.append(
            "the array is not hexagonal as on Visium slides; set coord_type='generic' in squidpy.gr.spatial_neighbors"
        )
    return notes


def provenance(data: ad.AnnData) -> str:
    """Return the kind of an AnnData: ``prediction`` or ``embedding`` of this package, otherwise ``section``."""
    return "prediction" if UNS in data.uns and data.n_vars else "embedding" if UNS in data.uns else "section"
