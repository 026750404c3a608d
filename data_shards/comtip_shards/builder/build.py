"""Build a shard set from sections: byte-deterministic, restartable, and atomic.

Sections are read, cut and encoded into a staging folder, several in parallel; a section that was already staged from the
same inputs with the same settings is not read again. Once all are staged, the gene table is known and the shards are
written. The manifest is written last: a folder without a manifest is not a shard set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from comtip_shards.builder.jobs import run_jobs
from comtip_shards.builder.output_dir import built_already, clear_staging, writing
from comtip_shards.builder.staging import stage_section
from comtip_shards.builder.writer import SectionRecords, dependency_versions, report, set_fingerprint, write_set
from comtip_shards.errors import SourceError
from comtip_shards.format import record
from comtip_shards.format.manifest import NAME, REPORTS, BuildPart, Manifest, TileSpec, sha256_of
from comtip_shards.names import same_file
from comtip_shards.qc import refuse_failed, write_pages
from comtip_shards.sections.facts import stated
from comtip_shards.sections.leakage import check_duplicates, enforce_split_policy
from comtip_shards.sections.section import SectionMeta, check_meta
from comtip_shards.sources.base import SectionSource

STAGE_VERSION = 5
MAX_UM = 1e6


@dataclass
class BuildReport:
    """Result of a build."""

    out: Path
    n_spots: int
    n_genes: int
    sections: list[str]
    text: str


def build_shards(
    sources: Sequence[SectionSource],
    out: Path,
    *,
    tile_px: int = 128,
    tile_um: float = 224.0,
    min_mpp: float = 4.0,
    codec: str = "jpeg",
    quality: int = 95,
    splits: Mapping[str, str] | None = None,
    max_records: int = 512,
    strict: bool = False,
    allow_benchmark: Collection[str] = (),
    benchmark_ids: Path | None = None,
    auto_split: Sequence[float] | None = None,
    seed: int = 0,
    jobs: int = 1,
    part: tuple[int, int] | None = None,
    progress: bool = False,
) -> BuildReport:
    """Build a shard set in ``out``.

    Parameters
    ----------
    sources
        Sections, from :func:`comtip_shards.sources.open_source`.
    out
        A new folder, or one with an unfinished build of the same set.
    tile_px, tile_um, min_mpp
        Tile width S in px, tile width in um, and the um per px to which finer images are downsampled.
    codec, quality
        ``jpeg``, ``png`` (lossless) or ``webp``; 1 to 100, for ``jpeg`` and ``webp``.
    splits
        ``{section_id: "train" | "val" | "test"}``; takes precedence over the splits of the sources.
    max_records
        Maximum number of records per tar file.
    strict
        Raise if a section fails a check; otherwise failures are reported in ``report/`` and the manifest's notes.
    allow_benchmark, benchmark_ids, auto_split, seed
        See :func:`comtip_shards.sections.leakage.enforce_split_policy`.
    jobs
        Number of worker processes; the bytes do not depend on it.
    part
        (i, n), 1 <= i <= n: build the i-th of n parts of the set, for example on several machines; every part takes the
        same sources. :func:`comtip_shards.builder.merge.merge_sets` merges them.
    progress
        Show a progress bar on a terminal.

    Raises
    ------
    SourceError, ShardError
        Invalid input, a donor on both sides of a split, or an ``out`` that holds other files or cannot be written.
    """
    out = Path(out)
    tile = TileSpec(tile_px, float(tile_um), float(min_mpp), codec, quality)
    _check_tile(tile)
    metas, notes = enforce_split_policy(
        _with_splits([s.meta for s in sources], splits or {}),
        allow=allow_benchmark,
        benchmark_ids=benchmark_ids,
        auto_split=auto_split,
        seed=seed,
    )
    build_part = _part_of(metas, part)
    own = [(sources[i], metas[i], tile) for i in (range(len(metas)) if build_part is None else build_part.sections)]
    fingerprints = run_jobs(_fingerprint, own, jobs=jobs, label="hashing inputs", progress=progress)
    done = built_already(out, set_fingerprint(fingerprints, max_records), build_part)
    if done is not None:
        if strict:
            refuse_failed((s.section_id, s.source["checks"]) for s in done.sections)
        clear_staging(out)
        return report_of(out, done, "(already built)")
    with writing(out) as staging:
        done = built_already(out, set_fingerprint(fingerprints, max_records), build_part)
        if done is not None:  # another process finished it in the meantime
            return report_of(out, done, "(already built)")
        (out / NAME).unlink(missing_ok=True)  # the manifest of a set with missing files
        work = [(*one, fingerprint, staging) for one, fingerprint in zip(own, fingerprints, strict=True)]
        staged = run_jobs(stage_section, work, jobs=jobs, label="sections", progress=progress)
        duplicates = check_sections(staged, out, strict=strict)
        run = partial(run_jobs, jobs=jobs, label="shards", progress=progress)
        manifest = write_set(staged, tile, out, max_records, run, build_part, notes, duplicates)
    return report_of(out, manifest)


def check_sections(sections: Sequence[SectionRecords], out: Path, *, strict: bool = False) -> dict[str, str]:
    """Write the results of the checks to ``report/`` and compare the sections with each other.

    Returns
    -------
    ``{section_id: note}`` for duplicate sections.

    Raises
    ------
    SourceError
        With ``strict``, a section failed a check; or two splits share a section.
    """
    heads = (s.head() for s in sections)  # one at a time, to bound memory
    write_pages(((h.meta.section_id, h.pages, h.source["checks"]) for h in heads), out / REPORTS)
    facts = [(h.meta, h.source) for h in (s.head() for s in sections)]
    if strict:
        refuse_failed((meta.section_id, source["checks"]) for meta, source in facts)
    return check_duplicates([(meta, source["print"]) for meta, source in facts])


def report_of(out: Path, manifest: Manifest, more: str = "") -> BuildReport:
    """Return the report of a finished set."""
    ids = [s.section_id for s in manifest.sections]
    return BuildReport(out, manifest.n_spots, manifest.n_genes, ids, report(manifest) + more)


def _part_of(metas: list[SectionMeta], part: tuple[int, int] | None) -> BuildPart | None:
    """Return the sections of a part: every n-th, so that similar neighbours in the source are distributed over parts."""
    if part is None:
        return None
    index, of = part
    if not 1 <= index <= of <= len(metas):
        raise SourceError(
            f"part {index}/{of} of {len(metas)} sections is out of range; use i/n with 1 <= i <= n <= {len(metas)}"
        )
    return BuildPart(index, of, list(range(index - 1, len(metas), of)), hash_of(metas))


def hash_of(metas: Sequence[SectionMeta]) -> str:
    """Return the hash of all sections' metadata, shared by the parts of one build."""
    return hashlib.sha256(json.dumps([asdict(m) for m in metas], sort_keys=True).encode()).hexdigest()


