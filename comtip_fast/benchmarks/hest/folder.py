"""Folder of HEST-Benchmark: per task ``adata/``, ``patches/``, ``splits/{train,test}_i.csv`` and ``var_50genes.json``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from comtip_shards.sources.files.tables import read_table
from comtip_shards.sources.hdf5.opening import open_hdf5
from scipy import sparse

from comtip_fast.data.anndata_file import read_h5ad
from comtip_fast.data.sections import MPP_RANGE
from comtip_fast.data.tile_sources import TileChunk, TileGeometry, TileSource
from comtip_fast.evaluation.feature_files import NAME_KEYS, text_of
from comtip_fast.slide_prediction.tiles import TOLERANCE, fit_tiles

GENE_FILE = "var_50genes.json"
PATCH_UM = 112.0
"""Width of a patch: 224 px at 0.5 um per px."""
NOT_AVERAGED = ("HCC",)
"""Tasks of the folder that the published average leaves out."""
COLUMNS = ("sample_id", "patches_path", "expr_path")


@dataclass(frozen=True)
class BenchmarkSample:
    """One section of a task: id and files, from a row of a split."""

    task: str
    id: str
    patches: Path
    expression: Path


@dataclass(frozen=True)
class Fold:
    """One train and test split."""

    number: int
    train: tuple[BenchmarkSample, ...]
    test: tuple[BenchmarkSample, ...]


@dataclass(frozen=True)
class BenchmarkTask:
    """One task: its genes and folds."""

    name: str
    genes: tuple[str, ...]
    folds: tuple[Fold, ...]

    def samples(self) -> dict[str, BenchmarkSample]:
        """Return the distinct sections of all folds by id."""
        return {s.id: s for fold in self.folds for s in (*fold.train, *fold.test)}


@dataclass(frozen=True)
class Expression:
    """Raw counts of one section."""

    counts_NG: np.ndarray
    """float64 (N, G), the genes of the task."""
    total_N: np.ndarray
    """float64 (N,), counts over all genes of the file."""


def read_benchmark(folder: Path, tasks: Sequence[str] | None = None) -> list[BenchmarkTask]:
    """Read the tasks of a folder; by default all subfolders with ``splits/``.

    Raises
    ------
    FileNotFoundError
        The folder, a task or a file of a task does not exist.
    ValueError
        A file cannot be read or has other content than expected, a train split has no test split, a section is in both splits of
        a fold, or a split lists a file outside of its task.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; give the folder of HEST-Benchmark, with a subfolder per task"
        )
    found = sorted(p.name for p in folder.iterdir() if (p / "splits").is_dir())
    if not found:
        raise FileNotFoundError(
            f"{folder}: no subfolder with splits/, so no task; give the folder of HEST-Benchmark, with a subfolder per task"
        )
    missing = [t for t in tasks or [] if t not in found]
    if missing:
        raise FileNotFoundError(
            f"{folder}: no task {', '.join(missing)}; its tasks: {', '.join(found)}; name only these with `tasks`"
        )
    return [_read_task(folder / name) for name in (tasks or found)]


def _read_task(folder: Path) -> BenchmarkTask:
    """Read the genes and folds of one task; raise ValueError for incomplete splits or sections in both halves of a fold."""
    files = sorted(p.name for p in (folder / "splits").glob("*.csv"))
    n = len(files) // 2
    expected = sorted(f"{half}_{i}.csv" for half in ("train", "test") for i in range(n))
    if not n or files != expected:
        raise ValueError(
            f"{folder / 'splits'}: has {', '.join(files) or 'no .csv'}; expected train_i.csv and test_i.csv, i = 0, 1, ...; copy "
            "the splits of the task again"
        )
    folds = tuple(
        Fold(i, _read_split(folder, f"train_{i}.csv"), _read_split(folder, f"test_{i}.csv")) for i in range(n)
    )
    for fold in folds:
        both = {s.id for s in fold.train} & {s.id for s in fold.test}
        if both:
            raise ValueError(
                f"{folder / 'splits'}: fold {fold.number} trains and tests on {', '.join(sorted(both))}; list "
                "each section in one of the two files"
            )
    return BenchmarkTask(folder.name, _read_genes(folder / GENE_FILE), folds)


def _read_split(folder: Path, name: str) -> tuple[BenchmarkSample, ...]:
    """Read the samples of one split file; raise ValueError if a column is missing or a path is outside the task's folder."""
    path = folder / "splits" / name
    table = read_table(path, sep=",")
    missing = [c for c in COLUMNS if c not in table]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}; write the columns {', '.join(COLUMNS)}")
    return tuple(
        BenchmarkSample(
            folder.name,
            row["sample_id"],
            _inside(folder, row["patches_path"], path),
            _inside(folder, row["expr_path"], path),
        )
        for row in table.to_dict("records")
    )


def _inside(folder: Path, name: str, where: Path) -> Path:
    """Return the path of a file that a split lists; raise ValueError if it is outside the task's folder."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{where}: {name} is not a path inside {folder}; write paths relative to the task's folder")
    return path


def _read_genes(path: Path) -> tuple[str, ...]:
    """Read the gene list of a task; raise FileNotFoundError if it is missing, ValueError if it is not a list of distinct names."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; copy the task's gene list there")
    expected = 'expected {"genes": ["A", "B", ...]}'
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); {expected}") from error
    if not isinstance(content, dict) or "genes" not in content:
        raise ValueError(f"{path}: not a gene list, because it is not a JSON object with the key genes; {expected}")
    genes = content["genes"]
    if not isinstance(genes, list) or not genes:
        raise ValueError(f"{path}: genes is not a list of at least one name; {expected}")
    for number, gene in enumerate(genes):
        if not isinstance(gene, str):
            raise ValueError(
                f"{path}: entry {number} of the gene list is {str(gene)[:80]}, not text; write names in quotes"
            )
    duplicates = [gene for gene, n in Counter(genes).items() if n > 1]
    if duplicates:
        raise ValueError(f"{path}: duplicate gene {duplicates[0]!r} in the gene list; list each gene once")
    return tuple(genes)


