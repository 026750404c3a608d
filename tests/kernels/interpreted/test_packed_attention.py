"""Packed attention's Triton kernels, run by Triton's interpreter: see tests/kernels/test_interpreted.py."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs inside tests/kernels/test_interpreted.py", allow_module_level=True)

from comtip_kernels import packed_attention
from comtip_kernels.packed_attention import triton_kernels
from comtip_kernels.packed_attention import triton_op as op

F64 = torch.float64


def case(lengths: list[int], H: int, E: int, dtype: torch.dtype = torch.float64):
    S = sum(lengths)
    g = torch.Generator().manual_seed(S)
    return [torch.randn(S, H, E, generator=g, dtype=dtype) for _ in range(3)], torch.tensor(lengths, dtype=torch.int64)


def run(impl: str, qkv: list[torch.Tensor], length: torch.Tensor) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in qkv]
    out = packed_attention(*leaves, length, impl=impl)
    probe = torch.linspace(-1, 1, max(1, out.numel()), dtype=out.dtype)[: out.numel()].view(out.shape)
    (out * probe).sum().backward()
    return [out.detach(), *(t.grad for t in leaves)]


def draw(N: int, longest: int) -> list[int]:
    g = torch.Generator().manual_seed(N)
    return [*torch.randint(1, longest + 1, (N - 1,), generator=g).tolist(), longest]


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (9, 7, 2, 20), (40, 16, 1, 32), (6, 36, 1, 5), (3, 48, 1, 16)])
def test_equals_fp64_truth(size: tuple[int, ...]):
    qkv, length = case(draw(*size[:2]), *size[2:])
    for got, want in zip(run("triton", [t.float() for t in qkv], length), run("reference", qkv, length), strict=True):
        torch.testing.assert_close(got.to(F64), want, rtol=2e-5, atol=5e-6)


def test_sentences_of_no_token_and_none_at_all():
    for lengths in ([0, 3, 0, 0, 2, 0], [0, 1, 0], [0, 0], []):
        qkv, length = case(lengths, 2, 4, torch.float32)
        for got, want in zip(run("triton", qkv, length), run("reference", qkv, length), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_bf16_is_no_worse_than_torch_in_bf16():
    qkv, length = case(draw(9, 12), 2, 16, torch.bfloat16)
    truth = run("reference", [t.to(F64) for t in qkv], length)
    ours, theirs = run("triton", qkv, length), run("reference", qkv, length)
    for a, b, t in zip(ours, theirs, truth, strict=True):
        assert float((a.to(F64) - t).norm()) <= 2 * float((b.to(F64) - t).norm()) + 1e-2 * float(t.norm())


def test_every_token_is_written_and_only_its_sentence_read(monkeypatch: pytest.MonkeyPatch):
    """Outputs start as NaN, and the inputs lie between NaN: heads and widths that no power of 2 divides."""
    real = torch.empty
    qkv, length = case(draw(11, 9), 3, 12, torch.float32)
    want = run("reference", qkv, length)
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real(*a, **k).fill_(float("nan")))
    views = []
    for t in qkv:
        big = torch.full((t.shape[0] + 40, 5, 20), float("nan"))
        big[: t.shape[0], :3, :12] = t
        views.append(big[: t.shape[0], :3, :12])
    for a, b in zip(run("triton", views, length), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    start = int(length[:4].sum())
    own = slice(start, start + int(length[4]))
    for t in views[:2]:
        # Not the values: a NaN there reaches every sentence of its tile, as weight 0 times NaN.
        kept = t[own].clone()
        t.fill_(float("nan"))
        t[own] = kept
    torch.testing.assert_close(packed_attention(*views, length, impl="triton")[own], want[0][own])


def test_strides_of_one_projection_stride_0_gradients_and_the_same_bits_twice():
    qkv, length = case(draw(20, 6), 2, 8, torch.float32)
    views = torch.stack(qkv, dim=1).unbind(1)
    one, two = run("triton", list(views), length), run("triton", qkv, length)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    grads = []
    for impl in ("triton", "reference"):
        leaves = [t.detach().clone().requires_grad_() for t in qkv]
        packed_attention(*leaves, length, impl=impl).sum().backward()
        grads.append([t.grad for t in leaves])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_sentence(bad: float):
    qkv, length = case([3, 4, 2], 1, 8, torch.float32)
    qkv[1][4, 0, 0] = bad
    qkv[0][4, 0, 0] = bad
    out = packed_attention(*qkv, length, impl="triton")
    assert torch.isfinite(out[:3]).all()
    assert torch.isfinite(out[7:]).all()
    assert not torch.isfinite(out[3:7]).all()


def test_grids_that_cuda_takes():
    """Sentences past 65,535 are on grid axis 0, which holds 2^31 - 1; axes 1 and 2 would stop flash-attn (its issue 1786)."""
    q = torch.empty(2_430_000, 8, 64, device="meta", dtype=torch.bfloat16)
    for longest in range(1, 49):
        W, grid, flags = op.launch_options(q, longest)
        assert len(grid) == 1
        assert grid[0] < 2**31
        assert 1 <= W == flags["BT"] - longest + 1
        assert ("bf16", flags["BT"]) in triton_kernels.LAUNCH


def test_opcheck_and_flops():
    qkv, length = case([3, 5, 2], 2, 16, torch.float32)
    first = torch.repeat_interleave((length.cumsum(0) - length).int(), length)
    leaves = [t.requires_grad_() for t in qkv]
    torch.library.opcheck(op.attend, (*leaves, first, 5))
    backward = [t.detach() for t in (*leaves, leaves[0] * 2)]
    torch.library.opcheck(op.attend_grads, (*backward, first, 5), test_utils=("test_schema", "test_faketensor"))
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        op.attend(*leaves, first, 5).sum().backward()
    # One tile and two heads: 2 products of 32 x 32 x 16 forward, 5 backward.
    assert counter.get_total_flops() == 7 * 2 * (2 * 32 * 32 * 16)
