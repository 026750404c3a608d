"""Failures that a restart can fix: each ends the run within a bounded time, with one message per rank and a separate exit code.

If a rank dies, its connections close, and the next collective of the other ranks fails with an error of the transport.
:func:`explain_failures` turns that error into a message with the cause, the location and the fix.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from comtip_shards.storage.disk import disk_fix, disk_trouble, unwritable

from comtip_fast.runtime.streams import drain, write_line
from comtip_fast.training.protocol import TrainingError

RESTART_CODE = 75
"""Exit code of a run that should be restarted with ``--resume`` (``EX_TEMPFAIL`` of sysexits.h)."""
ADVICE = (
    "a launcher restarts the run from the last valid checkpoint; without a launcher, start the run again with `resume`"
)


class RestartError(RuntimeError):
    """The run can continue only in a new process, from the last valid checkpoint."""


@contextmanager
def explain_failures(
    rank: int, size: int, where: Callable[[], str], timeout_s: float, *, key: str = "engine.timeout_s"
) -> Iterator[None]:
    """Turn errors of a lost rank, a late rank or a full or failing disk into a :class:`RestartError`.

    An error of a path that cannot be written (a read-only file system), which a restart does not fix, becomes a
    :class:`TrainingError`. Other errors are not changed.

    Parameters
    ----------
    rank, size
        Rank of this process and number of ranks.
    where
        Returns a description of the current activity, for the message.
    timeout_s
        Timeout of collectives in seconds, for the message.
    key
        Setting that holds the timeout, for the message.

    Raises
    ------
    RestartError
        A rank is lost or late, or a disk is full or fails.
    TrainingError
        A path cannot be written.
    """
    try:
        yield
    except (RestartError, TrainingError):
        raise
    except Exception as error:
        problem = disk_trouble(error)
        if problem is not None:
            raise RestartError(f"{_who(rank, size)}{where()}: {problem}; {disk_fix(error)}, then {ADVICE}") from error
        problem = unwritable(error)
        if problem is not None:
            raise TrainingError(
                f"{_who(rank, size)}{where()}: {problem}; make it writable or give another folder"
            ) from error
        if not isinstance(error, RuntimeError) or size == 1 or not _of_collective(error):
            raise
        late = any(word in str(error).lower() for word in ("timed out", "timeout", "time out"))
        what = (
            f"a rank did not reach a collective within {key}={timeout_s:g} s (see the logs of the other ranks; if a rank was only slow, raise {key})"
            if late
            else "the connection to another rank is lost: its process or node failed (see its log)"
        )
        raise RestartError(f"{_who(rank, size)}{where()}: {what}; {ADVICE}") from error


@contextmanager
def no_longer_than(seconds: float, what: str) -> Iterator[None]:
    """Exit the process if the block takes longer than ``seconds``, because a wait for a dead rank may never return.

    ``what`` names the work in the message.
    """

    def end() -> None:
        write_line(
            f"comtip: error: {what} took more than {seconds:g} s; process ended, so that a launcher can restart the run",
            sys.stderr,
        )
        hard_exit()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def hard_exit(code: int = RESTART_CODE) -> None:
    """Flush standard output and standard error, and exit the process from any thread, even if other threads are blocked."""
    for stream in (sys.stdout, sys.stderr):
        drain(stream)
    os._exit(code)


def _who(rank: int, size: int) -> str:
    """Return the beginning of a message that names the rank; empty for a single process."""
    return f"rank {rank} of {size}, " if size > 1 else ""


def _of_collective(error: RuntimeError) -> bool:
    """Return whether an error was raised by a collective of ``torch.distributed``."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "nccl", "connection closed by peer")
    )
