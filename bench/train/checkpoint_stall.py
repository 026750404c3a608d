"""Measure how long a checkpoint blocks a step if it is written synchronously, or copied and then written asynchronously.

    python bench/train/checkpoint_stall.py --mib 256 --rounds 5

The checkpoint holds weights and two moments, ``--mib`` in total. Both ways alternate, and the writer thread is joined
between rounds, as it would be during the steps in between. The script prints the median of each and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from comtip_fast.training.checkpoint import store as checkpoints
from comtip_fast.training.checkpoint.async_writer import Writer, copied
from comtip_fast.training.checkpoint.store import Checkpoint


def measure(mib: float, rounds: int, folder: Path) -> tuple[list[float], list[float]]:
    """Return the seconds per round: synchronous, asynchronous."""
    rows = int(mib * 2**20 / 4 / 3 / 1024 / 16)
    checkpoint = Checkpoint(
        {f"w{i}": torch.randn(rows, 1024) for i in range(16)},
        {f"w{i}/{k}": torch.randn(rows, 1024) for i in range(16) for k in ("exp_avg", "exp_avg_sq")},
        {"step": 1},
    )
    writer = Writer()
    blocking, asynchronous = [], []

    def submit() -> None:
        taken = copied(checkpoint)
        writer.submit(lambda: _none(checkpoints.save(folder, 2, taken)))

    for _ in range(rounds + 1):
        blocking.append(_seconds(lambda: _none(checkpoints.save(folder, 1, checkpoint))))
        asynchronous.append(_seconds(submit))
        writer.drain()
    return blocking[1:], asynchronous[1:]  # the first round warms up the allocator and the disk cache


def _none(_: object) -> None: ...


def _seconds(act: Callable[[], None]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, default=256, help="size of the checkpoint in MiB (default 256)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the median is printed (default 5)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        blocking, asynchronous = measure(args.mib, args.rounds, Path(name))
    a, b = statistics.median(blocking), statistics.median(asynchronous)
    ratios = [x / y for x, y in zip(blocking, asynchronous, strict=True)]
    print(f"{args.mib:g} MiB: synchronous {a:.2f} s, asynchronous {b:.2f} s per step; ratio {a / b:.1f}")
    print(f"ratio per round: {min(ratios):.1f} to {max(ratios):.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
