"""Cost curves of a GPU step: what one rank computes, moves, stores and sends as sizes double.

    PYTHONPATH=.:kernels:data_shards python bench/train/cost_curves.py            write bench/cost_curves.csv and print the table
    PYTHONPATH=.:kernels:data_shards python bench/train/cost_curves.py --only B   one curve

Every point is a walk of the rehearsal: the real trainer, model, losses and kernels on stand-in tensors, which need no GPU. A
curve's growth is its exponent over the last doubling, log2(cost at 2x / cost at x); :data:`EXPECTED` has the range that follows
from the algorithm, and a growth outside it makes the exit status 1.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from testkit.rehearsal import walk as walking
from testkit.rehearsal.table import summary
from testkit.rehearsal.walk import Walk, train

TABLE = Path(__file__).parents[1] / "cost_curves.csv"
COLUMNS = ("gflop", "gflop_own", "moved_gb", "saved_mb", "uploads_mb", "sent_mb", "operators", "launches")
SENT = ("all_reduce_mb", "all_gather_mb", "reduce_scatter_mb", "send_mb", "other_mb")


@dataclass(frozen=True)
class Curve:
    """One size that doubles while the others are those of a config."""

    name: str
    config: str
    values: tuple[int, ...]
    override: str = ""
    """Setting that has the value; empty for ranks and tile px."""

    def walk(self, value: int) -> Walk:
        """Return the walk of one point."""
        ranks = value if self.name == "ranks" else 1
        return Walk(self.config, ranks, (f"{self.override}={value}",) if self.override else ())


CURVES = (
    Curve("B", "1gpu", (1024, 2048, 4096, 8192, 16384), "data.batch_size"),
    Curve("G", "1gpu", (256, 512, 1024, 2048), "panel.max_genes"),
    Curve("Q", "1gpu", (16, 32, 64, 128), "levels.n_levels"),
    Curve("genes", "1gpu", (2000, 4000, 8000), "genes.per_cohort"),
    Curve("tile px", "1gpu", (224, 448, 896)),
    Curve("ranks", "8xh100", (2, 4, 8, 16, 32, 64)),
)
EXPECTED = {
    # The image encoder is linear in B; the sentence table does not depend on it; the logits, B^2, are below 3 % up to 16,384.
    ("B", "gflop"): (0.9, 1.1),
    ("B", "saved_mb"): (0.9, 1.0),
    ("B", "uploads_mb"): (0.99, 1.01),
    # Large losses are computed in more chunks.
    ("B", "operators"): (0.0, 0.02),
    # The table has G Q sentences, pooling and levels B G.
    ("G", "gflop"): (0.4, 1.0),
    ("G", "saved_mb"): (0.4, 1.0),
    ("G", "operators"): (0.0, 0.0),
    ("Q", "gflop"): (0.4, 1.0),
    ("Q", "saved_mb"): (0.4, 1.0),
    ("Q", "operators"): (0.0, 0.0),
    # A step reads the panel, not all genes; the names of another panel have other lengths.
    ("genes", "gflop"): (-0.02, 0.02),
    ("genes", "saved_mb"): (-0.02, 0.02),
    # Patches grow with the square of the width, attention with its fourth power.
    ("tile px", "gflop"): (1.5, 2.5),
    ("tile px", "saved_mb"): (1.3, 2.1),
    # Spots and sentences are split over ranks; every rank reduces the gradients of the whole model.
    ("ranks", "gflop"): (-1.05, -0.9),
    ("ranks", "saved_mb"): (-1.05, -0.9),
    ("ranks", "sent_mb"): (-0.5, 0.1),
}
"""Exponent over the last doubling, (lowest, highest), by curve and cost."""


def points(curve: Curve) -> Iterator[dict[str, str]]:
    """Yield the row of every value of a curve."""
    for value in curve.values:
        px = value if curve.name == "tile px" else walking.TILE_PX
        with patch.object(walking, "TILE_PX", px):
            counts = summary(curve.walk(value), train(curve.walk(value))).counts
        sent = sum(float(counts[c]) for c in SENT)
        row = {"curve": curve.name, "value": str(value), **counts, "sent_mb": f"{sent:.2f}"}
        print(", ".join(f"{k} {row[k]}" for k in ("curve", "value", *COLUMNS)), file=sys.stderr, flush=True)
        yield {k: row[k] for k in ("curve", "value", *COLUMNS)}


def growth(rows: list[dict[str, str]], cost: str) -> float | None:
    """Return the exponent over the last doubling; None if the cost is 0."""
    before, after = (float(r[cost]) for r in rows[-2:])
    return math.log2(after / before) if before > 0 and after > 0 else None


def unexpected(curve: str, rows: list[dict[str, str]]) -> list[str]:
    """Return a line for every growth outside its expected range."""
    out = []
    for (name, cost), (low, high) in EXPECTED.items():
        if name != curve:
            continue
        found = growth(rows, cost)
        if found is None or not low <= round(found, 3) <= high:
            out.append(f"{cost} against {curve}: exponent {found}, expected {low} to {high}")
    return out


def read_table() -> dict[str, list[dict[str, str]]]:
    """Return the committed rows by curve."""
    out: dict[str, list[dict[str, str]]] = {}
    with TABLE.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            out.setdefault(row["curve"], []).append(row)
    return out


def write_table(tables: dict[str, list[dict[str, str]]]) -> None:
    """Write the rows of all curves, in the order of :data:`CURVES`."""
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ("curve", "value", *COLUMNS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for curve in CURVES for row in tables.get(curve.name, ()))


def markdown(tables: dict[str, list[dict[str, str]]]) -> str:
    """Return first and last value, their costs and the growth of every curve as a Markdown table."""
    shown = ("gflop", "moved_gb", "saved_mb", "sent_mb", "operators")
    lines = ["| size | from, to | " + " | ".join(shown) + " |", "|---" * (len(shown) + 2) + "|"]
    for name, rows in tables.items():
        cells = []
        for cost in shown:
            exponent = growth(rows, cost)
            ends = f"{float(rows[0][cost]):,.0f}, {float(rows[-1][cost]):,.0f}"
            cells.append(f"{ends} ({exponent + 0.0:.2f})" if exponent is not None else "0")
        lines.append(f"| {name} | {rows[0]['value']}, {rows[-1]['value']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[c.name for c in CURVES], help="curves to count (default: all)")
    args = parser.parse_args()
    tables = read_table() if TABLE.exists() else {}
    for curve in CURVES:
        if args.only is None or curve.name in args.only:
            tables[curve.name] = list(points(curve))
            write_table(tables)
    print(markdown(tables))
    wrong = [line for name, rows in tables.items() for line in unexpected(name, rows)]
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
