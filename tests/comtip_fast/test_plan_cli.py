"""``comtip plan`` on the command line, as text and JSON, and the hardware table."""

import json
from pathlib import Path

import pytest

from comtip_fast.cli import main
from comtip_fast.config.io import load_config
from comtip_fast.plan.hardware import DEVICES, LINKS, Efficiency, make_cluster
from comtip_fast.plan.plan import make_plan
from comtip_fast.plan.report import render

DEMO = Path(__file__).parents[2] / "configs" / "demo_cpu.yaml"
LARGE = [
    "--config",
    str(DEMO),
    "--set",
    "vision.backbone=vit_base_patch32_224",
    "--set",
    "data.batch_size=4096",
]


def plan(capsys: pytest.CaptureFixture[str], *more: str) -> dict:
    code = main(["plan", *LARGE, "--json", *more])
    data = json.loads(capsys.readouterr().out)
    assert data["predicted"] is True
    assert code == (0 if data["fits"] else 1)
    return data


def test_the_text_marks_predictions_and_lists_assumptions(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *LARGE, "--gpus", "8", "--nodes", "2"]) == 0
    text = capsys.readouterr().out
    assert "PREDICTED" in text
    assert text.count("(predicted)") == 4
    assert "assumed: 50% of the peak" in text
    for part in (
        "vision, full",
        "mask generator",
        "sentence table",
        "InfoNCE",
        "L_level",
        "gradients: summed",
        "ib-ndr",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loader-tiles-per-s", "0"], "--loader-tiles-per-s 0: must be a finite number above 0; leave it out"),
        (["--validation-spots", "0"], "--validation-spots 0: must be at least 1; leave it out"),
        (["--loader-cores", "0"], "--loader-cores 0: give at least one core"),
        (["--tile-ms", "0"], "--tile-ms 0: give a finite time above 0"),
        (["--panel", "0"], "--panel 0: must be a finite number above 0; leave it out for the default"),
        (["--trained-genes", "-5"], "--trained-genes -5: must be a finite number above 0"),
        (["--tile-px", "0"], "--tile-px 0: must be a finite number above 0"),
        (["--tile-kb", "0"], "--tile-kb 0: must be a finite number above 0"),
        (["--gpu", "v100"], "--gpu 'v100': unknown; choose one of"),
        (["--gpus", "0"], "0 devices per node, 1 nodes: not a cluster; give at least one device per node"),
    ],
)
def test_impossible_inputs_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--config", str(LARGE[1]), "--set", "data.tile_px=null", *options]) == 2
    assert message in capsys.readouterr().err


def test_parts_sum_to_the_totals(capsys: pytest.CaptureFixture[str]):
    data = plan(capsys, "--gpus", "4")
    assert data["device_bytes"] == pytest.approx(sum(r["bytes"] for r in data["memory"] if r["where"] == "device"))
    assert data["step_seconds"] == pytest.approx(sum(t["seconds"] for t in data["times"]))
    assert data["spots_per_s"] == pytest.approx(4096 / data["step_seconds"])
    assert data["mean_panel"]["step_seconds"] < data["step_seconds"]


def test_more_devices_need_less_time_and_less_memory_each(capsys: pytest.CaptureFixture[str]):
    one, eight = plan(capsys), plan(capsys, "--gpus", "8")
    assert one["traffic"] == []
    assert 0.1 < eight["step_seconds"] / one["step_seconds"] < 0.3
    assert eight["device_bytes"] < one["device_bytes"]


def test_every_device_and_link_can_be_planned(capsys: pytest.CaptureFixture[str]):
    seconds = {name: plan(capsys, "--gpu", name)["step_seconds"] for name in DEVICES}
    assert seconds["b200"] < seconds["h200"] < seconds["a100-80"] < seconds["cpu"]
    assert seconds["h200"] <= seconds["h100"]
    slow = {name: plan(capsys, "--gpus", "2", "--link", name)["step_seconds"] for name in LINKS}
    assert slow["nvlink5"] < slow["pcie4"] < slow["memory"]


def test_a_slow_loader_limits_the_step(capsys: pytest.CaptureFixture[str]):
    data = plan(capsys, "--loader-tiles-per-s", "100")
    assert data["step_seconds"] == pytest.approx(40.96)
    assert data["times"][-1]["bound"] == "loader"


def test_the_loader_is_limited_by_the_assumed_cores(capsys: pytest.CaptureFixture[str]):
    usual = plan(capsys, "--gpus", "8")
    assert usual["loader"]["available_tiles_per_s"] == pytest.approx(8 * 12_000 * (224 / 128) ** 2)
    assert all(t["bound"] != "loader" for t in usual["times"])
    slow = plan(capsys, "--gpus", "8", "--loader-cores", "2", "--tile-ms", "20")
    assert slow["loader"]["available_tiles_per_s"] == pytest.approx(8 * 100 * (224 / 128) ** 2)
    assert slow["spots_per_s"] == pytest.approx(slow["loader"]["available_tiles_per_s"])
    assert main(["plan", *LARGE, "--gpus", "8", "--loader-cores", "2", "--tile-ms", "20"]) == 0
    assert "(2 cores per device, 20 ms per tile of 224 px): the loader limits the step" in capsys.readouterr().out


