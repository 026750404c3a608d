"""Dry run of a build: the sections it would contain, the facts that are missing, and estimates of its size and time."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from comtip_shards.builder.build import assign_splits
from comtip_shards.builder.tile_choice import CHANGE, scale_cost, tile_text
from comtip_shards.errors import SourceError
from comtip_shards.format.manifest import TileSpec
from comtip_shards.sections.facts import SectionFacts, SourceOptions
from comtip_shards.sections.section import StatedSplits
from comtip_shards.sections.splits import is_stated
from comtip_shards.sources import detect, locate
from comtip_shards.sources.base import SectionSource, named
from comtip_shards.storage.remote import is_url
from comtip_shards.study.headers import SectionSize, previewed, section_size
from comtip_shards.study.sections import OpenedRow, Opener, merged, open_row
from comtip_shards.study.table import StudyRow

ASSUMED = {"species": "human", "tissue": "unknown", "mpp": 0.5}
"""Placeholders for missing facts, with which the dry run searches for further problems. A build never uses them."""
NO_DONOR = (
    "the donor is not stated, so each counts as a donor of its own, and sections of one donor may get different splits; set "
    "`donor`, or the column donor of a study"
)
SPOTS_PER_S = 78.0
"""Spots per second of one process: 732 spots of four sections in tiles of 224 px (data_shards/README.md), checks included."""
DECODED_PER_S = 30e6
"""Bytes of input decoded per second; this dominates for a large image with few spots."""
JPEG_95, FIXED_BYTES, DETAIL = 0.75, 620, -0.45
"""Bytes per px of a tile without upsampling at quality 95; constant bytes per tile; exponent of the upsampling factor. Fitted to
four sections of ``data_shards/samples`` in seven settings."""
CODEC_SIZE = {"jpeg": 1.0, "webp": 1.0, "png": 3.5}
"""Size of a tile relative to JPEG."""
ENTRY_BYTES = 2560
"""Tar headers, padding and JSON of one spot."""
MAX_DETECTED = 4000
"""Maximum assumed number of genes with counts per spot: the median in the sections of ``data_shards/samples``."""


@dataclass(frozen=True)
class SectionPlan:
    """What a build would do with one section."""

    name: str
    """Section id, or the path of a source that could not be opened."""
    where: str
    """Table and row, for messages; empty for a source without a table."""
    fmt: str
    """Name of the format, ``?`` if it is unknown."""
    source: SectionSource | None = None
    """The opened section, None if it could not be opened."""
    size: SectionSize = field(default_factory=SectionSize)
    problems: tuple[str, ...] = ()
    """Messages on what is missing or wrong, each with the fix."""
    assumed: frozenset[str] = frozenset()
    """Facts for which a placeholder of :data:`ASSUMED` was used."""
    remote: bool = False
    """Whether the source is a URL, which is not examined."""


def plan_rows(
    path: Path, rows: Sequence[StudyRow], opener: Opener, common: SourceOptions | None = None
) -> list[SectionPlan]:
    """Return the plans of the sections of all rows; only headers are read, and nothing is written.

    Parameters
    ----------
    path
        The table; paths in it are relative to its folder.
    rows
        From :func:`comtip_shards.study.table.read_study`.
    opener, common
        As for :func:`comtip_shards.study.sections.open_study`.
    """
    plans: list[SectionPlan] = []
    for row in rows:
        plans += _plan_row(path, row, opener, common or SourceOptions())
    seen: dict[str, str] = {}
    for i, plan in enumerate(plans):
        first = seen.setdefault(plan.name, plan.where) if plan.source is not None else plan.where
        if first != plan.where:
            text = f"the section id {plan.name} is already that of {first}; state another in column id"
            plans[i] = SectionPlan(plan.name, plan.where, plan.fmt, problems=(*plan.problems, text))
    return plans


def _plan_row(path: Path, row: StudyRow, opener: Opener, common: SourceOptions) -> list[SectionPlan]:
    if is_url(row.path):
        name = row.id or row.sample or row.path
        return [SectionPlan(name, f"{path}, {row.number}", row.format or "?", remote=True)]
    opened, problems, assumed = _probe(path, row, opener, common)
    fmt = row.format if row.format not in (None, "auto") else _format(path.parent / row.path)
    if not opened.sources:
        return [SectionPlan(opened.name, opened.where, fmt, problems=tuple(problems))]
    return [_plan_section(s, opened.where, fmt, problems, frozenset(assumed)) for s in opened.sources]


def _plan_section(
    source: SectionSource, where: str, fmt: str, problems: Sequence[str], assumed: frozenset[str]
) -> SectionPlan:
    size, own = section_size(source), list(problems)
    if source.preview is not None:
        try:
            with named(f"section {source.meta.section_id}", source.inputs):
                size = previewed(size, source.preview())
        except (SourceError, OSError) as error:
            own.append(str(error))
    return SectionPlan(source.meta.section_id, where, fmt, source, size, tuple(own), assumed)


def _probe(
    path: Path, row: StudyRow, opener: Opener, common: SourceOptions
) -> tuple[OpenedRow, list[str], dict[str, str | float]]:
    """Open a row, and return (opened row, problems, placeholders used).

    A reader reports one missing fact at a time, so each one is replaced by its placeholder until no further one is missing.
    """
    problems: list[str] = []
    assumed: dict[str, str | float] = {}
    while True:
        stand_ins = SourceOptions(facts=SectionFacts(**assumed))  # type: ignore[arg-type]
        opened = open_row(path, row, opener, merged(stand_ins, common))
        if opened.error is None:
            return opened, problems, assumed
        named = [n for n in re.findall(r"`(\w+)`", opened.error) if n in ASSUMED]
        if not any(n in assumed for n in named):  # otherwise the placeholder is the cause
            problems.append(opened.error)
        stated = {n for o in (common.facts, row.options.facts) for n, v in vars(o).items() if v is not None}
        missing = next((n for n in named if n not in assumed and n not in stated), None)
        if missing is None:
            return opened, problems, assumed
        assumed[missing] = ASSUMED[missing]  # type: ignore[assignment]


def plan_splits(
    plans: Sequence[SectionPlan], splits: StatedSplits, auto_split: Sequence[float] | None, **policy: Any
) -> tuple[list[SectionPlan], str | None]:
    """Return (plans with the donors and splits that a build would assign, None), or (plans, error) if a build would refuse them.

    Parameters
    ----------
    plans
        From :func:`plan_rows`.
    splits, auto_split, **policy
        As for :func:`comtip_shards.builder.build.assign_splits`. ``auto_split`` is ignored unless all sections could be
        opened, because the donors of the others are unknown.
    """
    opened = [p for p in plans if p.source is not None]
    all_opened = len(opened) == len(plans)
    if not opened:
        return list(plans), None
    known = {i: s for i, s in splits.items() if all_opened or i in {p.name for p in opened}}
    try:
        metas, _ = assign_splits(
            [p.source.meta for p in opened if p.source is not None],
            known,
            auto_split=auto_split if all_opened else None,
            **policy,
        )
    except SourceError as error:
        return list(plans), str(error)
    final = iter(metas)
    return [p if p.source is None else replace(p, source=replace(p.source, meta=next(final))) for p in plans], None


def _format(path: Path) -> str:
    try:
        return detect(locate(path))[0].name
    except (ValueError, OSError):
        return "?"


def tile_bytes(mpp: float, tile: TileSpec) -> float:
    """Return the estimated size in bytes of an encoded tile from an image with ``mpp`` um per px."""
    upsampled = max(1.0, max(mpp, tile.min_mpp) / (tile.um / tile.px))
    quality = 1.0 if tile.codec == "png" else max(0.2, 1 - 0.04 * (95 - tile.quality))
    return FIXED_BYTES + JPEG_95 * tile.px**2 * upsampled**DETAIL * CODEC_SIZE[tile.codec] * quality


def estimate(plan: SectionPlan, tile: TileSpec) -> tuple[float, float] | None:
    """Return the estimated (bytes, build time in seconds of one process) of a section, None if its number of spots is unknown."""
    if plan.source is None or plan.size.spots is None:
        return None
    detected = min(MAX_DETECTED, (plan.size.genes or MAX_DETECTED) // 2)
    n_bytes = plan.size.spots * (tile_bytes(plan.source.meta.mpp, tile) + ENTRY_BYTES + 4 * detected)
    seconds = plan.size.spots / SPOTS_PER_S * (0.5 + 0.5 * (tile.px / 224) ** 2) + plan.size.n_bytes / DECODED_PER_S
    return n_bytes, seconds


def plan_text(
    plans: Sequence[SectionPlan], tile: TileSpec, out: Path, jobs: int = 1, refused: str | None = None
) -> str:
    """Return the report of a dry run.

    Parameters
    ----------
    plans
        From :func:`plan_rows`.
    tile
        The tile of the set.
    out
        Folder of the set, for the free space of its disk.
    jobs
        Number of processes.
    refused
        Why the set cannot be built, from :func:`plan_splits`.
    """
    good = [p for p in plans if p.source is not None]
    metas = [p.source.meta for p in good if p.source is not None]
    lines = ["dry run: headers only, nothing is written", tile_text(metas, tile)[0]]
    lines += [line for plan in plans for line in _section_lines(plan, tile)]
    found = [e for e in (estimate(p, tile) for p in good if not p.problems) if e is not None]
    n_bytes, seconds = sum(b for b, _ in found), sum(s for _, s in found)
    ready = sum(not p.problems and not p.remote for p in plans)
    longest = max((s for _, s in found), default=0.0)
    if any(scale_cost(meta, tile) for meta in metas):
        lines += ["", CHANGE]
    unknown = sum(not is_stated(meta.donor) for meta in metas)
    if unknown:
        lines += ["", f"{unknown} of {len(metas)} sections: {NO_DONOR}"]
    remote = sum(p.remote for p in plans)
    duration = _time(max(seconds / max(1, jobs), longest))
    total = (
        f"{ready} of {len(plans)} sections can be built{f', {remote} at a URL are not examined' if remote else ''}: about "
        f"{_size(n_bytes)} in {out}, twice that during the build ({_size(_free(out))} are free), about {duration} with {jobs} "
        f"process{'es' if jobs > 1 else ''}"
    )
    basis = (
        f"estimates: {SPOTS_PER_S:g} spots/s per process in tiles of 224 px and {DECODED_PER_S / 1e6:g} MB/s of input, measured "
        "on two CPU cores; bytes per px as measured on data_shards/samples; the numbers of spots are upper bounds, "
        "those of pseudo-spots are estimates"
    )
    lines += ["", *([] if refused is None else [f"the set cannot be built: {refused}"]), total, basis]
    return "\n".join(lines) + "\n"


def _section_lines(plan: SectionPlan, tile: TileSpec) -> list[str]:
    if plan.remote:
        return [f"{plan.name}: not examined: the files of a URL are downloaded when the set is built"]
    lines = []
    if plan.source is not None:
        size, meta = plan.size, plan.source.meta
        px = "x".join(map(str, size.image_px)) if size.image_px else "size unknown until it is read"
        scale = "scale missing" if "mpp" in plan.assumed else f"{meta.mpp:.4g} um/px"
        facts = {"species": meta.species, "tissue": meta.tissue}
        shown = " ".join("?" if name in plan.assumed else value for name, value in facts.items())
        donor = meta.donor if is_stated(meta.donor) else "?"
        lines.append(
            f"{plan.name}: {plan.fmt}, {shown}, donor {donor}, split {meta.split or 'none'}; {_count(size.spots)} spots, "
            f"{_count(size.genes)} genes; image {size.image or '?'} {px}, {scale}"
        )
        cost = None if "mpp" in plan.assumed else scale_cost(meta, tile)
        lines += [f"  {cost}"] if cost else []
        found = estimate(plan, tile)
        lines.append(
            f"  about {_size(found[0])}, {_time(found[1])}" if found else "  size and time unknown until it is read"
        )
    else:
        lines.append(f"{plan.name}: {plan.fmt}")
    lines += [f"  cannot be built{_row_of(plan)}: {problem}" for problem in plan.problems]
    return lines


def _row_of(plan: SectionPlan) -> str:
    """Return the row of the plan in parentheses for a message, "" for a source without a table."""
    return f" ({plan.where})" if plan.where else ""


def _free(out: Path) -> int:
    folder = next(p for p in (out.absolute(), *out.absolute().parents) if p.is_dir())
    return shutil.disk_usage(folder).free


def _count(n: int | None) -> str:
    return "?" if n is None else f"{n:,}"


def _size(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )
