"""Attention by length buckets: the padded reference's values and gradients."""

import pytest
import torch
from comtip_kernels import packed_attention
from comtip_kernels.packed_attention import peers


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


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (9, 7, 2, 4), (50, 16, 4, 8), (3, 36, 1, 5)])
def test_equals_the_reference(size: tuple[int, ...]):
    qkv, length = case(draw(*size[:2]), *size[2:])
    for got, want in zip(run("cpu", qkv, length), run("reference", qkv, length), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    qkv, length = case([2, 1, 3, 3], 2, 2)
    for impl in ("cpu", "reference"):
        assert torch.autograd.gradcheck(
            lambda *x, impl=impl: packed_attention(*x, length, impl=impl), [t.requires_grad_() for t in qkv]
        )


def test_sentences_of_no_token_take_no_room():
    """Zero lengths beside a longest of 1 broke flash-attn (its issues 1537, 1619)."""
    for lengths in ([0, 3, 0, 0, 2, 0], [0, 1, 0], [0, 0]):
        qkv, length = case(lengths, 2, 4)
        for got, want in zip(run("cpu", qkv, length), run("reference", qkv, length), strict=True):
            torch.testing.assert_close(got, want)
            assert torch.isfinite(want).all()


def test_one_sentence_is_not_moved_by_another():
    qkv, length = case(draw(12, 6), 2, 4)
    want = packed_attention(*qkv, length, impl="cpu")
    start = length.cumsum(0) - length
    poisoned = [t.clone() for t in qkv]
    own = slice(int(start[4]), int(start[4] + length[4]))
    for t in poisoned:
        kept = t[own].clone()
        t.fill_(float("nan"))
        t[own] = kept
    got = packed_attention(*poisoned, length, impl="cpu")
    assert torch.equal(got[own], want[own])


def test_twice_the_same_bits_also_with_strided_inputs():
    qkv, length = case(draw(200, 9), 2, 8, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(run("cpu", qkv, length), run("cpu", qkv, length), strict=True))
    packed = torch.stack(qkv, dim=1)  # as one projection gives them: views with a stride between
    views = list(packed.unbind(1))
    assert not views[0].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(run("cpu", qkv, length), run("cpu", views, length), strict=True))


def test_stride_0_gradients_and_no_sentences():
    qkv, length = case([4] * 5, 2, 3)
    grads = []
    for impl in ("cpu", "reference"):
        leaves = [t.detach().clone().requires_grad_() for t in qkv]
        packed_attention(*leaves, length, impl=impl).sum().backward()
        grads.append([t.grad for t in leaves])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    empty = [t[:0].detach() for t in qkv]
    assert packed_attention(*empty, length[:0], impl="cpu").shape == (0, 2, 3)


def test_more_than_65535_sentences():
    length = torch.randint(1, 4, (70_000,), generator=torch.Generator().manual_seed(0))
    q = torch.randn(int(length.sum()), 1, 2)
    out = packed_attention(q, q, q, length, impl="cpu")
    last = q[-int(length[-1]) :]
    torch.testing.assert_close(
        out[-int(length[-1]) :], packed_attention(last, last, last, length[-1:], impl="reference")
    )


def varlen_stand_in(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """Take what flash-attn and torch take, and check that it is theirs."""
    assert cu_seqlens_q.dtype == torch.int32
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    return packed_attention(q, k, v, cu_seqlens_q.diff().long(), impl="reference")


@pytest.mark.parametrize("name", ["flash", "varlen"])
def test_other_kernels_behind_the_same_call(name: str, monkeypatch: pytest.MonkeyPatch):
    qkv, length = case(draw(9, 7), 2, 4)
    finder = {"flash": "flash_varlen", "varlen": "torch_varlen"}[name]
    monkeypatch.setattr(peers, finder, lambda: varlen_stand_in)
    torch.testing.assert_close(packed_attention(*qkv, length, impl=name), packed_attention(*qkv, length))
    monkeypatch.setattr(peers, finder, lambda: None)
    with pytest.raises(ValueError, match=f"impl='{name}' needs"):
        packed_attention(*qkv, length, impl=name)


def test_a_sentence_longer_than_a_tile():
    qkv, length = case([200, 3], 1, 4)
    with pytest.raises(ValueError, match="a sentence of 200 tokens"):
        packed_attention(*qkv, length, impl="triton")
    torch.testing.assert_close(
        packed_attention(*qkv, length), packed_attention(*qkv, length, impl="reference"), rtol=1e-10, atol=1e-12
    )
