"""Checkpoints are complete or absent, and any damage is detected."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from comtip_fast.training.checkpoint import store as checkpoints
from comtip_fast.training.checkpoint.store import Checkpoint, CheckpointError


def some(value: float = 1.0) -> Checkpoint:
    return Checkpoint(
        {"a": torch.full((3, 2), value), "count": torch.tensor(7)},
        {"a/step": torch.tensor(2.0), "a/exp_avg": torch.randn(3, 2, dtype=torch.float64)},
        {"step": 5, "best_score": None, "pi": 3.141592653589793},
    )


def test_round_trip_is_exact(tmp_path: Path) -> None:
    written = some()
    read = checkpoints.load(checkpoints.save(tmp_path, 5, written))
    for a, b in ((written.model, read.model), (written.optim, read.optim)):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    assert read.state == {"format": "comtip-checkpoint", "version": 1} | written.state


def test_a_checkpoint_folder_has_the_documented_files(tmp_path: Path) -> None:
    folder = checkpoints.save(tmp_path, 100, some())
    assert folder.name == "step_00000100"
    assert {p.name for p in folder.iterdir()} == {*checkpoints.FILES, "SHA256SUMS"}
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")  # the format of `sha256sum -c`
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_the_state_is_replaced_without_rewriting_the_tensors(tmp_path: Path) -> None:
    folder = checkpoints.save(tmp_path, 5, some())
    inode = (folder / "model.safetensors").stat().st_ino
    checkpoints.replace_state(tmp_path, 5, {"step": 5, "validated": 5})
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    assert (folder / "model.safetensors").stat().st_ino == inode
    read = checkpoints.load(folder)
    assert read.state["validated"] == 5
    assert torch.equal(read.model["a"], some().model["a"])


def test_empty_optimizer_and_tied_weights_can_be_saved(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    folder = checkpoints.save(tmp_path, 0, Checkpoint({"x": shared, "y": shared, "z": shared.view(2, 2).T}, {}, {}))
    read = checkpoints.load(folder)
    assert read.optim == {}
    assert torch.equal(read.model["y"], shared)
    assert torch.equal(read.model["z"], shared.view(2, 2).T)


@pytest.mark.parametrize("name", [*checkpoints.FILES, "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing", "grow"])
def test_any_damage_is_found_and_the_file_named(tmp_path: Path, name: str, damage: str) -> None:
    folder = checkpoints.save(tmp_path, 5, some())
    path = folder / name
    raw = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        middle = 10 if name == "SHA256SUMS" else len(raw) // 2
        flipped = raw[:middle] + bytes([raw[middle] ^ 0xFF]) + raw[middle + 1 :]
        path.write_bytes({"flip": flipped, "cut": raw[:middle], "empty": b"", "grow": b"\x00" + raw}[damage])
    with pytest.raises(CheckpointError, match=r"step_00000005.*delete the folder"):
        checkpoints.load(folder)


def test_newest_good_skips_damage_and_reports_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (10, 20, 30):
        checkpoints.save(tmp_path, step, some(step))
    (checkpoints.folder_of(tmp_path, 30) / "model.safetensors").write_bytes(b"x")
    with caplog.at_level(logging.WARNING, "comtip_fast"):
        found = checkpoints.newest_good(tmp_path, checkpoints.load)
    assert found is not None
    assert found[0] == 20
    assert found[1].model["a"][0, 0] == 20
    assert "step_00000030" in caplog.text
    shutil.rmtree(checkpoints.folder_of(tmp_path, 20))
    shutil.rmtree(checkpoints.folder_of(tmp_path, 10))
    assert checkpoints.newest_good(tmp_path, checkpoints.load) is None


def test_damaged_newer_checkpoints_are_not_counted_by_prune(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoints.save(tmp_path, step, some())
    checkpoints.quarantine_newer(tmp_path, 10)
    checkpoints.save(tmp_path, 15, some())
    checkpoints.prune(tmp_path, 1, None)
    assert checkpoints.steps_of(tmp_path) == [15]
    assert (tmp_path / "damaged_step_00000030").is_dir()


def test_saving_again_replaces(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, 5, some(1))
    assert checkpoints.load(checkpoints.save(tmp_path, 5, some(2))).model["a"][0, 0] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000005"]


@pytest.mark.parametrize(
    ("keep", "best", "left"), [(2, None, [4, 5]), (2, 1, [1, 4, 5]), (1, 5, [5]), (9, 2, [1, 2, 3, 4, 5])]
)
def test_prune_keeps_newest_and_best(tmp_path: Path, keep: int, best: int | None, left: list[int]) -> None:
    for step in range(1, 6):
        checkpoints.save(tmp_path, step, some())
    checkpoints.prune(tmp_path, keep, best)
    assert checkpoints.steps_of(tmp_path) == left


def test_an_interrupted_delete_leaves_nothing_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints.save(tmp_path, 5, some())

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            (path / "model.safetensors").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.delete(folder)
    assert checkpoints.steps_of(tmp_path) == []


def test_leftovers_of_a_killed_process_are_neither_seen_nor_kept(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, 5, some())
    for name in (".writing-00000009", ".deleting-step_00000003"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    assert checkpoints.steps_of(tmp_path) == [5]
    checkpoints.clear_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000005"]


def test_a_checkpoint_is_not_lost_between_the_two_renames_of_its_replacement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression test: the old version was moved away, and the restarted run deleted it with the leftovers."""
    folder = checkpoints.save(tmp_path, 5, some())
    before = [(folder / name).read_bytes() for name in checkpoints.FILES]
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if target == folder:
            os._exit(9)
        return rename(self, target)

    child = os.fork()
    if not child:
        monkeypatch.setattr(Path, "rename", killed)
        checkpoints.replace_state(tmp_path, 5, {"step": 5})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert checkpoints.steps_of(tmp_path) == []
    checkpoints.clear_leftovers(tmp_path)
    checkpoints.verify(folder)
    assert [(folder / name).read_bytes() for name in checkpoints.FILES] == before
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_other_format_is_refused_by_name(tmp_path: Path) -> None:
    folder = checkpoints.save(tmp_path, 5, some())
    state = json.loads((folder / "state.json").read_text()) | {"version": 2}
    (folder / "state.json").write_text(json.dumps(state))
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in checkpoints.FILES]
    (folder / "SHA256SUMS").write_text("".join(lines))
    with pytest.raises(CheckpointError, match=r"format 'comtip-checkpoint' 2"):
        checkpoints.load(folder)


def test_nothing_is_ever_unpickled() -> None:
    folder = Path(checkpoints.__file__).parent
    for path in folder.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not [word for word in ("torch.load(", "import pickle", "torch.save(") if word in text], path
