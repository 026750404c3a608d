"""Accuracy of ``comtip plan``: predicted and measured bytes for every engine on two gloo ranks, as a Markdown table.

    PYTHONPATH=.:kernels:data_shards python bench/plan/accuracy.py

All figures are bytes of rank 0: state between steps, state with gradients, and communication per step. The tests assert
the same figures.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from comtip_fast.plan.memory import state_rows
from testkit.tiny import tiny_shards
from tests.comtip_fast.test_plan_ranks import CASES, W, measure_all, plan_of, total


def row(case: str, found: dict[str, Any]) -> str:
    """Return the table row of one engine."""
    plan = plan_of(case, found)
    rows = state_rows(plan.sizes, plan.engine, W)
    lasts = total(rows, lasting=True)
    gradients = total([r for r in rows if r.lasts or r.name.startswith("gradients")], lasting=False)
    sent = sum(t.sent(W) for t in plan.traffic), sum(found["sent"].values())
    pairs = (lasts, found["after_step"]), (gradients, found["after_backward"]), sent
    cells = [f"{a / 1e6:.2f} / {b / 1e6:.2f} ({100 * abs(a / b - 1):.1f} % off)" for a, b in pairs]
    return f"| {case} | {' | '.join(cells)} |"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = measure_all(tiny_shards(Path(folder)))
    print("| engine | state, MB: predicted / measured | with gradients | sent per step |")
    print("|---|---|---|---|")
    for case in CASES:
        print(row(case, found[case]))


if __name__ == "__main__":
    main()
