"""Synthetic outputs of 10x Genomics pipelines, for tests of the readers."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from comtip_shards.sections.section import Section
from PIL import Image
from scipy import io as scipy_io
from scipy import sparse

GENES = ("ENSG00000141736", "ENSG00000186847", "ENSG00000019582", "ENSG00000111640")
NAMES = ("ERBB2", "KRT14", "CD74", "GAPDH")
GENE_KIND = "Gene Expression"


def write_h5(
    path: Path,
    counts_FN: np.ndarray | sparse.spmatrix,
    barcodes: Sequence[str],
    ids: Sequence[str] = GENES,
    names: Sequence[str] = NAMES,
    kinds: Sequence[str] | None = None,
) -> None:
    """Write a feature-barcode matrix, (features, barcodes), in the h5 layout of Cell Ranger 3 and later."""
    matrix = sparse.csc_matrix(counts_FN)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.attrs["filetype"] = "matrix"
        group = file.create_group("matrix")
        group["barcodes"] = np.array(barcodes, "S")
        group["data"] = matrix.data.astype(np.int32)
        group["indices"] = matrix.indices.astype(np.int64)
        group["indptr"] = matrix.indptr.astype(np.int64)
        group["shape"] = np.array(matrix.shape, np.int32)
        for name, values in (("id", ids), ("name", names), ("feature_type", kinds or [GENE_KIND] * len(ids))):
            group[f"features/{name}"] = np.array(values, "S")


def write_mex(
    folder: Path,
    counts_FN: np.ndarray | sparse.spmatrix,
    barcodes: Sequence[str],
    ids: Sequence[str] = GENES,
    names: Sequence[str] = NAMES,
    kinds: Sequence[str] | None = None,
    prefix: str = "",
) -> None:
    """Write the three gzipped files of the Market Exchange format; ``prefix`` is that of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(row) for row in zip(ids, names, kinds or [GENE_KIND] * len(ids), strict=True)]
    for name, rows in (("barcodes.tsv", barcodes), ("features.tsv", lines)):
        (folder / f"{prefix}{name}.gz").write_bytes(gzip.compress(("\n".join(rows) + "\n").encode()))
    plain = folder / "matrix.mtx"
    scipy_io.mmwrite(plain, sparse.coo_matrix(counts_FN).astype(int))
    (folder / f"{prefix}matrix.mtx.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()


def he_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return an image of random noise, width x height px, in the colours of haematoxylin and eosin."""
    rng = np.random.default_rng(seed)
    dyes = np.array([(0.56, 0.72, 0.41), (0.22, 0.80, 0.56)])
    density = rng.uniform(0.1, 0.5, (height, width, 2)) @ dyes
    return Image.fromarray(np.clip(256 * 10.0**-density - 1, 0, 255).astype(np.uint8))


def write_visium_hd(
    root: Path, bin_um: int, counts_FN: np.ndarray, in_tissue_RC: np.ndarray, affine: np.ndarray
) -> Path:
    """Write ``binned_outputs/square_XXXum`` of Visium HD, with a matrix of the bins in tissue, and return this folder.

    Parameters
    ----------
    root
        Folder of the run.
    bin_um
        Width of a bin in um.
    counts_FN
        (features, bins in tissue), bins in row-major order of the grid.
    in_tissue_RC
        bool (rows, columns).
    affine
        float (2, 3): maps (column, row, 1), in um from the corner of the grid, to x and y in full-resolution px.
    """
    folder = root / "binned_outputs" / f"square_{bin_um:03d}um"
    (folder / "spatial").mkdir(parents=True)
    row, col = (a.ravel() for a in np.indices(in_tissue_RC.shape))
    barcodes = np.array([f"s_{bin_um:03d}um_{r:05d}_{c:05d}-1" for r, c in zip(row, col, strict=True)])
    # The centre of bin (0, 0) is half a bin from the corner, which all bin sizes share.
    um = np.stack([(col + 0.5) * bin_um, (row + 0.5) * bin_um, np.ones(len(row))])
    x, y = affine @ um
    pd.DataFrame(
        {
            "barcode": barcodes,
            "in_tissue": in_tissue_RC.ravel().astype(np.int64),
            "array_row": row,
            "array_col": col,
            "pxl_row_in_fullres": y,
            "pxl_col_in_fullres": x,
        }
    ).to_parquet(folder / "spatial/tissue_positions.parquet", row_group_size=100)
    mpp = 1 / float(np.sqrt(abs(np.linalg.det(affine[:, :2]))))
    factors = {
        "spot_diameter_fullres": bin_um / mpp,
        "bin_size_um": float(bin_um),
        "microns_per_pixel": mpp,
        "regist_target_img_scalef": 1.0,
        "tissue_lowres_scalef": 0.25,
        "fiducial_diameter_fullres": 1.0,
        "tissue_hires_scalef": 0.5,
    }
    (folder / "spatial/scalefactors_json.json").write_text(json.dumps(factors))
    write_h5(folder / "filtered_feature_bc_matrix.h5", counts_FN, barcodes[in_tissue_RC.ravel()].tolist())
    return folder


def write_segmentation(root: Path, counts_FN: np.ndarray, centres_N2: np.ndarray, mpp: float, radius: float) -> Path:
    """Write ``segmented_outputs`` of Space Ranger 4, with an octagon per cell, and return this folder.

    Parameters
    ----------
    root
        Folder of the run.
    counts_FN
        (features, cells).
    centres_N2, radius
        Centres and radius of the cells in full-resolution px.
    mpp
        um per full-resolution px.
    """
    folder = root / "segmented_outputs"
    (folder / "spatial").mkdir(parents=True)
    (folder / "spatial/scalefactors_json.json").write_text(
        json.dumps({"tissue_hires_scalef": 0.5, "tissue_lowres_scalef": 0.25, "microns_per_pixel": mpp})
    )
    angle = np.linspace(0, 2 * np.pi, 9)
    ring = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [(ring + centre).tolist()]},
            "properties": {"cell_id": i + 1, "classification": {"name": "Cluster 1", "color": [1, 2, 3]}},
        }
        for i, centre in enumerate(np.asarray(centres_N2, float))
    ]
    (folder / "cell_segmentations.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    barcodes = [f"cellid_{i + 1:09d}-1" for i in range(len(centres_N2))]
    write_h5(folder / "filtered_feature_cell_matrix.h5", counts_FN, barcodes)
    return folder


def write_xenium(
    root: Path,
    transcripts: pd.DataFrame,
    *,
    ids: Sequence[str] = GENES,
    names: Sequence[str] = NAMES,
    pixel_size: float = 0.2125,
) -> Path:
    """Write a Xenium output folder (software 3) with experiment file, transcripts, cells and matrix, and return it.

    Parameters
    ----------
    root
        The folder.
    transcripts
        Columns ``feature_name``, ``x_location``, ``y_location`` (um), ``qv`` and ``cell_id``. Transcripts of ``names``
        with qv >= 20 are the counts of their cell, and their mean is its centre.
    ids, names
        Ensembl ids and names of the genes.
    pixel_size
        um per px of the DAPI image.
    """
    root.mkdir(parents=True, exist_ok=True)
    (root / "experiment.xenium").write_text(
        json.dumps(
            {
                "major_version": 5,
                "run_name": "a run",
                "region_name": "Region_1",
                "panel_organism": "Human",
                "panel_tissue_type": "Breast",
                "pixel_size": pixel_size,
                "analysis_sw_version": "xenium-3.0.0.15",
            }
        )
    )
    table = transcripts.assign(
        transcript_id=np.arange(len(transcripts), dtype=np.uint64),
        z_location=np.float32(10.0),
        fov_name="A1",
        is_gene=transcripts["feature_name"].isin(list(names)),
    )
    table = table.astype({"x_location": np.float32, "y_location": np.float32, "qv": np.float32})
    table.to_parquet(root / "transcripts.parquet", row_group_size=64, index=False)
    good = table[(table["qv"] >= 20) & (table["cell_id"] != "UNASSIGNED") & table["is_gene"]]
    cells = good.groupby("cell_id")[["x_location", "y_location"]].mean().astype(float)
    cells.columns = pd.Index(["x_centroid", "y_centroid"])
    cells.reset_index().to_parquet(root / "cells.parquet", row_group_size=10, index=False)
    counts = pd.crosstab(good["feature_name"], good["cell_id"]).reindex(index=list(names), columns=cells.index)
    matrix = np.vstack([counts.fillna(0).to_numpy(int), np.ones((1, len(cells)), int)])
    write_h5(
        root / "cell_feature_matrix.h5",
        matrix,
        cells.index.tolist(),
        [*ids, "NegControlProbe_00001"],
        [*names, "NegControlProbe_00001"],
        [GENE_KIND] * len(ids) + ["Negative Control Probe"],
    )
    return root


def section_digest(section: Section) -> str:
    """Return the SHA-256 of a pooled section's spots, genes, counts, positions (to 0.001 px), dropped spots and notes."""
    counts = section.counts
    parts = [counts.indptr, counts.indices, counts.data, section.n_pooled, np.round(section.xy * 1000)]
    digest = hashlib.sha256(b"".join(np.asarray(part, np.int64).tobytes() for part in parts))
    texts = [section.spot_ids, section.gene_ids, section.dropped, section.notes]
    digest.update(json.dumps(texts, sort_keys=True).encode())
    return digest.hexdigest()
