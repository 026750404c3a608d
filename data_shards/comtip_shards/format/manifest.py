"""``manifest.json``: typed description of a shard set, hashed, and validated on reading."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from comtip_shards.errors import ShardError
from comtip_shards.format.record import CODECS
from comtip_shards.format.section_source import Text, check_source, strict
from comtip_shards.format.spot_table import FILE as SPOTS_FILE
from comtip_shards.names import FOREIGN, check_section_id, is_sha256, problem_with_file, same_file, shown
from comtip_shards.slides.tiles import StainStats
from comtip_shards.storage.regular_file import read_regular

FORMAT, VERSION = "comtip-shards", 2
NAME = "manifest.json"
REBUILD = "build the set again from its sources, into a new folder"
TAR_BLOCK = 512
GENES_FILE = "genes.tsv"
REPORT_FILE, REPORTS = "report.txt", "report"
MAX_SPOTS = 10**9
"""Maximum number of spots, because a record's key has nine digits."""
Um = Annotated[float, Field(gt=0, le=1e6)]
Index = Annotated[int, Field(ge=0, lt=MAX_SPOTS)]
Count = Annotated[int, Field(ge=1, le=MAX_SPOTS)]


@strict
@dataclass(frozen=True)
class TileSpec:
    """Settings with which tiles were cut."""

    px: Annotated[int, Field(ge=1, le=4096)]
    """Width and height in px."""
    um: Annotated[float, Field(gt=0, le=10_000)]
    """Width and height in um."""
    min_mpp: Annotated[float, Field(gt=0, le=100)]
    """um per px to which finer images were blurred."""
    codec: str
    """A key of :data:`comtip_shards.format.record.CODECS`."""
    quality: Annotated[int, Field(ge=1, le=100)]
    """Quality of ``jpeg`` and ``webp``."""


@dataclass(frozen=True)
class GeneRow:
    """One gene of the gene table."""

    key: str
    species: str
    symbol: str
    ensembl: str
    name: str


@strict
@dataclass(frozen=True)
class Overview:
    """A thumbnail of the whole section, for reports."""

    file: str
    sha256: str
    um_per_px: Um
    width: Annotated[int, Field(ge=1, le=4096)]
    height: Annotated[int, Field(ge=1, le=4096)]


@strict
@dataclass(frozen=True)
class ManifestSection:
    """One section: provenance, measured genes and range of spots; FORMAT.md defines the fields."""

    section_id: str
    dataset: Text
    species: Literal["human", "mouse"]
    tissue: Text
    donor: Text
    platform: Text
    licence: Text
    attribution: Text
    mpp: Annotated[float, Field(ge=0.05, le=50)]
    spot_diameter_um: Um
    spot_pitch_um: Um
    split: Literal["train", "val", "test", ""]
    n_spots: Count
    first_spot: Index
    n_assay_genes: int
    assay_genes: str
    """Base64 of a bitset over the gene table, first gene in the highest bit of the first byte."""
    stain: StainStats
    overview: Overview
    fingerprint: str
    """Hash of the section's inputs and build settings."""
    source: Annotated[dict[str, Any], AfterValidator(check_source)] = field(default_factory=dict)
    """Spots dropped, genes not mapped or summed, notes, results of the checks, and fingerprint of the content."""
    pooling: Text = ""
    """How bins, cells or transcripts were pooled to spots; empty if spots were not pooled."""


@strict
@dataclass(frozen=True)
class ShardEntry:
    """One tar file and its DALI index."""

    file: str
    sha256: str
    bytes: Annotated[int, Field(ge=1, lt=1 << 62)]
    index: str
    index_sha256: str
    records: Count
    first_spot: Index
    section_id: str


@strict
@dataclass(frozen=True)
class BuildPart:
    """Which part of a larger build this set is: ``--part index/of``."""

    index: Count
    of: Count
    sections: list[Index]
    """Position of each section in the complete build, from 0."""
    whole: str
    """Hash of all sections' metadata, shared by all parts of one build."""


@strict
@dataclass(frozen=True)
class Manifest:
    """Description of a complete shard set."""

    tile: TileSpec
    records_per_shard: Count
    genes_file: str
    genes_sha256: str
    n_genes: Annotated[int, Field(ge=0, le=10_000_000)]
    spots_file: str
    spots_sha256: str
    n_spots: Annotated[int, Field(ge=0, le=MAX_SPOTS)]
    sections: list[ManifestSection]
    shards: list[ShardEntry]
    fingerprint: str
    """Hash of the sections' fingerprints and ``records_per_shard``."""
    made_with: dict[str, str]
    """Versions on which the bytes depend."""
    part: BuildPart | None = None
    format: str = FORMAT
    version: int = VERSION
    digest: str = ""
    """SHA-256 over all other fields."""

    def to_json(self) -> str:
        """Return the content of the file, including the digest."""
        data = asdict(self)
        data["digest"] = digest_of(data)
        return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


