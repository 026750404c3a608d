"""Scores of unseen genes are compared with a mean map, shuffled controls and a ridge regression that knows the genes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from comtip_shards import ShardSet
from scipy import stats

from comtip_fast.config.io import load_config
from comtip_fast.data.expression.levels import log1p_cp10k
from comtip_fast.evaluation import unseen
from comtip_fast.evaluation.baselines import fit_ridge
from comtip_fast.evaluation.evaluate import Evaluation, evaluate
from comtip_fast.evaluation.report.summaries import intervals
from comtip_fast.evaluation.summary import summary_table
from comtip_fast.evaluation.unseen import SHUFFLES, exchanged
from comtip_fast.genes.vectors import GeneVectors
from comtip_fast.inference import GeneQuery, ImageFeatures, Predictor
from comtip_fast.training.task import build_task
from comtip_fast.training.trainer import Trainer
from testkit.shards import without_genes

REFERENCES = ("unseen_mean_map", "unseen_names_shuffled", "unseen_vectors_shuffled", "unseen_ridge")


@pytest.fixture(scope="module")
def predictor(tiny_run: Path) -> Predictor:
    return Predictor.load(tiny_run)


@pytest.fixture(scope="module")
def result(predictor: Predictor, tiny_shards: ShardSet) -> Evaluation:
    return evaluate(predictor, tiny_shards, n_null=2)


def random_vectors(shards: ShardSet) -> GeneVectors:
    keys, rng = [g.key for g in shards.genes], np.random.default_rng(0)
    vector = rng.normal(size=(len(keys), 4)).astype(np.float32)
    moments = np.tile([2.0, 1.5, 3.0, 0.5], (len(keys), 1)).astype(np.float32)
    return GeneVectors(keys, vector, moments, np.ones(len(keys), np.float32))


def correlations(a: np.ndarray, b: np.ndarray) -> list[float]:
    return [float(stats.pearsonr(a[:, g], b[:, g])[0]) for g in range(a.shape[1])]


def section(shards: ShardSet, predictor: Predictor, section_id: str) -> tuple[ImageFeatures, np.ndarray]:
    """Return the features of a section and its spots."""
    number = shards.section_number(section_id)
    spots = shards.select(sections=[number])
    xy = shards.spots.loc[spots, ["x_px", "y_px"]].to_numpy(float)
    tiles = shards.tiles(spots).transpose(0, 3, 1, 2)
    return predictor.image_features(tiles, shards.stain(number), xy), spots


def queries(shards: ShardSet, keys: list[str]) -> list[GeneQuery]:
    genes = {g.key: g for g in shards.genes}
    return [GeneQuery(genes[k].symbol, genes[k].name, k) for k in keys]


def test_no_gene_keeps_what_is_exchanged():
    for n in (2, 3, 7, 40):
        for draw in range(20):
            order = exchanged(n, 1, "test", draw)
            assert sorted(order.tolist()) == list(range(n))
            assert (order != np.arange(n)).all()
    assert (exchanged(9, 1, "test", 0) != exchanged(9, 1, "test", 1)).any()
    assert exchanged(0, 1, "test").size == 0


def test_the_mean_map_is_that_of_the_standardised_maps_of_trained_genes(result: Evaluation):
    data, entry = result.sections[0], result.metrics["sections"]["x1"]["unseen_mean_map"]
    for norm in ("cp10k", "raw"):
        mean = stats.zscore(data.predicted[norm][:, data.panel].astype(float)).mean(1)
        pcc = correlations(data.measured[norm][:, data.unseen], np.repeat(mean[:, None], data.unseen.size, 1))
        assert entry[norm]["mean_pcc_all"] == pytest.approx(np.mean(pcc))
        assert entry[norm]["mean_pcc_50_hvg"] == pytest.approx(np.mean(pcc[:50]))
        assert abs(entry[norm]["partial_pcc_50_hvg"]) <= 1


def test_genes_with_the_names_of_others_are_the_mean_over_draws(
    predictor: Predictor, tiny_shards: ShardSet, result: Evaluation
):
    """Computed from new queries, with another gene's symbol and name and the own key."""
    data, entry = result.sections[0], result.metrics["sections"]["x1"]["unseen_names_shuffled"]["cp10k"]
    own = queries(tiny_shards, [data.keys[i] for i in data.unseen])
    features, _ = section(tiny_shards, predictor, "x1")
    means = []
    for draw in range(SHUFFLES):
        order = exchanged(len(own), 0, "unseen-names", "x1", draw).tolist()
        named = [GeneQuery(own[j].symbol, own[j].name, q.key) for q, j in zip(own, order, strict=True)]
        found = predictor.predict(features, named, cohort="human_breast")["cp10k"]
        means.append(np.mean(correlations(data.measured["cp10k"][:, data.unseen], found)))
    assert np.std(means) > 0.01
    assert entry["mean_pcc_all"] == pytest.approx(np.mean(means), abs=1e-5)
    assert result.metrics["shuffled_draws"] == SHUFFLES
    # Half of the synthetic genes follow the field and half oppose it: names of others tell nothing.
    assert entry["mean_pcc_all"] < result.metrics["sections"]["x1"]["unseen_ridge"]["cp10k"]["mean_pcc_all"] - 0.2


