"""Functions that open sources and build shard sets with typed section facts. This module does not import torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from comtip_shards import builder
from comtip_shards.builder import BuildReport
from comtip_shards.builder.skipping import OnError
from comtip_shards.errors import SourceError
from comtip_shards.sections.facts import (
    CountOptions,
    PixelSource,
    PoolingOptions,
    SectionFacts,
    SourceOptions,
    parse_facts,
    source_options,
)
from comtip_shards.slides.tiles import FIELD_UM, check_tile_um
from comtip_shards.sources import SectionSource, open_source
from comtip_shards.sources.base import pick
from comtip_shards.sources.selection.choose import check_where, choose
from comtip_shards.storage.remote import is_url
from comtip_shards.study import StudyRow, is_study, open_study, read_study, sections_of
from comtip_shards.study.dry_run import SectionPlan, plan_rows
from comtip_shards.study.sections import Opener

HEST_PATCH_UM = 112.0
"""Width of the patches in HEST's patch files."""
Facts = SectionFacts | Mapping[str, Any] | None
ShardPaths = str | Path | Sequence[str | Path]
"""Folder or URL of a shard set, or a sequence of them: several sets that are read as one."""
_T = TypeVar("_T", PoolingOptions, CountOptions)


def build_shards(
    source: str | Path,
    out: str | Path,
    *,
    facts: Facts = None,
    pooling: PoolingOptions | None = None,
    counts: CountOptions | None = None,
    fmt: str = "auto",
    samples: Sequence[str] | None = None,
    where: Mapping[str, Collection[str]] | None = None,
    cache: Path | None = None,
    tile_um: float | None = None,
    progress: bool = False,
    on_error: OnError = "stop",
    **settings: Any,
) -> BuildReport:
    """Build a shard set from a source of any known format, or from the table of a study.

    Parameters
    ----------
    source
        A file, folder or URL in any format that ``comtip shards build`` reads, or a table of sources (csv, tsv or
        YAML) with the column ``path``, see :func:`comtip_shards.study.read_study`.
    out
        Folder of the new shard set; if it contains an interrupted build of the same set, that build is resumed.
    facts
        Facts about the sections, as :class:`SectionFacts` or as a dict (``{"mpp": 0.5}``).
    pooling, counts
        Options for pooling bins, cells and transcripts, and for the counts and positions of an AnnData.
    fmt, samples, where, cache
        Format, selection of sections, and cache for URLs, see :func:`comtip_shards.sources.open_source`.
    tile_um
        Width of a tile in um; by default 112, or the nearest width that all images have.
    progress
        Show a progress bar on a terminal, or log the progress without one.
    on_error
        ``skip`` leaves out a section that cannot be built and reports it; ``stop`` (default) raises the error.
    **settings
        Further keywords of :func:`comtip_shards.builder.build_shards`, e.g. ``tile_px``, ``splits``, ``jobs``.

    Returns
    -------
    BuildReport
        Folder, numbers of spots and genes, section ids, a summary as text, and the sections left out with ``on_error="skip"``.

    Raises
    ------
    comtip_shards.SourceError, comtip_shards.ShardError
        The input or the output folder cannot be used; the message names the file and the fix.

    Examples
    --------
    >>> import comtip_fast
    >>> report = comtip_fast.build_shards("sections", "set", tile_px=32, tile_um=224.0)
    >>> report.n_spots, report.n_genes
    (196, 30)
    """
    sources, failed = open_each(
        source,
        facts=facts,
        pooling=pooling,
        counts=counts,
        fmt=fmt,
        samples=samples,
        where=where,
        cache=cache,
        tile_um=tile_um,
        progress=progress,
        on_error=on_error,
    )
    return builder.build_shards(
        sources, Path(out), tile_um=tile_um, progress=progress, on_error=on_error, failed=failed, **settings
    )


def open_sections(source: str | Path, **options: Any) -> list[SectionSource]:
    """Open the sections of a source or of a study as :func:`open_each` does, and return only the sections."""
    return open_each(source, **options)[0]


def open_each(
    source: str | Path,
    *,
    facts: Facts = None,
    pooling: PoolingOptions | None = None,
    counts: CountOptions | None = None,
    fmt: str = "auto",
    samples: Sequence[str] | None = None,
    where: Mapping[str, Collection[str]] | None = None,
    cache: Path | None = None,
    tile_um: float | None = None,
    progress: bool = False,
    on_error: OnError = "stop",
) -> tuple[list[SectionSource], dict[str, str]]:
    """Open the sections of a source or of a study without reading them.

    Parameters are those of :func:`build_shards`.

    Returns
    -------
    sources, failed
        The sections, and ``{name: reason}`` of the rows of a study that cannot be opened; ``failed`` is empty for other sources,
        with ``on_error="stop"``, and with ``samples``.

    Raises
    ------
    comtip_shards.SourceError
        The input or an option cannot be used, or no section meets the selection; the message names the file and the fix.
    """
    options = stated_options(facts, pooling, counts)
    opener = _opener(where, cache, tile_um, progress)
    _check_cache(source, cache)
    if not is_study(source):
        return opener(str(source), samples, fmt, options), {}
    _check_study(source, fmt)
    rows = open_study(Path(source), _opener(None, cache, tile_um, progress), common=options, stop=on_error == "stop")
    sources, failed = sections_of(rows)
    wanted = set(pick(samples, [s.meta.section_id for s in sources], Path(source)))
    kept = choose(
        [s for s in sources if s.meta.section_id in wanted], check_where(where or {}), Path(source), lambda s: s.meta
    )
    return kept, failed if samples is None else {}


