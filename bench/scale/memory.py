"""Memory and seconds of a block of code in this process, from ``/proc``; used by the scripts of this folder."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MB = 1e6


def status(key: str) -> float:
    """Return the value of ``key`` in ``/proc/self/status``, in MB."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{key}:")) * 1024 / MB


@contextmanager
def measured(row: dict[str, float]) -> Iterator[None]:
    """Add the seconds of the block, its CPU seconds, and its resident memory in MB to ``row``.

    ``before`` is the memory at the start, ``added`` the highest one minus that, from ``VmHWM``, which includes pages of files that
    are read; ``anonymous`` leaves these out, and is sampled every 5 ms.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts again
    row["before"], anonymous, ended = status("VmRSS"), status("RssAnon"), threading.Event()
    highest = [anonymous]

    def sample() -> None:
        while not ended.wait(0.005):
            highest[0] = max(highest[0], status("RssAnon"))

    thread = threading.Thread(target=sample)
    thread.start()
    began, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        row["seconds"], row["cpu"] = time.perf_counter() - began, time.process_time() - cpu
        ended.set()
        thread.join()
        row["added"], row["anonymous"] = status("VmHWM") - row["before"], highest[0] - anonymous
