"""One record: a tile, raw counts, and where it is. FORMAT.md defines the bytes."""

from __future__ import annotations

import io
import json
import struct
from typing import Any

import numpy as np
from PIL import Image

from comtip_shards.errors import ShardError

EXPR_MAGIC = b"CTX1"
CODECS = {"jpeg": "jpg", "png": "png", "webp": "webp"}
"""Codec -> extension of the tar member."""
MAX_MEMBER_BYTES = 64 * 2**20


def key_of(spot_index: int) -> str:
    """Return a record's key: its spot index in nine digits."""
    return f"{spot_index:09d}"


def encode_expr(rows: np.ndarray, counts: np.ndarray) -> bytes:
    """Encode one spot's non-zero counts: magic, number, gene rows (ascending), counts; uint32 little endian."""
    head = EXPR_MAGIC + struct.pack("<I", len(rows))
    return head + np.ascontiguousarray(rows, "<u4").tobytes() + np.ascontiguousarray(counts, "<u4").tobytes()


def decode_expr(data: bytes, n_genes: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (gene rows, counts) as int32; refuses anything that :func:`encode_expr` would not write."""
    if len(data) < 8 or data[:4] != EXPR_MAGIC:
        raise ShardError(f"{where}.expr: not a count record (CTX1)")
    (n,) = struct.unpack_from("<I", data, 4)
    if len(data) != 8 + 8 * n:
        raise ShardError(f"{where}.expr: {len(data)} bytes for {n} genes, expected {8 + 8 * n}")
    both = np.frombuffer(data, "<u4", offset=8).astype(np.int64)
    rows, counts = both[:n], both[n:]
    if n and (rows[-1] >= n_genes or (np.diff(rows) <= 0).any()):
        raise ShardError(f"{where}.expr: gene rows must ascend and stay under {n_genes}")
    if n and (counts.min() == 0 or counts.max() > np.iinfo(np.int32).max):
        raise ShardError(f"{where}.expr: counts must be 1 to 2,147,483,647")
    return rows.astype(np.int32), counts.astype(np.int32)


def encode_tile(tile_SS3: np.ndarray, codec: str, quality: int) -> bytes:
    """Encode one tile, uint8 (S, S, 3)."""
    out = io.BytesIO()
    by_codec: dict[str, dict[str, Any]] = {
        "jpeg": {"quality": quality, "subsampling": 0},
        "png": {"optimize": True},
        "webp": {"quality": quality, "method": 4},
    }
    Image.fromarray(tile_SS3).save(out, codec.upper(), **by_codec[codec])
    return out.getvalue()


def decode_tile(data: bytes, px: int, codec: str, where: str) -> np.ndarray:
    """Decode one tile to uint8 (S, S, 3); its size is checked before its pixels are decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=[codec.upper()]) as image:
            if image.size != (px, px):
                raise ShardError(
                    f"{where}: the tile is {image.width} x {image.height} px, the manifest says {px} x {px}"
                )
            return np.asarray(image.convert("RGB"))
    except ShardError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds on damaged bytes
        raise ShardError(f"{where}: the tile cannot be decoded ({type(error).__name__}: {error})") from error


def encode_json(meta: dict[str, Any]) -> bytes:
    """Encode a spot's metadata: sorted keys, no spaces, so that bytes are a function of content."""
    return json.dumps(meta, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def decode_json(data: bytes, where: str) -> dict[str, Any]:
    """Decode a spot's metadata."""
    try:
        meta = json.loads(data)
    except ValueError as error:
        raise ShardError(f"{where}.json: not JSON ({error})") from error
    missing = {"section_id", "spot_id", "x_px", "y_px"} - set(meta) if isinstance(meta, dict) else {"everything"}
    if missing:
        raise ShardError(f"{where}.json: lacks {', '.join(sorted(missing))}")
    return dict(meta)
