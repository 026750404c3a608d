"""Spikes of the gradient norm (``optim.spike``) and the moving average of the weights (``optim.ema``)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from comtip_fast.config.io import load_config
from comtip_fast.config.optim import SpikeConfig
from comtip_fast.runtime import devices
from comtip_fast.training.checkpoint import store as checkpoints
from comtip_fast.training.checkpoint.content import Checkpoint
from comtip_fast.training.checkpoint.reading import HeldReader
from comtip_fast.training.engines.base import clip
from comtip_fast.training.protocol import TrainingError
from comtip_fast.training.trainer import Trainer
from comtip_fast.training.update.ema import OwnWeights, WeightAverage
from comtip_fast.training.update.spikes import LEAST, WINDOW, NormHistory, SpikeLimit
from testkit.distributed import run_distributed
from tests.comtip_fast.test_trainer import assert_same_run, stop_at, trace
from tests.comtip_fast.trainer_standin import Net, StandIn, config_of

CPU = torch.device("cpu")
LENGTH = ("train.steps=40", "train.validate_every=0")
AT = 30
SKIP, CLIP = "optim.spike.policy=skip", "optim.spike.policy=clip"


class Spiking(StandIn):
    """A stand-in whose loss is a thousand times larger in some steps, and which keeps the weights after every step."""

    def __init__(self, *args: Any, spikes: tuple[int, ...] = (AT,)) -> None:
        super().__init__(*args)
        self.spikes = spikes
        self.weights: list[dict[str, Tensor]] = [self._copy()]

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.module.named_parameters()}

    def losses(self, module: Net, batch: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        shares, numbers = super().losses(module, batch)
        if self.step in self.spikes:
            shares["loss"] = shares["loss"] * 1000
        return shares, numbers

    def after_step(self, module: Net, step: int, good: Tensor | None = None) -> None:
        super().after_step(module, step)
        self.weights.append(self._copy())


def run(folder: Path, *overrides: str, spikes: tuple[int, ...] = (AT,), stop: int = 0, resume: bool = False) -> Spiking:
    config = config_of(*LENGTH, *overrides)
    task = Spiking(config, stop_at(stop), spikes=spikes)
    Trainer(task, config, folder).fit(resume=resume)
    return task


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- the limit ------------------------------------------------------------------------------------


def test_the_limit_is_a_factor_of_the_median_of_finite_norms() -> None:
    history, norms = NormHistory(SpikeConfig(policy="skip", factor=3.0), CPU), []
    for i in range(WINDOW + 30):
        limit = history.limit()
        assert limit is not None
        known = norms[-WINDOW:]
        expected = 3 * statistics.median_low(known) if len(known) >= LEAST else float("inf")
        assert float(limit.norm) == pytest.approx(expected, rel=1e-6), i
        norm = float("nan") if i % 7 == 0 else float((i * 37) % 11 + 1)
        history.add(torch.tensor(norm, dtype=torch.float64))
        norms += [] if norm != norm else [norm]
    again = NormHistory(history.config, CPU, history.values())
    assert torch.equal(again._norms, history._norms)
    assert NormHistory(SpikeConfig(), CPU).limit() is None


@pytest.mark.parametrize(
    ("skip", "limit", "bound", "norm", "good"),
    [
        (False, 2.0, 0.0, 2.0, True),
        (False, 2.0, 1.0, 1.0, True),
        (False, 99.0, 0.0, 5.0, True),
        (False, float("inf"), 1.0, 1.0, True),
        (True, 2.0, 1.0, 1.0, False),
        (True, 99.0, 1.0, 1.0, True),
    ],
)
def test_clipping_and_skipping(skip: bool, limit: float, bound: float, norm: float, good: bool) -> None:
    net = nn.Linear(2, 1, bias=False)
    net.weight.grad = torch.tensor([[3.0, 4.0]])
    update = clip(list(net.named_parameters()), bound, True, SpikeLimit(torch.tensor(limit), skip))
    assert float(update.norm) == 5
    assert float(net.weight.grad.norm()) == pytest.approx(norm, rel=1e-5)
    assert (bool(update.good), bool(update.spike)) == (good, limit < 5)


# -- planted spikes -------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_a_spike_is_skipped_counted_and_listed(
    masked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With ``masked``, as on a GPU: the spike is found when a row is logged."""
    if masked:
        monkeypatch.setattr(devices, "reads_are_free", lambda device: False)
    every = ("train.checkpoint_every=1", "train.keep_checkpoints=99", "optim.ema=0.9")
    run(tmp_path, SKIP, *every, *(("train.log_every=7",) if masked else ()))
    before, after, later = (checkpoints.load(checkpoints.folder_of(tmp_path / "checkpoints", s)) for s in (29, 30, 31))
    for name in ("model", "optim", "ema"):
        one, two, three = (getattr(checkpoint, name) for checkpoint in (before, after, later))
        kept = {key for key in one if key != "teacher"}  # the stand-in's own average has no mask
        assert all(torch.equal(one[key], two[key]) for key in kept), name
        assert not all(torch.equal(two[key], three[key]) for key in kept), name
    (record,) = rows_of(tmp_path / "spikes.jsonl")
    order = [spots for epoch in range(8) for spots in StandIn(config_of()).batches(epoch)]
    assert (record["step"], record["policy"], record["spot_index"]) == (AT, "skip", order[AT - 1].tolist())
    assert record["grad_norm"] > record["limit"] > 0
    rows = {r["step"]: r for r in trace(tmp_path) if r["kind"] == "train"}
    assert [(r["skips"], r["spikes"]) for s, r in rows.items() if s in (28, 29, 35, 40)][-1] == (1, 1)
    assert (rows[28]["skips"], rows[35]["skips"]) == (0, 1)
    assert "of optim.spike" in caplog.text


