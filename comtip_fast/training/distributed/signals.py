"""Stop signals, and the lock that prevents two processes from writing to one run folder."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from comtip_shards.storage.cache import NO_LOCKS

from comtip_fast.training.protocol import TrainingError

log = logging.getLogger("comtip_fast")
LOCK_FILE = "run.lock"
"""Name of the lock file in a run folder."""
_held: set[int] = set()
"""Descriptors of the lock files that this process holds."""


def _drop_in_child() -> None:
    """Close inherited descriptors of locks: a lock would otherwise be held until the last forked process ends.

    The numbers stay in use, so that the file objects of the child do not close other files.
    """
    if _held:
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for descriptor in _held:
            os.dup2(nothing, descriptor, inheritable=False)
        os.close(nothing)
        _held.clear()


os.register_at_fork(after_in_child=_drop_in_child)


class Signals:
    """Records SIGTERM, SIGHUP or SIGINT; a SIGINT after a recorded signal raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.received = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Record a signal; the training loop stops after the current step."""
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        log.warning("%s received: stopping after this step and a checkpoint", signal.Signals(number).name)


@contextmanager
def catch_signals() -> Iterator[Signals]:
    """Handle SIGTERM, SIGINT and SIGHUP inside the block; restore the previous handlers afterwards.

    An ignored SIGHUP stays ignored, because nohup relies on it. Outside the main thread, no signal is handled.
    """
    caught, earlier = Signals(), {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            earlier[number] = signal.signal(number, caught)
    except ValueError:
        log.debug("not in the main thread: signals are not handled")
    try:
        yield caught
    finally:
        for number, handler in earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def refuse_links(run_dir: Path) -> None:
    """Refuse symbolic links in a run folder, because a resumed run truncates, extends and deletes its files.

    The content of the ``wandb`` folder is not checked, because wandb creates links there.

    Raises
    ------
    TrainingError
        The folder contains a symbolic link; the message names the first link.
    """
    for root, folders, files in os.walk(run_dir, followlinks=False):
        for name in sorted([*folders, *files]):
            path = Path(root, name)
            if path.is_symlink():
                raise TrainingError(
                    f"{path}: symbolic links are not allowed in a run folder; replace the link with its target, or "
                    "give a new folder"
                )
        if "wandb" in folders and Path(root) == run_dir:
            folders.remove("wandb")


@contextmanager
def hold_run(run_dir: Path, patience_s: float = 0.0) -> Iterator[None]:
    """Hold an exclusive lock on a run folder inside the block.

    The kernel releases the lock when the process ends, so the lock file of a dead process does not block a new one; forked processes
    do not hold it. The file contains the process id for messages only. On a file system without locks, a warning is logged instead.

    Parameters
    ----------
    run_dir
        An existing folder.
    patience_s
        Seconds to wait for the lock: after a node failure, the lock can be released some time after its process ended.

    Raises
    ------
    TrainingError
        Another process holds the lock, or the folder contains symbolic links.
    """
    refuse_links(run_dir)
    until = time.monotonic() + patience_s
    descriptor = os.open(
        run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666
    )
    with open(descriptor, "a+", encoding="utf-8") as file:  # noqa: PTH123
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() < until:
                    time.sleep(0.1)
                    continue
                file.seek(0)
                holder = file.read().strip()
                raise TrainingError(
                    f"{run_dir}: in use by {f'process {holder}' if holder else 'another process'}, on this machine or another one that "
                    "shares the folder; wait for it to end, or stop it"
                ) from error
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                log.warning(
                    "%s: this file system has no locks (%s); make sure that only one run writes to this folder",
                    run_dir,
                    error.strerror,
                )
                break
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        _held.add(descriptor)
        try:
            yield
        finally:
            _held.discard(descriptor)
