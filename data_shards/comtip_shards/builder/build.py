"""Build a shard set from sections: byte-deterministic, restartable, and atomic.

Sections are read, cut and encoded into a staging folder, several in parallel; a section that was already staged from the
same inputs with the same settings is not read again. Once all are staged, the gene table is known and the shards are
written. The manifest is written last: a folder without a manifest is not a shard set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from comtip_shards.builder.jobs import run_jobs
from comtip_shards.builder.output_dir import STAGING, built_already, clear_staging, writing
from comtip_shards.builder.skipping import (
    INCOMPLETE,
    Failure,
    OnError,
    attempt,
    check_policy,
    incomplete_set,
    mark_incomplete,
    text_of,
)
from comtip_shards.builder.staging import StagedSection, stage_section
from comtip_shards.builder.tile_choice import choose_tile, tile_text
from comtip_shards.builder.writer import SectionRecords, dependency_versions, report, set_fingerprint, write_set
from comtip_shards.errors import SourceError
from comtip_shards.format.manifest import NAME, REPORTS, BuildPart, Manifest, TileSpec
from comtip_shards.names import same_file
from comtip_shards.qc import refuse_failed, write_pages
from comtip_shards.sections.duplicates import check_duplicates
from comtip_shards.sections.facts import stated
from comtip_shards.sections.leakage import enforce_split_policy
from comtip_shards.sections.section import SectionMeta, SectionNotes, StatedSplits, check_meta
from comtip_shards.sources.base import SectionSource
from comtip_shards.sources.files.opening import input_sha256

STAGE_VERSION = 5
"""Version of the staged files. Increase it when their content changes, so that sections staged by older code are not reused."""
_T = TypeVar("_T")
MAX_UM = 1e6
"""Largest spot diameter and distance in um that a manifest accepts."""


@dataclass
class BuildReport:
    """Result of a build."""

    out: Path
    n_spots: int
    n_genes: int
    sections: list[str]
    """Ids of the sections in the set."""
    text: str
    """Summary for the terminal: tile, statistics of the sections and, if any, the sections left out."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Sections that could not be built, with the reason; only with ``on_error="skip"``."""


def build_shards(
    sources: Sequence[SectionSource],
    out: Path,
    *,
    tile_px: int | None = None,
    tile_um: float | None = None,
    min_mpp: float | None = None,
    codec: str = "jpeg",
    quality: int = 95,
    splits: StatedSplits | None = None,
    max_records: int = 512,
    strict: bool = False,
    allow_benchmark: Collection[str] = (),
    benchmark_ids: Path | None = None,
    auto_split: Sequence[float] | None = None,
    seed: int = 0,
    jobs: int = 1,
    part: tuple[int, int] | None = None,
    progress: bool = False,
    on_error: OnError = "stop",
    failed: Mapping[str, str] | None = None,
) -> BuildReport:
    """Build a shard set in ``out``.

    Parameters
    ----------
    sources
        Sections, from :func:`comtip_shards.sources.open_source`.
    out
        A new folder, or one with an unfinished build. If it already holds the complete set, nothing is built.
    tile_px, tile_um, min_mpp
        Tile width S in px, tile width in um, and the um per px to which finer images are downsampled. By default 112 um in
        224 px at 0.5 um per px, or the nearest resolution that all images have
        (:func:`comtip_shards.builder.tile_choice.choose_tile`); the report states what this choice costs each section.
    codec, quality
        Codec of the tiles, ``jpeg``, ``png`` (lossless) or ``webp``; quality, 1 to 100, ignored for ``png``.
    splits
        ``{section_id: "train" | "val" | "test"}``; takes precedence over the splits of the sources.
    max_records
        Maximum number of records per tar file.
    strict
        If True, a section that fails a check raises, or is left out with ``on_error="skip"``. If False, the failure is only
        reported, in ``report/`` and in the manifest.
    allow_benchmark, benchmark_ids, auto_split, seed
        See :func:`comtip_shards.sections.leakage.enforce_split_policy`.
    jobs
        Number of worker processes; the bytes of the set do not depend on it.
    part
        (i, n), 1 <= i <= n: build the i-th of n parts of the set from the same sources, for example on several machines;
        :func:`comtip_shards.builder.merge.merge_sets` merges them.
    progress
        Show a progress bar on a terminal, or log the progress without one.
    on_error
        ``stop`` raises for the first section that cannot be built. ``skip`` leaves out the sections that cannot be built,
        reports them in :attr:`BuildReport.skipped`, and builds the others, whose staged data is kept, so that the same call
        completes the set later.
    failed
        With ``skip``: ``{name: reason}`` of sections that could not be opened.

    Raises
    ------
    SourceError, ShardError
        An argument or a source is invalid, a donor in ``test`` is also in ``train`` or ``val``, duplicate sections are in
        different splits, ``out`` holds other files or cannot be written, or a worker process was killed.
    """
    policy = check_policy(on_error, part)
    unopened = [Failure(name, reason) for name, reason in (failed or {}).items()]
    if unopened and not sources:
        raise SourceError(f"no section can be built{text_of(unopened, len(unopened), Path(out) / STAGING)}")
    metas, notes = assign_splits(
        [s.meta for s in sources], splits or {}, allow_benchmark, benchmark_ids, auto_split, seed
    )
    tile = choose_tile(metas, px=tile_px, um=tile_um, min_mpp=min_mpp, codec=codec, quality=quality)
    build = _Build(Path(out), tile, max_records, part_of(metas, part), notes, strict, jobs, progress)
    report = build.run(sources, metas) if policy == "stop" else build.run_skipping(sources, metas, unopened)
    costs = tile_text([meta for meta in metas if meta.section_id in report.sections], tile)
    return replace(report, text="\n".join([*costs, report.text])) if len(costs) > 1 else report


