"""Validation of an export at load time: hashes, consistent tables, finite numbers.

Rows of the level table and the identity embedding are matched to genes by their position in ``genes.tsv``. Without these
checks, a table that was cut, sorted or edited would give wrong predictions instead of an error. Exports contain the
SHA-256 of every file but the README. Older exports lack these hashes, and only their shapes and values are checked.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comtip_shards.names import is_formula, shown
from torch import Tensor

from comtip_fast import lineage
from comtip_fast.genes.vectors import GeneVectors

SUMS = "SHA256SUMS"
HASHED = ("config.json", "model.safetensors", "levels.safetensors", "genes.tsv", lineage.FILE)
"""Files of every export that are verified. README.md is not, because users may edit it."""
FIRST_WITH_LINEAGE = 3
"""First version of exports with ``lineage.json``; the parents of earlier exports are unknown."""
READOUT = "readout.safetensors"
"""The readout; exports of version 1, and of runs with ``readout.kind: levels``, have none."""
VECTORS = "gene_vectors.safetensors"
"""The gene vectors of a model that was trained with ``text.gene_vectors``."""
FILES = (*HASHED, READOUT, VECTORS, "README.md", SUMS)
GENE_COLUMNS = ("key", "symbol", "ensembl", "name", "trained", "held_out")
FIX = "copy the export again, or write it from a checkpoint of the run (`comtip export` with the option checkpoint)"
"""How to replace a damaged export. Without a checkpoint, ``comtip export`` copies the run's export, which may be damaged."""


@dataclass(frozen=True)
class ExportGene:
    """A gene in the model's gene table."""

    key: str
    """``species:symbol``."""
    symbol: str
    ensembl: str
    name: str
    trained: bool
    held_out: bool
    """Excluded from training to test unseen genes; the opposite of ``trained``."""


class ExportError(ValueError):
    """An export is damaged or was edited. The message names the file and the fix."""


def hashed_files(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the files that are verified, according to ``config.json``."""
    old = meta["version"] < FIRST_WITH_LINEAGE
    always = tuple(n for n in HASHED if not (old and n == lineage.FILE))
    parts = {READOUT: meta.get("readout"), VECTORS: meta.get("gene_vectors")}
    return (*always, *(name for name, present in parts.items() if present))


def write_sums(folder: Path, files: Sequence[str]) -> None:
    """Write the SHA-256 of ``files`` to ``SHA256SUMS`` in ``folder``, in the format of ``sha256sum``."""
    (folder / SUMS).write_text("".join(f"{sha256_of(folder / n)}  {n}\n" for n in files), encoding="utf-8")


def verify_files(folder: Path, files: Sequence[str], *, hashed: bool) -> dict[str, str]:
    """Check that every file exists and matches its hash; return the stated SHA-256 by file, empty for an export without hashes.

    Parameters
    ----------
    folder
        Folder of the export.
    files
        From :func:`hashed_files`.
    hashed
        Whether the export must have hashes, according to its ``config.json``.

    Raises
    ------
    ExportError
        A file or its hash is missing, or they do not match.
    """
    for name in files:
        if not (folder / name).is_file():
            raise ExportError(f"{folder / name}: missing, so the export is incomplete; {FIX}")
    sums = folder / SUMS
    if not sums.is_file():
        if hashed:
            raise ExportError(f"{sums}: missing, so the export is incomplete; {FIX}")
        return {}
    lines = sums.read_bytes()[: 1 << 16].decode("utf-8", "replace").splitlines()
    stated = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in files:
        if name not in stated:
            raise ExportError(f"{sums}: no SHA-256 of {name}; {FIX}")
        if stated[name] != sha256_of(folder / name):
            raise ExportError(f"{folder / name}: the SHA-256 differs from {SUMS}; {FIX}")
    return stated


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    FileNotFoundError
        There is no such file.
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


def read_genes(path: Path, n_trained: int) -> list[ExportGene]:
    """Read ``genes.tsv``: ``n_trained`` trained genes in the order of the model's identities, then held-out genes.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ExportError
        The file is not a UTF-8 table, its columns, keys, flags, order or number of trained genes are invalid, or a spreadsheet
        would run a cell as a formula.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, delimiter="\t")
            if tuple(reader.fieldnames or ()) != GENE_COLUMNS:
                found = list(reader.fieldnames or ())
                raise ExportError(f"{path}: columns {found}, expected {list(GENE_COLUMNS)}; {FIX}")
            rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ExportError(f"{path}: not a table of genes ({error}); {FIX}") from error
    seen: set[str] = set()
    for number, (line, row) in enumerate(rows):
        if None in row or None in row.values():
            raise ExportError(f"{path}, line {line}: the row does not have {len(GENE_COLUMNS)} cells; {FIX}")
        if (row["trained"], row["held_out"]) not in {("1", "0"), ("0", "1")}:
            raise ExportError(f"{path}, line {line}: trained and held_out must be 1 and 0, or 0 and 1; {FIX}")
        if (row["trained"] == "1") != (number < n_trained):
            raise ExportError(
                f"{path}, line {line}: the model has {n_trained} trained genes, which must come first and in the order of "
                f"its tables; {FIX}"
            )
        if not row["key"] or row["key"] in seen:
            problem = f"the key {row['key']!r} is a duplicate" if row["key"] else "the key is empty"
            raise ExportError(f"{path}, line {line}: {problem}; {FIX}")
        formula = next(filter(is_formula, row.values()), None)
        if formula is not None:
            raise ExportError(
                f"{path}, line {line}: a spreadsheet would run the cell {shown(formula)} as a formula; {FIX}"
            )
        seen.add(row["key"])
    if len(rows) < n_trained:
        raise ExportError(f"{path}: {len(rows)} genes, but the model was trained on {n_trained}; {FIX}")
    return [
        ExportGene(r["key"], r["symbol"], r["ensembl"], r["name"], r["trained"] == "1", r["held_out"] == "1")
        for _, r in rows
    ]


