"""Failures that a fresh start mends: said in one sentence on every rank, within a bounded time, with an exit code of their own.

A rank that dies takes its connections with it, so the others fail in their next collective; what they then get to see
is a line of the transport. :func:`explain_failures` turns it into what happened, where, and what to do.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from comtip_shards.storage.disk import disk_trouble, unwritable

from comtip_fast.streams import drain, write_line
from comtip_fast.training.protocol import TrainingError

RESTART_CODE = 75
"""Exit code of a process that a fresh start with ``--resume`` helps (``EX_TEMPFAIL`` of sysexits.h)."""
ADVICE = "the launcher starts it again from the last good checkpoint; without one, run the same command with --resume"


class RestartError(RuntimeError):
    """Say that only a fresh process can go on, from the last good checkpoint."""


@contextmanager
def explain_failures(rank: int, size: int, where: Callable[[], str], timeout_s: float) -> Iterator[None]:
    """Turn a lost rank, a late rank and a full disk into a :class:`RestartError`; most else passes as it is.

    A path that can never be written (a read-only file system) becomes a :class:`TrainingError`: starting again does not
    help there.

    Parameters
    ----------
    rank, size
        Of this process.
    where
        Says what was being done.
    timeout_s
        How long a collective waits for a rank.
    """
    try:
        yield
    except (RestartError, TrainingError):
        raise
    except Exception as error:
        said = disk_trouble(error)
        if said is not None:
            raise RestartError(f"{_who(rank, size)}{where()}: {said}; make room, then {ADVICE}") from error
        refused = unwritable(error)
        if refused is not None:
            raise TrainingError(
                f"{_who(rank, size)}{where()}: {refused}; make it writable, or give another folder"
            ) from error
        if not isinstance(error, RuntimeError) or size == 1 or not _of_collective(error):
            raise
        late = any(word in str(error).lower() for word in ("timed out", "timeout", "time out"))
        what = (
            f"a rank did not come to a collective within engine.timeout_s={timeout_s:g} s"
            if late
            else "the connection to another rank is lost: it ended, or its node did (its own log says why)"
        )
        raise RestartError(f"{_who(rank, size)}{where()}: {what}; {ADVICE}") from error


@contextmanager
def no_longer_than(seconds: float, what: str) -> Iterator[None]:
    """End this process if the block takes longer: what waits for ranks that are gone may wait for ever."""

    def end() -> None:
        write_line(f"comtip: error: {what} took more than {seconds:g} s; ended", sys.stderr)
        hard_exit()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def hard_exit(code: int = RESTART_CODE) -> None:
    """End this process from any thread, whatever the others are stuck in."""
    for stream in (sys.stdout, sys.stderr):
        drain(stream)
    os._exit(code)


def _who(rank: int, size: int) -> str:
    return f"rank {rank} of {size}, " if size > 1 else ""


def _of_collective(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "nccl", "connection closed by peer")
    )
