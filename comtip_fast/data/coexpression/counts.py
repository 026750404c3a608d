"""Streaming readers of count matrices without images: AnnData, 10x h5 and MTX, and legacy Spatial Transcriptomics tables.

Each reader yields blocks of cells (or spots) x genes, so that memory is bounded by the size of a block and does not grow with
the number of cells. Only AnnData matrices in compressed sparse columns, files of Cell Ranger 1 and 2 and MTX folders (at most 8 GiB
of text) are read as a whole. Features that are not genes (antibodies, controls) are dropped.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from anndata.io import sparse_dataset
from comtip_shards.errors import SourceError
from comtip_shards.genes.identifiers import SPECIES
from comtip_shards.sources.anndata_parts.counts import COUNTS, has_counts
from comtip_shards.sources.anndata_parts.spots import gene_names
from comtip_shards.sources.anndata_parts.store import is_anndata_file, open_h5ad, read_part
from comtip_shards.sources.files.opening import input_sha256
from comtip_shards.sources.files.table_size import MAX_LINE
from comtip_shards.sources.files.tables import as_counts
from comtip_shards.sources.tenx.features import GENE_KIND
from comtip_shards.sources.tenx.matrix import TenxMatrix
from comtip_shards.sources.tenx.run import find_matrix_of
from scipy import sparse

BLOCK_ROWS = 4096
TABLE_ROWS = 256
"""Number of rows of a text table that are parsed at once; they are dense, with 8 bytes per gene."""
ACCEPTED = "an .h5ad, a 10x .h5, a 10x folder with matrix.mtx, or a .tsv or .csv of spots x genes, also as .gz"
"""Accepted formats, for messages."""


@dataclass(frozen=True)
class CountSource:
    """One count matrix on disk.

    Attributes
    ----------
    path
        Path of the file, or of the folder of a 10x matrix.
    genes
        Identifiers of the columns.
    symbols
        Alternative identifiers of the columns, used where the one in ``genes`` is unknown; empty strings if there are none.
    """

    path: Path
    genes: list[str]
    symbols: list[str]

    def blocks(self) -> Iterator[sparse.csr_matrix]:
        """Yield the counts as int32 CSR blocks with ``len(genes)`` columns.

        A block has at most :data:`BLOCK_ROWS` rows.

        Raises
        ------
        SourceError
            The file is truncated or damaged, or has values that are not raw counts.
        """
        start = 0
        for block in _reader(self.path).blocks(self.path):
            rows = [f"row {start + i + 1}" for i in range(block.shape[0])]
            yield as_counts(block, self.path, rows, self.genes)
            start += block.shape[0]

    def sha256(self) -> str:
        """Return the SHA-256 of the file, or that of the hashes of the three files of an MTX folder, in hex."""
        hashes = [input_sha256(file) for file in _reader(self.path).files(self.path)]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def open_counts(path: str | Path) -> CountSource:
    """Open a count matrix and read its gene identifiers.

    Parameters
    ----------
    path
        ``.h5ad``, a 10x ``.h5``, a folder with a 10x matrix (see :func:`comtip_shards.sources.tenx.run.find_matrix_of`), or a
        table (``.tsv``, ``.csv``, ``.txt``, also ``.gz``) of spots x genes with a header and an id column.

    Raises
    ------
    FileNotFoundError
        There is no such file or folder.
    SourceError
        The format is none of these, the file or folder cannot be read, or it has no genes.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; give a count matrix: {ACCEPTED}")
    path = path.resolve() if path.is_dir() else path  # its name is recorded, and "." has none
    genes, symbols = _reader(path).genes(path)
    if not genes:
        raise SourceError(f"{path}: the matrix has no gene column; give spots x genes with gene identifiers")
    return CountSource(path, genes, symbols)


