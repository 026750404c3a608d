"""Merge shard sets: tiles are copied without decoding; only gene rows and spot indices are rewritten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from comtip_shards.builder.build import BuildReport, check_sections, hash_of, report_of
from comtip_shards.builder.jobs import run_jobs
from comtip_shards.builder.output_dir import built_already, clear_staging, writing
from comtip_shards.builder.writer import RecordRun, SectionHead, set_fingerprint, write_set
from comtip_shards.errors import ShardError
from comtip_shards.format.image_header import check_size
from comtip_shards.format.manifest import NAME, REPORTS, Manifest, ManifestSection
from comtip_shards.names import FOREIGN, same_file
from comtip_shards.qc.page import Pages
from comtip_shards.qc.stored import stored_pages
from comtip_shards.reader.shard_set import ShardSet
from comtip_shards.reader.verify import check_section_spots, check_spot
from comtip_shards.sections.section import meta_of
from comtip_shards.sections.splits import check_splits


@dataclass(frozen=True)
class FinishedSection:
    """A section of a finished set, identified by the set's folder or URL and the section's number."""

    path: str
    digest: str
    """Digest of the set's manifest, so that a process with several sets open never confuses two."""
    number: int
    """Index of the section in the set's manifest."""

    def head(self) -> SectionHead:
        """Return everything except the records; raises ShardError if a file is damaged or the set has changed."""
        shards = _open(self.path, self.digest)
        section = shards.manifest.sections[self.number]
        keys = [shards.genes[i].key for i in np.flatnonzero(shards.measured(self.number))]
        shards.overview(self.number)  # checks that it is an image of the stated size
        overview = shards.files.verified(section.overview.file, section.overview.sha256, "the overview", "overview")
        check_section_spots(shards, self.number, shards.spots)
        return SectionHead(
            meta_of(section),
            section.fingerprint,
            section.n_spots,
            keys,
            section.stain,
            overview,
            section.overview.um_per_px,
            section.source,
            self.pages()[0],
        )

    def pages(self) -> tuple[Pages, str]:
        """Return the report pages of the section and, if they cannot be used, the reason; pages are optional."""
        shards = _open(self.path, self.digest)
        return stored_pages(shards.path / REPORTS, shards.manifest.sections[self.number].section_id)

    def runs(self, size: int) -> Iterator[RecordRun]:
        """Yield the records in stored order, in runs of at most ``size``; raises ShardError for a damaged record."""
        shards = _open(self.path, self.digest)
        section = shards.manifest.sections[self.number]
        measured = shards.measured(self.number)
        column_of = np.cumsum(measured) - 1
        for start in range(0, section.n_spots, size):
            spots = np.arange(start, min(start + size, section.n_spots)) + section.first_spot
            counts = shards.counts(spots)
            tiles, jsons = shards.members_of(spots, ("tile", "json"))
            _check_records(shards, section, spots, tiles, jsons, measured[counts.indices])
            yield RecordRun(
                tiles=tiles, jsons=jsons, indptr=counts.indptr, columns=column_of[counts.indices], counts=counts.data
            )


def _check_records(
    shards: ShardSet,
    section: ManifestSection,
    spots: np.ndarray,
    tiles: Sequence[bytes],
    jsons: Sequence[bytes],
    measured: np.ndarray,
) -> None:
    """Run the checks of ``verify`` on these records, except for those that decode pixels."""
    if not measured.all():
        raise ShardError(
            f"{shards.name}: section {section.section_id}: counts for a gene that it did not measure; {FOREIGN}",
            kind="counts",
        )
    rows = shards.spots.iloc[spots].to_dict("records")
    tile = shards.manifest.tile
    for spot, data, text, row in zip(spots.tolist(), tiles, jsons, rows, strict=True):
        check_size(data, tile.px, tile.codec, partial(shards.where, spot))
        check_spot(text, section.section_id, row, shards.where(spot))


@lru_cache(maxsize=4)
def _open(path: str, digest: str) -> ShardSet:
    shards = ShardSet(path)
    if shards.manifest.digest != digest:
        raise ShardError(f"{path}: changed during the merge; run again when no other process writes to it")
    return shards


