"""Bytes of compiled and fused blocks: the counting is exact, and blocks move no more than the committed table says."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from testkit.rehearsal.cuda_runtime import stand_in_cuda
from testkit.rehearsal.fused import fused_kernels, trace
from testkit.rehearsal.record import Record

SPEC = importlib.util.spec_from_file_location(
    "compiled_blocks", Path(__file__).parents[2] / "bench/train/compiled_blocks.py"
)
assert SPEC is not None
assert SPEC.loader is not None
bench = importlib.util.module_from_spec(SPEC)
sys.modules["compiled_blocks"] = bench  # dataclasses look their module up
SPEC.loader.exec_module(bench)


def committed() -> dict[str, dict[str, str]]:
    with bench.TABLE.open(encoding="utf-8", newline="") as file:
        return {row["part"]: row for row in csv.DictReader(file)}


def test_a_chain_of_pointwise_operators_is_one_kernel_in_each_direction():
    """gelu(x) + x of n fp32 elements: forward reads x and writes the result; backward reads x and a gradient, and writes one."""
    n = 1 << 16

    def function(x: Tensor) -> Tensor:
        return F.gelu(x) + x

    with stand_in_cuda(Record()):
        x = torch.zeros(n // 64, 64, device="cuda", requires_grad=True)
        traced = trace(function, [x])
    found = fused_kernels(traced)
    assert [(k.backward, k.library, k.bytes) for k in found] == [(False, False, 8 * n), (True, False, 12 * n)]


def test_a_product_is_no_pointwise_work():
    with stand_in_cuda(Record()):
        x, w = (torch.zeros(64, 64, device="cuda", requires_grad=True) for _ in range(2))
        traced = trace(torch.mm, [x, w])
    found = fused_kernels(traced)
    assert [k.library for k in found] == [True] * 3
    assert {k.bytes for k in found} == {3 * 64 * 64 * 4}


def test_compiled_and_fused_blocks_move_no_more_than_the_table():
    table = committed()
    if table["step"]["torch"] != torch.__version__.partition("+")[0]:
        pytest.skip("another release of PyTorch fuses otherwise")
    whole, kinds = bench.count()
    blocks = {b.name: b for b in kinds}
    assert set(blocks) == set(table) - {"step"}
    whole_fused, fused = bench.count(fused=True)
    by_kind = bench.fused_costs(fused)
    assert set(by_kind) == set(blocks)
    for name, (_, moved) in by_kind.items():
        assert f"{moved / 1e9:.2f}" == table[name]["fused_gb"]
    assert f"{whole_fused.bytes.total() / 1e9:.2f}" == table["step"]["fused_gb"]
    assert f"{whole.bytes.total() / 1e9:.2f}" == table["step"]["pointwise_gb"]
    image = next(name for name in blocks if name.startswith("PartsBlock"))
    block, old = blocks[image], table[image]
    eager, compiled = bench.costs(block, fused_kernels(block.traced))
    new = bench.row(block.name, block.calls, eager, compiled, by_kind[image])
    assert float(new["compiled_gb"]) <= float(old["compiled_gb"])
    assert int(new["kernels"]) <= int(old["kernels"])
    # What docs/performance.md says: the pointwise bytes of the image encoder are halved.
    assert float(new["fused_ratio"]) < 0.5
