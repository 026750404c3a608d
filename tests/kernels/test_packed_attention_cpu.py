"""Attention by length buckets: the padded reference's values and gradients."""

import sys

import pytest
import torch
from comtip_kernels import dispatch, packed_attention, packed_attention_qkv
from comtip_kernels.packed_attention import peers

attention = sys.modules["comtip_kernels.packed_attention"]  # the function of that name hides the module


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


@pytest.mark.parametrize("order", ["mixed", "by length"])
@pytest.mark.parametrize("poison", [1e30, float("inf"), float("nan")])
def test_one_sentence_is_not_moved_by_another(poison: float, order: str):
    """Short sentences share a matrix: what passes the mask there must not pass it here."""
    lengths = draw(40, 6)
    qkv, length = case(sorted(lengths) if order == "by length" else lengths, 2, 4)
    start = length.cumsum(0) - length
    own = slice(int(start[4]), int(start[4] + length[4]))
    poisoned = [torch.full_like(t, poison) for t in qkv]
    for t, clean in zip(poisoned, qkv, strict=True):
        t[own] = clean[own]
    got, want = (packed_attention(*x, length, impl="cpu")[own] for x in (poisoned, qkv))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_a_nan_gradient_goes_no_further_than_its_matrix():
    qkv, length = case([3] * 40, 1, 4)
    leaves = [t.requires_grad_() for t in qkv]
    out = packed_attention(*leaves, length, impl="cpu")
    grad = torch.ones_like(out)
    grad[0] = float("nan")
    out.backward(grad)
    for leaf in leaves:
        # Six sentences of three tokens fill a register of sixteen scores.
        assert torch.isfinite(leaf.grad[18:]).all()
        assert not torch.isfinite(leaf.grad[:3]).all()


@pytest.mark.parametrize("order", ["mixed", "by length"])
@pytest.mark.parametrize("impl", ["cpu", "reference", "sdpa"])
def test_one_projection_is_the_same_as_three(impl: str, order: str):
    lengths = draw(30, 20)
    qkv, length = case(sorted(lengths) if order == "by length" else lengths, 2, 4)
    together = torch.stack(qkv, 1).requires_grad_()
    out = packed_attention_qkv(together, length, impl=impl)
    probe = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    (out * probe).sum().backward()
    want = run("reference", qkv, length)
    for got, other in zip((out.detach(), *together.grad.unbind(1)), want, strict=True):
        torch.testing.assert_close(got, other, rtol=1e-10, atol=1e-12)


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


def varlen_stand_in(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic=False):
    """Take what flash-attn and torch take, and check that it is theirs."""
    assert cu_seqlens_q.dtype == torch.int32
    assert max_seqlen_q == max_seqlen_k >= int(cu_seqlens_q.diff().max())
    return packed_attention(q, k, v, cu_seqlens_q.diff().long(), impl="reference")


@pytest.mark.parametrize("name", ["flash", "varlen"])
def test_other_kernels_behind_the_same_call(name: str, monkeypatch: pytest.MonkeyPatch):
    qkv, length = case(draw(9, 7), 2, 4)
    finder = {"flash": "flash_varlen", "varlen": "torch_varlen"}[name]
    monkeypatch.setattr(peers, finder, lambda: varlen_stand_in)
    with pytest.raises(
        ValueError, match=f"impl='{name}' needs fp16 or bf16 on a CUDA device, not torch.float64 on cpu"
    ):
        packed_attention(*qkv, length, impl=name)
    monkeypatch.setattr(peers, "can_peer", lambda like: True)
    want = packed_attention(*qkv, length)
    torch.testing.assert_close(packed_attention(*qkv, length, impl=name), want)
    monkeypatch.setattr(peers, "MAX_SENTENCES", 2)  # nine sentences in five pieces
    torch.testing.assert_close(packed_attention(*qkv, length, impl=name), want)
    monkeypatch.setattr(peers, finder, lambda: None)
    with pytest.raises(ValueError, match=f"impl='{name}' needs"):
        packed_attention(*qkv, length, impl=name)


def test_what_auto_takes_for_long_sentences(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """The first peer that is there and takes the dtype, then padding; reported once."""

    class OnCuda:
        is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda")

    def chosen(longest: int, like: object = OnCuda) -> str:
        have = {name: (lambda name=name: name) for name in attention._IMPLEMENTATIONS}
        return attention._choose((like,), longest, "auto", have)()

    monkeypatch.setattr(dispatch, "_reported", set())
    monkeypatch.setattr(dispatch, "can_launch", lambda device: True)
    monkeypatch.setattr(peers, "flash_varlen", lambda: varlen_stand_in)
    monkeypatch.setattr(peers, "torch_varlen", lambda: varlen_stand_in)
    with caplog.at_level("INFO", "comtip_kernels"):
        assert [chosen(n) for n in (3, 48, 49, 200)] == ["triton", "triton", "flash", "flash"]
    reported = [r.getMessage() for r in caplog.records]
    assert reported == [f"packed_attention: impl='auto' chose '{n}' on cuda" for n in ("triton", "flash")]
    monkeypatch.setattr(peers, "flash_varlen", lambda: None)
    assert chosen(49) == "varlen"
    monkeypatch.setattr(OnCuda, "dtype", torch.float32)
    assert chosen(49) == "sdpa"
    with dispatch.prefer("reference"):
        assert chosen(49) == "reference"


def test_a_sentence_longer_than_a_tile():
    qkv, length = case([200, 3], 1, 4)
    with pytest.raises(ValueError, match="a sentence has 200 tokens"):
        packed_attention(*qkv, length, impl="triton")
    torch.testing.assert_close(
        packed_attention(*qkv, length), packed_attention(*qkv, length, impl="reference"), rtol=1e-10, atol=1e-12
    )
