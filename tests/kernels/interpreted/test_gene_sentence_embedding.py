"""The embedding's Triton kernels, run by Triton's interpreter: see tests/kernels/test_interpreted.py."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs inside tests/kernels/test_interpreted.py", allow_module_level=True)

from comtip_kernels import gene_sentence_embedding, plan_sentences
from comtip_kernels.gene_sentence_embedding import triton_kernels
from comtip_kernels.gene_sentence_embedding import triton_op as op

F64 = torch.float64


def case(N: int, T: int, D: int, V: int = 23, Q: int = 5, I: int = 4, dtype: torch.dtype = torch.float32):
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


KINDS = ["", "norm", "mix", "identity", "mix identity norm"]


def run(impl: str, made, kind: str, dtype: torch.dtype | None = None, **options: object) -> list[torch.Tensor]:
    sentences, tables, more = made
    chosen = tables | {k: v for name in kind.split() for k, v in more[name].items()}
    floats = {
        k: v.detach().to(dtype or v.dtype).requires_grad_(k != "mix_N")
        for k, v in chosen.items()
        if v.is_floating_point()
    }
    out = gene_sentence_embedding(**sentences, **(chosen | floats), impl=impl, **options)
    probe = torch.linspace(-1, 1, max(1, out.numel()), dtype=out.dtype)[: out.numel()].view(out.shape)
    (out * probe).sum().backward()
    return [out.detach(), *(t.grad for t in floats.values() if t.grad is not None)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 2, 3), (20, 7, 20), (40, 5, 48)])
def test_equals_fp64_truth(kind: str, size: tuple[int, ...]):
    made = case(*size)
    for got, want in zip(run("triton", made, kind), run("reference", made, kind, F64), strict=True):
        torch.testing.assert_close(got.to(F64), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("copies", [10, 130])
def test_sums_of_many_tokens_take_two_rounds(copies: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton_kernels, "PIECE", 16)
    sentences, tables, more = case(5, 5, 8)
    made = ({k: v.repeat_interleave(copies, 0) for k, v in sentences.items()}, tables, more)
    assert (plan_sentences(**made[0]).most > 256) == (copies == 130)
    for got, want in zip(run("triton", made, "norm"), run("reference", made, "norm", F64), strict=True):
        torch.testing.assert_close(got.to(F64), want, rtol=2e-5, atol=1e-4)


def test_bf16_is_no_worse_than_torch_in_bf16():
    made = case(30, 6, 16, dtype=torch.bfloat16)
    truth = run("reference", made, "identity norm", F64)
    ours, theirs = (run(impl, made, "identity norm") for impl in ("triton", "reference"))
    for a, b, t in zip(ours, theirs, truth, strict=True):
        assert float((a.to(F64) - t).norm()) <= 2 * float((b.to(F64) - t).norm()) + 1e-2 * float(t.norm())


def test_many_bf16_gradients_are_summed_in_fp32():
    """A table of tens of rows takes millions of gradients: in bf16 the sum stops growing at 256 (Liger-Kernel 512, 830)."""
    N = 700
    ids, length = torch.ones(N, 2, dtype=torch.int64), torch.full((N,), 2)
    tables = [torch.zeros(n, 16, dtype=torch.bfloat16) for n in (2, 3, 2, 3)]
    tables[3].requires_grad_()
    level = torch.zeros(N, dtype=torch.int64)
    gene_sentence_embedding(ids, length, level, *tables, impl="triton").sum().backward()
    assert tables[3].grad[0, 0] == 700


def test_nothing_past_the_end_is_read_or_left_unwritten(monkeypatch: pytest.MonkeyPatch):
    real = torch.empty
    made = case(13, 5, 20)
    want = run("reference", made, "norm")
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real(*a, **k).fill_(float("nan")))
    wide = {}
    for name, t in made[1].items():
        big = torch.full((t.shape[0] + 5, 28), float("nan"))
        big[: t.shape[0], :20] = t
        wide[name] = big[: t.shape[0], :20]
    sentences = made[0] | {"ids_NT": made[0]["ids_NT"].T.contiguous().T}
    for a, b in zip(run("triton", (sentences, wide, made[2]), "norm"), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_empty_stride_0_and_the_same_bits_twice():
    made = case(20, 5, 16)
    one, two = (run("triton", made, "mix identity norm") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    empty = ({k: v[:0] for k, v in made[0].items()}, made[1], {"norm": made[2]["norm"]})
    for got, want in zip(run("triton", empty, "norm"), run("reference", empty, "norm"), strict=True):
        torch.testing.assert_close(got, want)
    sentences, tables, _ = made
    grads = []
    for impl in ("triton", "reference"):
        token = tables["token_VD"].clone().requires_grad_()
        gene_sentence_embedding(**sentences, **(tables | {"token_VD": token}), impl=impl).sum().backward()
        grads.append(token.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_shows_in_its_tokens_and_in_no_other(bad: float):
    sentences, tables, more = case(20, 5, 8)
    token = tables["token_VD"].clone()
    hit = int(sentences["ids_NT"][0, 1])
    token[hit, 3] = bad
    out = gene_sentence_embedding(**sentences, **(tables | {"token_VD": token}), **more["norm"], impl="triton")
    want = gene_sentence_embedding(**sentences, **tables, **more["norm"], impl="triton")
    inside = torch.arange(5) < sentences["length_N"][:, None] - 1
    of_hit = ((sentences["ids_NT"] == hit) & inside)[torch.arange(5) < sentences["length_N"][:, None]]
    assert not torch.isfinite(out[of_hit]).all(1).any()
    torch.testing.assert_close(out[~of_hit], want[~of_hit])


def test_opcheck_and_flops():
    sentences, tables, more = case(12, 5, 16)
    identity, gain = more["identity"]["identity_ID"].requires_grad_(), more["norm"]["gain_D"].requires_grad_()
    own = more["identity"]["identity_N"]
    plan = plan_sentences(**sentences, identity_N=own, mixed=True)
    at = plan.sentence_U
    floats = [t.requires_grad_() for t in tables.values()]
    arguments = (
        *floats, identity, gain, more["norm"]["bias_D"].requires_grad_(), 1e-5, plan.token_U, plan.kind_U, plan.slot_U,
        sentences["level_lo_N"][at], more["mix"]["level_hi_N"][at], more["mix"]["mix_N"][at], own[at],
        plan.genes, plan.names,
    )  # fmt: skip
    torch.library.opcheck(op.sentence_rows, arguments)
    rows = torch.randn(plan.kind_U.shape[0], 16, requires_grad=True)
    torch.library.opcheck(op.copy_rows, (rows, plan.row_S, plan.order_S, plan.start_U1, plan.most))
    summed = (rows.detach()[plan.row_S.long()], plan.order_S, plan.start_U1, plan.most)
    forward_only = ("test_schema", "test_faketensor")  # a backward has none of its own
    torch.library.opcheck(op.sum_equal_tokens, summed, test_utils=forward_only)
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in (rows, *arguments)]
    torch.library.opcheck(op.sentence_rows_grads, detached, test_utils=forward_only)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        op.sentence_rows(*arguments).sum().backward()
    assert counter.get_total_flops() == 2 * at.shape[0] * 16 * (3 + 5 + 5)
