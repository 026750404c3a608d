"""Spread of totals and share of spots without a 1 in raw, down-sampled and scaled counts of real sections.

``PYTHONPATH=.:kernels:data_shards python bench/shards/scaled_counts.py data_shards/samples`` prints the table of
:mod:`comtip_shards.sections.scaled_counts`: the range of both figures over the sections of a source, and how many sections are refused.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from comtip_shards.sections.scaled_counts import scaled_total, share_without_ones, spread, totals_of
from comtip_shards.sources import open_source
from scipy import sparse


def changed(counts: sparse.csr_matrix) -> Iterator[tuple[str, sparse.csr_matrix]]:
    """Yield (name, counts) of the raw, the down-sampled and the scaled counts of a section."""
    totals = totals_of(counts)
    yield "raw", counts
    least = int(np.percentile(totals[totals > 0], 10))
    rng, down = np.random.default_rng(0), counts[np.flatnonzero(totals >= least)].astype(np.int64)
    for start, end in zip(down.indptr[:-1], down.indptr[1:], strict=True):
        down.data[start:end] = rng.multivariate_hypergeometric(down.data[start:end], least)
    yield "down-sampled to the 10th percentile", down
    for name, total in (("10,000", 1e4), ("the median", float(np.median(totals[totals > 0]))), ("1,000,000", 1e6)):
        scaled = sparse.csr_matrix(counts.multiply((total / np.maximum(totals, 1))[:, None]))
        scaled.data = np.rint(scaled.data)
        yield f"scaled to {name}, rounded", scaled


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="source of sections with raw counts")
    args = parser.parse_args()
    found: defaultdict[str, list[tuple[float, float, bool]]] = defaultdict(list)
    medians = []
    for source in open_source(args.source):
        counts = sparse.csr_matrix(source.read().counts)
        totals = totals_of(counts)
        medians.append(float(np.median(totals[totals > 0])))
        for name, matrix in changed(counts):
            matrix.eliminate_zeros()
            found[name].append(
                (spread(totals_of(matrix)), share_without_ones(matrix), scaled_total(matrix) is not None)
            )
    print(f"{len(medians)} sections, medians of {min(medians):,.0f} to {max(medians):,.0f} counts")
    print("| counts | spread of totals | share of spots without 1 | refused |\n|---|---|---|---|")
    for name, rows in found.items():
        spreads, shares, refused = zip(*rows, strict=True)
        ranges = [f"{min(values):.4f} to {max(values):.4f}" for values in (spreads, shares)]
        print(f"| {name} | {' | '.join(ranges)} | {sum(refused)} / {len(refused)} |")


if __name__ == "__main__":
    main()
