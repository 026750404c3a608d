"""Sections to a shard set: deterministic to the byte, restartable, never half written.

Sections are read, cut and encoded one by one into a staging folder; a section already staged from the same inputs
with the same settings is not read again. Once all are there, the gene table is known, the shards are written and
the manifest comes last: a folder without a manifest is not a shard set.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import starmap
from pathlib import Path

from tqdm import tqdm

from comtip_shards import record, spots
from comtip_shards.curate import refuse_failed, write_pages
from comtip_shards.errors import ShardError, SourceError
from comtip_shards.leakage import check_duplicates, keep_apart
from comtip_shards.manifest import NAME, TileSpec, read_manifest, sha256_of
from comtip_shards.section import SectionMeta, check_meta
from comtip_shards.sources.base import SectionSource
from comtip_shards.stage import Staged, stage_section
from comtip_shards.writer import FOLDERS, GENES_FILE, REPORT_FILE, made_with, set_fingerprint, write_set

STAGING, REPORTS = ".building", "report"
STAGE_VERSION = 3


@dataclass
class BuildReport:
    """What a build did."""

    out: Path
    n_spots: int
    n_genes: int
    sections: list[str]
    text: str


def build_shards(
    sources: Sequence[SectionSource], out: Path, *, tile_px: int = 128, tile_um: float = 224.0, min_mpp: float = 4.0,
    codec: str = "jpeg", quality: int = 95, splits: Mapping[str, str] | None = None, max_records: int = 512,
    strict: bool = False, allow_benchmark: Collection[str] = (), benchmark_ids: Path | None = None,
    auto_split: Sequence[float] | None = None, seed: int = 0, progress: bool = False,
) -> BuildReport:  # fmt: skip
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
        ``jpeg``, ``png`` (exact) or ``webp``.
    splits
        ``{section_id: "train" | "val" | "test"}``, wins over the sources' own.
    max_records
        Records per tar file.
    strict
        Refuse sections that fail a check; otherwise failures are told in ``report/`` and the manifest's notes.
    allow_benchmark, benchmark_ids, auto_split, seed
        Of :func:`comtip_shards.leakage.keep_apart`.
    progress
        Show a bar on a terminal.

    Raises
    ------
    SourceError, ShardError
        Bad input, a donor on both sides of a split, or an ``out`` that holds something else.
    """
    out = Path(out)
    tile = TileSpec(tile_px, float(tile_um), float(min_mpp), codec, quality)
    _check_tile(tile)
    metas, notes = keep_apart(
        _with_splits([s.meta for s in sources], splits or {}), allow=allow_benchmark, benchmark_ids=benchmark_ids,
        auto_split=auto_split, seed=seed,
    )  # fmt: skip
    prints = [_fingerprint(s, m, tile) for s, m in zip(sources, metas, strict=True)]
    whole = set_fingerprint(prints, max_records)
    if _already_built(out, whole):
        report = (out / REPORT_FILE).read_text(encoding="utf-8")
        manifest = read_manifest(out)
        if strict:
            refuse_failed((s.section_id, s.source["checks"]) for s in manifest.sections)
        ids = [s.section_id for s in manifest.sections]
        return BuildReport(out, manifest.n_spots, manifest.n_genes, ids, report + "(already built)")
    staging = out / STAGING
    staging.mkdir(parents=True, exist_ok=True)
    staged: list[Staged] = []
    bar = tqdm(
        list(zip(sources, metas, prints, strict=True)),
        desc="sections",
        unit="section",
        disable=None if progress else True,
    )
    for source, meta, mark in bar:
        bar.set_postfix_str(meta.section_id)
        staged.append(stage_section(source, meta, tile, mark, staging))
    heads = [s.head() for s in staged]
    write_pages([(h.meta.section_id, h.pages, h.source["checks"]) for h in heads], out / REPORTS)
    if strict:
        refuse_failed((h.meta.section_id, h.source["checks"]) for h in heads)
    notes |= check_duplicates([(h.meta, h.source["print"]) for h in heads])
    report_text = write_set(staged, tile, out, max_records, starmap, notes=notes)
    shutil.rmtree(staging)
    manifest = read_manifest(out)
    return BuildReport(out, manifest.n_spots, manifest.n_genes, [m.section_id for m in metas], report_text)


# -- checks -------------------------------------------------------------------------------------------------


def _check_tile(tile: TileSpec) -> None:
    if tile.codec not in record.CODECS:
        raise SourceError(f"codec {tile.codec!r}; use {', '.join(record.CODECS)}")
    if not 8 <= tile.px <= 4096 or not 1 <= tile.um <= 10_000 or not 0 < tile.min_mpp <= 100:
        raise SourceError(f"tiles of {tile.um:g} um in {tile.px} px at {tile.min_mpp:g} um/px cannot be; see --help")


def _with_splits(metas: list[SectionMeta], splits: Mapping[str, str]) -> list[SectionMeta]:
    ids = [m.section_id for m in metas]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    if twice:
        raise SourceError(f"section ids must differ: {', '.join(twice)} stands more than once")
    unknown = sorted(set(splits) - set(ids))
    if unknown:
        raise SourceError(f"--split names {', '.join(unknown)}, which is not among the sections {', '.join(ids)}")
    if not metas:
        raise SourceError("no sections to build from")
    metas = [replace(m, split=splits.get(m.section_id, m.split)) for m in metas]
    for meta in metas:
        check_meta(meta, meta.section_id)
    return metas


def _fingerprint(source: SectionSource, meta: SectionMeta, tile: TileSpec) -> str:
    files = [f for p in source.inputs for f in (sorted(p.iterdir()) if p.is_dir() else [p]) if f.is_file()]
    facts = {
        "stage": STAGE_VERSION, "meta": asdict(meta), "tile": asdict(tile), "made_with": made_with(),
        "files": [(f.name, sha256_of(f)) for f in files],
    }  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _already_built(out: Path, fingerprint: str) -> bool:
    """Tell whether ``out`` is this very set; refuse it when it holds anything else."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise ShardError(f"{out} is a file; give a folder")
    if (out / NAME).is_file():
        if read_manifest(out).fingerprint == fingerprint:
            return True
        raise ShardError(f"{out} holds another shard set; give a new folder or delete this one")
    ours = {STAGING, REPORTS, GENES_FILE, REPORT_FILE, spots.FILE, NAME + ".writing", *FOLDERS}
    foreign = sorted(p.name for p in out.iterdir() if p.name not in ours)
    if foreign:
        raise ShardError(f"{out} is not empty ({', '.join(foreign[:3])}); give a new folder")
    return False
