"""Packed attention on the CPU, on external kernels, and the choice between them. Values are tested in test_packed_attention.py."""

import sys

import pytest
import torch
from comtip_kernels import dispatch, packed_attention, packed_attention_qkv
from comtip_kernels.packed_attention import cpu as packed_cpu
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


def test_gradcheck():
    qkv, length = case([2, 1, 3, 3], 2, 2)
    for impl in ("cpu", "reference"):
        assert torch.autograd.gradcheck(
            lambda *x, impl=impl: packed_attention(*x, length, impl=impl), [t.requires_grad_() for t in qkv]
        )


@pytest.mark.parametrize("order", ["mixed", "by length"])
@pytest.mark.parametrize("poison", [1e30, float("inf"), float("nan")])
def test_one_sentence_does_not_change_another(poison: float, order: str):
    """Short sentences share a matrix: what passes the mask must not reach another sentence."""
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


def test_more_than_65535_sentences():
    length = torch.randint(1, 4, (70_000,), generator=torch.Generator().manual_seed(0))
    q = torch.randn(int(length.sum()), 1, 2)
    out = packed_attention(q, q, q, length, impl="cpu")
    last = q[-int(length[-1]) :]
    torch.testing.assert_close(
        out[-int(length[-1]) :], packed_attention(last, last, last, length[-1:], impl="reference")
    )


class StandIn:
    """Takes the arguments of flash-attn and of torch's varlen, and checks them."""

    def __init__(self) -> None:
        self.deterministic: list[bool] = []

    def flash(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic=False):
        self.deterministic.append(deterministic)
        return self.varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)

    def varlen(self, q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None):
        assert cu_seq_q.dtype == torch.int32
        assert max_q == max_k >= int(cu_seq_q.diff().max())
        return _Backward.apply(self, packed_attention(q, k, v, cu_seq_q.diff().long(), impl="reference"))


class _Backward(torch.autograd.Function):
    """Notes whether deterministic algorithms are enabled when its backward pass runs."""

    @staticmethod
    def forward(ctx, stand_in: StandIn, x: torch.Tensor) -> torch.Tensor:
        ctx.stand_in = stand_in
        return x.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        ctx.stand_in.deterministic.append(torch.are_deterministic_algorithms_enabled())
        return None, grad


@pytest.mark.parametrize("name", ["flash", "varlen"])
def test_external_kernels_behind_the_same_call(name: str, monkeypatch: pytest.MonkeyPatch):
    qkv, length = case(draw(9, 7), 2, 4)
    finder = {"flash": "flash_varlen", "varlen": "torch_varlen"}[name]
    stand_in = getattr(StandIn(), name)
    monkeypatch.setattr(peers, finder, lambda: stand_in)
    with pytest.raises(
        ValueError, match=f"impl='{name}' needs fp16 or bf16 on a CUDA device, not torch.float64 on cpu"
    ):
        packed_attention(*qkv, length, impl=name)
    monkeypatch.setattr(peers, "can_peer", lambda like: True)
    want = packed_attention(*qkv, length)
    torch.testing.assert_close(packed_attention(*qkv, length, impl=name), want)
    monkeypatch.setattr(peers, "MAX_SENTENCES", 2)  # nine sentences in five chunks
    torch.testing.assert_close(packed_attention(*qkv, length, impl=name), want)
    monkeypatch.setattr(peers, finder, lambda: None)
    with pytest.raises(ValueError, match=f"impl='{name}' needs"):
        packed_attention(*qkv, length, impl=name)


@pytest.mark.parametrize("name", ["flash", "varlen"])
def test_external_kernels_run_their_deterministic_backward(name: str, monkeypatch: pytest.MonkeyPatch):
    qkv, length = case(draw(9, 7), 2, 4)
    stand_in = StandIn()
    monkeypatch.setattr(peers, "can_peer", lambda like: True)
    monkeypatch.setattr(
        peers, {"flash": "flash_varlen", "varlen": "torch_varlen"}[name], lambda: getattr(stand_in, name)
    )
    got, want = run(name, qkv, length), run("reference", qkv, length)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert stand_in.deterministic[0]
    assert not torch.are_deterministic_algorithms_enabled()  # as it was


def test_a_flash_attn_without_a_deterministic_backward_is_refused(monkeypatch: pytest.MonkeyPatch):
    qkv, length = case(draw(9, 7), 2, 4)
    monkeypatch.setattr(peers, "can_peer", lambda like: True)
    monkeypatch.setattr(peers, "flash_varlen", lambda: StandIn().varlen)
    with pytest.raises(ValueError, match="needs a deterministic backward pass"):
        packed_attention(*qkv, length, impl="flash")


def test_what_auto_selects_for_long_sentences(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """The first peer that is there and takes the dtype, then padding; reported once."""

    class OnCuda:
        is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda")

    def chosen(longest: int, like: object = OnCuda) -> str:
        have = {name: (lambda name=name: name) for name in attention._IMPLEMENTATIONS}
        return attention._choose((like,), longest, "auto", have)()

    monkeypatch.setattr(dispatch, "_reported", set())
    monkeypatch.setattr(dispatch, "can_launch", lambda device: True)
    monkeypatch.setattr(peers, "flash_varlen", lambda: StandIn().flash)
    monkeypatch.setattr(peers, "torch_varlen", lambda: StandIn().varlen)
    with caplog.at_level("INFO", "comtip_kernels"):
        assert [chosen(n) for n in (3, 48, 49, 200)] == ["triton", "triton", "flash", "flash"]
    reported = [r.getMessage() for r in caplog.records]
    assert reported == [f"packed_attention: impl='auto' chose '{n}' on cuda" for n in ("triton", "flash")]
    monkeypatch.setattr(peers, "flash_varlen", lambda: None)
    assert chosen(49) == "varlen"
    monkeypatch.setattr(peers, "flash_varlen", lambda: StandIn().varlen)  # without a deterministic backward pass
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


def test_a_prediction_before_training_leaves_no_tensor_that_training_cannot_save():
    """The masks between short sentences are kept, and PyTorch saves no tensor of inference mode for a backward pass."""
    packed_cpu._separator.cache_clear()
    lengths = torch.full((12,), 3)
    qkv = torch.randn(36, 3, 2, 4)
    with torch.inference_mode():
        expected = packed_attention_qkv(qkv, lengths, impl="cpu").clone()
    leaf = qkv.clone().requires_grad_()
    out = packed_attention_qkv(leaf, lengths, impl="cpu")
    out.sum().backward()
    assert torch.equal(out.detach(), expected)
    assert leaf.grad is not None
    assert packed_cpu._separator.cache_info().hits > 0


@pytest.mark.parametrize(
    ("n", "length", "matrices"),
    [
        (6, 3, [(1, 6)]),
        (11, 3, [(1, 11)]),  # fewer than two matrices of six
        (12, 3, [(2, 6)]),
        (13, 3, [(2, 6), (1, 1)]),
        (3, 15, [(1, 3)]),
        (3, 16, [(3, 1)]),
    ],
)
def test_a_short_run_is_one_matrix(n: int, length: int, matrices: list[tuple[int, int]]):
    assert [(count, several) for count, several, _ in packed_cpu._shared([(n, 1, length)])] == matrices
    qkv, lengths = case([length] * n, 2, 4)
    for got, want in zip(run("cpu", qkv, lengths), run("reference", qkv, lengths), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
