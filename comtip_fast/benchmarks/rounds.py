"""Measure several loaders or decoders (contenders) in interleaved rounds, so that a slow period of the machine affects all of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import subprocess
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import active_children
from pathlib import Path
from statistics import median

PACKAGES = ("torch", "pillow", "webdataset", "h5py", "numpy")
DALI = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")


@dataclass
class Contender:
    """A loader or decoder to be measured, and its results."""

    name: str
    batches: Generator[int, None, None]
    """Infinite; yields the number of spots of each batch."""
    bytes_per_spot: float
    """Bytes read from storage per spot."""
    spots_per_s: list[float] = field(default_factory=list)
    """One value per round."""
    cpu_ms: list[float] = field(default_factory=list)
    """CPU milliseconds per spot, of this process and its workers; one value per round."""

    @property
    def median(self) -> float:
        """Median spots per second over the rounds."""
        return median(self.spots_per_s)


def run_rounds(contenders: list[Contender], *, rounds: int, spots: int, warm: int) -> None:
    """Measure all contenders ``rounds`` times.

    Parameters
    ----------
    contenders
        The loaders and decoders; results are appended to each.
    rounds
        Number of rounds.
    spots
        Minimum number of spots per round and loader or decoder.
    warm
        Batches discarded at the start of each round, which were prefetched while the others ran.
    """
    for _ in range(rounds):
        for c in contenders:
            for _ in range(warm):
                next(c.batches)
            start, cpu, done = time.perf_counter(), cpu_seconds(), 0
            while done < spots:
                done += next(c.batches)
            elapsed = time.perf_counter() - start
            c.spots_per_s.append(done / elapsed)
            c.cpu_ms.append(1e3 * (cpu_seconds() - cpu) / done)


def cpu_seconds() -> float:
    """Return the CPU time of this process and its running workers."""
    ticks = os.sysconf("SC_CLK_TCK")
    total = time.process_time()
    for child in active_children():
        try:
            fields = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        total += (int(fields[11]) + int(fields[12])) / ticks
    return total


def resident_mb() -> float:
    """Return the resident memory of this process and its running workers in MB; shared pages are counted in each."""
    pids = [os.getpid(), *(c.pid for c in active_children())]
    pages = 0
    for pid in pids:
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:
            continue
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def trim_free_memory() -> None:
    """Make glibc return free blocks to the system, so that resident memory excludes them."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def describe_machine(cores: int) -> str:
    """Return CPU, number of cores, versions of Python and of installed packages, and commit in one line."""
    parts = [_cpu_name(), f"{cores} cores used", f"Python {platform.python_version()}"]
    parts += [f"{name} {installed}" for name in (*PACKAGES, *DALI) if (installed := _version(name))]
    return "; ".join([*parts, f"commit {_commit()}"])


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
