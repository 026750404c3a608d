"""Index of a shard in DALI's text format, with which DALI's reader opens the shard without scanning it.

One line ``v1.2 N``, then one line per record with extension, offset, size and name of each member.
"""

from __future__ import annotations

import numpy as np

from comtip_shards.errors import ShardError
from comtip_shards.format.manifest import TAR_BLOCK, ShardEntry
from comtip_shards.format.record import MAX_MEMBER_BYTES, PARTS, members_of
from comtip_shards.names import FOREIGN

INDEX_VERSION = "v1.2"


MAX_TILE_BYTES, MAX_JSON_BYTES = 4 * 2**20, 2**20
"""Maximum sizes in bytes: of an encoded tile, which may take 8 bytes per pixel more (raw pixels take 3), and of a ``.json`` member.
Both are below ``MAX_MEMBER_BYTES``, because a batch holds many of them."""


def index_text(first_spot: int, codec: str, offsets: np.ndarray, sizes: np.ndarray) -> str:
    """Return the text of an index.

    Parameters
    ----------
    first_spot
        Spot index of the first record.
    codec
        Codec of the tiles.
    offsets, sizes
        int64 (n, 3): offset and size in bytes of each member's data.
    """
    lines = [f"{INDEX_VERSION} {len(offsets)}\n"]
    for i, (starts, lengths) in enumerate(zip(offsets.tolist(), sizes.tolist(), strict=True)):
        names = members_of(first_spot + i, codec)
        fields = [f"{n[n.index('.') + 1 :]} {o} {s} {n}" for n, o, s in zip(names, starts, lengths, strict=True)]
        lines.append(" ".join(fields) + "\n")
    return "".join(lines)


def parse_index(text: bytes, shard: ShardEntry, codec: str, px: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Parse an index; anything that :func:`index_text` would not write is refused.

    Parameters
    ----------
    text
        Content of the index file.
    shard, codec, px
        Entry of the shard, codec, and tile width in px, from the manifest.
    where
        Name of the index for error messages.

    Returns
    -------
    offsets, sizes
        int64 (n, 3).

    Raises
    ------
    ShardError
        The index is damaged or belongs to another shard; the message names the index.
    """
    head, _, body = text.partition(b"\n")
    if head != f"{INDEX_VERSION} {shard.records}".encode():
        raise ShardError(
            f"{where}: not an index of version {INDEX_VERSION} with {shard.records} records; {FOREIGN}", kind="index"
        )
    fields = body.split()
    expected = shard.records * 4 * len(PARTS)
    if len(fields) != expected:
        raise ShardError(
            f"{where}: {len(fields)} fields for {shard.records} records, expected {expected}; {FOREIGN}", kind="index"
        )
    table = np.array(fields, dtype=object).reshape(shard.records, len(PARTS), 4)
    try:
        offsets, sizes = table[..., 1].astype(np.int64), table[..., 2].astype(np.int64)
    except (ValueError, OverflowError) as error:
        raise ShardError(f"{where}: an offset or a size is not a number; {FOREIGN}", kind="index") from error
    ends = (offsets + sizes).ravel()
    disjoint = np.all(offsets.ravel()[1:] >= ends[:-1])
    if (
        not disjoint
        or offsets[0, 0] < TAR_BLOCK
        or sizes.min() < 0
        or sizes.max() > MAX_MEMBER_BYTES
        or ends[-1] > shard.bytes
    ):
        raise ShardError(f"{where}: members overlap or extend beyond the shard; {FOREIGN}", kind="index")
    if sizes[:, 0].max() > MAX_TILE_BYTES + 8 * px * px or sizes[:, 2].max() > MAX_JSON_BYTES:
        raise ShardError(
            f"{where}: a member has {max(sizes[:, 0].max(), sizes[:, 2].max())} bytes, more than the tile (at most "
            f"{MAX_TILE_BYTES + 8 * px * px}) or .json (at most {MAX_JSON_BYTES}) of a record can have; {FOREIGN}",
            kind="index",
        )
    if index_text(shard.first_spot, codec, offsets, sizes).encode() != text:
        raise ShardError(f"{where}: member names do not match the records; {FOREIGN}", kind="index")
    return offsets, sizes
