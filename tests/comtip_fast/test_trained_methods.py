"""Methods that evaluation trains: they find a known truth that the linear probe misses, and nothing in shuffled pairs."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from comtip_shards import ShardSet
from comtip_shards.builder.build import build_shards
from comtip_shards.sources import open_source
from scipy import sparse

from comtip_fast.cli import main
from comtip_fast.config.io import load_config
from comtip_fast.data.expression.levels import log1p_cp10k
from comtip_fast.data.tile_sources import ShardTiles
from comtip_fast.evaluation.train_reference import TrainReference
from comtip_fast.evaluation.trained import TrainOptions, fit
from comtip_fast.evaluation.trained.bleep import nearest_average
from comtip_fast.evaluation.trained.encoder import initial_encoder
from comtip_fast.evaluation.trained.fit import TrainedMethod, fit_methods
from comtip_fast.evaluation.trained.regression import RegressionTask
from comtip_fast.evaluation.trained.targets import Targets
from comtip_fast.evaluation.trained.task import ExpressionTask
from comtip_fast.inference import Predictor
from comtip_fast.inference.feature_store import FeatureColumns
from comtip_fast.metrics import mean_pcc
from comtip_fast.objectives import masked_mse, soft_contrastive
from comtip_fast.training.task import build_task
from comtip_fast.training.trainer import Trainer
from testkit.tiny import write_tiny_source
from tests.conftest import TILES, TINY

EPOCHS = 24


@pytest.fixture(scope="module")
def bent(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Return a set in which expression is highest at medium colour, so that it hardly correlates with colour."""
    folder = tmp_path_factory.mktemp("bent")
    source = write_tiny_source(folder / "source", side=10, response=lambda field: np.cos(1.5 * np.pi * field)).parent
    build_shards(open_source(source), folder / "shards", **TILES)
    return ShardSet(folder / "shards")


@pytest.fixture(scope="module")
def run(bent: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of two steps, whose encoder has hardly learnt anything."""
    settings = ["train.steps=2", "train.validate_every=0", "train.device=cpu", f"data.shards={bent.path}"]
    # Stain normalisation and jitter move colours, which expression depends on here.
    settings += ["data.stain=none", "data.jitter=0", "train.log_every=50", "optim.lr=2e-3"]
    config = load_config(None, [*TINY, *settings])
    folder = tmp_path_factory.mktemp("run") / "run"
    Trainer(build_task(config, torch.device("cpu")), config, folder).fit()
    return folder


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return Predictor.load(run)


def fitted(predictor: Predictor, shards: ShardSet, *methods: str, **options) -> list[TrainedMethod]:
    settings = TrainOptions(methods, **{"epochs": EPOCHS} | options)
    return fit_methods(settings, predictor, TrainReference(predictor, shards), [])


def scored_section(shards: ShardSet, keys: list[str]):
    """Return tiles, stain and measured log1p CP10K of the test section."""
    spots = shards.select(split="test")
    rows = [[g.key for g in shards.genes].index(k) for k in keys]
    measured = log1p_cp10k(shards.counts(spots))[:, rows].toarray()
    return ShardTiles(shards, spots), shards.stain(shards.section_number("x1")), measured


def score(method: TrainedMethod, shards: ShardSet) -> float:
    keys = method.task.data.predictor.trained_genes
    tiles, stain, measured = scored_section(shards, keys)
    return mean_pcc(measured, method.predict(tiles, stain, "human_breast", keys))


def probe_score(predictor: Predictor, shards: ShardSet) -> float:
    """Return the score of the linear probe: ridge regression on the encoder's features."""
    keys = predictor.trained_genes
    tiles, stain, measured = scored_section(shards, keys)
    ridge = TrainReference(predictor, shards).ridge("human_breast", "ridge_features", "cp10k", keys)
    pooled = predictor.image_features(tiles, stain, readout=False).pooled_Nd
    found = ridge.predict({"encoder features": FeatureColumns(pooled)}, len(pooled), np.arange(len(keys)))
    return mean_pcc(measured, found)


# -- a known truth -----------------------------------------------------------------------------------------------


def test_training_finds_what_the_linear_probe_misses(run: Path, bent: ShardSet, monkeypatch: pytest.MonkeyPatch):
    narrow = Predictor.load(run)
    # One channel is left to the linear probe; training can restore the others.
    with torch.no_grad():
        narrow.model.vision.norm.weight[1:] = 0
    probe = probe_score(narrow, bent)
    for name, factor in (("finetune", 0.1), ("bleep", 1.0)):
        monkeypatch.setattr(fit, "RATES", (factor,))
        (method,) = fitted(narrow, bent, name)
        assert score(method, bent) > max(probe, 0.0) + 0.3, name
        assert method.facts["stopped_on"] == ["v1"]
        assert 0 < method.facts["best_step"] <= method.facts["steps"]


def test_shuffled_pairs_give_a_score_near_zero(predictor: Predictor, bent: ShardSet, monkeypatch: pytest.MonkeyPatch):
    real, rng = Targets.of.__func__, np.random.default_rng(0)

    def shuffled(cls, keys, section_N, values_NG, known_SG):
        # Each gene alone: genes that share one order would all be predicted right, or all wrong.
        values = values_NG.toarray()
        for s in np.unique(section_N):
            values[section_N == s] = rng.permuted(values[section_N == s], axis=0)
        return real(cls, keys, section_N, sparse.csr_matrix(values), known_SG)

    monkeypatch.setattr(Targets, "of", classmethod(shuffled))
    monkeypatch.setattr(fit, "RATES", (1.0,))
    for method in fitted(predictor, bent, "finetune", "bleep", epochs=10):
        assert abs(score(method, bent)) < 0.15, method.name


# -- parts -------------------------------------------------------------------------------------------------------


def test_the_average_of_the_nearest_equals_a_direct_computation():
    rng = np.random.default_rng(0)
    query, keys = rng.normal(size=(7, 5)), rng.normal(size=(40, 5))
    values, known = rng.normal(size=(40, 6)).astype(np.float32), rng.random((40, 6)) < 0.7
    known[:, 5] = False
    got = nearest_average(torch.from_numpy(query), torch.from_numpy(keys), values, known, (3, 10, 500))
    assert set(got) == {3, 10, 500}
    for k, found in got.items():
        for i in range(7):
            cosine = [q @ query[i] / np.linalg.norm(q) / np.linalg.norm(query[i]) for q in keys]
            nearest = sorted(range(40), key=lambda j: -cosine[j])[:k]
            for g in range(6):
                own = [values[j, g] for j in nearest if known[j, g]]
                assert found[i, g] == pytest.approx(np.mean(own) if own else 0.0, abs=1e-5)


def test_losses_equal_direct_formulas():
    rng = np.random.default_rng(0)
    predicted, target, known = rng.normal(size=(4, 3)), rng.normal(size=(4, 3)), rng.random((4, 3)) < 0.6
    errors = [(predicted[i, g] - target[i, g]) ** 2 for i in range(4) for g in range(3) if known[i, g]]
    tensors = [torch.from_numpy(x) for x in (predicted, target, known)]
    assert float(masked_mse(*tensors)) == pytest.approx(np.mean(errors))
    nothing = torch.zeros(4, 3, dtype=torch.bool)
    assert float(masked_mse(tensors[0], tensors[1], nothing)) == 0.0

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max())
        return e / e.sum()

    want = 0.0
    for i in range(4):
        soft = softmax((predicted @ predicted[i] + target @ target[i]) / 2)
        want -= float(soft @ np.log(softmax(predicted @ target[i]))) / 8
        column = np.array(
            [softmax((predicted @ predicted[j] + target @ target[j]) / 2)[i] for j in range(4)]
        )  # the loss transposes the targets too
        want -= float(column @ np.log(softmax(target @ predicted[i]))) / 8
    assert float(soft_contrastive(tensors[0], tensors[1])) == pytest.approx(want)


