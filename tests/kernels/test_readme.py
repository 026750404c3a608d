"""kernels/README.md: its examples run, and its tables are those of the committed ledger."""

import importlib.util
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from comtip_kernels.rates import MEMORY_SHARE

ROOT = Path(__file__).parents[2]
README = (ROOT / "kernels/README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def plot() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plot", ROOT / "bench/kernels/plot.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "kernels/README.md", "exec"), names)
    assert names["image"].grad.abs().sum() > 0
    assert names["loss"].log_scale.grad != 0
    assert names["scale"].grad != 0


def test_the_tables_are_the_ledgers(plot: ModuleType):
    assert plot.table(plot.read(ROOT / "bench/traffic.csv")) in README
    assert plot.kernels_table(plot.read(ROOT / "bench/ledger.csv")) in README
    assert plot.ways_table() in README
    assert plot.tiles_table() in README


def test_what_is_above_the_floors_is_named(plot: ModuleType):
    """In the first column: the operations, and which of their floors, more than 1.3 times lower."""
    section = README.partition("Above 1.3 times the lower bound are:")[2].partition("**Whole operations**")[0]
    named: dict[str, set[str]] = {"bytes": set(), "L2 bytes": set(), "FLOPs": set()}
    for line in section.splitlines()[4:]:
        operations, _, kind = line.partition(" | ")[0].rpartition(", ")
        if kind:
            named[kind] |= set(re.findall(r"`(\w+)`", operations))
    above: dict[str, set[str]] = {kind: set() for kind in named}
    for row in plot.read(ROOT / "bench/traffic.csv"):
        ratios = {"bytes": row["memory_ratio"], "L2 bytes": row["loaded_ratio"], "FLOPs": plot.flop_ratio(row) or 1}
        for kind, ratio in ratios.items():
            above[kind] |= {row["op"]} if float(ratio) > 1.3 else set()
    assert named == above


def test_the_time_of_pooling_outside_of_its_kernels_is_that_of_the_tables(plot: ModuleType):
    rows = [r for r in plot.read(ROOT / "bench/operations.csv") if r["op"] == "table_pool" and "B = 4k" in r["size"]]
    whole, kernels = (sum(float(r[c]) for r in rows) / 1e3 for c in ("operation_mb", "kernel_mb"))
    ms = (whole - kernels) * 1e12 / plot.ROOFS["h100"].reachable_memory
    text = f"that is {whole - kernels:.1f} of {whole:.1f} GB: {ms:.2f} ms at {MEMORY_SHARE:.0%} of an H100's"
    assert text.replace("%", " %") in " ".join(README.split())


def test_the_figure_can_be_drawn(plot: ModuleType, tmp_path: Path):
    plot.draw(plot.read(ROOT / "bench/traffic.csv"), tmp_path / "floors.png")
    assert (tmp_path / "floors.png").stat().st_size > 10_000
    assert (ROOT / "kernels/floors.png").is_file()


def test_counts_in_the_text_are_those_of_the_tables(plot: ModuleType):
    rows = Counter(row["triton"].rpartition(".")[0] for row in plot.read(ROOT / "bench/ledger.csv"))
    assert rows["3.8"] == rows["3.9"]
    assert f"releases: {rows['3.8']} each of 3.8 and 3.9, and {rows['3.6']} of 3.6" in README
    walks = {(row["config"], row["walk"]): row for row in plot.read(ROOT / "bench/rehearsal.csv")}
    step, padded = walks["1gpu", "step"], walks["1gpu", "step panel_sizes=4"]
    assert f"launches {step['launches']} kernels of this package in {step['variants']} variants" in README
    more = {c: f"{100 * (float(padded[c]) / float(step[c]) - 1):.1f} %" for c in ("gflop", "moved_gb", "saved_mb")}
    text = " ".join(README.split())
    assert (
        f"computes {more['gflop']} more FLOPs, moves {more['moved_gb']} and stores {more['saved_mb']} more bytes"
        in text
    )


def test_the_shares_of_hgmma_in_the_text_are_those_of_the_table(plot: ModuleType):
    shares: dict[tuple[bool, bool], list[float]] = {}
    for row in plot.read(ROOT / "bench/rehearsal.csv"):
        if row["walk"].split()[0] == "step" and row["config"] != "demo_cpu" and "panel_sizes" not in row["walk"]:
            key = row["config"] == "1gpu", "micro_batches" in row["walk"]
            shares.setdefault(key, []).append(100 * float(row["hgmma_share"]))
    (one,), (in_pieces,) = shares[True, False], shares[True, True]
    whole, pieces = shares[False, False], shares[False, True]
    assert (
        f"HGMMA computes {one:.0f} % of the FLOPs of this package's kernels in a step of `1gpu.yaml` "
        f"(attention in tiles of 32: {100 - one:.0f} %) and "
        f"{min(whole):.0f} to {max(whole):.0f} % in one of the other GPU configs ({in_pieces:.0f} % and {min(pieces):.0f} to "
        f"{max(pieces):.0f} % with four micro-batches and activation checkpointing)"
    ) in " ".join(README.split())


def test_what_differs_between_steps_is_that_of_the_table(plot: ModuleType):
    found: dict[tuple[str, str, str], Counter[str]] = {}
    for row in plot.read(ROOT / "bench/graph_rules.csv"):
        found.setdefault((row["config"], row["ranks"], row["walk"]), Counter())[row["rule"]] += int(row["count"])
    one, many = found["1gpu", "1", "step"], found["multinode_h100", "64", "step"]
    text = " ".join(README.split())
    assert f"equal sizes except for {one['number']} numbers ({many['number']} under ZeRO" in text
    assert f"{one['output']} tensors of a step ({many['output']} under ZeRO)" in text
    eight, demo = found["8xh100", "8", "step"], found["demo_cpu", "1", "step"]
    assert (
        f"`graphs`: {one['graphs']:,} of 2,000 steps of `1gpu.yaml` have their own sizes, {eight['graphs']:,} over 8 ranks, "
        f"{many['graphs']:,} over 64, {demo['graphs']:,} of `demo_cpu.yaml`"
    ) in text
    assert {(c["number"], c["output"]) for c in found.values()} == {(c["number"], c["output"]) for c in (one, many)}
