"""The plan's memory and communication against two gloo ranks: live bytes of every engine, every collective counted."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from comtip_shards import ShardSet

from comtip_fast.config.io import load_config
from comtip_fast.config.schema import RunConfig
from comtip_fast.plan.hardware import make_cluster
from comtip_fast.plan.memory import MemoryRow, state_rows
from comtip_fast.plan.plan import Plan, make_plan
from comtip_fast.plan.rank_share import stored_together
from comtip_fast.plan.sizes import Inputs, sizes_of
from testkit.distributed import run_distributed

WORKER = Path(__file__).with_name("plan_worker.py")
W = 2
SETTINGS = [
    "data.batch_size=24",
    "data.views=1",
    "data.workers=0",
    "genes.per_cohort=30",
    "genes.held_out_from=10",
    "genes.held_out_every=4",
    "panel.min_genes=24",
    "panel.max_genes=24",
    "levels.n_levels=5",
    "levels.min_positive=10",
    "vision.patch_px=8",
    "vision.width=128",
    "vision.depth=3",
    "vision.heads=2",
    "text.width=64",
    "text.depth=2",
    "text.heads=2",
    "text.max_tokens=6",
    "align.dim=64",
    "train.log_every=1000",
    "train.threads=1",
    "engine.bucket_mb=0.5",
    "engine.persist_elements=100",
]
pytestmark = pytest.mark.slow
CASES = {
    "DDP": [],
    "DDP, ring, checkpointing": ["engine.loss_form=ring", "engine.activation_checkpointing=true"],
    "DDP, replicated table, strata": ["engine.shard_table=false", "loss.paat.mode=strata"],
    "DDP, micro-batches": ["engine.micro_batches=3"],
    **{f"ZeRO {n}": ["engine.kind=deepspeed", f"engine.zero_stage={n}"] for n in range(4)},
    "ZeRO 3, averaged weights": ["engine.kind=deepspeed", "engine.zero_stage=3", "optim.ema=0.9"],
    "ZeRO 2, micro-batches": ["engine.kind=deepspeed", "engine.zero_stage=2", "engine.micro_batches=3"],
    **{
        f"ZeRO 3, {n} micro-batches": ["engine.kind=deepspeed", "engine.zero_stage=3", f"engine.micro_batches={n}"]
        for n in (2, 3)
    },
}


def config_of(case: str) -> RunConfig:
    return load_config(None, [*SETTINGS, *CASES[case]])


def measure_all(shards: Path) -> dict[str, dict[str, Any]]:
    """Run all cases on two ranks that are started once; return the results of rank 0."""
    cases = [f"{name}={';'.join([*SETTINGS, *more])}" for name, more in CASES.items()]
    # Not forked: the worker replaces collectives before other modules import them.
    output = run_distributed([str(WORKER), str(shards), *cases], W, timeout_s=500)
    results = [json.loads(line[5:]) for line in output[0].splitlines() if line.startswith("CASE ")]
    return {r["name"]: r for r in results}


@pytest.fixture(scope="module")
def measured(tiny_shards: ShardSet) -> dict[str, dict[str, Any]]:
    return measure_all(tiny_shards.path)


def plan_of(case: str, found: dict[str, Any]) -> Plan:
    """Plan the measured step, with its spots, its genes and their sentence lengths."""
    config, n = config_of(case), len(found["length"])
    inputs = Inputs(tile_px=32, trained_genes=found["trained"], panel=found["genes"])
    own = found["length"][: -(-n // W)] if config.engine.shard_table else found["length"]
    mean, attended = sum(own) / len(own), sum(x * x for x in own) / sum(own)
    sizes = replace(sizes_of(config, inputs), B=found["spots"] * W, tokens=mean, attended=attended)
    return make_plan(config, make_cluster("cpu", per_node=W), inputs, sizes=sizes)


def total(rows: list[MemoryRow] | tuple[MemoryRow, ...], *, lasting: bool) -> float:
    return sum(r.bytes for r in rows if r.lasts or not lasting)


@pytest.mark.parametrize("case", CASES)
def test_live_bytes_between_steps(case: str, measured: dict[str, dict[str, Any]]):
    plan = plan_of(case, measured[case])
    rows = state_rows(plan.sizes, plan.engine, W)
    assert total(rows, lasting=True) == pytest.approx(measured[case]["after_step"], rel=0.02)


@pytest.mark.parametrize("case", CASES)
def test_live_bytes_after_the_backward_pass(case: str, measured: dict[str, dict[str, Any]]):
    plan = plan_of(case, measured[case])
    # The bucket of ZeRO 1 and 2 and the parameters gathered by ZeRO 3 are freed by the end of the backward pass.
    rows = [r for r in state_rows(plan.sizes, plan.engine, W) if r.lasts or r.name.startswith("gradients")]
    assert total(rows, lasting=False) == pytest.approx(measured[case]["after_backward"], rel=0.10)


@pytest.mark.parametrize("case", [c for c in CASES if "micro-batches" not in c])
def test_activations_of_a_rank(case: str, measured: dict[str, dict[str, Any]]):
    plan, found = plan_of(case, measured[case]), measured[case]
    saved = sum(p.saved for p in stored_together(plan.parts))
    batch = plan.share.spots * plan.sizes.P * plan.sizes.patch_inputs * 4
    # The distributed loss saves unit vectors and, in the gather form, all images; gradients are computed later.
    vectors = plan.share.spots * (0 if plan.engine.loss_form == "ring" else W - 1) * plan.sizes.D * 4
    assert saved + batch + vectors == pytest.approx(found["saved"], rel=0.10)


@pytest.mark.parametrize("case", CASES)
def test_every_collective_is_counted(case: str, measured: dict[str, dict[str, Any]]):
    plan, found = plan_of(case, measured[case]), measured[case]["sent"]
    predicted: dict[str, float] = {}
    for item in plan.traffic:
        predicted[item.kind] = predicted.get(item.kind, 0.0) + item.sent(W)
    # Ranks also all-reduce a few scalars: counts, weights, norms.
    assert found.keys() - predicted.keys() <= {"all_reduce"}
    for kind, sent in predicted.items():
        assert sent == pytest.approx(found[kind], rel=0.02, abs=100), kind


def test_sharding_and_checkpointing_reduce_memory(measured: dict[str, dict[str, Any]]):
    after_step = {case: found["after_step"] for case, found in measured.items()}
    assert after_step["ZeRO 0"] > after_step["ZeRO 1"]
    assert after_step["ZeRO 3, averaged weights"] > after_step["ZeRO 3"]
    assert measured["DDP"]["saved"] < measured["DDP, replicated table, strata"]["saved"]
    assert measured["DDP, ring, checkpointing"]["saved"] < measured["DDP"]["saved"] / 2
