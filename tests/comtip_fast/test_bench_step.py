"""``comtip bench step``: the plain step is the same work, every contender is measured, and the clock attributes every second."""

import csv
import time
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from comtip_shards import ShardSet

from comtip_fast.benchmarks.step import measure
from comtip_fast.benchmarks.step.clock import OTHER, PARTS, PartClock
from comtip_fast.benchmarks.step.contender import Ours, StepContender
from comtip_fast.benchmarks.step.measure import Measured, product_rate, ratio
from comtip_fast.benchmarks.step.peers import open_clip_is_installed
from comtip_fast.benchmarks.step.plain import Plain
from comtip_fast.benchmarks.step.run import benchmark_step, check_equal_loss, config_of
from comtip_fast.cli import bench as command
from comtip_fast.training import losses
from comtip_fast.training.task import CoMTIPTask, build_task

SIZES = ("data.batch_size=16", "panel.max_genes=12", "data.workers=0", "text.depth=2", "vision.patch_px=8")


@pytest.fixture(scope="module")
def task(tiny_shards: ShardSet, tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> CoMTIPTask:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text("name: tiny\n")
    return build_task(config_of(path, [*tiny_overrides, *SIZES], tiny_shards, "cpu"), torch.device("cpu"))


def test_the_plain_step_has_our_loss_and_our_gradients(task: CoMTIPTask):
    plain = Plain(task)
    assert check_equal_loss(task, plain) < 1e-5
    batch = task.batch(task.batches(0)[0], 1, 0)
    task.losses(task.model, batch)[0]["loss"].backward()
    plain.loss(batch).backward()
    expected = {n: p.grad for n, p in task.model.named_parameters() if p.grad is not None}
    found = {n: p.grad for n, p in plain.model.named_parameters() if p.grad is not None}
    assert set(found) == set(expected)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-5, msg=name)
    task.model.zero_grad()


def test_a_plain_step_that_does_other_work_is_refused(task: CoMTIPTask, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Plain, "_pair", lambda _self, vector, *_args: vector.new_zeros(()))
    with pytest.raises(ValueError, match="not comparable"):
        check_equal_loss(task, Plain(task))


@pytest.fixture
def small_text_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace open_clip's text tower, if it is installed, by one of a layer: its own takes as long as the other tests."""
    if open_clip_is_installed():
        from open_clip import transformer

        small = partial(transformer.TextTransformer, width=64, heads=2, layers=1)
        monkeypatch.setattr(transformer, "TextTransformer", small)


