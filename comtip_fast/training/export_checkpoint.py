"""An export from a checkpoint of a run that has not ended, whatever engine over however many ranks wrote it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from comtip_fast.config.io import load_config
from comtip_fast.training.checkpoint import store as checkpoints
from comtip_fast.training.checkpoint.store import CheckpointError
from comtip_fast.training.task import build_task
from comtip_fast.training.trainer import CHECKPOINTS


def export_checkpoint(run_dir: Path, which: str, out: Path) -> int:
    """Write the weights of one checkpoint as a finished run would export them; return its step.

    Parameters
    ----------
    run_dir
        The run; its shard set must be where its config says.
    which
        ``newest``, ``best`` (by validation so far) or a step.
    out
        Folder to write.

    Raises
    ------
    CheckpointError
        The run has no such checkpoint, or it is damaged.
    """
    root = run_dir / CHECKPOINTS
    steps = checkpoints.steps_of(root)
    if not steps:
        raise CheckpointError(f"{run_dir} holds no checkpoint; give the folder of a run")
    found = checkpoints.newest_good(root) if which in ("newest", "best") else None
    if which == "newest" and found is not None:
        step, loaded = found
    else:
        step = int(found[1].state["best_step"]) if found is not None else _step(which)
        if step not in steps:
            had = ", ".join(str(s) for s in steps)
            raise CheckpointError(f"{root}: no whole checkpoint {which!r}; there are steps {had}")
        loaded = checkpoints.load(checkpoints.folder_of(root, step))
    config = load_config(run_dir / "config.yaml")
    # The checkpoint holds all weights: none are read from elsewhere.
    task = build_task(replace(config, train=replace(config.train, start_from="")), torch.device("cpu"))
    if loaded.state["fingerprint"] != task.fingerprint():
        raise CheckpointError(f"{config.data.shards}: not the shard set or tokenizer that {run_dir} was trained with")
    task.module.load_state_dict(loaded.model)
    task.module.eval()
    task.export(out)
    return step


def _step(which: str) -> int:
    return int(which) if which.isdigit() else -1
