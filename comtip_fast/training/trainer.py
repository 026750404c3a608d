"""The training loop: steps, validation, checkpoints and resume.

A run is a function of its config, its data and a few integers (step, epoch, position in the epoch). A run that is killed
and resumed therefore computes the same losses and weights as an uninterrupted one.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comtip_shards.storage.atomic import atomic_folder, write_atomic
from torch import Tensor

from comtip_fast.collectives import Group, SingleProcessGroup
from comtip_fast.config.io import config_to_dict, dump_config
from comtip_fast.config.schema import RunConfig
from comtip_fast.runtime import devices
from comtip_fast.training.checkpoint import store as checkpoints
from comtip_fast.training.checkpoint.async_writer import Writer, copied
from comtip_fast.training.checkpoint.resume import CHECKPOINTS, prepare_run_folder
from comtip_fast.training.checkpoint.run_state import RunState, deterministic, random_state, set_random_state
from comtip_fast.training.checkpoint.store import Checkpoint, CheckpointError
from comtip_fast.training.distributed.comm_timer import clock_of
from comtip_fast.training.distributed.failures import ADVICE, explain_failures, hard_exit
from comtip_fast.training.distributed.process_group import on_rank_zero
from comtip_fast.training.distributed.rank_numbers import RankNumbers
from comtip_fast.training.distributed.signals import Signals, catch_signals, hold_run
from comtip_fast.training.engines.base import Engine
from comtip_fast.training.engines.factory import make_engine
from comtip_fast.training.grad_cache import forward_backward
from comtip_fast.training.monitor.diagnostics import diagnostic
from comtip_fast.training.monitor.loggers import BestEffort, Logger, make_loggers
from comtip_fast.training.monitor.monitor import EVENTS, Events, Profiler, SpikeDetector, ThroughputMeter, Watchdog
from comtip_fast.training.nonfinite import NONFINITE, nonfinite_message, report_nonfinite
from comtip_fast.training.optim import learning_rate
from comtip_fast.training.pending import FinishedStep, PendingStep, as_floats, read_steps
from comtip_fast.training.protocol import StepCost, TrainingError, TrainingTask

log = logging.getLogger("comtip_fast")

TAKEOVER_S = 60.0
"""Seconds for which a restarted rank 0 waits until the previous process releases the run folder."""


@dataclass(frozen=True)
class FitResult:
    """Result of a run."""

    step: int
    """Last optimizer step."""
    best_step: int
    """Step with the best validation score; 0 without validation."""
    best_score: float
    """Best validation score; minus infinity without validation."""
    stopped: str
    """Why training stopped: ``steps``, ``patience`` or ``sigterm`` (any stop signal)."""


class Trainer:
    """Trains a task until it is finished or a signal stops it.

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
        self._writer, self._write_failed = Writer(), False
        self.device = next(task.module.parameters()).device
        self._epoch_batches: tuple[int, list[np.ndarray]] = (-1, [])
        self._loggers: list[Logger] = []
        self._saved_step = -1
        self.engine: Engine
        self._found: Checkpoint | None = None
        self._rank_numbers = RankNumbers(self.group, self.device)
        self._meter = ThroughputMeter(self.device, clock_of(self.group, self.device), cost)
        self._pending: list[PendingStep] = []
        self._spikes = SpikeDetector(config.watch)
        self._events = Events(self.run_dir / EVENTS)
        self._profiler = Profiler(config.watch.trace, self.run_dir / "trace", self.group.rank, self.device)
        self._watchdog = Watchdog(
            config.watch.stall_s,
            self._stalled,
            self.run_dir / f"stalled_rank{self.group.rank}.txt",
            stop_s=config.watch.stall_stop_s,
            stop=self._stop_stalled,
        )

    def fit(self, resume: bool = False) -> FitResult:
        """Train; with ``resume``, continue from the newest valid checkpoint, or start if there is none.

        Raises
        ------
        TrainingError
            The folder is in use or holds another run, the config or data has changed, or a loss is not finite.
        RestartError
            A rank was lost or late, or the disk is full; a new process can continue with ``resume``.
        """
        size, timeout_s = self.group.size, self.config.engine.timeout_s
        with (
            explain_failures(self.group.rank, size, lambda: f"during {self._watchdog.what}", timeout_s),
            ExitStack() as stack,
        ):
            # Only rank 0 locks and writes the folder; its errors are raised on all ranks.
            on_rank_zero(lambda: self._take_folder(stack), self.group)
            stack.enter_context(deterministic(self.device))
            caught = stack.enter_context(catch_signals())
            resumed = self._start(resume)
            if not self.progress.stopped:
                self.task.prepare()
            if self._first:
                resolved = config_to_dict(self.config)
                record, *shown = make_loggers(
                    self.config, resolved, self.run_dir, start=self.progress.step, resumed=resumed
                )
                self._loggers = [record, *map(BestEffort, shown)]
            # The watchdog also covers the shutdown below, where a loader can hang.
            stack.enter_context(self._watchdog)
            try:
                self._loop(caught)
            finally:
                self._writer.join_quietly()
                diagnostic("the profiler", self._profiler.close, None)
                self.task.close()
                for logger in self._loggers:
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
        step = on_rank_zero(lambda: self._find_start(resume), self.group)
        if step is None:
            self.engine = make_engine(self.task.module, self.config, self.group)
            return False
        loaded = self._found or checkpoints.load(checkpoints.folder_of(self.checkpoint_dir, step))
        self._found = None
        self._restore(loaded)
        log.info("resumed from step %d", step)
        return True

    def _find_start(self, resume: bool) -> int | None:
        """Return the step to resume from (None: step 0) and prepare the folder; keeps the loaded checkpoint on rank 0."""
        found = prepare_run_folder(
            self.run_dir, self.config, self.task.fingerprint(), self.group.size, self.device, resume=resume
        )
        write_atomic(self.run_dir / "config.yaml", dump_config(self.config))
        if found is None:
            return None
        step, self._found = found
        return step

    # -- loop -------------------------------------------------------------------------------------------

    def _loop(self, caught: Signals) -> None:
        p, cfg = self.progress, self.config.train
        if p.stopped:
            log.info("training has already finished (%s); writing the export again", p.stopped)
        while not p.stopped:
            if self._asked_to_stop or (caught.received and self.group.size == 1):
                if self._saved_step != p.step:
                    self._save()
                on_rank_zero(self._writer.drain, self.group)
                return
            if self._write_failed or (self._writer.failed and self.group.size == 1):
                on_rank_zero(self._writer.check, self.group)
            self._watchdog.reset(f"step {p.step + 1}")
            self._one_step(caught)
            if p.step >= cfg.steps:
                p.stopped = "steps"
            if cfg.validate_every and (p.step % cfg.validate_every == 0 or p.stopped):
                self._watchdog.reset(f"validation after step {p.step}")
                self._validate()
            if p.step % cfg.checkpoint_every == 0 or p.best_step == p.step or p.stopped:
                self._watchdog.reset(f"the checkpoint of step {p.step}")
                self._save()
        self._watchdog.reset("the last checkpoint")
        on_rank_zero(self._writer.drain, self.group)
        self._watchdog.reset("the export")
        self._export_best()

    def _one_step(self, caught: Signals) -> None:
        p = self.progress
        self._meter.begin()
        began = time.monotonic()
        spots = self._next_batch()
        step = p.step + 1
        rate = learning_rate(step, self.config.train.steps, self.config.optim)
        self.engine.module.train()
        diagnostic("the profiler", lambda: self._profiler.before(step), None)
        batch = self.task.batch(spots, step, p.epoch)
        self.engine.start_step(rate)
        shares, numbers = forward_backward(self.engine, self.task, batch, self.config.engine.micro_batches)
        loss = self.group.sum(shares["loss"].double())
        update = self.engine.update(loss.isfinite())
        self._after_step(step, update.good)
        self._pending.append(PendingStep(step, p.epoch, p.position, spots, rate, shares, numbers, loss, update))
        p.step, p.position = step, p.position + 1
        self._exchange_flags(caught)
        diagnostic("the profiler", lambda: self._profiler.after(step), None)
        # Reading waits for the device, so that the time of a row includes all work of its steps.
        due = self._is_logged(step) or devices.reads_are_free(self.device)
        finished = read_steps(self._pending) if due else []
        diagnostic("the throughput meter", lambda: self._meter.add(time.monotonic() - began, len(spots), numbers), None)
        self._report(finished)

    def _after_step(self, step: int, good: Tensor) -> None:
        """Call the task's ``after_step``; after a non-finite step, the task must not change."""
        masked = not devices.reads_are_free(self.device)
        if not masked and not bool(good):
            return
        with self.engine.summon_full_params():
            if masked:
                self.task.after_step(self.engine.module, step, good)
            else:
                self.task.after_step(self.engine.module, step)

    def _is_logged(self, step: int) -> bool:
        return step % self.config.train.log_every == 0 or step == 1

    def _settle(self) -> None:
        """Read and report all steps so far, before anything that depends on them."""
        self._report(read_steps(self._pending))

    def _report(self, finished: list[FinishedStep]) -> None:
        """Handle non-finite steps, detect jumps, and log the rows that are due."""
        p = self.progress
        for done in finished:
            step, logged = done.pending.step, self._is_logged(done.pending.step)
            losses, numbers = self._over_ranks(done) if logged or not done.good else ({}, {})
            if not done.good:
                self._not_finite(done.pending, losses)
            spike = diagnostic("the spike detector", partial(self._spikes.update, done.loss, done.norm), None)
            if spike is not None and self._first:
                self._flag("jump", step, spike)
            if logged:
                row = {"step": step, "kind": "train", "epoch": done.pending.epoch} | losses | numbers
                row |= {"lr": done.pending.rate, "grad_norm": done.norm, "skips": p.skips}
                data = self.task.metrics()
                waited = data.pop("loader_wait_s", 0.0)
                nothing: dict[str, float] = {}
                rates = diagnostic("the throughput meter", partial(self._meter.row, waited), nothing)
                self._log(row | rates | data)

    def _next_batch(self) -> np.ndarray:
        p = self.progress
        while True:
            if self._epoch_batches[0] != p.epoch:
                self._epoch_batches = (p.epoch, self.task.batches(p.epoch))
            batches = self._epoch_batches[1]
            if not batches:
                raise TrainingError("no batches: the shard set has no training spots; check its splits and data.*")
            if p.position < len(batches):
                return batches[p.position]
            p.epoch, p.position = p.epoch + 1, 0

    def _exchange_flags(self, caught: Signals) -> None:
        """Agree with the other ranks on a stop request and on a failed write."""
        if self.group.size == 1:
            return
        stop, self._write_failed = self.group.any([bool(caught.received), bool(self._writer.failed)])
        self._asked_to_stop = self._asked_to_stop or stop

    def _over_ranks(self, done: FinishedStep) -> tuple[dict[str, float], dict[str, float]]:
        """Sum losses and average numbers over ranks; a collective call, for which every rank has the same steps."""
        losses, numbers = as_floats(done.pending.shares), as_floats(done.pending.numbers)
        if self.group.size == 1:
            return losses, numbers
        reduced = self._rank_numbers.reduce(losses, numbers)
        return reduced.sums, reduced.means

    def _not_finite(self, bad: PendingStep, parts: dict[str, float]) -> None:
        """Report the step, then stop or count a skipped update, according to ``train.nan_policy``."""
        p, cfg, path = self.progress, self.config.train, self.run_dir / NONFINITE
        gradients = bad.update.nonfinite()
        if self._first:
            report_nonfinite(path, bad.step, bad.epoch, bad.position, bad.spots, parts, gradients)
        text = nonfinite_message(path, bad.step, bad.spots, parts, gradients)
        if cfg.nan_policy == "stop":
            raise TrainingError(
                f"{text}. Start again with a lower optim.lr, or continue with --resume --set train.nan_policy=skip"
            )
        p.skips += 1
        log.warning("%s; update skipped (%d so far)", text, p.skips)
        if p.skips > cfg.max_skips:
            raise TrainingError(
                f"{text}; more than train.max_skips={cfg.max_skips} updates were skipped. Start again with a lower optim.lr"
            )

    def _validate(self) -> None:
        self._settle()
        p, cfg = self.progress, self.config.train
        with self.engine.gathered_for_read():
            score, per_cohort, space = on_rank_zero(self._score, self.group)
        better = math.isfinite(score) and score > p.best_score
        if better:
            p.best_score, p.best_step, p.bad_validations = score, p.step, 0
        elif math.isfinite(score):
            p.bad_validations += 1
        else:
            # Not counted for train.patience: there is no score to compare.
            log.warning("step %d: validation has no score; check for sections of split val and genes to score", p.step)
        self._log({"step": p.step, "kind": "valid", "score": score, "per_cohort": per_cohort, "best": better} | space)
        if cfg.patience and p.bad_validations >= cfg.patience and not p.stopped:
            p.stopped = "patience"

    def _stalled(self, text: str) -> None:
        self._flag("stall", self.progress.step, text)

    def _flag(self, kind: str, step: int, text: str) -> None:
        diagnostic("writing the event log", lambda: self._events.flag(kind, step, text), None)

    def _stop_stalled(self, text: str) -> None:
        who = f"rank {self.group.rank} of {self.group.size}: " if self.group.size > 1 else ""
        log.error("comtip: error: %s%s; process ended, %s", who, text, ADVICE)
        hard_exit()

    def _score(self) -> tuple[float, dict[str, float], dict[str, float]]:
        self.task.module.eval()
        return self.task.validate()

    def _log(self, row: dict[str, Any]) -> None:
        for logger in self._loggers:
            logger.log(row)

    # -- state ------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Gather sharded tensors and write a full checkpoint, which any engine on any number of ranks can resume."""
        self._settle()
        optim = self.engine.optimizer_state()
        with self.engine.gathered_for_read():
            on_rank_zero(lambda: self._write_checkpoint(self._checkpoint(optim)), self.group)
        self._saved_step = self.progress.step

    def _write_checkpoint(self, checkpoint: Checkpoint) -> None:
        step, best, keep = self.progress.step, self.progress.best_step or None, self.config.train.keep_checkpoints

        def write(state: Checkpoint) -> None:
            checkpoints.save(self.checkpoint_dir, step, state)
            checkpoints.prune(self.checkpoint_dir, keep, best)

        if self.config.train.async_checkpoint:
            snapshot = copied(checkpoint)
            self._writer.submit(lambda: write(snapshot))
        else:
            write(checkpoint)

    def _checkpoint(self, optim: dict[str, Tensor]) -> Checkpoint:
        state = self.progress.as_plain() | random_state(self.device)
        state |= {"config": config_to_dict(self.config), "fingerprint": self.task.fingerprint()}
        state |= {"world_size": self.group.size, "engine": self.engine.name}
        state |= {"device": self.device.type, "torch": torch.__version__}
        return Checkpoint(self.task.module.state_dict(), optim, state)

    def _restore(self, loaded: Checkpoint) -> None:
        self.task.module.load_state_dict(loaded.model)
        # The engine is built after the weights are loaded, because ZeRO 3 shards the weights it is given.
        self.engine = make_engine(self.task.module, self.config, self.group)
        self.engine.restore(loaded.optim)
        self.progress = RunState.from_plain(loaded.state)
        set_random_state(loaded.state, self.device)
        self._saved_step = self.progress.step
        self._check_best()

    def _check_best(self) -> None:
        """Reset the best step, with a warning, if its checkpoint is damaged or missing."""
        p = self.progress
        if p.best_step in (0, p.step):
            return
        try:
            checkpoints.verify(checkpoints.folder_of(self.checkpoint_dir, p.best_step))
        except CheckpointError as error:
            log.warning("cannot use the best checkpoint (step %d, score %.4f): %s", p.best_step, p.best_score, error)
            p.best_step, p.best_score = 0, float("-inf")

    def _export_best(self) -> None:
        """Export the best weights, or the last ones if there was no validation."""
        with self.engine.gathered_for_read():
            on_rank_zero(self._write_export, self.group)

    def _write_export(self) -> None:
        self._check_best()
        step = self.progress.best_step
        if step and step != self.progress.step:
            best = checkpoints.load(checkpoints.folder_of(self.checkpoint_dir, step))
            self.task.module.load_state_dict(best.model)
        self.task.module.eval()
        with atomic_folder(self.run_dir / "export") as tmp_path:
            self.task.export(tmp_path)
