"""Validation of an export at load time: hashes, consistent tables, finite numbers.

Rows of the level table and the identity embedding are matched to genes by their position in ``genes.tsv``. Without these
checks, a table that was cut, sorted or edited would give wrong predictions instead of an error. Exports contain the
SHA-256 of every file; older exports do not, and only their shapes and values are checked.
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
"""Files that are verified. README.md is not, because users may edit it."""
FILES = (*HASHED, "README.md", SUMS)
GENE_COLUMNS = ("key", "symbol", "ensembl", "name", "trained", "held_out")
FIX = "copy the export again, or write it again with `comtip export`"


class ExportError(ValueError):
    """An export is damaged or was edited. The message names the file and the fix."""


def write_sums(folder: Path) -> None:
    """Write ``SHA256SUMS`` in the format of ``sha256sum``."""
    (folder / SUMS).write_text("".join(f"{_sha256(folder / n)}  {n}\n" for n in HASHED), encoding="utf-8")


def verify_files(folder: Path, *, hashed: bool) -> None:
    """Check that every file exists and matches its hash.

    Parameters
    ----------
    folder
        Folder of the export.
    hashed
        Whether the export must have hashes, according to its ``config.json``.

    Raises
    ------
    ExportError
        A file is missing or does not match its hash.
    """
    for name in HASHED:
        if not (folder / name).is_file():
            raise ExportError(f"{folder / name}: missing, the export is incomplete; {FIX}")
    sums = folder / SUMS
    if not sums.is_file():
        if hashed:
            raise ExportError(f"{sums}: missing, the export is incomplete; {FIX}")
        return
    lines = sums.read_bytes()[: 1 << 16].decode("utf-8", "replace").splitlines()
    stated = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in HASHED:
        if stated.get(name) != _sha256(folder / name):
            raise ExportError(f"{folder / name}: the SHA-256 differs from {SUMS}; {FIX}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    ExportError
        The file does not contain a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path}: not valid JSON ({error}); {FIX}") from error
    if not isinstance(found, dict):
        raise ExportError(f"{path}: expected a JSON object, found {type(found).__name__}; {FIX}")
    return found


def read_genes(path: Path, n_trained: int) -> list[dict[str, str]]:
    """Read ``genes.tsv``: ``n_trained`` trained genes in the order of the model's identities, then held-out genes.

    Raises
    ------
    ExportError
        Columns, keys, flags, order or the number of trained genes are invalid.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, delimiter="\t")
            if tuple(reader.fieldnames or ()) != GENE_COLUMNS:
                raise ExportError(f"{path}: columns {reader.fieldnames}, expected {list(GENE_COLUMNS)}; {FIX}")
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ExportError(f"{path}: not a table of genes ({error}); {FIX}") from error
    seen: set[str] = set()
    for line, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ExportError(f"{path}, line {line}: the row does not have {len(GENE_COLUMNS)} cells; {FIX}")
        if (row["trained"], row["held_out"]) not in {("1", "0"), ("0", "1")}:
            raise ExportError(f"{path}, line {line}: trained and held_out must be 1 and 0, or 0 and 1; {FIX}")
        if (row["trained"] == "1") != (line - 2 < n_trained):
            raise ExportError(
                f"{path}, line {line}: the model has {n_trained} trained genes, which must come first and in the order of "
                f"its tables; {FIX}"
            )
        if not row["key"] or row["key"] in seen:
            raise ExportError(f"{path}, line {line}: the key {row['key']!r} is empty or duplicate; {FIX}")
        seen.add(row["key"])
    if len(rows) < n_trained:
        raise ExportError(f"{path}: {len(rows)} genes, but the model was trained on {n_trained}; {FIX}")
    return rows


def check_levels(arrays: Mapping[str, np.ndarray], path: Path, n_trained: int, n_levels: int) -> None:
    """Check names, shapes, dtypes and values of the level table, which has a row per trained gene and a global row.

    Raises
    ------
    ExportError
        An array is missing or invalid; the message names it.
    """
    R, Q = n_trained + 1, n_levels
    shapes = {"edges": (R, Q - 2), "value_cp10k": (R, Q), "value_raw": (R, Q), "log_prior": (R, Q)}
    if arrays.keys() != shapes.keys():
        raise ExportError(f"{path}: arrays {sorted(arrays)}, expected {sorted(shapes)}; {FIX}")
    for name, shape in shapes.items():
        array = arrays[name]
        if array.shape != shape or array.dtype != np.float32:
            raise ExportError(f"{path}: {name} is {array.dtype} {array.shape}, expected float32 {shape}; {FIX}")
        bad = np.isnan(array) if name == "edges" else ~np.isfinite(array)  # an unused edge is +inf
        if bad.any():
            raise ExportError(f"{path}: {name} has {int(bad.sum())} values that are not finite; {FIX}")
    if (arrays["edges"][:, 1:] < arrays["edges"][:, :-1]).any():
        raise ExportError(f"{path}: the edges of a gene are not ascending; {FIX}")


def check_weights(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    """Check that names and shapes of the tensors are those of the model, and that all values are finite.

    Raises
    ------
    ExportError
        A tensor is missing, unknown, of another shape or not finite; the message names it.
    """
    missing, unknown = _few(wanted.keys() - found.keys()), _few(found.keys() - wanted.keys())
    if missing or unknown:
        raise ExportError(f"{path}: tensors missing: {missing or 'none'}; unknown: {unknown or 'none'}; {FIX}")
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise ExportError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, the model needs {tuple(wanted[name].shape)}; {FIX}"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ExportError(f"{path}: {name} has values that are not finite; {FIX}")


def _few(names: Sequence[str] | set[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (" ..." if len(ordered) > 3 else "")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
