"""What happens to a run from outside: a signal that asks it to stop, and a second process in its folder."""

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


class Signals:
    """Remembers that SIGTERM, SIGHUP or SIGINT asked for the end; a second SIGINT ends at once."""

    def __init__(self) -> None:
        self.received = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Take a signal: the running step is finished first."""
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        log.warning("%s: finishing this step, saving, then stopping", signal.Signals(number).name)


@contextmanager
def catch_signals() -> Iterator[Signals]:
    """Take SIGTERM, SIGINT and SIGHUP; the earlier handlers come back at the end.

    A SIGHUP that is ignored stays ignored: that is how nohup lets a run outlive its terminal.
    """
    caught, earlier = Signals(), {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            earlier[number] = signal.signal(number, caught)
    except ValueError:
        log.debug("not in the main thread: signals are left to whoever started this")
    try:
        yield caught
    finally:
        for number, handler in earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def refuse_links(run_dir: Path) -> None:
    """Refuse a run folder with symbolic links: a run that resumes truncates, appends to and deletes what is in it.

    What wandb keeps in its own folder is left to wandb, which makes links there.

    Raises
    ------
    TrainingError
        Naming the first link.
    """
    for root, folders, files in os.walk(run_dir, followlinks=False):
        for name in sorted([*folders, *files]):
            path = Path(root, name)
            if path.is_symlink():
                raise TrainingError(
                    f"{path}: is a link, which no run writes; put the file or folder itself there, or give a new --out"
                )
        if "wandb" in folders and Path(root) == run_dir:
            folders.remove("wandb")


@contextmanager
def hold_run(run_dir: Path, patience_s: float = 0.0) -> Iterator[None]:
    """Keep a second process out of a run folder.

    The kernel drops the lock with the process that holds it, however it ends, so a lock file that a dead process
    left behind is simply taken over; its text, the process id, is only for people.

    Parameters
    ----------
    run_dir
        The folder, which exists.
    patience_s
        How long to wait for the holder to end: after a lost node its ranks, or its file server's lease, may outlive it.

    Raises
    ------
    TrainingError
        A live process holds the folder, or there are links in it.
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
                holder = file.read().strip() or "?"
                raise TrainingError(f"{run_dir} is in use by process {holder}; wait for it or stop it") from error
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                log.warning(
                    "%s: this file system has no locks (%s); see to it that only one run writes here",
                    run_dir,
                    error.strerror,
                )
                break
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
