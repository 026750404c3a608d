"""Random access to the members of records, each checked against its CRC-32."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from comtip_shards.errors import ShardError
from comtip_shards.format import record
from comtip_shards.format import spot_table as spots
from comtip_shards.format.index import parse_index
from comtip_shards.format.manifest import Manifest, ShardEntry
from comtip_shards.reader.shard_files import SetFiles

_GAP, _SPAN = 1 << 16, 1 << 23
"""Records at most ``_GAP`` bytes apart are read in one request of at most ``_SPAN`` bytes."""
_GAP_WITHOUT_TILES = 1 << 11
"""Used instead of ``_GAP`` if no tile is requested, so that the tile between the counts of two records is skipped."""
_SHARDS_AT_ONCE = 4
"""Remote shards that are read at the same time."""


@dataclass
class _Members:
    """Members of records of one shard, in ascending order: lists with a list per record."""

    starts: list[list[int]]
    stops: list[list[int]]
    """Byte ranges."""
    crcs: list[list[int]]
    rows: list[int]
    """Where each record belongs in the result."""

    def runs(self, gap: int) -> list[range]:
        """Split the records into runs that are each read in one request."""
        found, first = [], 0
        starts, ends = [min(s) for s in self.starts], [max(s) for s in self.stops]
        for i in range(1, len(starts) + 1):
            if i == len(starts) or starts[i] - ends[i - 1] > gap or ends[i] - starts[first] > _SPAN:
                found.append(range(first, i))
                first = i
        return found

    def span(self, run: range) -> tuple[int, int]:
        """Return the byte range of a run."""
        rows = slice(run.start, run.stop)
        return min(map(min, self.starts[rows])), max(map(max, self.stops[rows]))


class MemberReader:
    """Reader of the ``tile``, ``expr`` and ``json`` members of a set's records.

    Parameters
    ----------
    files
        The files of the set.
    manifest
        Manifest of the set.
    """

    def __init__(self, files: SetFiles, manifest: Manifest) -> None:
        self.files, self.manifest = files, manifest
        self._extensions = (record.CODECS[manifest.tile.codec], "expr", "json")
        self._index: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._starts = np.array([s.first_spot for s in manifest.shards], np.int64)
        self._refetched: set[int] = set()
        self._unavailable: dict[int, ShardError] = {}

    @cached_property
    def _crcs(self) -> np.ndarray:
        return spots.read_crcs(*self.spots_table())

    def spots_table(self) -> tuple[bytes, int, str]:
        """Return the content of the spot table, the number of spots, and the name of the table.

        Raises
        ------
        ShardError
            As for :meth:`.SetFiles.verified`.
        """
        manifest = self.manifest
        data = self.files.verified(manifest.spots_file, manifest.spots_sha256, "the spot table", "spots")
        return data, manifest.n_spots, f"{self.files.name}/{manifest.spots_file}"

    def shard_numbers(self, index: np.ndarray) -> np.ndarray:
        """Return, for each spot, the index of its shard in the manifest."""
        return np.searchsorted(self._starts, index, side="right") - 1

    def shard_of(self, spot: int) -> ShardEntry:
        """Return the shard that holds a spot."""
        return self.manifest.shards[int(self.shard_numbers(np.array(spot)))]

    def where(self, spot: int) -> str:
        """Return the name of a record for error messages: shard and key."""
        return f"{self.files.name}/{self.shard_of(spot).file}: record {record.key_of(spot)}"

    def member_ranges(self, shard: ShardEntry) -> tuple[np.ndarray, np.ndarray]:
        """Return the offsets and sizes of a shard's members, each int64 (records, 3); raises ShardError for a damaged index."""
        if shard.index not in self._index:
            text = self.files.verified(shard.index, shard.index_sha256, "the index", "index")
            name, tile = f"{self.files.name}/{shard.index}", self.manifest.tile
            self._index[shard.index] = parse_index(text, shard, tile.codec, tile.px, name)
        return self._index[shard.index]

    def read(self, index: np.ndarray, parts: Sequence[str]) -> list[list[bytes]]:
        """Read members of records.

        Parameters
        ----------
        index
            int64 (n,), spot indices.
        parts
            Members to read; the members of one record are read in one request.

        Returns
        -------
        For each of ``parts``, the n members in the order of ``index``.

        Raises
        ------
        ShardError
            A shard is missing, truncated or unreadable, a checksum does not match, or a server fails.
        """
        columns = [record.PARTS.index(part) for part in parts]
        out: list[list[bytes]] = [[b""] * index.size for _ in columns]
        order = np.argsort(index, kind="stable")
        shard = self.shard_numbers(index[order])
        by_shard = np.split(order, np.flatnonzero(np.diff(shard)) + 1) if index.size else []

        def read_shard(own: np.ndarray) -> None:
            self._read_shard(int(self.shard_numbers(index[own[0]])), index[own], own, columns, out)

        if self.files.remote is None or len(by_shard) < 2:
            for own in by_shard:
                read_shard(own)
            return out
        _ = self._crcs  # read once, before the threads
        threads = min(_SHARDS_AT_ONCE, len(by_shard))
        with ThreadPoolExecutor(threads, thread_name_prefix="comtip-shards") as pool:
            list(pool.map(read_shard, by_shard))
        return out

    def fetch(self, number: int) -> None:
        """Fetch a remote shard into the cache ahead of its use. Errors are not raised here, but when the shard is read."""
        shard = self.manifest.shards[number]
        try:
            self.files.path(shard.index, shard.index_sha256)
            self.files.path(shard.file, shard.sha256, shard.bytes)
        except ShardError:
            return

    def _read_shard(
        self, number: int, index: np.ndarray, into: np.ndarray, columns: list[int], out: list[list[bytes]]
    ) -> None:
        """Read members of ascending spots of one shard into ``out[...][into]``."""
        shard = self.manifest.shards[number]
        try:
            self._read_file(number, shard, index, into, columns, out)
        except ShardError as error:
            # The cached copy of a remote shard may have been damaged since it was checked: fetch it again, once.
            damaged = error.kind in ("checksum", "truncated") and number not in self._unavailable
            if not damaged or number in self._refetched or not self.files.forget(shard.sha256):
                raise
            self._refetched.add(number)
            self._read_file(number, shard, index, into, columns, out)

    def _ranges_of(self, number: int, shard: ShardEntry) -> tuple[np.ndarray, np.ndarray]:
        if number in self._unavailable:
            raise self._unavailable[number]  # do not wait for the server again
        try:
            return self.member_ranges(shard)
        except ShardError as error:
            self._unavailable[number] = error
            raise

    def _read_file(
        self,
        number: int,
        shard: ShardEntry,
        index: np.ndarray,
        into: np.ndarray,
        columns: list[int],
        out: list[list[bytes]],
    ) -> None:
        try:
            offsets, sizes = self._ranges_of(number, shard)
            local = (index - shard.first_spot)[:, None]
            start = offsets[local, columns]
            stop, crc = start + sizes[local, columns], self._crcs[index[:, None], columns]
            # A run is a few records: lists are faster than small arrays.
            members = _Members(start.tolist(), stop.tolist(), crc.tolist(), into.tolist())
            runs = members.runs(_GAP if 0 in columns else _GAP_WITHOUT_TILES)
            spans = [members.span(run) for run in runs]
            for run, span, data in zip(runs, spans, self._spans(number, shard, spans), strict=True):
                self._split(data, span[0], run, members, index, columns, out)
        except OSError as error:
            raise ShardError(
                f"{self.files.name}/{shard.file}: cannot be read ({error}); check its permissions and the disk, or copy the shard again",
                kind="unreadable",
            ) from error

    def _spans(self, number: int, shard: ShardEntry, spans: list[tuple[int, int]]) -> Iterator[bytes]:
        try:
            yield from self.files.read_spans(shard.file, shard.sha256, shard.bytes, spans)
        except ShardError as error:
            self._unavailable[number] = error
            raise

    def _split(
        self,
        data: bytes,
        base: int,
        run: range,
        members: _Members,
        index: np.ndarray,
        columns: list[int],
        out: list[list[bytes]],
    ) -> None:
        """Cut the members of one run out of ``data``, the bytes of the run from offset ``base``, and check their CRC-32."""
        for i in run:
            row = members.rows[i]
            ranges = zip(members.starts[i], members.stops[i], members.crcs[i], strict=True)
            for k, (start, stop, crc) in enumerate(ranges):
                member = data[start - base : stop - base]
                short = len(member) != stop - start
                if short or zlib.crc32(member) != crc:
                    name = f"{self.where(int(index[i]))}: the member .{self._extensions[columns[k]]}"
                    raise self._damaged(name, short)
                out[k][row] = member

    def _damaged(self, name: str, short: bool) -> ShardError:
        fix = self.files.again("the shard")
        if short:
            return ShardError(f"{name} extends beyond the end of the shard; {fix}", kind="truncated")
        return ShardError(f"{name} does not match its CRC-32; {fix}", kind="checksum")
