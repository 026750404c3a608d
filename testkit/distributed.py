"""Launch a command as several local ranks, as ``torchrun`` does, and stop all of them when one fails."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO


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


def run_distributed(
    arguments: Sequence[str], world_size: int, *, timeout_s: float = 300.0, environment: Mapping[str, str] | None = None
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

    Raises
    ------
    RankError
        A rank exited with a code other than 0, or the run timed out; the other ranks are killed.
    """
    port, began = free_port(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        files = [(Path(folder) / f"rank{rank}").open("w+b") for rank in range(world_size)]
        ranks = [
            subprocess.Popen(
                [sys.executable, *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=rank_environment(rank, world_size, port, environment),
            )
            for rank, file in enumerate(files)
        ]
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
