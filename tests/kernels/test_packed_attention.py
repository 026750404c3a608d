"""Packed attention against the reference in fp64: every implementation, dtype and awkward input."""

import pytest
import torch
from comtip_kernels import packed_attention, packed_attention_qkv

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def case(lengths: list[int], H: int, E: int, dtype: torch.dtype = F64) -> tuple[list[torch.Tensor], torch.Tensor]:
    S = sum(lengths)
    g = torch.Generator().manual_seed(S)
    qkv = [torch.randn(S, H, E, generator=g, dtype=F64).to(dtype) for _ in range(3)]
    return qkv, torch.tensor(lengths, dtype=torch.int64)


def run(impl: str, qkv, length: torch.Tensor, device: torch.device | None = None) -> list[torch.Tensor]:
    """Return the output and the gradients of q, k and v, on the CPU."""
    device = device or torch.device("cpu")
    leaves = [t.to(device).detach().requires_grad_() for t in qkv]
    out = packed_attention(*leaves, length.to(device), impl=impl)
    probe = torch.linspace(-1, 1, max(1, out.numel()), dtype=out.dtype, device=device)[: out.numel()].view(out.shape)
    (out * probe).sum().backward()
    return [t.detach().cpu() for t in (out, *(leaf.grad for leaf in leaves))]


def draw(N: int, longest: int) -> list[int]:
    g = torch.Generator().manual_seed(N)
    return [*torch.randint(1, longest + 1, (N - 1,), generator=g).tolist(), longest]


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (9, 7, 2, 20), (40, 16, 1, 32), (6, 36, 1, 5), (3, 48, 1, 16)])
def test_equals_the_reference(fast, size: tuple[int, ...], allow_tf32: None):
    qkv, length = case(draw(*size[:2]), *size[2:])
    got = run(fast.impl, [t.to(fast.dtype) for t in qkv], length, fast.device)
    for a, b in zip(got, run("reference", qkv, length), strict=True):
        # The interpreter multiplies in fp32; a GPU would use tf32 here.
        loose = fast.triton and fast.device.type == "cuda"
        torch.testing.assert_close(a.to(F64), b, rtol=2e-3 if loose else fast.rtol, atol=2e-3 if loose else fast.atol)


def test_sentences_of_24_tokens_without_tf32(fast):
    qkv, length = case(draw(7, 24), 2, 40)
    got = run(fast.impl, [t.to(fast.dtype) for t in qkv], length, fast.device)
    for a, b in zip(got, run("reference", qkv, length), strict=True):
        torch.testing.assert_close(a.to(F64), b, rtol=fast.rtol, atol=fast.atol)


