"""ZeRO with CPU or NVMe offload gives the losses of a run without it, also through a stop and a resume."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from comtip_shards import ShardSet

from comtip_fast.cli import main
from comtip_fast.config.io import load_config
from comtip_fast.training.engines.factory import check_engine
from comtip_fast.training.protocol import TrainingError
from tests.comtip_fast.test_distributed import curves

NVME = ["engine.kind=deepspeed", "engine.zero_stage=3", "engine.offload_param=nvme"]


def builder() -> type:
    pytest.importorskip("deepspeed")
    return importlib.import_module("deepspeed.ops.op_builder.cpu").AsyncIOBuilder


@pytest.mark.slow
@pytest.mark.parametrize("which", ["offload", "nvme"])
def test_offload_changes_no_loss(which: str, tiny_shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    if which == "nvme" and not builder()().is_compatible():
        pytest.skip("libaio is not here")
    rows = curves.run(str(tiny_shards.path), tmp_path, 10, [2], which)
    assert len(rows) == len(curves.RUNS[which])
    for row in rows:
        assert row["ok"], row
    if which == "nvme":
        swapped = {path.parent.parent.name for path in (tmp_path / "2/nvme").rglob("*.swp")}
        assert swapped == {"optimizer", "float32params"}


def test_nvme_without_libaio_is_refused_before_data_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(builder(), "is_compatible", lambda self, verbose=False: False)
    config = tmp_path / "c.yaml"
    config.write_text("data:\n  shards: no-such-set\n")
    arguments = ["pretrain", "--config", str(config), "--out", str(tmp_path / "run"), "--set", "train.device=cpu"]
    for setting in [*NVME, f"engine.nvme_path={tmp_path / 'nvme'}"]:
        arguments += ["--set", setting]
    assert main(arguments) == 2
    output = capsys.readouterr().err
    assert "libaio-dev" in output
    assert "no-such-set" not in output
    assert not (tmp_path / "run").exists()


def test_the_nvme_folder_must_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    builder()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (tmp_path / "file").write_text("")
    config = load_config(None, [*NVME, f"engine.nvme_path={tmp_path / 'file'}"])
    with pytest.raises(TrainingError, match=r"engine\.nvme_path=.*file"):
        check_engine(config, torch.device("cpu"))
