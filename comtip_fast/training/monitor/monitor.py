"""Watching a run: how fast it is and where its time goes, whether it stalls or diverges, and a trace when asked for.

Nothing here changes a step. What depends on the clock is named in :data:`CLOCKED`, so that two runs can be compared
without it.
"""

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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from comtip_fast.config.schema import WatchConfig

log = logging.getLogger("comtip_fast")
EVENTS = "events.jsonl"
CLOCKED = ("spots_per_s", "tokens_per_s", "tflops_per_s", "mfu", "loader_wait_share", "comm_share", "memory_gib")
"""Fields of a row that differ from run to run."""


@dataclass
class StepCost:
    """What a step costs by the formulas of ``comtip plan``, and what the device could do."""

    flops: Callable[[int, int], float]
    """This rank's FLOPs of a step of so many spots (of the global batch) and genes."""
    peak: float | None = None
    """FLOP/s of the device in the run's precision; None where it is not known, as for a CPU."""


@dataclass
class ThroughputMeter:
    """Adds up the steps between two logged rows."""

    device: torch.device
    comm: Callable[[], float] = lambda: 0.0
    """Seconds spent in collectives since the last call."""
    cost: StepCost | None = None
    _seconds: float = 0.0
    _comm: float = 0.0
    _spots: int = 0
    _tokens: float = 0.0
    _flops: float = 0.0

    def begin(self) -> None:
        """Forget collectives between steps: those of validation and checkpoints."""
        self.comm()

    def add(self, seconds: float, spots: int, numbers: dict[str, float]) -> None:
        """Count one step; ``numbers`` may hold ``genes`` and ``tokens``."""
        self._seconds += seconds
        self._comm += self.comm()
        self._spots += spots
        self._tokens += numbers.get("tokens", 0.0)
        if self.cost is not None and "genes" in numbers:
            self._flops += self.cost.flops(spots, int(numbers["genes"]))

    def row(self, loader_wait_s: float) -> dict[str, float]:
        """Return rates and shares since the last call; spots and tokens are all ranks', the rest is this one's."""
        seconds = max(self._seconds, 1e-9)
        out = {"spots_per_s": self._spots / seconds}
        if self._tokens:
            out["tokens_per_s"] = self._tokens / seconds
        if self._flops:
            out["tflops_per_s"] = self._flops / seconds / 1e12
            if self.cost is not None and self.cost.peak:
                out["mfu"] = self._flops / seconds / self.cost.peak
        out |= {"loader_wait_share": loader_wait_s / seconds, "comm_share": self._comm / seconds}
        out["memory_gib"] = peak_memory(self.device) / 2**30
        self._seconds, self._comm, self._spots, self._tokens, self._flops = 0.0, 0.0, 0, 0.0, 0.0
        return out


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held so far: by tensors on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most * (1 if sys.platform == "darwin" else 1024))


@dataclass
class SpikeDetector:
    """Says when losses or gradients leave the range they were in; a warning, the run goes on."""

    config: WatchConfig
    _losses: deque[float] = field(default_factory=lambda: deque(maxlen=50))
    _norms: deque[float] = field(default_factory=lambda: deque(maxlen=50))

    def update(self, loss: float, norm: float) -> str | None:
        """Return what is wrong with this step, or None."""
        said = None
        for value, before, limit, what in (
            (loss, self._losses, self.config.loss_jump, "loss"),
            (norm, self._norms, self.config.norm_jump, "gradient norm"),
        ):
            usual = statistics.median(before) if len(before) >= 20 else math.nan
            if said is None and limit and value > limit * abs(usual):
                said = f"{what} {value:.4g} is {value / usual:.1f} times the median of the last {len(before)} steps"
            if math.isfinite(value):
                before.append(value)
        return said


class Watchdog:
    """A thread that says so when no step ends for long, with the stack of every thread; after ``stop_s`` it calls ``stop``."""

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
        self._beat, self.what, self._said = time.monotonic(), "the start", False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        """Start, unless both limits are 0."""
        if min(self._limit, self._stop_s) < math.inf:
            self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def reset(self, what: str) -> None:
        """Hear that the run lives, and what it does next."""
        self._beat, self.what, self._said = time.monotonic(), what, False

    def _run(self) -> None:
        while not self._end.wait(min(1.0, self._limit / 4, self._stop_s / 4)):
            silent = time.monotonic() - self._beat
            if silent > min(self._limit, self._stop_s) and not self._said:
                self._said = True
                with suppress(OSError):  # a full disk may be the reason, and must not end this thread
                    with self._stacks.open("a", encoding="utf-8") as file:
                        faulthandler.dump_traceback(file)
                    self._report(f"stalled: {self.what} has taken {silent:.0f} s; where it stands is in {self._stacks}")
            if silent > self._stop_s:
                self._stop(f"{self.what} has taken more than watch.stall_stop_s={self._stop_s:g} s")
                return


class Events:
    """What was flagged, in the log and in ``events.jsonl``."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()

    def flag(self, kind: str, step: int, text: str) -> None:
        """Warn, and write one line."""
        log.warning("step %d: %s", step, text)
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "kind": kind, "text": text}) + "\n")


class Profiler:
    """Traces some steps with ``torch.profiler`` and writes a Chrome trace per rank."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path, rank: int, device: torch.device) -> None:
        self._steps, self._folder, self._rank, self._device = steps, folder, rank, device
        self._profile: Any = None

    def before(self, step: int) -> None:
        """Start tracing if ``step`` is the first to trace, or a later one of them after a resume."""
        if self._steps is None or self._profile is not None or not self._steps[0] <= step <= self._steps[1]:
            return
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=kinds, record_shapes=True, profile_memory=True)
        self._profile.__enter__()

    def after(self, step: int) -> None:
        """Write the trace if ``step`` was the last to trace."""
        if self._profile is not None and self._steps is not None and step >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """Write what was traced so far, also when the run ends before the last step to trace."""
        profile, self._profile = self._profile, None
        if profile is None:
            return
        self._steps = None  # also after an error below: it must not come again in every further step
        profile.__exit__(None, None, None)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank{self._rank}.json.gz"
        profile.export_chrome_trace(str(path))
        log.info("trace: %s (open it in Perfetto or chrome://tracing)", path)