def test_the_ridge_regression_is_trained_on_the_unseen_genes(
    predictor: Predictor, tiny_shards: ShardSet, result: Evaluation
):
    data, entry = result.sections[0], result.metrics["sections"]["x1"]["unseen_ridge"]["cp10k"]
    keys = sorted((data.keys[i] for i in data.unseen), key=data.keys.index)
    row = {g.key: i for i, g in enumerate(tiny_shards.genes)}
    assert entry["input"] == "encoder features" or "ridge_frozen" in data.baselines
    fits = []
    train = [section(tiny_shards, predictor, s) for s in ("t1", "t2")]
    label = np.repeat([0, 1], [len(spots) for _, spots in train])
    y = np.concatenate(
        [log1p_cp10k(tiny_shards.counts(spots))[:, [row[k] for k in keys]].toarray() for _, spots in train]
    )
    fits = [fit_ridge(np.concatenate([f.pooled_Nd for f, _ in train]), y, label)]
    assert entry["cv_mean_pcc"] >= fits[0].cv_pcc - 1e-6, "the better of the inputs"
    if entry["input"] == "encoder features":
        found = fits[0].predict(section(tiny_shards, predictor, "x1")[0].pooled_Nd)
        measured = data.measured["cp10k"][:, [data.keys.index(k) for k in keys]]
        assert entry["mean_pcc_all"] == pytest.approx(np.mean(correlations(measured, found)), abs=1e-5)
    assert entry["alpha"]
    assert entry["mean_pcc_all"] > 0.3


def test_vectors_of_others_are_a_control_of_vectors(predictor: Predictor, tiny_shards: ShardSet):
    """The readout predicts by vectors alone, so that names have no control."""
    vectors = random_vectors(tiny_shards)
    with_vectors = Predictor(predictor.bundle, vectors=vectors)
    found = evaluate(with_vectors, tiny_shards, n_null=2)
    data, entry = found.sections[0], found.metrics["sections"]["x1"]
    assert entry["unseen_names_shuffled"] == {"cp10k": None, "raw": None}
    keys = [data.keys[i] for i in data.unseen]
    rows = np.array([vectors.row[k] for k in keys])
    features, _ = section(tiny_shards, predictor, "x1")
    means = []
    for draw in range(SHUFFLES):
        values = vectors.vector_GK.copy()
        values[rows] = vectors.vector_GK[rows[exchanged(len(rows), 0, "unseen-vectors", "x1", draw)]]
        other = Predictor(predictor.bundle, vectors=replace(vectors, vector_GK=values))
        maps = other.predict(features, queries(tiny_shards, keys), cohort="human_breast")["raw"]
        means.append(np.mean(correlations(data.measured["raw"][:, data.unseen], maps)))
    assert np.std(means) > 0.01
    assert entry["unseen_vectors_shuffled"]["raw"]["mean_pcc_all"] == pytest.approx(np.mean(means), abs=1e-5)
    assert with_vectors.vectors is vectors, "the model is as it was"