def species_of(genes: list[str]) -> str | None:
    """Return the species, human or mouse, to which most Ensembl identifiers in ``genes`` belong; None if there are none."""
    votes = {
        "mouse": sum(g.upper().startswith("ENSMUSG") for g in genes),
        "human": sum(g.upper().startswith("ENSG0") for g in genes),
    }
    best = max(SPECIES, key=lambda s: votes[s])
    return best if votes[best] else None


_SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab"}


class _Table:
    """A text table separated by tabs, commas or semicolons, read row by row."""

    @staticmethod
    def files(path: Path) -> tuple[Path, ...]:
        return (path,)

    @staticmethod
    def genes(path: Path) -> tuple[list[str], list[str]]:
        genes, _ = _Table._header(path)
        return genes, [""] * len(genes)

    @staticmethod
    def _header(path: Path) -> tuple[list[str], str]:
        """Return (genes, separator): tab, or in a header without one the most frequent of comma and semicolon."""
        with _explained(path), _text(path) as file:
            header, first = (file.readline(MAX_LINE).rstrip("\r\n") for _ in range(2))
        sep = "\t" if "\t" in header else max(_SEPARATORS, key=header.count)
        names = [n.strip().strip('"') for n in header.split(sep)]
        columns = first.count(sep)
        if columns < 1:
            raise SourceError(
                f"{path}: the separator of the header, {_SEPARATORS[sep]}, is not in the row after it; give a table of spots x "
                "genes with one separator and a header"
            )
        # R omits the name of the id column, other writers include it.
        genes = names[1:] if len(names) == columns + 1 else names
        if len(genes) != columns:
            raise SourceError(
                f"{path}: {len(names)} names in the header, but {columns + 1} columns in the first row; give a table of spots x "
                "genes"
            )
        return genes, sep

    @staticmethod
    def blocks(path: Path) -> Iterator[sparse.csr_matrix]:
        genes, sep = _Table._header(path)
        rows: list[np.ndarray] = []
        with _explained(path), _text(path) as file:
            file.readline(MAX_LINE)
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), ""), start=2):
                if line.strip():
                    rows.append(_row(line, sep, len(genes), path, number))
                if len(rows) == TABLE_ROWS:
                    yield sparse.csr_matrix(np.stack(rows))
                    rows = []
        if rows:
            yield sparse.csr_matrix(np.stack(rows))


def _row(line: str, sep: str, n_genes: int, path: Path, number: int) -> np.ndarray:
    """Return the counts of a line of a table, float64 (genes,); raise SourceError for other contents."""
    cells = line.rstrip("\r\n").split(sep)[1:]
    try:
        values = np.array(cells, np.float64)
    except ValueError as error:
        raise SourceError(
            f"{path}, line {number}: a value is not a number ({error}); correct it, or give a table of raw counts"
        ) from error
    if values.size != n_genes:
        raise SourceError(
            f"{path}, line {number}: {values.size} values for {n_genes} genes; correct this line, or copy the file again if it "
            "is truncated"
        )
    return values


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn errors of reading a text file, plain or compressed with gzip, into SourceError, except PermissionError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save the file as UTF-8"
        ) from error
    except PermissionError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{path}: truncated or damaged ({error}); copy or download the file again") from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn errors of reading a matrix of an HDF5 file into SourceError."""
    try:
        yield
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise SourceError(f"{path}: counts cannot be read ({error}); copy or download the file again") from error


