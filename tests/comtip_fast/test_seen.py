"""What an evaluation says about sections, donors, genes and gene vectors that a model has seen."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from comtip_shards import ShardSet

import comtip_fast
from comtip_fast.data.coexpression.vectors import gene_vectors
from comtip_fast.evaluation.evaluate import evaluate
from comtip_fast.evaluation.gene_table import COLUMNS
from comtip_fast.evaluation.report import write_report
from comtip_fast.evaluation.report.page import _training
from comtip_fast.evaluation.run import evaluate_run
from comtip_fast.evaluation.seen import any_known, gene_seen, section_facts
from comtip_fast.evaluation.train_reference import TrainReference
from comtip_fast.genes import vectors as vectors_module
from comtip_fast.genes.vectors import GeneVectors
from comtip_fast.inference import Predictor
from comtip_fast.lineage import Lineage, LineageRun, LineageSection


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


# -- donors -------------------------------------------------------------------------------------------------


def trained_on(donors: Sequence[str], *, known: bool = True) -> Lineage:
    sections = tuple(LineageSection(section_id=f"s{i}", split="train", donor=d) for i, d in enumerate(donors))
    return Lineage(runs=(LineageRun(name="run", sections=sections),), parents_known=known)


@pytest.mark.parametrize(
    ("donors", "donor", "known", "runs"),
    [
        (["a", "b"], "c", True, []),
        (["a", "b"], "b", True, ["run"]),
        (["Patient_A"], " patient_a", True, ["run"]),
        (["a", "unstated:s1"], "c", True, None),
        (["a", "unstated:s1"], "a", True, ["run"]),
        (["a", "unknown"], "", True, None),
        (["unknown"], "NA", True, None),
        (["unstated:x1"], "unstated:x1", True, None),
        (["a"], "c", False, None),
        (["a"], "a", False, ["run"]),
    ],
)
def test_a_donor_is_new_only_if_all_donors_are_stated(
    donors: list[str], donor: str, known: bool, runs: list[str] | None
):
    assert trained_on(donors, known=known).runs_that_trained_on(donor) == runs


def test_an_unknown_donor_is_reported_as_unknown(predictor: Predictor, tiny_shards: ShardSet, tmp_path: Path):
    sections = predictor.lineage.own.sections
    hidden = tuple(replace(s, donor=f"unstated:{s.section_id}") for s in sections)
    lineages = {
        "known": predictor.lineage,
        "unstated": predictor.lineage.with_own(sections=hidden),
        "parents": replace(predictor.lineage, parents_known=False),
    }
    words = {
        "known": ("donor not in the training set", "from a donor that is not in the training set"),
        "unstated": (
            "unknown whether the donor is in the training set",
            "because the donor of some training sections is not stated",
        ),
        "parents": ("donor not in the known training sets", "from a donor that is not in the known training sets"),
    }
    for name, lineage in lineages.items():
        model = Predictor(replace(predictor.bundle, lineage=lineage))
        facts = section_facts(model, tiny_shards, tiny_shards.section_number("x1"))
        assert facts["donor_seen_in_training"] is (False if name == "known" else None)
        trained = section_facts(model, tiny_shards, tiny_shards.section_number("t1"))
        assert trained["donor_seen_in_training"] is True, "the section itself was trained on"
        result = evaluate(model, tiny_shards, sections=["x1"], n_null=0)
        assert result.metrics["cohorts"]["human_breast"]["donor_seen_in_training"] is facts["donor_seen_in_training"]
        page = page_of(result, tmp_path)
        for other, texts in words.items():
            assert all((text in page) == (other == name) for text in texts), (name, other)
        # v1 shares donor_b with t2; if donors are not stated, nothing is claimed.
        assert ("from a donor who is also in training" in page) == (name != "unstated")


def test_a_cohort_is_unknown_only_if_no_section_is_known_to_be_seen():
    assert any_known([False, None, True]) is True
    assert any_known([False, None]) is None
    assert any_known([False, False]) is False


# -- genes --------------------------------------------------------------------------------------------------


def test_an_orthologue_has_one_answer_in_every_run(predictor: Predictor):
    own = predictor.lineage.own
    gene = own.trained_genes[0]
    mouse = f"mouse:{gene.split(':')[1].capitalize()}"
    child_run = replace(own, name="child", trained_genes=("human:TTN",), gene_scores={}, scored_on={})
    others = [replace(g, trained=False) for g in predictor.bundle.genes]
    child = Predictor(replace(predictor.bundle, genes=others, lineage=predictor.lineage.followed_by(child_run)))
    assert [predictor.training_of(k) for k in (gene, mouse)] == ["trained", "orthologue trained"]
    assert [child.training_of(k) for k in (gene, mouse)] == ["trained by a parent", "orthologue trained"]
    assert gene_seen(predictor, mouse) == gene_seen(child, mouse) == "orthologue trained with image"
    assert gene_seen(predictor, "mouse:Actb2l") == "name only"


def test_genes_csv_says_what_a_validation_score_was_measured_on(predictor: Predictor, tiny_shards: ShardSet):
    own = predictor.lineage.own
    first, second, *_ = own.trained_genes
    scores = {first: 0.25, second: 0.5}
    lineage = predictor.lineage.with_own(gene_scores=scores, scored_on={second: "test spots of x1"})
    table = evaluate(Predictor(replace(predictor.bundle, lineage=lineage)), tiny_shards, n_null=0).gene_table()
    assert tuple(table.columns) == COLUMNS
    found = table.set_index("key")[["validation_pcc", "validation_on"]]
    assert found.loc[first].tolist() == [0.25, f"validation sections of {own.name}"]
    assert found.loc[second].tolist() == [0.5, "test spots of x1"]
    others = found.drop(index=[first, second])
    assert len(others) > 5
    assert others["validation_pcc"].isna().all()
    assert set(others["validation_on"]) == {""}


# -- gene vectors -------------------------------------------------------------------------------------------


def test_gene_vectors_of_an_evaluation_are_recorded(
    predictor: Predictor, tiny_run: Path, tiny_shards: ShardSet, tmp_path: Path
):
    keys = [g.key for g in tiny_shards.genes]
    vectors = GeneVectors(
        keys,
        np.random.default_rng(0).normal(size=(len(keys), 3)).astype(np.float32),
        np.ones((len(keys), 4), np.float32),
        np.ones(len(keys), np.float32),
        {"licence": "CC-BY-SA-4.0", "sources": [{"name": "atlas.h5ad", "cells": 9, "genes": 9, "species": "human"}]},
    )
    vectors.save(tmp_path / "v.safetensors")
    out = tmp_path / "out"
    evaluate_run(tiny_run, tiny_shards.path, out, gene_vectors=tmp_path / "v.safetensors", null_draws=0, device="cpu")
    lineage = json.loads((out / "metrics.json").read_text())["lineage"]
    given = {"sha256": vectors.sha256, "licence": "CC-BY-SA-4.0", "sources": ["atlas.h5ad"]}
    assert lineage["gene_vectors_given"] == given
    assert "CC-BY-SA-4.0" in lineage["licences"]
    page = " ".join((out / "report.html").read_text().split())
    assert f"(SHA-256 {vectors.sha256[:16]}, licence CC-BY-SA-4.0), computed from atlas.h5ad" in page
    assert "--seed 0 --gene-vectors FILE" in page
    (entry,) = json.loads((out / "metrics.json").read_text())["sections"].values()
    assert entry["in_gene_vectors"] is None, "the file has no hashes of cells"
    plain = evaluate(predictor, tiny_shards, n_null=0)
    assert plain.metrics["sections"]["x1"]["in_gene_vectors"] is False
    assert plain.metrics["lineage"]["gene_vectors_given"] is None
    assert "--gene-vectors" not in page_of(plain, tmp_path)


def vectors_of(shards: ShardSet, sections: Sequence[str], folder: Path) -> GeneVectors:
    """Compute gene vectors from the counts of some sections, with the genes in another order, and read them from a file."""
    spots = shards.select(sections=[shards.section_number(s) for s in sections])
    data = ad.AnnData(shards.counts(spots).astype(np.float32), var=pd.DataFrame(index=[g.symbol for g in shards.genes]))
    data[:, ::-1].copy().write_h5ad(folder / "counts.h5ad")
    gene_vectors([folder / "counts.h5ad"], species="human", components=3).save(folder / "v.safetensors")
    return GeneVectors.load(folder / "v.safetensors")


def test_a_scored_section_among_the_sources_of_gene_vectors_is_reported(
    predictor: Predictor, tiny_shards: ShardSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.WARNING, "comtip_fast")
    for sections, contained in ((["t1", "t2"], False), (["t1", "x1"], True)):
        model = Predictor(predictor.bundle, vectors=vectors_of(tiny_shards, sections, tmp_path))
        result = evaluate(model, tiny_shards, sections=["x1"], n_null=0)
        assert result.metrics["sections"]["x1"]["in_gene_vectors"] is contained
        assert ("section x1: its spots are among the sources of the gene vectors" in caplog.text) is contained
        assert ("computed from counts that include the spots of x1" in page_of(result, tmp_path)) is contained


def test_hashes_of_cells_are_compared_up_to_the_largest_that_is_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vectors_module, "MAX_CELLS", 10)
    cells = vectors_module.smallest(np.arange(0, 400, 10, dtype=np.uint64), np.array([5, 10], np.uint64))
    assert cells.tolist() == [0, 5, *range(10, 90, 10)]
    one = GeneVectors([], np.zeros((0, 1)), np.zeros((0, 4)), np.zeros(0), cells=cells)
    # 3 of 5 hashes up to 80 are known, and those above 80 cannot be compared.
    assert one.shares_cells(np.array([0, 5, 10, 11, 12, *range(101, 200)], np.uint64)) is True
    assert one.shares_cells(np.array([0, 11, 12, 13, 14, 15], np.uint64)) is False, "one may be equal by chance"
    assert one.shares_cells(np.array([0, 5, *range(21, 30)], np.uint64)) is False, "too small a share"
    assert one.shares_cells(np.array([0, *range(101, 200)], np.uint64)) is None, "too few can be compared"
    assert GeneVectors([], np.zeros((0, 1)), np.zeros((0, 4)), np.zeros(0)).shares_cells(cells) is None


def test_damaged_hashes_of_cells_are_refused(tmp_path: Path):
    for cells in (
        np.zeros(3, np.float32),
        np.zeros((2, 2), np.uint64),
        np.zeros(vectors_module.MAX_CELLS + 1, np.uint64),
    ):
        bad = GeneVectors(
            ["human:A"], np.ones((1, 2), np.float32), np.ones((1, 4), np.float32), np.ones(1, np.float32), cells=cells
        )
        with pytest.raises(ValueError, match="the array cells has dtype"):
            bad.check(tmp_path)
