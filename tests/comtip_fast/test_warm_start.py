"""Warm start from an export: matching tensors are copied, gene rows by key, and the rest is reported."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch

from comtip_fast.cli import main
from comtip_fast.config.io import dump_config, load_config
from comtip_fast.export import Bundle
from comtip_fast.training.checkpoint import store
from comtip_fast.training.export_checkpoint import _fix_of, export_checkpoint
from comtip_fast.training.task import CoMTIPTask, build_task

IDENTITY = "genes.identity_Id"


@pytest.fixture(scope="module")
def exported(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    task = make(tiny_overrides, "train.seed=5")
    folder = tmp_path_factory.mktemp("export") / "export"
    task.export(folder)
    return folder


def make(overrides: list[str], *more: str) -> CoMTIPTask:
    return build_task(load_config(None, [*overrides, *more]), torch.device("cpu"))


def keys_of(task: CoMTIPTask) -> list[str]:
    return [task.shards.genes[row].key for row in task.tables.genes.trained]


def test_weights_are_copied_and_gene_rows_are_matched_by_key(exported: Path, tiny_overrides: list[str]):
    old = Bundle.load(exported)
    # Another gene list holds out other genes, so rows change.
    more = ["genes.held_out_every=3", "genes.held_out_from=6"]
    plain, task = make(tiny_overrides, *more), make(tiny_overrides, *more, f"train.start_from={exported}")
    before, theirs, ours = plain.model.state_dict(), old.model.state_dict(), task.model.state_dict()
    for name in theirs.keys() - {IDENTITY}:
        assert torch.equal(theirs[name], ours[name]), name
    old_keys, keys = [g.key for g in old.genes if g.trained], keys_of(task)
    assert old_keys != keys[: len(old_keys)]
    known = set(old_keys) & set(keys)
    assert known
    assert set(keys) - known, "a gene must be new"
    for row, key in enumerate(keys, start=1):
        wanted = theirs[IDENTITY][1 + old_keys.index(key)] if key in known else before[IDENTITY][row]
        assert torch.equal(ours[IDENTITY][row], wanted), key
    assert (task.tables.table.log_prior == plain.tables.table.log_prior).all(), "levels are those of the new data"


def test_tensors_that_do_not_fit_are_reported(
    exported: Path, tiny_overrides: list[str], caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING, "comtip_fast"):
        task = make(tiny_overrides, "levels.n_levels=7", "vision.target=ema", f"train.start_from={exported}")
    assert re.search(r"not loaded: genes\.level_Qd: shape \(5, 32\) in .*, \(7, 32\) in this model", caplog.text)
    assert caplog.text.count("not loaded") == 1
    assert task.model.teacher is not None
    teacher, vision = task.model.teacher.state_dict(), task.model.vision.state_dict()
    assert all(torch.equal(teacher[k], vision[k]) for k in vision)
    with pytest.raises(FileNotFoundError, match="no export"):
        make(tiny_overrides, f"train.start_from={exported.parent}/nothing")


def test_the_command_starts_from_an_export(exported: Path, tiny_overrides: list[str], tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(load_config(None, [*tiny_overrides, "train.steps=2", "train.validate_every=0"])))
    out = tmp_path / "run"
    assert main(["pretrain", "--config", str(path), "--out", str(out), "--from", str(exported)]) == 0
    assert load_config(out / "config.yaml").train.start_from == str(exported)
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1


def test_a_checkpoint_exports_what_a_finished_run_would(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    best, newest = tmp_path / "best", tmp_path / "newest"
    assert main(["export", str(tiny_run), "--checkpoint", "best", "--out", str(best)]) == 0
    for path in sorted((tiny_run / "export").iterdir()):
        assert (best / path.name).read_bytes() == path.read_bytes(), path.name
    assert main(["export", str(tiny_run), "--checkpoint", "newest", "--out", str(newest)]) == 0
    assert "step 200" in capsys.readouterr().out
    assert main(["export", str(tiny_run), "--checkpoint", "7", "--out", str(tmp_path / "none")]) == 2
    assert "no complete checkpoint '7'; choose newest, best or a step of " in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_exported_is_named_with_a_fix_that_works(tmp_path: Path):
    run = tmp_path / "run"
    steps = [5, 10]
    for step in steps:
        folder = store.save(run / "checkpoints", step, store.Checkpoint({"a": torch.zeros(1)}, {}, {"step": step}))
        (folder / "model.safetensors").unlink()
    with pytest.raises(store.CheckpointError, match=r"model.safetensors: missing; choose newest or another step of"):
        export_checkpoint(run, str(steps[-1]), tmp_path / "none")
    with pytest.raises(store.CheckpointError, match=r"none of the .* checkpoints can be read"):
        export_checkpoint(run, "newest", tmp_path / "none")
    assert "config.yaml" in _fix_of(["trained genes"])
    assert "`shards`" in _fix_of(["shards", "trained genes"])