def test_without_a_policy_a_spike_is_followed(tmp_path: Path) -> None:
    weights = run(tmp_path).weights
    assert any(not torch.equal(weights[AT][name], weights[AT - 1][name]) for name in weights[0])
    assert not (tmp_path / "spikes.jsonl").exists()
    assert "spikes" not in trace(tmp_path)[0]


def test_clipping_follows_the_spike_by_the_limit_only(tmp_path: Path) -> None:
    """Without ``optim.clip``, Adam's moment after the spike shows by how much its gradient was scaled."""
    run(tmp_path / "clip", CLIP, "optim.clip=0", "train.checkpoint_every=30")
    run(tmp_path / "none", "optim.clip=0", "train.checkpoint_every=30")
    (record,) = rows_of(tmp_path / "clip/spikes.jsonl")
    largest = {
        name: float(checkpoints.load(checkpoints.folder_of(tmp_path / name / "checkpoints", AT)).optim[key].norm())
        for name in ("clip", "none")
        for key in ["body.3.weight/exp_avg"]
    }
    ratio = record["limit"] / record["grad_norm"]
    assert ratio < 0.1
    assert largest["clip"] < 3 * ratio * largest["none"] + 1
    assert trace(tmp_path / "clip")[-1]["skips"] == 0
    assert trace(tmp_path / "clip")[-1]["spikes"] == 1


def test_skipped_spikes_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step 34: the gradient norm .* optim.spike; spots .*train.max_skips=2"):
        run(tmp_path, SKIP, "train.max_skips=2", spikes=(30, 32, 34))


@pytest.mark.parametrize("policy", [SKIP, CLIP])
@pytest.mark.parametrize("stop", [27, 30])
def test_spikes_and_averages_resume_to_the_bit(policy: str, stop: int, tmp_path: Path) -> None:
    overrides = (policy, "optim.ema=0.95", "train.validate_every=9")
    run(tmp_path / "whole", *overrides)
    run(tmp_path / "part", *overrides, "train.keep_checkpoints=2", stop=stop)
    run(tmp_path / "part", *overrides, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "part")
    assert rows_of(tmp_path / "whole/spikes.jsonl") == rows_of(tmp_path / "part/spikes.jsonl")
    states = [
        checkpoints.load(checkpoints.folder_of(tmp_path / name / "checkpoints", 40)).state for name in ("whole", "part")
    ]
    assert states[0]["norms"] == states[1]["norms"]
    assert len(states[0]["norms"]) == 40


@pytest.mark.slow
def test_every_engine_reacts_to_a_spike_as_ddp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    outputs = run_distributed([str(Path(__file__).with_name("spike_worker.py")), str(tmp_path)], 2, fork=True)
    runs = json.loads(outputs[0].splitlines()[-1])
    for policy, by_engine in runs.items():
        assert by_engine["ddp"][-1][2:] == [int(policy == "skip"), 1]
        for engine, rows in by_engine.items():
            for row, expected in zip(rows, by_engine["ddp"], strict=True):
                assert row == pytest.approx(expected, rel=1e-4), (policy, engine)


# -- moving average -------------------------------------------------------------------------------


def twin(weights: list[dict[str, Tensor]], decay: float) -> list[dict[str, Tensor]]:
    """Return the averages after every step in float64, from the weights after every step."""
    out = [{name: w.double() for name, w in weights[0].items()}]
    for step, now in enumerate(weights[1:], start=1):
        d = min(decay, (1 + step) / (10 + step))
        out.append({name: d * out[-1][name] + (1 - d) * w.double() for name, w in now.items()})
    return out


