"""Rounds of several contenders, one after the other and again, so that a slow minute of the machine hits all alike."""

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
    """Something that hands over batches."""

    name: str
    batches: Generator[int, None, None]
    """Endless; each item is a batch's number of spots."""
    bytes_per_spot: float
    """Read from storage."""
    spots_per_s: list[float] = field(default_factory=list)
    """One figure per round."""
    cpu_ms: list[float] = field(default_factory=list)
    """CPU milliseconds per spot, of this process and its workers, one figure per round."""

    @property
    def median(self) -> float:
        """DecodedSpots per second."""
        return median(self.spots_per_s)


def run_rounds(contenders: list[Contender], *, rounds: int, spots: int, warm: int) -> None:
    """Measure all, ``rounds`` times.

    Parameters
    ----------
    contenders
        What is measured; results are appended to each.
    rounds
        How often.
    spots
        DecodedSpots per round, at least.
    warm
        Batches taken before the clock starts in each round: what was made ahead while others ran.
    """
    for _ in range(rounds):
        for c in contenders:
            for _ in range(warm):
                next(c.batches)
            began, cpu, done = time.perf_counter(), cpu_seconds(), 0
            while done < spots:
                done += next(c.batches)
            took = time.perf_counter() - began
            c.spots_per_s.append(done / took)
            c.cpu_ms.append(1e3 * (cpu_seconds() - cpu) / done)


def cpu_seconds() -> float:
    """Return the CPU time of this process and its living workers."""
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
    """Return the resident memory of this process and its living workers in MB; shared pages count in each."""
    pids = [os.getpid(), *(c.pid for c in active_children())]
    pages = 0
    for pid in pids:
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:
            continue
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def give_back_free_memory() -> None:
    """Let glibc return its free blocks, so that resident memory is what is held and not holes between it."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def describe_machine(cores: int) -> str:
    """Return CPU, cores, versions and commit in one line."""
    parts = [_cpu_name(), f"{cores} cores used", f"Python {platform.python_version()}"]
    parts += [f"{name} {found}" for name in (*PACKAGES, *DALI) if (found := _version(name))]
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
