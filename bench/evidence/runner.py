"""Run parts one after the other, each in its own process with a deadline.

If a part fails, hangs or is killed, only its remaining rows are lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench.evidence.rows import CHANNEL, Row, Table

LEAST_S = 10.0
"""Minimum remaining time in s with which a part is started."""
POLL_S = 0.5
DRY_FACTOR = 10.0
"""Factor on the deadlines in a dry run. Deadlines are chosen for a GPU; interpreted kernels on shared CPU cores need longer."""
GRACE_S = 5.0
"""Time in s in which a killed process must end; on a hung GPU it may not."""


@dataclass(frozen=True)
class Part:
    """One part of the evidence."""

    name: str
    seconds: float
    """Deadline in s."""
    shows: str
    """Description for ``--list``."""
    module: str = ""
    """Module with ``run(rows: Rows, dry: bool) -> None``; by default ``bench.evidence.parts.<name>``."""

    @property
    def target(self) -> str:
        """Name of the module."""
        return self.module or f"bench.evidence.parts.{self.name}"


@dataclass(frozen=True)
class Outcome:
    """Outcome of a part."""

    status: str
    """``ok``, ``failed`` or ``deadline``."""
    rows: int
    """Number of rows that it sent."""
    seconds: float
    note: str = ""


def run_parts(
    parts: Sequence[Part],
    command: Callable[[Part], list[str]],
    table: Table,
    *,
    seconds: float,
    log: Path,
    env: dict[str, str] | None = None,
) -> dict[str, Outcome]:
    """Run parts until the total deadline.

    Parameters
    ----------
    parts
        The parts, in the order in which they run.
    command
        Returns the command line that runs a part.
    table
        Table to which every row is written when it is sent.
    seconds
        Deadline of all parts together, in s. If the deadlines of the parts sum to more, each part is sure of the same share of
        its own, and gets more as far as the parts before it took less; so no part keeps a later one from running.
    log
        File for the output of the parts.
    env
        Environment of the parts; by default that of this process.

    Returns
    -------
    dict
        {name of the part: outcome}; the status is ``deadline`` if no time was left for a part.
    """
    ends, outcomes = time.monotonic() + seconds, {}
    share = min(1.0, seconds / sum(part.seconds for part in parts))
    for i, part in enumerate(parts):
        left = ends - time.monotonic() - share * sum(later.seconds for later in parts[i + 1 :])
        if left < min(LEAST_S, 0.9 * share * part.seconds):  # earlier parts also took time to be killed
            outcome = Outcome("deadline", 0, 0.0, f"not started: {max(0.0, left):.0f} s of --minutes were left for it")
        else:
            outcome = run_part(part, command(part), table, min(part.seconds, left), log, env)
        outcomes[part.name] = outcome
        row = Row("part", "ran", f"{outcome.rows} rows", status=outcome.status, note=outcome.note)
        table.write(part.name, asdict(row))
        print(
            f"{part.name:<12}{outcome.status:<10}{outcome.rows:>4} rows{outcome.seconds:>7.1f} s  {outcome.note}",
            flush=True,
        )
    return outcomes


def run_part(
    part: Part, command: list[str], table: Table, seconds: float, log: Path, env: dict[str, str] | None
) -> Outcome:
    """Run one part, kill its process group at the deadline, and return the outcome."""
    began = time.monotonic()
    reading, writing = os.pipe()
    with log.open("ab") as out:
        out.write(f"\n== {part.name}: {' '.join(command)}\n".encode())
        out.flush()
        start = out.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=(env or dict(os.environ)) | {CHANNEL: str(writing)},
            pass_fds=(writing,),
            start_new_session=True,
        )
    os.close(writing)
    try:
        n, late = _receive(reading, process, table, part.name, began + seconds)
        if not late:
            late = not _ended(process, began + seconds - time.monotonic())
    finally:
        killed = _kill(process)
        os.close(reading)
    took = time.monotonic() - began
    if late:
        stuck = "" if killed else "; its process did not end"
        return Outcome("deadline", n, took, f"stopped after {seconds:.0f} s{stuck}")
    if process.returncode:
        return Outcome("failed", n, took, f"exit {process.returncode}: {_last_line(log, start)}")
    return Outcome("ok", n, took)


def _receive(reading: int, process: subprocess.Popen[bytes], table: Table, part: str, ends: float) -> tuple[int, bool]:
    """Write rows as they arrive; return their number, and whether the deadline was reached before the part ended."""
    n, pending = 0, b""
    with selectors.DefaultSelector() as selector:
        selector.register(reading, selectors.EVENT_READ)
        while True:
            left = ends - time.monotonic()
            if left <= 0:
                return n, True
            ended = process.poll() is not None  # polled first, so that everything it sent is in the pipe
            if not selector.select(min(left, POLL_S)):
                if ended:  # a process started by the part holds the pipe open
                    return n, False
                continue
            data = os.read(reading, 65536)
            if not data:
                return n, False
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                table.write(part, json.loads(line))
                n += 1


def _ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return False
    return True


def _kill(process: subprocess.Popen[bytes]) -> bool:
    """Kill the remaining processes of the part's process group, and return whether the part has ended."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    return _ended(process, GRACE_S)


def _last_line(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


@contextlib.contextmanager
def exiting_on_signals() -> Iterator[None]:
    """Exit on the signals of a time limit and of a closed terminal as on an error, so that the running part is killed.

    A part has a session of its own: if the runner alone ended, the part would keep the GPU. A signal that is ignored, as by
    ``nohup``, stays ignored.
    """
    found = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL]
    for number in found:
        signal.signal(number, lambda received, _frame: sys.exit(128 + received))
    try:
        yield
    finally:
        for number in found:
            signal.signal(number, signal.SIG_DFL)


def environment(dry: bool) -> dict[str, str]:
    """Return the environment of the parts; kernels are interpreted and GPUs are hidden in a dry run, and in no other."""
    env = dict(os.environ) | {"PYTHONUNBUFFERED": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    env.pop("TRITON_INTERPRET", None)
    if dry:
        env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return env


def longer(parts: Sequence[Part], dry: bool) -> list[Part]:
    """Return parts with the deadlines of a dry run, or unchanged."""
    return [replace(p, seconds=DRY_FACTOR * p.seconds) for p in parts] if dry else list(parts)


def python(script: Path, part: Part, dry: bool) -> list[str]:
    """Return the command line that runs a part with this interpreter."""
    return [sys.executable, str(script), "--part", part.name, *(["--dry-run"] if dry else [])]
