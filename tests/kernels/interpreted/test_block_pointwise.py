"""Triton operators of residual sum with LayerNorm and bias with GELU. Values and gradients: ../test_block_pointwise.py."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs inside tests/kernels/test_interpreted.py", allow_module_level=True)

from comtip_kernels import bias_gelu, residual_norm, tiles
from comtip_kernels.block_pointwise import triton_op as op
from torch import Tensor

BF16, F32 = torch.bfloat16, torch.float32


def operands(N: int, d: int, stream: torch.dtype = F32, branch: torch.dtype = F32) -> list[Tensor]:
    g = torch.Generator().manual_seed(N)
    x, y, *vectors = (torch.randn(*s, generator=g) for s in ((N, d), (N, d), (d,), (d,), (d,)))
    return [x.to(stream), y.to(branch), *vectors]


@pytest.mark.parametrize("stream", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("branch", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("N", [0, 5])
def test_opcheck(N: int, stream: torch.dtype, branch: torch.dtype):
    """The operators have no gradient of their own: those of ``autograd.Function`` call them, also while a graph is traced."""
    tests = ("test_schema", "test_faketensor")
    given = operands(N, 12, stream, branch)
    torch.library.opcheck(op.norm_op, (*given, 1e-5, BF16), test_utils=tests)
    out, norm, stats = op.norm_op(*given, 1e-5, branch)
    for grad in (None, out):
        torch.library.opcheck(op.norm_grads_op, (norm, grad, out, stats, given[3], branch), test_utils=tests)
    torch.library.opcheck(op.gelu_op, (given[1], given[2]), test_utils=tests)
    torch.library.opcheck(op.gelu_grads_op, (given[1], given[1], given[2]), test_utils=tests)


def test_a_second_derivative_is_refused():
    given = [t.requires_grad_() for t in operands(4, 12)]
    for result in (*residual_norm(*given, impl="triton"), bias_gelu(*given[1:3], impl="triton")):
        (first,) = torch.autograd.grad(result.square().sum(), given[1], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


def test_the_gradient_of_the_branch_is_a_copy_in_its_dtype_or_that_of_the_stream():
    """Two dtypes are stored by one kernel; equal dtypes are one tensor, which is not stored twice."""
    out, norm, stats = op.norm_op(*operands(5, 12), 1e-5, F32)
    dx, copy, _ = op.norm_grads_op(norm, out, out, stats, torch.ones(12), BF16)
    assert torch.equal(copy, dx.to(BF16))
    _, copy, _ = op.norm_grads_op(norm, out, out, stats, torch.ones(12), F32)
    assert copy.numel() == 0


def test_more_programs_than_an_axis_of_a_grid_has(monkeypatch: pytest.MonkeyPatch):
    """Programs are on grid axis 0, which has 2^31 - 1; axes 1 and 2 have 65,535."""
    grids = {}
    monkeypatch.setattr(op, "launch", lambda kernel, grid, *args, **options: grids.update({kernel.__name__: grid}))
    N, d = 9_000_000, 4096
    x, vector = torch.empty(N, d, device="meta"), torch.empty(d, device="meta")
    stream, out, stats = op._norm(x, x, vector, vector, vector, 1e-5, BF16)
    op._norm_grads(out, stream, stream, stats, vector, BF16)
    op._gelu_grads(op._gelu(x, vector), x, vector)
    assert grids == {
        "residual_norm": (N,),
        "residual_norm_grads": (-(-N // 128),),
        "bias_gelu": (N // 4 * 8,),
        "bias_gelu_grads": (-(-N // 128) * 8,),
    }
    assert min(grid[0] for grid in grids.values()) > 65_535


def test_a_program_of_the_norm_has_whole_rows():
    """All columns of a row are in one tile, and a tile of narrow rows has several of them."""
    for width in (1, 16, 33, 512, 768, 1024, 2048, 4096):
        for options in (tiles.norm_tiles(width), tiles.norm_grads_tiles(width)):
            assert options["BD"] >= width
            assert options["R"] * options["BD"] >= 2048
            assert tiles.POINTWISE_ROWS % options["R"] == 0
    assert tiles.POINTWISE_ROWS % tiles.GELU_GRADS["R"] == 0
