"""Result rows of the downstream tasks: one score each, with interval, chance and control."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
from comtip_shards.storage.atomic import write_atomic

from comtip_fast.metrics import finite_or_none
from comtip_fast.runtime.csv_text import csv_text

FORMAT, VERSION = "comtip-tasks", 1
NAN = math.nan


@dataclass(frozen=True)
class TaskRow:
    """One score of one method on one section, or over sections."""

    task: str
    section: str
    """Section id, ``mean of N sections`` (followed by ``of COHORT`` if several cohorts are scored), ``all of COHORT``, or empty if no
    section is involved."""
    method: str
    metric: str
    value: float
    low: float = NAN
    """Lower end of the 95 % interval; NaN if there is none."""
    high: float = NAN
    chance: float = NAN
    """Expected score of a random guess; NaN if it is unknown."""
    shuffled: float = NAN
    """Score of the task's control, e.g. shuffled pairs or a rotated map (docs/evaluation.md); NaN if it has none."""
    n: int = 0
    """Number of spots, genes, gene sets, pairs or sections behind the score."""


def write_rows(rows: Sequence[TaskRow], facts: dict[str, Any], folder: Path) -> None:
    """Write ``tasks.json`` and ``tasks.csv``; numbers that are not finite become null in JSON and empty in CSV."""
    content = {"format": FORMAT, "version": VERSION, **facts, "rows": [asdict(r) for r in rows]}
    write_atomic(folder / "tasks.json", json.dumps(finite_or_none(content), indent=1, allow_nan=False) + "\n")
    frame = pd.DataFrame([asdict(r) for r in rows], columns=[f.name for f in fields(TaskRow)])
    write_atomic(folder / "tasks.csv", csv_text(frame))


def table(rows: Sequence[TaskRow]) -> str:
    """Format the rows as a table for the terminal."""
    head = ("task", "section", "method", "metric", "score", "95 % interval", "chance", "shuffled")
    cells = [head]
    for r in rows:
        ends = "" if math.isnan(r.low) else f"{r.low:.3f} to {r.high:.3f}"
        cells.append((r.task, r.section, r.method, r.metric, _text(r.value), ends, _text(r.chance), _text(r.shuffled)))
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def _text(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
