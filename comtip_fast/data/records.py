"""SpotReader of a batch, read in big runs; a damaged one is known by its place and can be replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from comtip_shards import ShardError, ShardSet
from comtip_shards.format import record
from scipy import sparse

Csr = tuple[np.ndarray, np.ndarray, np.ndarray]
"""indptr int64 (b + 1,), gene rows int32 (nnz,), counts int32 (nnz,)."""


@dataclass
class EncodedSpots:
    """SpotReader of b spots as they lie in their shards."""

    spots: np.ndarray
    """int64 (b,)."""
    tiles: list[bytes]
    """EncodedSpots tiles; what is damaged is empty."""
    exprs: list[bytes]
    """Members ``.expr``; none where counts are not wanted."""
    csr: Csr | None
    """The counts, where every record is whole."""
    faults: dict[int, ShardError]
    """What is wrong with which of them, by place."""


@dataclass
class DecodedSpots:
    """Decoded records of b spots."""

    encoded: EncodedSpots
    tiles_NSS3: np.ndarray
    """uint8 (b, S, S, 3); what a damaged record leaves there means nothing."""
    replaced: dict[int, ShardError] = field(default_factory=dict)
    """DecodedSpots whose places others took, and why."""

    @property
    def spots(self) -> np.ndarray:
        """int64 (b,)."""
        return self.encoded.spots

    @property
    def faults(self) -> dict[int, ShardError]:
        """What is wrong with which of them, by place."""
        return self.encoded.faults

    def refuse_faults(self) -> None:
        """Raise the first fault."""
        for _, error in sorted(self.faults.items()):
            raise error

    def put(self, place: int, other: DecodedSpots) -> bool:
        """Let one whole record stand in for a damaged one; tell whether ``other`` was whole."""
        if other.faults:
            return False
        self.replaced[int(self.spots[place])] = self.faults.pop(place)
        self.spots[place], self.tiles_NSS3[place] = other.spots[0], other.tiles_NSS3[0]
        if self.encoded.exprs:
            self.encoded.exprs[place], self.encoded.csr = other.encoded.exprs[0], None
        return True


class SpotReader:
    """Reads and decodes records of a shard set, with Pillow.

    Parameters
    ----------
    shards
        The set.
    with_counts
        Read the counts too.
    """

    def __init__(self, shards: ShardSet, *, with_counts: bool) -> None:
        self.shards, self.with_counts = shards, with_counts

    def fetch(self, spots: np.ndarray) -> EncodedSpots:
        """Read records without decoding their tiles; counts are decoded, which also checks them."""
        got = EncodedSpots(np.array(spots, np.int64), [], [], None, {})
        if self.with_counts:
            try:
                got.tiles, got.exprs = self.shards.members_of(got.spots, ("tile", "expr"))
                got.csr = self._decode_exprs(got.exprs, got.spots)
                return got
            except ShardError:  # below, each is read by itself, to know which are whole
                pass
        got.tiles = _each(got, lambda own: self.shards.members(own, "tile"))
        if self.with_counts:
            self._fetch_counts(got)
        return got

    def read(self, spots: np.ndarray) -> DecodedSpots:
        """Read and decode records."""
        return self.decode(self.fetch(spots))

    def decode(self, got: EncodedSpots) -> DecodedSpots:
        """Decode tiles; their size is checked before their pixels are."""
        tile = self.shards.manifest.tile
        out = np.empty((got.spots.size, tile.px, tile.px, 3), np.uint8)
        for i, data in enumerate(got.tiles):
            if i in got.faults:
                continue
            try:
                out[i] = record.decode_tile(data, tile.px, tile.codec, self.shards.where(int(got.spots[i])))
            except ShardError as error:
                got.faults[i] = error
        return DecodedSpots(got, out)

    def csr(self, got: EncodedSpots) -> Csr:
        """Return the counts of whole records."""
        if got.csr is None:
            got.csr = self._decode_exprs(got.exprs, got.spots)
        return got.csr

    def counts(self, spots: np.ndarray) -> tuple[sparse.csr_matrix, dict[int, ShardError]]:
        """Return raw counts of the whole records among ``spots``, int32 CSR, and what is wrong with the others, by place."""
        got = EncodedSpots(np.array(spots, np.int64), [], [], None, {})
        self._fetch_counts(got)
        got.exprs = [e for i, e in enumerate(got.exprs) if i not in got.faults]
        indptr, rows, counts = self.csr(got)
        shape = (len(got.exprs), self.shards.manifest.n_genes)
        return sparse.csr_matrix((counts, rows, indptr), shape=shape, dtype=np.int32), got.faults

    def _fetch_counts(self, got: EncodedSpots) -> None:
        def read(own: np.ndarray) -> list[bytes]:
            exprs = self.shards.members(own, "expr")
            csr = self._decode_exprs(exprs, own)
            if own.size == got.spots.size:
                got.csr = csr
            return exprs

        got.exprs = _each(got, read)

    def _decode_exprs(self, exprs: list[bytes], spots: np.ndarray) -> Csr:
        return record.decode_exprs(exprs, self.shards.manifest.n_genes, lambda i: self.shards.where(int(spots[i])))


def _each(got: EncodedSpots, read: Callable[[np.ndarray], list[bytes]]) -> list[bytes]:
    """Read all at once; where that fails, one by one, to know which are whole."""
    try:
        return read(got.spots)
    except ShardError:
        out = []
        for i in range(got.spots.size):
            try:
                out += read(got.spots[i : i + 1])
            except ShardError as error:
                out.append(b"")
                got.faults.setdefault(i, error)
        return out
