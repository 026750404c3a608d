"""The training loop: steps, validation, checkpoints and resume.

A step depends only on the config, the data, a few integers (step, epoch, position in the epoch) and the state in the checkpoint.
A run that is killed and resumed therefore computes the same losses and weights as an uninterrupted one; on a GPU up to rounding,
because PyTorch's attention in the image encoder may add in another order.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np
from comtip_shards.storage.atomic import atomic_folder
from torch import Tensor

from comtip_fast.collectives import Group, SingleProcessGroup
from comtip_fast.config.io import config_to_dict
from comtip_fast.config.schema import RunConfig
from comtip_fast.runtime import devices
from comtip_fast.runtime.garbage import collection_paused
from comtip_fast.training.checkpoint.content import Checkpoint
from comtip_fast.training.checkpoint.reading import HeldReader
from comtip_fast.training.checkpoint.resume import CHECKPOINTS, Found, find_checkpoint, restore_tensors
from comtip_fast.training.checkpoint.run_state import RunState, deterministic, set_random_state
from comtip_fast.training.checkpoint.saver import CheckpointSaver
from comtip_fast.training.checkpoint.set_changes import further_sets
from comtip_fast.training.distributed.failures import ADVICE, RestartError, explain_failures, hard_exit
from comtip_fast.training.distributed.process_group import on_every_rank, on_rank_zero
from comtip_fast.training.distributed.signals import Signals, catch_signals, hold_run
from comtip_fast.training.engines.base import Engine
from comtip_fast.training.engines.factory import make_engine
from comtip_fast.training.freezing import Freezing
from comtip_fast.training.grad_cache import forward_backward
from comtip_fast.training.monitor.diagnostics import diagnostic
from comtip_fast.training.monitor.loggers import BestEffort, make_loggers
from comtip_fast.training.monitor.monitor import Profiler, Watchdog
from comtip_fast.training.monitor.step_reporter import StepReporter
from comtip_fast.training.optim import learning_rate
from comtip_fast.training.pending import PendingStep
from comtip_fast.training.protocol import StepCost, TrainingError, TrainingTask
from comtip_fast.training.update.ema import WeightAverage
from comtip_fast.training.update.spikes import NormHistory

log = logging.getLogger("comtip_fast")
T = TypeVar("T")

TAKEOVER_S = 60.0
"""Seconds for which rank 0 of several ranks waits until a previous process releases the run folder, as after a restart."""


@dataclass(frozen=True)
class FitResult:
    """Result of a run."""

    step: int
    """Last optimizer step."""
    best_step: int
    """Step with the best validation score; 0 if no validation had a score."""
    best_score: float
    """Best validation score; minus infinity if no validation had a score."""
    stopped: str
    """Why training stopped: ``steps``, ``patience`` or ``sigterm`` (any stop signal)."""


class Trainer:
    """Trains a task until its last step, until ``train.patience`` is exhausted, or until a signal stops the run.

    Parameters
    ----------
    task
        Data, model and losses.
    config
        Config of the run.
    run_dir
        Folder for checkpoints, logs and the export; created if missing.
    group
        Ranks of the run; None is a single process.
    cost
        Estimated cost of a step, for the logged FLOP rate; None logs none.

    Raises
    ------
    TrainingError
        A pattern of ``optim.freeze`` matches no trainable parameter, or all trainable parameters are frozen at step 1.
    """

    def __init__(
        self,
        task: TrainingTask,
        config: RunConfig,
        run_dir: Path | str,
        group: Group | None = None,
        *,
        cost: StepCost | None = None,
    ) -> None:
        self.task, self.config, self.run_dir = task, config, Path(run_dir)
        self.group = group or SingleProcessGroup()
        self.checkpoint_dir = self.run_dir / CHECKPOINTS
        self.progress = RunState()
        self._asked_to_stop = False
        self._write_failed = False
        self.device = next(task.module.parameters()).device
        self._epoch_batches: tuple[int, list[np.ndarray]] = (-1, [])
        self._saved_step = -1
        self.engine: Engine
        self._train_mode = False
        self._reporter = StepReporter(task, config, self.run_dir, self.group, self.device, cost)
        self._freezing = Freezing(task.module, config.optim.freeze)
        self._norms = NormHistory(config.optim.spike, self.device)
        self._average = WeightAverage(config.optim.ema)
        self._profiler = Profiler(config.watch.trace, self.run_dir / "trace", self.group.rank, self.device)
        self._watchdog = Watchdog(
            config.watch.stall_s,
            self._stalled,
            self.run_dir / f"stalled_rank{self.group.rank}.txt",
            stop_s=config.watch.stall_stop_s,
            stop=self._stop_stalled,
        )
        pause = self._watchdog.paused
        self._saver = CheckpointSaver(self.checkpoint_dir, task, config, self.group, self.device, pause)

    def fit(self, resume: bool = False) -> FitResult:
        """Train until the run is finished, and write its export, or until a stop signal is received.

        With ``resume``, training continues from the newest valid checkpoint, or starts from step 0 if the folder has none.

        Raises
        ------
        TrainingError
            The folder is in use, has a symbolic link, cannot be written, has a checkpoint although ``resume`` is not set, or has
            damaged checkpoints only; the config or the input data has changed; the engine cannot be built; no training spot is
            readable; a loss or gradient is not finite (``train.nan_policy=stop``); or too many updates were skipped.
        CheckpointError, ConfigError
            The state, weights or optimizer state of the checkpoint do not fit the run, or its config cannot be read.
        ShardError, ValueError
            More records are damaged than ``data.faults`` and ``data.max_faults`` allow, or a selected logger is not installed.
        RestartError
            A rank was lost or late, a disk failed, or parameters thaw under DeepSpeed; a new process can continue with ``resume``.
        """
        size, timeout_s = self.group.size, self.config.engine.timeout_s
        with (
            explain_failures(self.group.rank, size, lambda: f"during {self._watchdog.what}", timeout_s),
            ExitStack() as stack,
        ):
            # Only rank 0 locks and writes the folder; its errors are raised on all ranks.
            self._on_rank_zero(lambda: self._take_folder(stack))
            stack.enter_context(deterministic(self.device))
            caught = stack.enter_context(catch_signals())
            resumed = self._start(resume)
            if not self.progress.stopped:
                self.task.prepare()
            if self._first:
                resolved, start = config_to_dict(self.config), self.progress.step
                validated = not self._validation_is_due()
                record, *shown = make_loggers(
                    self.config, resolved, self.run_dir, start=start, resumed=resumed, validated=validated
                )
                self._reporter.loggers = [record, *map(BestEffort, shown)]
            # The watchdog also covers the shutdown below, where a loader can hang.
            stack.enter_context(self._watchdog)
            try:
                self._loop(caught)
            finally:
                self._saver.writer.join_quietly()
                diagnostic("the profiler", self._profiler.close, None)
                self.task.close()
                for logger in self._reporter.loggers:
                    logger.close()
        p = self.progress
        return FitResult(p.step, p.best_step, p.best_score, p.stopped or "sigterm")

    # -- start ------------------------------------------------------------------------------------------

    @property
    def _first(self) -> bool:
        return self.group.rank == 0

    def _take_folder(self, stack: ExitStack) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        stack.enter_context(hold_run(self.run_dir, TAKEOVER_S if self.group.size > 1 else 0.0))

    def _start(self, resume: bool) -> bool:
        found = find_checkpoint(
            self.run_dir,
            self.config,
            self.task.fingerprint(),
            self.group,
            self.device,
            resume=resume,
            in_parts=self._saver.in_parts,
            pause=self._watchdog.paused,
        )
        if found is None:
            self._freezing.apply(self.task.module, 1)
            self._average.attach(self._build_engine().own_weights())
            return False
        self._restore(found)
        log.info("resumed from step %d", found.step)
        return True

    # -- loop -------------------------------------------------------------------------------------------

    def _loop(self, caught: Signals) -> None:
        p = self.progress
        if p.stopped:
            log.info("training has already finished after %d steps; writing the export again", p.step)
        elif self._validation_is_due() or p.step >= self.config.train.steps:
            self._finish_step()
        while not p.stopped:
            if self._stopping(caught):
                if self._saved_step != p.step:
                    self._save()
                self._saver.drain()
                return
            if self._write_failed or (self._saver.writer.failed and self.group.size == 1):
                self._saver.check()
            if self._freezing.changes_at(p.step + 1) and not self.engine.rebuilds:
                self._leave_to_thaw()
            self._watchdog.reset(f"step {p.step + 1}")
            self._one_step(caught)
            # A stop request does not wait for a validation: the resumed run starts with it.
            if p.step >= self.config.train.steps or not (self._stopping(caught) and self._validation_is_due()):
                self._finish_step()
        self._watchdog.reset("the last checkpoint")
        self._saver.drain()
        self._watchdog.reset("the export")
        self._export_best()

    def _stopping(self, caught: Signals) -> bool:
        return self._asked_to_stop or (bool(caught.received) and self.group.size == 1)

    def _validation_is_due(self) -> bool:
        p, cfg = self.progress, self.config.train
        last = p.step >= cfg.steps
        due = cfg.validate_every and (p.step % cfg.validate_every == 0 or last)
        return bool(due) and p.step > p.validated

    def _finish_step(self) -> None:
        """Write a checkpoint and validate if they are due, in this order, so that no step is repeated if the validation fails."""
        p, cfg = self.progress, self.config.train
        due, last = self._validation_is_due(), p.step >= cfg.steps
        if due:
            if self._saved_step != p.step:
                self._watchdog.reset(f"the checkpoint of step {p.step}")
                self._save()
            self._validate()
        if last:
            p.stopped = "steps"
        self._watchdog.reset(f"the checkpoint of step {p.step}")
        if due:
            self._saver.save_state(p, self.engine)
        elif p.step % cfg.checkpoint_every == 0 or p.stopped:
            self._save()

    def _one_step(self, caught: Signals) -> None:
        p = self.progress
        self._reporter.meter.begin()
        began = time.monotonic()
        spots = self._next_batch()
        step = p.step + 1
        if self._freezing.changes_at(step):
            self._thaw(step)
        rate = learning_rate(step, self.config.train.steps, self.config.optim)
        if not self._train_mode:  # a new engine, or a validation came before; the walk through all modules takes time
            self.engine.module.train()
            self._train_mode = True
        diagnostic("the profiler", lambda: self._profiler.before(step), None)
        batch = self.task.batch(spots, step, p.epoch)
        with collection_paused():
            self.engine.start_step(rate)
            shares, numbers = forward_backward(self.engine, self.task, batch, self.config.engine.micro_batches)
            loss = self.group.sum(shares["loss"].double())
            update = self.engine.update(loss.isfinite(), self._norms.limit())
            self._norms.add(update.norm)
            self._after_step(step, update.good)
        self._reporter.add(PendingStep(step, p.epoch, p.position, spots, rate, shares, numbers, loss, update))
        p.step, p.position = step, p.position + 1
        self._exchange_flags(caught)
        diagnostic("the profiler", lambda: self._profiler.after(step), None)
        self._reporter.after_step(p, began, len(spots), numbers)

    def _after_step(self, step: int, good: Tensor) -> None:
        """Call the task's ``after_step`` and update the moving average; a step that did not update the weights changes neither."""
        masked = not devices.reads_are_free(self.device)
        if not masked and not bool(good):
            return
        with self.engine.elementwise():
            if masked:
                self.task.after_step(self.engine.module, step, good)
            else:
                self.task.after_step(self.engine.module, step)
        self._average.update(step, good if masked else None)

    def _next_batch(self) -> np.ndarray:
        p = self.progress
        while True:
            if self._epoch_batches[0] != p.epoch:
                self._epoch_batches = (p.epoch, self.task.batches(p.epoch))
            batches = self._epoch_batches[1]
            if not batches:
                raise TrainingError(
                    f"epoch {p.epoch} has no batch: no readable spot in a section of split train; check the set with "
                    "`comtip shards verify`, and build it with sections of split train"
                )
            if p.position < len(batches):
                return batches[p.position]
            p.epoch, p.position = p.epoch + 1, 0

    def _exchange_flags(self, caught: Signals) -> None:
        """Share with all ranks whether a rank was asked to stop, failed to write a checkpoint, or is still writing its part.

        A checkpoint in parts is published once all ranks have written their parts without an error.
        """
        flags = [bool(caught.received), self._saver.writer.failed, self._saver.writing]
        stop, self._write_failed, writing = self.group.any(flags)
        self._asked_to_stop = self._asked_to_stop or stop
        if not (writing or self._write_failed):
            self._saver.complete()

    def _validate(self) -> None:
        """Validate on all ranks, log the scores, update the best step, and set ``stopped`` if patience is exhausted."""
        self._reporter.report(self.progress)
        p, cfg = self.progress, self.config.train
        what = f"validation after step {p.step}"
        self._watchdog.reset(what)
        averages = self._average.tensors()
        with self.engine.gathered_for_read(every_rank=True, wanted=self.task.is_validated, averages=averages):
            self.task.module.eval()
            self._train_mode = False
            score, per_cohort, space = on_every_rank(
                lambda: self.task.validation_share(lambda part: self._watchdog.reset(f"{what}, {part}")),
                self.task.validation_result,
                self.group,
                self._watchdog.paused,
            )
        better = math.isfinite(score) and score > p.best_score
        if better:
            p.best_score, p.best_step, p.bad_validations = score, p.step, 0
        elif math.isfinite(score):
            p.bad_validations += 1
        else:
            # Not counted for train.patience: there is no score to compare.
            log.warning(
                "step %d: validation has no score; check that the set has sections of split val that measured trained genes, and that "
                "losses are finite",
                p.step,
            )
        self._reporter.log(
            {"step": p.step, "kind": "valid", "score": score, "per_cohort": per_cohort, "best": better}
            | space
            | ({} if self.config.optim.ema is None else {"weights": "ema"})
        )
        p.validated = p.step
        if cfg.patience and p.bad_validations >= cfg.patience:
            p.stopped = "patience"

    def _stalled(self, text: str) -> None:
        self._reporter.flag("stall", self.progress.step, text)

    def _stop_stalled(self, text: str) -> None:
        who = f"rank {self.group.rank} of {self.group.size}: " if self.group.size > 1 else ""
        log.error("comtip: error: %s%s; process ended, %s", who, text, ADVICE)
        hard_exit()

    def _on_rank_zero(self, work: Callable[[], T]) -> T:
        return on_rank_zero(work, self.group, self._watchdog.paused)

    # -- state ------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write a full checkpoint, from which any engine on any number of ranks can resume."""
        self._reporter.report(self.progress)
        self.progress.norms = self._norms.values()
        self._saver.save(self.progress, self.engine, self._average.tensors())
        self._saved_step = self.progress.step

    def _restore(self, found: Found) -> None:
        self.progress, module = RunState.from_plain(found.state), self.task.module
        self._freezing.apply(module, self.progress.step + 1)
        self._norms = NormHistory(self.config.optim.spike, self.device, self.progress.norms)
        own_parts, pause = found.in_parts and self._saver.in_parts, self._watchdog.paused
        restore_tensors(found.folder, module, self._build_engine, self._average, self.group, pause, own_parts=own_parts)
        self.progress.reopen(self.config.train)
        self._extend(found.state["fingerprint"])
        set_random_state(found.state, self.device)
        self._saved_step = self.progress.step
        self._saver.check_best(self.progress)

    def _extend(self, then: dict[str, str]) -> None:
        """Begin an epoch over all sets if sets were appended since the checkpoint, whose fingerprint is ``then``."""
        further = further_sets(then, self.task.fingerprint())
        if further:
            self.progress.extend(further)
        if self.progress.extensions:
            self.task.note_extensions(self.progress.extensions)

    def _build_engine(self) -> Engine:
        """Build the engine for the current weights, and return it."""
        self.engine = make_engine(self.task.module, self.config, self.group)
        self._train_mode = False
        return self.engine

    def _thaw(self, step: int) -> None:
        """Build the engine again with the parameters that are trained in ``step``, and restore its optimizer state."""
        state = self.engine.optimizer_state(every_rank=True)
        with self.engine.gathered_for_read(every_rank=True):
            self.engine.close()
            gc.collect()  # DDP's wrapper and its buckets refer to each other
            self._freezing.apply(self.task.module, step)
            self._average.attach(self._build_engine().own_weights())
        self.engine.restore(HeldReader(Checkpoint({}, state, {})))
        frozen = len(self._freezing.frozen_at(step))
        log.info("step %d: optim.freeze thaws parameters; %d tensors remain frozen", step, frozen)

    def _leave_to_thaw(self) -> NoReturn:
        """Write a checkpoint, and raise RestartError: the next process builds the engine with the parameters that thaw."""
        step = self.progress.step
        if self._saved_step != step:
            self._watchdog.reset(f"the checkpoint of step {step}")
            self._save()
        self._saver.drain()
        raise RestartError(
            f"optim.freeze thaws parameters after step {step}, for which DeepSpeed needs new processes; a launcher starts them, and the "
            f"run continues from the checkpoint of step {step}; without a launcher, start the run again with `resume`"
        )

    def _export_best(self) -> None:
        """Write the export of the best weights, or of the last weights if no validation had a score."""
        with self.engine.gathered_for_read(averages=self._average.tensors()):
            self._on_rank_zero(self._write_export)

    def _write_export(self) -> None:
        self._saver.load_best(self.progress)
        self.task.module.eval()
        with atomic_folder(self.run_dir / "export") as tmp_path:
            self.task.export(tmp_path)
