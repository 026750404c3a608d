"""Checkpoints in parts: exact resume on any number of ranks, complete or absent, and any damage is refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from comtip_fast.collectives import SingleProcessGroup
from comtip_fast.config.io import ConfigError, load_config
from comtip_fast.training.checkpoint import shard_saver
from comtip_fast.training.checkpoint import store as checkpoints
from comtip_fast.training.checkpoint.async_writer import Writer
from comtip_fast.training.checkpoint.content import CheckpointError
from comtip_fast.training.checkpoint.parts.reader import ShardReader
from comtip_fast.training.checkpoint.parts.writer import index_of, part_of_rank, write_part
from comtip_fast.training.checkpoint.shard_saver import ShardSaver
from comtip_fast.training.checkpoint.shard_verify import damage_of_parts
from comtip_fast.training.distributed.failures import RestartError
from comtip_fast.training.engines.base import ParameterPart
from testkit.distributed import run_distributed
from tests.comtip_fast.sharded_worker import Net, Sharded, trainer_of
from tests.comtip_fast.trainer_standin import config_of

WORKER = str(Path(__file__).with_name("sharded_worker.py"))
STATE = {"step": 5, "best_score": None}


# -- runs of two ranks --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("sharded")
    small = "engine.persist_elements=10"
    names = [
        f"whole=train.checkpoint=whole;{small}",
        f"parts={small}",
        f"parts-stopped={small}",
        f"waiting-stopped={small};train.async_checkpoint=false",
        f"whole-stopped={small};train.checkpoint=whole",
        f"full={small}",
        f"late-stopped={small};train.checkpoint_every=1;train.keep_checkpoints=99",
    ]
    run_distributed([WORKER, str(folder), "train", *names], 2, timeout_s=280, fork=True)
    return folder


def last(run: Path) -> Path:
    return checkpoints.folder_of(run / "checkpoints", 12)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows_of(run, "train")]


def rows_of(run: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


@pytest.mark.parametrize("name", ["parts", "parts-stopped", "waiting-stopped", "whole-stopped", "full"])
def test_a_run_that_saves_parts_or_resumes_from_them_has_the_same_bits(runs: Path, name: str) -> None:
    assert losses(runs / name) == losses(runs / "whole")
    exports = [(runs / run / "export" / "model.safetensors").read_bytes() for run in (name, "whole")]
    assert exports[0] == exports[1]
    saved, wanted = (checkpoints.load(last(runs / run)) for run in (name, "whole"))
    for found, other in ((saved.model, wanted.model), (saved.optim, wanted.optim), (saved.ema, wanted.ema)):
        assert found.keys() == other.keys()
        assert all(torch.equal(found[k], other[k]) and found[k].dtype == other[k].dtype for k in found)


def test_every_rank_writes_its_part_only(runs: Path) -> None:
    folder = last(runs / "parts")
    assert {p.name for p in folder.iterdir()} == {
        *(f"part_0000{rank}.safetensors" for rank in range(2)),
        "shards.json",
        "state.json",
        "SHA256SUMS",
    }
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    first, second = (load_file(folder / f"part_0000{rank}.safetensors") for rank in range(2))
    assert first["weight/body.0.weight"].shape == second["exp_avg/body.0.weight"].shape == (14,)
    assert second["average/body.0.weight"].shape == (14,)
    assert not any(key.startswith("average/frozen") for key in first)
    assert (first["exp_avg/body.1.bias"].numel(), second["exp_avg/body.1.bias"].numel()) == (4, 3)
    assert "weight/body.3.bias" not in second  # its only element is in the first part
    assert first["buffer/count"] == 12
    assert not any(key.startswith("buffer/") for key in second)
    # Both newest checkpoints are kept, and nothing else.
    assert sorted(p.name for p in folder.parent.iterdir()) == ["step_00000008", "step_00000012"]


@pytest.mark.parametrize("world", [1, pytest.param(3, marks=pytest.mark.nightly)])
def test_another_number_of_ranks_loads_the_same_bits(runs: Path, tmp_path: Path, world: int) -> None:
    (tmp_path / "parts").symlink_to(runs / "parts")
    run_distributed([WORKER, str(tmp_path), "load", "parts"], world, timeout_s=200, fork=True)
    saved, loaded = checkpoints.load(last(runs / "parts")), load_file(tmp_path / "loaded")
    wanted = {f"model/{k}": v for k, v in saved.model.items()} | {f"optim/{k}": v for k, v in saved.optim.items()}
    wanted |= {f"ema/{k}": v for k, v in saved.ema.items()}
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[k], wanted[k]) for k in wanted)


def test_averages_are_those_of_one_process_and_resume_in_it(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    single = ["engine.kind=single"]
    trainer_of(tmp_path / "one", single, SingleProcessGroup()).fit()
    one, saved = (checkpoints.load(last(run)) for run in (tmp_path / "one", runs / "parts"))
    assert saved.ema.keys() == one.ema.keys() == {name for name, p in Net().named_parameters() if p.requires_grad}
    for name, average in one.ema.items():
        assert torch.allclose(saved.ema[name], average, rtol=1e-4, atol=1e-6), name
        assert not torch.equal(saved.ema[name], saved.model[name]), name
    for name in ("parts", "whole"):
        shutil.copytree(runs / name, tmp_path / name)
        trainer = trainer_of(tmp_path / name, [*single, "train.steps=40"], SingleProcessGroup())
        trainer._start(resume=True)
        resumed = trainer._average.tensors()
        assert resumed.keys() == saved.ema.keys()
        assert all(torch.equal(average, saved.ema[name]) for name, average in resumed.items())


def test_averages_of_a_checkpoint_without_any_start_with_its_weights(runs: Path) -> None:
    steps = [checkpoints.load(checkpoints.folder_of(runs / "late-stopped/checkpoints", step)) for step in range(6, 13)]
    assert not steps[0].ema
    wanted = {name: steps[0].model[name].double() for name in steps[-1].ema}
    for step, saved in enumerate(steps[1:], start=7):
        decay = min(0.8, (1 + step) / (10 + step))
        wanted = {name: decay * w + (1 - decay) * saved.model[name].double() for name, w in wanted.items()}
        assert all(torch.allclose(saved.ema[name].double(), w, rtol=1e-5, atol=1e-7) for name, w in wanted.items())


@pytest.mark.parametrize("name", ["parts", "whole"])
def test_a_validation_uses_the_averages_and_the_best_ones_are_exported(runs: Path, name: str) -> None:
    saved, best = (checkpoints.load(checkpoints.folder_of(runs / name / "checkpoints", step)) for step in (12, 8))
    task = Sharded(config_of())
    task.module.load_state_dict(saved.model | saved.ema)
    task.module.eval()
    row = rows_of(runs / name, "valid")[-1]
    assert (row["step"], row["weights"]) == (12, "ema")
    assert row["score"] == pytest.approx(task.validation_share(lambda _: None), rel=1e-6)
    exported = load_file(runs / name / "export" / "model.safetensors")
    assert all(torch.equal(exported[k], v) for k, v in (best.model | best.ema).items())


# -- checkpoints of two parts, written here -----------------------------------------------------------------


def parts_of(rank: int, value: float = 0.0) -> list[ParameterPart]:
    """Return the part of a rank of a matrix of five elements and of a frozen vector of one."""
    numbers = torch.arange(5.0) + value
    own = numbers[:3] if rank == 0 else numbers[3:]
    frozen = torch.ones(1) if rank == 0 else torch.ones(0)
    return [
        ParameterPart("a", (5, 1), 3 * rank, {"weight": own, "exp_avg": own + 10, "exp_avg_sq": own + 20}, 5.0),
        ParameterPart("b", (1,), rank, {"weight": frozen}),
    ]


def save(root: Path, step: int = 5, value: float = 0.0) -> Path:
    folder = root / checkpoints.new_parts_folder(root, step)
    written = [
        write_part(folder, part_of_rank(rank, parts_of(rank, value), {"c": torch.tensor(7)}, copy=True))
        for rank in range(2)
    ]
    return checkpoints.publish_parts(root, step, folder, index_of(written), STATE)


def test_parts_are_assembled(tmp_path: Path) -> None:
    read = checkpoints.load(save(tmp_path))
    assert torch.equal(read.model["a"], torch.arange(5.0).reshape(5, 1))
    assert (read.model["b"].item(), read.model["c"].item(), read.state["step"]) == (1.0, 7, 5)
    assert read.optim.keys() == {"a/exp_avg", "a/exp_avg_sq", "a/step"}
    assert torch.equal(read.optim["a/exp_avg_sq"], torch.arange(5.0).reshape(5, 1) + 20)
    assert checkpoints.load(save(tmp_path), moments=False).optim == {}
    with ShardReader(save(tmp_path)) as reader:
        assert reader.read("a", "exp_avg", 2, 4).tolist() == [12, 13]  # from both files
        assert reader.read("b", "exp_avg", 0, 1) is None


def test_the_state_of_parts_is_replaced_without_rewriting_them(tmp_path: Path) -> None:
    folder = save(tmp_path)
    inode = (folder / "part_00001.safetensors").stat().st_ino
    checkpoints.replace_state(tmp_path, 5, {"step": 5, "validated": 5})
    assert (folder / "part_00001.safetensors").stat().st_ino == inode
    assert checkpoints.load(folder).state["validated"] == 5


@pytest.mark.parametrize(
    "name", ["part_00000.safetensors", "part_00001.safetensors", "shards.json", "state.json", "SHA256SUMS"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing", "grow"])
def test_any_damage_of_a_part_is_found_and_the_file_named(tmp_path: Path, name: str, damage: str) -> None:
    folder = save(tmp_path)
    path = folder / name
    raw = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        middle = 10 if name == "SHA256SUMS" else len(raw) // 2
        flipped = raw[:middle] + bytes([raw[middle] ^ 0xFF]) + raw[middle + 1 :]
        path.write_bytes({"flip": flipped, "cut": raw[:middle], "empty": b"", "grow": b"\x00" + raw}[damage])
    with pytest.raises(CheckpointError, match=r"step_00000005.*delete the folder") as caught:
        checkpoints.load(folder)
    if name != "SHA256SUMS":
        assert name in str(caught.value)


def rehash(folder: Path) -> None:
    """Write right hashes of what the folder now holds."""
    names = [p.name for p in folder.iterdir() if p.name != "SHA256SUMS"]
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


def change(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def act(index: Any) -> None:
        for key in path[:-1]:
            index = index[key]
        index[path[-1]] = to

    return act


FORGED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another format": (change("version", to=2), "version: "),
    "more ranks than files": (change("world_size", to=3), "not those of 3 ranks"),
    "ranks without end": (change("world_size", to=10**12), "world_size: "),
    "a path as a name": (change("files", 0, "name", to="../part_00000.safetensors"), "files.0.name: "),
    "the file of another rank": (change("files", 0, "name", to="part_00001.safetensors"), "not those of 2 ranks"),
    "a shape without end": (change("parameters", 0, "shape", to=[10**30]), r"parameters\.0\.shape\.0: "),
    "a large shape": (change("parameters", 0, "shape", to=[10**12]), "do not cover"),
    "a negative size": (change("parameters", 0, "shape", to=[-5, -1]), r"parameters\.0\.shape\.0: "),
    "a gap between slices": (change("parameters", 0, "slices", 1, "offset", to=4), "gaps or overlaps"),
    "an overlap of slices": (change("parameters", 0, "slices", 0, "length", to=5), "gaps or overlaps"),
    "a slice less": (lambda index: index["parameters"][0]["slices"].pop(), "do not cover"),
    "a name twice": (change("parameters", 1, "name", to="a"), "listed twice"),
    "a moment without weights": (
        change("parameters", 0, "keys", to=["exp_avg"]),
        "are not weight, moments and average",
    ),
    "a key of nothing known": (change("parameters", 0, "keys", to=["weight", "pickle"]), r"keys\.1: "),
    "a negative number of steps": (change("parameters", 0, "step", to=-1.0), r"step: "),
    "more bytes than a file has": (change("files", 1, "bytes", to=10**9), "but the index states 1000000000"),
    "a buffer larger than the file": (change("buffers", 0, "shape", to=[10**9]), "cannot hold tensors"),
    "a key that no index has": (change("code", to="import os"), "code: "),
}


@pytest.mark.parametrize("name", FORGED)
def test_an_index_with_right_hashes_is_refused_before_tensors_are_allocated(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path)
    forge, message = FORGED[name]
    index = json.loads((folder / "shards.json").read_text())
    forge(index)
    (folder / "shards.json").write_text(json.dumps(index))
    rehash(folder)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("a tensor was allocated"))
    with pytest.raises(CheckpointError, match=rf"step_00000005/(shards\.json|part_00001\.safetensors): .*{message}"):
        checkpoints.load(folder)


def test_an_index_of_large_slices_that_no_file_holds_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path)
    index = json.loads((folder / "shards.json").read_text())
    big = 10**12
    index["parameters"][0] |= {
        "shape": [2 * big],
        "slices": [{"offset": 0, "length": big}, {"offset": big, "length": big}],
    }
    (folder / "shards.json").write_text(json.dumps(index))
    rehash(folder)
    with pytest.raises(CheckpointError, match="cannot hold tensors of 12000000000012 bytes"):
        checkpoints.load(folder)


def test_a_model_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    module = torch.nn.Module()
    module.a, module.b = torch.nn.Parameter(torch.zeros(5, 2)), torch.nn.Parameter(torch.zeros(1))
    module.register_buffer("c", torch.tensor(0))
    with (
        ShardReader(save(tmp_path)) as reader,
        pytest.raises(
            CheckpointError, match=r"do not fit the model.*e\.g\. a: \[5, 1\] in the checkpoint, \[5, 2\] in"
        ),
    ):
        reader.check_fits(module)


def test_a_value_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="weight/a holds values that are not finite"):
        checkpoints.load(save(tmp_path, value=float("nan")))


def test_a_damaged_checkpoint_in_parts_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (5, 10, 15):
        save(tmp_path, step)
    (checkpoints.folder_of(tmp_path, 15) / "part_00001.safetensors").unlink()
    part = checkpoints.folder_of(tmp_path, 10) / "part_00000.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"\xff")
    damage = damage_of_parts(tmp_path, SingleProcessGroup(), nullcontext)
    assert (list(damage), damage[5]) == ([15, 10, 5], "")
    found = checkpoints.newest_good(tmp_path, checkpoints.load_state, damage)
    assert found is not None
    assert (found[0], found[1]["step"]) == (5, 5)
    assert "step_00000015/part_00001.safetensors: missing" in caplog.text
    assert "step_00000010/part_00000.safetensors: the SHA-256 differs" in caplog.text


# -- interrupted writes -------------------------------------------------------------------------------------


def saver(root: Path, *, background: bool) -> tuple[ShardSaver, Any]:
    """Return a saver of one rank, and an engine with one parameter."""
    module = torch.nn.Module()
    module.a = torch.nn.Parameter(torch.zeros(5, 1))
    part = ParameterPart("a", (5, 1), 0, {"weight": module.a.detach().flatten()}, None)
    engine = SimpleNamespace(module=module, shards=SimpleNamespace(parts=lambda: [part]))
    group = SingleProcessGroup()
    return ShardSaver(root, group, Writer(), background=background, pause=nullcontext), engine


def test_the_next_step_does_not_change_what_is_written(tmp_path: Path) -> None:
    shards, engine = saver(tmp_path, background=True)
    shards.start(5, engine, STATE, lambda: None)
    with torch.no_grad():
        engine.module.a.fill_(9)
    shards.complete()
    shards.writer.drain()
    assert not checkpoints.load(checkpoints.folder_of(tmp_path, 5)).model["a"].any()


@pytest.mark.parametrize("after", ["parts", "index"])
def test_a_kill_before_the_final_name_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    save(tmp_path, 5)
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if (after == "parts") == self.name.startswith(".parts-"):
            os._exit(9)
        return rename(self, target)

    child = os.fork()
    if not child:
        monkeypatch.setattr(Path, "rename", killed)
        shards, engine = saver(tmp_path, background=False)
        shards.start(9, engine, STATE, lambda: None)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(list(tmp_path.glob(".*"))) == 1  # its files are complete
    found = checkpoints.newest_good(tmp_path, checkpoints.load)
    assert found is not None
    assert found[0] == 5
    checkpoints.clear_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000005"]


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_leaves_the_previous_checkpoint_and_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    save(tmp_path, 5)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_saver, "write_part", full)
    shards, engine = saver(tmp_path, background=background)

    def write() -> None:
        shards.start(9, engine, STATE, lambda: None)
        shards.complete()

    with pytest.raises(RestartError, match=r"step_00000009: cannot write this checkpoint: .*step 5 is unchanged"):
        write()
    assert checkpoints.steps_of(tmp_path) == [5]


@pytest.mark.parametrize(
    "settings", [[], ["engine.kind=deepspeed", "engine.zero_stage=2"], ["engine.kind=ddp", "engine.zero_stage=3"]]
)
def test_parts_need_zero_3(settings: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"train\.checkpoint=sharded: needs engine\.kind=deepspeed"):
        load_config(None, ["train.checkpoint=sharded", *settings])


def test_parts_are_the_default_under_zero_3_on_several_ranks() -> None:
    from comtip_fast.training.checkpoint.saver import in_parts

    zero3 = ["engine.kind=deepspeed", "engine.zero_stage=3"]
    assert in_parts(load_config(None, zero3), 2)
    assert not in_parts(load_config(None, zero3), 1)
    assert not in_parts(load_config(None, [*zero3, "train.checkpoint=whole"]), 2)
    assert not in_parts(load_config(None, ["engine.kind=deepspeed", "engine.zero_stage=2"]), 2)
    nvme = ["engine.offload_param=nvme", "engine.nvme_path=x"]
    assert not in_parts(load_config(None, [*zero3, *nvme]), 2)
