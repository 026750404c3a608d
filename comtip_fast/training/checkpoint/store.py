"""Checkpoints on disk: written atomically, hashed, verified on load, without pickle.

    checkpoints/step_00000100/{model.safetensors, optim.safetensors, state.json, SHA256SUMS}    with optim.ema also ema.safetensors

A checkpoint of a sharded model can have one file per rank and an index instead of the files of tensors: :mod:`.parts.index`.

Folders whose names start with a dot are being written or deleted; :func:`clear_leftovers` removes those of a killed
process. When a run resumes, checkpoints newer than the newest valid one are renamed to ``damaged_step_*`` and kept for inspection.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from comtip_shards.storage.atomic import atomic_folder, link_or_copy
from comtip_shards.storage.disk import disk_fix, disk_trouble
from safetensors.torch import save_file

from comtip_fast.training.checkpoint.content import (
    DELETE,
    STATE,
    SUMS,
    Checkpoint,
    CheckpointError,
    check_hashes,
    problem_of,
    read_text_file,
    sha256_of,
    stated_sums,
)
from comtip_fast.training.checkpoint.parts.index import INDEX, ShardIndex, part_name, read_index
from comtip_fast.training.checkpoint.parts.reader import ShardReader
from comtip_fast.training.checkpoint.reading import STEP, FileReader, LocalReader
from comtip_fast.training.distributed.failures import ADVICE, RestartError
from comtip_fast.training.protocol import AVERAGE, MOMENTS, WEIGHT

log = logging.getLogger("comtip_fast")
T = TypeVar("T")
FORMAT, VERSION = "comtip-checkpoint", 1
FILES = ("model.safetensors", "optim.safetensors", STATE)
EMA = "ema.safetensors"
"""File of the averaged weights; only in whole checkpoints of runs with ``optim.ema``."""
__all__ = ["Checkpoint", "CheckpointError"]


def folder_of(root: Path, step: int) -> Path:
    """Return the folder of the checkpoint of ``step``."""
    return root / f"step_{step:08d}"


def steps_of(root: Path) -> list[int]:
    """Return the steps that have a checkpoint folder, ascending; does not verify the folders."""
    numbers = {int(p.name[5:]) for p in root.glob("step_*") if p.name[5:].isascii() and p.name[5:].isdigit()}
    return sorted(step for step in numbers if folder_of(root, step).is_dir())


def is_in_parts(folder: Path) -> bool:
    """Return whether a checkpoint has one file per rank.

    Raises
    ------
    CheckpointError
        There is no index, and the file of hashes is not a regular file or is too large.
    """
    return (folder / INDEX).exists() or ((folder / SUMS).is_file() and INDEX in stated_sums(folder / SUMS))


def save(root: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write one checkpoint atomically and return its folder.

    Raises
    ------
    RestartError
        The disk is full or fails. The incomplete checkpoint is removed; older ones are unchanged.
    """
    root.mkdir(parents=True, exist_ok=True)
    final = folder_of(root, step)
    with cannot_write(root, step, _bytes(checkpoint)), atomic_folder(final, _writing(root, step)) as tmp_path:
        _write(tmp_path, checkpoint)
    return final


def new_parts_folder(root: Path, step: int) -> str:
    """Create an empty folder for the parts of a checkpoint and return its name.

    The name has a random suffix, so that a process of an earlier attempt, which may still run on a lost node, cannot write to it.

    Raises
    ------
    RestartError
        The disk is full or fails.
    """
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f".parts-{step:08d}-{secrets.token_hex(4)}"
    with cannot_write(root, step, 0):
        folder.mkdir()
    return folder.name


def publish_parts(root: Path, step: int, parts: Path, index: ShardIndex, state: dict[str, Any]) -> Path:
    """Add index, state and hashes to a folder with the complete files of all ranks, give it its final name, and return its path.

    Raises
    ------
    RestartError
        The disk is full or fails. The parts are removed; older checkpoints are unchanged.
    """
    final = folder_of(root, step)
    with cannot_write(root, step, 0), atomic_folder(final, _writing(root, step)) as tmp_path:
        parts.rename(tmp_path)
        (tmp_path / INDEX).write_text(index.to_json(), encoding="utf-8")
        _write_state(tmp_path, state)
        _write_sums(tmp_path, {file.name: file.sha256 for file in index.files})
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
        with atomic_folder(final, _writing(root, step)) as tmp_path:
            tmp_path.mkdir()
            known = stated_sums(final / SUMS)
            unchanged = [name for name in _names(final) if name != STATE]
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


