"""The committed cost curves grow as the algorithm says, and the check sees one that does not."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("cost_curves", Path(__file__).parents[2] / "bench/train/cost_curves.py")
assert SPEC is not None
assert SPEC.loader is not None
curves = importlib.util.module_from_spec(SPEC)
sys.modules["cost_curves"] = curves  # dataclasses look their module up
SPEC.loader.exec_module(curves)


@pytest.mark.parametrize("name", [c.name for c in curves.CURVES])
def test_committed_costs_grow_as_expected(name: str):
    rows = curves.read_table()[name]
    assert [int(r["value"]) for r in rows] == list(next(c.values for c in curves.CURVES if c.name == name))
    assert curves.unexpected(name, rows) == []


def test_saved_bytes_are_linear_in_the_batch():
    """Equal steps of the batch add equal bytes, from 1,024 to 16,384 spots: nothing of size B^2 is stored."""
    rows = curves.read_table()["B"]
    slopes = [
        (float(b["saved_mb"]) - float(a["saved_mb"])) / (int(b["value"]) - int(a["value"]))
        for a, b in itertools.pairwise(rows)
    ]
    assert max(slopes) / min(slopes) < 1.01


def test_a_growth_outside_the_range_is_named():
    rows = [{"value": "1", "gflop": "1", "saved_mb": "1", "uploads_mb": "1", "operators": "5"}]
    rows.append({"value": "2", "gflop": "4", "saved_mb": "1.95", "uploads_mb": "2", "operators": "5"})
    assert curves.unexpected("B", rows) == ["gflop against B: exponent 2.0, expected 0.9 to 1.1"]
