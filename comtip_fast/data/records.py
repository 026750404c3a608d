"""Reading and decoding of the records of a batch; damaged records are reported by their index in the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from comtip_shards import ShardError, ShardSet
from comtip_shards.format.tile_decoder import TileDecoder
from scipy import sparse

Csr = tuple[np.ndarray, np.ndarray, np.ndarray]
"""indptr int64 (b + 1,), gene rows int32 (nnz,), counts int32 (nnz,)."""


@dataclass
class EncodedSpots:
    """Records of b spots as stored in their shards."""

    spots: np.ndarray
    """int64 (b,), indices of the spots."""
    tiles: list[bytes]
    """Encoded tiles; empty bytes where a tile could not be read."""
    exprs: list[bytes]
    """``.expr`` members, the encoded counts; empty bytes where counts could not be read or decoded. An empty list if counts are
    not read."""
    csr: Csr | None
    """Decoded counts of all records. None if counts are not read, if a record is damaged, or if a record was replaced and
    :meth:`SpotReader.csr` has not yet decoded the counts again."""
    faults: dict[int, ShardError]
    """Errors of the damaged records, by index in the batch."""


@dataclass
class DecodedSpots:
    """Records of b spots with decoded tiles."""

    encoded: EncodedSpots
    tiles_NSS3: np.ndarray
    """uint8 (b, S, S, 3), an array, or a tensor on the GPU that decoded the tiles; undefined for damaged records."""
    replaced: dict[int, ShardError] = field(default_factory=dict)
    """Errors of the damaged records that were replaced, by spot index."""

    @property
    def spots(self) -> np.ndarray:
        """int64 (b,), indices of the spots."""
        return self.encoded.spots

    @property
    def faults(self) -> dict[int, ShardError]:
        """Errors of the damaged records, by index in the batch."""
        return self.encoded.faults

    def raise_faults(self) -> None:
        """Raise the error of the first damaged record, if there is one."""
        if self.faults:
            raise self.faults[min(self.faults)]

    def replace(self, index: int, spare: DecodedSpots) -> bool:
        """Replace the damaged record ``index`` by the only record of ``spare``; if that one is damaged too, only return False."""
        if spare.faults:
            return False
        self.replaced[int(self.spots[index])] = self.faults.pop(index)
        self.spots[index], self.tiles_NSS3[index] = spare.spots[0], spare.tiles_NSS3[0]
        if self.encoded.exprs:
            self.encoded.exprs[index], self.encoded.csr = spare.encoded.exprs[0], None
        return True


class SpotReader:
    """Reads the records of a shard set; tiles are decoded with Pillow.

    Parameters
    ----------
    shards
        The shard set.
    with_counts
        Whether counts are read too.
    """

    def __init__(self, shards: ShardSet, *, with_counts: bool) -> None:
        self.shards, self.with_counts = shards, with_counts

    def fetch(self, spots: np.ndarray) -> EncodedSpots:
        """Read records without decoding their tiles; counts, if they are read, are decoded and thereby validated.

        Damaged records do not raise: their errors are in the result's ``faults``.
        """
        encoded = EncodedSpots(np.array(spots, np.int64), [], [], None, {})
        if self.with_counts:
            try:
                encoded.tiles, encoded.exprs = self.shards.members_of(encoded.spots, ("tile", "expr"))
                encoded.csr = self._decode_exprs(encoded.exprs, encoded.spots)
                return encoded
            except ShardError:  # read each record separately below, to find the damaged ones
                pass
        encoded.tiles = _read_members(encoded, lambda spots: self.shards.members(spots, "tile"))
        if self.with_counts:
            self._fetch_counts(encoded)
        return encoded

    def read(self, spots: np.ndarray) -> DecodedSpots:
        """Read records and decode their tiles; see :meth:`fetch` and :meth:`decode`."""
        return self.decode(self.fetch(spots))

    def decode(self, encoded: EncodedSpots) -> DecodedSpots:
        """Decode the tiles of undamaged records; a tile that cannot be decoded or has a wrong size becomes a fault."""
        tile = self.shards.manifest.tile
        out = np.empty((encoded.spots.size, tile.px, tile.px, 3), np.uint8)
        decoder = TileDecoder(tile.px, tile.codec)
        for i, data in enumerate(encoded.tiles):
            if i in encoded.faults:
                continue
            try:
                decoder.decode_into(out[i], data, partial(self.shards.where, int(encoded.spots[i])))
            except ShardError as error:
                encoded.faults[i] = error
        return DecodedSpots(encoded, out)

    def csr(self, encoded: EncodedSpots) -> Csr:
        """Return the counts of all records, decoded now if they are not yet; raise ShardError if a record is damaged."""
        if encoded.csr is None:
            encoded.csr = self._decode_exprs(encoded.exprs, encoded.spots)
        return encoded.csr

    def counts(self, spots: np.ndarray) -> tuple[sparse.csr_matrix, dict[int, ShardError]]:
        """Return the raw counts of the readable records, int32 CSR (n, genes), and the faults by index in ``spots``."""
        encoded = EncodedSpots(np.array(spots, np.int64), [], [], None, {})
        self._fetch_counts(encoded)
        # Of several sets, the set of a spot tells which genes its counts refer to.
        encoded.spots = np.delete(encoded.spots, [*encoded.faults])
        encoded.exprs = [e for i, e in enumerate(encoded.exprs) if i not in encoded.faults]
        indptr, rows, counts = self.csr(encoded)
        shape = (len(encoded.exprs), self.shards.manifest.n_genes)
        return sparse.csr_matrix((counts, rows, indptr), shape=shape, dtype=np.int32), encoded.faults

    def _fetch_counts(self, encoded: EncodedSpots) -> None:
        """Read and decode the counts of the spots, and record a fault for each damaged record."""

        def read(spots: np.ndarray) -> list[bytes]:
            exprs = self.shards.members(spots, "expr")
            csr = self._decode_exprs(exprs, spots)
            if spots.size == encoded.spots.size:
                encoded.csr = csr
            return exprs

        encoded.exprs = _read_members(encoded, read)

    def _decode_exprs(self, exprs: list[bytes], spots: np.ndarray) -> Csr:
        return self.shards.decode_counts(exprs, spots)


def _read_members(encoded: EncodedSpots, read: Callable[[np.ndarray], list[bytes]]) -> list[bytes]:
    """Read all members in one call; if it fails, read them one by one and record a fault for each damaged member."""
    try:
        return read(encoded.spots)
    except ShardError:
        out = []
        for i in range(encoded.spots.size):
            try:
                out += read(encoded.spots[i : i + 1])
            except ShardError as error:
                out.append(b"")
                encoded.faults.setdefault(i, error)
        return out