@contextmanager
def cannot_write(root: Path, step: int, size: int) -> Iterator[None]:
    """Raise :class:`RestartError` for a disk error in the block, which writes a checkpoint of ``size`` bytes (0 if unknown)."""
    try:
        yield
    except Exception as error:
        problem = disk_trouble(error)
        if problem is None:
            raise
        free = shutil.disk_usage(root).free / 2**20
        older = [s for s in steps_of(root) if s != step]
        last = f"the checkpoint of step {older[-1]} is unchanged" if older else "there is no earlier checkpoint"
        needed = f"it needs {size / 2**20:.1f} MiB, " if size else ""
        raise RestartError(
            f"{folder_of(root, step)}: cannot write this checkpoint: {problem}; {needed}{free:.1f} MiB are free; {last}; "
            f"{disk_fix(error)}, then {ADVICE}"
        ) from error


def _writing(root: Path, step: int) -> Path:
    return root / f".writing-{step:08d}"


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
    (tmp_path / STATE).write_text(text + "\n", encoding="utf-8")


def _write_sums(tmp_path: Path, known: Mapping[str, str]) -> None:
    """Write the hashes of all files; ``known`` has the hashes of files that need not be hashed again."""
    sums = "".join(f"{known.get(name) or sha256_of(tmp_path / name)}  {name}\n" for name in _names(tmp_path))
    (tmp_path / SUMS).write_text(sums, encoding="utf-8")


def _names(folder: Path) -> list[str]:
    """Return the names of the files of a checkpoint, without the file of hashes."""
    if is_in_parts(folder):
        return [*(part_name(rank) for rank in range(read_index(folder).world_size)), INDEX, STATE]
    stated = stated_sums(folder / SUMS) if (folder / SUMS).is_file() else {}
    return [name for name in (*FILES, EMA) if name != EMA or name in stated or (folder / EMA).exists()]


def _bytes(checkpoint: Checkpoint) -> int:
    """Return the size of a checkpoint's tensors in bytes."""
    tensors = (*checkpoint.model.values(), *checkpoint.optim.values(), *checkpoint.ema.values())
    return sum(t.numel() * t.element_size() for t in tensors)


def load(folder: Path, *, moments: bool = True, hashed: bool = False) -> Checkpoint:
    """Verify a checkpoint and read it into memory; the parts of a checkpoint in parts are joined into whole tensors.

    Parameters
    ----------
    folder
        Folder of the checkpoint.
    moments
        Whether the optimizer state is read.
    hashed
        Whether its hashes have been checked already.

    Raises
    ------
    CheckpointError
        A file is missing, does not match its hash or cannot be parsed, the checkpoint has another format version, or a tensor is not
        finite.
    """
    state = load_state(folder, hashed=hashed)
    with open_reader(folder) as reader:
        model, optim = dict(reader.all_of(WEIGHT)), {}
        if moments:
            optim = {f"{name}/{key}": t for key in MOMENTS for name, t in reader.all_of(key)}
            optim |= {f"{name}/{STEP}": torch.tensor(step) for name, step in reader.content.steps.items()}
        return Checkpoint(model, optim, state, dict(reader.all_of(AVERAGE)))


def load_state(folder: Path, *, hashed: bool = False) -> dict[str, Any]:
    """Verify a checkpoint and return its state; its tensors stay on disk.

    Parameters
    ----------
    folder
        Folder of the checkpoint.
    hashed
        Whether its hashes have been checked already.

    Raises
    ------
    CheckpointError
        A file is missing, does not match its hash or cannot be parsed, or the checkpoint has another format version.
    """
    if not hashed:
        verify(folder)
    state = unverified_state(folder)
    with open_reader(folder) as reader:
        if isinstance(reader, ShardReader):
            reader.check_files()
    return state


def open_reader(folder: Path) -> LocalReader:
    """Return a reader of the tensors of a checkpoint, whose hashes must have been checked.

    Raises
    ------
    CheckpointError
        A file cannot be parsed, or the index of a checkpoint in parts is invalid.
    """
    if is_in_parts(folder):
        return ShardReader(folder)
    averaged = EMA in stated_sums(folder / SUMS)
    return FileReader(folder, folder / FILES[0], folder / FILES[1], folder / EMA if averaged else None)