def read_expression(sample: BenchmarkSample, barcodes: Sequence[str], genes: Sequence[str]) -> Expression:
    """Read the raw counts of spots ``barcodes`` and genes ``genes``, joined by name.

    Raises
    ------
    FileNotFoundError, ValueError
        The file is missing or cannot be read, lacks a spot or a gene, or has two spots or genes of the same name.
    """
    if not sample.expression.is_file():
        raise FileNotFoundError(f"{sample.expression}: no such file; copy the expression of {sample.id} there")
    data = read_h5ad(sample.expression)
    rows = _index(data.obs_names.tolist(), barcodes, sample, "spots")
    columns = _index(data.var_names.tolist(), genes, sample, "genes")
    total = np.asarray(data.X.sum(axis=1), np.float64).ravel()[rows]
    counts = data.X[rows][:, columns]
    return Expression(np.asarray(counts.toarray() if sparse.issparse(counts) else counts, np.float64), total)


def _index(have: list[str], want: Sequence[str], sample: BenchmarkSample, what: str) -> np.ndarray:
    """Return the positions of the names ``want`` in ``have``, int64; raise ValueError for duplicate or missing names."""
    index = {name: i for i, name in enumerate(have)}
    if len(index) < len(have):
        raise ValueError(
            f"{sample.expression}: duplicate names of {what} ({len(have) - len(index)}); rename or remove the duplicates"
        )
    missing = [n for n in want if n not in index]
    if missing:
        raise ValueError(
            f"{sample.expression}: lacks {len(missing)} of {len(want)} {what} ({', '.join(missing[:3])}) that "
            + ("the patches or embeddings have" if what == "spots" else f"{GENE_FILE} lists")
            + "; use files of the same release of the benchmark"
        )
    return np.array([index[n] for n in want], np.int64)


def _check_patches(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], n_barcodes: int) -> None:
    """Raise ValueError unless ``img`` holds one square uint8 RGB patch of plausible resolution per barcode."""
    if len(shape) != 4 or shape[0] != n_barcodes or 0 in shape:
        raise ValueError(
            f"{path}: img of shape {shape} for {n_barcodes} barcodes; expected one patch per barcode; download the file again"
        )
    if dtype != np.uint8 or shape[1] != shape[2] or shape[3] != 3:
        raise ValueError(
            f"{path}: img is {dtype} of shape {shape}; expected uint8 (N, H, H, 3), square RGB patches; download the file again"
        )
    if not MPP_RANGE[0] <= PATCH_UM / shape[1] <= MPP_RANGE[1]:
        raise ValueError(
            f"{path}: patches of {shape[1]} px cannot be {PATCH_UM:g} um wide, as in the benchmark; download the file again"
        )


class H5Patches(TileSource):
    """Patches of one section (``patches/ID.h5``), cropped and resized for an encoder.

    Parameters
    ----------
    path
        The file, with ``img`` uint8 (N, H, H, 3) and ``barcode`` or ``barcodes``.
    geometry
        Tiles of the encoder; None passes patches on as they are.
    whole
        Whether to resize the complete patch to the encoder's size in px, even if the encoder's tiles have another width in um; no
        effect without ``geometry``.

    Raises
    ------
    FileNotFoundError, ValueError
        The file is missing or cannot be read, or its patches are not square uint8 RGB images, one per barcode, of a plausible
        resolution, or are too narrow for the encoder.
    """

    def __init__(self, path: Path, geometry: TileGeometry | None = None, *, whole: bool = False) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; copy the patches there, or give embeddings:PATH as encoder")
        self._path = path
        with self._open() as file:
            key = next((k for k in NAME_KEYS if k in file), None)
            if key is None or "img" not in file:
                raise ValueError(
                    f"{path}: has {', '.join(sorted(file)) or 'no data'}; expected img and barcode; copy the file again"
                )
            self.barcodes = text_of(file[key][:])
            shape, dtype = file["img"].shape, file["img"].dtype
        _check_patches(path, shape, dtype, len(self.barcodes))
        self._mpp = PATCH_UM / shape[1]
        self._geometry = geometry
        if geometry is not None and whole:
            self._geometry = TileGeometry(geometry.px, PATCH_UM, min_mpp=0.0)
        if self._geometry is not None and self._geometry.um * (1 - TOLERANCE) > PATCH_UM:
            raise ValueError(
                f"{path}: patches are {PATCH_UM:g} um wide, but the model reads tiles of {self._geometry.um:g} um; set "
                "`whole_patch` to resize complete patches to the model's tiles"
            )
        self.tile_px = shape[1] if self._geometry is None else self._geometry.px

    def _open(self) -> h5py.File:
        return open_hdf5(self._path, "an HDF5 file of patches", "copy it again")

    def __len__(self) -> int:
        return len(self.barcodes)

    def chunks(self, size: int = 128) -> Iterator[TileChunk]:
        """Read the patches in the order of the file."""
        with self._open() as file:
            for start in range(0, len(self), size):
                patches = np.asarray(file["img"][start : start + size])
                if self._geometry is not None:
                    patches = fit_tiles(patches, self._mpp, self._geometry)
                yield TileChunk(np.arange(start, start + len(patches)), patches)
