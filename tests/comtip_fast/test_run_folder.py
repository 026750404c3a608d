"""The run folder: symbolic links, file systems without locks or flushes, permissions."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
from pathlib import Path

import pytest
import torch

from comtip_fast.training.checkpoint import store as checkpoints
from comtip_fast.training.checkpoint.store import Checkpoint
from comtip_fast.training.distributed.failures import RestartError
from comtip_fast.training.distributed.signals import hold_run
from comtip_fast.training.protocol import TrainingError

LINKS = (
    "run.lock",
    ".config.yaml.writing",
    "metrics.jsonl",
    "events.jsonl",
    "stalled_rank0.txt",
    "checkpoints",
    "export",
    "checkpoints/step_00000001",
    "checkpoints/step_00000001/state.json",
    "export/model.safetensors",
    "wandb",
    "traces",
)


def checkpoint() -> Checkpoint:
    return Checkpoint({"w": torch.zeros(2)}, {"w/exp_avg": torch.zeros(2)}, {"step": 1})


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("target", ["file", "folder", "nowhere"])
def test_links_in_a_run_are_not_followed(tmp_path: Path, name: str, target: str):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (elsewhere / "folder").mkdir(parents=True)
    (elsewhere / "file").write_text("mine")
    (run / name).parent.mkdir(parents=True)
    (run / name).symlink_to(elsewhere / target)
    with (
        pytest.raises(TrainingError, match=r"symbolic links are not allowed in a run folder.*give a new folder"),
        hold_run(run),
    ):
        pass
    assert sorted(p.name for p in elsewhere.iterdir()) == ["file", "folder"]
    assert (elsewhere / "file").read_text() == "mine"
    assert not list((elsewhere / "folder").iterdir())


def test_a_run_itself_may_be_given_by_a_link_and_wandb_makes_its_own(tmp_path: Path):
    (tmp_path / "run/wandb/run-1").mkdir(parents=True)
    (tmp_path / "run/wandb/latest-run").symlink_to("run-1")
    (tmp_path / "link").symlink_to("run")
    with hold_run(tmp_path / "link"):
        assert (tmp_path / "run/run.lock").read_text() == str(os.getpid())


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gives_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
):
    def refuse(*_: object) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING), hold_run(tmp_path):
        pass
    assert "this file system has no locks" in caplog.text


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_flush_keeps_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    def refuse(_: int) -> None:
        raise OSError(number, "cannot flush")

    monkeypatch.setattr(os, "fsync", refuse)
    checkpoints.save(tmp_path, 1, checkpoint())
    found = checkpoints.newest_good(tmp_path, checkpoints.load)
    assert found is not None
    assert found[0] == 1


def test_an_error_of_the_disk_while_flushing_is_still_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RestartError, match="the device failed"):
        checkpoints.save(tmp_path, 1, checkpoint())


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600), (0o027, 0o640)])
def test_weights_have_the_permissions_that_the_umask_gives(tmp_path: Path, umask: int, mode: int):
    before = os.umask(umask)
    try:
        folder = checkpoints.save(tmp_path, 1, checkpoint())
    finally:
        os.umask(before)
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == {
        p.name: mode for p in folder.iterdir()
    }
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_an_export_is_readable_by_the_group(tiny_run: Path):
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tiny_run / "export").iterdir()}
    assert len(set(modes.values())) == 1, modes
