"""Checkpoints on disk: written atomically, hashed, verified on load, without pickle.

    checkpoints/step_00000100/{model.safetensors, optim.safetensors, state.json, SHA256SUMS}    with optim.ema also ema.safetensors

Folders whose names start with a dot are being written or deleted; :func:`clear_leftovers` removes those of a killed
process. Checkpoints that fail verification are renamed to ``damaged_step_*`` and kept for inspection.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from comtip_shards.storage.atomic import atomic_folder, link_or_copy
from comtip_shards.storage.disk import disk_fix, disk_trouble
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from comtip_fast.training.distributed.failures import ADVICE, RestartError

log = logging.getLogger("comtip_fast")
FORMAT, VERSION = "comtip-checkpoint", 1
SUMS = "SHA256SUMS"
FILES = ("model.safetensors", "optim.safetensors", "state.json")
EMA = "ema.safetensors"
"""File of the averaged weights; only in checkpoints of runs with ``optim.ema``."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another format version. The message names the folder and the fix."""


@dataclass
class Checkpoint:
    """Everything that is needed to resume a run."""

    model: dict[str, torch.Tensor]
    """State dict of the module."""
    optim: dict[str, torch.Tensor]
    """Optimizer state as tensors named ``<parameter>/<entry>``."""
    state: dict[str, Any]
    """JSON data: step, position in the epoch, best score, random state, config."""
    ema: dict[str, torch.Tensor] = field(default_factory=dict)
    """Averages of the trained weights, by parameter name; empty without ``optim.ema``."""


def folder_of(root: Path, step: int) -> Path:
    """Return the folder of the checkpoint of ``step``."""
    return root / f"step_{step:08d}"


def steps_of(root: Path) -> list[int]:
    """Return the steps that have a checkpoint folder, ascending; does not verify the folders."""
    return sorted(int(p.name[5:]) for p in root.glob("step_*") if p.name[5:].isdigit() and p.is_dir())