@pytest.mark.parametrize("dtypes", [(BF16,) * 3, (F32, BF16, F32)], ids=["bf16", "mixed"])
@pytest.mark.parametrize("size", [(9, 12, 2, 16), (5, 40, 3, 20)])
def test_bf16_and_mixed_dtypes(fast, dtypes: tuple[torch.dtype, ...], size: tuple[int, ...]):
    qkv, length = case(draw(*size[:2]), *size[2:])
    qkv = [t.to(dtype) for t, dtype in zip(qkv, dtypes, strict=True)]
    got = run(fast.impl, qkv, length, fast.device)
    exact = [t.to(BF16) if fast.triton else t for t in qkv]
    want = run("reference", [t.to(F64) for t in exact], length)
    assert [t.dtype for t in got[1:]] == list(dtypes)
    for a, b in zip(got, want, strict=True):
        assert float((a.to(F64) - b).norm()) <= 2**-6 * float(b.norm())


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_sentences_without_tokens_and_no_sentences(fast, dtype: torch.dtype):
    """Zero lengths among sentences of one token broke flash-attn (its issues 1537, 1619)."""
    for lengths in ([0, 3, 0, 0, 2, 0], [0, 1, 0], [0, 0], []):
        qkv, length = case(lengths, 2, 4, dtype)
        want = run("reference", [t.to(F64) for t in qkv], length)
        for a, b in zip(run(fast.impl, qkv, length, fast.device), want, strict=True):
            torch.testing.assert_close(a.to(F64), b, rtol=1e-4, atol=1e-6 if dtype == F32 else 0.03)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_every_token_is_written_and_only_its_sentence_read(fast, dtype: torch.dtype, nan_outputs: None):
    """Outputs start as NaN, and the inputs lie in memory full of NaN: heads and widths that are not powers of 2."""
    qkv, length = case(draw(11, 9), 3, 12, dtype)
    want = run(fast.impl, qkv, length, fast.device)
    views = []
    for t in qkv:
        big = torch.full((t.shape[0] + 40, 5, 20), float("nan"), dtype=dtype, device=fast.device)
        big[: t.shape[0], :3, :12] = t.to(fast.device)
        views.append(big[: t.shape[0], :3, :12])
    for a, b in zip(run(fast.impl, views, length, fast.device), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    start = int(length[:4].sum())
    own = slice(start, start + int(length[4]))
    for t in views[:2]:
        # Not the values: a NaN there reaches every sentence of its tile, as weight 0 times NaN.
        kept = t[own].clone()
        t.fill_(float("nan"))
        t[own] = kept
    alone = packed_attention(*views, length.to(fast.device), impl=fast.impl)[own].cpu()
    torch.testing.assert_close(alone, want[0][own], rtol=1e-5, atol=1e-5 if dtype == F32 else 2**-7)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_views_of_one_projection_and_two_runs_are_equal_to_the_bit(fast, dtype: torch.dtype):
    qkv, length = case(draw(60, 9), 2, 8, dtype)
    views = torch.stack(qkv, dim=1).unbind(1)
    assert not views[0].is_contiguous()
    one, two = run(fast.impl, views, length, fast.device), run(fast.impl, qkv, length, fast.device)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_one_tensor_gives_the_bits_of_three(fast, dtype: torch.dtype, nan_outputs: None):
    qkv, length = case(draw(30, 9), 3, 12, dtype)
    want = run(fast.impl, qkv, length, fast.device)
    one = torch.stack(qkv, dim=1).to(fast.device).requires_grad_()
    out = packed_attention_qkv(one, length.to(fast.device), impl=fast.impl)
    probe = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=fast.device).view(out.shape)
    (out * probe).sum().backward()
    for a, b in zip((out, *one.grad.unbind(1)), want, strict=True):
        assert torch.equal(a.detach().cpu(), b)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_stride_0_gradients(fast, dtype: torch.dtype):
    qkv, length = case([4] * 5, 2, 3, dtype)
    leaves = [t.to(fast.device).detach().clone().requires_grad_() for t in qkv]
    packed_attention(*leaves, length.to(fast.device), impl=fast.impl).sum().backward()
    exact = [t.to(F64).requires_grad_() for t in qkv]
    packed_attention(*exact, length, impl="reference").sum().backward()
    for a, b in zip(leaves, exact, strict=True):
        torch.testing.assert_close(a.grad.cpu().to(F64), b.grad, rtol=1e-4, atol=1e-5 if dtype == F32 else 0.05)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_sentence(fast, bad: float):
    qkv, length = case([3, 4, 2], 1, 8, F32)
    qkv[0][4, 0, 0] = qkv[1][4, 0, 0] = bad
    out = run(fast.impl, qkv, length, fast.device)[0]
    assert torch.isfinite(out[:3]).all()
    assert torch.isfinite(out[7:]).all()
    assert not torch.isfinite(out[3:7]).all()


def test_fp16_is_refused_by_triton(fast):
    qkv, length = case([3, 4], 1, 8, torch.float16)
    qkv, length = [t.to(fast.device) for t in qkv], length.to(fast.device)
    assert packed_attention(*qkv, length).dtype == torch.float16
    if fast.triton:
        with pytest.raises(ValueError, match=r"does not support torch.float16; cast the operands to torch.bfloat16"):
            packed_attention(*qkv, length, impl="triton")
