"""Attention with one query per sentence and head against the reference in fp64: implementations, dtypes and awkward input."""

import pytest
import torch
from comtip_kernels import one_query_attention

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
SCALE = 0.3


def case(lengths: list[int], H: int, D: int, dtype: torch.dtype = F64, queries: int | None = None):
    """Return queries and tokens, and the lengths; by default every sentence has a query."""
    g = torch.Generator().manual_seed(sum(lengths))
    N = len(lengths) if queries is None else queries
    operands = [torch.randn(*s, generator=g, dtype=F64).to(dtype) for s in ((N, H, D), (sum(lengths), D))]
    return operands, torch.tensor(lengths, dtype=torch.int64)


def run(impl: str, operands, length: torch.Tensor, device: torch.device | None = None) -> list[torch.Tensor]:
    """Return the output and the gradients of queries and tokens, on the CPU."""
    device = device or torch.device("cpu")
    leaves = [t.to(device).detach().requires_grad_() for t in operands]
    out = one_query_attention(*leaves, length.to(device), scale=SCALE, impl=impl)
    probe = torch.linspace(-1, 1, max(1, out.numel()), dtype=out.dtype, device=device)[: out.numel()].view(out.shape)
    (out * probe).sum().backward()
    return [t.detach().cpu() for t in (out, *(leaf.grad for leaf in leaves))]


def draw(N: int, longest: int) -> list[int]:
    g = torch.Generator().manual_seed(N)
    return [*torch.randint(1, longest + 1, (N - 1,), generator=g).tolist(), longest]


def close(fast, got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        # The interpreter multiplies in fp32; a GPU would use tf32 here.
        loose = fast.triton and fast.device.type == "cuda"
        torch.testing.assert_close(a.to(F64), b, rtol=2e-3 if loose else fast.rtol, atol=2e-3 if loose else fast.atol)


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (9, 7, 3, 20), (6, 16, 4, 300), (3, 64, 16, 33), (40, 9, 2, 8)])
@pytest.mark.parametrize("order", ["sorted", "as drawn"])
def test_equals_the_reference(fast, size: tuple[int, ...], order: str, allow_tf32: None):
    lengths = draw(*size[:2])
    operands, length = case(sorted(lengths) if order == "sorted" else lengths, *size[2:])
    close(
        fast,
        run(fast.impl, [t.to(fast.dtype) for t in operands], length, fast.device),
        run("reference", operands, length),
    )


def test_the_reference_is_attention_with_projected_keys_and_values():
    """Keys and values of one head, biases included, give what the rearranged products give."""
    (query, x), length = case([5, 1, 3], 1, 6)
    W_k, W_v, b_k, b_v = (torch.randn(*s, dtype=F64) for s in ((4, 6), (4, 6), (4,), (4,)))
    q = query[:, 0, :4]
    got = one_query_attention((q @ W_k)[:, None], x, length, scale=0.5, impl="reference")[:, 0] @ W_v.T + b_v
    parts = x.split(length.tolist())
    want = [((qi @ (p @ W_k.T + b_k).T) * 0.5).softmax(-1) @ (p @ W_v.T + b_v) for qi, p in zip(q, parts, strict=True)]
    torch.testing.assert_close(got, torch.stack(want))


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F32, BF16), (BF16, F32)], ids=["bf16", "mixed", "mixed back"])
def test_bf16_and_mixed_dtypes(fast, dtypes: tuple[torch.dtype, ...]):
    operands, length = case(draw(9, 12), 4, 40)
    operands = [t.to(dtype) for t, dtype in zip(operands, dtypes, strict=True)]
    got = run(fast.impl, operands, length, fast.device)
    exact = [t.to(BF16) if fast.triton else t for t in operands]
    want = run("reference", [t.to(F64) for t in exact], length)
    assert [t.dtype for t in got[1:]] == list(dtypes)
    for a, b in zip(got, want, strict=True):
        assert float((a.to(F64) - b).norm()) <= 2**-6 * float(b.norm())


