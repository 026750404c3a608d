"""Raw counts of an AnnData: in ``X``, a layer or ``raw``, chosen by content or by the caller."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from comtip_shards.errors import SourceError
from comtip_shards.sections.facts import CountOptions
from comtip_shards.sections.scaled_counts import not_raw, scaled_total
from comtip_shards.sources.anndata_parts.store import Store
from comtip_shards.sources.files.tables import as_counts

COUNTS = ("layers/counts", "X", "raw/X")
"""Elements that are searched for counts first, in order."""
LIKE_COUNTS = re.compile(r"count|raw|umi", re.IGNORECASE)
"""Names of layers that are taken for counts if their values are counts."""


def raw_counts(store: Store, path: Path, options: CountOptions) -> tuple[sparse.csr_matrix, pd.DataFrame, list[str]]:
    """Return the raw counts: a matrix of integer values (n_obs, n_genes), the ``var`` table of its columns, and notes.

    Parameters
    ----------
    store
        Elements of the AnnData.
    path
        File name for messages.
    options
        ``layer``: the layer with the counts, or ``X`` or ``raw``; ``round_counts``: round fractional counts.

    Raises
    ------
    SourceError
        The stated layer does not exist or holds no counts; no layer is stated and counts are found neither in an element of
        :data:`COUNTS` nor in exactly one other layer with ``count``, ``raw`` or ``umi`` in its name; or a matrix is damaged.
        Fractional values are accepted as counts if ``round_counts`` is set. The message names the options.
    """
    key = stated_key(store, options.layer, path)
    if key is not None:
        matrix, notes = expression(store, key), [f"counts are those of {key} (`layer`)"]
        if is_counts(matrix) and scaled_total(matrix) is None:
            return matrix, _var_of(store, key), notes
        return _rounded(store, key, matrix, path, options, notes, "")
    found = [k for k in COUNTS if k in store]
    for key in found:
        matrix = expression(store, key)
        if has_counts(matrix):
            notes = [] if key == "X" == found[0] else [f"counts are those of {key} ({path.name})"]
            return matrix, _var_of(store, key), notes
    others = [n for n in store.keys("layers") if n != "counts" and has_counts(expression(store, f"layers/{n}"))]
    named = [n for n in others if LIKE_COUNTS.search(n)]
    if len(named) == 1:
        key = f"layers/{named[0]}"
        notes = [f"counts are those of {key}, the only layer of counts by name and content ({path.name})"]
        return expression(store, key), _var_of(store, key), notes
    hint = f"set `layer` to a layer of integers ({', '.join(others)})" if others else ""
    # An empty X is only a placeholder, so fractional values elsewhere are those to report or to round.
    filled = next((k for k in found if expression(store, k).count_nonzero()), None)
    if filled is None:
        what = f"every value of {' and '.join(found)} is 0" if found else "layers['counts'], X and raw.X are missing"
        raise SourceError(f"{path}: {what}; {hint or 'add raw counts to the file'}")
    return _rounded(store, filled, expression(store, filled), path, options, [], hint)


def expression(store: Store, key: str) -> sparse.csr_matrix:
    """Return an expression matrix, (n_obs, n_genes), by its key in the store.

    Raises
    ------
    SourceError
        It cannot be read, or its sparse format is damaged: with indices beyond the shape, SciPy would read outside its arrays.
    """
    value = store[key]
    if sparse.issparse(value):
        try:
            value.check_format(full_check=True)
        except (ValueError, TypeError, IndexError) as error:
            raise SourceError(
                f"{store.path}: {key} is damaged ({error}); copy the file again, or write it again with anndata"
            ) from error
    # SciPy has no float16.
    return sparse.csr_matrix(value.astype(np.float32) if value.dtype == np.float16 else value)


def has_counts(matrix: sparse.csr_matrix) -> bool:
    """Return whether a matrix holds raw counts above zero: a matrix of zeros is a placeholder, and scaled counts are not raw."""
    return is_counts(matrix) and bool(matrix.count_nonzero()) and scaled_total(matrix) is None


def is_counts(matrix: sparse.csr_matrix) -> bool:
    """Return whether all stored values are finite, non-negative integers; bool is a mask of detected genes, not counts."""
    data = matrix.data
    if data.dtype.kind == "b":
        return False
    if data.size == 0 or not np.isfinite(data).all():
        return bool(data.size == 0)
    return bool(data.min() >= 0 and (data == np.rint(data)).all())


def stated_key(store: Store, layer: str | None, path: Path) -> str | None:
    """Return the key of the stated layer, None if none is stated; raises SourceError if it does not exist."""
    if layer is None:
        return None
    key = {"X": "X", "raw": "raw/X", "raw.X": "raw/X", "raw/X": "raw/X"}.get(layer, f"layers/{layer}")
    if key not in store:
        have = [*store.keys("layers"), *(k.split("/")[0] for k in ("X", "raw/X") if k in store)]
        fix = f"set `layer` to one of {', '.join(have)}" if have else "add the counts to the file"
        raise SourceError(f"{path}: no layer {layer!r}; {fix}")
    return key


def _var_of(store: Store, key: str) -> pd.DataFrame:
    return pd.DataFrame(store["raw/var" if key.startswith("raw/") else "var"])


def _rounded(
    store: Store,
    key: str,
    matrix: sparse.csr_matrix,
    path: Path,
    options: CountOptions,
    notes: list[str],
    hint: str,
) -> tuple[sparse.csr_matrix, pd.DataFrame, list[str]]:
    """Return rounded counts if ``round_counts`` is set and the values allow it; otherwise raise SourceError."""
    var, data = _var_of(store, key), matrix.data
    total = scaled_total(matrix) if is_counts(matrix) else None
    if total is not None:
        raise SourceError(f"{path}: {key}: {not_raw(total)}; {hint or 'add raw counts to the file'}")
    usable = data.dtype.kind != "b" and np.isfinite(data).all() and (data >= 0).all()
    if not options.round_counts or not usable:
        names, genes = [str(v) for v in store["obs"].index], [str(v) for v in var.index]
        rounding = "for fractional counts (ambient RNA correction) set `round_counts` to yes" if usable else ""
        fix = "; ".join(filter(None, [hint, rounding]))
        as_counts(matrix, path, names, genes, what=key, fix=fix)
        what = "true and false" if data.dtype.kind == "b" else "no counts"
        raise SourceError(f"{path}: {key} holds {what}; {fix or 'add raw counts to the file'}")
    out = matrix.copy()
    out.data = np.rint(data)
    changed, total = int((out.data != data).sum()), float(data.sum())
    note = f"{key} rounded to integers (`round_counts`): {changed} of {data.size} values changed, sum {total:g} to {out.data.sum():g}"
    out.eliminate_zeros()
    return out, var, [*notes, note]