def test_targets_are_centred_within_sections_and_scaled(tmp_path: Path):
    rng = np.random.default_rng(0)
    values, section = rng.random((12, 4)), np.repeat([0, 1], 6)
    values[section == 1] += 3
    known = np.array([[True, True, False, False], [True, False, True, False]])
    targets = Targets.of(list("abcd"), section, sparse.csr_matrix(values), known)
    z, of_spots = targets.of_spots(np.arange(12))
    assert (of_spots == known[section]).all()
    assert (z[~of_spots] == 0).all()
    centred = [values[section == s, 0] - values[section == s, 0].mean() for s in (0, 1)]
    np.testing.assert_allclose(z[:, 0], np.concatenate(centred) / np.concatenate(centred).std(), rtol=1e-5)
    np.testing.assert_allclose(targets.level_G, [values[:, 0].mean(), values[:6, 1].mean(), values[6:, 2].mean(), 0])
    back = targets.expression(np.ones((2, 4)))
    assert (back[:, 3] == 0).all()  # measured nowhere
    np.testing.assert_allclose(back[:, 0], values[:, 0].mean() + np.concatenate(centred).std())


def test_first_weights_and_the_choice_of_the_learning_rate(predictor: Predictor, bent: ShardSet):
    (method,) = fitted(predictor, bent, "finetune", epochs=1)
    by_rate = method.facts["validation_pcc_by_lr"]
    assert set(by_rate) == {"0.002", "0.0002"}
    assert method.facts["validation_pcc"] >= max(by_rate.values())  # or that of the probe
    data = method.task.data
    task = RegressionTask(data, method.task.config, pretrained=True)
    start = TrainedMethod("finetune", task, {})
    assert score(start, bent) == pytest.approx(probe_score(predictor, bent), abs=1e-3)
    # The supervised regressor starts from the weights that pretraining started from.
    supervised = RegressionTask(data, method.task.config, pretrained=False)
    weight, initial, trained = (
        v.blocks[0].mlp.fc1.weight
        for v in (supervised.module.vision, initial_encoder(predictor, 0), predictor.model.vision)
    )
    assert torch.equal(weight, initial)
    assert not torch.equal(weight, trained)
    assert weight.requires_grad


