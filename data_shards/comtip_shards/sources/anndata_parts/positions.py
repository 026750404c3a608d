"""Spot centres of an AnnData: the key in ``obsm`` or the columns of ``obs``, and the order of the axes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from comtip_shards.errors import SourceError
from comtip_shards.sections.facts import CountOptions
from comtip_shards.sources.anndata_parts.store import Store

KEYS = ("spatial", "X_spatial", "spatial_coords", "coords", "coordinates", "image_coords")
"""Keys of ``obsm`` that hold positions, in order of preference."""
_OBS_COLUMNS = (("pxl_col_in_fullres", "pxl_row_in_fullres"), ("imagecol", "imagerow"))
_X, _Y = {"x", "col", "column"}, {"y", "row"}
"""Words that identify the axis in the name of a column, such as ``x_centroid``, ``posX`` and ``pxl_row_in_fullres``."""
_PX = re.compile(r"pixel|pxl?|image|img|fullres")
"""Part of the names of columns in px, next to which a table may have array coordinates."""
_JOINED = "coordinates?|coords?|positions?|pos|centroid|center|centre|pixel|pxl?|image|img|spatial"
"""Words that names have before or after the letter of the axis, without a separator (``imagecol``, ``xcoord``)."""
_JOINED_WORD = re.compile(f"^(?:{_JOINED})|(?:{_JOINED})$")


def read_centres(store: Store, options: CountOptions, notes: list[str]) -> np.ndarray:
    """Return spot centres as float64 (n, 2), x and y.

    Parameters
    ----------
    store
        Elements of the AnnData.
    options
        ``positions``: the key in ``obsm``; by default the first of :data:`KEYS`, else columns of ``obs``.
    notes
        A note is added unless the positions are those of ``obsm["spatial"]``.

    Raises
    ------
    SourceError
        There are no positions, the stated key does not exist, or the positions are not numbers, not two columns or not one
        row per spot.
    """
    keys, stated = store.keys("obsm"), options.positions
    if stated and stated not in keys:
        fix = (
            f"set `positions` to the key with spot centres (obsm has {', '.join(keys)})"
            if keys
            else "store x and y in image px there"
        )
        raise SourceError(f"{store.path}: no obsm[{stated!r}]; {fix}")
    key = stated or next((k for k in KEYS if k in keys), None)
    if key is not None:
        if key != "spatial":
            notes.append(f"positions from obsm[{key!r}]")
        found, n_spots = centres(store[f"obsm/{key}"], store.path, f"obsm[{key!r}]"), len(store["obs"])
        if len(found) != n_spots:
            raise SourceError(
                f"{store.path}: obsm[{key!r}] has {len(found)} rows and obs {n_spots}; write the file again with anndata"
            )
        return found
    obs = store["obs"]
    for pair in _OBS_COLUMNS:
        if set(pair) <= set(obs):
            notes.append(f"positions from obs columns {pair[0]} and {pair[1]}")
            return centres(obs[list(pair)], store.path, f"obs columns {pair[0]} and {pair[1]}")
    raise SourceError(
        f"{store.path}: no obsm['spatial']; store spot centres there, x and y in image px"
        + (f", or set `positions` to the key that has them (obsm has {', '.join(keys)})" if keys else "")
    )


def centres_of(store: Store) -> np.ndarray | None:
    """Return the positions that :func:`read_centres` finds by default, None if it raises an error."""
    try:
        return read_centres(store, CountOptions(), [])
    except SourceError:
        return None


def _is(name: str, words: set[str]) -> bool:
    """Return whether one of the words of a lower-case name is in ``words``."""
    return not words.isdisjoint(_JOINED_WORD.sub("", word) for word in re.split(r"[^a-z]+", name))


def _axes(names: Sequence[str]) -> list[int]:
    """Return the indices of the columns of x and y by their names, empty if these identify none; -1 for an axis with several."""
    axes = [[i for i, name in enumerate(names) if _is(name.lower(), words)] for words in (_X, _Y)]
    if max(map(len, axes)) > 1:  # tables of Space Ranger and Seurat also have the rows and columns of the array
        axes = [[i for i in found if _PX.search(names[i].lower())] or found for found in axes]
    return [found[0] if len(found) == 1 else -1 for found in axes] if all(axes) else []


def centres(spatial: Any, path: Path, what: str = "obsm['spatial']") -> np.ndarray:
    """Return positions as float64 (n, 2), x and y; ``path`` and ``what`` name them in messages.

    The columns of an array are x and y. The columns of a table may have any order, if names such as x, y, row or col identify
    them; columns in px (``pxl_row_in_fullres``, ``imagerow``) take precedence over those of the array.

    Raises
    ------
    SourceError
        The values are not numbers, or are not a table of at least two columns; or several columns of a table are those of one axis.
    """
    if isinstance(spatial, pd.DataFrame):
        names = [str(c) for c in spatial.columns]
        axes = _axes(names)
        if -1 in axes:
            raise SourceError(
                f"{path}: {what}: several columns for one axis ({', '.join(names[:8])}); keep those of x and y in image px"
            )
        spatial = spatial.iloc[:, axes] if axes else spatial
    try:
        values = np.asarray(spatial, np.float64)
    except (TypeError, ValueError) as error:
        raise SourceError(f"{path}: {what}: some values are not numbers; store x and y in image px") from error
    if values.ndim != 2 or values.shape[1] < 2:
        raise SourceError(f"{path}: {what}: the shape is {values.shape}, expected spots x 2; store x and y in image px")
    return values[:, :2]
