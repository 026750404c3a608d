"""Filter sections by metadata: ``{"tissue": ["breast"], "species": ["human"]}``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from comtip_shards.errors import SourceError
from comtip_shards.sections.section import SectionMeta
from comtip_shards.sources.base import CatalogueRow

WHERE_KEYS = ("species", "tissue", "platform", "donor", "dataset")
ALSO_CALLED = {"organ": "tissue", "technology": "platform"}
_T = TypeVar("_T")


def check_where(where: Mapping[str, Collection[str]]) -> dict[str, Collection[str]]:
    """Return the filter with aliases of keys replaced (``organ``, ``technology``).

    Raises
    ------
    SourceError
        A key is unknown, or its value is empty or a single string.
    """
    out: dict[str, Collection[str]] = {}
    for key, values in where.items():
        key = ALSO_CALLED.get(key, key)
        if key not in WHERE_KEYS:
            raise SourceError(f"`where` key {key!r} is unknown; use one of {', '.join(WHERE_KEYS)}")
        if not values or isinstance(values, str):
            raise SourceError(
                f"`where` key {key}: {values!r} is empty or not a list; give a list of at least one value"
            )
        out[key] = values
    return out


def choose(
    items: Sequence[_T],
    where: Mapping[str, Collection[str]],
    path: Path | str,
    facts: Callable[[_T], SectionMeta | CatalogueRow],
) -> list[_T]:
    """Return the items that match every key of a filter, in order.

    Values match whole words without case: ``breast`` matches "Breast" and "breast, HER2+". An exact match takes
    precedence: if the value "Visium" exists, ``visium`` does not match "Visium HD".

    Raises
    ------
    SourceError
        No item matches a filter; the message lists the available values.
    """
    kept, before = list(items), ""
    for key, values in where.items():
        have = [str(getattr(facts(item), key)) for item in kept]
        meets = [any(matches(text, value, have) for value in values) for text in have]
        if not any(meets):
            there = ", ".join(sorted(set(have))[:20]) or "none"
            raise SourceError(f"{path}: no section{before} has {key} {' or '.join(values)}; choose from: {there}")
        before += f"{' and' if before else ' with'} {key} {' or '.join(values)}"
        kept = [item for item, meet in zip(kept, meets, strict=True) if meet]
    return kept


def matches(text: str, value: str, have: Collection[str]) -> bool:
    """Return whether ``text`` equals ``value`` or, if none of ``have`` equals it, contains it as whole words.

    Case and punctuation are ignored.
    """
    text, value = _plain(text), _plain(value)
    if any(_plain(other) == value for other in have):
        return text == value
    return f" {value} " in f" {text} "


def _plain(text: str) -> str:
    return " ".join("".join(c if c.isalnum() or c == "+" else " " for c in text.lower()).split())
