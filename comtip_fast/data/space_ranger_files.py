"""Matrix and tables of a folder in Space Ranger's layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from comtip_shards import SourceError
from comtip_shards.sources.anndata_parts.spots import column_or, gene_names
from comtip_shards.sources.files.tables import flags
from comtip_shards.sources.tenx.features import GENE_KIND
from scipy import sparse

ARRAY = ("array_row", "array_col")
MATRIX = "filtered_feature_bc_matrix.h5"


def features_of(data: ad.AnnData) -> dict[str, list[str]]:
    """Return the columns of the table of features: id, name, feature_type and genome."""
    names = [str(name) for name in data.var_names]
    ids = [str(v) for v in data.var["gene_key"]] if "gene_key" in data.var else gene_names(data.var)[0]
    return {
        "id": ids,
        "name": names,
        "feature_type": column_or(data.var, "feature_types", GENE_KIND),
        "genome": column_or(data.var, "genome", "unknown"),
    }


def write_matrix(data: ad.AnnData, features: Mapping[str, list[str]], name: str, path: Path) -> None:
    """Write expression in the h5 layout of Cell Ranger 3: features x barcodes, compressed by barcode."""
    given: Any = data.X
    # SciPy has no float16; sums of duplicate entries may exceed small integers; and a copy leaves the arrays of the caller unchanged.
    matrix = sparse.csr_matrix(given.astype(np.float32) if given.dtype == np.float16 else given)
    matrix = matrix.astype(np.int64 if matrix.dtype.kind in "biu" else matrix.dtype, copy=sparse.issparse(given))
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    values = matrix.data
    whole = np.issubdtype(values.dtype, np.integer) or bool((values == np.rint(values)).all())
    counts = whole and (not values.size or np.abs(values).max() < 2.0**31)
    with h5py.File(path, "w") as file:
        file.attrs["filetype"], file.attrs["version"] = "matrix", 2
        file.attrs["library_ids"] = np.array([name.encode()])
        group = file.create_group("matrix")
        group["barcodes"] = np.array([str(v).encode() for v in data.obs_names])
        group.create_dataset("data", data=values.astype(np.int32 if counts else np.float32), compression="gzip")
        group.create_dataset("indices", data=matrix.indices.astype(np.int64), compression="gzip")
        group["indptr"] = matrix.indptr.astype(np.int64)
        group["shape"] = np.array([data.n_vars, data.n_obs], np.int32)
        for column, texts in features.items():
            group[f"features/{column}"] = np.array([text.encode() for text in texts])


def first_changed(names: Sequence[str]) -> str | None:
    """Return the first name that pandas changes when it reads a csv as scanpy and squidpy do (1, 007, NA); None if there is none."""
    with StringIO() as file:
        pd.DataFrame({"barcode": names, "in_tissue": 1}).to_csv(file, index=False)
        file.seek(0)
        read = pd.read_csv(file, index_col=0).index
    return next((name for name, found in zip(names, read, strict=True) if name != found), None)


def positions_table(data: ad.AnnData) -> pd.DataFrame:
    """Return the table ``tissue_positions.csv`` of Space Ranger."""
    xy = np.asarray(data.obsm["spatial"], np.float64)
    inside = flags(data.obs["in_tissue"], "obs['in_tissue']") if "in_tissue" in data.obs else np.ones(data.n_obs, bool)
    table = pd.DataFrame({"barcode": data.obs_names.astype(str), "in_tissue": inside.astype(int)})
    known = all(name in data.obs for name in ARRAY)
    for name in ARRAY:
        values = _array(data, name) if known else np.arange(data.n_obs, dtype=float)
        table[name] = np.rint(values).astype(np.int64)
    table["pxl_row_in_fullres"], table["pxl_col_in_fullres"] = xy[:, 1], xy[:, 0]
    return table


def _array(data: ad.AnnData, name: str) -> np.ndarray:
    """Return a column of array positions, which may be text or categories, as float64 (n,); NaN where a value is not a number."""
    return np.asarray(pd.to_numeric(data.obs[name].astype(str), errors="coerce"), np.float64)


def array_notes(data: ad.AnnData) -> list[str]:
    """Return a warning for each property of the array positions that a Space Ranger folder cannot represent.

    Raises
    ------
    SourceError
        ``array_row`` or ``array_col`` of a spot has no value.
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
