"""Time of the CPU paths of the kernels at two commits, in paired and interleaved rounds.

    git worktree add ../before COMMIT
    PYTHONPATH=.:kernels:data_shards:bench/kernels python bench/kernels/paired.py --before ../before [--rounds 20] [--seconds 0.3]

The cases are those of ``make bench`` that are ours, forward and backward, on one thread. Both checkouts run in the same environment,
each in a process of its own; a round times a block of calls of every case in both, in alternating order
(:mod:`bench.train.paired_steps`). The last lines have the median ratio of CPU time, after / before, and its interval of 95 %.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

OURS = ("ours", "cpu")
"""Names of our paths among the cases of an operation."""


def cases() -> dict[str, object]:
    """Return the calls of our paths in the checkout of the working folder, by operation and name."""
    from test_cpu import GROUPS

    every = {f"{op} ({name})": call for op, make in GROUPS.items() for name, call in make().items() if name in OURS}
    return dict(sorted(every.items()))


def worker(seconds: float) -> None:
    """For each line of the standard input, print the CPU time of a block of calls of every case, in s."""
    import torch

    torch.set_num_threads(1)
    blocks = {}
    for name, call in cases().items():
        call()
        began = time.process_time()
        call()
        blocks[name] = (call, max(1, round(seconds / max(time.process_time() - began, 1e-6))))
    print("ready", flush=True)
    for _ in sys.stdin:
        times = []
        for call, n in blocks.values():
            call()  # fills caches
            began = time.process_time()
            for _ in range(n):
                call()
            times.append((time.process_time() - began) / n)
        print(*times, flush=True)


def main() -> None:
    """Run the rounds and print each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout of the earlier commit")
    parser.add_argument("--after", type=Path, default=Path(), help="checkout of the later commit (default: here)")
    parser.add_argument("--rounds", type=int, default=20, help="paired rounds (default 20)")
    parser.add_argument("--seconds", type=float, default=0.3, help="length of a block of one case (default 0.3)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.seconds)
        return
    if args.before is None:
        parser.error("--before is missing: a checkout of the earlier commit")
    from bench.train.paired_steps import Checkout, compare

    command = [str(Path(__file__).resolve()), "--worker", f"--seconds={args.seconds}"]
    before, after = Checkout(args.before.resolve(), command), Checkout(args.after.resolve(), command)
    compare(before, after, list(cases()), args.rounds)


if __name__ == "__main__":
    main()
