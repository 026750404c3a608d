"""``manifest.json``: what a shard set holds, typed, hashed, and validated when it is read."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from comtip_shards.errors import ShardError
from comtip_shards.record import CODECS
from comtip_shards.tiles import StainStats

FORMAT, VERSION = "comtip-shards", 1
NAME = "manifest.json"


@dataclass(frozen=True)
class TileSpec:
    """How tiles were cut."""

    px: int
    um: float
    min_mpp: float
    codec: str
    quality: int


@dataclass(frozen=True)
class GeneRow:
    """One gene of the gene table."""

    key: str
    species: str
    symbol: str
    ensembl: str
    name: str


@dataclass(frozen=True)
class Overview:
    """A small picture of the whole section, for reports."""

    file: str
    sha256: str
    um_per_px: float
    width: int
    height: int


@dataclass(frozen=True)
class ManifestSection:
    """One section: where it is from, what it measured, which spots are its."""

    section_id: str
    dataset: str
    species: str
    tissue: str
    donor: str
    platform: str
    licence: str
    attribution: str
    mpp: float
    spot_diameter_um: float
    spot_pitch_um: float
    split: str
    n_spots: int
    first_spot: int
    n_assay_genes: int
    assay_genes: str
    """Base64 of a bitset over the gene table, first gene in the highest bit of the first byte."""
    stain: StainStats
    overview: Overview
    source: dict[str, Any] = field(default_factory=dict)
    """What the build counted: spots dropped, genes not mapped, genes summed, notes."""
    pooling: str = ""
    """How bins, cells or transcripts became spots; empty where the spots are those of the slide."""


@dataclass(frozen=True)
class ShardEntry:
    """One tar file."""

    file: str
    sha256: str
    bytes: int
    records: int
    first_spot: int
    section_id: str


@dataclass(frozen=True)
class Manifest:
    """A whole shard set."""

    tile: TileSpec
    genes_file: str
    genes_sha256: str
    n_genes: int
    n_spots: int
    sections: list[ManifestSection]
    shards: list[ShardEntry]
    fingerprint: str
    """Hash of the inputs and settings it was built from."""
    format: str = FORMAT
    version: int = VERSION

    def to_json(self) -> str:
        """Return the text of the file."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read and validate ``folder/manifest.json``.

    Raises
    ------
    ShardError
        There is none, or it is of another version, or it does not hold together.
    """
    path = folder / NAME
    if not path.is_file():
        raise ShardError(f"{folder}: no {NAME}; give the folder that `comtip shards build --out` wrote")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ShardError(f"{path}: not JSON ({error}); build the set again") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ShardError(f"{path}: not the manifest of a shard set")
    if data.get("version") != VERSION:
        raise ShardError(
            f"{path}: format version {data.get('version')!r}, this package reads {VERSION}; build the set again"
        )
    try:
        manifest = _build(data)
    except (TypeError, KeyError, ValueError) as error:
        raise ShardError(f"{path}: {error}") from error
    _check(manifest, path)
    return manifest


def _build(data: dict[str, Any]) -> Manifest:
    sections = [
        ManifestSection(
            **{
                **s,
                "stain": StainStats(tuple(s["stain"]["od_mean"]), tuple(s["stain"]["od_std"])),
                "overview": _typed(Overview, s["overview"]),
            }
        )
        for s in data["sections"]
    ]
    rest = {k: data[k] for k in ("genes_file", "genes_sha256", "n_genes", "n_spots", "fingerprint")}
    return Manifest(
        tile=_typed(TileSpec, data["tile"]),
        sections=sections,
        shards=[_typed(ShardEntry, s) for s in data["shards"]],
        **rest,
    )


def _typed(cls: type, data: dict[str, Any]) -> Any:
    names = {f.name for f in fields(cls)}
    if set(data) != names:
        raise ValueError(f"{cls.__name__} has the fields {sorted(data)}, expected {sorted(names)}")
    return cls(**data)


def _check(manifest: Manifest, path: Path) -> None:
    if manifest.tile.codec not in CODECS or not 1 <= manifest.tile.px <= 4096:
        raise ShardError(f"{path}: tiles of {manifest.tile.px} px in {manifest.tile.codec!r} are not understood")
    names = [s.file for s in manifest.shards] + [s.overview.file for s in manifest.sections] + [manifest.genes_file]
    for name in names:
        parts = PurePosixPath(name).parts
        if PurePosixPath(name).is_absolute() or ".." in parts or not parts:
            raise ShardError(f"{path}: the file name {name!r} leaves the folder")
    for what, entries, size in (("sections", manifest.sections, "n_spots"), ("shards", manifest.shards, "records")):
        start = 0
        for entry in entries:
            if entry.first_spot != start:
                raise ShardError(f"{path}: {what} do not follow one another at spot {start}")
            start += getattr(entry, size)
        if start != manifest.n_spots:
            raise ShardError(f"{path}: {what} hold {start} spots, n_spots says {manifest.n_spots}")
    ids = [s.section_id for s in manifest.sections]
    if len(set(ids)) != len(ids):
        raise ShardError(f"{path}: a section stands twice")


def pack_bits(measured: np.ndarray) -> str:
    """Encode a boolean mask over the gene table."""
    return base64.b64encode(np.packbits(measured).tobytes()).decode("ascii")


def unpack_bits(text: str, n_genes: int) -> np.ndarray:
    """Decode :func:`pack_bits`."""
    raw = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if raw.size != (n_genes + 7) // 8:
        raise ShardError(f"assay_genes holds {raw.size} bytes, {(n_genes + 7) // 8} were expected")
    return np.unpackbits(raw, count=n_genes).astype(bool)


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
