"""Monitoring of a run: throughput, jumps of loss and gradient norm, stalls, profiler traces. It does not change training steps."""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import resource
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from comtip_fast.config.schema import WatchConfig
from comtip_fast.training.distributed.comm_timer import CommClock
from comtip_fast.training.protocol import StepCost

log = logging.getLogger("comtip_fast")
EVENTS = "events.jsonl"
"""File in the run folder with one row per jump and stall."""
CLOCKED = ("spots_per_s", "tokens_per_s", "tflops_per_s", "mfu", "loader_wait_share", "comm_share", "memory_gib")
"""Fields of a logged row that depend on timing or on the machine, and must be omitted when two runs are compared."""


@dataclass
class ThroughputMeter:
    """Accumulates step statistics between two logged rows."""

    device: torch.device
    comm: CommClock | None = None
    """Clock of the collectives; if None, their time counts as 0."""
    cost: StepCost | None = None
    """Estimated cost of a step; None gives no FLOP rate."""
    _seconds: float = 0.0
    _spots: int = 0
    _tokens: float = 0.0
    _flops: float = 0.0

    def begin(self) -> None:
        """Start a step: discard the time of collectives since the last step, for example of collectives in a validation."""
        if self.comm is not None:
            self.comm.discard()

    def add(self, seconds: float, spots: int, numbers: dict[str, Any]) -> None:
        """Add a step that took ``seconds`` for ``spots`` spots; ``numbers`` may include ``genes`` and ``tokens`` as floats."""
        self._seconds += seconds
        if self.comm is not None:
            self.comm.keep()
        self._spots += spots
        self._tokens += numbers.get("tokens", 0.0)
        if self.cost is not None and "genes" in numbers:
            self._flops += self.cost.flops(spots, int(numbers["genes"]))

    def row(self, loader_wait_s: float) -> dict[str, float]:
        """Return rates and shares of time over the steps since the last call, and the peak memory.

        Parameters
        ----------
        loader_wait_s
            Time for which the steps waited for batches, in seconds.

        Returns
        -------
        dict
            ``spots_per_s`` of all ranks; ``tokens_per_s`` of one copy of the sentence table, if tokens were counted;
            ``tflops_per_s`` of this rank, if the cost of a step is known; ``mfu``, if the peak rate of the device is known too;
            ``loader_wait_share`` and ``comm_share`` of the time of the steps; and ``memory_gib``, see :func:`peak_memory`.
        """
        seconds = max(self._seconds, 1e-9)
        comm = 0.0 if self.comm is None else self.comm.seconds()
        out = {"spots_per_s": self._spots / seconds}
        if self._tokens:
            out["tokens_per_s"] = self._tokens / seconds
        if self._flops:
            out["tflops_per_s"] = self._flops / seconds / 1e12
            if self.cost is not None and self.cost.peak:
                out["mfu"] = self._flops / seconds / self.cost.peak
        out |= {"loader_wait_share": loader_wait_s / seconds, "comm_share": comm / seconds}
        out["memory_gib"] = peak_memory(self.device) / 2**30
        self._seconds, self._spots, self._tokens, self._flops = 0.0, 0, 0.0, 0.0
        return out


