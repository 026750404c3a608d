"""What an evaluation says about sections, donors, genes and gene vectors that a model has seen."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path

import pytest
from comtip_shards import ShardSet

import comtip_fast
from comtip_fast.evaluation.evaluate import evaluate
from comtip_fast.evaluation.report import write_report
from comtip_fast.evaluation.report.page import _training
from comtip_fast.evaluation.train_reference import TrainReference
from comtip_fast.inference import Predictor
from comtip_fast.lineage import LineageSection


@pytest.fixture(scope="module")
def predictor(tiny_run: Path) -> Predictor:
    return Predictor.load(tiny_run)


def page_of(result: comtip_fast.evaluation.evaluate.Evaluation, out: Path) -> str:
    write_report(None, result, out / "report.html")
    return " ".join((out / "report.html").read_text().split())


# -- sections -----------------------------------------------------------------------------------------------


def adapted_elsewhere(predictor: Predictor, shards: ShardSet) -> Predictor:
    """Return the model after adaptation to another section, which has the id and the organ of the test section x1."""
    x1 = LineageSection.of(shards.manifest.sections[shards.section_number("x1")])
    picture = base64.b64encode(bytes(range(32))).decode()
    other = replace(x1, dataset="adaptation", donor="somebody", split="train", spots="", picture=picture)
    run = replace(predictor.lineage.own, name="adapted", sections=(other,))
    return Predictor(replace(predictor.bundle, lineage=predictor.lineage.followed_by(run)))


def test_a_test_section_with_the_id_of_a_training_section_is_not_trained_on(
    predictor: Predictor, tiny_shards: ShardSet
):
    model = adapted_elsewhere(predictor, tiny_shards)
    reference = TrainReference(model, tiny_shards)
    assert [tiny_shards.manifest.sections[n].section_id for n in reference.numbers] == ["t1", "t2"]
    result = evaluate(model, tiny_shards, n_null=0)
    assert result.metrics["reference_sections"] == ["t1", "t2"]
    assert not result.metrics["sections"]["x1"]["section_seen_in_training"]
    rows = [(r["section_id"], r["dataset"], r["split"]) for r in _training(result)["rows"] if r["scored"]]
    assert rows == [("x1", "tiny", "test")], "only the section that was scored, not the other one with its id"


def test_a_training_section_is_found_under_another_id(predictor: Predictor, tiny_shards: ShardSet):
    renamed = tuple(replace(s, section_id=f"old_{s.section_id}") for s in predictor.lineage.own.sections)
    model = Predictor(replace(predictor.bundle, lineage=predictor.lineage.with_own(sections=renamed)))
    assert [tiny_shards.manifest.sections[n].section_id for n in TrainReference(model, tiny_shards).numbers] == [
        "t1",
        "t2",
    ]