@dataclass(frozen=True)
class _Build:
    """Settings of one build, and its steps."""

    out: Path
    tile: TileSpec
    max_records: int
    part: BuildPart | None
    notes: SectionNotes
    strict: bool
    jobs: int
    progress: bool

    def run(self, sources: Sequence[SectionSource], metas: Sequence[SectionMeta]) -> BuildReport:
        """Build the set, or return the report of ``out`` if it already holds the set."""
        chosen = range(len(metas)) if self.part is None else self.part.sections
        work = [(sources[i], metas[i], self.tile) for i in chosen]
        fingerprints = self._call(_fingerprint, work, label="hashing inputs")
        fingerprint = set_fingerprint(fingerprints, self.max_records)
        done = built_already(self.out, fingerprint, self.part)
        if done is not None:
            if self.strict:
                refuse_failed((s.section_id, s.source["checks"]) for s in done.sections)
            clear_staging(self.out)
            return report_of(self.out, done, "(already built)")
        with writing(self.out) as staging:
            done = built_already(self.out, fingerprint, self.part)
            if done is not None:  # another process finished it in the meantime
                return report_of(self.out, done, "(already built)")
            (self.out / NAME).unlink(missing_ok=True)  # the manifest of a set with missing files
            manifest = self._write([(*one, f, staging) for one, f in zip(work, fingerprints, strict=True)])
        return report_of(self.out, manifest)

    def run_skipping(
        self, sources: Sequence[SectionSource], metas: Sequence[SectionMeta], unopened: Sequence[Failure]
    ) -> BuildReport:
        """Build the set without the sections that fail, and report these; if any fails, the others stay staged."""
        work = [(_fingerprint, m.section_id, s, m, self.tile) for s, m in zip(sources, metas, strict=True)]
        prints = self._call(attempt, work, label="hashing inputs")
        failures = [*unopened, *(p for p in prints if isinstance(p, Failure))]
        good = [(s, m, p) for s, m, p in zip(sources, metas, prints, strict=True) if not isinstance(p, Failure)]
        total, staging = len(metas) + len(unopened), self.out / STAGING
        done = built_already(self.out, self._set_print(good), self.part, incomplete_set(staging))
        if done is not None and not (self.strict and failed_checks(done)):
            if not failures:
                clear_staging(self.out)
            report = report_of(self.out, done, f"(already built)\n{text_of(failures, total, staging)}".rstrip("\n"))
            return replace(report, skipped={f.section_id: f.reason for f in failures})
        with writing(self.out) as staging:
            jobs = [(stage_section, m.section_id, s, m, self.tile, p, staging) for s, m, p in good]
            results = self._call(attempt, jobs, label="reading sections")
            staged = self._accepted(results, failures)
            if not staged:
                raise SourceError(f"no section can be built{text_of(failures, total, staging)}")
            fingerprint = set_fingerprint([s.fingerprint for s in staged], self.max_records)
            manifest = built_already(self.out, fingerprint, self.part, incomplete_set(staging))
            if manifest is None:
                (self.out / NAME).unlink(missing_ok=True)
                manifest = self._finish(staged)
            (staging / INCOMPLETE).unlink(missing_ok=True)
            if failures:
                mark_incomplete(staging, fingerprint, failures)
        report = report_of(self.out, manifest, text_of(failures, total, staging))
        return replace(report, skipped={f.section_id: f.reason for f in failures})

    def _accepted(self, results: Sequence[StagedSection | Failure], failures: list[Failure]) -> list[StagedSection]:
        """Return the usable sections; append the others, with ``strict`` also those that fail a check, to ``failures``."""
        staged = []
        for result in results:
            found = result if isinstance(result, Failure) else self._checked(result)
            if isinstance(found, Failure):
                failures.append(found)
            else:
                staged.append(found)
        return staged

    def _checked(self, section: StagedSection) -> StagedSection | Failure:
        try:
            if self.strict:
                refuse_failed([(section.meta.section_id, section.head().source["checks"])])
        except SourceError as error:
            return Failure(section.meta.section_id, str(error))
        return section

    def _set_print(self, good: Sequence[tuple[SectionSource, SectionMeta, str]]) -> str:
        return set_fingerprint([fingerprint for _, _, fingerprint in good], self.max_records)

    def _write(self, work: Sequence[tuple[SectionSource, SectionMeta, TileSpec, str, Path]]) -> Manifest:
        """Stage the sections, and write the set."""
        return self._finish(self._call(stage_section, work, label="reading sections"))

    def _finish(self, staged: Sequence[StagedSection]) -> Manifest:
        """Write the reports of the checks, compare the staged sections with each other, and write the set."""
        duplicates = check_sections(staged, self.out, strict=self.strict)
        run = partial(self._call, label="writing shards")
        return write_set(staged, self.tile, self.out, self.max_records, run, self.part, self.notes, duplicates)

    def _call(self, function: Callable[..., _T], work: Sequence[tuple[Any, ...]], *, label: str) -> list[_T]:
        return run_jobs(function, work, jobs=self.jobs, label=label, progress=self.progress)


