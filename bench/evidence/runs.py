"""Short training runs of a tiny config on generated batches, with the real trainer, checkpoints and logs."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.evidence.batches import GeneratedTask, clocked
from comtip_fast.collectives import Group, SingleProcessGroup
from comtip_fast.config.schema import RunConfig
from comtip_fast.data.batch import Batch
from comtip_fast.training.trainer import Trainer


@dataclass(frozen=True)
class Result:
    """Losses and final state of a run."""

    engine: str
    """Name of the engine."""
    losses: dict[int, float]
    """Loss of each step, from metrics.jsonl."""
    weights: dict[str, Tensor]
    """Weights and buffers on the CPU."""
    moments: dict[str, Tensor]
    """Optimizer state on the CPU."""


class StoppedTask(GeneratedTask):
    """Task that sends this process SIGTERM, with which a cluster stops a job, when step ``stop_at`` loads its batch."""

    stop_at = 0

    def batch(self, spot_index: np.ndarray, step: int, epoch: int) -> Batch:
        """Return a batch, after sending the signal in step ``stop_at``."""
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().batch(spot_index, step, epoch)


def train(
    config: RunConfig,
    device: torch.device,
    folder: Path,
    *,
    group: Group | None = None,
    resume: bool = False,
    stop_at: int = 0,
) -> Result:
    """Run training in ``folder``, and return its losses and final state.

    Parameters
    ----------
    config
        Config of the run, with ``train.log_every=1``.
    device
        Device of the model.
    folder
        Folder of the run.
    group
        Ranks of the run; None is a single process.
    resume
        Whether to resume from the newest checkpoint.
    stop_at
        Step in which a stop signal is sent; 0 for none.
    """
    group = clocked(group or SingleProcessGroup(), config, device)
    task = StoppedTask(config, device, group)
    task.stop_at = stop_at
    trainer = Trainer(task, config, folder, group)
    trainer.fit(resume)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}
    with trainer.engine.gathered_for_read():
        weights = {name: t.detach().cpu().clone() for name, t in task.module.state_dict().items()}
    return Result(trainer.engine.name, losses, weights, trainer.engine.optimizer_state())


def different(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Return the sorted names of tensors that are missing in one of the dicts or not bit-identical."""
    return sorted(n for n in a.keys() | b.keys() if n not in a or n not in b or not torch.equal(a[n], b[n]))