def test_a_slow_host_limits_the_step_whatever_the_sum_of_the_parts_rounds_to():
    config = load_config(None, [])
    for us in (1000, 9999):
        cluster = make_cluster("h100", efficiency=Efficiency(launch_s=us * 1e-6, cores=10**6))
        assert ": it limits the step" in render(make_plan(config, cluster))


def test_a_validation_takes_the_time_of_its_forward_pass_or_of_the_loader(capsys: pytest.CaptureFixture[str]):
    fast = ("--loader-cores", "1000")
    one, ten = (plan(capsys, *fast, "--validation-spots", str(n))["validation"] for n in (100_000, 1_000_000))
    assert one["every"] == 50
    encoder = next(p["flops"] for p in plan(capsys)["parts"] if p["name"] == "vision, full")
    products = encoder / 4096 * 1e6 / (0.5 * 989e12)
    assert products < ten["seconds"] < 2 * products
    assert 8 < ten["seconds"] / one["seconds"] < 10.5
    # Ten sections on four ranks: three on one of them.
    four = plan(capsys, *fast, "--validation-spots", "100000", "--gpus", "4")["validation"]
    assert four["seconds"] / one["seconds"] == pytest.approx(0.3, rel=0.02)
    # What the first validation read and 1 GiB does not hold is read again: tiles of 128 px.
    slow = plan(capsys, "--validation-spots", "100000", "--tile-ms", "1000")["validation"]
    assert slow["seconds"] == pytest.approx((100_000 - (1 << 30) // (3 * 128**2)) / (12 * (224 / 128) ** 2))
    few = plan(capsys, "--validation-spots", "20000", "--tile-ms", "1000")["validation"]
    assert few["seconds"] < 1
    assert plan(capsys, "--set", "train.validate_every=0")["validation"] is None


def test_features_of_a_frozen_stem_are_not_loaded(capsys: pytest.CaptureFixture[str]):
    slow = ("--loader-tiles-per-s", "100", "--set", "vision.backbone=small")
    stem = plan(capsys, *slow)
    assert all(t["bound"] != "loader" for t in stem["times"])
    assert stem["loader"]["tiles_per_s"] == 0
    every_batch = plan(capsys, *slow, "--set", "data.stem_features=batch")
    assert every_batch["step_seconds"] == pytest.approx(40.96)


def test_padded_panels_are_planned_as_they_are_computed(capsys: pytest.CaptureFixture[str]):
    padding, odd = ("--set", "engine.panel_sizes=4"), ("--panel", "130")
    drawn, padded = plan(capsys, *odd), plan(capsys, *odd, *padding)
    assert (drawn["sizes"]["G"], padded["sizes"]["G"]) == (130, 160)
    assert padded["assumed"]["sentence_tokens"] > drawn["assumed"]["sentence_tokens"]
    assert plan(capsys, *odd, *padding, "--gpu", "cpu")["sizes"]["G"] == 130
    usual, both = plan(capsys), plan(capsys, *padding)
    assert both["mean_panel"]["G"] > usual["mean_panel"]["G"]


def test_offloading_moves_state_off_the_device(capsys: pytest.CaptureFixture[str]):
    zero = ["--gpus", "4", "--set", "engine.kind=deepspeed", "--set", "engine.zero_stage=3"]
    here = plan(capsys, *zero)
    there = plan(capsys, *zero, "--set", "engine.offload_optimizer=cpu", "--set", "engine.offload_param=cpu")
    moved = {r["name"]: r["bytes"] for r in there["memory"] if r["where"] == "host"}
    # Parameters, gradients, the optimizer's shard and two moments: five fp32 numbers per parameter, over four ranks.
    assert sum(moved.values()) == pytest.approx(there["sizes"]["parameters"] * 4 * 5 / 4)
    assert here["device_bytes"] - there["device_bytes"] == pytest.approx(sum(moved.values()))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gpu", "h101"], "h100"),
        (["--gpus", "0"], "at least one device"),
        (["--link", "string"], "nvlink4"),
        (["--compute-efficiency", "1.5"], "share"),
        (["--nodes", "8192"], "at least one spot"),
        (["--set", "engine.king=ddp"], "engine"),
        (["--gpus", "2", "--set", "engine.kind=single"], "2 devices"),
    ],
)
def test_invalid_options_are_rejected(more: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *LARGE, *more]) == 2
    assert message in capsys.readouterr().err


def test_bytes_of_a_collective_on_the_links_of_two_nodes():
    from comtip_fast.plan.traffic import Collective

    cluster = make_cluster("h100", per_node=8, nodes=2, efficiency=Efficiency(link=1.0))
    gather = Collective("x", "x", "all_gather", 16e9)
    assert gather.sent(16) == 15e9
    # Half of the 16 GB is on the other node and arrives over eight adapters.
    assert gather.on_links(cluster) == (14e9, 1e9)
    # In a ring, every block crosses the same adapter.
    assert Collective("x", "x", "ring", 16e9).on_links(cluster) == (15e9, 15e9)
    assert gather.seconds(cluster) == pytest.approx(14e9 / 450e9, rel=0.01)
    assert Collective("x", "x", "ring", 16e9).seconds(cluster) == pytest.approx(15e9 / 50e9, rel=0.01)
