"""Fault injection for one rank of a training run.

A failure is armed in the process before the run starts and triggers at a step, a file operation, a collective or a
point in time. It is logged just before it takes effect, so that the recovery time can be computed from the event log.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comtip_fast.training.checkpoint import store as checkpoints
from comtip_fast.training.checkpoint.resume import CHECKPOINTS
from comtip_fast.training.distributed.process_group import ProcessGroup
from comtip_fast.training.task import CoMTIPTask

_OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


@dataclass(frozen=True)
class InjectedFailure:
    """One failure of one rank."""

    kind: str
    """A key of :data:`KINDS`."""
    rank: int
    at: float
    """Time of the failure, depending on the kind: a step, the number of a file operation, collective or checkpoint file, or
    seconds after the first step."""
    settings: tuple[str, ...] = ()
    """Additional ``KEY=VALUE`` overrides for all ranks of this attempt."""


class EventLog:
    """Writer of JSON lines ``{"event", "rank", "attempt", "time", ...}`` that are complete even if the process is killed."""

    def __init__(self, path: Path, rank: int, attempt: int) -> None:
        self.path, self.rank, self.attempt = path, rank, attempt

    def write(self, event: str, **more: Any) -> None:
        """Append one event with a single ``write`` call; ``more`` are additional fields."""
        line = {"event": event, "rank": self.rank, "attempt": self.attempt, "time": time.time()} | more
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(descriptor, (json.dumps(line) + "\n").encode())
        os.close(descriptor)


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events logged so far by all ranks and attempts, in the order of the file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def on_every_step(act: Callable[[int], None]) -> None:
    """Call ``act(step)`` in this process before each step's batch is built."""
    original = CoMTIPTask.batch

    def batch(self: CoMTIPTask, spot_index: Any, step: int, epoch: int) -> Any:
        act(step)
        return original(self, spot_index, step, epoch)

    CoMTIPTask.batch = batch  # type: ignore[method-assign]


def arm(failure: InjectedFailure, run_dir: Path, events: EventLog) -> None:
    """Install the failure in this process."""

    def trigger(act: Callable[[], None] = _kill_self) -> None:
        events.write("failure", kind=failure.kind)
        act()

    KINDS[failure.kind](failure.at, run_dir, trigger)


Trigger = Callable[..., None]


def _kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at_step(step: float, act: Callable[[], None]) -> None:
    on_every_step(lambda now: act() if now == int(step) else None)


def _kill_in_step(at: float, run_dir: Path, trigger: Trigger) -> None:
    """Kill in the n-th step of this attempt, counted from the step at which the run resumed."""
    remaining = [int(at)]

    def act(step: int) -> None:
        remaining[0] -= 1
        if remaining[0] == 0:
            trigger()

    on_every_step(act)


def _kill_after_seconds(at: float, run_dir: Path, trigger: Trigger) -> None:
    """Set a timer whose signal has no handler and, like SIGKILL, ends the process at an arbitrary instruction."""
    started: list[int] = []

    def start(step: int) -> None:
        if not started:
            started.append(step)
            trigger(lambda: signal.setitimer(signal.ITIMER_REAL, max(1e-3, at)))

    on_every_step(start)


def _kill_at_file_operation(at: float, run_dir: Path, trigger: Trigger) -> None:
    remaining = [int(at)]

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event in _OPERATIONS and any(str(run_dir) in str(a) for a in args):
            remaining[0] -= 1
            if remaining[0] == 0:
                trigger()

    sys.addaudithook(hook)


def _kill_in_collective(at: float, run_dir: Path, trigger: Trigger) -> None:
    remaining = [int(at)]

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            remaining[0] -= 1
            if remaining[0] == 0:
                trigger()
            return original(*args)

        return call

    for name in ("sum", "gather_rows", "scatter_rows"):
        setattr(ProcessGroup, name, counted(getattr(ProcessGroup, name)))


def _terminate(at: float, run_dir: Path, trigger: Trigger) -> None:
    _at_step(at, lambda: trigger(lambda: os.kill(os.getpid(), signal.SIGTERM)))


def _stall(at: float, run_dir: Path, trigger: Trigger) -> None:
    _at_step(at, lambda: trigger(lambda: time.sleep(600)))


def _freeze(at: float, run_dir: Path, trigger: Trigger) -> None:
    """Stop the whole process with its watchdog thread, so that only the other ranks can detect it."""
    _at_step(at, lambda: trigger(lambda: os.kill(os.getpid(), signal.SIGSTOP)))


def _disk_full(at: float, run_dir: Path, trigger: Trigger) -> None:
    """Let the writes of checkpoint files fail halfway with ENOSPC, from the n-th file on."""
    remaining, original = [int(at)], checkpoints.save_file

    def save_file(tensors: Any, path: Path) -> None:
        remaining[0] -= 1
        original(tensors, path)
        if remaining[0] <= 0:
            os.truncate(path, path.stat().st_size // 2)
            trigger(lambda: None)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    checkpoints.save_file = save_file  # type: ignore[assignment]


def _corrupt_newest(change: Callable[[bytes], bytes]) -> Callable[[float, Path, Trigger], None]:
    def install(at: float, run_dir: Path, trigger: Trigger) -> None:
        def act() -> None:
            root = run_dir / CHECKPOINTS
            steps = checkpoints.steps_of(root)
            path = checkpoints.folder_of(root, steps[-1]) / checkpoints.FILES[0]
            path.write_bytes(change(path.read_bytes()))
            _kill_self()

        _at_step(at, lambda: trigger(act))

    return install


def _flip_bit(raw: bytes) -> bytes:
    middle = len(raw) // 2
    return raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]


KINDS: dict[str, Callable[[float, Path, Trigger], None]] = {
    "killed in a step": _kill_in_step,
    "killed by a timer": _kill_after_seconds,
    "killed at a file operation": _kill_at_file_operation,
    "killed in a collective": _kill_in_collective,
    "SIGTERM on one rank": _terminate,
    "disk full": _disk_full,
    "checkpoint truncated, then killed": _corrupt_newest(lambda raw: raw[: len(raw) // 2]),
    "checkpoint bit-flipped, then killed": _corrupt_newest(_flip_bit),
    "stalled": _stall,
    "frozen": _freeze,
}


def recoveries(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return per failure its kind, rank and attempt, and the seconds to the first step of a later attempt (NaN: none)."""
    rows = list(events)
    out = []
    for failure in (r for r in rows if r["event"] == "failure"):
        later = [r["time"] for r in rows if r["event"] == "step" and r["attempt"] > failure["attempt"]]
        seconds = min(later) - failure["time"] if later else float("nan")
        out.append({k: failure[k] for k in ("kind", "rank", "attempt")} | {"seconds": seconds})
    return out
