"""Genes on which candidates of the readout are compared."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from comtip_fast.models.readout.features import ReadoutSettings
from comtip_fast.training.readout.fit import SCORE_GENES, _score_genes
from comtip_fast.training.readout.solve import CohortData, ReadoutGrid, SectionTable, fit_cohort

F, G = 4, 80
GRID = ReadoutGrid(programmes=(1, 2), alphas=(0.1, 1.0, 10.0))


def table(seed: int, genes: int = G) -> SectionTable:
    """Return a section whose gene g varies more than gene g - 1; the last gene is in one spot of 20."""
    rng = np.random.default_rng(seed)
    y = 5 + rng.normal(size=(20, genes)) * np.linspace(0.1, 2, genes)
    y[1:, -1] = 0
    return SectionTable(rng.normal(size=(20, F)), {"cp10k": y, "raw": y}, np.ones(genes, bool))


def test_genes_that_the_run_ranked_are_used() -> None:
    rows = np.array([3, 5, 8, 9])
    np.testing.assert_array_equal(_score_genes(np.array([9, 4, 3]), rows, [], 0.1), [3, 0])
    many = np.arange(SCORE_GENES + 20)
    np.testing.assert_array_equal(_score_genes(many[::-1], many, [], 0.1), many[::-1][:SCORE_GENES])


def test_genes_of_a_cohort_without_a_ranking_are_ranked_on_its_spots() -> None:
    rows, train = np.arange(100, 100 + G), [table(0), table(1)]
    for ranked in (None, np.array([7])):
        found = _score_genes(ranked, rows, train, 0.1)
        assert found.size == SCORE_GENES
        assert found.max() == G - 2, "the last gene is detected in too few spots"
        variance = np.concatenate([t.y["cp10k"] for t in train]).var(0)[found]
        assert (np.diff(variance) <= 0).all()
    assert _score_genes(None, rows, train, 1.1).size == SCORE_GENES, "no gene is detected often enough: all are ranked"


def test_candidates_that_cannot_be_compared_are_those_of_the_middle() -> None:
    train, settings = [table(0, 6), table(1, 6)], ReadoutSettings(1, (), F)
    keys = [f"human:G{i}" for i in range(6)]
    unmeasured = replace(table(2, 6), measured_G=np.arange(6) >= 2)
    for genes, own, valid in ((np.zeros(0, np.int64), train, []), (np.array([0, 1]), train[:1], [unmeasured])):
        data = CohortData("human_lung", keys, own, valid, np.zeros(F), np.ones(F), genes)
        for one in fit_cohort(data, settings, grid=GRID).facts["vector"].values():
            assert (one["alpha"], one["score"]) == (1.0, None)
