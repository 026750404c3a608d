"""Statistics of the counts: per section and measured gene, stored next to a shard set in ``statistics.npz``.

Training selects genes by these statistics, without reading records. A section's values are sums over its records in stored
order, so they do not depend on how a set was built: a single build and merged parts give the same bytes.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from comtip_shards.errors import ShardError
from comtip_shards.format.manifest import Manifest

FILE = "statistics.npz"
VERSION = 1
_BYTES_PER_GENE = 12
_RECOMPUTE = "delete the file; it is computed again when it is needed"


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
    arrays: dict[str, Any] = {
        "version": np.array([VERSION]),
        "digest": np.frombuffer(digest.encode(), np.uint8),
        "n_spots": np.array([s.n_spots for s in sections], np.int64),
    }
    arrays |= {name: np.concatenate([getattr(s, name) for s in sections]) for name in ("detected", "total", "square")}
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def decode_statistics(data: bytes, manifest: Manifest, where: str) -> list[SectionStatistics]:
    """Decode and validate the content of the file; returns the statistics of each section, in the manifest's order.

    Raises
    ------
    ShardError
        Of kind ``statistics``: the file is damaged or belongs to another set; ``where`` names it.
    """
    sizes = [s.n_assay_genes for s in manifest.sections]
    n = sum(sizes)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(i.file_size for i in archive.infolist()) > n * _BYTES_PER_GENE + 8 * len(sizes) + 4096:
                raise ValueError("larger than the statistics of this set")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            read = {name: arrays[name] for name in ("version", "digest", "n_spots", "detected", "total", "square")}
    except (
        ValueError,
        KeyError,
        OSError,
        EOFError,
        RuntimeError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ShardError(f"{where}: not readable ({error}); {_RECOMPUTE}", kind="statistics") from error
    if read["version"].tolist() != [VERSION] or read["digest"].tobytes() != manifest.digest.encode():
        raise ShardError(f"{where}: belongs to another shard set or version; {_RECOMPUTE}", kind="statistics")
    types = {"n_spots": np.int64, "detected": np.uint32, "total": np.float32, "square": np.float32}
    shapes = {"n_spots": len(sizes), "detected": n, "total": n, "square": n}
    if any(read[k].dtype != t or read[k].shape != (shapes[k],) for k, t in types.items()):
        raise ShardError(f"{where}: not the arrays of this set; {_RECOMPUTE}", kind="statistics")
    n_spots = np.array([s.n_spots for s in manifest.sections])
    most = np.repeat(n_spots, sizes)
    finite = np.isfinite(read["total"]).all() and np.isfinite(read["square"]).all()
    if not finite or (read["n_spots"] != n_spots).any() or (read["detected"] > most).any():
        raise ShardError(f"{where}: not the statistics of all spots of this set; {_RECOMPUTE}", kind="statistics")
    ends = np.cumsum(sizes)[:-1]
    parts = zip(*(np.split(read[k], ends) for k in ("detected", "total", "square")), strict=True)
    return [SectionStatistics(int(k), *part) for k, part in zip(read["n_spots"], parts, strict=True)]
