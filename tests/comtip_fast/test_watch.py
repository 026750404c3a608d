"""Run monitoring: throughput, spike detection, watchdog, traces, and metrics of the shared space."""

import gzip
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import comtip_fast
from comtip_fast.collectives import SingleProcessGroup
from comtip_fast.config.io import ConfigError, load_config
from comtip_fast.config.schema import WatchConfig
from comtip_fast.plan.live import device_of, step_cost
from comtip_fast.training.checkpoint.run_state import RunState
from comtip_fast.training.distributed.comm_timer import ClockedGroup, CommClock, clock_backend
from comtip_fast.training.monitor import step_reporter
from comtip_fast.training.monitor.monitor import Events, SpikeDetector, ThroughputMeter, Watchdog
from comtip_fast.training.protocol import StepCost
from comtip_fast.training.trainer import Trainer
from comtip_fast.training.validation import space_numbers
from testkit.distributed import run_distributed
from tests.comtip_fast.trainer_standin import StandIn, config_of

CPU = torch.device("cpu")


def rows_of(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    path = folder / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_the_meter_divides_by_the_time_of_its_own_window():
    clock = CommClock(CPU)
    meter = ThroughputMeter(CPU, comm=clock, cost=StepCost(lambda spots, genes: 1e9 * spots * genes, peak=1e12))
    clock._count(time.perf_counter() - 9.0)
    meter.begin()  # waiting between steps is not counted
    for waited in (0.2, 0.3):
        clock._count(time.perf_counter() - waited)
        meter.add(1.0, 10, {"genes": 5.0, "tokens": 100.0})
    row = meter.row(loader_wait_s=0.2)
    assert row["spots_per_s"] == pytest.approx(10)
    assert row["tokens_per_s"] == pytest.approx(100)
    assert row["tflops_per_s"] == pytest.approx(0.05)
    assert row["mfu"] == pytest.approx(0.05)
    assert row["loader_wait_share"] == pytest.approx(0.1)
    assert row["comm_share"] == pytest.approx(0.25, rel=1e-3)
    meter.add(4.0, 10, {})
    assert meter.row(0.0)["spots_per_s"] == pytest.approx(2.5)


def test_the_time_of_a_row_includes_the_wait_for_its_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A host launches steps faster than a GPU takes them, and waits when it reads their losses."""
    now = [100.0]

    def read(pending: list[object]) -> list[object]:
        now[0] += 9.0
        return []

    monkeypatch.setattr(step_reporter, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(step_reporter, "read_steps", read)
    config, device = load_config(None, ["train.log_every=4"]), torch.device("meta")  # a device whose reads wait
    reporter = step_reporter.StepReporter(StandIn(config), config, tmp_path, SingleProcessGroup(), device, None)
    for step in (3, 4):  # launched in a second each; the second of them is logged
        now[0] += 1.0
        reporter.after_step(RunState(step=step), now[0] - 1.0, 30, {})
    reporter.report(RunState(step=4))  # as before a checkpoint
    assert reporter.meter.row(loader_wait_s=0.0)["spots_per_s"] == pytest.approx(60 / (1 + 10 + 9))


def test_a_clocked_group_counts_the_time_of_its_collectives_once():
    class Slow(SingleProcessGroup):
        def sum(self, values):
            time.sleep(0.03)
            return values

    group = ClockedGroup(Slow(), CPU)
    group.sum(torch.ones(1))
    group.sum(torch.ones(1))
    assert group.clock.seconds() >= 0.06
    assert group.clock.seconds() == 0.0


def test_waiting_for_a_slow_rank_is_counted_for_every_engine(tiny_shards, tiny_overrides):
    """Rank 1 is slow in its backward pass only: rank 0 waits in the gradient collectives and nowhere else."""
    pytest.importorskip("deepspeed")
    worker = Path(__file__).with_name("comm_worker.py")
    overrides = ",".join([*tiny_overrides, f"data.shards={tiny_shards.path}"])
    outputs = run_distributed([str(worker), overrides], 2, fork=True)
    ranks = [json.loads(text.strip().splitlines()[-1]) for text in outputs]
    assert ranks[0].keys() == {"ddp", "zero0", "zero1", "zero2", "zero3"}
    for name, waited in ranks[0].items():
        assert waited > ranks[1][name] + 0.3, (name, ranks)


def test_a_collective_of_collectives_counts_once_and_a_backend_has_one_clock():
    class Backend:
        def all_reduce(self) -> None:
            time.sleep(0.03)

        def reduce(self) -> None:
            self.all_reduce()

    backend, before, clock = Backend(), CommClock(CPU), CommClock(CPU)
    clock_backend(backend, before)
    clock_backend(backend, clock)
    began = time.perf_counter()
    backend.reduce()
    assert 0.03 <= clock.seconds() <= time.perf_counter() - began
    assert before.seconds() == 0.0


def test_the_spike_detector_needs_a_history_and_names_what_jumped():
    alarm = SpikeDetector(WatchConfig(loss_jump=3.0, norm_jump=30.0))
    assert all(alarm.update(5.0 + 0.1 * i, 1.0) is None for i in range(20))
    assert alarm.update(7.0, 2.0) is None
    message = alarm.update(60.0, 1.0)
    assert message is not None
    assert message.startswith("loss 60")
    message = alarm.update(6.0, 99.0)
    assert message is not None
    assert message.startswith("gradient norm")
    assert SpikeDetector(WatchConfig(loss_jump=0, norm_jump=0)).update(math.inf, math.inf) is None
    alarm = SpikeDetector(WatchConfig())
    assert all(alarm.update(1.0, 0.0) is None for _ in range(20))
    assert alarm.update(1.0, 1e-3) is None, "there is no multiple of a median of 0"


def test_the_watchdog_reports_a_stall_once_with_stacks(tmp_path: Path):
    reports: list[str] = []
    with Watchdog(0.2, reports.append, tmp_path / "stacks.txt") as dog:
        dog.reset("step 7")
        time.sleep(1.0)
        dog.reset("step 8")
    assert len(reports) == 1
    assert "step 7" in reports[0]
    assert "test_the_watchdog" in (tmp_path / "stacks.txt").read_text()


def test_a_run_flags_a_jump_and_a_stall_and_continues(tmp_path: Path):
    config = config_of(
        "train.steps=40",
        "watch.stall_s=0.3",
        "watch.norm_jump=0",
        "watch.loss_jump=20",
        "optim.lr=1e-6",
        "train.validate_every=0",
    )
    task = StandIn(config, at_step=lambda step: time.sleep(1.0) if step == 5 else None)
    plain = task.losses

    def jumping(module, batch):
        losses, numbers = plain(module, batch)
        return {k: v * (100 if task.step == 35 else 1) for k, v in losses.items()}, numbers

    task.losses = jumping
    result = Trainer(task, config, tmp_path).fit()
    assert result.step == 40
    events = rows_of(tmp_path, "events.jsonl")
    assert [(e["kind"], e["step"]) for e in events] == [("stall", 4), ("jump", 35)]
    assert "step 5" in events[0]["text"]


def test_a_trace_is_written_for_the_steps_asked_for_also_when_the_run_ends_early(tmp_path: Path):
    for name, trace in (("inside", "[2,3]"), ("early", "[16,99]")):
        config = config_of(f"watch.trace={trace}")
        Trainer(StandIn(config), config, tmp_path / name).fit()
        with gzip.open(tmp_path / name / "trace/rank0.json.gz", "rt") as file:
            events = json.load(file)["traceEvents"]
        steps = sum(e.get("name") == "Optimizer.step#AdamW.step" for e in events)
        assert steps == 2


def test_perfect_random_and_turned_pairs():
    x = torch.nn.functional.normalize(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    same = space_numbers(x, x)
    assert same["alignment"] == pytest.approx(0, abs=1e-5)
    assert same["r1"] == same["t1"] == 1.0
    shifted = space_numbers(x, x.roll(1, 0))
    assert shifted["r1"] == shifted["t1"] == 0.0
    assert space_numbers(x, -x)["alignment"] == pytest.approx(4, abs=1e-5)
    # All vectors are equal: no spread, and a tie does not count as retrieved.
    one = x[:1].expand(64, 16)
    assert space_numbers(one, one)["uniformity_image"] == pytest.approx(0, abs=1e-6)
    assert space_numbers(one, one)["r5"] == 0.0
    slow = sum(math.exp(-2 * float((a - b).square().sum())) for i, a in enumerate(x) for j, b in enumerate(x) if i != j)
    assert same["uniformity_text"] == pytest.approx(math.log(slow / (64 * 63)), abs=1e-5)


def test_rows_and_validation_of_a_real_task_carry_the_numbers(tiny_run: Path):
    rows = rows_of(tiny_run)
    train = [r for r in rows if r["kind"] == "train"]
    wanted = {"spots_per_s", "tokens_per_s", "loader_wait_share", "comm_share", "memory_gib", "faults"}
    assert wanted <= train[-1].keys()
    assert 0 <= train[-1]["loader_wait_share"] <= 1
    assert "mfu" not in train[-1]  # the peak rate of a CPU is unknown
    valid = [r for r in rows if r["kind"] == "valid"]
    assert {"alignment", "uniformity_image", "r1", "t5"} <= valid[-1].keys()


def test_the_cost_of_a_step_is_what_the_flop_counter_counts(tiny_shards, tiny_overrides):
    from comtip_kernels.dispatch import prefer

    from comtip_fast.config.io import load_config
    from comtip_fast.training.task import build_task

    config = load_config(None, [*tiny_overrides, f"data.shards={tiny_shards.path}", "loss.paat.candidates=1"])
    task = build_task(config, CPU)
    cost = step_cost(config, task.model, tile_px=task.sizes.tile_px, trained_genes=task.sizes.n_identities, ranks=1)
    small, large = cost.flops(8, 4), cost.flops(16, 4)
    assert small < large < 2 * small + 1
    assert cost.peak is None
    spots = task.batches(0)[0]
    batch = task.batch(spots, 3, 0)
    with prefer("reference"), FlopCounterMode(display=False) as counted:
        losses, _ = task.losses(task.model, batch)
        losses["loss"].backward()
    assert cost.flops(len(spots), batch.panel.numel()) == pytest.approx(counted.get_total_flops(), rel=0.1)


def test_a_run_does_not_need_to_know_the_cost_of_its_blocks(
    tiny_shards, tiny_overrides, tmp_path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Regression test: ``pretrain`` refused a SwiGLU backbone, which the model supports, because its FLOP/s could not be logged."""
    from timm.layers import SwiGLU

    from comtip_fast.models import image_encoder

    build = image_encoder.timm.create_model

    def with_swiglu(*args, **options):
        vit = build(*args, **options)
        for block in vit.blocks:
            block.mlp = SwiGLU(vit.embed_dim, 2 * vit.embed_dim)
        return vit

    monkeypatch.setattr(image_encoder.timm, "create_model", with_swiglu)
    config = tmp_path / "c.yaml"
    config.write_text("{}\n")
    settings = [*tiny_overrides, f"data.shards={tiny_shards.path}", "vision.backbone=test_vit", "train.steps=2"]
    settings += ["train.validate_every=0", "train.log_every=1"]
    result = comtip_fast.pretrain(config, tmp_path / "run", overrides=settings, device="cpu")
    assert result.step == 2
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "tflops_per_s" not in next(r for r in rows if r["kind"] == "train")
    assert "no costs are known for its blocks" in caplog.text


def test_device_names_find_their_row():
    for name, key in (("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-40GB", "a100-40"), ("NVIDIA H200", "h200")):
        found = device_of(name)
        assert found is not None
        assert found.name == key
    assert device_of("NVIDIA GeForce RTX 4090") is None
    assert device_of("NVIDIA H100 PCIe") is None


def test_events_are_lines_of_json(tmp_path: Path):
    Events(tmp_path / "events.jsonl").flag("jump", 3, "loss 9 is 3.0 times the median")
    assert rows_of(tmp_path, "events.jsonl") == [{"step": 3, "kind": "jump", "text": "loss 9 is 3.0 times the median"}]


@pytest.mark.parametrize("bad", ["watch.trace=[5,2]", "watch.trace=[0,2]", "watch.stall_s=-1"])
def test_invalid_settings_are_refused(bad: str):
    with pytest.raises(ConfigError, match=r"watch\."):
        config_of(bad)