def _text(path: Path) -> Any:
    """Open a UTF-8 text file, which is compressed with gzip if its name ends in ``.gz``."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


class _Tenx:
    """A matrix of Cell Ranger or Space Ranger: an h5 file, or a folder with MTX files."""

    @staticmethod
    def files(path: Path) -> tuple[Path, ...]:
        return _Tenx._matrix(path).files

    @staticmethod
    def genes(path: Path) -> tuple[list[str], list[str]]:
        features = _Tenx._matrix(path).features().only_genes()
        return features.ids, features.symbols

    @staticmethod
    def blocks(path: Path) -> Iterator[sparse.csr_matrix]:
        matrix = _Tenx._matrix(path)
        for _, counts in matrix.chunks(matrix.features(), BLOCK_ROWS):
            for start in range(0, counts.shape[0], BLOCK_ROWS):
                yield counts[start : start + BLOCK_ROWS]

    @staticmethod
    def _matrix(path: Path) -> TenxMatrix:
        if path.is_file():
            return TenxMatrix(path, (path,))
        found = find_matrix_of(path)
        if found is None:
            raise SourceError(
                f"{path}: a folder without a 10x matrix (matrix.mtx, or filtered_feature_bc_matrix); give {ACCEPTED}"
            )
        return found


class _AnnData:
    """An AnnData file; reads the first of ``layers["counts"]``, ``X`` and ``raw.X`` that has raw counts."""

    @staticmethod
    def files(path: Path) -> tuple[Path, ...]:
        return (path,)

    @staticmethod
    def genes(path: Path) -> tuple[list[str], list[str]]:
        with open_h5ad(path) as file:
            var = _AnnData._var(file, path)
        ids, symbols = gene_names(var)
        keep = _AnnData._gene_columns(var)
        return [ids[i] for i in keep], [symbols[i] for i in keep]

    @staticmethod
    def blocks(path: Path) -> Iterator[sparse.csr_matrix]:
        with open_h5ad(path) as file:
            keep = _AnnData._gene_columns(_AnnData._var(file, path))
            for block in _AnnData._all(file[_AnnData._key(file, path)], path):
                yield sparse.csr_matrix(block)[:, keep]

    @staticmethod
    def _var(file: h5py.File, path: Path) -> Any:
        return read_part(file, "raw/var" if _AnnData._key(file, path).startswith("raw/") else "var", path)

    @staticmethod
    def _gene_columns(var: Any) -> np.ndarray:
        """Return the indices of the columns that are genes, int64."""
        kinds = var["feature_types"].astype(str).tolist() if "feature_types" in var else [""] * len(var)
        return np.flatnonzero([kind in ("", GENE_KIND) for kind in kinds])

    @staticmethod
    def _key(file: h5py.File, path: Path) -> str:
        """Return the key of the first matrix with raw counts; if no matrix has raw counts, the key of the first one."""
        found = [key for key in COUNTS if key in file]
        if not found:
            raise SourceError(f"{path}: no layers['counts'], X or raw.X; add raw counts to the file")
        for key in found:
            if has_counts(next(_AnnData._all(file[key], path), sparse.csr_matrix((0, 0)))):
                return key
        return found[0]

    @staticmethod
    def _all(element: Any, path: Path) -> Iterator[sparse.csr_matrix]:
        """Yield the rows of a dense or sparse matrix in CSR blocks."""
        with _readable(path):
            matrix: Any = sparse_dataset(element) if isinstance(element, h5py.Group) else element
            if isinstance(element, h5py.Group) and matrix.format == "csc":
                # Rows of a column-compressed matrix cannot be read separately, so all of it is read.
                matrix = sparse.csr_matrix(matrix.to_memory())
        for start in range(0, matrix.shape[0], BLOCK_ROWS):
            with _readable(path):
                block = sparse.csr_matrix(matrix[start : start + BLOCK_ROWS])
            yield block


def _reader(path: Path) -> Any:
    """Return the reader for a folder, or for a file by its name; raise SourceError for an unknown format."""
    name = path.name.lower()
    if path.is_dir():
        return _Tenx
    if name.endswith((".mtx", ".mtx.gz")):
        raise SourceError(f"{path}: one of the three files of a 10x matrix; give their folder, {path.parent}")
    if is_anndata_file(path):
        return _AnnData
    if name.endswith(".h5"):
        return _Tenx
    if name.removesuffix(".gz").endswith((".tsv", ".csv", ".txt")):
        return _Table
    raise SourceError(f"{path}: unknown format; give {ACCEPTED}")
