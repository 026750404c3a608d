"""Encoding of one record: tile, raw counts and metadata. FORMAT.md defines the bytes."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from comtip_shards.errors import ShardError
from comtip_shards.names import FOREIGN

EXPR_MAGIC = b"CTX2"
_HEAD = 16
_PNG_RGB8 = b"\x08\x02"
"""Bit depth and colour type in the header of a PNG."""
CODECS = {"jpeg": "jpg", "png": "png", "webp": "webp"}
"""{codec: extension of the tar member}."""
PARTS = ("tile", "expr", "json")
"""The members of a record, in the order of the tar."""
MAX_MEMBER_BYTES = 64 * 2**20
"""Maximum size of any member."""
MAX_TEXT, MAX_PX = 4096, 1e12
"""Maximum length of a spot id or label, in characters; largest position, in px."""
_REQUIRED = {"section_id": str, "spot_id": str, "source_row": int, "x_px": float, "y_px": float}
_FIELDS = _REQUIRED | {"array_x": float, "array_y": float, "label": str, "n_pooled": int}


def members_of(spot_index: int, codec: str) -> tuple[str, str, str]:
    """Return the names of a record's three members, in the order of the tar."""
    key = key_of(spot_index)
    return f"{key}.{CODECS[codec]}", f"{key}.expr", f"{key}.json"


def key_of(spot_index: int) -> str:
    """Return a record's key: its spot index in nine digits."""
    return f"{spot_index:09d}"


def encode_expr(rows: np.ndarray, counts: np.ndarray) -> bytes:
    """Encode one spot's non-zero counts, in about two bytes per gene, as FORMAT.md defines for ``.expr``.

    Parameters
    ----------
    rows
        (n,) integers, gene rows, strictly ascending.
    counts
        (n,) integers, 1 to 2**31 - 1.
    """
    rows, counts = np.asarray(rows, np.int64), np.asarray(counts, np.int64)
    gaps = np.diff(rows, prepend=-1) - 1
    # A gap is as many bytes of 255 as fit into it, then one byte below 255.
    full, rest = gaps // 255, gaps % 255
    gap_bytes = np.full(int(full.sum()) + rows.size, 255, np.uint8)
    gap_bytes[np.cumsum(full + 1) - 1] = rest
    large = counts > 255
    head = EXPR_MAGIC + struct.pack("<III", rows.size, gap_bytes.size, int(large.sum()))
    small = np.where(large, 255, counts - 1).astype(np.uint8)
    return head + counts[large].astype("<u4").tobytes() + gap_bytes.tobytes() + small.tobytes()