# -- checks -------------------------------------------------------------------------------------------------


def _check_tile(tile: TileSpec) -> None:
    if tile.codec not in record.CODECS:
        raise SourceError(f"unknown codec {tile.codec!r}; use {', '.join(record.CODECS)}")
    if not 1 <= tile.quality <= 100:
        raise SourceError(f"quality {tile.quality} is out of range; use 1 to 100")
    if not 8 <= tile.px <= 4096 or not 1 <= tile.um <= 10_000 or not 0 < tile.min_mpp <= 100:
        raise SourceError(
            f"tiles of {tile.um:g} um in {tile.px} px at {tile.min_mpp:g} um/px are out of range; use 1 to 10000 um, 8 to "
            "4096 px and up to 100 um/px"
        )


def _with_splits(metas: list[SectionMeta], splits: Mapping[str, str]) -> list[SectionMeta]:
    ids = [m.section_id for m in metas]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    if twice:
        raise SourceError(f"duplicate section ids: {', '.join(twice)}; rename them")
    alike = same_file(ids)
    if alike:
        raise SourceError(f"section ids must not differ only in case: {alike[0]} and {alike[1]}; rename one")
    unknown = sorted(set(splits) - set(ids))
    if unknown:
        raise SourceError(f"--split: no section {', '.join(unknown)}; the sections are {', '.join(ids)}")
    if not metas:
        raise SourceError("no sections to build from; check the source and --samples")
    metas = [_as_written(replace(m, split=splits.get(m.section_id, m.split))) for m in metas]
    for meta in metas:
        check_meta(meta, meta.section_id)
        _check_sizes(meta)
    return metas


def _check_sizes(meta: SectionMeta) -> None:
    """Check, before any work, the sizes that a manifest limits."""
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
        "files": [(f.name, sha256_of(f)) for f in files],
    }
    if options := stated(source.counts):  # the layer of the counts shows in nothing else
        facts["counts"] = options
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
