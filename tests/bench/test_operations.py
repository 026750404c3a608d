"""Whole operations: the committed counts are those of the code, and a worse count is reported."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def operations() -> ModuleType:
    spec = importlib.util.spec_from_file_location("operations", ROOT / "bench/kernels/operations.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["operations"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_table_is_that_of_the_code_and_of_the_readme(operations: ModuleType):
    rows = operations.count()
    assert rows == operations.read()
    assert operations.markdown(rows) in (ROOT / "kernels/README.md").read_text(encoding="utf-8")


def test_one_gradient_of_q_k_and_v_is_not_copied(operations: ModuleType):
    both = [r for r in operations.read() if r["op"] == "packed_attention"]
    assert [(r["operators"], r["launches"], r["ratio"]) for r in both] == [("0", "1", "1.00")] * 2


def test_casts_inside_operators_are_counted(operations: ModuleType):
    """The table is fp32: 67 MB in bf16 are written and read in addition to the kernel."""
    row = next(r for r in operations.read() if r["op"] == "pair_scores" and r["part"] == "forward")
    assert float(row["operation_mb"]) - float(row["kernel_mb"]) > 2048 * 32 * 512 * (4 + 2) / 1e6


def test_a_worse_count_is_reported(operations: ModuleType):
    rows = operations.read()
    worse = [dict(r) for r in rows]
    worse[3]["operators"] = str(int(worse[3]["operators"]) + 1)
    assert operations.problems(rows, rows) == []
    assert len(operations.problems(worse, rows)) == 1
    assert "operators is" in operations.problems(worse, rows)[0]
    assert "not in operations.csv" in operations.problems(rows, rows[1:])[0]
    assert "only in operations.csv" in operations.problems(rows[1:], rows)[0]
