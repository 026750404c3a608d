"""Trained methods are scored on the genes that they can predict, and what is shown of a section that lacks genes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from comtip_fast.evaluation.evaluate import _merge_sections
from comtip_fast.evaluation.summary import summary_table
from comtip_fast.evaluation.tasks.context import SectionInputs, TaskOptions
from comtip_fast.evaluation.tasks.expression import trained_rows
from comtip_fast.evaluation.trained.bleep import BleepTask
from comtip_fast.evaluation.trained.fit import TrainedMethod
from comtip_fast.evaluation.trained.targets import Targets
from comtip_fast.metrics import pcc_per_gene

KEYS = ["human:A", "human:B", "human:C"]
COHORTS = ["human_breast", "human_lung"]
METHODS = ("ridge_features", "unseen_ridge")


def test_an_average_of_training_spots_knows_the_genes_of_its_cohort() -> None:
    """A gene that only another organ's sections measured would be predicted as constant, and scored as 0."""
    section_N = np.repeat([0, 1], 4)
    known = np.array([[True, False, False], [False, True, False]])
    values = sparse.csr_matrix(np.random.default_rng(0).random((8, 3)))
    task = object.__new__(BleepTask)
    task.data = SimpleNamespace(  # type: ignore[assignment]
        targets=Targets.of(KEYS, section_N, values, known),
        rows_of_cohort=lambda cohort: np.flatnonzero(section_N == COHORTS.index(cohort)),
    )
    task.predict_tiles = lambda tiles, stain, cohort: {"k10": np.ones((2, 3))}  # type: ignore[method-assign]
    method = TrainedMethod("bleep", task, {})
    for cohort, expected in zip(COHORTS, known, strict=True):
        found = method.predict(None, None, cohort, KEYS)  # type: ignore[arg-type]
        np.testing.assert_array_equal(np.isfinite(found).all(0), expected)


def test_a_gene_that_a_method_cannot_predict_is_left_out_of_its_row() -> None:
    """The reference has a section with this gene, but the method was not trained on it."""
    rng = np.random.default_rng(1)
    measured, xy = rng.random((30, 3)), rng.random((30, 2))
    predicted = measured + 0.5 * rng.random((30, 3))
    predicted[:, 2] = np.nan
    names = [str(i) for i in range(30)]
    section = SectionInputs(
        "x", 0, "human_breast", np.arange(30), xy, names, sparse.csr_matrix(measured), None, {}, np.zeros((0, 30))
    )
    method = SimpleNamespace(cohorts={"human_breast"}, predict=lambda tiles, stain, cohort, keys: predicted)
    context = SimpleNamespace(
        sections=[section],
        probes={0: []},
        options=TaskOptions(n_bootstrap=0, n_null=2),
        most_variable=lambda cohort, number: KEYS,
        trained=lambda name: method,
        values=lambda section, keys: measured,
        tiles=lambda section: (None, None),
        train_sections=lambda cohort: [SimpleNamespace(spot_ids=names)],
        train_measured=lambda train, keys: np.ones((1, 3), bool),
    )
    rows = {row.metric: row.value for row in trained_rows(context, "finetune")}  # type: ignore[arg-type]
    assert set(rows) == {"pcc_50_fitted", "mse_50_fitted"}
    assert rows["pcc_50_fitted"] == pytest.approx(pcc_per_gene(measured, predicted)[:2].mean())


def section_facts(name: str, genes: list[str]) -> dict[str, Any]:
    """Return the entry of a section in ``metrics.json`` without scores."""
    return {
        "sections": [name],
        "genes_50_hvg": genes,
        "n_spots": 4,
        "n_genes_scored": 7,
        "n_genes_unseen": 4,
        "hvg_from": "training sections",
        "readout_heads": ["human_breast"],
        "donor_seen_in_training": False,
        "donor_seen_by": [],
        "platform": "Visium",
        "platform_seen_in_training": True,
        "genes_not_measured": [],
    }


def test_a_cohort_lists_the_most_variable_genes_of_all_its_sections() -> None:
    parts = [section_facts("x1", KEYS[:2]), section_facts("x2", KEYS[1:])]
    assert _merge_sections(parts)["genes_50_hvg"] == KEYS
    assert _merge_sections(parts[1:])["genes_50_hvg"] == KEYS[1:]


def test_a_method_without_a_score_in_a_section_is_shown_with_the_score_of_the_model_on_the_others() -> None:
    columns = ("mean_pcc_50_hvg", "mean_pcc_all", "partial_pcc_50_hvg")
    model, worse, ridge = (dict.fromkeys(columns, value) | {"undefined_genes": 0} for value in (0.6, 0.1, 0.5))
    fitted = ridge | {"genes": 9, "fitted_genes": 9, "fitted_50_hvg": 9, "model_on_fitted": model}
    parts = [
        section_facts(name, KEYS) | {"zero_shot": {"cp10k": score}} | {k: {"cp10k": other} for k in METHODS}
        for name, score, other in (("x1", model, fitted), ("x2", worse, None))
    ]
    cohort = _merge_sections(parts)
    assert cohort["zero_shot"]["cp10k"]["mean_pcc_all"] == pytest.approx(0.35)
    for name, n in zip(METHODS, (9 + 7, 9 + 4), strict=True):
        found = cohort[name]["cp10k"]
        assert (found["mean_pcc_all"], found["genes"], found["fitted_genes"]) == (0.5, n, 9)
    assert "9 of 16 genes, on which zero_shot has 0.600 and 0.600" in summary_table(
        {"cohorts": {"human_breast": cohort}}
    )