_ADAPTER = TypeAdapter(Manifest)


def digest_of(data: dict[str, Any]) -> str:
    """Return the SHA-256 over all fields of a manifest except ``digest``: sorted keys, no spaces, UTF-8."""
    rest = {k: v for k, v in data.items() if k != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and validate ``folder/manifest.json``.

    Raises
    ------
    ShardError
        Of kind ``manifest``: the manifest is missing, cannot be read, has another version, or is damaged.
    """
    path = folder / NAME
    if not path.is_file():
        raise ShardError(f"{folder}: no {NAME}; give the folder that `comtip shards build` wrote", kind="manifest")
    try:
        return parse_manifest(read_regular(path), str(path))
    except OSError as error:
        fix = "change its permissions" if isinstance(error, PermissionError) else "copy it again"
        raise ShardError(f"{path}: cannot be read ({error.strerror}); {fix}", kind="manifest") from error


def parse_manifest(text: bytes, where: str) -> Manifest:
    """Parse and validate the bytes of a manifest; ``where`` is its name in error messages.

    Raises
    ------
    ShardError
        Of kind ``manifest``: not a manifest, another version, or damaged.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{where}: not JSON ({error}); copy it again, or {REBUILD}", kind="manifest") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ShardError(
            f"{where}: not the manifest of a shard set; give the folder that `comtip shards build` wrote",
            kind="manifest",
        )
    if data.get("version") != VERSION:
        raise ShardError(
            f"{where}: format version {data.get('version')!r} is not supported (expected {VERSION}); {REBUILD}",
            kind="manifest",
        )
    try:
        manifest = _ADAPTER.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field_name = ".".join(str(p) for p in first["loc"])
        raise ShardError(
            f"{where}: {field_name}: {first['msg']}; copy the manifest again, or {REBUILD}", kind="manifest"
        ) from error
    _check(manifest, where)
    if digest_of(data) != manifest.digest:
        raise ShardError(
            f"{where}: the digest does not match the content: the file is damaged or was edited by hand. Copy it again; to "
            "change a split or another fact, build again with the option for it",
            kind="manifest",
        )
    return manifest


def _check(manifest: Manifest, where: str) -> None:
    if manifest.tile.codec not in CODECS or not 1 <= manifest.tile.px <= 4096:
        raise ShardError(
            f"{where}: tiles of {manifest.tile.px} px with codec {manifest.tile.codec!r} are not supported; {FOREIGN}",
            kind="manifest",
        )
    _check_names(manifest, where)
    if not manifest.sections:
        raise ShardError(f"{where}: no sections; {FOREIGN}", kind="manifest")
    for what, entries, size in (("sections", manifest.sections, "n_spots"), ("shards", manifest.shards, "records")):
        start = 0
        for entry in entries:
            if entry.first_spot != start or getattr(entry, size) < 1:
                raise ShardError(
                    f"{where}: {what} are empty or not contiguous at spot {start}; {FOREIGN}", kind="manifest"
                )
            start += getattr(entry, size)
        if start != manifest.n_spots:
            raise ShardError(
                f"{where}: {what} hold {start} spots, but n_spots is {manifest.n_spots}; {FOREIGN}", kind="manifest"
            )
    # A record has three members of at least one header and one block each; bounds the records that a small file can claim.
    for s in manifest.shards:
        if s.bytes < s.records * 6 * TAR_BLOCK:
            raise _manifest_error(f"{where}: {s.file} states more records than fit in its {s.bytes} bytes; {FOREIGN}")
        if s.records > manifest.records_per_shard:
            raise _manifest_error(
                f"{where}: {s.file} states {s.records} records, more than records_per_shard ({manifest.records_per_shard}); {FOREIGN}"
            )
    ids = [s.section_id for s in manifest.sections]
    if len(set(ids)) != len(ids):
        [(twice, _)] = Counter(ids).most_common(1)
        raise ShardError(f"{where}: duplicate section id {shown(twice)}; {FOREIGN}", kind="manifest")
    ends = {s.section_id: (s.first_spot, s.first_spot + s.n_spots) for s in manifest.sections}
    for shard in manifest.shards:
        low, high = ends.get(shard.section_id, (0, -1))
        if shard.first_spot < low or shard.first_spot + shard.records > high:
            raise ShardError(f"{where}: shard {shard.file} is not within its section; {FOREIGN}", kind="manifest")
    for field_name, name, expected in _names(manifest):
        if name != expected:
            raise _manifest_error(
                f"{where}: {field_name}: {shown(name)} is not the name that a build uses, {expected}; {FOREIGN}"
            )
    for i, section in enumerate(manifest.sections):
        field_name = f"{where}: sections.{i}.assay_genes"
        measured = int(unpack_bits(section.assay_genes, manifest.n_genes, field_name).sum())
        if measured != section.n_assay_genes:
            raise _manifest_error(
                f"{where}: sections.{i}.n_assay_genes is {section.n_assay_genes}, but assay_genes has {measured}; {FOREIGN}"
            )
        if not (all(-1 <= v <= 10 for v in section.stain.od_mean) and all(0 < v <= 10 for v in section.stain.od_std)):
            raise _manifest_error(f"{where}: sections.{i}.stain: {section.stain} is not an optical density; {FOREIGN}")
    part = manifest.part
    if part is not None:
        expected_sections = list(range(part.index - 1, part.index - 1 + part.of * len(manifest.sections), part.of))
        if part.index > part.of or part.sections != expected_sections:
            raise _manifest_error(
                f"{where}: part.sections: not the {len(manifest.sections)} sections of part {part.index}/{part.of}; "
                f"{FOREIGN}"
            )