def plan_build(
    source: str | Path,
    *,
    facts: Facts = None,
    pooling: PoolingOptions | None = None,
    counts: CountOptions | None = None,
    fmt: str = "auto",
    samples: Sequence[str] | None = None,
    where: Mapping[str, Collection[str]] | None = None,
    cache: Path | None = None,
    tile_um: float | None = None,
) -> list[SectionPlan]:
    """Return what a build would do with each section, by reading headers only.

    Parameters are those of :func:`build_shards`. A section that cannot be built is listed with the reason; a URL is listed
    without being examined.

    Raises
    ------
    comtip_shards.SourceError
        The source does not exist, an option is invalid or has no effect, or no section meets the selection.
    """
    options = stated_options(facts, pooling, counts)
    _check_cache(source, cache)
    if is_study(source):
        _check_study(source, fmt)
        plans = plan_rows(Path(source), read_study(Path(source)), _opener(None, cache, tile_um, False), options)
    else:
        location = str(source) if is_url(source) else str(Path(source).absolute())
        if not is_url(source) and not Path(source).exists():
            raise SourceError(f"{source}: no such file or folder; check the path")
        rows = [StudyRow(number=1, path=location, format=None if fmt == "auto" else fmt)]
        plans = plan_rows(Path(source), rows, _opener(where, cache, tile_um, False), options)
        plans = [replace(plan, where="") for plan in plans]
    kept = set(pick(samples, [p.name for p in plans], Path(source)))
    plans = [p for p in plans if p.name in kept]
    opened = [(p.name, p.source.meta) for p in plans if p.source is not None]
    met = {name for name, _ in choose(opened, check_where(where or {}), Path(source), lambda item: item[1])}
    return [p for p in plans if p.source is None or p.name in met]


def _check_study(source: str | Path, fmt: str) -> None:
    """Raise SourceError if a format is stated for the table of a study, whose rows have formats of their own."""
    if fmt != "auto":
        raise SourceError(
            f"`fmt` {fmt} has no effect on the table {source}; leave it out, and name formats in a column 'format' of the table"
        )


def _check_cache(source: str | Path, cache: Path | None) -> None:
    """Raise SourceError if a cache for downloads is stated, but nothing is downloaded."""
    if cache is None:
        return
    paths = [row.path for row in read_study(Path(source))] if is_study(source) else [str(source)]
    if not any(map(is_url, paths)):
        raise SourceError(f"`cache` has no effect here: {source} names no URL, so nothing is downloaded; leave it out")


def _opener(
    where: Mapping[str, Collection[str]] | None, cache: Path | None, tile_um: float | None, progress: bool
) -> Opener:
    """Return a function that opens one source with these settings; for a URL, ``tile_um`` sets the default of ``pixels``."""
    if tile_um is not None:
        check_tile_um(tile_um)

    def open_one(path: str, samples: Sequence[str] | None, fmt: str, options: SourceOptions) -> list[SectionSource]:
        if is_url(path) and options.facts.pixels is None:
            # HEST patches are a tenth of the size of whole-slide images, but only HEST_PATCH_UM wide.
            pixels: PixelSource = "patches" if (tile_um or FIELD_UM) <= HEST_PATCH_UM else "wsi"
            options = replace(options, facts=replace(options.facts, pixels=pixels))
        return open_source(
            path,
            samples=samples,
            fmt=fmt,
            overrides=options,
            where=where,
            cache=cache if is_url(path) else None,
            progress=progress,
        )

    return open_one


def stated_options(facts: Facts, pooling: PoolingOptions | None, counts: CountOptions | None) -> SourceOptions:
    """Merge facts and options, check them, and return them in the form that readers of sources take.

    Raises
    ------
    comtip_shards.SourceError
        A value is invalid; the message names the option, the value and what it must be.
    """
    if not isinstance(facts, Mapping):
        given = SourceOptions(
            facts=facts or SectionFacts(), pooling=pooling or PoolingOptions(), counts=counts or CountOptions()
        )
        return source_options(given)
    stated, own_pooling, own_counts = parse_facts(facts)
    return source_options(
        SourceOptions(facts=stated, pooling=_merged(own_pooling, pooling), counts=_merged(own_counts, counts))
    )


def _merged(one: _T, other: _T | None) -> _T:
    """Merge two option objects; values of the second that are not None take precedence."""
    return one if other is None else replace(one, **{k: v for k, v in vars(other).items() if v is not None})


def names_of_sets(shards: ShardPaths) -> tuple[str, ...]:
    """Return ``shards``, one folder or URL or a sequence of them, as a tuple of strings."""
    return (str(shards),) if isinstance(shards, (str, Path)) else tuple(map(str, shards))


def shards_of_run(run: Path, configured: str) -> str:
    """Return the path of a run's shard set, which is searched for at the configured path and near the run folder.

    The candidates are ``configured``, a folder of the same name in ``run`` and, if ``configured`` is a relative path without
    ``..``, this path in ``run`` and in the folders above it. A relative path in a config is relative to the folder in which
    training was started, which is often a parent of the run folder.

    Parameters
    ----------
    run
        Folder of the run.
    configured
        ``data.shards`` of its config, or one of its sets. A URL, and a path at which no set is found, are returned unchanged.
    """
    if is_url(configured) or (Path(configured) / "manifest.json").is_file():
        return configured
    home = run.resolve()
    candidates = [home / Path(configured).name]
    if not Path(configured).is_absolute() and ".." not in Path(configured).parts:
        candidates += [folder / configured for folder in (home, *home.parents)]
    return next((str(folder) for folder in candidates if (folder / "manifest.json").is_file()), configured)
