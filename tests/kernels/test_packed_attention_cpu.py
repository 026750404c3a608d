"""Attention by length buckets: the padded reference's values and gradients on every token that exists."""

import pytest
import torch
from comtip_kernels import packed_attention
from comtip_kernels.packed_attention import cpu


@pytest.fixture(autouse=True)
def _never_pad(monkeypatch: pytest.MonkeyPatch):
    """Full batches too go through the buckets here."""
    monkeypatch.setattr(cpu, "FULL_ENOUGH", 2.0)


def case(N: int, T: int, H: int, E: int, dtype: torch.dtype = torch.float64):
    g = torch.Generator().manual_seed(N)
    qkv = [torch.randn(N, T, H, E, generator=g, dtype=dtype) for _ in range(3)]
    return qkv, torch.randint(1, T + 1, (N,), generator=g)


def run(impl: str, qkv: list[torch.Tensor], length: torch.Tensor) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in qkv]
    out = packed_attention(*leaves, length, impl=impl)
    inside = (torch.arange(out.shape[1]) < length[:, None])[..., None, None]
    probe = torch.linspace(-1, 1, max(1, out.numel()), dtype=out.dtype)[: out.numel()].view(out.shape)
    # What stands past a sentence's end has no meaning, and must not be part of a comparison.
    torch.where(inside, out * probe, 0.0).sum().backward()
    return [torch.where(inside, out, 0.0).detach(), *(t.grad for t in leaves)]


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (9, 7, 2, 4), (50, 16, 4, 8), (3, 36, 1, 5)])
def test_equals_the_reference(size: tuple[int, ...]):
    qkv, length = case(*size)
    for got, want in zip(run("cpu", qkv, length), run("reference", qkv, length), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    qkv, length = case(4, 3, 2, 2)
    assert torch.autograd.gradcheck(
        lambda *x: packed_attention(*x, length, impl="cpu"), [t.requires_grad_() for t in qkv]
    )


def test_what_stands_past_the_end_is_never_read():
    qkv, length = case(12, 6, 2, 4)
    want = run("cpu", qkv, length)
    outside = torch.arange(6) >= length[:, None]
    poisoned = [t.clone() for t in qkv]
    for t in poisoned:
        t[outside] = float("nan")
    out = packed_attention(*poisoned, length, impl="cpu")
    torch.testing.assert_close(out, want[0], rtol=0, atol=0)
    assert not out[outside].any()


def test_twice_the_same_bits_also_with_strided_inputs():
    qkv, length = case(200, 9, 2, 8, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(run("cpu", qkv, length), run("cpu", qkv, length), strict=True))
    packed = torch.stack(qkv, dim=2)  # as one projection gives them: views with a stride between
    views = list(packed.unbind(2))
    assert not views[0].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(run("cpu", qkv, length), run("cpu", views, length), strict=True))


def test_stride_0_gradients_and_no_sentences():
    qkv, length = case(5, 4, 2, 3)
    leaves = [t.requires_grad_() for t in qkv]
    packed_attention(*leaves, torch.full((5,), 4), impl="cpu").sum().backward()
    want = [t.grad.clone() for t in leaves]
    for t in leaves:
        t.grad = None
    packed_attention(*leaves, torch.full((5,), 4), impl="reference").sum().backward()
    for a, t in zip(want, leaves, strict=True):
        torch.testing.assert_close(a, t.grad)
    empty = [t[:0].detach() for t in qkv]
    assert packed_attention(*empty, length[:0], impl="cpu").shape == (0, 4, 2, 3)


def test_more_than_65535_sentences():
    q = torch.randn(70_000, 3, 1, 2)
    length = torch.randint(1, 4, (70_000,), generator=torch.Generator().manual_seed(0))
    out = packed_attention(q, q, q, length, impl="cpu")
    torch.testing.assert_close(
        out[-1:, : int(length[-1])],
        packed_attention(q[-1:], q[-1:], q[-1:], length[-1:], impl="reference")[:, : int(length[-1])],
    )


def test_full_batches_are_padded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "FULL_ENOUGH", 0.6)
    qkv, _ = case(20, 5, 2, 4)
    for length in (torch.full((20,), 5), torch.full((20,), 2)):
        want = packed_attention(*qkv, length, impl="reference")
        got = packed_attention(*qkv, length, impl="cpu")
        inside = torch.arange(5) < length[:, None]
        torch.testing.assert_close(got[inside], want[inside])