def test_validation_and_export_use_the_average(tmp_path: Path) -> None:
    task = run(tmp_path, "optim.ema=0.9", "train.validate_every=40", spikes=())
    expected = twin(task.weights, 0.9)
    last = checkpoints.load(checkpoints.folder_of(tmp_path / "checkpoints", 40))
    export = load_file(tmp_path / "export/model.safetensors")
    for name, weight in task.weights[-1].items():
        assert torch.equal(last.model[name], weight), "the checkpoint must hold the trained weights"
        assert torch.allclose(last.ema[name].double(), expected[40][name], rtol=1e-5, atol=1e-7)
        assert torch.equal(export[name], last.ema[name])
        assert not torch.equal(export[name], weight)
    (row,) = [r for r in trace(tmp_path) if r["kind"] == "valid"]
    net = Net()
    net.load_state_dict(export)
    net.eval()
    with torch.no_grad():
        assert row["score"] == pytest.approx(-float((net.body(task.x) - task.y).square().mean()), rel=1e-6)
    assert row["weights"] == "ema"


def test_an_average_changes_no_step_and_the_best_one_is_exported(tmp_path: Path) -> None:
    plain, averaged = (run(tmp_path / str(i), *more, spikes=()) for i, more in enumerate([(), ("optim.ema=0.9",)]))
    assert all(torch.equal(plain.weights[-1][name], w) for name, w in averaged.weights[-1].items())
    config = config_of(*LENGTH, "optim.ema=0.9", "train.validate_every=10")
    task = Spiking(config, spikes=())
    task.scores = {10: 1.0, 20: 3.0, 30: 2.0, 40: 0.0}
    Trainer(task, config, tmp_path / "best").fit()
    best = checkpoints.load(checkpoints.folder_of(tmp_path / "best/checkpoints", 20))
    export = load_file(tmp_path / "best/export/model.safetensors")
    assert all(torch.equal(export[name], value) for name, value in best.ema.items())
    assert len(best.ema) == len(task.weights[0])


def test_a_parameter_that_thaws_is_averaged_from_then_on(tmp_path: Path) -> None:
    settings = ("optim.ema=0.9", "optim.freeze=[[body.0, 6]]", "train.checkpoint_every=5", "train.keep_checkpoints=9")
    task = run(tmp_path, *settings, spikes=())
    early = checkpoints.load(checkpoints.folder_of(tmp_path / "checkpoints", 5))
    assert "body.0.weight" not in early.ema
    last = checkpoints.load(checkpoints.folder_of(tmp_path / "checkpoints", 40))
    for name, value in twin(task.weights, 0.9)[40].items():
        assert torch.allclose(last.ema[name].double(), value, rtol=1e-5, atol=1e-7)


def test_a_damaged_average_is_found(tmp_path: Path) -> None:
    run(tmp_path, "optim.ema=0.9", spikes=())
    folder = checkpoints.folder_of(tmp_path / "checkpoints", 40)
    (folder / checkpoints.EMA).unlink()
    with pytest.raises(checkpoints.CheckpointError, match=r"ema\.safetensors: missing"):
        checkpoints.load(folder)


def test_weights_in_files_are_read_for_every_average() -> None:
    """As with NVMe: the shard, of which the last element is padding, is empty between steps."""
    shard, stored, reads = torch.empty(0), torch.tensor([1.0, 2.0, float("nan")]), []

    @contextmanager
    def loaded() -> Iterator[None]:
        shard.data = stored.clone()
        reads.append(shard.numel())
        yield
        shard.data = torch.empty(0)

    average = WeightAverage(0.5)
    average.attach([OwnWeights("a", True, shard, 6, 2, loaded)])
    assert average.tensors()["a"][:2].tolist() == [1, 2]
    stored += 11
    average.update(1)
    assert average.tensors()["a"][:2].tolist() == pytest.approx([10, 11])  # the decay of step 1 is 2/11
    assert reads == [3, 3]
    saved = HeldReader(Checkpoint({}, {}, {}, {"a": torch.arange(8.0)}))
    average.attach([OwnWeights("a", True, shard, 6, 2, loaded)], saved)
    assert average.tensors()["a"][:2].tolist() == [6, 7]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.ema=1"], "optim.ema"),
        (["optim.spike.factor=1"], "optim.spike.factor"),
        (["optim.spike.policy=stop"], "optim.spike.policy"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(None, overrides)
