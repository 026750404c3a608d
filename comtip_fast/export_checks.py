"""Checks of an export when it is loaded: hashes of its files, rows that belong together, finite numbers.

Rows of the level table and of the identity table belong to genes by their position in ``genes.tsv``, so a table that was
cut, sorted or edited gives wrong predictions, not an error. Exports state the SHA-256 of every file; older exports do not
and are checked by shape alone.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SUMS = "SHA256SUMS"
HASHED = ("config.json", "model.safetensors", "levels.safetensors", "genes.tsv")
"""Files that are read; README.md is for people, who may edit it."""
FILES = (*HASHED, "README.md", SUMS)
GENE_COLUMNS = ("key", "symbol", "ensembl", "name", "trained", "held_out")
_FIX = "get the export again, or write it again with `comtip export`"


class ExportError(ValueError):
    """An export is damaged or was edited; names the file and what to do."""


def write_sums(folder: Path) -> None:
    """Write ``SHA256SUMS``, as ``sha256sum -c`` reads it."""
    (folder / SUMS).write_text("".join(f"{_sha256(folder / n)}  {n}\n" for n in HASHED), encoding="utf-8")


def verify_files(folder: Path, *, hashed: bool) -> None:
    """Check that every file is there and is what was written.

    Parameters
    ----------
    folder
        The export.
    hashed
        ``config.json`` says that the export has hashes.

    Raises
    ------
    ExportError
        A file is missing, or differs from its hash.
    """
    for name in HASHED:
        if not (folder / name).is_file():
            raise ExportError(f"{folder / name}: missing, the export is not whole; {_FIX}")
    sums = folder / SUMS
    if not sums.is_file():
        if hashed:
            raise ExportError(f"{sums}: missing, the export is not whole; {_FIX}")
        return
    lines = sums.read_bytes()[: 1 << 16].decode("utf-8", "replace").splitlines()
    stated = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in HASHED:
        if stated.get(name) != _sha256(folder / name):
            raise ExportError(f"{folder / name}: not what was written (its SHA-256 differs from {SUMS}); {_FIX}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    ExportError
        The file is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path}: no JSON ({error}); {_FIX}") from error
    if not isinstance(found, dict):
        raise ExportError(f"{path}: a JSON object is needed, found {type(found).__name__}; {_FIX}")
    return found


def read_genes(path: Path, n_trained: int) -> list[dict[str, str]]:
    """Read ``genes.tsv``: trained genes first, one row for each identity of the model, then held-out genes.

    Raises
    ------
    ExportError
        Columns, keys, flags, order or the number of trained genes are not those of an export.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, delimiter="\t")
            if tuple(reader.fieldnames or ()) != GENE_COLUMNS:
                raise ExportError(f"{path}: columns {reader.fieldnames}, expected {list(GENE_COLUMNS)}; {_FIX}")
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ExportError(f"{path}: no table of genes ({error}); {_FIX}") from error
    seen: set[str] = set()
    for line, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ExportError(f"{path}, line {line}: not {len(GENE_COLUMNS)} cells; {_FIX}")
        if (row["trained"], row["held_out"]) not in {("1", "0"), ("0", "1")}:
            raise ExportError(f"{path}, line {line}: trained and held_out must be 1 and 0, or 0 and 1; {_FIX}")
        if (row["trained"] == "1") != (line - 2 < n_trained):
            raise ExportError(
                f"{path}, line {line}: the model has {n_trained} trained genes, which come first and in the order of "
                f"its tables; {_FIX}"
            )
        if not row["key"] or row["key"] in seen:
            raise ExportError(f"{path}, line {line}: the key {row['key']!r} is empty or there twice; {_FIX}")
        seen.add(row["key"])
    if len(rows) < n_trained:
        raise ExportError(f"{path}: {len(rows)} genes, the model was trained on {n_trained}; {_FIX}")
    return rows


def check_levels(arrays: Mapping[str, np.ndarray], path: Path, n_trained: int, n_levels: int) -> None:
    """Check names, shapes and numbers of the level table: a row for each trained gene, and the global one.

    Raises
    ------
    ExportError
        Names the array.
    """
    R, Q = n_trained + 1, n_levels
    shapes = {"edges": (R, Q - 2), "value_cp10k": (R, Q), "value_raw": (R, Q), "log_prior": (R, Q)}
    if arrays.keys() != shapes.keys():
        raise ExportError(f"{path}: arrays {sorted(arrays)}, expected {sorted(shapes)}; {_FIX}")
    for name, shape in shapes.items():
        array = arrays[name]
        if array.shape != shape or array.dtype != np.float32:
            raise ExportError(f"{path}: {name} is {array.dtype} {array.shape}, expected float32 {shape}; {_FIX}")
        bad = np.isnan(array) if name == "edges" else ~np.isfinite(array)  # an unused edge is +inf
        if bad.any():
            raise ExportError(f"{path}: {name} holds {int(bad.sum())} numbers that are not finite; {_FIX}")
    if (arrays["edges"][:, 1:] < arrays["edges"][:, :-1]).any():
        raise ExportError(f"{path}: edges of a gene are not ascending; {_FIX}")


def check_weights(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    """Check that the tensors are those of the model, of its shapes, and finite.

    Raises
    ------
    ExportError
        Names the tensors.
    """
    missing, unknown = _few(wanted.keys() - found.keys()), _few(found.keys() - wanted.keys())
    if missing or unknown:
        raise ExportError(f"{path}: tensors missing: {missing or 'none'}; unknown: {unknown or 'none'}; {_FIX}")
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise ExportError(
                f"{path}: {name} is {tuple(tensor.shape)}, the model needs {tuple(wanted[name].shape)}; {_FIX}"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ExportError(f"{path}: {name} holds numbers that are not finite; {_FIX}")


def _few(names: Sequence[str] | set[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (" ..." if len(ordered) > 3 else "")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
