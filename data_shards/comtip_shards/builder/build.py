"""Sections to a shard set: deterministic to the byte, restartable, never half written.

Sections are read, cut and encoded into a staging folder, several side by side; a section already staged from the same
inputs with the same settings is not read again. Once all are there, the gene table is known, the shards are written and
the manifest comes last: a folder without a manifest is not a shard set.
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
from comtip_shards.builder.writer import SectionRecords, made_with, report, set_fingerprint, write_set
from comtip_shards.errors import SourceError
from comtip_shards.format import record
from comtip_shards.format.manifest import NAME, REPORTS, BuildPart, Manifest, TileSpec, sha256_of
from comtip_shards.names import same_file
from comtip_shards.qc import refuse_failed, write_pages
from comtip_shards.sections.leakage import check_duplicates, enforce_split_policy
from comtip_shards.sections.section import SectionMeta, check_meta
from comtip_shards.sources.base import SectionSource

STAGE_VERSION = 5
MAX_UM = 1e6


@dataclass
class BuildReport:
    """What a build did."""

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
        A new folder, or one that a build of the same set left unfinished.
    tile_px, tile_um, min_mpp
        S, the width of a tile in um, and the um per px that finer images are blurred to.
    codec, quality
        ``jpeg``, ``png`` (exact) or ``webp``; 1 to 100, of the first and the last.
    splits
        ``{section_id: "train" | "val" | "test"}``, wins over the sources' own.
    max_records
        RecordRun per tar file.
    strict
        Refuse sections that fail a check; otherwise failures are told in ``report/`` and the manifest's notes.
    allow_benchmark, benchmark_ids, auto_split, seed
        Of :func:`comtip_shards.sections.leakage.enforce_split_policy`.
    jobs
        Processes that work on sections side by side; the bytes do not depend on it.
    part
        (i, n), 1 <= i <= n: build the i-th of n parts of the set, perhaps on its own machine; all parts are given the
        same sources. :func:`comtip_shards.builder.merge.merge_sets` joins them.
    progress
        Show a bar on a terminal.

    Raises
    ------
    SourceError, ShardError
        Bad input, a donor on both sides of a split, an ``out`` that holds something else or cannot be written.
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
    place = _part_of(metas, part)
    own = [(sources[i], metas[i], tile) for i in (range(len(metas)) if place is None else place.sections)]
    prints = run_jobs(_fingerprint, own, jobs=jobs, label="hashing inputs", progress=progress)
    done = built_already(out, set_fingerprint(prints, max_records), place)
    if done is not None:
        if strict:
            refuse_failed((s.section_id, s.source["checks"]) for s in done.sections)
        clear_staging(out)
        return report_of(out, done, "(already built)")
    with writing(out) as staging:
        done = built_already(out, set_fingerprint(prints, max_records), place)
        if done is not None:  # by another process, since the first look
            return report_of(out, done, "(already built)")
        (out / NAME).unlink(missing_ok=True)  # of a set with files missing: without them it is not one
        work = [(*one, mark, staging) for one, mark in zip(own, prints, strict=True)]
        staged = run_jobs(stage_section, work, jobs=jobs, label="sections", progress=progress)
        beside = look_over(staged, out, strict=strict)
        run = partial(run_jobs, jobs=jobs, label="shards", progress=progress)
        manifest = write_set(staged, tile, out, max_records, run, place, notes, beside)
    return report_of(out, manifest)


def look_over(sections: Sequence[SectionRecords], out: Path, *, strict: bool = False) -> dict[str, str]:
    """Write what the checks found into ``report/`` and compare the sections; returns notes on those that stand twice."""
    heads = (s.head() for s in sections)  # one at a time
    write_pages(((h.meta.section_id, h.pages, h.source["checks"]) for h in heads), out / REPORTS)
    facts = [(h.meta, h.source) for h in (s.head() for s in sections)]
    if strict:
        refuse_failed((meta.section_id, source["checks"]) for meta, source in facts)
    return check_duplicates([(meta, source["print"]) for meta, source in facts])


def report_of(out: Path, manifest: Manifest, more: str = "") -> BuildReport:
    """Return what a finished set holds."""
    ids = [s.section_id for s in manifest.sections]
    return BuildReport(out, manifest.n_spots, manifest.n_genes, ids, report(manifest) + more)


def _part_of(metas: list[SectionMeta], part: tuple[int, int] | None) -> BuildPart | None:
    """Return which sections a part holds: every n-th, so that neighbours in the source, often alike, are spread."""
    if part is None:
        return None
    index, of = part
    if not 1 <= index <= of <= len(metas):
        raise SourceError(
            f"part {index}/{of} of {len(metas)} sections cannot be; write i/n, i from 1 to n, n at most that"
        )
    return BuildPart(index, of, list(range(index - 1, len(metas), of)), hash_of(metas))


def hash_of(metas: Sequence[SectionMeta]) -> str:
    """Return the hash of all sections' metadata that the parts of a build share."""
    return hashlib.sha256(json.dumps([asdict(m) for m in metas], sort_keys=True).encode()).hexdigest()


# -- checks -------------------------------------------------------------------------------------------------


def _check_tile(tile: TileSpec) -> None:
    if tile.codec not in record.CODECS:
        raise SourceError(f"codec {tile.codec!r}; use {', '.join(record.CODECS)}")
    if not 1 <= tile.quality <= 100:
        raise SourceError(f"quality {tile.quality}; use 1 to 100")
    if not 8 <= tile.px <= 4096 or not 1 <= tile.um <= 10_000 or not 0 < tile.min_mpp <= 100:
        raise SourceError(f"tiles of {tile.um:g} um in {tile.px} px at {tile.min_mpp:g} um/px cannot be; see --help")


def _with_splits(metas: list[SectionMeta], splits: Mapping[str, str]) -> list[SectionMeta]:
    ids = [m.section_id for m in metas]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    if twice:
        raise SourceError(f"section ids must differ: {', '.join(twice)} stands more than once")
    alike = same_file(ids)
    if alike:
        raise SourceError(f"section ids must differ in more than case: {alike[0]} and {alike[1]}; rename one")
    unknown = sorted(set(splits) - set(ids))
    if unknown:
        raise SourceError(f"--split names {', '.join(unknown)}, which is not among the sections {', '.join(ids)}")
    if not metas:
        raise SourceError("no sections to build from")
    metas = [_as_written(replace(m, split=splits.get(m.section_id, m.split))) for m in metas]
    for meta in metas:
        check_meta(meta, meta.section_id)
        _check_sizes(meta)
    return metas


def _check_sizes(meta: SectionMeta) -> None:
    """Refuse, before any work, what a manifest cannot hold."""
    for what, value in (("spot diameter", meta.spot_diameter_um), ("distance between spots", meta.spot_pitch_um)):
        if not 0 < value <= MAX_UM:
            raise SourceError(
                f"section {meta.section_id}: the {what} is {value:g} um, and 0 to {MAX_UM:g} is needed; the source must state it, or "
                "hold at least two spots at different positions to measure it by"
            )


def _as_written(meta: SectionMeta) -> SectionMeta:
    """Return numbers as floats: 4 and 4.0 would be two texts in the manifest."""
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
        "made_with": made_with(),
        "files": [(f.name, sha256_of(f)) for f in files],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