# -- the command -------------------------------------------------------------------------------------------------


def test_the_command_scores_in_every_file_and_continues(
    run: Path, predictor: Predictor, bent: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fit, "RATES", (1.0,))
    arguments = ["evaluate", str(run), "--shards", str(bent.path), "--device", "cpu", "--null-draws", "3"]
    arguments += ["--bootstrap", "20", "--epochs", "2", "--tasks", "finetune", "bleep", "--out"]
    assert main([*arguments, str(tmp_path / "one")]) == 0
    metrics = json.loads((tmp_path / "one" / "metrics.json").read_text())
    for name in ("finetune", "bleep"):
        for entry in (metrics["cohorts"]["human_breast"], metrics["sections"]["x1"]):
            assert entry[name]["raw"] is None
            assert np.isfinite(entry[name]["cp10k"]["partial_pcc_50_hvg"])
        assert metrics["trained_methods"][name]["epochs"] == 2
    with (tmp_path / "one" / "genes.csv").open() as file:
        genes = list(csv.DictReader(file))
    per_gene = [float(r["pcc_finetune"] or 0) for r in genes if r["most_variable"] == "1"]
    entry = metrics["sections"]["x1"]["finetune"]["cp10k"]
    assert entry["mean_pcc_50_hvg"] == pytest.approx(np.mean(per_gene), abs=1e-5)
    assert "BLEEP-like" in (tmp_path / "one" / "report.html").read_text()
    assert "bleep" in (tmp_path / "one" / "intervals.csv").read_text()
    tasks = json.loads((tmp_path / "one" / "tasks.json").read_text())
    methods = {r["method"] for r in tasks["rows"] if r["task"] == "finetune" and r["metric"] == "pcc_50"}
    assert methods == {
        "comtip fine-tuned",
        "comtip zero-shot",
        "mean of training",
        "ridge, comtip encoder",
        "ridge, colour",
    }
    (row,) = [r for r in tasks["rows"] if (r["method"], r["metric"]) == ("comtip fine-tuned", "pcc_50")]
    assert row["value"] == pytest.approx(entry["mean_pcc_50_hvg"])
    assert row["low"] <= row["value"] <= row["high"]
    # After an interruption, a training that is complete is not repeated.
    monkeypatch.setattr(RegressionTask, "loss", None)
    options = TrainOptions(("finetune",), 2, tmp_path / "one" / "trained")
    hvg = metrics["sections"]["x1"]["genes_50_hvg"]
    (again,) = fit_methods(options, predictor, TrainReference(predictor, bent), hvg)
    assert again.facts == metrics["trained_methods"]["finetune"]


def test_the_seed_determines_the_result_also_after_an_interruption(
    predictor: Predictor, bent: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fit, "RATES", (1.0,))
    real, steps, stop_at = ExpressionTask.batch, [], [0]

    def recorded(self, spots, step, epoch):
        if step == stop_at[0]:
            raise InterruptedError("test")
        steps.append(step)
        return real(self, spots, step, epoch)

    def predicted(**options) -> np.ndarray:
        (method,) = fitted(predictor, bent, "bleep", epochs=1, **options)
        tiles, stain, _ = scored_section(bent, predictor.trained_genes)
        return method.predict(tiles, stain, "human_breast", predictor.trained_genes)

    monkeypatch.setattr(ExpressionTask, "batch", recorded)
    whole, other = predicted(seed=0), predicted(seed=1)
    stop_at[0] = 5
    with pytest.raises(InterruptedError):
        predicted(seed=0, folder=tmp_path)
    stop_at[0] = 0
    steps.clear()
    assert (predicted(seed=0, folder=tmp_path) == whole).all()
    assert (other != whole).any()
    assert steps[0] == 5  # from the checkpoint of step 4


def test_bad_input_is_named(
    run: Path, predictor: Predictor, bent: ShardSet, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    arguments = ["evaluate", str(run), "--shards", str(bent.path), "--out", str(tmp_path), "--device", "cpu"]
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--tasks", "finetune", "--epochs", "0"])
    assert "--epochs: '0': give an integer of at least 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no such method; choose from finetune, supervised, bleep"):
        fitted(predictor, bent, "resnet")
    reference = TrainReference(predictor, bent)
    reference.numbers = []
    with pytest.raises(ValueError, match="none of the model's training sections is of split 'train'"):
        fit_methods(TrainOptions(("bleep",)), predictor, reference, [])
    vision = replace(predictor.config.vision, backbone="vit_tiny_patch16_224")
    monkeypatch.setattr(predictor, "config", replace(predictor.config, vision=vision))
    for name, error, message in (
        ("hub", ValueError, "leave out the methods supervised and bleep"),
        ("none.pth", FileNotFoundError, "none.pth: the file of the image encoder's initial weights is missing"),
    ):
        monkeypatch.setattr(predictor.bundle, "initial_weights", name)
        with pytest.raises(error, match=message):
            fitted(predictor, bent, "finetune", "bleep")
