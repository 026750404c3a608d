"""The sweep over devices: which memory and time grows, and where scaling stops."""

from pathlib import Path

import pytest
from PIL import Image

from comtip_fast.cli import main
from comtip_fast.config.io import load_config
from comtip_fast.plan.hardware import make_cluster
from comtip_fast.plan.scaling.sweep import DESIGNS, MIN_SPEEDUP, Sweep, scales_to, sweep, table
from comtip_fast.plan.sizes import Inputs

DEMO = Path(__file__).parents[2] / "configs" / "demo_cpu.yaml"
LARGE = [
    "vision.backbone=vit_base_patch32_224",
    "data.batch_size=4096",
    "panel.max_genes=512",
    "levels.n_levels=32",
    "text.depth=4",
    "text.width=256",
    "align.dim=256",
]
WHOLE_GATHER, WHOLE_RING, SHARDED_GATHER, SHARDED_RING = DESIGNS[:4]


@pytest.fixture(scope="module")
def found() -> Sweep:
    return sweep(load_config(DEMO, LARGE), make_cluster("h100", per_node=8), Inputs(trained_genes=4000))


def memory(found: Sweep, design: int, starts: str) -> list[float]:
    return [
        sum(r.bytes for r in p.largest.memory if r.name.startswith(starts)) for p in found.line("weak", DESIGNS[design])
    ]


def test_a_replicated_table_costs_the_same_everywhere_and_a_sharded_one_less(found: Sweep):
    def seconds(design: int) -> list[float]:
        line = found.line("weak", DESIGNS[design])
        return [next(t.seconds for t in p.largest.times if t.name == "sentence table") for p in line]

    assert len(set(seconds(0))) == 1
    whole, shared = seconds(0), seconds(2)
    assert shared[3] < whole[3] / 4
    # Sentences are sharded, not genes: 512 genes still scale to 1,024 devices.
    assert shared[10] < whole[10] / 4
    assert shared[10] <= shared[9]


def test_buffers_grow_with_gather_but_not_with_ring(found: Sweep):
    gather, ring = memory(found, 2, "loss"), memory(found, 3, "loss")
    assert ring[1] == ring[-1]
    assert gather[-1] == pytest.approx(1024 * 2 * found.per_device * 256 * 4, rel=0.02)


def test_each_stage_of_zero_needs_less_state(found: Sweep):
    state = [
        sum(sum(x) for x in zip(memory(found, d, "gradients"), memory(found, d, "AdamW"), strict=True))
        for d in (2, 4, 5, 6)
    ]
    assert state[0] > state[1] >= state[2] >= state[3]


def test_gradients_persist_between_steps_without_deepspeed(found: Sweep):
    lasts = {
        name: next(r.lasts for r in found.line("weak", DESIGNS[d])[1].largest.memory if r.name.startswith("gradients"))
        for name, d in (("DDP", 2), ("ZeRO 1", 4), ("ZeRO 2", 5), ("ZeRO 3", 6))
    }
    assert lasts == {"DDP": True, "ZeRO 1": False, "ZeRO 2": False, "ZeRO 3": True}


def test_scaling_stops_at_the_first_doubling_below_the_minimum_speedup(found: Sweep):
    for design in (WHOLE_GATHER, WHOLE_RING, SHARDED_GATHER, SHARDED_RING):
        line = {p.devices: p.mean.spots_per_s for p in found.line("strong", design)}
        last = scales_to(found.line("strong", design))
        assert all(line[2 * n] >= MIN_SPEEDUP * line[n] for n in line if 2 * n <= last)
        if 2 * last in line:
            assert line[2 * last] < MIN_SPEEDUP * line[last]


def test_sharding_the_table_pays_with_few_spots_per_device(found: Sweep):
    whole, shared = ({p.devices: p.largest.spots_per_s for p in found.line("strong", d)} for d in DESIGNS[0:3:2])
    assert shared[64] > 1.2 * whole[64]
    assert shared[1] == whole[1]


def test_the_table_has_a_row_per_design_and_growth(found: Sweep):
    rows = [line for line in table(found).splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 2 * len(DESIGNS)
    assert "PREDICTED" in table(found)


def test_the_table_in_the_docs_is_current():
    root = Path(__file__).parents[2]
    config = load_config(root / "configs" / "multinode_h100.yaml")
    found = sweep(config, make_cluster("h100", per_node=8, nodes=8), Inputs())
    documented = (
        (root / "docs" / "scaling.md")
        .read_text()
        .partition("<!-- sweep -->\n")[2]
        .partition("<!-- end of sweep -->")[0]
    )
    assert documented.strip() == table(found), (
        "docs/scaling.md is out of date: run the command above the figures and copy scaling_table.md into it"
    )


def test_the_designs_of_a_sweep_replace_the_engine_of_the_config():
    config = load_config(DEMO, [*LARGE, "engine.kind=single"])
    found = sweep(config, make_cluster("h100"), Inputs(trained_genes=4000), most=2)
    assert {p.mean.engine.kind for p in found.points} == {"ddp", "deepspeed"}


def test_the_command_writes_figures(tmp_path: Path):
    overrides = [x for key in LARGE for x in ("--set", key)]
    assert (
        main(
            ["plan", "--config", str(DEMO), *overrides, "--gpus", "2", "--sweep", "--most", "4", "--out", str(tmp_path)]
        )
        == 0
    )
    for name in ("scaling_speed.png", "scaling_memory.png"):
        with Image.open(tmp_path / name) as picture:
            pixels = picture.convert("L")
            assert picture.width > 1500
            assert pixels.getextrema()[0] < 100
    assert "sharded table, ring" in (tmp_path / "scaling_table.md").read_text()
