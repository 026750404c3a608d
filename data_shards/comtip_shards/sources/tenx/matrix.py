"""Feature-barcode matrices of 10x Genomics: h5 of all versions, and MEX."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
from scipy import io as scipy_io
from scipy import sparse

from comtip_shards.errors import SourceError
from comtip_shards.not_data import not_data
from comtip_shards.sources.files.opening import existing, reading
from comtip_shards.sources.files.packaging import open_packed, read_packed, unpacked
from comtip_shards.sources.files.table_size import MAX_COUNTS_BYTES, check_table_size
from comtip_shards.sources.files.tables import as_counts
from comtip_shards.sources.hdf5.opening import check_entries, open_hdf5
from comtip_shards.sources.tenx.features import GENE_KIND, Features, counts_by_kind

MATRIX = "a 10x Genomics feature-barcode matrix"
_MEX_ENTRY_BYTES = 6
"""Minimum length in bytes of an entry of a Matrix Market file: three numbers."""
MAX_TEXT_BYTES = 2**30
"""Maximum size of an unpacked list of barcodes or features; 10 million barcodes have 200 MB."""
MAX_BARCODES = 1 << 26
"""Maximum number of barcodes of a file; Visium HD has 11 million bins of 2 um."""
_LEGACY = ("barcodes", "genes", "data", "indices", "indptr", "shape")


@dataclass(frozen=True)
class TenxMatrix:
    """A feature-barcode matrix: one h5 file, or the three MEX files; each may be compressed with gzip."""

    path: Path
    """The h5 file or the MEX matrix, for messages."""
    files: tuple[Path, ...]
    """The h5 file, or matrix, features and barcodes."""

    @property
    def is_h5(self) -> bool:
        """Whether the matrix is one h5 file."""
        return len(self.files) == 1

    def features(self) -> Features:
        """Read the features; raises SourceError if the file is not a feature-barcode matrix."""
        if not self.is_h5:
            return _mex_features(self.files[1])
        with reading(self.path, MATRIX), _open_h5(self.path) as file:
            return _h5_features(file)

    def read(
        self, features: Features, tally: dict[str, int] | None = None
    ) -> tuple[sparse.csr_matrix, list[str], Features]:
        """Read the counts of genes.

        Parameters
        ----------
        features
            As returned by :meth:`features`, or by :func:`comtip_shards.sources.tenx.features.for_species` for one species.
        tally
            A dict to which the sum of counts of each feature type is added.

        Returns
        -------
        counts, barcodes, genes
            int32 CSR (n_barcodes, n_genes), and the names of its rows and columns.

        Raises
        ------
        SourceError
            The matrix is damaged or holds values that are not raw counts.
        """
        genes = features.only_genes()
        parts = list(self.chunks(features, tally=tally))
        counts = sparse.vstack([c for _, c in parts], format="csr") if parts else sparse.csr_matrix((0, len(genes.ids)))
        return sparse.csr_matrix(counts), [b for barcodes, _ in parts for b in barcodes], genes

    def chunks(
        self, features: Features, size: int = 1 << 17, tally: dict[str, int] | None = None
    ) -> Iterator[tuple[list[str], sparse.csr_matrix]]:
        """Iterate over (barcodes, counts of genes), int32 CSR (n, n_genes), for at most ``size`` barcodes of an h5 file at a time.

        MEX and matrices of Cell Ranger 1 and 2 are read as one chunk. Parameters and errors are those of :meth:`read`.
        """
        rows = features.genes()
        ids = [features.ids[i] for i in rows]
        for barcodes, counts in self._raw_chunks(len(features.ids), size):
            if counts.dtype.kind not in "biuf":
                raise SourceError(
                    f"{self.path}: the counts are {counts.dtype}, not numbers; copy the file from the original output folder again"
                )
            genes = as_counts(counts[:, rows], self.path, barcodes, ids)
            if tally is not None:
                for kind, total in counts_by_kind(features.kinds, np.asarray(counts.sum(axis=0)).ravel()).items():
                    tally[kind] = tally.get(kind, 0) + total
            yield barcodes, genes

    def _raw_chunks(self, n_features: int, size: int) -> Iterator[tuple[list[str], sparse.csr_matrix]]:
        if not self.is_h5:
            yield _read_mex(self, n_features)
            return
        with reading(self.path, MATRIX), _open_h5(self.path) as file:
            if "matrix" in file:
                yield from _h5_chunks(file["matrix"], self.path, n_features, size)
            else:
                yield _read_legacy(file, self.path)


def _open_h5(path: Path) -> h5py.File:
    try:
        file = open_hdf5(unpacked(path), "an HDF5 file", "copy or download it again")
    except SourceError as error:
        reason = not_data(path)
        if reason is None:
            raise
        raise SourceError(f"{path}: {reason}") from error
    if "matrix" not in file and _legacy_groups(file):
        return file
    needed = ("features/id", "barcodes", "data", "indices", "indptr", "shape")
    missing = [n for n in needed if f"matrix/{n}" not in file]
    if missing:
        have = ", ".join(list(file)[:6]) or "nothing"
        file.close()
        raise SourceError(
            f"{path}: no /matrix/{missing[0]} (found {have}), so it is not {MATRIX}; copy the matrix from the original output folder"
        )
    return file


def _legacy_groups(file: h5py.File) -> list[str]:
    """Return the names of the groups of a Cell Ranger 1 or 2 file, one per genome; empty for later versions."""
    return [g for g in file if isinstance(file[g], h5py.Group) and all(n in file[g] for n in _LEGACY)]


def _strings(values: Any) -> list[str]:
    return [v.decode() if isinstance(v, bytes) else str(v) for v in values]


def _h5_features(file: h5py.File) -> Features:
    if "matrix" not in file:
        return _legacy_features(file)
    group = file["matrix/features"]
    lengths = {n: group[n].shape for n in ("id", "name", "feature_type") if n in group}
    if len(set(lengths.values())) > 1 or len(lengths["id"]) != 1:
        raise ValueError(f"/matrix/features has lists of different lengths: {lengths}")
    ids = _strings(group["id"][()])
    symbols, kinds = (_strings(group[n][()]) if n in group else [""] * len(ids) for n in ("name", "feature_type"))
    return Features(ids, symbols, kinds)


def _legacy_features(file: h5py.File) -> Features:
    ids: list[str] = []
    symbols: list[str] = []
    genomes = _legacy_groups(file)
    for genome in genomes:
        prefix = f"{genome}_" if len(genomes) > 1 else ""
        own = _strings(file[genome]["genes"][()])
        names = _strings(file[genome]["gene_names"][()]) if "gene_names" in file[genome] else [""] * len(own)
        if len(names) != len(own):
            raise ValueError(f"/{genome} has {len(own)} genes and {len(names)} gene_names")
        ids += [i if i.startswith(prefix) else prefix + i for i in own]
        symbols += names
    return Features(ids, symbols, [GENE_KIND] * len(ids))


def _read_legacy(file: h5py.File, path: Path) -> tuple[list[str], sparse.csr_matrix]:
    """Read a Cell Ranger 1 or 2 file: the union of the barcodes of all genomes, and their counts side by side."""
    parts = []
    for genome in _legacy_groups(file):
        n = len(file[genome]["genes"])
        chunk = list(_h5_chunks(file[genome], path, n, max(1, len(file[genome]["barcodes"]))))
        parts.append(chunk[0] if chunk else ([], sparse.csr_matrix((0, n))))
    names = list(dict.fromkeys(b for barcodes, _ in parts for b in barcodes))
    row_of = {name: i for i, name in enumerate(names)}
    blocks = []
    for barcodes, counts in parts:
        rows = [row_of[b] for b in barcodes]
        spread = sparse.csr_matrix((np.ones(len(rows)), (rows, np.arange(len(rows)))), (len(names), len(rows)))
        blocks.append(spread @ counts)
    return names, sparse.csr_matrix(sparse.hstack(blocks))


def _h5_chunks(
    group: h5py.Group, path: Path, n_features: int, size: int
) -> Iterator[tuple[list[str], sparse.csr_matrix]]:
    # Lengths are checked before the content is read, because a damaged header may claim more than memory holds.
    n, n_pointers, n_shape = len(group["barcodes"]), len(group["indptr"]), len(group["shape"])
    shape = tuple(int(v) for v in group["shape"][()]) if n_shape == 2 else (n_shape,)
    if shape != (n_features, n):
        raise SourceError(
            f"{path}: the matrix shape is {shape}, but there are {n_features} features and {n} barcodes; copy the file again"
        )
    if n > MAX_BARCODES:
        raise SourceError(
            f"{path}: {n:,} barcodes, but at most {MAX_BARCODES:,} are read; check that it is the right file"
        )
    indptr = group["indptr"][()].astype(np.int64) if n_pointers == n + 1 else np.full(1, -1)
    if indptr[0] != 0 or (np.diff(indptr) < 0).any():
        raise SourceError(f"{path}: indptr is not {n + 1} ascending offsets from 0; copy the file again")
    check_entries(indptr, n_features, f"{path}")
    for start in range(0, n, size):
        stop = min(start + size, n)
        part = slice(int(indptr[start]), int(indptr[stop]))
        indices, data = group["indices"][part], group["data"][part]
        if len(indices) != part.stop - part.start or len(data) != len(indices):
            raise SourceError(f"{path}: truncated before its last barcode; copy or download it again")
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < n_features:
            raise SourceError(f"{path}: an index exceeds the {n_features} features; copy or download the file again")
        pointer = indptr[start : stop + 1] - indptr[start]
        if data.dtype == np.float16:  # which sparse matrices of SciPy cannot select columns of
            data = data.astype(np.float32)
        yield (
            _strings(group["barcodes"][start:stop]),
            sparse.csr_matrix((data, indices, pointer), (stop - start, n_features)),
        )


class _ReadOnly:
    """A file that only offers ``read``.

    When SciPy's reader is destroyed, it seeks back over what it has not parsed. In a file that is not text this fails, and an
    error in a C++ destructor ends the process.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.read = file.read


