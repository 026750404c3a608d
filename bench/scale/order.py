"""Seconds, memory and sequential reads of an epoch's order, on synthetic sets of up to 100 M spots (no tiles are needed).

``PYTHONPATH=.:kernels:data_shards python bench/scale/order.py [NAME ...]`` prints one row per set, each in a process of its own.
Compare two commits by running it in both checkouts on the same machine.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np

from comtip_fast.config.schema import DataConfig
from comtip_fast.data.loaders.schedule import EpochSchedule

SETS = {"hest": (1_500_000, 1_100), "m5": (5_000_000, 1_500), "m20": (20_000_000, 3_000), "m100": (100_000_000, 5_000)}
"""Number of spots and of sections of each set."""
WORLD = 64


def synthetic(n_spots: int, n_sections: int, **settings: Any) -> EpochSchedule:
    """Return the schedule of a set whose sections have log-normal sizes, on two platforms."""
    share = np.random.default_rng(0).lognormal(0, 1, n_sections)
    edges = np.concatenate([[0], np.round(np.cumsum(share) / share.sum() * n_spots)]).astype(np.int64)
    sections = [SimpleNamespace(first_spot=int(f), platform=f"p{i % 5 // 4}") for i, f in enumerate(edges[:-1])]
    shards: Any = SimpleNamespace(manifest=SimpleNamespace(sections=sections))
    config = DataConfig(**{"batch_size": 65_536, "sections_per_batch": 64} | settings)
    return EpochSchedule(shards, np.arange(n_spots), config, seed=0)


def reads_per_rank_step(batches: list[np.ndarray]) -> float:
    """Return the mean number of sequential reads of one rank in one step."""
    shares = [part for batch in batches[:8] for part in np.array_split(batch, WORLD)]
    return float(np.mean([1 + (np.diff(np.unique(s)) != 1).sum() for s in shares]))


def measure(name: str) -> str:
    """Return the table row of one set."""
    n_spots, n_sections = SETS[name]
    schedule = synthetic(n_spots, n_sections, run=64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    batches = schedule.batches(0)
    seconds = time.perf_counter() - began
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    reads = [reads_per_rank_step(batches)]
    if n_spots <= 20_000_000:
        reads += [
            reads_per_rank_step(synthetic(n_spots, n_sections, run=r, balance="platform").batches(0)) for r in (64, 1)
        ]
    cells = [f"{r:.0f}" for r in reads] + ["-"] * (3 - len(reads))
    return f"| {name} | {n_spots:,} | {n_sections:,} | {seconds:.1f} | {added:.1f} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"sets, of {', '.join(SETS)} (default: all)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(measure(args.one))
        return
    print(
        "| set | spots | sections | order, s | added peak, GiB | reads per rank-step, run 64 | balanced, run 64 | run 1 |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in args.names or SETS:
        subprocess.run([sys.executable, __file__, "--one", name], check=True)


if __name__ == "__main__":
    main()
