"""Writing of checkpoints during training, and loading of the checkpoint with the best weights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comtip_fast.collectives import Group
from comtip_fast.config.io import config_to_dict
from comtip_fast.config.schema import RunConfig
from comtip_fast.training.checkpoint import store as checkpoints
from comtip_fast.training.checkpoint.async_writer import Writer, copied
from comtip_fast.training.checkpoint.run_state import RunState, random_state
from comtip_fast.training.checkpoint.store import Checkpoint, CheckpointError
from comtip_fast.training.protocol import TrainingTask
from comtip_fast.training.update.ema import load_averages

log = logging.getLogger("comtip_fast")


class CheckpointSaver:
    """Writes checkpoints on rank 0, in a thread if ``train.async_checkpoint`` is set.

    Parameters
    ----------
    folder
        Folder of the checkpoints.
    task, config, group, device
        Task, config, ranks and device of the run.
    engine_name
        Returns the name of the engine, which is created after this object.
    """

    def __init__(
        self,
        folder: Path,
        task: TrainingTask,
        config: RunConfig,
        group: Group,
        device: torch.device,
        engine_name: Callable[[], str],
    ) -> None:
        self.folder, self.task, self.config, self.group, self.device = folder, task, config, group, device
        self._engine_name = engine_name
        self.writer = Writer()

    def save(self, progress: RunState, optim: dict[str, Tensor], ema: dict[str, Tensor]) -> None:
        """Write a full checkpoint of the task's module, the optimizer state and the averaged weights, then delete old ones."""
        checkpoint = Checkpoint(self.task.module.state_dict(), optim, self._state(progress), ema)
        step, best, keep = progress.step, progress.best_step or None, self.config.train.keep_checkpoints

        def write(state: Checkpoint) -> None:
            checkpoints.save(self.folder, step, state)
            checkpoints.prune(self.folder, keep, best)

        if self.config.train.async_checkpoint:
            snapshot = copied(checkpoint)
            self.writer.submit(lambda: write(snapshot))
        else:
            write(checkpoint)

    def save_state(self, progress: RunState) -> None:
        """Rewrite the state of the current step's checkpoint after a validation, which does not change its tensors."""
        step, state, best = progress.step, self._state(progress), progress.best_step or None
        keep = self.config.train.keep_checkpoints

        def write() -> None:
            checkpoints.replace_state(self.folder, step, state)
            checkpoints.prune(self.folder, keep, best)

        if self.config.train.async_checkpoint:
            self.writer.submit(write)
        else:
            write()

    def check_best(self, progress: RunState) -> None:
        """Reset the best step, with a warning, if its checkpoint is damaged or missing."""
        if progress.best_step in (0, progress.step):
            return
        try:
            checkpoints.verify(checkpoints.folder_of(self.folder, progress.best_step))
        except CheckpointError as error:
            best = f"step {progress.best_step}, score {progress.best_score:.4f}"
            log.warning("cannot use the best checkpoint (%s), so it no longer counts as the best: %s", best, error)
            progress.best_step, progress.best_score = 0, float("-inf")

    def load_best(self, progress: RunState) -> None:
        """Load the best weights into the task's module, unless they are the current weights or there was no validation.

        The best weights are those that were validated: the averaged weights, if the checkpoint has any.
        """
        self.check_best(progress)
        if progress.best_step and progress.best_step != progress.step:
            best = checkpoints.load(checkpoints.folder_of(self.folder, progress.best_step))
            self.task.module.load_state_dict(best.model)
            load_averages(self.task.module, best.ema)

    def _state(self, progress: RunState) -> dict[str, Any]:
        """Return the content of ``state.json``: progress, random state, config, input hashes and machine."""
        state = progress.as_plain() | random_state(self.device)
        state |= {"config": config_to_dict(self.config), "fingerprint": self.task.fingerprint()}
        state |= {"world_size": self.group.size, "engine": self._engine_name()}
        return state | {"device": self.device.type, "torch": torch.__version__}
