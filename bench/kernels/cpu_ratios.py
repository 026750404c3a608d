"""Regression check of the CPU paths: the time of each relative to a peer, compared with ``bench/cpu_ratios.csv``.

    PYTHONPATH=bench/kernels python bench/kernels/cpu_ratios.py [--check]

Both are timed alternately on one thread, forward and backward, at the small sizes of ``make bench``. The ratio is that of their
fastest rounds, because another process can only make a round slower. It is measured by the wall clock, which includes waiting,
and by CPU time, which depends little on the load of the machine; the larger ratio counts. ``--check`` fails if it is above
``MARGIN`` times the committed one after ``MOST`` rounds. A ratio within the margin passes immediately, so noise costs time but
causes no failure.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

TABLE = Path(__file__).parents[1] / "cpu_ratios.csv"
COLUMNS = ("op", "peer", "ratio")
PEERS = {
    "infonce": ("ours", "open_clip's loss"),
    "gene_sentence_embedding": ("ours", "embedding_bag + LayerNorm"),
    "copy_sentence_rows": ("ours", "embedding"),
    "packed_attention": ("ours", "padded"),
    "packed_attention (unsorted)": ("ours", "padded"),
    "one_query_attention": ("ours", "padded"),
    "table_pool": ("cpu", "embedding_bag"),
    "level_cross_entropy": ("cpu", "dense"),
    "pair_scores": ("cpu", "dense"),
}
"""{operation: names of our path and of its peer in ``test_cpu.GROUPS``}."""
MARGIN = 2.0
"""Maximum factor above the committed ratio: far above the noise of fastest rounds, and below a slowdown by 3."""
CLOCKS = (time.perf_counter, time.thread_time)
LEAST, MOST = 5, 60
"""Number of rounds after which a ratio may pass, and after which it fails."""


def fastest_ratio(
    ours: Callable[[], object], peer: Callable[[], object], limit: float, *, least: int = LEAST, most: int = MOST
) -> float:
    """Return the time of the fastest round of ``ours`` relative to that of ``peer``, the larger over both clocks.

    Runs at most ``most`` rounds, and stops after ``least`` or more when the ratio is at most ``limit``.
    """
    best = {clock: [float("inf"), float("inf")] for clock in CLOCKS}
    for call in (ours, peer):
        call()  # fills memory and caches
    ratio = float("inf")
    for done in range(1, most + 1):
        for i, call in enumerate((ours, peer)):
            began = {clock: clock() for clock in CLOCKS}
            call()
            for clock, start in began.items():
                best[clock][i] = min(best[clock][i], clock() - start)
        ratio = max(own / other for own, other in best.values())
        if done >= least and ratio <= limit:
            break
    return ratio


def measure(
    groups: Mapping[str, Callable[[], Mapping[str, Callable[[], object]]]], limits: Mapping[str, float]
) -> dict[str, float]:
    """Return {operation: ratio}; an operation in ``limits`` is measured only until its limit is met."""
    out = {}
    for op, (own, peer) in PEERS.items():
        calls = groups[op]()
        out[op] = fastest_ratio(calls[own], calls[peer], limits.get(op, 0.0))
        print(f"{op:<28}{out[op]:>6.2f} x {peer}, at most {limits.get(op, float('inf')):.2f}", flush=True)
    return out


def read(path: Path = TABLE) -> dict[str, float]:
    """Return {operation: committed ratio}."""
    with path.open(newline="", encoding="utf-8") as file:
        return {row["op"]: float(row["ratio"]) for row in csv.DictReader(file)}


def problems(ratios: Mapping[str, float], committed: Mapping[str, float]) -> list[str]:
    """Return a message for each operation that the table lacks, or whose ratio is above ``MARGIN`` times the committed one."""
    out = [f"{op}: not in {TABLE.name}; run python bench/kernels/cpu_ratios.py" for op in ratios if op not in committed]
    for op, ratio in ratios.items():
        if op in committed and ratio > MARGIN * committed[op]:
            peer = PEERS[op][1]
            out.append(
                f"{op}: the CPU path takes {ratio:.2f} x the time of {peer}, the table has {committed[op]:.2f}; make the CPU path "
                "faster, or run python bench/kernels/cpu_ratios.py if it has to be slower"
            )
    return out


def main() -> int:
    """Measure, and write the table or, with ``--check``, compare with it; return 1 if :func:`problems` finds any."""
    import torch
    from test_cpu import GROUPS  # builds inputs when it is imported

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the table and do not write it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.check:
        ratios = measure(GROUPS, {})
        with TABLE.open("w", newline="", encoding="utf-8") as file:
            out = csv.writer(file, lineterminator="\n")
            out.writerow(COLUMNS)
            out.writerows((op, PEERS[op][1], f"{ratio:.2f}") for op, ratio in ratios.items())
        return 0
    committed = read()
    wrong = problems(measure(GROUPS, {op: MARGIN * ratio for op, ratio in committed.items()}), committed)
    for problem in wrong:
        print(f"WORSE  {problem}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
