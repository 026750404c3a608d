"""Cost of a step against each size, per device: counted FLOPs, memory of tensors and bytes sent. Nothing is timed.

    PYTHONPATH=.:kernels:data_shards python bench/plan/curves.py [--config configs/8xh100.yaml]

Figures are those of ``comtip plan``, whose formulas tests compare with counted values. For every size, the order is the exponent
between the last two values: 1 is linear, 2 quadratic. ``LIMITS`` are the expected orders; the command fails if one is exceeded, for
example because a B x B matrix is kept. Prints the table of docs/performance.md.
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


@dataclass(frozen=True)
class Axis:
    """One size, its values, and the highest expected order of each cost."""

    name: str
    values: tuple[int, ...]
    plan_of: Callable[[Path, int], Plan]
    limits: tuple[float, float, float]
    """Of FLOPs, memory and bytes sent."""
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
AXES = (
    Axis(
        "B, spots",
        (1024, 4096, 16384, 65536),
        _with("data.batch_size={}"),
        (1.2, 1.0, 1.1),
        "images linear, InfoNCE quadratic; no B x B matrix is kept",
    ),
    Axis(
        "G, genes of the panel",
        (128, 256, 512, 1024),
        _with(BATCH, panel=-1),
        (1.0, 1.0, 1.1),
        "sentences and products with the table",
    ),
    Axis(
        "Q, levels",
        (8, 16, 32, 64),
        _with(BATCH, "levels.n_levels={}"),
        (1.0, 1.0, 1.1),
        "as G: the table has G Q rows",
    ),
    Axis(
        "trained genes",
        (1024, 4096, 16384, 65536),
        _with(BATCH, trained_genes=-1),
        (0.0, 0.2, 0.3),
        "rows of the identity table; a step reads those of its panel",
    ),
    Axis(
        "tile width, px",
        (128, 224, 448, 896),
        _with(BATCH, tile_px=-1),
        (2.6, 2.2, 0.1),
        "patches quadratic, their attention quartic in FLOPs; attention keeps no matrix",
    ),
    Axis(
        "ranks, one global batch",
        (1, 2, 8, 64, 256),
        _with(BATCH, ranks=-1),
        (0.0, 0.0, 1.0),
        "falls with ranks until the sentences and weights dominate",
    ),
)


def costs(plan: Plan) -> tuple[float, float, float]:
    """Return GFLOP, GB of tensors and MB sent, of one device and step."""
    return plan.flops / 1e9, plan.device_bytes / 1e9, sum(c.sent(plan.cluster.ranks) for c in plan.traffic) / 1e6


def order(before: float, after: float, factor: float) -> float:
    """Return the exponent k of ``after = before * factor ** k``; 0 if nothing is spent."""
    return math.log(after / before) / math.log(factor) if before > 0 and after > 0 else 0.0


def table(path: Path, axes: Sequence[Axis] = AXES) -> tuple[list[str], list[str]]:
    """Return the lines of the table in Markdown, and where an order exceeds its limit."""
    lines = [
        "| size | values | GFLOP | order | GB | order | MB sent | order | why |",
        "|---|---|---|---:|---|---:|---|---:|---|",
    ]
    wrong = []
    for axis in axes:
        found = [costs(axis.plan_of(path, value)) for value in axis.values]
        factor = axis.values[-1] / axis.values[-2]
        cells = [axis.name, " / ".join(f"{v:,}" for v in axis.values)]
        for i, (label, limit) in enumerate(zip(("GFLOP", "GB", "MB sent"), axis.limits, strict=True)):
            column = [cost[i] for cost in found]
            exponent = order(column[-2], column[-1], factor)
            cells += [" / ".join(f"{v:,.4g}" for v in column), f"{exponent:.2f}"]
            if exponent > limit + 0.01:
                wrong.append(
                    f"{axis.name}: {label} grows with order {exponent:.2f}, expected at most {limit:g} ({axis.why})"
                )
        lines.append("| " + " | ".join([*cells, axis.why]) + " |")
    return lines, wrong


def main() -> int:
    """Print the table; fail if an order is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs/8xh100.yaml")
    lines, wrong = table(parser.parse_args().config)
    print("\n".join(lines))
    for problem in wrong:
        print(f"WORSE  {problem}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