def peak_memory(device: torch.device) -> int:
    """Return the peak memory since the start of the process, in bytes: of tensors on a GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most * (1 if sys.platform == "darwin" else 1024))


@dataclass
class SpikeDetector:
    """Detects jumps: a loss or gradient norm above a multiple (``watch.*_jump``) of the median of the last 50 finite values."""

    config: WatchConfig
    _losses: deque[float] = field(default_factory=lambda: deque(maxlen=50))
    _norms: deque[float] = field(default_factory=lambda: deque(maxlen=50))

    def update(self, loss: float, norm: float) -> str | None:
        """Add a step; return a message if its loss or norm is a jump, else None. At least 20 earlier values must be known."""
        message = None
        for value, before, limit, what in (
            (loss, self._losses, self.config.loss_jump, "loss"),
            (norm, self._norms, self.config.norm_jump, "gradient norm"),
        ):
            usual = statistics.median(before) if len(before) >= 20 else math.nan
            if message is None and limit and usual and value > limit * abs(usual):
                message = f"{what} {value:.4g} is {value / usual:.1f} times the median of the last {len(before)} steps"
            if math.isfinite(value):
                before.append(value)
        return message


class Watchdog:
    """Thread that reports a stalled run and dumps the stack of every thread.

    Parameters
    ----------
    limit_s
        Seconds without :meth:`reset` until the stall is reported; 0 for no limit.
    report
        Called with a message, once per stall, after ``limit_s`` or ``stop_s``, whichever is shorter; not called if the stacks
        cannot be written.
    stacks
        File to which the stacks are appended before ``report`` is called.
    stop_s
        Seconds without :meth:`reset` until ``stop`` is called; 0 for no limit.
    stop
        Called with a message; the thread then ends.
    """

    def __init__(
        self,
        limit_s: float,
        report: Callable[[str], None],
        stacks: Path,
        *,
        stop_s: float = 0.0,
        stop: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._limit, self._report, self._stacks = limit_s or math.inf, report, stacks
        self._stop_s, self._stop = stop_s or math.inf, stop
        self._last_reset, self.what, self._reported = time.monotonic(), "the start", False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        """Start the thread, unless both limits are 0."""
        if min(self._limit, self._stop_s) < math.inf:
            self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop the thread."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def reset(self, what: str) -> None:
        """Reset the timer; ``what`` names the next activity."""
        self._last_reset, self.what, self._reported = time.monotonic(), what, False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the timer inside the block, in which this rank waits for others; the wait has its own timeout."""
        self._last_reset = math.inf
        try:
            yield
        finally:
            self._last_reset = time.monotonic()

    def _run(self) -> None:
        """Check the time since the last reset until the watchdog is closed; report and stop a stalled process."""
        while not self._end.wait(min(1.0, self._limit / 4, self._stop_s / 4)):
            elapsed = time.monotonic() - self._last_reset
            if elapsed > min(self._limit, self._stop_s) and not self._reported:
                self._reported = True
                with suppress(OSError):  # a full disk may be the cause of the stall, and must not end this thread
                    with self._stacks.open("a", encoding="utf-8") as file:
                        faulthandler.dump_traceback(file)
                    self._report(f"stalled: {self.what} has taken {elapsed:.0f} s; stack traces are in {self._stacks}")
            if elapsed > self._stop_s:
                self._stop(f"{self.what} has taken more than watch.stall_stop_s={self._stop_s:g} s")
                return


class Events:
    """Writes events to the log and to ``events.jsonl``."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()

    def flag(self, kind: str, step: int, text: str) -> None:
        """Log ``text`` as a warning and append a row of the given ``kind``."""
        log.warning("step %d: %s", step, text)
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "kind": kind, "text": text}) + "\n")


class Profiler:
    """Profiles a range of steps with ``torch.profiler`` and writes one Chrome trace per rank.

    Parameters
    ----------
    steps
        First and last step; None profiles no step.
    folder
        Folder of the traces.
    rank, device
        Rank and device of this process.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, rank: int, device: torch.device) -> None:
        self._steps, self._folder, self._rank, self._device = steps, folder, rank, device
        self._profile: Any = None

    def before(self, step: int) -> None:
        """Start the profiler if ``step`` is in the range and the profiler is not running."""
        if self._steps is None or self._profile is not None or not self._steps[0] <= step <= self._steps[1]:
            return
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=kinds, record_shapes=True, profile_memory=True)
        self._profile.__enter__()

    def after(self, step: int) -> None:
        """Write the trace after the last step of the range."""
        if self._profile is not None and self._steps is not None and step >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """Stop the profiler and write the trace, if it is running, even before the last step of the range."""
        profile, self._profile = self._profile, None
        if profile is None:
            return
        self._steps = None  # set first, so that an error below does not repeat in every further step
        profile.__exit__(None, None, None)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank{self._rank}.json.gz"
        profile.export_chrome_trace(str(path))
        log.info("trace: %s (open it in Perfetto or chrome://tracing)", path)
