"""The gene-sentence embedding against the reference in fp64: every implementation, dtype and awkward input."""

import pytest
import torch
from comtip_kernels import copy_sentence_rows, gene_sentence_embedding, plan_sentences

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
KINDS = ["", "norm", "mix", "identity", "mix identity norm"]


def case(N: int, T: int, D: int, V: int = 23, Q: int = 5, I: int = 4, dtype: torch.dtype = F32):
    g = torch.Generator().manual_seed(N * 7 + T)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    names = torch.randint(V, (max(1, N // 3), T), generator=g)
    which = torch.randint(names.shape[0], (N,), generator=g)
    lengths = torch.randint(2, T + 1, (names.shape[0],), generator=g)
    ids = names[which]
    ids[:, 0] = 1
    lo, hi = (torch.randint(Q, (N,), generator=g) for _ in range(2))
    sentences = {"ids_NT": ids, "length_N": lengths[which], "level_lo_N": lo}
    tables = {"token_VD": randn(V, D), "type_3D": randn(3, D), "position_TD": randn(T, D), "level_QD": randn(Q, D)}
    more = {
        "mix": {"level_hi_N": hi, "mix_N": torch.rand(N, generator=g).to(dtype)},
        "identity": {"identity_N": which % I, "identity_ID": randn(I, D)},
        "norm": {"gain_D": randn(D), "bias_D": randn(D)},
    }
    return sentences, tables, more


def run(fast_or_impl, inputs, kind: str, dtype: torch.dtype | None = None, **options: object) -> list[torch.Tensor]:
    """Return the output and the gradients of every table, on the CPU."""
    impl = fast_or_impl if isinstance(fast_or_impl, str) else fast_or_impl.impl
    device = torch.device("cpu") if isinstance(fast_or_impl, str) else fast_or_impl.device
    sentences, tables = ({k: v.to(device) for k, v in d.items()} for d in inputs[:2])
    more = inputs[2]
    chosen = tables | {k: v.to(device) for name in kind.split() for k, v in more[name].items()}
    floats = {
        k: v.detach().to(dtype or v.dtype).requires_grad_(k != "mix_N")
        for k, v in chosen.items()
        if v.is_floating_point()
    }
    out = gene_sentence_embedding(**sentences, **(chosen | floats), impl=impl, **options)
    # Numbers that bf16 holds exactly, so that every dtype has the same upstream gradient: sums of it cancel.
    probe = torch.linspace(-1, 1, max(1, out.numel()))[: out.numel()].to(BF16).to(out.dtype)
    probe = probe.to(device).view(out.shape)
    (out * probe).sum().backward()
    return [t.detach().cpu() for t in (out, *(f.grad for f in floats.values() if f.grad is not None))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 2, 3), (30, 9, 20), (40, 5, 48)])
def test_equals_the_reference(fast, kind: str, size: tuple[int, ...]):
    inputs = case(*size, dtype=fast.dtype)
    for a, b in zip(run(fast, inputs, kind), run("reference", inputs, kind, F64), strict=True):
        torch.testing.assert_close(a.to(F64), b, rtol=fast.rtol, atol=2 * fast.atol)


@pytest.mark.parametrize("D", [300, 600, 1024])
def test_every_slice_of_wide_rows(fast, D: int):
    inputs = case(20, 5, D, dtype=fast.dtype)
    got, want = run(fast, inputs, "mix identity norm"), run("reference", inputs, "mix identity norm", F64)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.to(F64), b, rtol=fast.rtol, atol=2 * fast.atol)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_summed_and_normalised_in_fp32(fast, kind: str):
    inputs = case(30, 6, 20, dtype=BF16)
    truth = run("reference", inputs, kind, F64)
    for i, (a, t) in enumerate(zip(run(fast, inputs, kind), truth, strict=True)):
        assert a.dtype == BF16
        # On Triton the sum is rounded once, at the end; the CPU path rounds every intermediate result.
        step = (2**-8 if i == 0 else 2**-5) if fast.triton else 2**-3
        assert float((a.to(F64) - t).norm()) <= step * float(t.norm()) + 1e-6


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_nothing_beyond_the_end_is_read_or_left_unwritten(fast, dtype: torch.dtype, nan_outputs: None):
    inputs = case(13, 5, 20, dtype=dtype)
    want = run(fast, inputs, "norm")
    wide = {}
    for name, t in inputs[1].items():
        # On the device: a copy of a view there would leave out the memory around it.
        big = torch.full((t.shape[0] + 5, 28), float("nan"), dtype=dtype, device=fast.device)
        big[: t.shape[0], :20] = t
        wide[name] = big[: t.shape[0], :20]
    sentences = inputs[0] | {"ids_NT": inputs[0]["ids_NT"].T.contiguous().T}
    for a, b in zip(run(fast, (sentences, wide, inputs[2]), "norm"), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_two_runs_are_equal_to_the_bit(fast, dtype: torch.dtype):
    inputs = case(60, 9, 16, dtype=dtype)
    one, two = (run(fast, inputs, "mix identity norm") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_no_sentences_and_stride_0_gradients(fast):
    inputs = case(20, 5, 16, dtype=fast.dtype)
    empty = ({k: v[:0] for k, v in inputs[0].items()}, inputs[1], {"norm": inputs[2]["norm"]})
    for a, b in zip(run(fast, empty, "norm"), run("reference", empty, "norm"), strict=True):
        torch.testing.assert_close(a, b)
    sentences, tables, _ = inputs
    grads = []
    for impl, device in ((fast.impl, fast.device), ("reference", torch.device("cpu"))):
        on = [{k: v.to(device) for k, v in d.items()} for d in (sentences, tables)]
        token = on[1]["token_VD"].clone().requires_grad_()
        gene_sentence_embedding(**on[0], **(on[1] | {"token_VD": token}), impl=impl).sum().backward()
        grads.append(token.grad.cpu())
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_shows_in_its_tokens_only(fast, bad: float):
    sentences, tables, more = case(20, 5, 8, dtype=F32)
    token = tables["token_VD"].clone()
    hit = int(sentences["ids_NT"][0, 1])
    token[hit, 3] = bad
    out = run(fast, (sentences, tables | {"token_VD": token}, more), "norm")[0]
    want = run(fast, (sentences, tables, more), "norm")[0]
    inside = torch.arange(5) < sentences["length_N"][:, None] - 1
    of_hit = ((sentences["ids_NT"] == hit) & inside)[torch.arange(5) < sentences["length_N"][:, None]]
    assert not torch.isfinite(out[of_hit]).all(1).any()
    torch.testing.assert_close(out[~of_hit], want[~of_hit])


def test_many_bf16_gradients_are_summed_in_fp32(fast):
    """A table of tens of rows receives millions of gradients: in bf16 the sum stops growing at 256 (Liger-Kernel 512, 830)."""
    if not fast.triton:
        pytest.skip("torch sums equal tokens of the CPU path in the dtype of the gradient")
    N = 700
    ids, length = torch.ones(N, 2, dtype=torch.int64, device=fast.device), torch.full((N,), 2, device=fast.device)
    tables = [torch.zeros(n, 16, dtype=BF16, device=fast.device) for n in (2, 3, 2, 3)]
    tables[3].requires_grad_()
    gene_sentence_embedding(ids, length, torch.zeros_like(length), *tables, impl="triton").sum().backward()
    assert tables[3].grad[0, 0] == 700


def test_fp16_is_refused_by_triton(fast):
    sentences, tables, _ = case(4, 5, 8, dtype=torch.float16)
    on = [{k: v.to(fast.device) for k, v in d.items()} for d in (sentences, tables)]
    if fast.triton:
        with pytest.raises(ValueError, match=r"does not support torch.float16; cast the operands to torch.bfloat16"):
            gene_sentence_embedding(**on[0], **on[1], impl="triton")
    assert gene_sentence_embedding(**on[0], **on[1]).dtype == torch.float16


@pytest.mark.parametrize("kind", ["", "mix identity norm"])
def test_distinct_rows_are_those_of_the_tokens(fast, kind: str):
    sentences, tables, more = case(17, 6, 24)
    chosen = tables | {k: v for name in kind.split() for k, v in more[name].items()}
    on = {k: v.to(fast.device) for k, v in (sentences | chosen).items()}
    plan = plan_sentences(
        *(on[k] for k in ("ids_NT", "length_N", "level_lo_N")), identity_N=on.get("identity_N"), mixed="mix" in kind
    )
    tokens = gene_sentence_embedding(**on, plan=plan, impl=fast.impl)
    for impl in (fast.impl, "reference"):
        rows = gene_sentence_embedding(**on, plan=plan, distinct=True, impl=impl)
        assert rows.shape == (plan.kind_U.shape[0], 24)
        assert rows.shape[0] < tokens.shape[0]
        torch.testing.assert_close(copy_sentence_rows(rows, plan, impl=impl), tokens, rtol=1e-5, atol=1e-5)


def test_distinct_rows_need_a_plan():
    sentences, tables, _ = case(4, 5, 8)
    with pytest.raises(ValueError, match="pass plan"):
        gene_sentence_embedding(**sentences, **tables, distinct=True)
