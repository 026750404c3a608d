"""Sections of an AnnData: the libraries of ``uns["spatial"]``, or those that a column of ``obs`` distinguishes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from comtip_shards.errors import SourceError
from comtip_shards.sources.anndata_parts.picture import library_names
from comtip_shards.sources.anndata_parts.positions import centres_of
from comtip_shards.sources.anndata_parts.store import Store, stem_of
from comtip_shards.sources.files.names import by_section_id, safe_id
from comtip_shards.sources.geometry import median_gap

LIBRARY_COLUMNS = ("library_id", "library", "sample_id", "sample")
"""Columns of ``obs`` to prefer if several contain the names of the libraries."""
OWN_COLUMNS = LIBRARY_COLUMNS[:2]
"""Columns that name the library of a spot by convention (scanpy, squidpy). The others may also name a part of a section."""
INTERLEAVED = 0.75
"""Sections lie on top of each other if the median spot distance in the whole file is below this share of that within a section."""
_UNNAMED = {"", "nan", "none", "<na>", "na"}


@dataclass(frozen=True)
class Library:
    """One section of an AnnData."""

    key: str
    """Its key in ``uns["spatial"]``, "" if it has no entry there."""
    value: str = ""
    """Its value in :attr:`column`."""
    column: str = ""
    """Column of ``obs`` that names the section of a spot; "" if all rows belong to this section."""
    n_unnamed: int = 0
    """Rows of ``obs`` that have no value in :attr:`column` and thus belong to no section of the AnnData."""

    @property
    def lost(self) -> str:
        """A note on the rows that belong to no section; "" if there are none."""
        if not self.n_unnamed:
            return ""
        return f"{self.n_unnamed} spots of the file belong to no section, because obs['{self.column}'] has no value for them"

    def rows(self, obs: pd.DataFrame) -> np.ndarray:
        """Return the indices of the section's rows in ``obs``, int64."""
        if not self.column:
            return np.arange(len(obs))
        return np.flatnonzero(obs[self.column].astype(str).to_numpy() == self.value)


def libraries_of(store: Store) -> dict[str, Library]:
    """Return a dict from section id to the section of an AnnData.

    - If several entries of ``uns["spatial"]`` have spots, each entry is one section. A column of ``obs`` must have all their names; any
      further name in this column is also a section, and spots without a name are left out and counted.
    - Otherwise, if a column of ``obs`` names several sections, as in files that were concatenated without ``uns``, each name is one
      section. This column is one of :data:`OWN_COLUMNS`, or another of :data:`LIBRARY_COLUMNS` if the spots of its sections are
      interleaved. It is not used if ``uns["spatial"]`` has one entry of another name, and the spots are not interleaved.
    - Otherwise all spots are one section, which is named after the file.

    Raises
    ------
    SourceError
        ``uns["spatial"]`` has several entries, but no column of ``obs`` has all their names, or columns assign spots to them
        differently; two sections have the same section id; or ``obs`` names several sections whose spots are interleaved, but the
        only entry of ``uns["spatial"]`` has another name.
    """
    keys = library_names(store.group("uns/spatial"))
    if len(keys) > 1:
        keys = _with_spots(keys, store["obs"])
    if len(keys) > 1:
        column = column_of(store["obs"], store, keys)
        others = [value for value in _names_in(store["obs"], column) if value not in keys]
        found = [Library(key, key, column) for key in keys] + [Library("", value, column) for value in others]
    else:
        key = keys[0] if keys else ""
        column, values = _named_in_obs(store)
        if key and column and key not in values:
            if _interleaved(store, column, values):
                raise SourceError(
                    f"{store.path}: obs['{column}'] names {len(values)} libraries ({', '.join(values[:3])}) whose spots lie on "
                    f"top of each other, but uns['spatial'] has only {key!r}; rename it to one of them and read this section "
                    "alone, or write one file per section"
                )
            column = ""
        if not column:
            return {safe_id(stem_of(store.path)): Library(key)}
        found = [Library(value if value == key else "", value, column) for value in values]
    ids = by_section_id((library.value for library in found), "libraries", store.path)
    unnamed = int((~store["obs"][found[0].column].astype(str).isin(list(ids.values()))).sum())
    found = [replace(library, n_unnamed=unnamed) for library in found]
    return dict(zip(ids, found, strict=True))


def _with_spots(keys: list[str], obs: pd.DataFrame) -> list[str]:
    """Return the keys that have spots, or all if no column shows it: subsets of an AnnData keep all entries of ``uns``."""
    for column in LIBRARY_COLUMNS:
        values = _names_in(obs, column) if column in obs else []
        if values and set(values) < set(keys):
            return [key for key in keys if key in values]
    return keys


def _names_in(obs: pd.DataFrame, column: str) -> list[str]:
    """Return the names of sections in a column of ``obs``, in order of appearance."""
    return [str(v) for v in obs[column].astype(str).unique() if str(v).lower() not in _UNNAMED]


def column_of(obs: pd.DataFrame, store: Store, libraries: Sequence[str]) -> str:
    """Return the column of ``obs`` that contains the names of all ``libraries``; :data:`LIBRARY_COLUMNS` take precedence.

    Raises
    ------
    SourceError
        No column contains all names, or several columns outside :data:`LIBRARY_COLUMNS` do and assign spots differently.
    """
    fits = [str(c) for c in obs if set(libraries) <= set(obs[c].astype(str).unique()) and obs[c].nunique() < len(obs)]
    fits = [c for c in LIBRARY_COLUMNS if c in fits] or fits
    if not fits:
        raise SourceError(
            f"{store.path}: several libraries in uns['spatial'], but no obs['library_id'] or other column with the values "
            f"{', '.join(libraries)}; add it, or write one file per section"
        )
    values = obs[fits[0]].astype(str).to_numpy()
    differing = next((c for c in fits[1:] if (obs[c].astype(str).to_numpy() != values).any()), None)
    if differing is not None and fits[0] not in LIBRARY_COLUMNS:
        raise SourceError(
            f"{store.path}: obs['{fits[0]}'] and obs['{differing}'] assign spots to libraries differently; add obs['library_id']"
        )
    return fits[0]


def _named_in_obs(store: Store) -> tuple[str, list[str]]:
    """Return the column of ``obs`` that names several sections, and their names in order of appearance; ("", []) if there is none."""
    obs = store["obs"]
    for column in LIBRARY_COLUMNS:
        if column not in obs:
            continue
        values = _names_in(obs, column)
        if not 1 < len(values) <= len(obs) // 2:
            continue
        if column in OWN_COLUMNS or _interleaved(store, column, values):
            return column, values
    return "", []


def _interleaved(store: Store, column: str, values: Sequence[str]) -> bool:
    """Return whether the spots of the named sections lie between each other, so that they are not parts of one section.

    The result is False if the file has no positions.
    """
    xy = centres_of(store)
    if xy is None:
        return False
    names = store["obs"][column].astype(str).to_numpy()
    own = [gap for value in values if (gap := median_gap(xy[names == value])) > 0]
    return bool(own) and median_gap(xy) < INTERLEAVED * float(np.median(own))
