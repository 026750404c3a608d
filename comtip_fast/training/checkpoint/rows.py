"""JSONL files of a run folder, and removal of the rows that a resumed run will repeat."""

from __future__ import annotations

import json
from pathlib import Path

from comtip_shards.storage.atomic import write_atomic

NONFINITE = "nonfinite.jsonl"
"""File in the run folder with one row per step whose loss or gradient was not finite."""
SPIKES = "spikes.jsonl"
"""File in the run folder with one row per spike of the gradient norm (``optim.spike``)."""


def keep_rows_up_to(path: Path, step: int, *, validated: bool = True) -> None:
    """Drop rows after ``step`` from a JSONL file, and everything from the first incomplete line on, which a killed run left.

    If ``validated`` is False, the validation row of ``step`` is dropped too.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        repeated = not validated and row["step"] == step and row.get("kind") == "valid"
        if row["step"] <= step and not repeated:
            kept.append(line + "\n")
    write_atomic(path, "".join(kept))
