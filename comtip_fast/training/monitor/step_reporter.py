"""Reports of finished steps: logged rows, non-finite steps, spikes and jumps."""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from comtip_fast.collectives import Group
from comtip_fast.config.schema import RunConfig
from comtip_fast.runtime import devices
from comtip_fast.training.checkpoint.rows import NONFINITE, SPIKES
from comtip_fast.training.checkpoint.run_state import RunState
from comtip_fast.training.distributed.comm_timer import clock_of
from comtip_fast.training.distributed.rank_numbers import RankNumbers
from comtip_fast.training.monitor.diagnostics import diagnostic
from comtip_fast.training.monitor.loggers import Logger
from comtip_fast.training.monitor.monitor import EVENTS, Events, SpikeDetector, ThroughputMeter
from comtip_fast.training.monitor.nonfinite import nonfinite_message, report_nonfinite, report_spike
from comtip_fast.training.pending import FinishedStep, PendingStep, as_floats, read_steps
from comtip_fast.training.protocol import StepCost, TrainingError, TrainingTask

log = logging.getLogger("comtip_fast")


class StepReporter:
    """Reads the results of pending steps when a step is to be logged (``train.log_every``), checks them, and logs rows.

    Parameters
    ----------
    task, config, run_dir, group, device
        Task, config, folder, ranks and device of the run.
    cost
        Estimated cost of a step; None logs no FLOP rate.
    """

    def __init__(
        self,
        task: TrainingTask,
        config: RunConfig,
        run_dir: Path,
        group: Group,
        device: torch.device,
        cost: StepCost | None,
    ) -> None:
        self.task, self.config, self.run_dir, self.group, self.device = task, config, run_dir, group, device
        self.meter = ThroughputMeter(device, clock_of(group, device), cost)
        self.loggers: list[Logger] = []
        """Loggers of rank 0; empty on the other ranks."""
        self._rank_numbers = RankNumbers(group, device)
        self._pending: list[PendingStep] = []
        self._spikes = SpikeDetector(config.watch)
        self._events = Events(run_dir / EVENTS)

    def add(self, step: PendingStep) -> None:
        """Add a step that was launched; the device may still compute its numbers."""
        self._pending.append(step)

    def after_step(self, progress: RunState, began: float, spots: int, numbers: dict[str, Any]) -> None:
        """Add a step to the throughput meter; if the step is to be logged, read and check all pending steps, and log a row.

        On a CPU, where reading does not wait for a device, every step is read and checked at once.

        Parameters
        ----------
        progress
            State of the run after the step; skipped updates and spikes are counted in it.
        began, spots
            ``time.monotonic()`` at the start of the step, and number of spots of the global batch.
        numbers
            Numbers that the task returned with the losses; :meth:`.monitor.ThroughputMeter.add` uses ``genes`` and ``tokens``.

        Raises
        ------
        TrainingError
            A step was not finite and ``train.nan_policy`` is ``stop``, or more than ``train.max_skips`` updates were skipped.
        """
        due = self._is_logged(progress.step) or devices.reads_are_free(self.device)
        finished = read_steps(self._pending) if due else []
        # After reading, which waits for the device: the host is ahead of it, and the time of a row includes all work of its steps.
        seconds = time.monotonic() - began
        diagnostic("the throughput meter", lambda: self.meter.add(seconds, spots, numbers), None)
        self._report(progress, finished)

    def report(self, progress: RunState) -> None:
        """Read and report all pending steps; called before a checkpoint or a validation. Errors are those of :meth:`after_step`."""
        began = time.monotonic()
        finished = read_steps(self._pending)
        waited = time.monotonic() - began  # for the device, which still computes the steps
        diagnostic("the throughput meter", lambda: self.meter.add(waited, 0, {}), None)
        self._report(progress, finished)

    def discard(self) -> None:
        """Drop the pending steps without reading them; for benchmarks, where the host must not wait for the device."""
        self._pending.clear()

    def log(self, row: dict[str, Any]) -> None:
        """Write one row to every logger."""
        for logger in self.loggers:
            logger.log(row)

    def flag(self, kind: str, step: int, text: str) -> None:
        """Write an event to the log and to ``events.jsonl``."""
        diagnostic("writing the event log", lambda: self._events.flag(kind, step, text), None)

    def _is_logged(self, step: int) -> bool:
        return step % self.config.train.log_every == 0 or step == 1

    def _report(self, progress: RunState, finished: list[FinishedStep]) -> None:
        """Handle non-finite steps and spikes, detect jumps, and log the steps that are to be logged."""
        for done in finished:
            step, logged = done.pending.step, self._is_logged(done.pending.step)
            losses, numbers = self._over_ranks(done) if logged or not done.good or done.spike else ({}, {})
            if not done.finite:
                self._not_finite(progress, done.pending, losses)
            elif done.spike:
                self._spiked(progress, done, losses)
            spike = diagnostic("the spike detector", partial(self._spikes.update, done.loss, done.norm), None)
            if spike is not None and self.group.rank == 0:
                self.flag("jump", step, spike)
            if logged:
                row = {"step": step, "kind": "train", "epoch": done.pending.epoch} | losses | numbers
                row |= {"lr": done.pending.rate, "grad_norm": done.norm, "skips": progress.skips}
                if self.config.optim.spike.policy != "none":
                    row["spikes"] = progress.spikes
                data = self.task.metrics()
                waited = data.pop("loader_wait_s", 0.0)
                nothing: dict[str, float] = {}
                rates = diagnostic("the throughput meter", partial(self.meter.row, waited), nothing)
                self.log(row | rates | data)

    def _over_ranks(self, done: FinishedStep) -> tuple[dict[str, float], dict[str, float]]:
        """Sum losses and average numbers over ranks; a collective call, which all ranks must issue for the same steps."""
        losses, numbers = as_floats(done.pending.shares), as_floats(done.pending.numbers)
        if self.group.size == 1:
            return losses, numbers
        reduced = self._rank_numbers.reduce(losses, numbers)
        return reduced.sums, reduced.means

    def _not_finite(self, progress: RunState, bad: PendingStep, parts: dict[str, float]) -> None:
        """Report a non-finite step, then raise or count a skipped update, according to ``train.nan_policy``."""
        cfg, path = self.config.train, self.run_dir / NONFINITE
        gradients = bad.update.nonfinite()
        if self.group.rank == 0:
            report_nonfinite(path, bad.step, bad.epoch, bad.position, bad.spots, parts, gradients)
        text = nonfinite_message(path, bad.step, bad.spots, parts, gradients)
        if cfg.nan_policy == "stop":
            raise TrainingError(
                f"{text}; start again with a lower optim.lr, or continue with `resume` and `train.nan_policy=skip`"
            )
        self._count_skip(progress, text)

    def _spiked(self, progress: RunState, done: FinishedStep, parts: dict[str, float]) -> None:
        """Report a spike, and count its update if it was skipped."""
        policy, step = self.config.optim.spike.policy, done.pending
        progress.spikes += 1
        if self.group.rank == 0:
            report_spike(self.run_dir / SPIKES, done, parts, policy)
        some = ", ".join(str(i) for i in step.spots[:5].tolist())
        text = (
            f"step {step.step}: the gradient norm {done.norm:.4g} exceeds the limit {done.limit:.4g} of optim.spike; spots {some} "
            f"...; the full batch is in {self.run_dir / SPIKES}"
        )
        if policy == "skip":
            self._count_skip(progress, text)
        else:
            log.warning("%s; clipped (%d spikes so far)", text, progress.spikes)

    def _count_skip(self, progress: RunState, text: str) -> None:
        """Count and log a skipped update; raise TrainingError above ``train.max_skips``."""
        most = self.config.train.max_skips
        progress.skips += 1
        log.warning("%s; update skipped (%d so far)", text, progress.skips)
        if progress.skips > most:
            raise TrainingError(
                f"{text}; more than train.max_skips={most} updates were skipped; start again with a lower optim.lr"
            )
