"""Open the sources in the rows of a study; an error in one row does not affect the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from comtip_shards.errors import SourceError, UnknownSection
from comtip_shards.sections.benchmark import benchmark_of, load_benchmark
from comtip_shards.sections.facts import CountOptions, PoolingOptions, SectionFacts, SourceOptions
from comtip_shards.sections.section import Section, SectionMeta
from comtip_shards.sources import READERS
from comtip_shards.sources.base import SectionSource
from comtip_shards.sources.tenx.run import picture_word
from comtip_shards.storage.remote import is_url
from comtip_shards.study.table import SUFFIXES, StudyRow, read_study

Opener = Callable[[str, Sequence[str] | None, str, SourceOptions], list[SectionSource]]
"""``opener(path or URL, section ids or None for all, format, options)``."""
_T = TypeVar("_T", SectionFacts, PoolingOptions, CountOptions)


@dataclass(frozen=True)
class OpenedRow:
    """A row of a study with its sections, or the error that opening them raised."""

    row: StudyRow
    where: str
    """Table and line, for messages."""
    sources: list[SectionSource] = field(default_factory=list)
    error: str | None = None

    @property
    def name(self) -> str:
        """The section id that the row states, or its path."""
        return self.row.id or self.row.sample or self.row.path


def is_study(path: str | Path) -> bool:
    """Return whether a path is the table of a study: a csv, tsv or YAML file that no reader recognises as a source."""
    if is_url(path) or Path(path).suffix.lower() not in SUFFIXES or not Path(path).is_file():
        return False
    return not any(reader.recognise(Path(path)) for reader in READERS)


def open_study(
    path: Path, opener: Opener, *, common: SourceOptions | None = None, stop: bool = True
) -> list[OpenedRow]:
    """Open the sources of a table without reading the sections.

    Parameters
    ----------
    path
        The table, see :func:`comtip_shards.study.table.read_study`.
    opener
        Opens a source, for example :func:`comtip_shards.sources.open_source` with a cache.
    common
        Facts and options for all rows; a cell of the table takes precedence.
    stop
        Whether the first row that cannot be opened raises. If False, errors are returned in :attr:`OpenedRow.error`.

    Raises
    ------
    SourceError
        The table is invalid; or, with ``stop``, a row cannot be opened.
    """
    ids: dict[str, str] = {}
    out = []
    for row in read_study(path):
        opened = open_row(path, row, opener, common or SourceOptions())
        for source in opened.sources:
            first = ids.setdefault(source.meta.section_id, opened.where)
            if first != opened.where:
                text = f"the section id {source.meta.section_id} is already that of {first}; state another in column id"
                opened = replace(opened, sources=[], error=text)
                break
        if stop and opened.error is not None:
            raise SourceError(f"{opened.where}: {opened.error}")
        out.append(opened)
    return out


def sections_of(rows: Sequence[OpenedRow]) -> tuple[list[SectionSource], dict[str, str]]:
    """Return the sections of all rows, and ``{name: error}`` of the rows that cannot be opened."""
    failed = {f"{r.name} ({r.where})": r.error for r in rows if r.error is not None}
    return [source for row in rows for source in row.sources], failed


def open_row(path: Path, row: StudyRow, opener: Opener, common: SourceOptions) -> OpenedRow:
    """Open the source of one row; a SourceError is returned in :attr:`OpenedRow.error`.

    Parameters
    ----------
    path
        The table.
    row
        The row.
    opener, common
        As for :func:`open_study`.
    """
    where = f"{path}, {'entry' if path.suffix.lower() in ('.yaml', '.yml') else 'line'} {row.number}"
    options = merged(common, _located(row.options, path.parent))
    try:
        sources = _selected(row, partial(_open, row, path.parent, opener, options))
        return OpenedRow(row, where, [_stated(source, row) for source in sources])
    except SourceError as error:
        return OpenedRow(row, where, error=str(error))


def _open(
    row: StudyRow, folder: Path, opener: Opener, options: SourceOptions, samples: Sequence[str] | None
) -> list[SectionSource]:
    location = row.path if is_url(row.path) else str(folder / row.path)
    return opener(location, samples, row.format or "auto", options)


def _selected(row: StudyRow, opened: Callable[[Sequence[str] | None], list[SectionSource]]) -> list[SectionSource]:
    """Return the section named ``sample`` or, without ``sample``, named ``id``; if the row states neither, all sections.

    If the source has no section named ``id``, it must have a single section, which is returned.
    """
    if row.sample is not None or row.id is None:
        return opened(None if row.sample is None else [row.sample])
    try:
        return opened([row.id])
    except UnknownSection:
        sources = opened(None)
    if len(sources) > 1:
        names = ", ".join(source.meta.section_id for source in sources[:20])
        raise SourceError(
            f"{row.path}: {len(sources)} sections, but one id ({row.id}); state one of these section ids in column sample: {names}"
        )
    return sources


def _stated(source: SectionSource, row: StudyRow) -> SectionSource:
    """Return the section with the id and the split that its row states; a benchmark section must keep its id."""
    old = source.meta
    meta = replace(old, section_id=row.id or old.section_id, split=row.split or old.split)
    known = load_benchmark()
    listed = benchmark_of(old, known)
    if listed is not None and benchmark_of(meta, known) != listed:
        raise SourceError(
            f"{row.path}: the section {old.section_id} is in benchmark task {listed.task} and must keep its id, by which it "
            "is excluded from training; leave the column id empty for it"
        )
    return source if meta == old else with_meta(source, meta)


def with_meta(source: SectionSource, meta: SectionMeta) -> SectionSource:
    """Return a source with the metadata ``meta``, which the section also has when it is read."""
    spots = source.load_spots
    return replace(
        source,
        meta=meta,
        load=partial(_load_as, source.load, meta),
        load_spots=None if spots is None else partial(_load_as, spots, meta),
    )


def _load_as(load: Callable[[], Section], meta: SectionMeta) -> Section:
    return replace(load(), meta=meta)


def merged(common: SourceOptions, own: SourceOptions) -> SourceOptions:
    """Return options in which ``own`` takes precedence over ``common``."""
    return SourceOptions(
        facts=_merged(common.facts, own.facts),
        pooling=_merged(common.pooling, own.pooling),
        counts=_merged(common.counts, own.counts),
    )


def _merged(common: _T, own: _T) -> _T:
    return replace(common, **{name: value for name, value in vars(own).items() if value is not None})


def _located(options: SourceOptions, folder: Path) -> SourceOptions:
    """Return options in which relative paths of files that exist in the table's folder are joined to it; others are unchanged."""
    image, alignment = (_file(value, folder) for value in (options.facts.image, options.pooling.alignment))
    return replace(
        options,
        facts=replace(options.facts, image=image),
        pooling=replace(options.pooling, alignment=alignment),
    )


def _file(value: str | None, folder: Path) -> str | None:
    if value is None or Path(value).is_absolute() or picture_word(value) is not None:
        return value
    beginning = Path(value.partition("{id}")[0])
    known = (folder / value).exists() or ("{id}" in value and (folder / beginning).parent.is_dir())
    return str(folder / value) if known else value
