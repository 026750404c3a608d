"""Checkpoints that are whole or not there: written aside, hashed, renamed; verified on load; never unpickled.

checkpoints/step_00000100/{model.safetensors, optim.safetensors, state.json, SHA256SUMS}
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

log = logging.getLogger("comtip_fast")
FORMAT, VERSION = "comtip-checkpoint", 1
FILES = ("model.safetensors", "optim.safetensors", "state.json")


class CheckpointError(ValueError):
    """A checkpoint is damaged or of another format; names the folder and what to do."""


@dataclass
class Checkpoint:
    """Everything a run needs to go on."""

    model: dict[str, torch.Tensor]
    optim: dict[str, torch.Tensor]
    state: dict[str, Any]


def folder_of(root: Path, step: int) -> Path:
    """Return the folder of one step's checkpoint."""
    return root / f"step_{step:08d}"


def steps_of(root: Path) -> list[int]:
    """Return the steps that have a folder, ascending."""
    return sorted(int(p.name[5:]) for p in root.glob("step_*") if p.name[5:].isdigit() and p.is_dir())


def save(root: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write one checkpoint; at no moment does its folder exist half written."""
    root.mkdir(parents=True, exist_ok=True)
    final, aside = folder_of(root, step), root / f".writing-{step:08d}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    save_file({k: v.detach().cpu().contiguous() for k, v in checkpoint.model.items()}, aside / FILES[0])
    save_file(checkpoint.optim, aside / FILES[1])
    state = {"format": FORMAT, "version": VERSION} | checkpoint.state
    (aside / FILES[2]).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    sums = "".join(f"{_sha256(aside / name)}  {name}\n" for name in FILES)
    (aside / "SHA256SUMS").write_text(sums, encoding="utf-8")
    for path in (*aside.iterdir(), aside):
        _flush(path)
    # A run that fell back to an older checkpoint may meet a damaged one here; it is replaced.
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)
    _flush(root)
    return final


def load(folder: Path) -> Checkpoint:
    """Read one checkpoint after checking every file against its hash.

    Raises
    ------
    CheckpointError
        A file is missing or changed, or the format is another one.
    """
    sums = folder / "SHA256SUMS"
    if not sums.is_file():
        raise CheckpointError(f"{folder}: SHA256SUMS is missing; the checkpoint is not whole, delete the folder")
    stated = dict(reversed(line.split("  ", 1)) for line in sums.read_text(encoding="utf-8").splitlines() if line)
    for name in FILES:
        if not (folder / name).is_file() or _sha256(folder / name) != stated.get(name):
            raise CheckpointError(
                f"{folder / name}: missing, or not what was written; delete the folder to use an older one"
            )
    state = json.loads((folder / FILES[2]).read_text(encoding="utf-8"))
    if (state.get("format"), state.get("version")) != (FORMAT, VERSION):
        raise CheckpointError(
            f"{folder}: format {state.get('format')!r} {state.get('version')!r}, expected {FORMAT} {VERSION}"
        )
    return Checkpoint(load_file(folder / FILES[0]), load_file(folder / FILES[1]), state)


def newest_good(root: Path) -> tuple[int, Checkpoint] | None:
    """Return the newest checkpoint that verifies, saying which ones do not; None where there is none."""
    for step in reversed(steps_of(root)):
        try:
            return step, load(folder_of(root, step))
        except CheckpointError as error:
            log.warning("passed over a damaged checkpoint: %s", error)
    return None


def prune(root: Path, keep: int, best: int | None) -> None:
    """Delete all but the ``keep`` newest checkpoints and the best one."""
    steps = steps_of(root)
    kept = set(steps[-max(1, keep) :]) | {best}
    for step in steps:
        if step not in kept:
            shutil.rmtree(folder_of(root, step))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
