"""Checkpoints that are whole or not there: written to a temporary path, hashed, renamed; verified on load; never unpickled.

    checkpoints/step_00000100/{model.safetensors, optim.safetensors, state.json, SHA256SUMS}

Folders whose name starts with a dot are being written or deleted; :func:`clear_leftovers` removes what a killed
process left of them. ``damaged_step_*`` are checkpoints that failed their hash, kept for a person to look at.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from comtip_shards.storage.atomic import atomic_folder
from comtip_shards.storage.disk import disk_trouble
from safetensors.torch import load_file, save_file

from comtip_fast.training.distributed.failures import ADVICE, RestartError

log = logging.getLogger("comtip_fast")
FORMAT, VERSION = "comtip-checkpoint", 1
SUMS = "SHA256SUMS"
FILES = ("model.safetensors", "optim.safetensors", "state.json")


class CheckpointError(ValueError):
    """A checkpoint is damaged or of another format; names the folder and what to do."""


@dataclass
class Checkpoint:
    """Everything a run needs to go on."""

    model: dict[str, torch.Tensor]
    """The module's state."""
    optim: dict[str, torch.Tensor]
    """The optimizer's state as named tensors."""
    state: dict[str, Any]
    """Plain data: step, place in the epoch, best score, random state, config."""


def folder_of(root: Path, step: int) -> Path:
    """Return the folder of one step's checkpoint."""
    return root / f"step_{step:08d}"


def steps_of(root: Path) -> list[int]:
    """Return the steps that have a folder, ascending; the folders may still be damaged."""
    return sorted(int(p.name[5:]) for p in root.glob("step_*") if p.name[5:].isdigit() and p.is_dir())


def save(root: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write one checkpoint; at no moment does its folder exist half written.

    Raises
    ------
    RestartError
        The disk is full or fails; what was written of this checkpoint is removed, older ones are as they were.
    """
    root.mkdir(parents=True, exist_ok=True)
    final = folder_of(root, step)
    try:
        with atomic_folder(final, root / f".writing-{step:08d}") as tmp_path:
            _write(tmp_path, checkpoint)
    except Exception as error:
        said = disk_trouble(error)
        if said is None:
            raise
        size, free = _bytes(checkpoint) / 2**20, shutil.disk_usage(root).free / 2**20
        older = [s for s in steps_of(root) if s != step]
        last = f"that of step {older[-1]} is as it was" if older else "there is none before it"
        raise RestartError(
            f"{final}: cannot write this checkpoint, {said}; it takes {size:.1f} MiB, {free:.1f} MiB are free; "
            f"{last}; make room, then {ADVICE}"
        ) from error
    return final


def _write(tmp_path: Path, checkpoint: Checkpoint) -> None:
    tmp_path.mkdir()
    # A copy of each tensor: safetensors refuses tied weights, which share their memory.
    save_file({k: v.detach().cpu().clone().contiguous() for k, v in checkpoint.model.items()}, tmp_path / FILES[0])
    save_file(checkpoint.optim, tmp_path / FILES[1])
    state = {"format": FORMAT, "version": VERSION} | checkpoint.state
    (tmp_path / FILES[2]).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    sums = "".join(f"{_sha256(tmp_path / name)}  {name}\n" for name in FILES)
    (tmp_path / SUMS).write_text(sums, encoding="utf-8")


def _bytes(checkpoint: Checkpoint) -> int:
    return sum(t.numel() * t.element_size() for t in (*checkpoint.model.values(), *checkpoint.optim.values()))


def load(folder: Path) -> Checkpoint:
    """Read one checkpoint after checking every file against its hash.

    Raises
    ------
    CheckpointError
        A file is missing or changed, or the format is another one.
    """
    verify(folder)
    state = json.loads((folder / FILES[2]).read_text(encoding="utf-8"))
    if (state.get("format"), state.get("version")) != (FORMAT, VERSION):
        found = f"{state.get('format')!r} {state.get('version')!r}"
        raise CheckpointError(f"{folder}: format {found}; this comtip-fast reads {FORMAT!r} {VERSION}")
    return Checkpoint(load_file(folder / FILES[0]), load_file(folder / FILES[1]), state)


def verify(folder: Path) -> None:
    """Check every file of a checkpoint against its hash.

    Raises
    ------
    CheckpointError
        A file is missing or is not what was written.
    """
    advice = "delete the folder to use an older checkpoint"
    sums = folder / SUMS
    if not sums.is_file():
        raise CheckpointError(f"{sums}: missing, the checkpoint is not whole; {advice}")
    lines = sums.read_bytes().decode("utf-8", "replace").splitlines()
    stated = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in FILES:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing; {advice}")
        if _sha256(folder / name) != stated.get(name):
            raise CheckpointError(f"{folder / name}: not what was written (SHA256 differs); {advice}")


def newest_good(root: Path) -> tuple[int, Checkpoint] | None:
    """Return the newest checkpoint that verifies, saying which ones do not; None where there is none."""
    for step in reversed(steps_of(root)):
        try:
            return step, load(folder_of(root, step))
        except (CheckpointError, FileNotFoundError) as error:
            if folder_of(root, step).is_dir():  # else a run that goes on has deleted it meanwhile
                log.warning("passed over a damaged checkpoint: %s", error)
    return None


def quarantine_newer(root: Path, step: int) -> None:
    """Rename checkpoints newer than ``step`` to ``damaged_step_*``: they did not verify and must not count as kept."""
    for newer in steps_of(root):
        if newer > step:
            folder = folder_of(root, newer)
            shutil.rmtree(root / f"damaged_{folder.name}", ignore_errors=True)
            folder.rename(root / f"damaged_{folder.name}")
            log.warning("%s is now called damaged_%s; delete it when you need it no more", folder, folder.name)


def clear_leftovers(root: Path) -> None:
    """Remove what a killed process was writing or deleting."""
    for path in (*root.glob(".writing-*"), *root.glob(".deleting-*")):
        shutil.rmtree(path, ignore_errors=True)


def prune(root: Path, keep: int, best: int | None) -> None:
    """Delete all but the ``keep`` newest checkpoints and the best one."""
    steps = steps_of(root)
    kept = set(steps[-max(1, keep) :]) | {best}
    for step in steps:
        if step not in kept:
            delete(folder_of(root, step))


def delete(folder: Path) -> None:
    """Delete a checkpoint; killed half way, it leaves no folder that looks like a checkpoint."""
    tmp_path = folder.with_name(f".deleting-{folder.name}")
    shutil.rmtree(tmp_path, ignore_errors=True)
    folder.rename(tmp_path)
    shutil.rmtree(tmp_path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
