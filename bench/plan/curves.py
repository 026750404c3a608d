"""Cost of a step against each size, per device: counted FLOPs, memory of tensors and bytes sent. Nothing is timed.

    PYTHONPATH=.:kernels:data_shards python bench/plan/curves.py [--config configs/8xh100.yaml]

Figures are those of ``comtip plan``, whose formulas tests compare with counted values. A cost is a constant and terms in the size;
differences between values drop the constant. Values grow by one factor, so the order of a cost is the exponent k by which its last
difference exceeds the one before, ``factor ** k``: 1 is linear, 2 quadratic, -1 falls as 1 / size. ``Axis.orders`` are the orders
that follow from the formulas; the command fails outside them, for example because a B x B matrix is kept. Prints the table of
docs/performance.md.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from comtip_fast.config.io import load_config
from comtip_fast.plan.hardware import make_cluster
from comtip_fast.plan.plan import Plan, make_plan
from comtip_fast.plan.sizes import Inputs

ROOT = Path(__file__).parents[2]
Range = tuple[float, float] | None
TOLERANCE = 0.03


@dataclass(frozen=True)
class Axis:
    """One size, its values (the last three grow by one factor), and the expected order of each cost."""

    name: str
    values: tuple[int, ...]
    plan_of: Callable[[Path, int], Plan]
    orders: tuple[Range, Range, Range]
    """Lowest and highest expected order of FLOPs, memory and bytes sent; None if the cost does not depend on the size."""
    why: str


def _with(*settings: str, ranks: int = 8, **inputs: int) -> Callable[[Path, int], Plan]:
    """Return a plan of the config with ``{}`` in settings, and inputs of value -1, replaced by the size."""

    def plan_of(path: Path, value: int) -> Plan:
        config = load_config(path, [s.format(value) for s in settings])
        cluster = make_cluster(
            "h100", per_node=min(8, value if ranks < 0 else ranks), nodes=max(1, value // 8 if ranks < 0 else 1)
        )
        own = {"tile_px": 224, "panel": 512, "trained_genes": 4096} | dict.fromkeys(inputs, value)
        return make_plan(config, cluster, Inputs(**own))

    return plan_of


BATCH = "data.batch_size=4096"
LINEAR, SQUARE, INVERSE = (1.0, 1.0), (2.0, 2.0), (-1.0, -1.0)
AXES = (
    Axis(
        "B, spots",
        (1024, 4096, 16384, 65536),
        _with("data.batch_size={}"),
        ((1.0, 1.1), LINEAR, LINEAR),
        "images linear, products of InfoNCE quadratic; no B x B matrix is kept or sent",
    ),
    Axis(
        "G, genes of the panel",
        (128, 256, 512, 1024),
        _with(BATCH, panel=-1),
        (LINEAR, LINEAR, LINEAR),
        "rows of the table, levels of the spots",
    ),
    Axis(
        "Q, levels",
        (8, 16, 32, 64),
        _with(BATCH, "levels.n_levels={}"),
        (LINEAR, LINEAR, LINEAR),
        "rows of the table",
    ),
    Axis(
        "trained genes",
        (1024, 4096, 16384, 65536),
        _with(BATCH, trained_genes=-1),
        (None, LINEAR, LINEAR),
        "identity vectors, their gradients and optimizer state; a step reads those of its panel",
    ),
    Axis(
        "tile width, px",
        (112, 224, 448, 896),
        _with(BATCH, tile_px=-1),
        ((2.0, 2.3), SQUARE, SQUARE),
        "patches quadratic, products of their attention to the fourth power; sent are gradients of positions",
    ),
    Axis(
        "ranks, one global batch",
        (4, 16, 64, 256),
        _with(BATCH, ranks=-1),
        (INVERSE, INVERSE, INVERSE),
        "a constant and 1 / ranks; a ring sends (ranks - 1) / ranks of a tensor",
    ),
)


def costs(plan: Plan) -> tuple[float, float, float]:
    """Return GFLOP, GB of tensors and MB sent, of one device and step."""
    return plan.flops / 1e9, plan.device_bytes / 1e9, sum(c.sent(plan.cluster.ranks) for c in plan.traffic) / 1e6


def order(values: Sequence[float], factor: float) -> float | None:
    """Return the order k of the last three values, or None if they do not grow."""
    before, after = values[-2] - values[-3], values[-1] - values[-2]
    return math.log(after / before) / math.log(factor) if before * after > 0 else None


def table(path: Path, axes: Sequence[Axis] = AXES) -> tuple[list[str], list[str]]:
    """Return the lines of the table in Markdown, and where an order differs from the expected one."""
    lines = [
        "| size | values | GFLOP | order | GB | order | MB sent | order | why |",
        "|---|---|---|---:|---|---:|---|---:|---|",
    ]
    wrong = []
    for axis in axes:
        found = [costs(axis.plan_of(path, value)) for value in axis.values]
        factor = axis.values[-1] / axis.values[-2]
        cells = [axis.name, " / ".join(f"{v:,}" for v in axis.values)]
        for i, (label, expected) in enumerate(zip(("GFLOP", "GB", "MB sent"), axis.orders, strict=True)):
            column = [cost[i] for cost in found]
            k = order(column, factor)
            cells += [" / ".join(_figure(v) for v in column), "-" if k is None else f"{k:.2f}"]
            if not _inside(k, expected):
                wrong.append(f"{axis.name}: {label} grows with order {k}, expected {expected} ({axis.why})")
        lines.append("| " + " | ".join([*cells, axis.why]) + " |")
    return lines, wrong


def _inside(k: float | None, expected: Range) -> bool:
    if k is None or expected is None:
        return k is expected
    return expected[0] - TOLERANCE <= k <= expected[1] + TOLERANCE


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> int:
    """Print the table; fail if an order is another than expected."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs/8xh100.yaml")
    lines, wrong = table(parser.parse_args().config)
    print("\n".join(lines))
    for problem in wrong:
        print(f"ORDER  {problem}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