def decode_expr(data: bytes, n_genes: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Decode the counts of one spot: (gene rows, counts), each int32 (n,); raises the errors of :func:`decode_exprs`."""
    _, rows, counts = decode_exprs([data], n_genes, lambda _: where)
    return rows, counts


def decode_exprs(
    records: Sequence[bytes], n_genes: int, where: Callable[[int], str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decode the counts of B spots at once, without a Python loop over genes.

    Parameters
    ----------
    records
        B ``.expr`` members.
    n_genes
        Number of rows of the gene table.
    where
        Returns the name of record i for an error message.

    Returns
    -------
    indptr, rows, counts
        int64 (B + 1,), int32 (nnz,), int32 (nnz,): a CSR matrix of B x n_genes.

    Raises
    ------
    ShardError
        Of kind ``counts``: a record differs from what :func:`encode_expr` writes; the message names one such record.
    """
    B = len(records)
    sizes = np.fromiter((len(r) for r in records), np.int64, B)
    short = np.flatnonzero(sizes < _HEAD)
    if short.size:
        raise _not_counts(where(int(short[0])))
    flat = np.frombuffer(b"".join(records), np.uint8)
    start = np.cumsum(sizes) - sizes
    head = flat[start[:, None] + np.arange(_HEAD)].view("<u4").reshape(B, 4).astype(np.int64)
    wrong = np.flatnonzero(head[:, 0] != int.from_bytes(EXPR_MAGIC, "little"))
    if wrong.size:
        raise _not_counts(where(int(wrong[0])))
    n, n_gap, n_large = head[:, 1], head[:, 2], head[:, 3]
    expected = _HEAD + 4 * n_large + n_gap + n
    wrong = np.flatnonzero(sizes != expected)
    if wrong.size:
        i = int(wrong[0])
        raise ShardError(
            f"{where(i)}.expr: {sizes[i]} bytes for {n[i]} genes, expected {expected[i]}; {FOREIGN}", kind="counts"
        )
    gap_start = _HEAD + 4 * n_large
    large = _cut(records, np.full(B, _HEAD), gap_start).view("<u4")
    rows = _decode_rows(_cut(records, gap_start, gap_start + n_gap), n, n_gap, n_genes, where)
    counts = _decode_counts(_cut(records, gap_start + n_gap, sizes), large, n, n_large, where)
    return np.concatenate([[0], np.cumsum(n)]), rows, counts


def _not_counts(where: str) -> ShardError:
    return ShardError(
        f"{where}.expr: not a count record, which begins with {EXPR_MAGIC.decode()}; {FOREIGN}", kind="counts"
    )


def _cut(records: Sequence[bytes], start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Return ``record[start:stop]`` of all records, concatenated: uint8."""
    parts = [r[a:b] for r, a, b in zip(records, start.tolist(), stop.tolist(), strict=True)]
    return np.frombuffer(b"".join(parts), np.uint8)


def _per_record(positions: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return how many ``positions`` (indices into the concatenated records) are in each record; record i has ``size[i]`` entries."""
    return np.bincount(np.searchsorted(np.cumsum(size), positions, side="right"), minlength=size.size)


def _decode_rows(
    gaps: np.ndarray, n: np.ndarray, n_gap: np.ndarray, n_genes: int, where: Callable[[int], str]
) -> np.ndarray:
    ends = np.cumsum(n_gap)
    full = np.flatnonzero(gaps == 255)  # does not end a gap
    open_end = n_gap > 0
    open_end[open_end] = gaps[ends[open_end] - 1] == 255
    wrong = np.flatnonzero((n_gap - _per_record(full, n_gap) != n) | open_end)
    if wrong.size:
        raise ShardError(
            f"{where(int(wrong[0]))}.expr: the gaps do not match the number of genes that the record states; {FOREIGN}",
            kind="counts",
        )
    # The last byte of a gap also encodes its gene: the cumulative sum up to it is the gene's row plus one.
    steps = gaps.astype(np.int64)
    steps += 1
    steps[full] = 255
    total = np.cumsum(steps)
    before = np.concatenate([[0], total])[ends - n_gap]
    rows = (np.delete(total, full) if full.size else total) - np.repeat(before + 1, n)
    last = np.cumsum(n)[n > 0] - 1
    if last.size and rows[last].max() >= n_genes:
        i = int(np.flatnonzero(n > 0)[int(np.flatnonzero(rows[last] >= n_genes)[0])])
        raise ShardError(f"{where(i)}.expr: gene rows must be below {n_genes}; {FOREIGN}", kind="counts")
    out: np.ndarray = rows.astype(np.int32)
    return out


def _decode_counts(
    small: np.ndarray, large: np.ndarray, n: np.ndarray, n_large: np.ndarray, where: Callable[[int], str]
) -> np.ndarray:
    elsewhere = np.flatnonzero(small == 255)
    wrong = np.flatnonzero(_per_record(elsewhere, n) != n_large)
    if not wrong.size and large.size:
        bad = np.flatnonzero((large <= 255) | (large > np.iinfo(np.int32).max))
        wrong = np.flatnonzero(_per_record(bad, n_large))
    if wrong.size:
        raise ShardError(
            f"{where(int(wrong[0]))}.expr: the counts above 255 are not as many as the record states, or one of them is outside 256 to "
            f"2,147,483,647; {FOREIGN}",
            kind="counts",
        )
    counts = small.astype(np.int32) + np.int32(1)
    counts[elsewhere] = large.astype(np.int32)
    return counts


def encode_tile(tile_SS3: np.ndarray, codec: str, quality: int) -> bytes:
    """Encode one tile, uint8 (S, S, 3); ``quality`` (1 to 100) is ignored for ``png``."""
    out = io.BytesIO()
    by_codec: dict[str, dict[str, Any]] = {
        "jpeg": {"quality": quality, "subsampling": 0, "optimize": True},  # optimize: same pixels, fewer bytes
        "png": {"optimize": True},
        "webp": {"quality": quality, "method": 4},
    }
    Image.fromarray(tile_SS3).save(out, codec.upper(), **by_codec[codec])
    return out.getvalue()


def decode_tile(data: bytes, px: int, codec: str, where: str) -> np.ndarray:
    """Decode one tile to uint8 (S, S, 3); its size is checked before its pixels are decoded.

    Raises
    ------
    ShardError
        Of kind ``tile``: the tile cannot be decoded, or is not one RGB image of 8 bits and px x px.
    """
    try:
        with Image.open(io.BytesIO(data), formats=[codec.upper()]) as image:
            if image.size != (px, px):
                raise ShardError(
                    f"{where}: the tile is {image.width} x {image.height} px, but the manifest states {px} x {px}; {FOREIGN}",
                    kind="tile",
                )
            # Pillow silently converts 16 bits to 8; other decoders do not.
            deep = codec == "png" and data[24:26] != _PNG_RGB8
            if image.mode != "RGB" or deep or getattr(image, "n_frames", 1) != 1:
                raise ShardError(f"{where}: the tile is not a single RGB image of 8 bits; {FOREIGN}", kind="tile")
            return np.asarray(image)
    except ShardError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds of errors on damaged bytes
        raise ShardError(
            f"{where}: the tile cannot be decoded ({type(error).__name__}: {error}); {FOREIGN}", kind="tile"
        ) from error


def encode_json(meta: dict[str, Any]) -> bytes:
    """Encode a spot's metadata: sorted keys, no spaces, so that equal content gives equal bytes."""
    return json.dumps(meta, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def decode_json(data: bytes, where: str) -> dict[str, Any]:
    """Decode a spot's metadata.

    Raises
    ------
    ShardError
        Of kind ``spot``: not JSON, or a field is missing, unknown or invalid.
    """
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{where}.json: not JSON ({error}); {FOREIGN}", kind="spot") from error
    if not isinstance(meta, dict):
        raise ShardError(f"{where}.json: not a JSON object; {FOREIGN}", kind="spot")
    missing = set(_REQUIRED) - set(meta)
    if missing:
        raise ShardError(f"{where}.json: missing {', '.join(sorted(missing))}; {FOREIGN}", kind="spot")
    for name, value in meta.items():
        if not _is_field(name, value):
            raise ShardError(
                f"{where}.json: {name[:40]!r} is {str(value)[:40]!r}, which no build writes; {FOREIGN}", kind="spot"
            )
    return dict(meta)


def _is_field(name: str, value: object) -> bool:
    """Return whether a field of a spot's metadata is known and has a valid value."""
    kind = _FIELDS.get(name)
    if kind is str:
        return isinstance(value, str) and len(value) <= MAX_TEXT
    if isinstance(value, bool) or kind is None:
        return False
    if kind is int:
        return isinstance(value, int) and 0 <= value < 2**63
    return isinstance(value, (int, float)) and abs(value) < MAX_PX
