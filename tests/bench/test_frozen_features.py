"""The script behind a table of docs/ablations.md: its folds leave out what they score, and the table has its rows."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("frozen_features", ROOT / "bench/results/frozen_features.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["frozen_features"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_no_fold_trains_on_what_it_scores_and_no_test_section_is_used(script: ModuleType):
    folds = [fold for column in script.COLUMNS.values() for fold in column]
    assert len(folds) == 4 + 4 + 3
    assert all(test not in train and len(set(train)) == len(train) for train, test in folds)
    used = {s for train, test in folds for s in (*train, test)}
    assert used == {*script.BREAST, *script.BULB, script.OTHER}
    assert not used & {"her2st_A1", "mob_Rep9"}
    donors = script.COLUMNS["bulb, another donor"]
    assert all((script.OTHER in train) != (test == script.OTHER) for train, test in donors)


def test_the_table_in_the_documentation_has_the_rows_of_the_script(script: ModuleType):
    text = (ROOT / "docs/ablations.md").read_text(encoding="utf-8").partition("## 5.")[2].partition("Neighbours at")[0]
    lines = [line.strip("| ").split(" | ")[0].strip("*") for line in text.splitlines() if line.startswith("| ")]
    assert [row.name for row in script.ROWS] == [n for n in lines if n != "features" and not n.startswith(" and their")]


def test_ranks_become_normal_scores(script: ModuleType):
    x = np.array([[3.0, 1.0], [100.0, 1.0], [-5.0, 2.0], [4.0, 0.0]])
    got = script._normal_scores(x)
    assert np.argsort(got[:, 0]).tolist() == np.argsort(x[:, 0]).tolist()
    np.testing.assert_allclose(np.sort(got[:, 0]), -np.sort(got[:, 0])[::-1])  # symmetric: the outlier does not count
    assert got[0, 1] == got[1, 1]
