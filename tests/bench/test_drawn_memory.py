"""The memory of real steps grows linearly with the batch."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("drawn_memory", ROOT / "bench/train/drawn_memory.py")
assert SPEC is not None
assert SPEC.loader is not None
drawn = importlib.util.module_from_spec(SPEC)
sys.modules["drawn_memory"] = drawn
SPEC.loader.exec_module(drawn)


@pytest.mark.parametrize(("column", "within"), [("saved_mb", 1.02), ("peak_mb", 1.15)])
def test_equal_steps_of_the_batch_add_equal_bytes(column: str, within: float):
    rows = drawn.read_table()
    assert [int(r["spots"]) for r in rows] == list(drawn.SIZES)
    slopes = [
        (float(b[column]) - float(a[column])) / (int(b["spots"]) - int(a["spots"])) for a, b in itertools.pairwise(rows)
    ]
    assert max(slopes) / min(slopes) < within


def test_the_peak_is_what_is_saved_and_little_more():
    for row in drawn.read_table():
        assert 1.0 < float(row["peak_mb"]) / float(row["saved_mb"]) < 1.15


def test_the_process_reports_its_memory():
    assert 10 < drawn.resident_mb() <= drawn.resident_mb("VmHWM") + 1
