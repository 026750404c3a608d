"""Choice of the checkpoint to resume from, preparation of the run folder, and restoring of the tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from comtip_shards.storage.atomic import write_atomic
from torch import nn

from comtip_fast.collectives import Group
from comtip_fast.config.io import dump_config
from comtip_fast.config.schema import RunConfig
from comtip_fast.training.checkpoint import store as checkpoints
from comtip_fast.training.checkpoint.content import CheckpointError
from comtip_fast.training.checkpoint.parts.reader import ShardReader
from comtip_fast.training.checkpoint.reading import shared_reader
from comtip_fast.training.checkpoint.rows import NONFINITE, SPIKES, keep_rows_up_to
from comtip_fast.training.checkpoint.run_state import check_same_run
from comtip_fast.training.checkpoint.schema import check_state, load_weights
from comtip_fast.training.checkpoint.set_changes import first_sets
from comtip_fast.training.checkpoint.shard_verify import damage_of_parts
from comtip_fast.training.distributed.process_group import Pause, on_rank_zero
from comtip_fast.training.engines.base import Engine
from comtip_fast.training.protocol import TrainingError
from comtip_fast.training.update.ema import WeightAverage

log = logging.getLogger("comtip_fast")
CHECKPOINTS = "checkpoints"
"""Name of the folder of checkpoints in a run folder."""


def refuse_second_run(run_dir: Path, resume: bool) -> None:
    """Raise :class:`TrainingError` if the folder has a checkpoint and ``resume`` is not set; called before any slow work."""
    steps = checkpoints.steps_of(run_dir / CHECKPOINTS)
    if steps and not resume:
        raise TrainingError(
            f"{run_dir}: already holds a run (step {steps[-1]}); continue it with `resume`, or train into another folder"
        )


def first_sets_of(run_dir: Path) -> tuple[str, ...]:
    """Return the digests of the sets that the run in ``run_dir`` started with; empty without a readable checkpoint that states them.

    All checkpoints of a run state the same, so none of them is verified here; :func:`find_checkpoint` verifies the one it chooses.
    """
    folder = run_dir / CHECKPOINTS
    for step in reversed(checkpoints.steps_of(folder)):
        try:
            fingerprint = checkpoints.unverified_state(checkpoints.folder_of(folder, step))["fingerprint"]
            return tuple(first_sets(fingerprint))
        except (CheckpointError, OSError, KeyError, TypeError, AttributeError):
            continue
    return ()


@dataclass(frozen=True)
class Found:
    """A valid checkpoint to resume from, whose tensors have not been read."""

    step: int
    folder: Path
    state: dict[str, Any]
    in_parts: bool
    """Whether it has one file per rank."""


def find_checkpoint(
    run_dir: Path,
    config: RunConfig,
    fingerprint: dict[str, str],
    group: Group,
    device: torch.device,
    *,
    resume: bool,
    in_parts: bool,
    pause: Pause,
) -> Found | None:
    """Return the checkpoint to resume from on every rank, and write the config to the run folder; a collective call.

    Parameters
    ----------
    run_dir
        Folder of the run.
    config, fingerprint, group, device
        Config, input hashes, ranks and device of the run.
    resume
        Whether the folder may already hold a run.
    in_parts
        Whether every rank reads its own part of a checkpoint in parts; all ranks then verify its files together.
    pause
        See :func:`.process_group.on_rank_zero`.

    Returns
    -------
    Found or None
        None to start from step 0.

    Raises
    ------
    TrainingError, ConfigError, CheckpointError
        See :func:`prepare_run_folder`, which rank 0 calls; the other ranks raise :class:`TrainingError` with its message.
    """
    damage = damage_of_parts(run_dir / CHECKPOINTS, group, pause) if resume and in_parts else {}

    def choose() -> Found | None:
        found = prepare_run_folder(run_dir, config, fingerprint, group.size, device, resume=resume, damage=damage)
        write_atomic(run_dir / "config.yaml", dump_config(config))
        return found

    return on_rank_zero(choose, group, pause)


def prepare_run_folder(
    run_dir: Path,
    config: RunConfig,
    fingerprint: dict[str, str],
    size: int,
    device: torch.device,
    *,
    resume: bool,
    damage: Mapping[int, str] | None = None,
) -> Found | None:
    """Find the newest valid checkpoint and clean the run folder; called on rank 0.

    Incomplete folders of killed processes are removed, and checkpoints of later steps are renamed. Checkpoints that
    ``train.keep_checkpoints`` does not keep are deleted. Rows of later steps are dropped from ``nonfinite.jsonl`` and
    ``spikes.jsonl``. Without a checkpoint, both files are deleted.

    Parameters
    ----------
    run_dir
        Folder of the run.
    config, fingerprint, size, device
        Config, input hashes, number of ranks and device of the run.
    resume
        Whether the folder may already hold a run.
    damage
        See :func:`.store.newest_good`.

    Returns
    -------
    Found or None
        None to start from step 0.

    Raises
    ------
    TrainingError
        The folder has a checkpoint and ``resume`` is not set, all its checkpoints are damaged, or the run may not resume, see
        :func:`.run_state.check_same_run`.
    ConfigError
        The config in the checkpoint cannot be read.
    CheckpointError
        The state of the checkpoint is invalid, see :func:`.schema.check_state`.
    """
    folder = run_dir / CHECKPOINTS
    checkpoints.clear_leftovers(folder)
    steps = checkpoints.steps_of(folder)
    refuse_second_run(run_dir, resume)
    hashed = {checkpoints.folder_of(folder, known) for known in damage or {}}
    found = checkpoints.newest_good(folder, lambda path: checkpoints.load_state(path, hashed=path in hashed), damage)
    if found is None:
        if steps:
            raise TrainingError(
                f"{folder}: none of the {len(steps)} checkpoints can be read (see the warnings above); delete the folder to start "
                "from step 0"
            )
        if resume:
            log.info("%s has no checkpoint yet: starting from step 0", run_dir)
        for name in (NONFINITE, SPIKES):
            (run_dir / name).unlink(missing_ok=True)
        return None
    step, state = found
    chosen = checkpoints.folder_of(folder, step)
    check_state(state, chosen, step)
    check_same_run(run_dir, state, config, fingerprint, size, device)
    checkpoints.quarantine_newer(folder, step)
    best = state["best_step"]
    checkpoints.prune(folder, config.train.keep_checkpoints, best or None)  # as after every save
    for name in (NONFINITE, SPIKES):
        keep_rows_up_to(run_dir / name, step)
    return Found(step, chosen, state, checkpoints.is_in_parts(chosen))


def restore_tensors(
    folder: Path,
    module: nn.Module,
    build: Callable[[], Engine],
    average: WeightAverage,
    group: Group,
    pause: Pause,
    *,
    own_parts: bool,
) -> None:
    """Restore weights, averages and optimizer state; a collective call. A rank keeps what its engine owns.

    Parameters
    ----------
    folder
        Folder of the checkpoint.
    module
        Module of the task.
    build
        Builds the engine for the weights of ``module``, and returns it.
    average
        Moving average of the weights, which starts here.
    group, pause
        See :func:`.process_group.on_rank_zero`.
    own_parts
        Whether every rank reads the elements that it owns from a checkpoint in parts. Otherwise rank 0 reads, and sends one tensor
        at a time.

    Raises
    ------
    CheckpointError, TrainingError
        A tensor does not fit the model, is not finite or cannot be read.
    """
    if own_parts:
        with ShardReader(folder) as parts:
            parts.check_fits(module)
            parts.load_untrained(module)
            engine = build()
            assert engine.shards is not None
            engine.shards.restore_weights(parts)
            average.attach(engine.own_weights(), parts)
            engine.restore(parts)
        return
    with shared_reader(checkpoints.open_reader, folder, group, pause) as reader:
        # The engine is built after the weights are loaded, because ZeRO 3 shards the weights it is given.
        load_weights(module, reader)
        engine = build()
        average.attach(engine.own_weights(), reader)
        engine.restore(reader)
