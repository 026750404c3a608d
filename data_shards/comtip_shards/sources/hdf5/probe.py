"""Refuse HDF5 files on which the HDF5 library hangs or crashes, before this process reads them.

Some damage makes the library loop forever or crash, and Python can neither interrupt nor catch this. A helper process therefore
walks each file first (:mod:`comtip_shards.sources.hdf5.walk`). It is started once, so that a file costs milliseconds, and
a result is cached for as long as the file does not change.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from comtip_shards.errors import SourceError
from comtip_shards.names import shown

WALK = Path(__file__).with_name("walk.py")
_MAX_KNOWN = 10_000
"""Number of cached results after which the cache is emptied."""
_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}
"""Signals that a crash of the library causes; others come from outside, e.g. from the out-of-memory killer."""
_log = logging.getLogger(__name__)


class Hdf5Probe:
    """Owner of the helper process, and cache of its results."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._known: dict[tuple[int, ...], str] = {}

    def check(self, path: Path) -> None:
        """Check one file; if the helper process cannot run, a warning is logged and the file is accepted.

        Raises
        ------
        SourceError
            The HDF5 library hangs or crashes on this file.
        """
        state = path.stat()
        key = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
        with self._lock:
            if key not in self._known:
                if len(self._known) >= _MAX_KNOWN:
                    self._known.clear()
                self._known[key] = self._ask(path)
            problem = self._known[key]
        if problem:
            raise SourceError(f"{path}: damaged, {problem}; copy or download it again")

    def close(self) -> None:
        """End the helper process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()  # a forked process may hold its input open, so closing it would not end its loop
            process.wait()
            _close_pipes(process)

    def abandon(self) -> None:
        """Close the inherited pipes to the helper of the parent process; call it after a fork."""
        if self._process is not None:
            _close_pipes(self._process)

    def _ask(self, path: Path) -> str:
        """Return what is wrong with a file, "" if the walk completed or could not be run."""
        for _ in range(2):
            try:
                process = self._started()
            except OSError as error:
                reason = f"no helper process can be started ({error}); allow more processes"
                break
            location = self._walk(process, path)
            if location is None:
                return ""
            process.wait()
            if process.returncode == -signal.SIGPROF:
                return f"the HDF5 library never returns at {shown(location)}"
            if -process.returncode in _CRASHES:
                return f"the HDF5 library crashes at {shown(location)}"
            code = process.returncode
            reason = (
                f"signal {-code} ended the helper process" if code < 0 else f"the helper process ended with code {code}"
            )
        _log.warning(
            "%s: not checked for damage that can make the HDF5 library hang, but read all the same, because %s",
            path,
            reason,
        )
        return ""

    def _walk(self, process: subprocess.Popen[str], path: Path) -> str | None:
        """Return None if the helper completed the walk, otherwise the object at which it ended."""
        assert process.stdin is not None
        assert process.stdout is not None
        location = "/"
        try:
            process.stdin.write(json.dumps(str(path.absolute())) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if line == "null\n":
                    return None
                with suppress(ValueError):  # the last line may be cut
                    location = json.loads(line) or location
        except BrokenPipeError:
            pass
        except BaseException:  # interrupted: the rest of this answer must not be read as that of the next file
            self.close()
            raise
        return location

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        paths = os.pathsep.join(p for p in sys.path if p)
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WALK)],
            env=os.environ | {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        return self._process


def _close_pipes(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            if pipe is not None:
                pipe.close()


def _renew() -> None:
    """Give a forked process its own helper, because two processes cannot share the pipes."""
    global _probe
    _probe.abandon()
    _probe = Hdf5Probe()


def _close() -> None:
    _probe.close()


_probe = Hdf5Probe()
atexit.register(_close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def probe_hdf5(path: Path) -> None:
    """Check a file as :meth:`Hdf5Probe.check` does, in the one helper process that this process keeps."""
    _probe.check(path)
