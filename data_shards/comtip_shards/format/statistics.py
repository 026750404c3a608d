"""Statistics of the counts: per section and measured gene, stored in the folder of a shard set as ``statistics.npz``.

Training selects genes by these statistics, without reading records. A section's values are sums over its records in stored
order, so they do not depend on how a set was built: a single build and merged parts give the same bytes.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
from numpy.lib import format as npy

from comtip_shards.errors import ShardError
from comtip_shards.format.manifest import Manifest

FILE = "statistics.npz"
VERSION = 1
_BYTES_PER_GENE = 12
_SMALL_BYTES = 1 << 24
_DTYPES = {"detected": np.dtype(np.uint32), "total": np.dtype(np.float32), "square": np.dtype(np.float32)}
_UNREADABLE = (
    ValueError,
    KeyError,
    OSError,
    EOFError,
    RuntimeError,
    MemoryError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class SectionStatistics:
    """Statistics of one section over its g measured genes, in ascending order of the gene table."""

    n_spots: int
    """Number of spots that were counted."""
    detected: np.ndarray
    """uint32 (g,), number of spots in which the gene was detected."""
    total: np.ndarray
    """float32 (g,), sum of log1p CP10K over the spots."""
    square: np.ndarray
    """float32 (g,), sum of the square of log1p CP10K over the spots."""


@dataclass
class StatisticsSum:
    """Running sums for the statistics of one section.

    Parameters
    ----------
    n_columns
        Number of measured genes.
    """

    n_columns: int
    n_spots: int = 0
    _detected: np.ndarray = field(init=False)
    _total: np.ndarray = field(init=False)
    _square: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self._detected = np.zeros(self.n_columns, np.int64)
        self._total, self._square = np.zeros(self.n_columns), np.zeros(self.n_columns)

    def add(self, indptr: np.ndarray, columns: np.ndarray, counts: np.ndarray) -> None:
        """Add n records: a CSR matrix (n, n_columns) of raw counts. CP10K divides by the record's sum over all measured genes."""
        n = indptr.size - 1
        total = np.add.reduceat(np.append(counts, 0), indptr[:-1], dtype=np.int64)
        total[indptr[1:] == indptr[:-1]] = 0  # for an empty row, reduceat returns the next element
        scale = np.repeat(1e4 / np.maximum(total.astype(np.float64), 1.0), np.diff(indptr))
        values = np.log1p((scale * counts).astype(np.float32)).astype(np.float64)
        self.n_spots += n
        self._detected += np.bincount(columns, minlength=self.n_columns)
        # In the order of the records, so that the sums do not depend on how many are added at a time.
        np.add.at(self._total, columns, values)
        np.add.at(self._square, columns, values * values)

    def result(self, order: np.ndarray) -> SectionStatistics:
        """Return the statistics with columns in ``order``, int64 (n_columns,), which sorts them by row of the gene table."""
        return SectionStatistics(
            self.n_spots,
            self._detected[order].astype(np.uint32),
            self._total[order].astype(np.float32),
            self._square[order].astype(np.float32),
        )


def encode_statistics(digest: str, sections: Sequence[SectionStatistics]) -> bytes:
    """Return the content of the file for the set whose manifest has ``digest``."""
    out = io.BytesIO()
    n_values = sum(s.detected.size for s in sections)
    write_statistics(out, digest, [s.n_spots for s in sections], n_values, lambda: iter(sections))
    return out.getvalue()


def write_statistics(
    file: IO[bytes],
    digest: str,
    n_spots: Sequence[int],
    n_values: int,
    sections: Callable[[], Iterator[SectionStatistics]],
) -> None:
    """Write the file for the set whose manifest has ``digest``, one section at a time, with the same bytes as ``numpy.savez``.

    Parameters
    ----------
    file
        A file that is open for writing in binary mode.
    digest
        Digest of the manifest.
    n_spots, n_values
        Number of spots of each section, and number of measured genes of all sections together.
    sections
        Returns an iterator over the statistics of all sections. Called three times: for detected, total and square.
    """
    small = {
        "version": np.array([VERSION]),
        "digest": np.frombuffer(digest.encode(), np.uint8),
        "n_spots": np.array(n_spots, np.int64),
    }
    with zipfile.ZipFile(file, "w") as archive:
        for name, values in small.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                npy.write_array(member, values)
        for name, dtype in _DTYPES.items():
            head = npy.header_data_from_array_1_0(np.empty(0, dtype)) | {"shape": (n_values,)}
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                npy.write_array_header_1_0(member, head)
                for one in sections():
                    member.write(getattr(one, name).astype(dtype, copy=False).tobytes())