def unverified_state(folder: Path) -> dict[str, Any]:
    """Return the content of ``state.json``, whose hash is not checked.

    Raises
    ------
    CheckpointError
        The file cannot be parsed, or has another format version.
    """
    try:
        state = json.loads(read_text_file(folder / STATE).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / STATE}: not JSON ({error}); {DELETE}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{folder / STATE}: not the state of a run; {DELETE}")
    if (state.get("format"), state.get("version")) != (FORMAT, VERSION):
        found = f"{state.get('format')!r} {state.get('version')!r}"
        raise CheckpointError(
            f"{folder}: format {found}; this comtip-fast reads {FORMAT!r} {VERSION}; use the release that wrote it"
        )
    return state


def verify(folder: Path) -> None:
    """Check every file of a checkpoint against its hash.

    Raises
    ------
    CheckpointError
        A file is missing or does not match its hash, or the index of a checkpoint in parts is invalid.
    """
    if is_in_parts(folder):
        check_hashes(folder, verify_head(folder))
        return
    stated = stated_sums(folder / SUMS) if (folder / SUMS).is_file() else {}
    check_hashes(folder, (*FILES, EMA) if EMA in stated else FILES)


def verify_head(folder: Path) -> list[str]:
    """Check index and state of a checkpoint in parts, and return the names of its parts, whose hashes are not checked.

    Raises
    ------
    CheckpointError
        Index or state is missing, invalid or does not match its hash, a part is missing or has another size than the index states,
        or index and file of hashes state different hashes of a part.
    """
    check_hashes(folder, (INDEX, STATE))
    index, stated = read_index(folder), stated_sums(folder / SUMS)
    for file in index.files:
        if file.sha256 != stated.get(file.name):
            raise CheckpointError(f"{folder / file.name}: {INDEX} and {SUMS} state different hashes of it; {DELETE}")
    return [file.name for file in index.files]


def newest_good(root: Path, read: Callable[[Path], T], damage: Mapping[int, str] | None = None) -> tuple[int, T] | None:
    """Return the step and content of the newest valid checkpoint, or None if there is none; log a warning for each damaged one.

    Parameters
    ----------
    root
        Folder of the checkpoints.
    read
        Verifies and reads the checkpoint in a folder; raises :class:`CheckpointError` if it is damaged.
    damage
        Result of :func:`.shard_verify.damage_of_parts`: the error of each verified checkpoint in parts, by step, or an empty
        text if it is valid.
    """
    for step in reversed(steps_of(root)):
        folder = folder_of(root, step)
        try:
            if damage and damage.get(step):
                raise CheckpointError(damage[step])
            return step, read(folder)
        except (CheckpointError, FileNotFoundError) as error:
            if folder.is_dir():  # otherwise a running process has just deleted it
                log.warning("skipped a damaged checkpoint: %s", problem_of(error))
    return None


def quarantine_newer(root: Path, step: int) -> None:
    """Rename checkpoints newer than ``step`` to ``damaged_step_*``: they failed verification, since ``step`` is the newest valid."""
    for newer in steps_of(root):
        if newer > step:
            folder = folder_of(root, newer)
            _remove(root / f"damaged_{folder.name}")
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
    for path in (*root.glob(".writing-*"), *root.glob(".deleting-*"), *root.glob(".parts-*")):
        _remove(path)


def prune(root: Path, keep: int, best: int | None) -> None:
    """Delete all checkpoints except the ``keep`` newest (at least one) and the checkpoint of step ``best``."""
    steps = steps_of(root)
    kept = set(steps[-max(1, keep) :]) | {best}
    for step in steps:
        if step not in kept:
            delete(folder_of(root, step))


def delete(folder: Path) -> None:
    """Rename a checkpoint and delete it, so that an interruption leaves no incomplete checkpoint behind."""
    tmp_path = folder.with_name(f".deleting-{folder.name}")
    _remove(tmp_path)
    folder.rename(tmp_path)
    _remove(tmp_path)


def _remove(path: Path) -> None:
    """Delete a folder, or only the link to a folder that was moved elsewhere."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
