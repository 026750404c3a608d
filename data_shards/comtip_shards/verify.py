"""Proof that a shard set is whole: every hash, every record, every count."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from comtip_shards import record
from comtip_shards.build import check_splits
from comtip_shards.errors import ShardError, SourceError
from comtip_shards.manifest import ManifestSection, ShardEntry, sha256_of
from comtip_shards.reader import ShardSet
from comtip_shards.section import SectionMeta
from comtip_shards.tarindex import index_tar

MAX_PROBLEMS = 100


@dataclass
class VerifyReport:
    """What was found."""

    path: Path
    records: int = 0
    counts: int = 0
    """Sum of all raw counts."""
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """No problem was found."""
        return not self.problems

    @property
    def text(self) -> str:
        """The report, for a person."""
        if self.ok:
            return (
                f"{self.path}: whole; {self.records} records, {self.counts} counts, every hash and every tile checked"
            )
        return "\n".join([f"{self.path}: NOT whole, {len(self.problems)} problems", *(f"  {p}" for p in self.problems)])


def verify(path: Path | str, *, progress: bool = False) -> VerifyReport:
    """Check a shard set: files against hashes, records against the manifest, spots complete, splits by donor.

    Problems are collected (at most 100) rather than raised; only a set without a readable manifest raises.
    """
    shards = ShardSet(path)
    report = VerifyReport(shards.path)
    try:
        n_genes = len(shards.genes)
    except ShardError as error:
        report.problems.append(str(error))
        n_genes = shards.manifest.n_genes
    for number in range(len(shards.manifest.sections)):
        try:
            shards.overview(number)
            shards.measured(number)
        except (ShardError, ValueError, OSError) as error:
            report.problems.append(str(error))
    try:
        check_splits([_meta(s) for s in shards.manifest.sections])
    except SourceError as error:
        report.problems.append(str(error))
    for shard in tqdm(shards.manifest.shards, desc="verify", unit="shard", disable=None if progress else True):
        _verify_shard(shards, shard, n_genes, report)
        if len(report.problems) >= MAX_PROBLEMS:
            report.problems.append("... and perhaps more; stopped here")
            break
    return report


def _meta(section: ManifestSection) -> SectionMeta:
    return SectionMeta(**{k: getattr(section, k) for k in SectionMeta.__dataclass_fields__})


def _verify_shard(shards: ShardSet, shard: ShardEntry, n_genes: int, report: VerifyReport) -> None:
    path = shards.path / shard.file
    if not path.is_file():
        report.problems.append(f"{path}: the shard is gone; copy it back or build the set again")
        return
    if path.stat().st_size != shard.bytes or sha256_of(path) != shard.sha256:
        report.problems.append(f"{path}: not the bytes that were written (size or SHA-256); copy it again")
    try:
        members = index_tar(path)
    except ShardError as error:
        report.problems.append(str(error))
        return
    extension = record.CODECS[shards.manifest.tile.codec]
    spots = range(shard.first_spot, shard.first_spot + shard.records)
    wanted = {f"{record.key_of(s)}.{e}" for s in spots for e in (extension, "expr", "json")}
    strange = sorted(set(members) ^ wanted)
    if strange:
        report.problems.append(f"{path}: {len(strange)} members missing or too many, e.g. {strange[0]}")
    section = shards.section_number(shard.section_id)
    measured = shards.measured(section)
    data = path.read_bytes()
    for spot in spots:
        _verify_record(data, members, spot, extension, shards, shard, measured, n_genes, report)


def _verify_record(
    data: bytes, members: dict[str, tuple[int, int]], spot: int, extension: str, shards: ShardSet, shard: ShardEntry,
    measured: np.ndarray, n_genes: int, report: VerifyReport,
) -> None:  # fmt: skip
    key = record.key_of(spot)
    where = f"{shards.path / shard.file}: record {key}"

    def member(name: str) -> bytes:
        start, size = members[f"{key}.{name}"]
        return data[start : start + size]

    if any(f"{key}.{e}" not in members for e in (extension, "expr", "json")):
        return  # already said, for the shard as a whole
    try:
        tile = shards.manifest.tile
        record.decode_tile(member(extension), tile.px, tile.codec, where)
        rows, counts = record.decode_expr(member("expr"), n_genes, where)
        if rows.size and not measured[rows].all():
            raise ShardError(f"{where}.expr: counts of a gene that the section did not measure")
        meta = record.decode_json(member("json"), where)
        if meta["section_id"] != shard.section_id:
            raise ShardError(f"{where}.json: section {meta['section_id']}, the manifest says {shard.section_id}")
    except ShardError as error:
        report.problems.append(str(error))
        return
    report.records += 1
    report.counts += int(counts.sum(dtype=np.int64))
