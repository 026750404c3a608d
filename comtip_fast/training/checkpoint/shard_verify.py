"""Verify checkpoints in parts (one file per rank) on all ranks together, so that each file is hashed by one rank only."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from comtip_fast.collectives import Group
from comtip_fast.training.checkpoint import store as checkpoints
from comtip_fast.training.checkpoint.content import CheckpointError, check_hashes
from comtip_fast.training.distributed.process_group import Pause, on_every_rank, on_rank_zero


def damage_of_parts(root: Path, group: Group, pause: Pause) -> dict[int, str]:
    """Verify checkpoints in parts, newest first, until a good one is found, and return the errors; a collective call.

    The search stops at a checkpoint of whole tensors, which rank 0 verifies when reading. Leftovers of killed processes are
    removed.

    Parameters
    ----------
    root
        Folder of the checkpoints.
    group, pause
        See :func:`.process_group.on_rank_zero`.

    Returns
    -------
    dict
        For each verified step, the error of its index or of a damaged file, or an empty text if it is valid; equal on all ranks.
    """
    damage: dict[int, str] = {}
    while True:
        found = on_rank_zero(lambda: _next(root, damage), group, pause)
        if found is None:
            return damage
        step, names, problem = found
        own = names[group.rank :: group.size]
        problems = on_every_rank(partial(_damage, root, step, own), list, group, pause)
        damage[step] = next((text for text in (problem, *problems) if text), "")
        if not damage[step]:
            return damage


def _next(root: Path, damage: dict[int, str]) -> tuple[int, list[str], str] | None:
    """Return the newest step that is not in ``damage``, its part files, and what is wrong with its index (empty if nothing is).

    None if there is no such step, or if its checkpoint has whole tensors.
    """
    checkpoints.clear_leftovers(root)
    for step in reversed(checkpoints.steps_of(root)):
        folder = checkpoints.folder_of(root, step)
        if step in damage:
            continue
        try:
            if not checkpoints.is_in_parts(folder):
                return None
            return step, checkpoints.verify_head(folder), ""
        except CheckpointError as error:
            return step, [], str(error)
    return None


def _damage(root: Path, step: int, names: list[str]) -> str:
    """Return what is wrong with files of a checkpoint, empty if nothing is."""
    try:
        check_hashes(checkpoints.folder_of(root, step), names)
    except CheckpointError as error:
        return str(error)
    return ""
