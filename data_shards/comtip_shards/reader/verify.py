"""Full verification of a shard set: every hash, record and count."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from comtip_shards.errors import ShardError, SourceError
from comtip_shards.format import record
from comtip_shards.format.manifest import REPORT_FILE, REPORTS, ShardEntry, sha256_of
from comtip_shards.format.tar_index import index_tar
from comtip_shards.names import FOREIGN
from comtip_shards.progress import Progress
from comtip_shards.reader.shard_set import ShardSet
from comtip_shards.sections.section import meta_of
from comtip_shards.sections.splits import check_splits
from comtip_shards.storage.remote import Remote

MAX_PROBLEMS = 100


@dataclass
class VerifyReport:
    """Result of :func:`verify`."""

    name: str
    """Folder or URL."""
    records: int = 0
    """Number of valid records."""
    counts: int = 0
    """Sum of the raw counts of these records."""
    problems: list[str] = field(default_factory=list)
    """One message per problem."""

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    @property
    def text(self) -> str:
        """The report as text."""
        if self.ok:
            return (
                f"{self.name}: valid; {self.records} records, {self.counts} counts, every hash and every tile checked"
            )
        return "\n".join([f"{self.name}: INVALID; problems: {len(self.problems)}", *(f"  {p}" for p in self.problems)])


def verify(path: Path | str, *, progress: bool = False, remote: Remote | None = None) -> VerifyReport:
    """Check a shard set: hashes of files, records against tables, completeness of spots, splits by donor.

    Parameters
    ----------
    path
        Folder or URL of the set.
    progress
        Show a progress bar on a terminal, or log the progress without one.
    remote
        Cache, timeouts and credentials for a URL.

    Returns
    -------
    The problems found. After about 100 of them, verification stops, and the last entry says so.

    Raises
    ------
    ShardError
        The manifest cannot be read.
    """
    shards = ShardSet(path, remote=remote)
    report = VerifyReport(shards.name)
    table: pd.DataFrame | None = None
    try:
        shards.genes  # noqa: B018
    except ShardError as error:
        report.problems.append(str(error))
    try:
        table = shards.spots
        report.problems += _check_spots(shards, table)
    except ShardError as error:
        report.problems.append(str(error))
    report.problems += _check_links(shards)
    for number in range(len(shards.manifest.sections)):
        try:
            shards.overview(number)
        except ShardError as error:
            report.problems.append(str(error))
    try:
        check_splits([meta_of(s) for s in shards.manifest.sections])
    except SourceError as error:
        report.problems.append(str(error))
    files = shards.manifest.shards
    with Progress("verify", len(files), unit="shard", show=progress) as bar:
        for shard in files:
            _verify_shard(shards, shard, table, report)
            bar.update()
            if len(report.problems) >= MAX_PROBLEMS:
                report.problems.append("... and possibly more; verification stopped here")
                break
    return report


def _check_links(shards: ShardSet) -> list[str]:
    """Report symbolic links among the report pages, which are not hashed: a link could expose a file of another folder."""
    if shards.files.remote is not None:
        return []
    pages = [shards.path / REPORT_FILE, shards.path / REPORTS, *sorted((shards.path / REPORTS).rglob("*"))]
    return [f"{p}: is a symbolic link, which no build writes; delete it" for p in pages if p.is_symlink()]


def _check_spots(shards: ShardSet, table: pd.DataFrame) -> list[str]:
    """Return the problems of the spot table: one message for each section that :func:`check_section_spots` refuses."""
    problems = []
    for number in range(len(shards.manifest.sections)):
        try:
            check_section_spots(shards, number, table)
        except ShardError as error:
            problems.append(str(error))
    return problems


def check_section_spots(shards: ShardSet, number: int, table: pd.DataFrame) -> None:
    """Check the rows of a section in the spot table.

    Raises
    ------
    ShardError
        Of kind ``spots``: duplicate ids, wrong source rows or missing positions; the message names the set and the section.
    """
    section = shards.manifest.sections[number]
    own = table.iloc[section.first_spot : section.first_spot + section.n_spots]
    if own["spot_id"].duplicated().any():
        raise ShardError(f"{shards.name}: duplicate spot id in section {section.section_id}; {FOREIGN}", kind="spots")
    if not np.array_equal(np.sort(own["source_row"].to_numpy()), np.arange(section.n_spots)):
        raise ShardError(
            f"{shards.name}: source_row of section {section.section_id} is not a permutation of 0 to {section.n_spots - 1}; "
            f"{FOREIGN}",
            kind="spots",
        )
    if not np.isfinite(own[["x_px", "y_px"]].to_numpy()).all():
        raise ShardError(
            f"{shards.name}: a spot of section {section.section_id} has no position; {FOREIGN}", kind="spots"
        )


def _verify_shard(shards: ShardSet, shard: ShardEntry, table: pd.DataFrame | None, report: VerifyReport) -> None:
    name = f"{shards.name}/{shard.file}"
    try:
        path = shards.files.path(shard.file, shard.sha256, shard.bytes)
        if not path.is_file():
            raise ShardError(f"{name}: the shard is missing; copy it back or build the set again", kind="vanished")
        fix = FOREIGN  # a copy of an intact file has the same content
        if path.stat().st_size != shard.bytes or sha256_of(path) != shard.sha256:
            fix = "copy the shard again"
            report.problems.append(f"{name}: size or SHA-256 does not match the manifest; {fix}")
        members = index_tar(path, name, fix)
        offsets, sizes = shards.member_ranges(shard)
    except ShardError as error:
        report.problems.append(str(error))
        return
    spots = range(shard.first_spot, shard.first_spot + shard.records)
    names = [n for s in spots for n in record.members_of(s, shards.manifest.tile.codec)]
    indexed = dict(zip(names, zip(offsets.ravel().tolist(), sizes.ravel().tolist(), strict=True), strict=True))
    mismatched = sorted({n for n in set(members) | set(indexed) if members.get(n) != indexed.get(n)})
    if mismatched:
        report.problems.append(
            f"{name}: {len(mismatched)} members do not match the index (missing, extra or moved), e.g. {mismatched[0]}; {fix}"
        )
    for spot in spots:
        try:
            report.counts += _verify_record(shards, shard, spot, table)
            report.records += 1
        except ShardError as error:
            report.problems.append(str(error))
            if len(report.problems) >= MAX_PROBLEMS:
                return


def _verify_record(shards: ShardSet, shard: ShardEntry, spot: int, table: pd.DataFrame | None) -> int:
    """Check all members of one record and return the sum of its counts."""
    where = shards.where(spot)
    shards.tiles([spot])
    counts = shards.counts([spot])
    if not shards.measured(shards.section_number(shard.section_id))[counts.indices].all():
        raise ShardError(f"{where}.expr: counts for a gene that the section did not measure; {FOREIGN}", kind="counts")
    row = table.loc[spot] if table is not None else None
    check_spot(shards.members([spot], "json")[0], shard.section_id, row, where)
    return int(counts.sum(dtype=np.int64))


def check_spot(data: bytes, section_id: str, row: Any, where: str) -> None:
    """Check that a ``.json`` member agrees with the manifest and the spot table.

    Parameters
    ----------
    data
        The member.
    section_id
        Section of the shard that holds it.
    row
        Row of the spot table, mapping or Series; None if there is no table.
    where
        Shard and key, for error messages.

    Raises
    ------
    ShardError
        Of kind ``spot``: the member is invalid or contradicts the manifest or the table.
    """
    meta = record.decode_json(data, where)
    if meta["section_id"] != section_id:
        raise ShardError(
            f"{where}.json: section_id is {meta['section_id']}, but the manifest states {section_id}; {FOREIGN}",
            kind="spot",
        )
    for name, value in meta.items() if row is not None else ():
        if row.get(name) != value:
            raise ShardError(
                f"{where}.json: {name} is {value!r}, but the spot table states {row.get(name)!r}; {FOREIGN}",
                kind="spot",
            )