def _read_mex(matrix: TenxMatrix, n_features: int) -> tuple[list[str], sparse.csr_matrix]:
    path, _, barcodes_file = matrix.files
    barcodes = [line.split("\t")[0].strip('"') for line in _lines(barcodes_file)]
    n_bytes = check_table_size(existing(path, "matrix of counts"), MAX_COUNTS_BYTES)
    with reading(path, "a Matrix Market file"), open_packed(path) as file:
        entries = scipy_io.mminfo(_ReadOnly(file))[2]
        if entries * _MEX_ENTRY_BYTES > n_bytes:
            raise ValueError(f"its header claims {entries:,} entries, which {n_bytes:,} bytes cannot hold")
        file.seek(0)
        counts = sparse.csc_matrix(scipy_io.mmread(_ReadOnly(file)))
    if counts.shape != (n_features, len(barcodes)):
        raise SourceError(
            f"{path}: the matrix shape is {counts.shape}, but there are {n_features} features and {len(barcodes)} "
            f"barcodes; {_fix_of_shape(counts.shape, n_features, len(barcodes))}"
        )
    return barcodes, sparse.csr_matrix(counts.T)


def _fix_of_shape(shape: tuple[int, int], n_features: int, n_barcodes: int) -> str:
    """Return what to do about a matrix whose shape is not (n_features, n_barcodes)."""
    if shape == (n_barcodes, n_features):
        return "rows must be features: write the transposed matrix (R: Matrix::writeMM(t(x), FILE))"
    if (n_features - shape[0], n_barcodes - shape[1]) in ((1, 1), (1, 0), (0, 1)):
        return "if a table has a header, remove this line; otherwise use the three files of one run"
    return "use the three files of one run"


def _lines(path: Path) -> list[str]:
    existing(path, "file of barcodes or features")
    with reading(path, "text"):
        return read_packed(path, MAX_TEXT_BYTES).decode("utf-8").splitlines()


def _mex_features(path: Path) -> Features:
    """Read features.tsv (id, symbol, feature type) or genes.tsv (id, symbol)."""
    rows = [([c.strip('"') for c in line.split("\t")] + ["", ""])[:3] for line in _lines(path)]
    return Features(*([row[i] for row in rows] for i in range(3)))