def check_sections(sections: Sequence[SectionRecords], out: Path, *, strict: bool = False) -> dict[str, str]:
    """Write the results of the checks to ``report/`` and compare the sections with each other.

    Returns
    -------
    ``{section_id: note}`` for duplicate sections.

    Raises
    ------
    SourceError
        With ``strict``, a section failed a check; duplicate sections are in different splits; or ``report`` is a symbolic
        link.
    """
    heads = (s.head() for s in sections)  # one at a time, to bound memory
    write_pages(((h.meta.section_id, h.pages, h.source["checks"]) for h in heads), out / REPORTS)
    facts = [(h.meta, h.source) for h in (s.head() for s in sections)]
    if strict:
        refuse_failed((meta.section_id, source["checks"]) for meta, source in facts)
    return check_duplicates([(meta, source["print"]) for meta, source in facts])


def failed_checks(manifest: Manifest) -> bool:
    """Return whether a section of a set failed a check."""
    try:
        refuse_failed((s.section_id, s.source["checks"]) for s in manifest.sections)
    except SourceError:
        return True
    return False


def report_of(out: Path, manifest: Manifest, more: str = "") -> BuildReport:
    """Return the report of a finished set."""
    ids = [s.section_id for s in manifest.sections]
    return BuildReport(out, manifest.n_spots, manifest.n_genes, ids, report(manifest) + more)


