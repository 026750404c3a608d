"""How long a step stands still for a checkpoint: written within the step against copied in it and written beside.

    python bench/train/checkpoint_stall.py --mib 256 --rounds 5

Weights and two moments of so many MiB in all, both ways in turns; the thread is waited for between rounds, as steps in between
would do. Printed is the median of each and their ratio.
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
    """Return the seconds of both ways, per round: within the step, beside it."""
    rows = int(mib * 2**20 / 4 / 3 / 1024 / 16)
    made = Checkpoint(
        {f"w{i}": torch.randn(rows, 1024) for i in range(16)},
        {f"w{i}/{k}": torch.randn(rows, 1024) for i in range(16) for k in ("exp_avg", "exp_avg_sq")},
        {"step": 1},
    )
    writer = Writer()
    within, beside = [], []

    def submit() -> None:
        taken = copied(made)
        writer.submit(lambda: _none(checkpoints.save(folder, 2, taken)))

    for _ in range(rounds + 1):
        within.append(_seconds(lambda: _none(checkpoints.save(folder, 1, made))))
        beside.append(_seconds(submit))
        writer.drain()
    return within[1:], beside[1:]  # the first warms the allocator and the disk's cache


def _none(_: object) -> None: ...


def _seconds(act: Callable[[], None]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        within, beside = measure(args.mib, args.rounds, Path(name))
    a, b = statistics.median(within), statistics.median(beside)
    ratios = [x / y for x, y in zip(within, beside, strict=True)]
    print(f"{args.mib:g} MiB: within the step {a:.2f} s, beside it {b:.2f} s; stands still {a / b:.1f} times less long")
    print(f"ratio per round: {min(ratios):.1f} to {max(ratios):.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
