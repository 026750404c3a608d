"""The command line, end to end, on a tiny synthetic set."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from comtip_shards import ShardSet
from safetensors.numpy import load_file

import comtip_fast
from comtip_fast.cli import main
from comtip_fast.export_checks import HASHED, READOUT, SUMS
from comtip_fast.training.monitor.monitor import CLOCKED

ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
BUILD = ["--tile-px", "32", "--tile-um", "224", "--min-mpp", "5"]


def command(*args: object) -> list[str]:
    return [sys.executable, "-c", "import sys; from comtip_fast.cli import main; sys.exit(main())", *map(str, args)]


def run(*args: object, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*args), capture_output=True, text=True, env=ENV, timeout=300, check=False, **options)


@pytest.fixture(scope="module")
def config(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file with tiny settings, long enough for a kill during training."""
    from comtip_fast.config.io import dump_config, load_config

    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(dump_config(load_config(None, [*tiny_overrides, "train.steps=60", "train.validate_every=10"])))
    return path


def losses_of(run_dir: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [tuple(sorted((k, str(v)) for k, v in r.items() if k not in CLOCKED)) for r in rows]


def test_build_and_verify(tiny_source: Path, tmp_path: Path):
    done = run("shards", "build", tiny_source, "--out", tmp_path / "set", "--samples", "t1,x1", *BUILD)
    assert done.returncode == 0, done.stderr
    assert "2 sections, 98 spots, 30 genes" in done.stdout
    assert run("shards", "verify", tmp_path / "set").returncode == 0
    shard = next((tmp_path / "set/shards").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-5000])
    broken = run("shards", "verify", tmp_path / "set")
    assert broken.returncode == 1
    assert shard.name in broken.stdout


def test_a_run_killed_at_any_moment_and_resumed_is_the_same_run(config: Path, tmp_path: Path):
    reference = run("pretrain", "--config", config, "--out", tmp_path / "reference")
    assert reference.returncode == 0, reference.stderr
    out = tmp_path / "killed"
    kills = 0
    for delay in (0.1, 0.9, 1.7, 0.4):
        process = subprocess.Popen(
            command("pretrain", "--config", config, "--out", out, "--resume"),
            env=ENV,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        # Wait until training proceeds, then kill after a different delay each time.
        before = len((out / "metrics.jsonl").read_text().splitlines()) if (out / "metrics.jsonl").exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            path = out / "metrics.jsonl"
            if path.exists() and len(path.read_text().splitlines()) != before:
                break
            time.sleep(0.02)
        time.sleep(delay)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    done = run("pretrain", "--config", config, "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert kills >= 1
    assert losses_of(out) == losses_of(tmp_path / "reference")
    one, two = (load_file(d / "export/model.safetensors") for d in (out, tmp_path / "reference"))
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[k], two[k]) for k in one)


