"""The report states how each section was used and how it was scored."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from comtip_shards import ShardSet
from comtip_shards.slides.pixel_scale import scale_length

from comtip_fast.evaluation.evaluate import evaluate
from comtip_fast.evaluation.figures import gene_histogram
from comtip_fast.evaluation.report import write_report
from comtip_fast.evaluation.report.page import LABELS, _readout, best_baseline
from comtip_fast.inference import Predictor
from comtip_fast.lineage import LineageVectors


def page_of(run: Path, shards: ShardSet, out: Path, sections: list[str], tissue: str | None = None) -> str:
    predictor = Predictor.load(run)
    if tissue:
        own = tuple(replace(s, tissue=tissue) for s in predictor.lineage.own.sections)
        predictor.lineage = predictor.lineage.with_own(sections=own)
    result = evaluate(predictor, shards, sections=sections, n_null=3)
    write_report(None, result, out / "report.html")
    return " ".join((out / "report.html").read_text().split())


def test_sections_that_training_used_are_reported(tiny_run: Path, tiny_shards: ShardSet, tmp_path: Path):
    page = page_of(tiny_run, tiny_shards, tmp_path, ["t1", "v1"])
    assert "t1 was used to train this model" in page
    assert "v1 determined when training stopped" in page
    assert "--sections t1,v1 --null-draws 3 --seed 0" in page
    assert "t1 against chance" in page
    assert "best baseline: <strong>" in page
    assert page.count('src="data:image') >= 2 * 3
    assert "95 % interval over the 2 sections" in page
    assert re.search(
        r"by a mixture \(weights in brackets\): (log1p CP10K by )?(kernel )?ridge regression on the encoder&#39;s vector \(0",
        page,
    )
    # Without scripts no tab opens a panel, so none is hidden.
    panels = re.findall(r'<section role="tabpanel"[^>]*>', page)
    assert len(panels) == 2
    assert not any("hidden" in panel for panel in panels)
    table = pd.read_csv(tmp_path / "intervals.csv")
    assert set(table["section"]) == {"t1", "v1", "mean of 2 sections of human_breast"}


def test_a_platform_that_training_lacks_is_reported(tiny_run: Path, tiny_shards: ShardSet, tmp_path: Path):
    predictor = Predictor.load(tiny_run)
    trained = predictor.lineage.own.sections
    assert {s.platform for s in trained} == {tiny_shards.manifest.sections[0].platform}
    for platform, seen in (("Xenium", False), ("", None)):
        own = tuple(replace(s, platform=platform) for s in trained)
        vectors = None if seen is None else LineageVectors(sha256="ab" * 32, licence="CC0", sources=("atlas.h5ad",))
        predictor.lineage = predictor.lineage.with_own(sections=own, vectors=vectors)
        result = evaluate(predictor, tiny_shards, sections=["x1"], n_null=0)
        entry = result.metrics["sections"]["x1"]
        assert entry["platform_seen_in_training"] is seen
        found = [] if seen is None else [entry["platform"]]
        assert result.metrics["cohorts"]["human_breast"]["platforms_not_in_training"] == found
        write_report(None, result, tmp_path / "report.html")
        page = " ".join((tmp_path / "report.html").read_text().split())
        assert ("; platform not in training" in page) == (seen is False)
        assert ("(SHA-256 abababababababab, licence CC0), computed from atlas.h5ad." in page) == (vectors is not None)
        assert (f"on a platform that is not in the training set ({entry['platform']})" in page) == (seen is False)


def test_an_untrained_cohort_is_reported(tiny_run: Path, tiny_shards: ShardSet, tmp_path: Path):
    page = page_of(tiny_run, tiny_shards, tmp_path, ["x1"], tissue="heart")
    assert "The training set has no human breast" in page
    assert "Ridge on mean tile colour" not in page


def test_a_card_shows_the_best_baseline_and_none_of_the_models_own_scores():
    def scored(pcc: float) -> dict[str, dict[str, float]]:
        return {"cp10k": {"mean_pcc_50_hvg": pcc}}

    own = {"zero_shot": scored(0.4), "finetune": scored(0.5), "control_null": scored(0.6)}
    baselines = {"ridge_colour": scored(0.1), "ridge_frozen": scored(0.3), "ridge_features": scored(0.2), "bleep": {}}
    assert best_baseline(own | baselines) == (LABELS["ridge_frozen"], 0.3)
    assert best_baseline(own | {"ridge_colour": {"cp10k": None}}) is None


@pytest.mark.parametrize(("width", "length"), [(6500.0, 2000), (2900, 500), (100, 20), (2, 1), (0.5, 1)])
def test_the_scale_bar_has_a_round_length(width: float, length: int):
    assert scale_length(width) == length


@pytest.mark.filterwarnings("error")
def test_a_histogram_without_values_is_drawn():
    assert gene_histogram(np.zeros(0), np.zeros((0, 0)), "none").startswith("data:image/png")
    assert gene_histogram(np.array([np.nan, 0.3]), np.full((2, 2), np.nan), "some").startswith("data:image/png")


def test_heads_of_raw_counts_are_stated_if_they_differ():
    def head(raw: str, share: float) -> dict[str, Any]:
        cp10k = {"kind": "kernel", "weight": 0.4}
        both = {"cp10k": cp10k, "raw": {"kind": raw, "weight": share}}
        return {"vector": {"cp10k": cp10k, "raw": cp10k}, "frozen": both, "levels": 0.2}

    kernel = "kernel ridge regression on the encoder's vector (0.40), "
    same = kernel + "kernel ridge regression on the frozen stem's features (0.40), level sentences (0.20)"
    other = kernel + "ridge regression on the frozen stem's features (0.53), level sentences (0.20)"
    assert _readout({"human_breast": head("kernel", 0.4)}, ["human_breast"]) == same
    assert (
        _readout({"human_breast": head("linear", 0.53)}, ["human_breast"])
        == f"log1p CP10K by {same}; log1p raw counts by {other}"
    )
    assert _readout(None, []) == "level sentences alone"
