"""The ridge regressions of the readout's tables choose their penalty as an evaluation does."""

from types import SimpleNamespace

import numpy as np
import pytest

from bench.results import readout
from bench.results.readout import Lab


@pytest.mark.parametrize("sections", [1, 2])
def test_the_penalty_is_chosen_on_the_folds_of_an_evaluation(monkeypatch: pytest.MonkeyPatch, sections: int):
    rng = np.random.default_rng(0)
    x, xy, y = ([rng.random((40, n)) for _ in range(3)] for n in (5, 2, 1))
    lab = object.__new__(Lab)
    lab.row = {"human:A": 0}
    lab.shards = SimpleNamespace(measured=lambda section: np.ones(1, bool))
    monkeypatch.setattr(lab, "_baseline", lambda section, which: x[section])
    monkeypatch.setattr(lab, "xy", lambda section: xy[section])
    monkeypatch.setattr(lab, "values", lambda section, keys: dict.fromkeys(readout.NORMS, y[section]))
    fit, folds = readout.fit_ridge, []
    monkeypatch.setattr(readout, "fit_ridge", lambda *given: folds.append(given[3]) or fit(*given))
    train = [*range(sections)]
    lab.ridge(train, 2, ["human:A"], "encoder")
    expected = readout.ridge_folds(np.repeat(train, 40), np.concatenate([xy[s] for s in train]))
    assert len(folds) == len(readout.NORMS)
    assert all((fold == expected).all() for fold in folds)
