"""HEST-Benchmark: the recipe equals an independent computation, each variant changes one choice, and errors name the file."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest
import timm
import torch
from comtip_shards.sections.benchmark import BenchmarkSection
from safetensors.torch import save_file
from scipy.stats import pearsonr
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from comtip_fast.benchmarks.hest import run as hest_run
from comtip_fast.benchmarks.hest.folder import BenchmarkSample, BenchmarkTask, Fold, H5Patches, read_benchmark
from comtip_fast.benchmarks.hest.recipe import ALPHAS, FoldData, best_alpha, score_fold
from comtip_fast.benchmarks.hest.run import HestScores, benchmark_hest, seen_in_training
from comtip_fast.benchmarks.hest.variants import RECIPE, VARIANTS
from comtip_fast.cli import main
from comtip_fast.data.tile_sources import TileGeometry
from comtip_fast.evaluation.encoders import RunEncoder
from comtip_fast.lineage import Lineage, LineageRun, LineageSection
from testkit.hest_benchmark import TASKS, write_embeddings, write_hest_benchmark

WIDTH = 400
"""Features of the embeddings, more than the 256 components."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hest_benchmark(tmp_path_factory.mktemp("hest") / "bench", spots=270, px=8, silent="S3")


@pytest.fixture(scope="module")
def embeddings(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_embeddings(tmp_path_factory.mktemp("hest") / "embeddings", folder, WIDTH)


@pytest.fixture(scope="module")
def scores(folder: Path, embeddings: Path) -> HestScores:
    names = ["recipe", "no_pca", "cp10k", "nan_as_zero"]
    return benchmark_hest(folder, [f"embeddings:{embeddings}"], variants=names, device="cpu")


def independent(folder: Path, embeddings: Path, *, pca: bool = True, cp10k: bool = False) -> dict[tuple, np.ndarray]:
    """Return {(task, fold): PCC per gene}, written from the recipe's description with sklearn and scipy alone."""
    out = {}
    for task in sorted(p for p in folder.iterdir() if p.is_dir()):
        genes = json.loads((task / "var_50genes.json").read_text())["genes"]
        for fold in range(len(list((task / "splits").glob("*.csv"))) // 2):
            halves = []
            for half in ("train", "test"):
                xs, ys = [], []
                for row in csv.DictReader((task / "splits" / f"{half}_{fold}.csv").open()):
                    with h5py.File(embeddings / task.name / f"{row['sample_id']}.h5") as file:
                        xs.append(file["embeddings"][:])
                        barcodes = [b[0].decode() for b in file["barcodes"][:]]
                    data = ad.read_h5ad(task / row["expr_path"])
                    frame = data.to_df().astype(np.float64)
                    if cp10k:
                        frame = frame.div(frame.sum(axis=1), axis=0) * 1e4
                    ys.append(np.log1p(frame.loc[barcodes, genes].to_numpy()))
                halves.append((np.concatenate(xs), np.concatenate(ys)))
            (x, y), (x_test, y_test) = halves
            if pca:
                pipe = make_pipeline(StandardScaler(), PCA(256, random_state=1))
                x, x_test = pipe.fit_transform(x).astype(np.float32), pipe.transform(x_test).astype(np.float32)
            model = Ridge(alpha=100 / (x.shape[1] * y.shape[1]), solver="lsqr", fit_intercept=False, max_iter=1000)
            predicted = model.fit(x, y).predict(x_test)
            out[task.name, fold] = np.array(
                [
                    np.nan if np.ptp(y_test[:, g]) == 0 else pearsonr(y_test[:, g], predicted[:, g])[0]
                    for g in range(len(genes))
                ]
            )
    return out


@pytest.mark.parametrize(("name", "options"), [("recipe", {}), ("no_pca", {"pca": False}), ("cp10k", {"cp10k": True})])
def test_scores_equal_an_independent_computation(
    folder: Path, embeddings: Path, scores: HestScores, name: str, options: dict
):
    expected = independent(folder, embeddings, **options)
    own = scores.genes[scores.genes["variant"] == name]
    genes = own.groupby(["task", "fold"])["pcc"].apply(lambda v: v.to_numpy())
    assert set(genes.index) == set(expected)
    for key, want in expected.items():
        np.testing.assert_allclose(genes[key], want, atol=2e-5)
    summary = scores.summary().query("variant == @name").set_index("task")["pcc"]
    means = {t: np.mean([want.mean() for (task, _), want in expected.items() if task == t]) for t in TASKS}
    assert np.isnan(means["IDC"])
    assert np.isnan(summary["IDC"])  # a gene of section S3 has no counts
    for task in ("READ", "HCC"):
        assert summary[task] == pytest.approx(means[task], abs=2e-5)
    assert 0.1 < means["READ"] < 0.95
    assert np.isnan(summary["average"])


def test_the_average_leaves_out_hcc_and_nan_as_zero_counts(scores: HestScores):
    genes = scores.genes.query("variant == 'recipe'").fillna({"pcc": 0.0})
    zeroed = genes.groupby(["task", "fold"])["pcc"].mean().groupby("task").mean()
    summary = scores.summary().query("variant == 'nan_as_zero'").set_index("task")
    for task in TASKS:
        assert summary.loc[task, "pcc"] == pytest.approx(zeroed[task])
    assert summary.loc["average", "pcc"] == pytest.approx((zeroed["IDC"] + zeroed["READ"]) / 2)
    assert summary.loc["IDC", "n_undefined"] == 1
    assert summary.loc["HCC", "n_undefined"] == 0


def fold(rng: np.random.Generator, sections: int, n: int = 60, noise: float = 0.5) -> FoldData:
    x = rng.normal(size=(sections * n, 20))
    section = np.repeat(np.arange(sections), n)
    y = np.exp(x[:, :4] + noise * rng.normal(size=(len(x), 4)) + 3 * section[:, None])
    return FoldData(x, np.log1p(y), np.log1p(y), section)


def test_per_section_does_not_reward_differences_between_sections():
    """A difference in level between test sections, which the features show, raises the pooled correlation only."""
    rng = np.random.default_rng(0)
    train, test = fold(rng, 2, noise=3.0), fold(rng, 2, noise=3.0)
    for data in (train, test):
        data.features_NF[:, 19] = data.section_N * 10.0
    pooled, within = (score_fold(train, test, VARIANTS[v]).mean for v in ("recipe", "per_section"))
    assert pooled > within + 0.1
    one = score_fold(train, FoldData(*(v[test.section_N == 0] for v in vars(test).values())), RECIPE)
    other = score_fold(train, FoldData(*(v[test.section_N == 1] for v in vars(test).values())), RECIPE)
    assert within == pytest.approx((one.mean + other.mean) / 2, rel=1e-6)


def test_cross_validation_leaves_training_sections_out():
    rng = np.random.default_rng(0)
    x, section = rng.normal(size=(120, 70)), np.repeat(np.arange(3), 40)
    signal = x @ rng.normal(size=(70, 6)) / np.sqrt(70)
    chosen = []
    for noise in (0.0, 1.5):
        y = signal + noise * rng.normal(size=signal.shape)
        scores = []
        for alpha in ALPHAS:
            parts = []
            for s in range(3):
                model = Ridge(alpha=alpha, fit_intercept=False).fit(x[section != s], y[section != s])
                found = model.predict(x[section == s])
                parts.append(np.mean([pearsonr(y[section == s][:, g], found[:, g])[0] for g in range(6)]))
            scores.append(np.mean(parts))
        chosen.append(ALPHAS[int(np.argmax(scores))])
        assert best_alpha(x, y, section) == chosen[-1]
    assert chosen[0] < chosen[1]
    assert best_alpha(x, signal, np.zeros(120, np.int64)) < 1


def test_fewer_features_than_components_are_recorded(folder: Path):
    scores = benchmark_hest(folder, ["colour"], tasks=["READ"], variants=["recipe"], device="cpu")
    assert scores.folds["n_components"].tolist() == [3, 3]
    assert scores.folds["alpha"].tolist() == pytest.approx([100 / (3 * 8)] * 2)
    assert (scores.folds["pcc"] > 0.3).all()  # the expression depends on the colour


def test_patches_are_joined_by_barcode(folder: Path, tmp_path: Path):
    """Colour carries the signal, so joining by row would lose it; without the file's two first spots, nothing fails."""
    (task,) = read_benchmark(folder, ["READ"])
    patches = H5Patches(task.samples()["R1"].patches)
    assert len(patches) == 268
    assert patches.barcodes != sorted(patches.barcodes, key=lambda b: int(b.rpartition("B")[2]))


def test_patches_are_cropped_to_the_width_of_the_model(tmp_path: Path):
    folder = write_hest_benchmark(tmp_path / "bench", {"READ": ("R1", "R2")}, spots=4, px=32)
    path = folder / "READ/patches/R1.h5"
    with h5py.File(path, "r+") as file:
        file["img"][:] = 200
        file["img"][:, 8:24, 8:24] = 50
    cropped = H5Patches(path, TileGeometry(16, 56.0, 1.0)).all()
    assert cropped.shape == (2, 16, 16, 3)
    assert (cropped[:, 2:-2, 2:-2] == 50).all()
    assert H5Patches(path, TileGeometry(16, 224.0, 1.0), whole=True).all()[0, 0, 0, 0] == 200
    with pytest.raises(ValueError, match=r"R1\.h5: patches are 112 um wide, but the model reads tiles of 224 um"):
        H5Patches(path, TileGeometry(16, 224.0, 1.0))
    with h5py.File(path, "r+") as file:
        values = file["img"][:].astype("f4")
        del file["img"]
        file["img"] = values
    with pytest.raises(ValueError, match=r"R1\.h5: img is float32 of shape .* expected uint8"):
        H5Patches(path, TileGeometry(16, 56.0, 1.0))


def test_a_timm_model_with_random_weights_or_a_file(folder: Path, tmp_path: Path):
    name = "test_vit"
    torch.manual_seed(3)
    network = timm.create_model(name, num_classes=0)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    torch.save({"state_dict": network.state_dict()}, tmp_path / "weights.pth")
    specs = [
        f"timm:{name}",
        f"timm:{name}@{tmp_path / 'weights.safetensors'}",
        f"timm:{name}@{tmp_path / 'weights.pth'}",
    ]
    scores = benchmark_hest(folder, specs, tasks=["READ"], variants=["recipe"], device="cpu")
    pcc = scores.folds.groupby("encoder", sort=False)["pcc"].first()
    assert pcc.index.tolist() == ["timm:test_vit (random weights)", "timm:test_vit", "timm:test_vit (2)"]
    assert pcc.iloc[1] == pytest.approx(pcc.iloc[2])
    assert pcc.iloc[0] != pytest.approx(pcc.iloc[1])
    other = timm.create_model("test_resnet", num_classes=0)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"lacks \d+ of the weights of test_vit"):
        benchmark_hest(folder, [f"timm:{name}@{tmp_path / 'other.safetensors'}"], device="cpu")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut\.safetensors: cannot be read as weights"):
        benchmark_hest(folder, [f"timm:{name}@{tmp_path / 'cut.safetensors'}"], device="cpu")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="holds a Tensor and no weights; save a state dict"):
        benchmark_hest(folder, [f"timm:{name}@{tmp_path / 'tensor.pth'}"], device="cpu")
    torch.save({k: v[..., :1] for k, v in network.state_dict().items()}, tmp_path / "shapes.pth")
    with pytest.raises(ValueError, match=r"shapes\.pth: does not fit test_vit \(size mismatch"):
        benchmark_hest(folder, [f"timm:{name}@{tmp_path / 'shapes.pth'}"], device="cpu")
    with pytest.raises(ValueError, match="no model of this name"):
        benchmark_hest(folder, ["timm:hf-hub:a/b"], device="cpu")