def save_section(path: Path, one: SectionStatistics) -> None:
    """Write the arrays of one section to a temporary file of a build."""
    np.concatenate(
        [getattr(one, name).astype(dtype, copy=False).view(np.uint32) for name, dtype in _DTYPES.items()]
    ).tofile(path)


def load_section(path: Path, n_spots: int) -> SectionStatistics:
    """Return the statistics that :func:`save_section` wrote, with the number of spots, which the file does not hold."""
    arrays = np.fromfile(path, np.uint32).reshape(len(_DTYPES), -1)
    return SectionStatistics(n_spots, *(a.view(dtype) for a, dtype in zip(arrays, _DTYPES.values(), strict=True)))


def largest_size(manifest: Manifest) -> int:
    """Return an upper bound, in bytes, on the size of the file that :func:`encode_statistics` writes for a set."""
    return _n_values(manifest) * _BYTES_PER_GENE + 8 * len(manifest.sections) + 4096


def check_statistics(file: BinaryIO, manifest: Manifest, where: str) -> None:
    """Check a file that :func:`encode_statistics` wrote, with the values of one section in memory at a time.

    Raises
    ------
    ShardError
        Of kind ``statistics``: the file is damaged or belongs to another set; ``where`` names it. The message states no fix,
        because :func:`comtip_shards.reader.statistics.gene_statistics` computes the statistics again.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            size, limit = sum(i.file_size for i in archive.infolist()), largest_size(manifest)
            if size > limit:
                raise ValueError(f"its arrays have {size:,} bytes, but those of this set have at most {limit:,}")
            head = {name: _read_small(archive, name) for name in ("version", "digest", "n_spots")}
            expected = [s.n_spots for s in manifest.sections]
            foreign = head["version"].tolist() != [VERSION] or head["digest"].tobytes() != manifest.digest.encode()
            if not foreign:
                all_spots = head["n_spots"].tolist() == expected and _values_are_valid(archive, manifest)
    except _UNREADABLE as error:
        raise ShardError(f"{where}: cannot be read ({error})", kind="statistics") from error
    if foreign:
        raise ShardError(f"{where}: belongs to another shard set or version", kind="statistics")
    if not all_spots:
        raise ShardError(f"{where}: not the statistics of all spots of this set", kind="statistics")


def iter_statistics(file: BinaryIO, manifest: Manifest) -> Iterator[SectionStatistics]:
    """Yield the statistics of each section, in the order of the manifest, of a file that :func:`check_statistics` accepts."""
    with zipfile.ZipFile(file) as archive, ExitStack() as stack:
        members = [stack.enter_context(_open_array(archive, name, manifest)) for name in _DTYPES]
        for section in manifest.sections:
            parts = [
                np.frombuffer(member.read(4 * section.n_assay_genes), dtype)
                for member, dtype in zip(members, _DTYPES.values(), strict=True)
            ]
            yield SectionStatistics(section.n_spots, *parts)


def _n_values(manifest: Manifest) -> int:
    return sum(s.n_assay_genes for s in manifest.sections)


def _read_small(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as member:
        data = member.read(_SMALL_BYTES + 1)
    if len(data) > _SMALL_BYTES:
        raise ValueError(f"{name} has more than {_SMALL_BYTES:,} bytes")
    out: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    return out


def _open_array(archive: zipfile.ZipFile, name: str, manifest: Manifest) -> IO[bytes]:
    """Open a member at its first value, after a check of its dtype and shape."""
    member = archive.open(f"{name}.npy")
    if npy.read_magic(member) != (1, 0):
        raise ValueError(f"{name} has another version of the npy format than 1.0")
    shape, _, dtype = npy.read_array_header_1_0(member)
    if dtype != _DTYPES[name] or shape != (_n_values(manifest),):
        raise ValueError(f"{name} is {dtype} {shape}, expected {_DTYPES[name]} ({_n_values(manifest)},)")
    return member


def _values_are_valid(archive: zipfile.ZipFile, manifest: Manifest) -> bool:
    """Return whether the sums are finite and no gene is detected in more spots than its section has."""
    valid = True
    for name, dtype in _DTYPES.items():
        with _open_array(archive, name, manifest) as member:
            for section in manifest.sections:
                values = np.frombuffer(member.read(4 * section.n_assay_genes), dtype)
                if values.size != section.n_assay_genes:
                    raise ValueError(f"{name} is truncated")
                valid &= bool((values <= section.n_spots).all() if name == "detected" else np.isfinite(values).all())
            if member.read(1):  # reading to the end checks the checksum of the member
                raise ValueError(f"{name} has more values than the set")
    return valid
