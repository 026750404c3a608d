"""Packed attention's Triton operators. Values and gradients are tested in ../test_packed_attention.py."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs inside tests/kernels/test_interpreted.py", allow_module_level=True)

from comtip_kernels import packed_attention
from comtip_kernels.packed_attention import LONGEST, triton_kernels
from comtip_kernels.packed_attention import triton_op as op


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_grids_that_cuda_supports(dtype: torch.dtype):
    """Sentences beyond 65,535 are on grid axis 0, which has 2^31 - 1; axes 1 and 2 would stop flash-attn (its issue 1786)."""
    q = torch.empty(2_430_000, 8, 64, device="meta", dtype=dtype)
    mode = "bf16" if dtype == torch.bfloat16 else "tf32x3"
    for longest in range(1, LONGEST[mode] + 1):
        window, grid, options = op.launch_options(q, longest)
        assert len(grid) == 1
        assert grid[0] < 2**31
        assert 1 <= window == options["BT"] - longest + 1
        assert (mode, options["BT"]) in triton_kernels.LAUNCH


def test_sentences_longer_than_a_mode_supports():
    q = torch.randn(30, 1, 8)
    with pytest.raises(ValueError, match="has 30 tokens and impl='triton' supports 24"):
        packed_attention(q, q, q, torch.tensor([30]), impl="triton")
    q = q.bfloat16()
    assert packed_attention(q, q, q, torch.tensor([30]), impl="triton").dtype == torch.bfloat16


def test_opcheck_and_flops():
    length = torch.tensor([3, 5, 2])
    qkv = [torch.randn(10, 2, 16) for _ in range(3)]
    first = torch.repeat_interleave((length.cumsum(0) - length).int(), length)
    leaves = [t.requires_grad_() for t in qkv]
    torch.library.opcheck(op.attend, (*leaves, first, 5))
    backward = [t.detach() for t in (*leaves, leaves[0] * 2)]
    torch.library.opcheck(op.attend_grads, (*backward, first, 5), test_utils=("test_schema", "test_faketensor"))
    one = torch.stack(leaves, dim=1).detach().requires_grad_()
    torch.library.opcheck(op.attend_qkv, (one, first, 5))
    both = (one.detach(), backward[3], first, 5)
    torch.library.opcheck(op.attend_qkv_grads, both, test_utils=("test_schema", "test_faketensor"))
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        op.attend(*leaves, first, 5).sum().backward()
    # One tile and two heads: 2 products of 32 x 32 x 16 forward, 5 backward.
    assert counter.get_total_flops() == 7 * 2 * (2 * 32 * 32 * 16)
    with FlopCounterMode(display=False) as counter:
        op.attend_qkv(one, first, 5).sum().backward()
    assert counter.get_total_flops() == 7 * 2 * (2 * 32 * 32 * 16)