def read_lineage(
    path: Path, sections: Sequence[Mapping[str, Any]], genes: Sequence[ExportGene], weights: str
) -> lineage.Lineage:
    """Read ``lineage.json`` and check that its last run is the run of this export.

    Parameters
    ----------
    path
        Path of ``lineage.json``.
    sections, genes
        Sections of ``config.json`` and genes of ``genes.tsv``.
    weights
        SHA-256 of ``model.safetensors``; empty for an export without hashes.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ExportError
        The file is invalid or has no run, or its last run has other sections, genes or weights.
    """
    try:
        found = lineage.Lineage.load(path)
    except ValueError as error:
        raise ExportError(str(error)) from error
    if not found.runs:
        raise ExportError(f"{path}: no run, expected at least the run of this export; {FIX}")
    own = found.own
    same = {
        "sections": [(s.section_id, s.split) for s in own.sections]
        == [(s["section_id"], s["split"]) for s in sections],
        "trained genes": list(own.trained_genes) == [g.key for g in genes if g.trained],
        "held-out genes": list(own.held_out_genes) == [g.key for g in genes if g.held_out],
        "weights": not weights or own.weights == weights,
    }
    wrong = [what for what, equal in same.items() if not equal]
    if wrong:
        raise ExportError(f"{path}: the last run and this export differ in {' and '.join(wrong)}; {FIX}")
    return found


def read_vectors(path: Path, stated: Any, own: lineage.LineageRun, dim: int) -> GeneVectors | None:
    """Read the gene vectors of an export; return None for a model without gene vectors.

    Parameters
    ----------
    path
        Path of the file of gene vectors.
    stated
        SHA-256 of the vectors according to ``config.json``; None if the model has none.
    own
        The export's own run.
    dim
        Number of components of the model's gene vectors; 0 if it has none.

    Raises
    ------
    FileNotFoundError
        The model has gene vectors, but there is no such file.
    ExportError
        The file is damaged or belongs to another model, or ``config.json`` and ``lineage.json`` disagree.
    """
    in_lineage = None if own.vectors is None else own.vectors.sha256
    if stated != in_lineage:
        raise ExportError(
            f"{path.parent}: the SHA-256 of the gene vectors is {stated!r} in config.json, but {in_lineage!r} in lineage.json; {FIX}"
        )
    if bool(stated) != bool(dim):
        raise ExportError(
            f"{path.parent / 'config.json'}: gene_vectors is {stated!r}, but the model expects gene vectors of {dim} components "
            f"(0: none); {FIX}"
        )
    if not stated:
        return None
    try:
        found = GeneVectors.load(path)
    except ValueError as error:
        problem = str(error).rpartition("; ")[0]  # without its fix, which is for a file that a user has computed
        raise ExportError(f"{problem}; {FIX}") from error
    if found.sha256 != stated or found.vector_GK.shape[1] != dim:
        raise ExportError(
            f"{path}: gene vectors {found.sha256} of {found.vector_GK.shape[1]} components, expected {stated} of {dim}; {FIX}"
        )
    return found


def check_levels(arrays: Mapping[str, np.ndarray], path: Path, n_trained: int, n_levels: int) -> None:
    """Check names, shapes, dtypes and values of the level table, which has a row per trained gene and a global row.

    Raises
    ------
    ExportError
        An array is missing, unknown or invalid.
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
            what = "NaN" if name == "edges" else "not finite"
            raise ExportError(f"{path}: {int(bad.sum())} of {bad.size} values of {name} are {what}; {FIX}")
    if (arrays["edges"][:, 1:] < arrays["edges"][:, :-1]).any():
        raise ExportError(f"{path}: the edges of a gene are not ascending; {FIX}")


def check_weights(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    """Check that names and shapes of the tensors are those of the model, and that all values are finite.

    Raises
    ------
    ExportError
        A tensor is missing, unknown, of another shape or not finite; the message names it.
    """
    missing, unknown = few(wanted.keys() - found.keys()), few(found.keys() - wanted.keys())
    if missing or unknown:
        raise ExportError(f"{path}: tensors missing: {missing or 'none'}; unknown: {unknown or 'none'}; {FIX}")
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise ExportError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, the model needs {tuple(wanted[name].shape)}; {FIX}"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ExportError(f"{path}: {name} has values that are not finite; {FIX}")


def few(names: Sequence[str] | set[str]) -> str:
    """Return the first three names in alphabetical order, with ``...`` if there are more, for messages."""
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (" ..." if len(ordered) > 3 else "")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
