"""Launch a command as several local ranks, as ``torchrun`` does, and stop all of them when one fails."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import IO, Any, Protocol


class RankError(RuntimeError):
    """A rank failed or timed out; the message contains the end of its output."""


def free_port() -> int:
    """Return a TCP port that is currently free."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def rank_environment(rank: int, world_size: int, port: int, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment that a launcher sets for one rank, for one thread on the CPU; ``more`` takes precedence."""
    own = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    return {**os.environ, **own, **(more or {})}


class _Rank(Protocol):
    """What :func:`run_distributed` needs of a rank's process."""

    def poll(self) -> int | None: ...

    def kill(self) -> None: ...

    def wait(self) -> Any: ...


@cache
def _fork_server() -> Any:
    """Start the server that forks ranks, and wait until it has imported what they import.

    It runs with one thread: OpenMP reads its setting when torch is imported.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["testkit.rank_imports"])
    saved = dict(os.environ)
    os.environ.update(rank_environment(0, 1, 0))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(saved)
    first = context.Process(target=int)
    first.start()
    first.join()
    return context


class _ForkedRank:
    """A rank that the fork server started, with the interface of ``subprocess.Popen``."""

    def __init__(self, arguments: Sequence[str], output: str, environment: Mapping[str, str]) -> None:
        self._process = _fork_server().Process(target=_run_rank, args=(list(arguments), output, dict(environment)))
        self._process.start()

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while the rank runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """Kill the rank."""
        self._process.kill()

    def wait(self) -> None:
        """Wait until the rank has ended."""
        self._process.join()


def _run_rank(arguments: list[str], output: str, environment: dict[str, str]) -> None:
    """Run the script ``arguments[0]`` in this process as ``python ARGUMENTS`` would, with stdout and stderr in ``output``."""
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing ends without them


def run_distributed(
    arguments: Sequence[str],
    world_size: int,
    *,
    timeout_s: float = 300.0,
    environment: Mapping[str, str] | None = None,
    fork: bool = False,
) -> list[str]:
    """Run ``python ARGUMENTS`` as ``world_size`` ranks and return the output (stdout and stderr) of each rank.

    Parameters
    ----------
    arguments
        Arguments of ``python``: a script or ``-m module``, then its arguments.
    world_size
        Number of ranks; each runs with one thread.
    timeout_s
        Time limit for the whole run in s.
    environment
        Additional environment variables.
    fork
        Fork the ranks from a process that has imported torch, DeepSpeed and the trainer, which saves each rank about 10 s
        of imports. Only for scripts whose memory is not measured.

    Raises
    ------
    RankError
        A rank exited with a code other than 0, or the run timed out; the other ranks are killed.
    """
    if fork:
        _fork_server()  # before the clock starts
    port, began = free_port(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        files = [(Path(folder) / f"rank{rank}").open("w+b") for rank in range(world_size)]
        ranks: list[_Rank] = []
        for rank, file in enumerate(files):
            settings = rank_environment(rank, world_size, port, environment)
            if fork:
                ranks.append(_ForkedRank(arguments, file.name, settings))
            else:
                command = [sys.executable, *arguments]
                ranks.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=settings))
        try:
            while any(rank.poll() is None for rank in ranks):
                failed = [i for i, rank in enumerate(ranks) if rank.poll() not in (None, 0)]
                if failed or time.monotonic() - began > timeout_s:
                    break
                time.sleep(0.05)
            codes = [rank.poll() for rank in ranks]
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
                rank.wait()
        outputs = [_read(file) for file in files]
    bad = [i for i, code in enumerate(codes) if code not in (None, 0)] or [i for i, c in enumerate(codes) if c is None]
    if bad:
        i = bad[0]
        how = f"timed out after {timeout_s:.0f} s" if codes[i] is None else f"exited with code {codes[i]}"
        raise RankError(f"rank {i} of {world_size} {how}:\n{outputs[i][-4000:]}")
    return outputs


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    text = file.read().decode("utf-8", "replace")
    file.close()
    return text
