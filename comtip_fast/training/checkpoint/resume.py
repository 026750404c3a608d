"""Choice of the checkpoint to resume from, and preparation of the run folder."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from comtip_fast.config.schema import RunConfig
from comtip_fast.training.checkpoint import store as checkpoints
from comtip_fast.training.checkpoint.rows import NONFINITE, SPIKES, keep_rows_up_to
from comtip_fast.training.checkpoint.run_state import check_same_run
from comtip_fast.training.checkpoint.schema import check_state
from comtip_fast.training.checkpoint.store import Checkpoint
from comtip_fast.training.protocol import TrainingError

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


def prepare_run_folder(
    run_dir: Path,
    config: RunConfig,
    fingerprint: dict[str, str],
    size: int,
    device: torch.device,
    *,
    resume: bool,
) -> tuple[int, Checkpoint] | None:
    """Load the newest valid checkpoint, and remove files and rows of later steps and of killed processes; called on rank 0.

    Parameters
    ----------
    run_dir
        Folder of the run.
    config, fingerprint, size, device
        Config, input hashes, number of ranks and device of the run.
    resume
        Whether the folder may already hold a run.

    Returns
    -------
    tuple or None
        Step and checkpoint to resume from; None to start from step 0.

    Raises
    ------
    TrainingError
        The folder has a checkpoint and ``resume`` is not set, all its checkpoints are damaged, or the config or the input
        data has changed.
    CheckpointError
        The state of the checkpoint has values that no run writes.
    """
    folder = run_dir / CHECKPOINTS
    checkpoints.clear_leftovers(folder)
    steps = checkpoints.steps_of(folder)
    refuse_second_run(run_dir, resume)
    found = checkpoints.newest_good(folder)
    if found is None:
        if steps:
            raise TrainingError(f"{folder}: all checkpoints are damaged; delete the folder to start from step 0")
        if resume:
            log.info("%s has no checkpoint yet: starting from step 0", run_dir)
        for name in (NONFINITE, SPIKES):
            (run_dir / name).unlink(missing_ok=True)
        return None
    step, checkpoint = found
    check_state(checkpoint.state, checkpoints.folder_of(folder, step), step)
    check_same_run(run_dir, checkpoint.state, config, fingerprint, size, device)
    checkpoints.quarantine_newer(folder, step)
    best = checkpoint.state["best_step"]
    checkpoints.prune(folder, config.train.keep_checkpoints, best or None)  # as after every save
    for name in (NONFINITE, SPIKES):
        keep_rows_up_to(run_dir / name, step)
    return found
