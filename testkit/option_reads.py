"""Record the option fields that a reader reads, to compare them with those that it declares."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from comtip_shards.errors import SourceError
from comtip_shards.sections.facts import (
    FACT_KEYS,
    CountOptions,
    PoolingOptions,
    SectionFacts,
    SourceOptions,
    option_names,
    source_options,
)
from comtip_shards.sources import detect


def fields_read(path: Path, **given: Any) -> set[str]:
    """List and open a source, load its first section, and return the names of the option fields that were read.

    Parameters
    ----------
    path
        A source of any format.
    **given
        Facts and options. If the section cannot be loaded with them, the fields read until then are returned.
    """
    options, read = source_options(given), set[str]()
    spied = SourceOptions(
        facts=_recording(SectionFacts, options.facts, read),
        pooling=_recording(PoolingOptions, options.pooling, read),
        counts=_recording(CountOptions, options.counts, read),
    )
    reader = detect(path)[0]
    if reader.catalogue is not None:
        reader.catalogue(path, spied.facts)
    source = reader.open(path, None, spied)[0]
    with suppress(SourceError):
        source.load()
    return read


def declared(path: Path) -> set[str]:
    """Return the option fields that the reader of a source declares."""
    return {*FACT_KEYS, *detect(path)[0].options}


def _recording(cls: Any, values: Any, read: set[str]) -> Any:
    names = set(option_names(cls))

    class Recording(cls):
        def __getattribute__(self, name: str) -> Any:
            if name in names:
                read.add(name)
            return super().__getattribute__(name)

    return Recording(**vars(values))
