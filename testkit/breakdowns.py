"""Ways in which a rank of a run breaks down, to be set off inside the process that shall break.

Each is armed before the run starts and strikes at a step, a file operation, a collective or a moment. What strikes is
stamped first, so that the time until the run goes on can be told.
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
from comtip_fast.training.distributed.process_group import ProcessGroup
from comtip_fast.training.task import CoMTIPTask
from comtip_fast.training.trainer import CHECKPOINTS

_OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


@dataclass(frozen=True)
class Breakdown:
    """One breakdown of one rank."""

    kind: str
    """A key of :data:`KINDS`."""
    rank: int
    at: float
    """Step, number of the operation or collective, or seconds after the first step, as the kind has it."""
    settings: tuple[str, ...] = ()
    """Further ``KEY=VALUE`` of every rank of that attempt."""


class Stamps:
    """Lines ``{"event", "rank", "attempt", "time", ...}`` that outlive the process."""

    def __init__(self, path: Path, rank: int, attempt: int) -> None:
        self.path, self.rank, self.attempt = path, rank, attempt

    def write(self, event: str, **more: Any) -> None:
        """Append one line, in one write."""
        line = {"event": event, "rank": self.rank, "attempt": self.attempt, "time": time.time()} | more
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(descriptor, (json.dumps(line) + "\n").encode())
        os.close(descriptor)


def read_stamps(path: Path) -> list[dict[str, Any]]:
    """Return all lines so far."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def at_every_step(act: Callable[[int], None]) -> None:
    """Call ``act(step)`` in this process before the batch of each step is made."""
    plain = CoMTIPTask.batch

    def batch(self: CoMTIPTask, spot_index: Any, step: int, epoch: int) -> Any:
        act(step)
        return plain(self, spot_index, step, epoch)

    CoMTIPTask.batch = batch  # type: ignore[method-assign]


def arm(breakdown: Breakdown, run_dir: Path, stamps: Stamps) -> None:
    """Make this process break down as said."""

    def strike(act: Callable[[], None] = _die) -> None:
        stamps.write("strike", kind=breakdown.kind)
        act()

    KINDS[breakdown.kind](breakdown.at, run_dir, strike)


Strike = Callable[..., None]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _once_at(step: float, act: Callable[[], None]) -> None:
    at_every_step(lambda now: act() if now == int(step) else None)


def _kill_in_step(at: float, run_dir: Path, strike: Strike) -> None:
    """Count the steps of this start, so that a kill strikes however far the run has come."""
    left = [int(at)]

    def act(step: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            strike()

    at_every_step(act)


def _kill_at_moment(at: float, run_dir: Path, strike: Strike) -> None:
    """Set an alarm that is nobody's to handle: as sudden as SIGKILL, wherever the process is."""
    started: list[int] = []

    def start(step: int) -> None:
        if not started:
            started.append(step)
            strike(lambda: signal.setitimer(signal.ITIMER_REAL, max(1e-3, at)))

    at_every_step(start)


def _kill_at_file_operation(at: float, run_dir: Path, strike: Strike) -> None:
    left = [int(at)]

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event in _OPERATIONS and any(str(run_dir) in str(a) for a in args):
            left[0] -= 1
            if left[0] == 0:
                strike()

    sys.addaudithook(hook)


def _kill_in_collective(at: float, run_dir: Path, strike: Strike) -> None:
    left = [int(at)]

    def counted(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                strike()
            return plain(*args)

        return call

    for name in ("sum", "gather_rows", "scatter_rows"):
        setattr(ProcessGroup, name, counted(getattr(ProcessGroup, name)))


def _terminate(at: float, run_dir: Path, strike: Strike) -> None:
    _once_at(at, lambda: strike(lambda: os.kill(os.getpid(), signal.SIGTERM)))


def _hang(at: float, run_dir: Path, strike: Strike) -> None:
    _once_at(at, lambda: strike(lambda: time.sleep(600)))


def _freeze(at: float, run_dir: Path, strike: Strike) -> None:
    """Not even a watchdog runs: only the others can notice."""
    _once_at(at, lambda: strike(lambda: os.kill(os.getpid(), signal.SIGSTOP)))


def _disk_full(at: float, run_dir: Path, strike: Strike) -> None:
    """From the n-th checkpoint file on, writing stops half way as on a full disk."""
    left, plain = [int(at)], checkpoints.save_file

    def save_file(tensors: Any, path: Path) -> None:
        left[0] -= 1
        plain(tensors, path)
        if left[0] <= 0:
            os.truncate(path, path.stat().st_size // 2)
            strike(lambda: None)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    checkpoints.save_file = save_file  # type: ignore[assignment]


def _spoil_newest(change: Callable[[bytes], bytes]) -> Callable[[float, Path, Strike], None]:
    def fault(at: float, run_dir: Path, strike: Strike) -> None:
        def act() -> None:
            root = run_dir / CHECKPOINTS
            steps = checkpoints.steps_of(root)
            path = checkpoints.folder_of(root, steps[-1]) / checkpoints.FILES[0]
            path.write_bytes(change(path.read_bytes()))
            _die()

        _once_at(at, lambda: strike(act))

    return fault


def _flip(raw: bytes) -> bytes:
    middle = len(raw) // 2
    return raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]


KINDS: dict[str, Callable[[float, Path, Strike], None]] = {
    "killed in a step": _kill_in_step,
    "killed at a moment": _kill_at_moment,
    "killed at a file operation": _kill_at_file_operation,
    "killed in a collective": _kill_in_collective,
    "SIGTERM on one rank": _terminate,
    "disk full": _disk_full,
    "checkpoint truncated, then killed": _spoil_newest(lambda raw: raw[: len(raw) // 2]),
    "checkpoint bit-flipped, then killed": _spoil_newest(_flip),
    "stalled": _hang,
    "frozen": _freeze,
}


def deaths(stamps: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return per strike: kind, rank, attempt, and seconds until any rank made a step of a later attempt."""
    rows = list(stamps)
    out = []
    for strike in (r for r in rows if r["event"] == "strike"):
        later = [r["time"] for r in rows if r["event"] == "step" and r["attempt"] > strike["attempt"]]
        seconds = min(later) - strike["time"] if later else float("nan")
        out.append({k: strike[k] for k in ("kind", "rank", "attempt")} | {"seconds": seconds})
    return out
