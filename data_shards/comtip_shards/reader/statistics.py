"""Gene statistics of a shard set: read from ``statistics.npz``, or computed once and kept."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np

from comtip_shards.errors import ShardError
from comtip_shards.format.statistics import (
    FILE,
    SectionStatistics,
    StatisticsSum,
    check_statistics,
    encode_statistics,
    iter_statistics,
    largest_size,
)
from comtip_shards.names import FOREIGN
from comtip_shards.reader.joined_set import JoinedSet
from comtip_shards.reader.shard_set import ShardSet
from comtip_shards.storage.atomic import write_atomic
from comtip_shards.storage.cache import default_cache
from comtip_shards.storage.regular_file import open_regular

log = logging.getLogger("comtip_shards")
CHUNK = 512
"""Records read at a time."""


def gene_statistics(shards: ShardSet) -> Iterator[SectionStatistics]:
    """Return an iterator over the statistics of every section, in the order of the manifest.

    Statistics in a file are checked first, then read one section at a time. If the set has no usable ``statistics.npz`` (built
    by an earlier version, or damaged), the statistics are computed from its counts and stored in its folder, or in the cache
    folder if the set is remote or read-only. Damaged records are left out with a warning, and the result is then not stored.

    Raises
    ------
    ShardError
        Of kind ``remote``: the server failed while records were read (statistics without them would select other genes), or the
        default cache folder belongs to another user.
    """
    if isinstance(shards, JoinedSet):  # columns are the genes of a section, which are in the same order in both tables
        return chain.from_iterable(map(gene_statistics, shards.sets))
    for path in _paths(shards):
        try:
            return _opened(open_regular(path, largest_size(shards.manifest), follow=False), shards, str(path))
        except FileNotFoundError:
            continue
        except (OSError, ShardError) as error:
            log.warning("%s; the statistics are computed again", error)
    if shards.files.remote is not None:
        try:
            data = shards.files.remote.read(FILE, limit=largest_size(shards.manifest))
            fetched = _opened(io.BytesIO(data), shards, f"{shards.name}/{FILE}")
            _keep(shards, data)
            return fetched
        except ShardError as error:
            if error.kind != "vanished":
                log.warning("%s; the statistics are computed again", error)
    return iter(_compute(shards))


def _opened(file: BinaryIO, shards: ShardSet, where: str) -> Iterator[SectionStatistics]:
    """Check the whole file now, and return an iterator that reads it again."""
    try:
        check_statistics(file, shards.manifest, where)
    except ShardError:
        file.close()
        raise
    return _closing(file, shards)


def _closing(file: BinaryIO, shards: ShardSet) -> Iterator[SectionStatistics]:
    with file:
        yield from iter_statistics(file, shards.manifest)


def _compute(shards: ShardSet) -> list[SectionStatistics]:
    """Compute the statistics from the counts, and keep them if no record is damaged."""
    log.info("%s: computing the gene statistics of %d sections once", shards.name, len(shards.manifest.sections))
    computed = [section_statistics(shards, number) for number in range(len(shards.manifest.sections))]
    missing = sum(m.n_spots - s.n_spots for s, m in zip(computed, shards.manifest.sections, strict=True))
    if missing:
        log.warning(
            "%s: damaged records left out of the gene statistics: %d; check the set with `comtip shards verify`",
            shards.name,
            missing,
        )
    else:
        _keep(shards, encode_statistics(shards.manifest.digest, computed))
    return computed


def section_statistics(shards: ShardSet, number: int) -> SectionStatistics:
    """Compute the statistics of one section from its counts, without reading tiles; damaged records are left out.

    Raises
    ------
    ShardError
        Of kind ``remote``: the server failed.
    """
    measured = shards.measured(number)
    column_of = np.cumsum(measured) - 1
    total = StatisticsSum(int(measured.sum()))
    section = shards.manifest.sections[number]
    for start in range(0, section.n_spots, CHUNK):
        stop = min(start + CHUNK, section.n_spots)
        _add(shards, section.first_spot + np.arange(start, stop), measured, column_of, total)
    return total.result(np.arange(total.n_columns))


def _add(
    shards: ShardSet, spots: np.ndarray, measured: np.ndarray, column_of: np.ndarray, total: StatisticsSum
) -> None:
    try:
        counts = shards.counts(spots)
        if not measured[counts.indices].all():
            raise ShardError(
                f"{shards.name}: counts for a gene that the section did not measure; {FOREIGN}", kind="counts"
            )
    except ShardError as error:
        if error.kind == "remote":
            raise
        if spots.size > 1:  # find the damaged records
            for half in np.array_split(spots, 2):
                _add(shards, half, measured, column_of, total)
        return
    total.add(counts.indptr.astype(np.int64), column_of[counts.indices], counts.data)


def _paths(shards: ShardSet) -> Iterator[Path]:
    """Yield the possible paths of the statistics, in order of preference."""
    own = shards.path / FILE
    # A symbolic link in the set is neither followed nor replaced: it may point to any file of the user.
    if shards.files.remote is None and not own.is_symlink():
        yield own
    key = hashlib.sha256(shards.manifest.digest.encode()).hexdigest()
    yield default_cache() / "statistics" / f"{key}.npz"


def _keep(shards: ShardSet, data: bytes) -> None:
    for path in _paths(shards):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, data)
            return
        except (OSError, ValueError) as error:  # read-only, full, or another process is writing it
            log.info("%s: the statistics cannot be kept here (%s)", path, error)