def test_names_and_vectors_of_sentences_have_a_control_each(
    tiny_overrides: list[str], tiny_shards: ShardSet, tmp_path: Path
):
    """Without a readout, a sentence has the name and the vector: the control of one keeps the other."""
    random_vectors(tiny_shards).save(tmp_path / "v.safetensors")
    more = [f"text.gene_vectors={tmp_path / 'v.safetensors'}", "readout.kind=levels", "train.steps=2"]
    config = load_config(None, [*tiny_overrides, *more, "train.validate_every=0"])
    Trainer(build_task(config, torch.device("cpu")), config, tmp_path / "run").fit()
    model = Predictor.load(tmp_path / "run")
    with torch.no_grad():  # far from its start, where vectors hardly change a sentence
        model.model.genes.project_vector.weight.mul_(20)
    found = evaluate(model, tiny_shards, n_null=2)
    data, entry = found.sections[0], found.metrics["sections"]["x1"]
    own = queries(tiny_shards, [data.keys[i] for i in data.unseen])
    vectors, (features, _) = model.vectors, section(tiny_shards, model, "x1")
    assert vectors is not None
    rows = np.array([vectors.row[q.key] for q in own])
    named, exchanged_vectors = [], []
    for draw in range(SHUFFLES):
        order = exchanged(len(own), 0, "unseen-names", "x1", draw).tolist()
        others = [GeneQuery(own[j].symbol, own[j].name, q.key) for q, j in zip(own, order, strict=True)]
        named.append(model.predict(features, others)["cp10k"])
        values = vectors.vector_GK.copy()
        values[rows] = vectors.vector_GK[rows[exchanged(len(rows), 0, "unseen-vectors", "x1", draw)]]
        other = Predictor(replace(model.bundle, vectors=replace(vectors, vector_GK=values)))
        exchanged_vectors.append(other.predict(features, own)["cp10k"])
    measured = data.measured["cp10k"][:, data.unseen]
    for name, maps in (("unseen_names_shuffled", named), ("unseen_vectors_shuffled", exchanged_vectors)):
        want = np.mean([np.mean(correlations(measured, m)) for m in maps])
        assert entry[name]["cp10k"]["mean_pcc_all"] == pytest.approx(want, abs=1e-4)
    swapped = np.mean([np.abs(a - b).max() for a, b in zip(named, exchanged_vectors, strict=True)])
    assert swapped > 1e-3, "the two controls are not the same"


def test_references_do_not_depend_on_chunks_or_on_a_list(
    predictor: Predictor, tiny_shards: ShardSet, result: Evaluation, monkeypatch: pytest.MonkeyPatch
):
    data = result.sections[0]
    monkeypatch.setattr(unseen, "GENES_PER_CHUNK", 2)
    parts = evaluate(predictor, tiny_shards, n_null=0).metrics["sections"]["x1"]
    listed = [data.keys[i].partition(":")[2] for i in data.unseen]
    of_list = evaluate(predictor, tiny_shards, n_null=0, genes=listed).metrics["sections"]["x1"]
    for name in REFERENCES:
        for norm in ("cp10k", "raw"):
            want = result.metrics["sections"]["x1"][name][norm]
            for found in (parts[name][norm], of_list[name][norm]):
                assert (found is None) == (want is None)
                if want is not None:
                    assert found["mean_pcc_all"] == pytest.approx(want["mean_pcc_all"], abs=1e-5)
                    assert found["partial_pcc_50_hvg"] == pytest.approx(want["partial_pcc_50_hvg"], abs=1e-5)


def test_what_cannot_be_compared_has_no_score(predictor: Predictor, tiny_shards: ShardSet, result: Evaluation):
    data = result.sections[0]
    seen = [data.keys[i].partition(":")[2] for i in data.panel][:3]
    entry = evaluate(predictor, tiny_shards, n_null=0, genes=seen).metrics["sections"]["x1"]
    assert all(entry[name] == {"cp10k": None, "raw": None} for name in REFERENCES), "no unseen gene"
    one = [*seen, data.keys[data.unseen[0]].partition(":")[2]]
    entry = evaluate(predictor, tiny_shards, n_null=0, genes=one).metrics["sections"]["x1"]
    assert entry["unseen_names_shuffled"]["cp10k"] is None, "one gene has no other to exchange names with"
    assert entry["unseen_mean_map"]["cp10k"] is not None
    untrained = Predictor(predictor.bundle)
    sections = tuple(replace(s, tissue="heart") for s in predictor.lineage.own.sections)
    untrained.lineage = predictor.lineage.with_own(sections=sections)
    entry = evaluate(untrained, tiny_shards, sections=["v1"], n_null=0).metrics["cohorts"]["human_breast"]
    assert entry["unseen_ridge"] == {"cp10k": None, "raw": None}, "no training section"