def test_the_command_scores_a_run_next_to_embeddings(folder: Path, embeddings: Path, quick: Path, tmp_path, capsys):
    arguments = [
        "bench",
        "hest",
        str(folder),
        "--tasks",
        "READ",
        "HCC",
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    assert main([*arguments, "--encoder", str(quick), f"embeddings:{embeddings}"]) == 2
    assert "112 um wide, but the model reads tiles of 224 um; set --whole-patch" in capsys.readouterr().err
    assert main([*arguments, "--encoder", str(quick), f"embeddings:{embeddings}", "--whole-patch"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:5] == ["encoder", "variant", "READ", "HCC", "average"]
    assert len(table) == 2 + 2 * len(VARIANTS)
    found = json.loads((tmp_path / "out/hest.json").read_text())
    assert found["encoders"]["run"]["trained_on"] == []
    assert found["encoders"]["run"]["whole_patch"] is True
    assert {r["variant"] for r in found["summary"]} == set(VARIANTS)
    with (tmp_path / "out/hest_genes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2 * len(VARIANTS) * 8  # encoders, tasks, folds, variants, genes


def fractional(path: Path) -> None:
    """Write patches with values from 0 to 1."""
    with h5py.File(path, "a") as file:
        values = file["img"][:].astype(np.float32) / 255
        del file["img"]
        file["img"] = values


def test_training_on_the_benchmark_is_reported(folder: Path):
    def lineage(section_id: str, dataset: str, donor: str, split: str) -> Lineage:
        facts = {"species": "human", "tissue": "breast", "split": split}
        section = LineageSection(section_id=section_id, dataset=dataset, donor=donor, **facts)
        return Lineage(runs=(LineageRun(name="r", sections=(section,)),))

    tasks = read_benchmark(folder)
    assert seen_in_training(lineage("S1", "x", "d", "train"), tasks) == ["S1"]
    assert seen_in_training(lineage("hest_s2", "HEST-1k", "d", "val"), tasks) == ["S2"]
    assert seen_in_training(lineage("S1", "x", "d", "test"), tasks) == []
    assert seen_in_training(lineage("other", "x", "d", "train"), tasks) == []


def test_all_sections_of_a_donor_that_training_used_are_reported(monkeypatch: pytest.MonkeyPatch):
    """A patient has up to 15 sections in the benchmark."""
    listed = {
        i.lower(): BenchmarkSection("READ", i, "scored", donor, "a list")
        for i, donor in (
            ("S1", "Study: patient 1"),
            ("S2", "Study: Patient  1"),
            ("S3", "Study: patient 2"),
            ("S4", "unknown"),
        )
    }
    monkeypatch.setattr(hest_run, "load_benchmark", lambda: listed)
    samples = tuple(BenchmarkSample("READ", i, Path("p"), Path("e")) for i in ("S1", "S2", "S3", "S4"))
    tasks = [BenchmarkTask("READ", ("G",), (Fold(0, samples[:2], samples[2:]),))]

    def trained_on(donor: str, parents_known: bool = True) -> Any:
        facts = {"species": "human", "tissue": "bowel", "split": "train"}
        run = LineageRun(name="r", sections=(LineageSection(section_id="other", dataset="x", donor=donor, **facts),))
        encoder = object.__new__(RunEncoder)
        encoder.predictor = SimpleNamespace(lineage=Lineage(runs=(run,), parents_known=parents_known))
        encoder.label, encoder.facts = "r", {}
        return hest_run.encoder_facts(encoder, tasks, False)["trained_on"]

    assert trained_on("study: patient 1") == ["S1", "S2"]
    assert trained_on("unknown") == []
    # An export without lineage may have been trained on anything before.
    assert trained_on("me", parents_known=False) is None
    assert trained_on("study: patient 2", parents_known=False) == ["S3"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "READ/splits/test_1.csv").unlink(), "expected train_i.csv and test_i.csv"),
        (lambda f: (f / "READ/var_50genes.json").write_text("{}"), "not a gene list"),
        (lambda f: (f / "READ/var_50genes.json").write_text("[]"), "not a JSON object with the key genes"),
        (lambda f: fractional(f / "READ/patches/R1.h5"), r"img is float32 of shape .*; expected uint8"),
        (lambda f: (f / "READ/var_50genes.json").write_text('{"genes": 5}'), "not a list of at least one name"),
        (lambda f: (f / "READ/var_50genes.json").write_text('{"genes": ["G0", 1]}'), "entry 1 .* is 1, not text"),
        (lambda f: (f / "READ/var_50genes.json").write_text('{"genes": ["G0", "G0"]}'), "duplicate gene 'G0'"),
        (lambda f: (f / "READ/adata/R1.h5ad").unlink(), "R1.h5ad: no such file"),
        (lambda f: (f / "READ/patches/R2.h5").unlink(), "R2.h5: no such file"),
        (lambda f: (f / "READ/var_50genes.json").write_text('{"genes": ["G0", "NONE"]}'), "lacks 1 of 2 genes"),
        (
            lambda f: (f / "READ/splits/test_0.csv").write_text(
                "sample_id,patches_path,expr_path\nR2,patches/R2.h5,x\n"
            ),
            "trains and tests on R2",
        ),
        (
            lambda f: (f / "READ/splits/test_0.csv").write_text("sample_id,patches_path,expr_path\nR1,../../x.h5,y\n"),
            "not a path inside",
        ),
    ],
)
def test_errors_name_the_file_and_the_fix(tmp_path: Path, damage, message: str):
    folder = write_hest_benchmark(tmp_path / "bench", {"READ": ("R1", "R2")}, spots=8, px=8)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        benchmark_hest(folder, ["colour"], variants=["recipe"], device="cpu")


def test_unknown_names_are_refused(folder: Path):
    with pytest.raises(FileNotFoundError, match="no task NONE; its tasks: HCC, IDC, READ"):
        benchmark_hest(folder, ["colour"], tasks=["NONE"])
    with pytest.raises(ValueError, match="`variants` nope: no such variant"):
        benchmark_hest(folder, ["colour"], variants=["nope"])
    with pytest.raises(ValueError, match="`encoders`: the list is empty"):
        benchmark_hest(folder, [])
    with pytest.raises(FileNotFoundError, match="not an existing run or export, nor the name of an encoder"):
        benchmark_hest(folder, ["nothing"])


def test_encoders_are_opened_before_any_is_scored(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hest_run, "score_task", lambda *_: pytest.fail("scored before all encoders were opened"))
    with pytest.raises(FileNotFoundError, match="nothing: not an existing run"):
        benchmark_hest(folder, ["colour", "nothing"], device="cpu")
