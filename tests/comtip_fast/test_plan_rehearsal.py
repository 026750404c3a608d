"""``comtip plan`` predicts what the rehearsal counted in the steps of every config (``bench/rehearsal.csv``)."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from comtip_fast.config.io import load_config
from comtip_fast.config.schema import RunConfig
from comtip_fast.genes import GeneTokenizer
from comtip_fast.genes.tokens import gene_tokens
from comtip_fast.plan import host, loss_parts, parts, rank_share
from comtip_fast.plan.hardware import make_cluster
from comtip_fast.plan.plan import Plan, make_plan
from comtip_fast.plan.sizes import Inputs
from comtip_fast.plan.timing import optimizer_cost
from testkit.synthetic_task import gene_names

ROOT = Path(__file__).parents[2]
ROWS = [
    row
    for row in csv.DictReader((ROOT / "bench" / "rehearsal.csv").open(encoding="utf-8"))
    if row["walk"].split()[0] == "step"
]
NAMES = [f"{r['config']} on {r['ranks']}: {r['walk']}" for r in ROWS]


@cache
def tokens_of(names: int, panel: int, max_tokens: int, full_name: bool) -> float:
    """Return the mean tokens per sentence of the panel that the rehearsal uses; of all genes if ``panel`` is their number."""
    config = load_config(None, [f"text.max_tokens={max_tokens}", f"text.full_name={full_name}".lower()])
    genes = gene_tokens(GeneTokenizer.load(), gene_names(names), np.arange(1, names + 1), config.text)
    return float(genes.length_G[:: names // panel][:panel].double().mean())


def planned(row: dict[str, str], *, compiled: bool = False, fused: bool = True) -> Plan:
    """Return the plan of the config, engine and ranks of a row; the rehearsal walks blocks that are not compiled."""
    overrides = [f"engine.compile={compiled}".lower(), f"engine.fused_blocks={fused}".lower()]
    overrides += [f"engine.{word}" for word in row["walk"].split()[1:]]
    config: RunConfig = load_config(ROOT / "configs" / f"{row['config']}.yaml", overrides)
    names, ranks = max(config.genes.per_cohort, config.panel.max_genes), int(row["ranks"])
    panel = min(config.panel.max_genes, names)
    inputs = Inputs(
        tile_px=224,
        trained_genes=names,
        panel=panel,
        # Panels are padded to the tokens that panels of all genes have on average.
        sentence_tokens=tokens_of(
            names, names if config.engine.panel_sizes else panel, config.text.max_tokens, config.text.full_name
        ),
    )
    cluster = make_cluster("h100", per_node=min(ranks, 8), nodes=max(1, ranks // 8))
    return make_plan(config, cluster, inputs)


@pytest.fixture(scope="module", params=ROWS, ids=NAMES)
def pair(request: pytest.FixtureRequest) -> tuple[dict[str, str], Plan]:
    return request.param, planned(request.param)


def test_a_validation_has_the_flops_counted():
    """The walk scores a section of 512 spots: sentences of 50 genes for the score and of 256 genes for the shared space."""
    with (ROOT / "bench" / "rehearsal.csv").open(encoding="utf-8") as file:
        row = next(r for r in csv.DictReader(file) if (r["config"], r["walk"]) == ("1gpu", "validation"))
    config = load_config(ROOT / "configs" / "1gpu.yaml", [])
    names = max(config.genes.per_cohort, config.panel.max_genes)
    genes = gene_tokens(GeneTokenizer.load(), gene_names(names)[:256], np.arange(256), config.text)
    inputs = Inputs(trained_genes=names, sentence_tokens=float(genes.length_G.double().mean()))
    plan = make_plan(config, make_cluster("h100"), inputs, validation_spots=512)
    assert plan.validation is not None
    assert plan.validation.flops / 1e9 == pytest.approx(float(row["gflop"]), rel=0.02)


def test_flops_are_those_counted(pair: tuple[dict[str, str], Plan]):
    row, plan = pair
    assert plan.flops / 1e9 == pytest.approx(float(row["gflop"]), rel=0.02)


def test_collectives_send_the_bytes_counted(pair: tuple[dict[str, str], Plan]):
    """The rehearsal counts the operand of a rank; ZeRO's own collectives are DeepSpeed's and are not walked."""
    row, plan = pair
    W = int(row["ranks"])
    # Operand of a rank, as a fraction of the complete tensor.
    operand = {"all_reduce": 1.0, "all_gather": 1 / W, "reduce_scatter": 1.0, "ring": (W - 1) / W}
    counted = {
        "all_reduce": "all_reduce_mb",
        "all_gather": "all_gather_mb",
        "reduce_scatter": "reduce_scatter_mb",
        "ring": "send_mb",
    }
    sent = dict.fromkeys(operand, 0.0)
    for item in plan.traffic:
        if not (plan.engine.kind == "deepspeed" and item.part in ("gradients", "parameters")):
            sent[item.kind] += item.times * item.size * operand[item.kind] / 1e6
    for kind, planned_mb in sent.items():
        assert planned_mb == pytest.approx(float(row[counted[kind]]), rel=0.02, abs=0.1), kind


def test_saved_bytes_are_those_counted(pair: tuple[dict[str, str], Plan]):
    row, plan = pair
    saved = sum(part.saved for part in rank_share.stored_together(plan.parts)) / 1e6
    assert saved == pytest.approx(float(row["saved_mb"]), rel=0.02)


def test_bytes_moved_are_those_counted(pair: tuple[dict[str, str], Plan]):
    """Casts, bias gradients and sums of gradients included; the optimizer of DeepSpeed is not walked."""
    row, plan = pair
    moved = plan.moved
    if plan.engine.kind == "deepspeed":
        moved -= optimizer_cost(plan.sizes.trained / int(row["ranks"])).moved
    assert moved / 1e9 == pytest.approx(float(row["moved_gb"]), rel=0.02)


@pytest.mark.parametrize("kind", ["compiled", "fused"])
def test_compiled_and_fused_blocks_move_the_bytes_counted(kind: str):
    """The difference that ``engine.compile`` or ``engine.fused_blocks`` makes is that of ``bench/compiled_blocks.csv``.

    The tolerance is 2 % of a step's bytes. Fused blocks also save bytes of attention, which is no pointwise work: PyTorch reads its
    output again.
    """
    with (ROOT / "bench" / "compiled_blocks.csv").open(encoding="utf-8") as file:
        whole = next(row for row in csv.DictReader(file) if row["part"] == "step")
    row = next(row for row in ROWS if (row["config"], row["walk"]) == ("1gpu", "step"))
    eager = planned(row, fused=False)
    less = planned(row, compiled=kind == "compiled", fused=kind == "fused")
    saved = float(whole["pointwise_gb"]) - float(whole[f"{kind}_gb"])
    assert (eager.moved - less.moved) / 1e9 == pytest.approx(saved, abs=0.02 * float(row["moved_gb"]))


def test_fused_blocks_are_fused_whether_compiled_or_not():
    row = next(row for row in ROWS if (row["config"], row["walk"]) == ("1gpu", "step"))
    assert planned(row, compiled=True).moved == planned(row).moved


def test_the_host_issues_the_operators_counted(pair: tuple[dict[str, str], Plan]):
    row, plan = pair
    assert plan.operators == pytest.approx(float(row["operators"]), rel=0.02)


def test_the_host_launches_the_kernels_counted(pair: tuple[dict[str, str], Plan]):
    """To 2 %, or by the four launches that the demo has less."""
    row, plan = pair
    assert plan.launches == pytest.approx(float(row["launches"]), rel=0.02, abs=4)


def test_the_fitted_costs_are_those_in_the_documents():
    text = " ".join((ROOT / "docs/scaling.md").read_text(encoding="utf-8").split())
    encoded, whole = parts.TABLE_REST
    ring = loss_parts.RING
    assert (
        f"{loss_parts.DRAWS:,} bytes per (spot, gene), {encoded} per value of the encoded sentences, {whole} per value of the table, "
        f"{loss_parts.GATHERED} per (spot, gene) of all ranks if levels come from their spots, and {ring} per value of all image vectors in "
        "the ring."
    ) in text
    assert f"it issues {host.RING_HOP} operators per hop" in text
