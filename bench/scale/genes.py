"""Genes that pass ``genes.min_detection`` against the number of sections, for every rule of ``genes.detected_in``, on synthetic sections.

``PYTHONPATH=.:kernels:data_shards python bench/scale/genes.py`` draws sections of 1,300 spots whose depth varies by a factor of about
two (log-normal, sigma 0.35) and prints one row per number of sections. *any, also with a shallow one* adds a section at 5 % of the depth.
"""

from __future__ import annotations

import argparse

import numpy as np
from comtip_shards.format.statistics import SectionStatistics

from comtip_fast.data.expression.panel import CohortStatistics

RULES = ("every", "pooled", "any")


def section(rng: np.random.Generator, rate: np.ndarray, n_spots: int) -> SectionStatistics:
    """Return the statistics of spots in which each gene is detected with its true rate."""
    detected = rng.binomial(n_spots, np.clip(rate, 0, 1))
    return SectionStatistics(n_spots, detected, detected * 1.5, detected * 2.5)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--genes", type=int, default=20_000, help="measured genes (default 20000)")
    parser.add_argument("--spots", type=int, default=1_300, help="spots per section (default 1300)")
    parser.add_argument("--detection", type=float, default=0.1, help="genes.min_detection (default 0.1)")
    parser.add_argument(
        "--sections", type=int, nargs="+", default=[1, 10, 100, 200, 1000], help="numbers (default 1 10 100 200 1000)"
    )
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    rate, rows = rng.beta(0.4, 2.0, args.genes), np.arange(args.genes)
    merged, added = CohortStatistics.of([], args.genes), 0
    print("| sections | every | pooled | any | any, also with a shallow one |\n|---|---|---|---|---|")
    for n in sorted(args.sections):
        for _ in range(n - added):
            merged.add(rows, section(rng, rate * rng.lognormal(0, 0.35), args.spots))
        added = n
        found = [merged.ranked(args.detection, rule)[0].size for rule in RULES]
        shallow = CohortStatistics(*(array.copy() for array in vars(merged).values()))
        shallow.add(rows, section(np.random.default_rng(1), rate * 0.05, args.spots))
        print(f"| {n:,} | {' | '.join(f'{k:,}' for k in [*found, shallow.ranked(args.detection, 'any')[0].size])} |")


if __name__ == "__main__":
    main()
