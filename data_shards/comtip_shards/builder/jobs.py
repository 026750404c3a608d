"""Run a function on many inputs in one or several processes, with ordered results and a clear error if a process dies."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pickle import PicklingError
from typing import Any, TypeVar

from comtip_shards.errors import ShardError
from comtip_shards.progress import Progress

T = TypeVar("T")
_watching = False


def run_jobs(
    function: Callable[..., T],
    arguments: Sequence[tuple[Any, ...]],
    *,
    jobs: int = 1,
    label: str,
    unit: str = "section",
    progress: bool = False,
) -> list[T]:
    """Call ``function(*a)`` for each ``a`` and return the results in the order of ``arguments``.

    Parameters
    ----------
    function, arguments
        The function and the arguments of each call; closures are supported.
    jobs
        Number of worker processes, which are spawned, not forked; 1 runs in this process.
    label, unit, progress
        Settings of the progress bar on a terminal, or of the lines in the log without one.

    Raises
    ------
    ShardError
        A worker process was killed, possibly because memory ran out, or an argument cannot be pickled. Exceptions of
        ``function`` are raised unchanged.
    """
    with Progress(label, len(arguments), unit=unit, show=progress) as bar:
        if jobs <= 1 or len(arguments) <= 1:
            results = []
            for a in arguments:
                results.append(function(*a))
                bar.update()
            return results
        return _in_processes(function, arguments, jobs, bar)


def _in_processes(
    function: Callable[..., T], arguments: Sequence[tuple[Any, ...]], jobs: int, bar: Progress
) -> list[T]:
    from joblib import Parallel, delayed

    # loky replaces a worker whose memory has grown by 300 MB, as it does when reading large images, and warns as if it failed.
    # The filter is never removed, because a thread of the pool may warn at any time.
    warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given", category=UserWarning)
    results: dict[int, T] = {}
    calls = (delayed(_call)(os.getpid(), number, function, a) for number, a in enumerate(arguments))
    pool = Parallel(n_jobs=min(jobs, len(arguments)), backend="loky", batch_size=1, return_as="generator_unordered")
    try:
        for number, result in pool(calls):
            results[number] = result
            bar.update()
    except BrokenProcessPool as error:
        raise ShardError(
            "a worker process was killed, possibly because memory ran out; run the same command again with a smaller `jobs`: staged "
            "sections are kept"
        ) from error
    except PicklingError as error:
        raise ShardError(f"a section cannot be sent to another process ({error}); set `jobs` to 1") from error
    return [results[i] for i in range(len(arguments))]


def _call(parent: int, number: int, function: Callable[..., T], arguments: tuple[Any, ...]) -> tuple[int, T]:
    _end_with(parent)
    return number, function(*arguments)


def _end_with(parent: int) -> None:
    """End this worker soon after its parent has ended; a killed parent cannot notify its workers."""
    global _watching
    if _watching:
        return
    _watching = True

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