def test_intervals_compare_unseen_genes_with_their_references(result: Evaluation):
    data, entry = result.sections[0], result.metrics["sections"]["x1"]
    table = intervals(data).set_index("predictor")
    rows = ["zero_shot_unseen_genes", "unseen_mean_map", "unseen_ridge"]
    assert table.index.tolist()[-3:] == rows
    scores = [entry[name]["cp10k"]["mean_pcc_50_hvg"] for name in rows]
    np.testing.assert_allclose(table.loc[rows, "mean_pcc"], scores, atol=1e-6)
    np.testing.assert_allclose(table.loc[rows, "difference"], scores[0] - np.array(scores), atol=1e-6)
    np.testing.assert_allclose(
        table.loc["ridge_colour", "difference"],
        entry["zero_shot"]["cp10k"]["mean_pcc_50_hvg"] - entry["ridge_colour"]["cp10k"]["mean_pcc_50_hvg"],
        atol=1e-6,
    )


def test_genes_that_no_training_section_measured_are_left_out_of_ridge_and_not_counted_as_zero(
    predictor: Predictor, tiny_shards: ShardSet, result: Evaluation
):
    """A targeted panel in training: the model is compared with ridge regression on the genes of the panel."""
    before = result.sections[0]
    unseen, panel = ([before.keys[i] for i in group] for group in (before.unseen, before.panel))
    train = without_genes(tiny_shards, {*unseen[:2], *panel[:3]})
    found = evaluate(predictor, tiny_shards, train_shards=train, n_null=2)
    data, entry, cohort = found.sections[0], found.metrics["sections"]["x1"], found.metrics["cohorts"]["human_breast"]
    for name, indices, lost in (("unseen_ridge", data.unseen, unseen[:2]), ("ridge_features", data.panel, panel[:3])):
        scores = entry[name]["cp10k"]
        kept = np.array([i for i in indices if data.keys[i] not in lost])
        assert scores["undefined_genes"] == 0
        assert scores["model_on_fitted"]["mean_pcc_all"] == pytest.approx(np.mean(data.pcc[kept]))
        assert cohort[name]["cp10k"]["fitted_genes"] == scores["fitted_genes"] < scores["genes"]
        assert cohort[name]["cp10k"]["model_on_fitted"]["mean_pcc_all"] == scores["model_on_fitted"]["mean_pcc_all"]
    scores, predicted = entry["unseen_ridge"]["cp10k"], data.unseen_baselines["unseen_ridge"]
    assert (scores["genes"], scores["fitted_genes"], scores["fitted_50_hvg"]) == (5, 3, 3)
    known = np.flatnonzero(np.isfinite(predicted).all(0))
    own = data.measured["cp10k"][:, data.unseen[known]]
    assert scores["mean_pcc_all"] == pytest.approx(np.mean(correlations(own, predicted[:, known])))
    table = intervals(data).set_index("predictor")
    assert table.loc["unseen_ridge", "genes"] == known.size == 3
    difference = np.mean(data.pcc[data.unseen[known]]) - scores["mean_pcc_all"]
    assert table.loc["unseen_ridge", "difference"] == pytest.approx(difference)
    assert table.loc["zero_shot_unseen_genes", "genes"] == 5
    text = summary_table(found.metrics)
    assert "3 of 5 genes, on which zero_shot has" in text
    full = result.metrics["sections"]["x1"]["unseen_ridge"]["cp10k"]
    assert full["genes"] == full["fitted_genes"] == 5
    assert full["model_on_fitted"] == result.metrics["sections"]["x1"]["zero_shot_unseen_genes"]["cp10k"]


def test_ridge_has_no_score_if_training_measured_none_of_the_genes(
    predictor: Predictor, tiny_shards: ShardSet, result: Evaluation
):
    data = result.sections[0]
    unseen = [data.keys[i] for i in data.unseen]
    listed = [k.partition(":")[2] for k in unseen]
    train = without_genes(tiny_shards, set(unseen))
    found = evaluate(predictor, tiny_shards, train_shards=train, n_null=2, genes=listed)
    entry = found.metrics["sections"]["x1"]
    for name in ("unseen_ridge", "ridge_colour", "ridge_features", "ridge_frozen"):
        assert entry[name] == {"cp10k": None, "raw": None}
    assert not {"unseen_ridge", "ridge_features"} & set(intervals(found.sections[0]).predictor)
