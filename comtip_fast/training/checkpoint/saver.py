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
from comtip_fast.training.checkpoint.content import problem_of
from comtip_fast.training.checkpoint.run_state import RunState, random_state
from comtip_fast.training.checkpoint.shard_saver import ShardSaver
from comtip_fast.training.checkpoint.store import Checkpoint, CheckpointError
from comtip_fast.training.distributed.process_group import Pause, broadcast, on_every_rank, on_rank_zero
from comtip_fast.training.engines.base import Engine
from comtip_fast.training.protocol import TrainingTask
from comtip_fast.training.update.ema import load_averages

log = logging.getLogger("comtip_fast")


def in_parts(config: RunConfig, size: int) -> bool:
    """Return whether checkpoints have one file per rank (``train.checkpoint``): by default under ZeRO 3 on several ranks.

    No rank then needs memory for the whole model. Everywhere else rank 0 holds all weights anyway, and files of whole tensors are
    simpler to read. Parameters on NVMe are gathered one by one into whole tensors.
    """
    engine = config.engine
    nvme = "nvme" in (engine.offload_optimizer, engine.offload_param)
    sharded = engine.kind == "deepspeed" and engine.zero_stage == 3 and size > 1 and not nvme
    return config.train.checkpoint == "sharded" or (config.train.checkpoint == "auto" and sharded)


