"""Every option of predict, embed and export is honoured or refused, from any working directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import pytest
import torch
from comtip_shards.qc.geometry import scale
from comtip_shards.qc.result import FAIL

from comtip_fast.cli import main
from comtip_fast.config.io import load_config
from comtip_fast.shards import shards_of_run
from comtip_fast.training.task import build_task
from comtip_fast.training.trainer import Trainer
from testkit.tiny import write_tiny_source
from tests.conftest import TINY


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_shards) -> Path:
    """Return a project with ``data/shards`` and ``runs/one``, trained with a relative path to the shards."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(str(tiny_shards.path), folder / "data" / "shards")
    settings = [*TINY, "data.shards=data/shards", "train.steps=2", "train.validate_every=0", "train.checkpoint_every=1"]
    config = load_config(None, [*settings, "train.device=cpu"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Trainer(build_task(config, torch.device("cpu")), config, folder / "runs" / "one").fit()
    return folder


@pytest.mark.parametrize("options", [[], ["--checkpoint", "newest"]])
def test_a_run_is_exported_from_another_folder(
    home: Path, tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(home / "runs" / "one"), *options, "--out", "exported"]) == 0
    assert (tmp_path / "exported" / "model.safetensors").is_file()


def test_the_shards_of_a_run_are_found_and_a_missing_set_is_named(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    run = home / "runs" / "one"
    assert shards_of_run(run, "data/shards") == str(home / "data" / "shards")
    assert shards_of_run(run, "../data/shards") == "../data/shards"
    assert shards_of_run(run, "s3://bucket/shards") == "s3://bucket/shards"
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    assert main(["export", str(moved), "--checkpoint", "newest", "--out", "x"]) == 2
    assert "data.shards is data/shards, but there is no shard set at this path" in capsys.readouterr().err
    shutil.copytree(home / "data" / "shards", moved / "shards")
    assert main(["export", str(moved), "--checkpoint", "newest", "--out", "x"]) == 0


@pytest.mark.parametrize("command", ["predict", "embed"])
def test_facts_that_change_no_tile_are_recorded(home: Path, tmp_path: Path, command: str):
    run, section = str(home / "runs" / "one"), f"{home / 'data' / 'shards'}:x1"
    assert main(["embed", run, section, "--out", str(tmp_path / "a.h5ad")]) == 0
    facts = {"tissue": "breast", "donor": "P7", "platform": "ST", "licence": "CC-BY-4.0", "attribution": "A. Nonymous"}
    options = [part for name, value in facts.items() for part in (f"--{name}", value)]
    source = write_tiny_source(tmp_path / "source").parent
    for spec, more in ((tmp_path / "a.h5ad", ["--mpp", "5", "--species", "human"]), (f"{source}:x1", [])):
        out = tmp_path / "b.h5ad"
        assert main([command, run, str(spec), "--out", str(out), *options, *more]) == 0
        recorded = ad.read_h5ad(out).uns["comtip"]
        assert {name: recorded[name] for name in facts} == facts


@pytest.mark.parametrize("command", ["predict", "embed"])
def test_the_format_that_an_error_recommends_is_an_option(
    home: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
):
    run = str(home / "runs" / "one")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "--format" in capsys.readouterr().out
    source = write_tiny_source(tmp_path / "source").parent
    out = str(tmp_path / "b.h5ad")
    assert main([command, run, f"{source}:x1", "--format", "manifest", "--out", out]) == 0
    assert main([command, run, f"{source}:x1", "--format", "hest", "--out", out]) == 2
    assert main([command, run, f"{home / 'data' / 'shards'}:x1", "--format", "hest", "--out", out]) == 2
    assert "--format hest has no effect here" in capsys.readouterr().err
    assert main([command, run, out, "--format", "hest", "--mpp", "5", "--out", str(tmp_path / "c.h5ad")]) == 2
    assert "is an .h5ad file, whose format is known" in capsys.readouterr().err


def test_a_run_without_validation_leaves_valid_json(home: Path):
    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is not JSON")

    found = 0
    for path in sorted((home / "runs" / "one").rglob("*.json*")):
        texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        for text in filter(None, texts):
            json.loads(text, parse_constant=refuse)
            found += 1
    assert found > 2


@pytest.mark.parametrize("image_scale", [1.0, 0.25])
def test_the_advice_of_the_scale_check_holds_for_mpp_whatever_image_is_used(image_scale: float):
    """``--mpp`` is um per px of the positions; an image of a lower resolution has another um per px."""
    stated, pitch_full_px = 1.0, 200.0  # the array has 100 um, so that 0.5 would be right
    meta = SimpleNamespace(spot_pitch_um=100.0, platform="Visium", mpp=stated / image_scale)
    context = SimpleNamespace(section=SimpleNamespace(meta=meta), pitch_px=pitch_full_px * image_scale, mpp=meta.mpp)
    finding = scale(context)
    assert finding.status == FAIL
    factor = float(finding.advice.split(" by ")[1].split()[0])
    assert factor * stated == pytest.approx(0.5)


PLAN, EVALUATE = ["plan", "--config", "x.yaml"], ["evaluate", "run", "--shards", "set", "--out", "out"]
UNUSED = {
    "sweep's maximum": ([*PLAN, "--most", "4"], "--most", "used with --sweep only"),
    "sweep's folder": ([*PLAN, "--out", "x"], "--out", "used with --sweep only"),
    "brief as JSON": ([*PLAN, "--brief", "--json"], "--json", "--brief prints text"),
    "brief sweep": ([*PLAN, "--sweep", "--brief"], "--brief", "a sweep compares designs"),
    "sweep's JSON": ([*PLAN, "--sweep", "--out", "x", "--json"], "--json", "a sweep writes its table"),
    "epochs": ([*EVALUATE, "--epochs", "3"], "--epochs", "used by downstream tasks only"),
    "intervals": ([*EVALUATE, "--bootstrap", "0"], "--bootstrap", "used by downstream tasks only"),
    "epochs of no method": ([*EVALUATE, "--tasks", "pairs", "--epochs", "3"], "--epochs", "used by --tasks finetune"),
    "labels of no task": ([*EVALUATE, "--tasks", "pairs", "--labels", "x"], "--labels", "used by --tasks domains"),
    "gene sets": (
        [*EVALUATE, "--tasks", "pairs", "--gene-sets", "x"],
        "--gene-sets",
        "used by --tasks pathways, genes",
    ),
    "encoder": ([*EVALUATE, "--tasks", "pairs", "--encoder", "x"], "--encoder", "used by --tasks probe"),
    "shards": (["export", "run", "--shards", "x", "--out", "out"], "--shards", "used with --checkpoint only"),
    "loader's source": (["bench", "loader", "--shards", "x", "--px", "8"], "--px", "the set of --shards is built"),
    "step's source": (
        ["bench", "step", "--config", "x", "--shards", "x", "--source", "y"],
        "--source",
        "the set of --shards is built",
    ),
    "seed": (["shards", "build", "x", "--out", "y", "--seed", "1"], "--seed", "used with --auto-split only"),
    "quality": (
        ["shards", "build", "x", "--out", "y", "--codec", "png", "--quality", "9"],
        "--quality",
        "PNG is lossless",
    ),
}


@pytest.mark.parametrize("name", UNUSED)
def test_an_option_without_effect_is_refused_before_any_work(name: str, capsys: pytest.CaptureFixture[str]):
    arguments, option, why = UNUSED[name]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"{option} has no effect here: " in error
    assert why in error