def assign_splits(
    metas: Sequence[SectionMeta],
    splits: StatedSplits,
    allow_benchmark: Collection[str] = (),
    benchmark_ids: Path | None = None,
    auto_split: Sequence[float] | None = None,
    seed: int = 0,
) -> tuple[list[SectionMeta], SectionNotes]:
    """Return the sections with their final donors and splits, and notes; parameters as in :func:`build_shards`.

    Raises
    ------
    SourceError
        There are no sections, ids are not unique, ``splits`` names an unknown section, a fact is invalid, or as for
        :func:`comtip_shards.sections.leakage.enforce_split_policy`.
    """
    stated = _with_splits(list(metas), splits)
    return enforce_split_policy(
        stated, allow=allow_benchmark, benchmark_ids=benchmark_ids, auto_split=auto_split, seed=seed
    )


def part_of(metas: Sequence[SectionMeta], part: tuple[int, int] | None) -> BuildPart | None:
    """Return part (i, n) of a set with the positions of its sections, or None if ``part`` is None.

    A part holds every n-th section, so that similar neighbours in the source are distributed over the parts.

    Raises
    ------
    SourceError
        The part is out of range.
    """
    if part is None:
        return None
    index, of = part
    if not 1 <= index <= of <= len(metas):
        raise SourceError(
            f"`part` {index}/{of} is out of range for {len(metas)} sections; use i/n with 1 <= i <= n <= {len(metas)}"
        )
    return BuildPart(index, of, list(range(index - 1, len(metas), of)), hash_of(metas))


def hash_of(metas: Sequence[SectionMeta]) -> str:
    """Return the SHA-256 (hex) of all sections' metadata, which is the same in all parts of one build."""
    return hashlib.sha256(json.dumps([asdict(m) for m in metas], sort_keys=True).encode()).hexdigest()


# -- checks -------------------------------------------------------------------------------------------------


def _with_splits(metas: list[SectionMeta], splits: StatedSplits) -> list[SectionMeta]:
    ids = [m.section_id for m in metas]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    if twice:
        raise SourceError(
            f"duplicate section ids: {', '.join(twice)}; rename their files or folders, or state different ids in a table of sources"
        )
    alike = same_file(ids)
    if alike:
        raise SourceError(
            f"section ids must not differ only in case: {alike[0]} and {alike[1]}; rename one of their files or folders, or state "
            "different ids in a table of sources"
        )
    unknown = sorted(set(splits) - set(ids))
    if unknown:
        raise SourceError(f"`splits`: no section {', '.join(unknown)}; the sections are {', '.join(ids)}")
    if not metas:
        raise SourceError("no sections to build from; check the source and `samples`")
    metas = [_as_written(replace(m, split=splits.get(m.section_id, m.split))) for m in metas]
    for meta in metas:
        check_meta(meta, meta.section_id)
        _check_sizes(meta)
    return metas


def _check_sizes(meta: SectionMeta) -> None:
    """Check the spot diameter and distance before any section is read; a manifest limits both."""
    for what, value in (("spot diameter", meta.spot_diameter_um), ("distance between spots", meta.spot_pitch_um)):
        if not 0 < value <= MAX_UM:
            raise SourceError(
                f"section {meta.section_id}: the {what} is {value:g} um, but must be above 0 and at most {MAX_UM:g}; the source "
                "must state it, or have at least two spots at different positions from which to measure it"
            )


def _as_written(meta: SectionMeta) -> SectionMeta:
    """Convert numbers to float, because 4 and 4.0 are written differently to the manifest."""
    return replace(
        meta,
        mpp=float(meta.mpp),
        spot_diameter_um=float(meta.spot_diameter_um),
        spot_pitch_um=float(meta.spot_pitch_um),
    )


def _fingerprint(source: SectionSource, meta: SectionMeta, tile: TileSpec) -> str:
    files = [f for p in source.inputs for f in (sorted(p.iterdir()) if p.is_dir() else [p]) if f.is_file()]
    facts = {
        "stage": STAGE_VERSION,
        "meta": asdict(meta),
        "tile": asdict(tile),
        "made_with": dependency_versions(),
        "files": [(f.name, input_sha256(f)) for f in files],
    }
    if options := stated(source.counts):  # nothing else in the fingerprint depends on the layer of the counts
        facts["counts"] = options
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
