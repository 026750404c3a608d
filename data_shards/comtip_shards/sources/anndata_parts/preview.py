"""Size and kind of the counts of an AnnData from its headers and first values, for a dry run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from comtip_shards.errors import SourceError
from comtip_shards.sections.facts import CountOptions
from comtip_shards.sources.anndata_parts.counts import COUNTS, LIKE_COUNTS, stated_key
from comtip_shards.sources.anndata_parts.store import FileStore, Store

FIRST = 4096
"""Number of values that are checked."""


def preview_genes(store: Store, path: Path, options: CountOptions) -> int | None:
    """Return the number of columns of the counts that a build would read; None if only a complete read can tell.

    Parameters
    ----------
    store, path, options
        As for :func:`comtip_shards.sources.anndata_parts.counts.raw_counts`, which reads the counts.

    Raises
    ------
    SourceError
        The first values show that a build would refuse the file, because it holds no counts.
    """
    if not isinstance(store, FileStore):
        return None
    key = stated_key(store, options.layer, path)
    found = [key] if key is not None else [k for k in COUNTS if k in store]
    unclear = False
    for name in found:
        counts = _are_counts(store, name)
        if counts:
            return _shape(store.group(name))[1]
        unclear = unclear or counts is None
    others = [n for n in store.keys("layers") if n != "counts" and _are_counts(store, f"layers/{n}")]
    named = [n for n in others if LIKE_COUNTS.search(n)]
    if key is None and len(named) == 1:
        return _shape(store.group(f"layers/{named[0]}"))[1]
    if unclear or (found and options.round_counts):
        return None
    fix = f"set `layer` to a layer of integers ({', '.join(others)})" if others else "add raw counts to the file"
    if not found:
        raise SourceError(f"{path}: layers['counts'], X and raw.X are missing; {fix}")
    values = _first(store.group(found[0]))
    if values.dtype.kind == "b":
        raise SourceError(f"{path}: {found[0]} holds true and false; {fix}")
    odd = values[(values != np.rint(values)) | (values < 0) | ~np.isfinite(values)]
    raise SourceError(
        f"{path}: {found[0]} has values that are not counts, such as {odd[0]:.6g}; raw counts are needed: integers, not normalised "
        f"values; {fix}, or, for fractional counts (ambient RNA correction), set `round_counts` to yes"
    )


def _are_counts(store: FileStore, key: str) -> bool | None:
    """Return whether the first values are counts; None if all of them are 0."""
    values = _first(store.group(key))
    if values.dtype.kind == "b":
        return False
    if not values.any():
        return None
    return bool(np.isfinite(values).all() and values.min() >= 0 and (values == np.rint(values)).all())


def _first(item: Any) -> np.ndarray:
    if hasattr(item, "keys"):
        return np.asarray(item["data"][:FIRST])
    n_rows = max(1, FIRST // max(1, item.shape[1]))
    return np.asarray(item[:n_rows]).ravel()


def _shape(item: Any) -> tuple[int, int]:
    stored = item.attrs.get("shape", item.attrs.get("h5sparse_shape"))
    rows, columns = item.shape if stored is None else stored
    return int(rows), int(columns)
