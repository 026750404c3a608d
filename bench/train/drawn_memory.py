"""Memory of real steps on a CPU as the batch doubles, and the bytes that autograd saves.

    PYTHONPATH=.:kernels:data_shards python bench/train/drawn_memory.py --shards runs/bench_step/shards_128px

``bench/train/cost_curves.py`` counts the saved bytes of steps of up to 16,384 spots on stand-ins; here the steps really run, with
the sizes of the demo and its largest panel (256 genes, 10 levels, pixels instead of a frozen stem). Every batch size has a process
of its own, which trains two steps on one batch: of the first, the bytes saved for the backward pass are counted, of the second, the
peak of PyTorch's allocations and the growth of the process's peak memory. ``comtip bench step`` builds the shard set.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "bench" / "drawn_memory.csv"
SIZES = (128, 256, 512, 1024)
COLUMNS = ("spots", "saved_mb", "peak_mb", "process_mb")


def measure(shards: Path, spots: int) -> dict[str, float]:
    """Train two steps of ``spots`` spots in this process, and return MB: saved, peak of the allocations, growth of the process."""
    import numpy as np
    import torch
    from comtip_shards import ShardSet

    from comtip_fast.benchmarks.step.contender import Ours
    from comtip_fast.benchmarks.step.measure import peak_mb
    from comtip_fast.benchmarks.step.run import config_of
    from comtip_fast.training.task import build_task
    from testkit.rehearsal.costs import count_saved
    from testkit.rehearsal.record import Record

    overrides = [f"data.batch_size={spots}", "train.threads=2"]
    config = config_of(ROOT / "configs" / "demo_cpu.yaml", overrides, ShardSet(shards), "cpu")
    task = build_task(config, torch.device("cpu"))
    step, record = Ours(task), Record()
    try:
        # Spots of all sections, so that every batch has the same panel.
        every = task.tables.spots
        batch = task.batch(every[np.linspace(0, every.size - 1, spots).astype(int)], 1, 0)
        with count_saved(record, device="cpu"):
            step.train(batch)
        before = resident_mb()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        peak = peak_mb(step, batch)
        return {
            "spots": spots,
            "saved_mb": record.saved_bytes / 1e6,
            "peak_mb": peak,
            "process_mb": resident_mb("VmHWM") - before,
        }
    finally:
        step.close()


def resident_mb(field: str = "VmRSS") -> float:
    """Return the resident memory of this process in MB, or with ``VmHWM`` its peak."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def growth(rows: list[dict[str, str]], column: str) -> float:
    """Return the exponent of a column over the last doubling of the batch."""
    return math.log2(float(rows[-1][column]) / float(rows[-2][column]))


def read_table() -> list[dict[str, str]]:
    """Return the committed rows."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def main() -> int:
    """Measure every size in a process of its own, write the table and print it as Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", type=Path, required=True, help="shard set of tiles of 128 px")
    parser.add_argument("--one", type=int, help="measure one size in this process and print it as JSON")
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measure(args.shards, args.one)))
        return 0
    rows: list[dict[str, str]] = []
    for spots in SIZES:
        words = [sys.executable, __file__, "--shards", str(args.shards), "--one", str(spots)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append({name: f"{found[name]:.0f}" for name in COLUMNS})
        print(rows[-1], file=sys.stderr, flush=True)
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(
        "| spots B | MB saved for backward | peak of allocations, MB | growth of the process, MB |\n|---:|---:|---:|---:|"
    )
    for row in rows:
        print("| " + " | ".join(f"{int(row[name]):,}" for name in COLUMNS) + " |")
    print("exponents over the last doubling: " + ", ".join(f"{growth(rows, c):.2f}" for c in COLUMNS[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
