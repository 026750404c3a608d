"""Synthetic folder in the layout of HEST-Benchmark, with expression that depends on the colour of the patch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

GENES = tuple(f"G{i}" for i in range(8))
"""Genes in the gene lists of the tasks; the h5ad files also contain the gene ``REST``."""
TASKS = {"IDC": ("S1", "S2", "S3"), "READ": ("R1", "R2"), "HCC": ("H1", "H2")}


def write_hest_benchmark(
    folder: Path, tasks: Mapping[str, tuple[str, ...]] = TASKS, *, spots: int = 40, px: int = 32, silent: str = ""
) -> Path:
    """Write the folder, with one fold per section, in which this section is the test section, and return it.

    Parameters
    ----------
    folder
        Created if it does not exist.
    tasks
        Sections of each task.
    spots, px
        Number of spots per section, of which the first two have no patch; width of a patch in px.
    silent
        Name of a section in which gene ``G0`` has no counts, so that its correlation is undefined.
    """
    for task, names in tasks.items():
        for part in ("adata", "patches", "splits"):
            (folder / task / part).mkdir(parents=True)
        (folder / task / "var_50genes.json").write_text(json.dumps({"genes": list(GENES)}))
        for name in names:
            _write_section(folder / task, name, spots, px, silent)
        for i, test in enumerate(names):
            _write_split(folder / task / "splits" / f"train_{i}.csv", [n for n in names if n != test])
            _write_split(folder / task / "splits" / f"test_{i}.csv", [test])
    return folder


def _write_split(path: Path, names: list[str]) -> None:
    rows = [{"sample_id": n, "patches_path": f"patches/{n}.h5", "expr_path": f"adata/{n}.h5ad"} for n in names]
    pd.DataFrame(rows).to_csv(path)


def _write_section(folder: Path, name: str, spots: int, px: int, silent: str) -> None:
    rng = np.random.default_rng(list(f"{folder.name}/{name}".encode()))
    level = rng.uniform(-1, 1, spots)
    slope = np.linspace(-1.5, 1.5, len(GENES))
    counts = rng.poisson(np.exp(1.5 + level[:, None] * slope))
    counts[:, 0] = 0 if name == silent else counts[:, 0]
    rest = rng.poisson(30, (spots, 1))
    barcodes = [f"{name}-B{i}" for i in range(spots)]
    matrix = sparse.csr_matrix(np.column_stack([rest, counts[:, ::-1]]).astype(np.float32))
    data = ad.AnnData(matrix, pd.DataFrame(index=barcodes), pd.DataFrame(index=["REST", *reversed(GENES)]))
    data.write_h5ad(folder / "adata" / f"{name}.h5ad")
    order = rng.permutation(np.arange(2, spots))
    base = np.stack([150 + 60 * level, 120 - 40 * level, np.full(spots, 160.0)], axis=-1)[order]
    img = np.clip(base[:, None, None] + rng.normal(0, 10, (len(order), px, px, 3)), 0, 255).astype(np.uint8)
    with h5py.File(folder / "patches" / f"{name}.h5", "w") as file:
        file.create_dataset("img", data=img, chunks=(1, px, px, 3))
        file["coords"] = np.zeros((len(order), 2), np.int64)
        file["barcode"] = np.array([[barcodes[i]] for i in order], dtype=h5py.string_dtype())


def write_embeddings(folder: Path, benchmark: Path, width: int) -> Path:
    """Write embeddings of ``width`` features to ``folder/TASK/SECTION.h5`` in the benchmark's format, and return ``folder``.

    They are a random projection of the mean colour of a patch, plus noise.
    """
    for path in sorted(benchmark.glob("*/patches/*.h5")):
        task, name = path.parts[-3], path.stem
        with h5py.File(path, "r") as file:
            barcodes, colour = file["barcode"][:], file["img"][:].mean((1, 2)) / 255
        rng = np.random.default_rng(list(name.encode()))
        mix = np.random.default_rng(7).normal(size=(3, width))
        values = colour @ mix + 0.05 * rng.normal(size=(len(colour), width))
        (folder / task).mkdir(parents=True, exist_ok=True)
        with h5py.File(folder / task / f"{name}.h5", "w") as file:
            file["embeddings"], file["barcodes"] = values.astype(np.float32), barcodes
    return folder
