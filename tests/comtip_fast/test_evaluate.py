"""Which sections and genes an evaluation scores, and which input it rejects."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from comtip_shards import ShardSet
from comtip_shards.builder.build import build_shards
from comtip_shards.sources import open_source

from comtip_fast.data.tile_sources import ArrayTiles
from comtip_fast.evaluation.evaluate import SectionData, evaluate, write_metrics
from comtip_fast.evaluation.folds import spatial_folds
from comtip_fast.evaluation.metrics import partial_pcc_per_gene, score_columns
from comtip_fast.evaluation.nulls import null_pcc
from comtip_fast.evaluation.run import evaluate_run
from comtip_fast.evaluation.train_reference import TrainReference, spot_inputs, training_shards
from comtip_fast.genes.vectors import GeneVectors
from comtip_fast.inference import Predictor, SectionFeatures, section
from comtip_fast.inference.feature_store import FeatureColumns
from comtip_fast.metrics import pcc_per_gene
from comtip_fast.models.readout.section_statistics import ADJACENT
from testkit.tiny import TinySection, write_tiny_source

TILES = {"tile_px": 32, "tile_um": 224.0, "min_mpp": 5.0}


@pytest.fixture(scope="module")
def other_shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """A shard set with one further section and without the training sections."""
    folder = tmp_path_factory.mktemp("other")
    write_tiny_source(folder / "source", [TinySection("y1", "donor_a", "")], seed=5)
    build_shards(open_source(folder / "source"), folder / "set", **TILES)
    return ShardSet(folder / "set")


@pytest.fixture(scope="module")
def predictor(tiny_run: Path) -> Predictor:
    return Predictor.load(tiny_run)


def with_other_cohort(predictor: Predictor) -> Predictor:
    """Return the same model with metadata of another organ."""
    other = Predictor(predictor.bundle)
    sections = tuple(replace(s, tissue="heart") for s in predictor.lineage.own.sections)
    other.lineage = predictor.lineage.with_own(sections=sections)
    return other


def test_a_trained_cohort_needs_its_training_sections(predictor: Predictor, other_shards: ShardSet):
    with pytest.raises(ValueError, match=r"none of the training sections of human_breast \(t1, t2\).*`train_shards`"):
        evaluate(predictor, other_shards, n_null=2)
    with pytest.raises(ValueError, match="`train_shards`"):
        evaluate(predictor, other_shards, train_shards=other_shards, n_null=2)


def test_a_wrong_path_of_the_training_sections_is_named_by_who_stated_it(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"`train_shards` .*none: no shard set \(manifest\.json is missing\)"):
        training_shards(tmp_path, "gone", tmp_path / "none")
    with pytest.raises(
        FileNotFoundError, match=r"gone: the config of .* names this path, .* give their shard set with"
    ):
        training_shards(tmp_path, "gone", None)


def test_missing_training_sections_are_logged(predictor: Predictor, tiny_shards: ShardSet, caplog):
    more = Predictor(predictor.bundle)
    sections = predictor.lineage.own.sections
    further = replace(sections[0], section_id="t9", spots="", picture="")
    more.lineage = predictor.lineage.with_own(sections=(*sections, further))
    TrainReference(more, tiny_shards).check(["human_breast"])
    assert "lacks training sections of human_breast (t9)" in caplog.text


def test_a_section_of_a_trained_donor_is_flagged(predictor: Predictor, other_shards: ShardSet, tiny_shards: ShardSet):
    entry = evaluate(predictor, other_shards, train_shards=tiny_shards, n_null=2).metrics["sections"]["y1"]
    assert entry["donor_seen_in_training"]
    assert not entry["section_seen_in_training"]
    assert entry["hvg_from"] == "training sections"


def test_a_validation_section_is_flagged(predictor: Predictor, tiny_shards: ShardSet):
    entry = evaluate(predictor, tiny_shards, sections=["v1"], n_null=2).metrics["sections"]["v1"]
    assert entry["section_stopped_training"]
    assert not entry["section_seen_in_training"]


def test_an_untrained_cohort_is_flagged_and_has_no_ridge(predictor: Predictor, other_shards: ShardSet, tmp_path: Path):
    result = evaluate(with_other_cohort(predictor), other_shards, n_null=3)
    write_metrics(result.metrics, tmp_path / "metrics.json")
    cohort = json.loads((tmp_path / "metrics.json").read_text())["cohorts"]["human_breast"]
    assert cohort["hvg_from"] == "evaluated section"
    assert cohort["ridge_colour"]["cp10k"] is None
    assert cohort["zero_shot"]["raw"]["mean_pcc_50_hvg"] is not None
    data = result.sections[0]
    # Unseen genes are ordered by their variance in the evaluated section.
    variance = data.measured["cp10k"][:, data.unseen].var(0)
    assert (np.diff(variance) <= 1e-6).all()


def test_mean_pcc_all_covers_trained_genes_and_variable_held_out_genes_are_scored(
    predictor: Predictor, tiny_shards: ShardSet
):
    result = evaluate(predictor, tiny_shards, n_null=3)
    data: SectionData = result.sections[0]
    entry = result.metrics["sections"]["x1"]["zero_shot"]["cp10k"]
    assert {data.keys[i] for i in data.panel} == set(predictor.trained_genes)
    # The tiny set has fewer than 50 genes, so the held-out ones are among the most variable.
    assert {data.keys[i] for i in data.hvg} & set(predictor.held_out_genes)
    pcc = np.nan_to_num(pcc_per_gene(data.measured["cp10k"], data.predicted["cp10k"]))
    assert entry["mean_pcc_all"] == pytest.approx(pcc[data.panel].mean())
    assert entry["mean_pcc_50_hvg"] == pytest.approx(pcc[data.hvg].mean())
    assert data.null_pcc.shape == (3, data.panel.size)


def test_the_colour_of_the_baseline_is_chosen_on_training_sections(predictor: Predictor, tiny_shards: ShardSet):
    reference = TrainReference(predictor, tiny_shards)
    keys = predictor.trained_genes[:8]
    number = tiny_shards.section_number("x1")
    spots = tiny_shards.select(sections=[number])
    tiles, stain = ArrayTiles(tiny_shards.tiles(spots)), tiny_shards.stain(number)
    with SectionFeatures(predictor, tiles, stain) as features:
        x = spot_inputs(predictor, tiles, stain, features.pooled, features.frozen)["ridge_colour"]
    assert set(x) == {"tile colour", "stain-normalised tile colour"}
    data = reference._load("human_breast")
    assert data is not None
    colours = data.inputs["ridge_colour"].items()
    both = {i: reference._fit_groups(data, v, i, "cp10k", [keys])[0].cv_pcc for i, v in colours}
    fit = reference.ridge("human_breast", "ridge_colour", "cp10k", keys)
    assert fit is not None
    facts, every = fit.facts(), np.arange(len(keys))
    assert facts["input"] == max(both, key=lambda i: both[i])
    assert facts["cv_mean_pcc"] == pytest.approx(max(both.values()))
    # The other input is not read.
    unused = next(i for i in x if i != facts["input"])
    prediction = fit.predict(x, len(tiles), every)
    again = fit.predict(x | {unused: FeatureColumns(np.zeros((0, 3)))}, len(tiles), every)
    np.testing.assert_array_equal(prediction, again)
    np.testing.assert_allclose(fit.predict(x, len(tiles), np.array([5, 1])), prediction[:, [5, 1]])


def test_a_gene_that_one_training_section_lacks_is_fitted_on_the_other(
    predictor: Predictor, tiny_shards: ShardSet, monkeypatch: pytest.MonkeyPatch
):
    reference = TrainReference(predictor, tiny_shards)
    keys = predictor.trained_genes[:4]
    row = [g.key for g in tiny_shards.genes].index(keys[1])
    nowhere = [g.key for g in tiny_shards.genes].index(keys[2])
    data = reference._load("human_breast")
    assert data is not None
    measured = {n: m.copy() for n, m in data.measured.items()}
    measured[reference.numbers[0]][row] = False
    for m in measured.values():
        m[nowhere] = False
    reference._data["human_breast"] = replace(data, measured=measured)
    seen: list[tuple[int, int]] = []
    folds: list[tuple[np.ndarray, np.ndarray]] = []
    from comtip_fast.evaluation import train_reference as module

    real = module.fit_ridges

    def spy(x, targets, section, fold):
        seen.extend((y.shape[1], np.unique(section).size) for y in targets)
        if np.unique(section).size == 1:
            folds.append((fold, data.xy[data.section == reference.numbers[1]]))
        return real(x, targets, section, fold)

    monkeypatch.setattr(module, "fit_ridges", spy)
    x = {i: FeatureColumns(v) for i, v in data.inputs["ridge_features"].items()}
    fit = reference.ridge("human_breast", "ridge_features", "raw", keys)
    assert fit is not None
    out = fit.predict(x, 9, np.arange(4))
    assert sorted(seen) == [(1, 1), (2, 2)]
    (found, xy) = folds[0]
    np.testing.assert_array_equal(found, spatial_folds(xy))
    assert out[:, 1].std() > 0
    assert np.isnan(out[:, 2]).all()
    assert fit.fitted.tolist() == [0, 1, 3]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path):
    write_metrics({"a": [float("nan"), 1.5], "b": {"c": float("inf"), "d": 3}}, tmp_path / "m.json")
    assert json.loads((tmp_path / "m.json").read_text()) == {"a": [None, 1.5], "b": {"c": None, "d": 3}}


def test_gene_vectors_change_the_scores_of_unseen_genes_only(
    tiny_run: Path, tiny_shards: ShardSet, predictor: Predictor, tmp_path: Path
):
    keys = [g.key for g in predictor.bundle.genes]
    vector = np.random.default_rng(0).normal(size=(len(keys), 3)).astype(np.float32)
    moments = np.tile([2.0, 1.5, 3.0, 0.5], (len(keys), 1)).astype(np.float32)
    GeneVectors(keys, vector, moments, np.ones(len(keys), np.float32)).save(tmp_path / "v.safetensors")
    one, two = (
        evaluate_run(tiny_run, tiny_shards.path, null_draws=2, device="cpu", gene_vectors=vectors).metrics
        for vectors in (None, tmp_path / "v.safetensors")
    )
    one, two = one["cohorts"]["human_breast"], two["cohorts"]["human_breast"]
    for entry in (one, two):
        del entry["ridge_frozen"]["cp10k"]["model_on_fitted"], entry["ridge_frozen"]["raw"]["model_on_fitted"]
    for name in ("zero_shot_levels", "ridge_frozen"):
        assert one[name] == two[name]
        assert one[name]["cp10k"] is not None
    # The 50 most variable genes of the tiny set include held-out ones, so the mean over the trained genes is compared.
    assert one["zero_shot"]["raw"]["mean_pcc_all"] == pytest.approx(two["zero_shot"]["raw"]["mean_pcc_all"])
    assert one["zero_shot_levels"] != one["zero_shot"]
    assert one["zero_shot_unseen_genes"] != two["zero_shot_unseen_genes"]


def test_a_model_without_a_readout_has_no_scores_for_it(predictor: Predictor, tiny_shards: ShardSet):
    bare = Predictor(replace(predictor.bundle, readout=None))
    entry = evaluate(bare, tiny_shards, n_null=2).metrics["cohorts"]["human_breast"]
    assert entry["ridge_frozen"] == {"cp10k": None, "raw": None}
    assert entry["zero_shot_levels"] == entry["zero_shot"]


def test_features_of_a_section_are_read_in_blocks(
    predictor: Predictor, tiny_shards: ShardSet, monkeypatch: pytest.MonkeyPatch
):
    """Features of all spots are never in memory at once, and the scores are those of one block."""
    untrained = with_other_cohort(predictor)  # without ridge baselines, whose fit needs all training spots
    readout = untrained.bundle.readout
    assert readout is not None
    # Within 3.4 spacings of a block are nearly all spots of so small a section, so the second radius is that of adjacent spots, too.
    monkeypatch.setattr(readout, "settings", replace(readout.settings, radii=(ADJACENT, ADJACENT)))
    whole = evaluate(untrained, tiny_shards, n_null=2)
    read: list[int] = []
    real = section.SpooledFeatures.read

    def counted(self: section.SpooledFeatures, rows: np.ndarray) -> np.ndarray:
        read.append(rows.size)
        return real(self, rows)

    monkeypatch.setattr(section.SpooledFeatures, "read", counted)
    monkeypatch.setattr(section, "MIN_BLOCK", 4)
    monkeypatch.setattr(section, "MAX_BLOCK", 4)
    monkeypatch.delattr(Predictor, "image_features")
    parts = evaluate(untrained, tiny_shards, n_null=2)
    n = min(len(data.xy) for data in whole.sections)
    assert n > 40
    assert max(read) <= 4 + 12 < n, "a block of spots, with the neighbours of each"
    for one, two in zip(whole.sections, parts.sections, strict=True):
        for norm in ("cp10k", "raw"):
            np.testing.assert_allclose(one.predicted[norm], two.predicted[norm], rtol=1e-4, atol=1e-5)
        pd.testing.assert_frame_equal(one.gene_table, two.gene_table, rtol=1e-3)


def test_a_baseline_reads_its_input_in_blocks(
    predictor: Predictor, tiny_shards: ShardSet, monkeypatch: pytest.MonkeyPatch
):
    fit = TrainReference(predictor, tiny_shards).ridge("human_breast", "ridge_colour", "raw", predictor.trained_genes)
    assert fit is not None
    values, read = np.random.default_rng(0).random((50, 3)), []

    class Counted(FeatureColumns):
        def read(self, rows: np.ndarray) -> np.ndarray:
            read.append(rows.size)
            return super().read(rows)

    every = np.arange(len(predictor.trained_genes))
    want = fit.predict({fit.input: FeatureColumns(values)}, 50, every)
    monkeypatch.setattr(section, "MAX_BLOCK", 16)
    np.testing.assert_allclose(fit.predict({fit.input: Counted(values)}, 50, every), want)
    assert read == [16, 16, 16, 2]


@pytest.mark.parametrize("name", ["score", "pcc", "partial", "null"])
def test_memory_of_scores_does_not_grow_with_genes(name: str):
    n, moved = 400, np.stack([np.arange(400)[::-1]] * 3)
    covariates = np.random.default_rng(1).random((n, 2))

    def peak(genes: int) -> int:
        measured = np.random.default_rng(0).random((n, genes))
        predicted = measured[::-1].astype(np.float32)
        tracemalloc.start()
        if name == "score":
            score_columns(measured, lambda c: predicted[:, c], covariates, np.arange(genes), np.arange(50))
        elif name == "pcc":
            pcc_per_gene(measured, predicted)
        elif name == "partial":
            partial_pcc_per_gene(measured, predicted, covariates)
        else:
            null_pcc(measured, predicted, moved)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(256), peak(2048)
    assert many - few < 0.1 * (2048 - 256) * n * 8, (few, many)