def save(root: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write one checkpoint atomically and return its folder.

    Raises
    ------
    RestartError
        The disk is full or fails. The incomplete checkpoint is removed; older ones are unchanged.
    """
    root.mkdir(parents=True, exist_ok=True)
    final = folder_of(root, step)
    try:
        with atomic_folder(final, root / f".writing-{step:08d}") as tmp_path:
            _write(tmp_path, checkpoint)
    except Exception as error:
        problem = disk_trouble(error)
        if problem is None:
            raise
        size, free = _bytes(checkpoint) / 2**20, shutil.disk_usage(root).free / 2**20
        older = [s for s in steps_of(root) if s != step]
        last = f"the checkpoint of step {older[-1]} is unchanged" if older else "there is no earlier checkpoint"
        raise RestartError(
            f"{final}: cannot write this checkpoint: {problem}; it needs {size:.1f} MiB, {free:.1f} MiB are free; "
            f"{last}; {disk_fix(error)}, then {ADVICE}"
        ) from error
    return final


def replace_state(root: Path, step: int, state: dict[str, Any]) -> None:
    """Rewrite the state of a checkpoint atomically; its tensors are linked, or copied where links are not supported.

    Raises
    ------
    RestartError
        The disk is full or fails. The checkpoint is unchanged.
    """
    final = folder_of(root, step)
    try:
        with atomic_folder(final, root / f".writing-{step:08d}") as tmp_path:
            tmp_path.mkdir()
            known = _stated_sums(final / SUMS)
            unchanged = [name for name in (*FILES[:2], EMA) if name in known or name != EMA]
            for name in unchanged:
                link_or_copy(final / name, tmp_path / name)
            _write_state(tmp_path, state)
            _write_sums(tmp_path, {name: known.get(name, "") for name in unchanged})
    except Exception as error:
        problem = disk_trouble(error)
        if problem is None:
            raise
        raise RestartError(
            f"{final}: cannot write the state of this checkpoint: {problem}; the checkpoint is unchanged; "
            f"{disk_fix(error)}, then {ADVICE}"
        ) from error


def _write(tmp_path: Path, checkpoint: Checkpoint) -> None:
    """Write all files of a checkpoint to a new folder."""
    tmp_path.mkdir()
    # Each tensor is copied: safetensors refuses tensors that share memory, as tied weights do.
    save_file({k: v.detach().cpu().clone().contiguous() for k, v in checkpoint.model.items()}, tmp_path / FILES[0])
    save_file(checkpoint.optim, tmp_path / FILES[1])
    if checkpoint.ema:
        save_file({k: v.detach().cpu().contiguous() for k, v in checkpoint.ema.items()}, tmp_path / EMA)
    _write_state(tmp_path, checkpoint.state)
    _write_sums(tmp_path, {})


def _write_state(tmp_path: Path, state: dict[str, Any]) -> None:
    text = json.dumps({"format": FORMAT, "version": VERSION} | state, indent=1)
    (tmp_path / FILES[2]).write_text(text + "\n", encoding="utf-8")


def _write_sums(tmp_path: Path, known: dict[str, str]) -> None:
    """Write the hashes of all files; ``known`` has the hashes of files that need not be hashed again."""
    names = [name for name in (*FILES, EMA) if name != EMA or (tmp_path / EMA).exists()]
    sums = "".join(f"{known.get(name) or _sha256(tmp_path / name)}  {name}\n" for name in names)
    (tmp_path / SUMS).write_text(sums, encoding="utf-8")


def _stated_sums(path: Path) -> dict[str, str]:
    """Return ``{file: hash}`` of a file of hashes."""
    lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _bytes(checkpoint: Checkpoint) -> int:
    """Return the size of a checkpoint's tensors in bytes."""
    tensors = (*checkpoint.model.values(), *checkpoint.optim.values(), *checkpoint.ema.values())
    return sum(t.numel() * t.element_size() for t in tensors)


def load(folder: Path) -> Checkpoint:
    """Verify and read one checkpoint.

    Raises
    ------
    CheckpointError
        A file is missing, does not match its hash or cannot be parsed, or the checkpoint has another format version.
    """
    verify(folder)
    advice = "delete the folder to use an older checkpoint"
    try:
        state = json.loads((folder / FILES[2]).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / FILES[2]}: not JSON ({error}); {advice}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{folder / FILES[2]}: not the state of a run; {advice}")
    if (state.get("format"), state.get("version")) != (FORMAT, VERSION):
        found = f"{state.get('format')!r} {state.get('version')!r}"
        raise CheckpointError(
            f"{folder}: format {found}; this comtip-fast reads {FORMAT!r} {VERSION}; use the release that wrote it"
        )
    model, optim = (_tensors(folder / name, advice) for name in FILES[:2])
    averaged = EMA in _stated_sums(folder / SUMS)
    return Checkpoint(model, optim, state, _tensors(folder / EMA, advice) if averaged else {})


def _tensors(path: Path, advice: str) -> dict[str, torch.Tensor]:
    """Read a safetensors file; raise :class:`CheckpointError` if it is invalid."""
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not safetensors ({error}); {advice}") from error


def verify(folder: Path) -> None:
    """Check every file of a checkpoint against its hash.

    Raises
    ------
    CheckpointError
        A file is missing or does not match its hash.
    """
    advice = "delete the folder to use an older checkpoint"
    sums = folder / SUMS
    if not sums.is_file():
        raise CheckpointError(f"{sums}: missing, the checkpoint is incomplete; {advice}")
    stated = _stated_sums(sums)
    for name in (*FILES, EMA) if EMA in stated else FILES:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing; {advice}")
        if _sha256(folder / name) != stated.get(name):
            raise CheckpointError(f"{folder / name}: the SHA-256 differs from {SUMS}; {advice}")


def newest_good(root: Path) -> tuple[int, Checkpoint] | None:
    """Return the newest valid checkpoint and its step, or None; log a warning for each damaged one."""
    for step in reversed(steps_of(root)):
        try:
            return step, load(folder_of(root, step))
        except (CheckpointError, FileNotFoundError) as error:
            if folder_of(root, step).is_dir():  # otherwise a running process has just deleted it
                log.warning("skipped a damaged checkpoint: %s", error)
    return None


def quarantine_newer(root: Path, step: int) -> None:
    """Rename checkpoints newer than ``step`` to ``damaged_step_*``; they failed verification, as ``step`` is the newest valid one."""
    for newer in steps_of(root):
        if newer > step:
            folder = folder_of(root, newer)
            shutil.rmtree(root / f"damaged_{folder.name}", ignore_errors=True)
            folder.rename(root / f"damaged_{folder.name}")
            log.warning("%s is damaged and was renamed to damaged_%s; you can delete it", folder, folder.name)


def clear_leftovers(root: Path) -> None:
    """Remove folders that a killed process was writing or deleting.

    A checkpoint that was being replaced is moved back if its new version was not complete.
    """
    for old in root.glob(".writing-*.old"):
        step = old.name.removeprefix(".writing-").removesuffix(".old")
        if step.isdigit() and not folder_of(root, int(step)).exists():
            old.rename(folder_of(root, int(step)))
    for path in (*root.glob(".writing-*"), *root.glob(".deleting-*")):
        shutil.rmtree(path, ignore_errors=True)


def prune(root: Path, keep: int, best: int | None) -> None:
    """Delete all checkpoints except the ``keep`` newest ones (at least one) and that of step ``best``."""
    steps = steps_of(root)
    kept = set(steps[-max(1, keep) :]) | {best}
    for step in steps:
        if step not in kept:
            delete(folder_of(root, step))


def delete(folder: Path) -> None:
    """Rename a checkpoint and delete it, so that an interruption leaves no incomplete checkpoint behind."""
    tmp_path = folder.with_name(f".deleting-{folder.name}")
    shutil.rmtree(tmp_path, ignore_errors=True)
    folder.rename(tmp_path)
    shutil.rmtree(tmp_path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
