"""Readers of tissue sections. Each module recognises its format and opens its sections lazily."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from comtip_shards.errors import SourceError
from comtip_shards.sources import legacy_st, manifest_table, space_ranger
from comtip_shards.sources.base import SectionSource, check_overrides

__all__ = ["FORMATS", "SectionSource", "open_source", "recognise"]
_Open = Callable[[Path, Sequence[str] | None, Mapping[str, str]], list[SectionSource]]
_READERS: dict[str, tuple[Callable[[Path], str | None], _Open, str]] = {
    "manifest": (manifest_table.recognise, manifest_table.open_sections, "a manifest.tsv with a column sample_id"),
    "space_ranger": (space_ranger.recognise, space_ranger.open_sections, "a folder with spatial/ from Space Ranger"),
    "legacy_st": (legacy_st.recognise, legacy_st.open_sections, "count tables ID.tsv.gz with images ID_*.jpg"),
}
FORMATS = tuple(_READERS)


def recognise(path: Path) -> tuple[str, str] | None:
    """Return (format, why) for the first reader that knows ``path``."""
    for name, (knows, _, _) in _READERS.items():
        why = knows(path)
        if why:
            return name, why
    return None


def open_source(
    path: Path | str, *, samples: Sequence[str] | None = None, fmt: str = "auto",
    overrides: Mapping[str, str] | None = None,
) -> list[SectionSource]:  # fmt: skip
    """Open the sections of a source, without reading them yet.

    Parameters
    ----------
    path
        A table or a folder.
    samples
        Section ids to take; None takes all.
    fmt
        ``auto`` or one of :data:`FORMATS`.
    overrides
        Facts that the source does not state: species, tissue, donor, platform, licence, attribution, mpp, image.

    Raises
    ------
    SourceError
        Naming the file and the fix.
    """
    path, facts = Path(path), dict(overrides or {})
    check_overrides(facts)
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder")
    if fmt == "auto":
        found = recognise(path)
        if found is None:
            known = "; ".join(f"{name}: {text}" for name, (_, _, text) in _READERS.items())
            raise SourceError(f"{path}: no known format. Looked for {known}")
        fmt = found[0]
    if fmt not in _READERS:
        raise SourceError(f"unknown format {fmt!r}; use auto or one of {', '.join(FORMATS)}")
    return _READERS[fmt][1](path, samples, facts)