@pytest.mark.usefixtures("small_text_tower")
def test_the_command_measures_every_step(tiny_shards: ShardSet, tiny_overrides: list[str], tmp_path: Path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text("name: tiny\n")
    args = Namespace(
        config=config, set=[*tiny_overrides, *SIZES], shards=tiny_shards.path, source=None, work=tmp_path, px=None
    )
    args = Namespace(**vars(args), out=None, steps=["plain", "bleep", "open_clip"], rounds=1, per_round=1, device="cpu")
    assert command._step(args) == 0
    lines = (tmp_path / "step.csv").read_text().splitlines()
    assert "commit" in lines[0]
    assert "batches of 16, 12 genes" in lines[1]
    rows = {row["step"]: row for row in csv.DictReader(lines[2:])}
    assert set(rows) == {"comtip", "plain PyTorch", "BLEEP-like"} | (
        {"open_clip"} if open_clip_is_installed() else set()
    )
    assert "samples_per_s" in capsys.readouterr().out
    for name, row in rows.items():
        assert float(row["samples_per_s"]) > 0, name
        assert float(row["gflop"]) > 0, name
        assert float(row["peak_mb"]) > 0, name
        assert "Self CPU" in (tmp_path / f"profile_{name.replace(' ', '_')}.txt").read_text()
    ours, plain = rows["comtip"], rows["plain PyTorch"]
    # A panel of 12 genes and 16 spots: sentences are encoded once per (gene, level) and not twice per spot.
    assert float(plain["gflop"]) > 1.2 * float(ours["gflop"])
    for part in (p for p in PARTS if p != "communication"):  # one process does not communicate
        assert float(ours[f"{part}_s"]) > 0, part
        # Only our step encodes all and visible patches in one pass.
        assert (float(plain[f"{part}_s"]) > 0) == (part != "vision both"), part


def test_functions_are_replaced_only_while_their_parts_are_timed(task: CoMTIPTask):
    before = losses.table_pool
    ours = Ours(task)
    with ours.timed():
        assert losses.table_pool is not before
        assert "project_tokens" in vars(task.model)
    assert losses.table_pool is before
    assert "project_tokens" not in vars(task.model)


def test_the_clock_attributes_forward_and_backward():
    now = [0.0]

    class Slow(torch.autograd.Function):
        """Takes ``seconds`` forward and twice that backward."""

        @staticmethod
        def forward(ctx, x, seconds):
            ctx.seconds = seconds
            now[0] += seconds
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            now[0] += 2 * ctx.seconds
            return grad, None

    clock = PartClock(torch.device("cpu"), lambda: now[0])
    first = clock.wrap(lambda x: Slow.apply(x, 1.0), "vision full")
    second = clock.wrap(lambda x: Slow.apply(first(x), 10.0), "InfoNCE")  # nested: the inner part is not the outer's
    x = torch.ones(3, requires_grad=True)
    second(x).sum().backward()
    assert not clock.seconds  # it does not run
    now[0] = 0.0
    clock.start()
    second(x).sum().backward()
    clock.end_backward()
    with clock.part("optimizer"):
        now[0] += 5.0
    now[0] += 0.5
    clock.stop()
    assert clock.seconds["vision full"] == 3.0
    assert clock.seconds["InfoNCE"] == 30.0
    assert clock.seconds["optimizer"] == 5.0
    assert clock.seconds[OTHER] == 0.5
    assert set(clock.seconds) <= {*PARTS, OTHER}


def test_ratios_are_paired_by_round():
    ours = Measured("comtip", [10.0, 2.0, 8.0])
    other = Measured("plain PyTorch", [5.0, 0.5, 2.0])
    assert ratio(ours, other) == (4.0, 2.0, 4.0)


def test_unknown_steps_are_refused(task: CoMTIPTask, tmp_path: Path):
    with pytest.raises(ValueError, match="`steps` clip: no such step"):
        benchmark_step(task.config, ["clip"], rounds=1, per_round=1, out=tmp_path)


def test_a_set_with_fewer_spots_than_a_batch_is_refused(task: CoMTIPTask, tmp_path: Path):
    config = replace(task.config, data=replace(task.config.data, batch_size=256))
    with pytest.raises(ValueError, match="98 training spots, fewer than a batch of 256"):
        benchmark_step(config, ["ours"], rounds=1, per_round=1, out=tmp_path)


def test_smaller_batches_are_counted_as_what_they_are_or_left_out():
    class Steps(StepContender):
        def __init__(self) -> None:
            self.device, self.sizes = torch.device("cpu"), iter((16, 16, 2, 17))
            self.clock, self.trained = PartClock(self.device), []

        def load(self) -> Namespace:
            return Namespace(spot_index=torch.arange(next(self.sizes)))

        def train(self, batch: Namespace) -> torch.Tensor:
            self.trained.append(len(batch.spot_index))
            return batch.spot_index.sum()

    assert measure._run(Steps(), 3, 0)[1] == 34
    # The rest of an epoch would cost a step that encodes a table more per sample than others, and has other operations.
    steps = Steps()
    assert measure._run(steps, 3, 16)[1] == 49
    assert steps.trained == [16, 16, 17]
    measure.seconds_by_part(steps := Steps(), 3, 16)
    assert steps.trained == [16, 16, 17]


def test_gradients_of_the_last_step_are_no_part_of_the_memory_at_the_start(
    task: CoMTIPTask, monkeypatch: pytest.MonkeyPatch
):
    """Our step frees them when it begins, the other ones when they end: on a GPU, the memory at the start is subtracted."""
    ours = Ours(task)
    ours.train(ours.load())
    weights = [p for p in ours.engine.module.parameters() if p.grad is not None]
    assert weights
    at_the_start: list[bool] = []
    monkeypatch.setattr(ours, "train", lambda _batch: at_the_start.extend(p.grad is not None for p in weights))
    measure.peak_mb(ours, None)
    assert at_the_start == [False] * len(weights)


def test_a_loader_that_is_slower_than_its_step_makes_it_wait(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """While other steps train, loaders prepare batches; a step does not get them for nothing."""
    now = [0.0]
    monkeypatch.setattr(measure, "time", Namespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(measure, "product_rate", lambda *_: 1e9)
    monkeypatch.setattr(measure, "peak_mb", lambda *_: 1.0)
    monkeypatch.setattr(measure, "counted_gflop", lambda *_: 1.0)

    class Slow(StepContender):
        name, prepared_ahead = "slow loader", 3

        def __init__(self) -> None:
            self.device, self.ready, self.began = torch.device("cpu"), 0.0, now[0]
            self.config = Namespace(train=Namespace(precision="fp32"))
            self.clock = PartClock(self.device, lambda: now[0])

        def load(self) -> Namespace:
            # The background prepares a batch per second, and keeps three.
            self.ready, self.began = min(3.0, self.ready + now[0] - self.began), now[0]
            with self.clock.part("loader"):
                now[0] += max(0.0, 1.0 - self.ready)
            self.ready, self.began = max(0.0, self.ready - 1.0), now[0]
            return Namespace(spot_index=torch.arange(16))

        def train(self, batch: Namespace) -> torch.Tensor:
            now[0] += 0.25
            return batch.spot_index.sum()

    class Other(Slow):
        name, prepared_ahead = "other", 0

        def load(self) -> Namespace:
            now[0] += 100.0
            return Namespace(spot_index=torch.arange(16))

    found, _ = measure.measure([Slow(), Other()], rounds=3, steps=2, out=tmp_path)
    assert found.samples_per_s == pytest.approx([16.0] * 3)
    assert found.seconds["loader"] == pytest.approx(0.75)


def test_the_product_rate_is_positive():
    began = time.perf_counter()
    assert product_rate(torch.device("cpu"), "fp32") > 1e8
    assert time.perf_counter() - began < 60
