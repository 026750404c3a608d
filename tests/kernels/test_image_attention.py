"""Attention within images against plain PyTorch in fp64: parts, biases, dtypes and awkward input."""

import logging
from collections.abc import Sequence

import pytest
import torch
from comtip_kernels import dispatch, first_tokens, image_attention, packed_attention_qkv
from torch import Tensor

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def case(images: int, tokens: Sequence[int], H: int, E: int, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    """Return q, k and v of all parts, and their bias in fp32."""
    g = torch.Generator().manual_seed(images + sum(tokens))
    qkv, bias = (torch.randn(*s, generator=g) for s in ((images * sum(tokens), 3, H, E), (3 * H * E,)))
    return qkv.to(dtype), bias


def plain(qkv: Tensor, bias: Tensor | None, lengths: Sequence[int], stored: torch.dtype) -> Tensor:
    """Return the attention within consecutive rows of these lengths, with q, k and v rounded after their bias was added."""
    if bias is not None:
        added = qkv + bias.view(qkv.shape[1:])
        qkv = added + (added.detach().float().to(stored).double() - added.detach())
    out = []
    for part in qkv.split(list(lengths)):
        q, k, v = (x.transpose(0, 1) for x in part.unbind(1))
        out.append(((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out) if out else qkv[:, 0]


def grads(out: Tensor, leaves: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the result and the gradients of the operands, on the CPU."""
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(BF16)
    given = [leaf for leaf in leaves if leaf is not None]
    found = torch.autograd.grad(out, given, probe.to(out.device, out.dtype))
    return [t.detach().cpu() for t in (out, *found)]


def run(impl: str, qkv: Tensor, bias: Tensor | None, tokens: Sequence[int], device: torch.device) -> list[Tensor]:
    qkv = qkv.to(device).detach().requires_grad_()
    bias = None if bias is None else bias.to(device).detach().requires_grad_()
    return grads(image_attention(qkv, tokens, bias, impl=impl), (qkv, bias))


def impl_of(fast) -> str:
    """Return the implementation; there is none for CPUs alone."""
    return "triton" if fast.triton else "reference"


def close(fast, got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> None:
    # On a GPU, fp32 is multiplied as tf32 here; the interpreter multiplies in fp32, and truncates to bf16 instead of rounding.
    loose = 2e-3 if fast.triton and fast.device.type == "cuda" else 1e-5
    for a, b in zip(got, want, strict=True):
        assert float((a.double() - b).norm()) <= (2**-5 if dtype == BF16 else loose) * float(b.norm()) + 1e-12


def check(fast, qkv: Tensor, bias: Tensor | None, tokens: Sequence[int]) -> list[Tensor]:
    """Compare result and gradients with fp64, and return them."""
    got = run(impl_of(fast), qkv, bias, tokens, fast.device)
    images = qkv.shape[0] // sum(tokens)
    leaves = [None if t is None else t.double().requires_grad_() for t in (qkv, bias)]
    out = plain(*leaves, [T for T in tokens for _ in range(images)], qkv.dtype)
    assert [t.dtype for t in got] == [qkv.dtype, qkv.dtype] + [F32] * (bias is not None)
    close(fast, got, grads(out, leaves), qkv.dtype)
    return got


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("tokens", [(1,), (26,), (64,), (50, 26), (33, 1, 17)], ids=str)
def test_equals_plain_pytorch_in_fp64(
    fast, tokens: tuple[int, ...], biased: bool, dtype: torch.dtype, allow_tf32: None, nan_outputs: None
):
    qkv, bias = case(2, tokens, 2, 20, dtype)
    check(fast, qkv, bias if biased else None, tokens)


@pytest.mark.parametrize("size", [(1, (1,), 1, 1), (5, (32, 9), 3, 12), (0, (7, 3), 2, 16)], ids=str)
def test_images_of_32_tokens_without_tf32(fast, size: tuple, nan_outputs: None):
    """A rank may have no image."""
    images, tokens, *heads = size
    qkv, bias = case(images, tokens, *heads)
    check(fast, qkv, bias, tokens)
    got = check(fast, qkv, None, tokens)
    assert images or all(t.numel() == 0 for t in got)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_only_its_image_is_read(fast, dtype: torch.dtype, nan_outputs: None):
    """q, k, v and their bias lie in memory full of NaN; NaN in one image changes no other image, and no other part."""
    tokens = (26, 9)
    qkv, bias = case(3, tokens, 1, 12, dtype)
    want = run(impl_of(fast), qkv, bias, tokens, fast.device)
    big = torch.full((qkv.shape[0] + 70, 4, 3, 20), float("nan"), dtype=dtype, device=fast.device)
    inside = big[: qkv.shape[0], :3, :1, :12]
    inside.copy_(qkv)
    beyond = torch.full((bias.shape[0] + 20,), float("nan"), device=fast.device)
    beyond[: bias.shape[0]] = bias
    got = run(impl_of(fast), inside, beyond[: bias.shape[0]], tokens, fast.device)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for own in (slice(26, 52), slice(3 * 26 + 9, 3 * 26 + 18)):
        hurt = qkv.clone()
        hurt[own] = float("nan")
        others = torch.ones(qkv.shape[0], dtype=torch.bool)
        others[own] = False
        found = run(impl_of(fast), hurt, bias, tokens, fast.device)
        for a, b in zip(found[:2], want[:2], strict=True):
            assert torch.equal(a[others], b[others])
            assert torch.isnan(a[own]).all()


@pytest.mark.parametrize(("dtype", "biased"), [(F32, False), (BF16, True)], ids=["fp32", "bf16 with a bias"])
def test_strides_and_two_runs(fast, dtype: torch.dtype, biased: bool):
    qkv, bias = case(2, (20, 7), 2, 8, dtype)
    bias = bias if biased else None
    one, two = (run(impl_of(fast), qkv, bias, (20, 7), fast.device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    views = qkv.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    spread = None if bias is None else torch.stack([bias, bias + 1], dim=1)[:, 0]
    assert not views.is_contiguous()
    close(fast, run(impl_of(fast), views, spread, (20, 7), fast.device), [t.double() for t in one], dtype)
    # A transposed gradient, and one of stride 0.
    for probe in (torch.randn(8, 2, 54).permute(2, 1, 0), torch.ones(()).expand(54, 2, 8)):
        found = []
        for grad in (probe, probe.contiguous()):
            leaf = qkv.to(fast.device).detach().requires_grad_()
            image_attention(leaf, (20, 7), None if bias is None else bias.to(fast.device), impl=impl_of(fast)).backward(
                grad.to(fast.device, dtype)
            )
            found.append(leaf.grad.cpu())
        close(fast, found[:1], [found[1].double()], dtype)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_a_bias_of_sentences(fast, dtype: torch.dtype, nan_outputs: None):
    """The kernel adds it if it gets the first token of each token's sentence; otherwise it is added before."""
    length = torch.tensor([3, 1, 9, 16, 5, 5, 12])
    S = int(length.sum())
    qkv, bias = case(1, (S,), 3, 12, dtype)
    leaves = [t.double().requires_grad_() for t in (qkv, bias)]
    want = grads(plain(*leaves, length.tolist(), dtype), leaves)
    for first in (None, first_tokens(length, S).to(fast.device)):
        given = [t.to(fast.device).detach().requires_grad_() for t in (qkv, bias)]
        impl = "triton" if fast.triton else "cpu"
        options = {"longest": 16, "first_S": first, "bias_C": given[1], "impl": impl}
        out = packed_attention_qkv(given[0], length.to(fast.device), **options)
        close(fast, grads(out, given), want, dtype)


@pytest.mark.parametrize(("dtype", "limit"), [(BF16, 64), (F32, 32)], ids=["bf16", "fp32"])
def test_images_with_too_many_tokens(fast, dtype: torch.dtype, limit: int):
    """``auto`` selects PyTorch's attention for them."""
    for tokens in ((limit + 1,), (3, limit + 1)):
        qkv, bias = case(2, tokens, 2, 8, dtype)
        if fast.triton:
            with pytest.raises(
                ValueError, match=f"an image has {limit + 1} tokens and impl='triton' supports {limit};"
            ):
                run("triton", qkv, bias, tokens, fast.device)
        got, want = (run(impl, qkv, bias, tokens, fast.device) for impl in ("auto", "reference"))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [F16, F64])
def test_other_dtypes_take_the_reference(fast, dtype: torch.dtype):
    qkv, bias = case(2, (5, 3), 2, 8, dtype)
    got, want = (run(impl, qkv, bias.to(dtype), (5, 3), fast.device) for impl in ("auto", "reference"))
    assert got[0].dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    if fast.triton:
        with pytest.raises(ValueError, match=f"image_attention: impl='triton' does not support {dtype}; cast"):
            run("triton", qkv, None, (5, 3), fast.device)


def test_auto_on_a_cpu_is_the_reference(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "_reported", set())
    with caplog.at_level(logging.INFO, "comtip_kernels"):
        image_attention(case(2, (5,), 1, 4)[0], (5,))
    assert caplog.messages == ["image_attention: impl='auto' chose 'reference' on cpu"]
    with pytest.raises(ValueError, match="impl='cpu' is not available"):
        image_attention(case(2, (5,), 1, 4)[0], (5,), impl="cpu")


def test_gradcheck_of_the_reference():
    qkv, bias = (t.double().requires_grad_() for t in case(2, (3, 1), 2, 3))
    assert torch.autograd.gradcheck(lambda x, b: image_attention(x, (3, 1), b, impl="reference"), (qkv, bias))