def merge_sets(parts: Sequence[Path | str], out: Path, *, jobs: int = 1, progress: bool = False) -> BuildReport:
    """Merge shard sets: the parts of one build, or complete sets that were built with the same settings.

    Merging all parts of a build gives the same bytes as building everything at once. Sets that are not parts are
    concatenated in the given order.

    Parameters
    ----------
    parts
        Folders or URLs.
    out
        A new folder, or one with an unfinished merge. If it already holds the merged set, nothing is written.
    jobs, progress
        As for :func:`comtip_shards.builder.build.build_shards`.

    Raises
    ------
    ShardError, SourceError
        ``parts`` is empty, a set cannot be read or is given twice, settings differ, a part of a build is missing, a section is
        in two sets, a donor in ``test`` would also be in ``train`` or ``val``, duplicate sections are in different splits, a
        record is damaged, or ``out`` holds other files or cannot be written.
    """
    out = Path(out)
    if not parts:
        raise ShardError("nothing to merge; give the folders of the sets")
    manifests = {str(p): ShardSet(p).manifest for p in parts}
    if len(manifests) != len(parts):
        raise ShardError(f"{max(map(str, parts), key=[*map(str, parts)].count)} is given twice; give each set once")
    _check_settings(manifests)
    sections = _in_order(manifests)
    metas = [meta_of(manifests[s.path].sections[s.number]) for s in sections]
    _check_distinct(sections, manifests)
    check_splits(metas)
    first = next(iter(manifests.values()))
    fingerprints = [manifests[s.path].sections[s.number].fingerprint for s in sections]
    fingerprint = set_fingerprint(fingerprints, first.records_per_shard)
    done = built_already(out, fingerprint, None)
    if done is not None:
        clear_staging(out)
    else:
        with writing(out):
            done = built_already(out, fingerprint, None)
            if done is not None:  # another process finished it in the meantime
                return report_of(out, done)
            (out / NAME).unlink(missing_ok=True)  # the manifest of a set with missing files
            run = partial(run_jobs, jobs=jobs, label="writing shards", progress=progress)
            duplicates = check_sections(sections, out)
            done = write_set(sections, first.tile, out, first.records_per_shard, run, duplicates=duplicates)
    lost = [(manifests[s.path].sections[s.number].section_id, s.pages()[1]) for s in sections]
    return report_of(out, done, "".join(f"{i}: its report page was left out: {why}\n" for i, why in lost if why))


def _check_settings(manifests: dict[str, Manifest]) -> None:
    (name, first), *others = manifests.items()
    for other_name, other in others:
        for what in ("tile", "records_per_shard", "made_with"):
            one, two = getattr(first, what), getattr(other, what)
            if one != two:
                raise ShardError(
                    f"{name} and {other_name}: the manifests differ in {what}: {one} and {two}; build both sets with the same "
                    "settings and package versions"
                )


def _check_distinct(sections: list[FinishedSection], manifests: dict[str, Manifest]) -> None:
    seen: dict[str, str] = {}
    for s in sections:
        name = manifests[s.path].sections[s.number].section_id
        if name in seen:
            raise ShardError(f"section {name} is in {seen[name]} and in {s.path}; leave one of them out")
        seen[name] = s.path
    alike = same_file(seen)
    if alike:
        raise ShardError(
            f"section {alike[0]} of {seen[alike[0]]} and {alike[1]} of {seen[alike[1]]} differ only in case; build one of them "
            "again with another id"
        )


def _in_order(manifests: dict[str, Manifest]) -> list[FinishedSection]:
    """Return the sections in the order of the complete build for parts, otherwise in the order of the sets."""
    parts = {name: m.part for name, m in manifests.items() if m.part is not None}
    if not parts:
        return [FinishedSection(name, m.digest, i) for name, m in manifests.items() for i in range(len(m.sections))]
    complete = [name for name in manifests if name not in parts]
    if complete:
        raise ShardError(
            f"{complete[0]} is not a part of a build, but {next(iter(parts))} is; merge the parts first, then the sets"
        )
    by_index: dict[int, str] = {}
    of, whole = next((p.of, p.whole) for p in parts.values())
    for name, part in parts.items():
        if (part.of, part.whole) != (of, whole):
            raise ShardError(
                f"{name} is part {part.index}/{part.of} of another build than {next(iter(parts))}; merge each build separately, or build "
                "both parts again from one source"
            )
        if part.index in by_index:
            raise ShardError(f"{name} and {by_index[part.index]} are both part {part.index}/{of}; leave one out")
        by_index[part.index] = name
    missing = [f"{i}/{of}" for i in range(1, of + 1) if i not in by_index]
    if missing:
        raise ShardError(f"missing parts of the build: {', '.join(missing)}; build each with `part` and add it")
    by_position = {
        position: FinishedSection(name, manifests[name].digest, i)
        for name, part in parts.items()
        for i, position in enumerate(part.sections)
    }
    if sorted(by_position) != list(range(len(by_position))):
        count = Counter(position for part in parts.values() for position in part.sections)
        absent = [str(i) for i in range(max(count) + 1) if not count[i]]
        wrong = [f"missing: {', '.join(absent)}"] if absent else []
        wrong += (
            [f"more than once: {', '.join(str(i) for i, n in sorted(count.items()) if n > 1)}"]
            if max(count.values()) > 1
            else []
        )
        raise ShardError(
            f"the parts {', '.join(parts)} do not hold each section exactly once (section numbers {'; '.join(wrong)}); "
            "build them again from one source"
        )
    sections = [by_position[i] for i in sorted(by_position)]
    metas = [meta_of(manifests[s.path].sections[s.number]) for s in sections]
    if hash_of(metas) != whole:
        raise ShardError(
            f"the parts {', '.join(parts)} do not hold the sections of one build; build them again from one source"
        )
    return sections
