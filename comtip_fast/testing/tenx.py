"""Write the files of 10x Genomics as its pipelines do, small, for tests of the readers."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from scipy import io as scipy_io
from scipy import sparse

GENES = ("ENSG00000141736", "ENSG00000186847", "ENSG00000019582", "ENSG00000111640")
NAMES = ("ERBB2", "KRT14", "CD74", "GAPDH")
GENE_KIND = "Gene Expression"


def write_h5(
    path: Path, counts_FN: np.ndarray | sparse.spmatrix, barcodes: Sequence[str], ids: Sequence[str] = GENES,
    names: Sequence[str] = NAMES, kinds: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """Write a feature-barcode matrix (features x barcodes) in the h5 layout of Cell Ranger 3 and later."""
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
    folder: Path, counts_FN: np.ndarray | sparse.spmatrix, barcodes: Sequence[str], ids: Sequence[str] = GENES,
    names: Sequence[str] = NAMES, kinds: Sequence[str] | None = None, prefix: str = "",
) -> None:  # fmt: skip
    """Write the three packed files of the Market Exchange format."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(row) for row in zip(ids, names, kinds or [GENE_KIND] * len(ids), strict=True)]
    for name, rows in (("barcodes.tsv", barcodes), ("features.tsv", lines)):
        (folder / f"{prefix}{name}.gz").write_bytes(gzip.compress(("\n".join(rows) + "\n").encode()))
    plain = folder / "matrix.mtx"
    scipy_io.mmwrite(plain, sparse.coo_matrix(counts_FN).astype(int))
    (folder / f"{prefix}matrix.mtx.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()


def he_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return pink and purple noise in the colours of haematoxylin and eosin."""
    rng = np.random.default_rng(seed)
    dyes = np.array([(0.56, 0.72, 0.41), (0.22, 0.80, 0.56)])
    density = rng.uniform(0.1, 0.5, (height, width, 2)) @ dyes
    return Image.fromarray(np.clip(256 * 10.0**-density - 1, 0, 255).astype(np.uint8))
