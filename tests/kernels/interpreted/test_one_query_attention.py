"""Triton operators of attention with one query. Values and gradients are tested in ../test_one_query_attention.py."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs inside tests/kernels/test_interpreted.py", allow_module_level=True)

from comtip_kernels.one_query_attention import LONGEST, MOST_HEADS
from comtip_kernels.one_query_attention import triton_op as op
from torch.utils.flop_counter import FlopCounterMode


def test_opcheck_and_flops():
    length = torch.tensor([3, 5, 2])
    first = length.cumsum(0) - length
    query, x = torch.randn(2, 2, 8, requires_grad=True), torch.randn(10, 8, requires_grad=True)
    torch.library.opcheck(op.attend, (query, x, first, length, 5, 0.5))
    backward = (query.detach(), x.detach(), query.detach() * 2, first, length, 5, 0.5)
    torch.library.opcheck(op.attend_grads, backward, test_utils=("test_schema", "test_faketensor"))
    with FlopCounterMode(display=False) as counter:
        op.attend(query, x, first, length, 5, 0.5).sum().backward()
    # Two queries, each with 2 products forward and 5 backward: 2 heads and 5 tokens padded to 16, width 8.
    assert counter.get_total_flops() == 2 * 7 * (2 * 16 * 16 * 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_tiles_of_all_lengths_and_heads(dtype: torch.dtype):
    """Padded sizes fit the products of tensor cores, and slices are no wider than the vectors need."""
    for longest in range(1, LONGEST + 1):
        for heads in (1, 8, MOST_HEADS):
            options = op.launch_options(torch.empty(9, heads, 40, device="meta", dtype=dtype), longest)
            assert options["BH"] == 16
            assert longest <= options["BT"] <= max(16, 2 * longest)
            assert options["BD"] in (16, 32, 64)


def test_more_sentences_than_a_grid_axis_of_cuda_has(monkeypatch: pytest.MonkeyPatch):
    """Sentences are on grid axis 0, which has 2^31 - 1 programs; axes 1 and 2 have 65,535."""
    grids = []
    monkeypatch.setattr(op, "launch", lambda kernel, grid, *args, **options: grids.append(grid))
    length = torch.ones(70_000, dtype=torch.int64)
    query, x = torch.zeros(70_000, 1, 1), torch.zeros(70_000, 1)
    op.attend(query, x, length, length, 1, 1.0)
    op.attend_grads(query, x, query, length, length, 1, 1.0)
    assert grids == [(70_000,), (70_000,)]