def shard_stem(section_id: str, number: int) -> str:
    """Return the name, without extension, of a section's shard ``number`` (from 0), as defined by FORMAT.md."""
    return f"shards/{section_id}-{number:04d}"


def overview_file(section_id: str) -> str:
    """Return the name of a section's overview, as defined by FORMAT.md."""
    return f"overview/{section_id}.jpg"


def _check_names(manifest: Manifest, where: str) -> None:
    """Check the section ids, file names and hashes, which become parts of paths in merged sets, reports and the cache."""
    for i, section in enumerate(manifest.sections):
        check_section_id(section.section_id, f"{where}: sections.{i}.section_id", _manifest_error, FOREIGN)
    duplicates = same_file(s.section_id for s in manifest.sections)
    if duplicates:
        raise _manifest_error(
            f"{where}: sections.section_id: {shown(duplicates[0])} and {shown(duplicates[1])} are the same file name on "
            f"case-insensitive file systems; {FOREIGN}"
        )
    for field_name, name, _ in _names(manifest):
        problem = problem_with_file(name)
        if problem:
            raise _manifest_error(f"{where}: {field_name}: the file name {shown(name)} {problem}; {FOREIGN}")
    for name, digest in files_of(manifest).items():
        if not is_sha256(digest):
            raise _manifest_error(f"{where}: the SHA-256 of {name} is {shown(digest)}, not 64 hex digits; {FOREIGN}")


def _names(manifest: Manifest) -> Iterator[tuple[str, str, str]]:
    """Yield every file named in a manifest: (field, name, name that a build uses)."""
    yield "genes_file", manifest.genes_file, GENES_FILE
    yield "spots_file", manifest.spots_file, SPOTS_FILE
    for i, section in enumerate(manifest.sections):
        yield f"sections.{i}.overview.file", section.overview.file, overview_file(section.section_id)
    number: dict[str, int] = {}
    for i, shard in enumerate(manifest.shards):
        k = number[shard.section_id] = number.get(shard.section_id, -1) + 1
        stem = shard_stem(shard.section_id, k)
        yield f"shards.{i}.file", shard.file, f"{stem}.tar"
        yield f"shards.{i}.index", shard.index, f"{stem}.idx"


def _manifest_error(message: str) -> ShardError:
    return ShardError(message, kind="manifest")


def files_of(manifest: Manifest) -> dict[str, str]:
    """Return {file: SHA-256} of every file whose hash is in the manifest."""
    out = {manifest.genes_file: manifest.genes_sha256, manifest.spots_file: manifest.spots_sha256}
    out |= {s.overview.file: s.overview.sha256 for s in manifest.sections}
    for shard in manifest.shards:
        out |= {shard.file: shard.sha256, shard.index: shard.index_sha256}
    return out


def pack_bits(measured: np.ndarray) -> str:
    """Encode a boolean mask over the gene table, bool (n_genes,), as base64."""
    return base64.b64encode(np.packbits(measured).tobytes()).decode("ascii")


def unpack_bits(text: str, n_genes: int, where: str = "assay_genes") -> np.ndarray:
    """Decode the text of :func:`pack_bits` to a mask over the gene table, bool (n_genes,).

    Raises
    ------
    ShardError
        The text is not a bitset over ``n_genes`` genes; ``where`` names its field.
    """
    try:
        raw = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    except (binascii.Error, ValueError) as error:
        raise ShardError(f"{where}: not base64 ({error}); {FOREIGN}", kind="manifest") from error
    if raw.size != (n_genes + 7) // 8:
        raise ShardError(
            f"{where}: {raw.size} bytes for {n_genes} genes, expected {(n_genes + 7) // 8}; {FOREIGN}", kind="manifest"
        )
    return np.unpackbits(raw, count=n_genes).astype(bool)


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