def test_sentences_without_tokens_and_no_sentences(fast):
    for lengths in ([0, 3, 0, 0, 2, 0], [0, 1, 0], [0, 0], []):
        operands, length = case(lengths, 2, 4)
        close(
            fast,
            run(fast.impl, [t.to(fast.dtype) for t in operands], length, fast.device),
            run("reference", operands, length),
        )


@pytest.mark.parametrize("queries", [0, 1, 3])
def test_sentences_without_a_query(fast, queries: int, nan_outputs: None):
    """Tokens of sentences beyond the queries change no result, and their gradient is 0."""
    lengths = [2, 5, 4, 0, 3]
    operands, length = case(lengths, 2, 8, queries=queries)
    got = run(fast.impl, [t.to(fast.dtype) for t in operands], length, fast.device)
    asked = sum(lengths[:queries])
    want = run("reference", [operands[0], operands[1][:asked]], length[:queries])
    assert (got[2][asked:] == 0).all()
    close(fast, [got[0], got[1], got[2][:asked]], want)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_every_value_is_written_and_only_its_sentence_read(fast, dtype: torch.dtype, nan_outputs: None):
    """Outputs start as NaN, and the inputs lie in memory full of NaN: heads and widths that are not powers of 2."""
    operands, length = case(draw(11, 9), 3, 12, dtype)
    want = run(fast.impl, operands, length, fast.device)
    inside = []
    for t in operands:
        big = torch.full(tuple(n + 5 for n in t.shape), float("nan"), dtype=dtype, device=fast.device)
        view = big[tuple(slice(n) for n in t.shape)]
        view.copy_(t.to(fast.device))
        inside.append(view.requires_grad_())
    out = one_query_attention(*inside, length.to(fast.device), scale=SCALE, impl=fast.impl)
    torch.testing.assert_close(out.detach().cpu(), want[0])
    probe = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=fast.device).view(out.shape)
    grads = torch.autograd.grad((out * probe).sum(), inside)
    for a, b in zip(grads, want[1:], strict=True):
        torch.testing.assert_close(a.cpu(), b)


def test_strides_of_a_transposed_query_and_gradient(fast):
    """The model's queries and the gradient of the result come from products per head, (H, N, D) in memory."""
    (query, x), length = case(draw(6, 5), 4, 16)
    operands = [query.to(fast.dtype), x.to(fast.dtype)]
    want = run(fast.impl, operands, length, fast.device)
    turned = operands[0].to(fast.device).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    tokens = operands[1].to(fast.device).requires_grad_()
    out = one_query_attention(turned, tokens, length.to(fast.device), scale=SCALE, impl=fast.impl)
    probe = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=fast.device).view(out.shape)
    out.transpose(0, 1).backward(probe.transpose(0, 1).contiguous())
    for a, b in zip((out.detach(), turned.grad, tokens.grad), want, strict=True):
        torch.testing.assert_close(a.cpu(), b)


def test_large_scores(fast):
    """Scores of +-2,000 overflow an exponential without the maximum."""
    operands, length = case(draw(8, 6), 2, 16)
    operands[0] *= 2000
    got = run(fast.impl, [t.to(fast.dtype) for t in operands], length, fast.device)
    want = run("reference", [t.to(fast.dtype).to(F64) for t in operands], length)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.to(F64), b, rtol=1e-3, atol=1e-3)


def test_too_many_tokens_or_heads_for_the_kernels():
    for lengths, heads in (([65], 1), ([3], 17)):
        operands, length = case(lengths, heads, 4, F32)
        with pytest.raises(ValueError, match="supports 64 tokens per sentence and 16 heads"):
            one_query_attention(*operands, length, scale=1.0, impl="triton")


def test_gradcheck():
    (query, x), length = case([3, 1, 4, 4], 2, 5)
    for impl in ("cpu", "reference"):
        assert torch.autograd.gradcheck(
            lambda q, t, impl=impl: one_query_attention(q, t, length, scale=SCALE, impl=impl),
            (query.requires_grad_(), x.requires_grad_()),
        )