class CheckpointSaver:
    """Writes checkpoints, whole by rank 0 or in parts by every rank; a thread writes if ``train.async_checkpoint`` is set.

    Methods are collective calls, except :meth:`load_best`.

    Parameters
    ----------
    folder
        Folder of the checkpoints.
    task, config, group, device
        Task, config, ranks and device of the run.
    pause
        See :func:`.process_group.on_rank_zero`.
    """

    def __init__(
        self,
        folder: Path,
        task: TrainingTask,
        config: RunConfig,
        group: Group,
        device: torch.device,
        pause: Pause,
    ) -> None:
        self.folder, self.task, self.config, self.group, self.device = folder, task, config, group, device
        self._pause, background = pause, config.train.async_checkpoint
        self.writer = Writer()
        self.in_parts = in_parts(config, group.size)
        self._parts = ShardSaver(folder, group, self.writer, background=background, pause=pause)

    @property
    def writing(self) -> bool:
        """Whether this rank writes its part of a checkpoint."""
        return self._parts.writing

    def save(self, progress: RunState, engine: Engine, averages: dict[str, Tensor]) -> None:
        """Write a full checkpoint of weights, optimizer state and averaged weights, then delete old ones.

        If a thread writes, this method returns when the tensors are copied, and a later call raises errors of the writing.
        ``averages`` are those of the elements that this rank owns (:meth:`.ema.WeightAverage.tensors`).

        Raises
        ------
        RestartError
            The disk of a rank is full or fails, now or in the previous checkpoint.
        CheckpointError, TrainingError
            The run folder of a checkpoint in parts is not on a file system that all ranks share: :class:`CheckpointError` on a
            rank that does not find it, :class:`TrainingError` on the others.
        """
        if self.in_parts:
            self._parts.start(progress.step, engine, self._state(progress, engine), self._prune(progress), averages)
            return
        optim, ema = engine.optimizer_state(), self._whole(engine, averages)
        with engine.gathered_for_read():
            on_rank_zero(lambda: self._save_whole(progress, engine, optim, ema), self.group, self._pause)

    def _whole(self, engine: Engine, averages: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return whole averages on rank 0, in host memory if the engine divides parameters over ranks; a collective call."""
        if engine.shards is None:
            return averages
        with engine.gathered_for_read(wanted=averages.__contains__, averages=averages):
            if self.group.rank > 0:
                return {}
            return {name: p.detach().cpu() for name, p in self.task.module.named_parameters() if name in averages}

    def complete(self) -> None:
        """Wait until the parts of the checkpoint in flight, if there is one, are written on all ranks, and publish it."""
        self._parts.complete()

    def check(self) -> None:
        """If the last write failed on a rank, raise an error with its message on every rank; a second call does not repeat it."""
        on_every_rank(self.writer.check, lambda _: None, self.group, self._pause)

    def drain(self) -> None:
        """Wait until the checkpoint in flight is complete, and raise an exception if it failed."""
        self._parts.complete()
        on_rank_zero(self.writer.drain, self.group, self._pause)

    def _prune(self, progress: RunState) -> Callable[[], None]:
        """Return a function that deletes the checkpoints that are not kept after this one."""
        best, keep = progress.best_step or None, self.config.train.keep_checkpoints
        return lambda: checkpoints.prune(self.folder, keep, best)

    def _save_whole(self, progress: RunState, engine: Engine, optim: dict[str, Tensor], ema: dict[str, Tensor]) -> None:
        checkpoint = Checkpoint(self.task.module.state_dict(), optim, self._state(progress, engine), ema)
        step, prune = progress.step, self._prune(progress)

        def write(state: Checkpoint) -> None:
            checkpoints.save(self.folder, step, state)
            prune()

        if self.config.train.async_checkpoint:
            snapshot = copied(checkpoint)
            self.writer.submit(lambda: write(snapshot))
        else:
            write(checkpoint)

    def save_state(self, progress: RunState, engine: Engine) -> None:
        """Rewrite the state of the current step's checkpoint after a validation, which does not change the tensors.

        Then checkpoints that are not kept are deleted, because the best step may have changed.
        """
        self._parts.complete()
        step, state, prune = progress.step, self._state(progress, engine), self._prune(progress)

        def write() -> None:
            checkpoints.replace_state(self.folder, step, state)
            prune()

        background = self.config.train.async_checkpoint
        on_rank_zero(lambda: self.writer.submit(write) if background else write(), self.group, self._pause)

    def check_best(self, progress: RunState) -> None:
        """Reset best step and score, with a warning, if the checkpoint of an earlier best step is damaged or missing.

        Rank 0 verifies the checkpoint for all ranks.
        """
        on_rank_zero(lambda: self._check_best(progress), self.group, self._pause)
        progress.best_step, progress.best_score = broadcast((progress.best_step, progress.best_score), self.group)

    def _check_best(self, progress: RunState) -> None:
        if progress.best_step in (0, progress.step):
            return
        try:
            checkpoints.verify(checkpoints.folder_of(self.folder, progress.best_step))
        except CheckpointError as error:
            best = f"step {progress.best_step}, score {progress.best_score:.4f}"
            log.warning(
                "cannot use the best checkpoint (%s), so it no longer counts as the best: %s", best, problem_of(error)
            )
            progress.best_step, progress.best_score = 0, float("-inf")

    def load_best(self, progress: RunState) -> None:
        """Load the best weights into the task's module, if a validation had a score and the current weights are not the best.

        Called on rank 0 only. The best weights are those that were validated: the averaged weights, if the checkpoint has any. If
        their checkpoint is damaged or missing, the module keeps its weights, see :meth:`check_best`.
        """
        self._check_best(progress)
        if progress.best_step and progress.best_step != progress.step:
            best = checkpoints.load(checkpoints.folder_of(self.folder, progress.best_step), moments=False)
            self.task.module.load_state_dict(best.model)
            load_averages(self.task.module, best.ema)

    def _state(self, progress: RunState, engine: Engine) -> dict[str, Any]:
        """Return the content of ``state.json``: progress, random state, config, input hashes, ranks, engine, device and PyTorch."""
        state = progress.as_plain() | random_state(self.device)
        state |= {"config": config_to_dict(self.config), "fingerprint": self.task.fingerprint()}
        state |= {"world_size": self.group.size, "engine": engine.name}
        return state | {"device": self.device.type, "torch": torch.__version__}
