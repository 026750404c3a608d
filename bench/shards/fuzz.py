"""Fuzz the shard reader: ``PYTHONPATH=.:data_shards python bench/shards/fuzz.py --n 10000 --seed 0``.

Half of the mutations are damage (files change, hashes do not), half are forgeries (every hash is updated to match). Fuzzing
stops at the first crash (any exception but ShardError), hang (a mutation that takes longer than --limit seconds),
wrong data without an error, or damage that ``verify`` misses, and prints the seed and number that reproduce it. Memory is
limited to --memory-gb.
"""

from __future__ import annotations

import argparse
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
from comtip_shards.builder.build import build_shards
from comtip_shards.sources import open_source
from tqdm import tqdm

from testkit.fuzz import Fuzzer
from testkit.tiny import TinySection, write_tiny_source


def hang(*_: object) -> None:
    """Raise the error of a mutation that takes too long."""
    raise TimeoutError("a read or verify did not return within --limit seconds")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=10_000, help="number of mutations (default 10000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the mutations (default 0)")
    parser.add_argument("--limit", type=int, default=60, help="time limit of one mutation in seconds (default 60)")
    parser.add_argument("--memory-gb", type=float, default=8.0, help="limit of the address space in GiB (default 8.0)")
    args = parser.parse_args()
    size = int(args.memory_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    signal.signal(signal.SIGALRM, hang)
    counts: Counter[str] = Counter()
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_source(
            Path(folder) / "source", [TinySection("a", "d", "train"), TinySection("b", "e", "val")], side=2
        )
        build_shards(
            open_source(Path(folder) / "source"),
            Path(folder) / "set",
            tile_px=16,
            tile_um=224.0,
            min_mpp=4.0,
            max_records=3,
        )
        fuzzer = Fuzzer(Path(folder) / "set", Path(folder) / "work")
        for number in tqdm(range(args.n), mininterval=20):
            forge = number % 2 == 1
            signal.alarm(args.limit)
            try:
                outcome = fuzzer.run(np.random.default_rng([args.seed, number]), forge=forge)
            except Exception:
                print(f"seed {args.seed}, mutation {number}:\n{traceback.format_exc()}")
                return 1
            signal.alarm(0)
            missed = not forge and not outcome.harmless and not outcome.found
            if outcome.wrong or missed:
                print(f"seed {args.seed}, mutation {number}: {outcome}")
                return 1
            kind = "forged" if forge else "harmless" if outcome.harmless else "damaged"
            counts[kind] += 1
            counts[f"{kind}, found"] += outcome.found
            counts["reads refused"] += outcome.refused
    print(
        f"{args.n} mutations, seed {args.seed}, {time.time() - began:.0f} s: no crash, no hang, no wrong data, no undetected damage"
    )
    print(", ".join(f"{k}: {v}" for k, v in sorted(counts.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