def test_sigterm_saves_and_exits(config: Path, tmp_path: Path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(
            "pretrain",
            "--config",
            config,
            "--out",
            out,
            "--set",
            "train.checkpoint_every=1000",
            "--set",
            "train.validate_every=0",
        ),
        env=ENV,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 143, text
    assert len(list((out / "checkpoints").glob("step_*"))) == 1
    assert not (out / "export").exists()


@pytest.fixture(scope="module")
def outputs(tiny_run: Path, tiny_shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("answers")
    genes = ["ERBB2", "ENSG00000186847.3", "TTN"]
    assert (
        main(["predict", str(tiny_run), f"{tiny_shards.path}:x1", "--genes", *genes, "--out", str(out / "p.h5ad")]) == 0
    )
    assert main(["embed", str(tiny_run), f"{tiny_shards.path}:x1", "--out", str(out / "e.h5ad")]) == 0
    return out


def test_evaluate_writes_both_files(tiny_run: Path, tiny_shards: ShardSet, tmp_path: Path, capsys):
    code = main(
        [
            "evaluate",
            str(tiny_run),
            "--shards",
            str(tiny_shards.path),
            "--out",
            str(tmp_path / "e"),
            "--null-draws",
            "5",
        ]
    )
    assert code == 0
    assert json.loads((tmp_path / "e/metrics.json").read_text())["cohorts"]["human_breast"]["zero_shot"]["cp10k"]
    assert (tmp_path / "e/report.html").stat().st_size > 50_000
    assert "zero_shot" in capsys.readouterr().out


def test_predictions_open_in_scanpy_and_squidpy(outputs: Path, tiny_shards: ShardSet):
    import scanpy as sc
    import squidpy as sq

    data = sc.read_h5ad(outputs / "p.h5ad")
    # In the order of the source, not of the shards.
    order = tiny_shards.source_order(tiny_shards.section_number("x1"))
    assert data.obs_names.tolist() == tiny_shards.spots.loc[order, "spot_id"].tolist()
    assert data.var_names.tolist() == ["ERBB2", "ENSG00000186847.3", "TTN"]
    assert data.var["symbol"].tolist() == ["ERBB2", "KRT14", "TTN"]
    # TTN is in none of the training sections and is predicted nevertheless.
    assert data.var["training"]["TTN"] == "never seen"
    assert np.isfinite(data.X).all()
    assert data.X[:, 2].std() > 0
    np.testing.assert_array_equal(data.X, data.layers["log1p_cp10k"])
    sq.gr.spatial_neighbors_knn(data, n_neighs=4)
    sc.pp.pca(data, n_comps=2)
    assert data.obsp["spatial_connectivities"].nnz > 0
    library = data.uns["spatial"]["x1"]
    assert library["images"]["hires"].ndim == 3
    xy = data.obsm["spatial"] * library["scalefactors"]["tissue_hires_scalef"]
    assert (xy <= np.array(library["images"]["hires"].shape[1::-1])).all()


def test_anndata_in_keeps_what_it_holds(outputs: Path, tiny_run: Path, tmp_path: Path):
    data = ad.read_h5ad(outputs / "p.h5ad")
    data.obs["mine"] = np.arange(data.n_obs)
    data = data[::-1].copy()
    data.write_h5ad(tmp_path / "in.h5ad")
    assert main(["embed", str(tiny_run), str(tmp_path / "in.h5ad"), "--out", str(tmp_path / "out.h5ad")]) == 0
    after = ad.read_h5ad(tmp_path / "out.h5ad")
    assert after.obs_names.tolist() == data.obs_names.tolist()
    assert after.obs["mine"].tolist() == data.obs["mine"].tolist()
    assert after.var_names.tolist() == data.var_names.tolist()
    vectors = after.obsm["X_comtip"]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    # Tiles from the small overview image, in another order: the same tissue, nearly the same vectors.
    first = ad.read_h5ad(outputs / "e.h5ad")[after.obs_names.tolist()].obsm["X_comtip"]
    assert (first * vectors).sum(1).mean() > 0.9


def test_the_same_from_python(tiny_run: Path, tiny_source: Path, tiny_shards: ShardSet, outputs: Path):
    model = comtip_fast.load(tiny_run)
    data = model.predict(f"{tiny_source}:x1", ["ERBB2"])
    assert data.shape == (49, 1)
    stored = ad.read_h5ad(outputs / "p.h5ad")
    # From the source (no JPEG) and from shards (JPEG tiles): nearly identical.
    assert np.corrcoef(data.X[:, 0], stored.X[:, 0])[0, 1] > 0.98
    every = model.predict(f"{tiny_shards.path}:x1")
    assert every.var["key"].tolist() == model.trained_genes
    assert model.embed(data).obsm["X_comtip"].shape == (49, 32)


def test_export_is_safetensors_and_json_and_predicts_the_same(tiny_run: Path, tiny_shards: ShardSet, tmp_path: Path):
    assert main(["export", str(tiny_run), "--out", str(tmp_path / "model")]) == 0
    files = {p.name for p in (tmp_path / "model").iterdir()}
    assert files == {*HASHED, READOUT, "README.md", SUMS}
    card = (tmp_path / "model/README.md").read_text()
    assert "CC0" in card
    assert "made up" in card
    spec = f"{tiny_shards.path}:x1"
    one, two = (comtip_fast.load(p).predict(spec, ["ERBB2"]).X for p in (tiny_run, tmp_path / "model"))
    np.testing.assert_array_equal(one, two)


def test_nothing_is_unpickled_on_load(tiny_run: Path, tiny_shards: ShardSet, monkeypatch: pytest.MonkeyPatch):
    import pickle

    import torch

    def refuse(*_args, **_kwargs):
        raise AssertionError("unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    assert comtip_fast.load(tiny_run).predict(f"{tiny_shards.path}:x1", ["ERBB2"]).n_obs == 49


BAD = {
    "unknown key": (
        ["pretrain", "--config", "{config}", "--out", "{tmp}/r", "--set", "train.stepz=3"],
        "did you mean train.steps",
    ),
    "no shards": (
        ["pretrain", "--config", "{config}", "--out", "{tmp}/r", "--set", "data.shards=/nowhere"],
        "/nowhere: no manifest.json",
    ),
    "a run is there": (["pretrain", "--config", "{config}", "--out", "{run}"], "--resume"),
    "no config": (["pretrain", "--config", "/nowhere.yaml", "--out", "{tmp}/r"], "/nowhere.yaml: no such file"),
    "no run": (["evaluate", "/nowhere", "--shards", "{shards}", "--out", "{tmp}/e"], "/nowhere does not exist"),
    "no training shards": (
        ["evaluate", "{run}", "--shards", "{shards}", "--train-shards", "/nowhere", "--out", "{tmp}/e"],
        "--train-shards",
    ),
    "no section": (
        ["predict", "{run}", "{shards}:zz", "--out", "{tmp}/x.h5ad"],
        "has no section 'zz'; give SHARDS:section_id with one of t1",
    ),
    "not h5ad": (["predict", "{run}", "{shards}:x1", "--out", "{tmp}/x.csv"], "ends in .h5ad"),
    "no folder": (["embed", "{run}", "{shards}:x1", "--out", "{tmp}/no/x.h5ad"], "the folder"),
    "gene twice": (
        ["predict", "{run}", "{shards}:x1", "--genes", "ERBB2", "ERBB2", "--out", "{tmp}/x.h5ad"],
        "duplicate genes: ERBB2",
    ),
    "split": (["shards", "build", "{source}", "--out", "{tmp}/s", "--split", "t1=dev"], "SECTION=train"),
    "export over": (["export", "{run}", "--out", "{run}"], "not empty"),
    "h5ad is none": (["embed", "{run}", "{tmp}/bad.h5ad", "--out", "{tmp}/x.h5ad"], "bad.h5ad"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_reported_in_one_line(
    name: str, config: Path, tiny_run: Path, tiny_shards: ShardSet, tiny_source: Path, tmp_path: Path, capsys
):
    (tmp_path / "bad.h5ad").write_bytes(b"not hdf5")
    words, message = BAD[name]
    values = {"config": config, "tmp": tmp_path, "run": tiny_run, "shards": tiny_shards.path, "source": tiny_source}
    assert main([w.format(**values) for w in words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert error.strip().splitlines()[-1].startswith("comtip: error:")


def test_tiles_of_another_size_are_refused(
    tiny_run: Path, tiny_source: Path, tiny_shards: ShardSet, tmp_path: Path, capsys
):
    other = ["--tile-px", "48", "--tile-um", "224", "--min-mpp", "5"]
    assert main(["shards", "build", str(tiny_source), "--out", str(tmp_path / "s"), *other]) == 0
    words = [
        "evaluate",
        str(tiny_run),
        "--shards",
        str(tmp_path / "s"),
        "--train-shards",
        str(tiny_shards.path),
        "--out",
        str(tmp_path / "e"),
    ]
    assert main(words) == 2
    assert "build the set again with --tile-um 224 --tile-px 32" in capsys.readouterr().err


def test_genes_and_doctor(capsys):
    assert main(["genes", "KRT14", "ENSMUSG00000045573.9"]) == 0
    out = capsys.readouterr().out
    assert "human:KRT14" in out
    assert "mouse:Penk" in out
    assert main(["genes", "1-Mar", "44621", "--species", "human"]) == 1
    assert capsys.readouterr().out.count("a spreadsheet or R may have changed MARCHF1 or MTARC1 to it") == 2
    assert main(["genes", "NOSUCHGENE1"]) == 1
    capsys.readouterr()
    assert main(["doctor"]) in (0, 1)
    out = capsys.readouterr().out
    for what in ("GPU", "Triton", "DALI", "flash-attn", "DeepSpeed"):
        assert what in out


def test_help_is_quick_and_names_every_command():
    began = time.monotonic()
    done = run("--help")
    assert done.returncode == 0
    assert time.monotonic() - began < 30
    for name in ("shards", "pretrain", "evaluate", "predict", "embed", "export", "genes", "plan", "doctor"):
        assert name in done.stdout
    probe = "import sys; from comtip_fast.cli import main\ntry: main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=ENV, check=True).stdout
    assert out.splitlines()[-1] == "False"
