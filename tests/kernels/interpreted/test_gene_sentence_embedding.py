"""The embedding's Triton operators. Values and gradients are tested in ../test_gene_sentence_embedding.py."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs inside tests/kernels/test_interpreted.py", allow_module_level=True)

from comtip_kernels import copy_sentence_rows, gene_sentence_embedding, plan_sentences
from comtip_kernels.gene_sentence_embedding import triton_kernels
from comtip_kernels.gene_sentence_embedding import triton_op as op


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


@pytest.mark.parametrize("copies", [10, 130])
def test_sums_of_many_tokens_take_two_rounds(copies: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton_kernels, "PIECE", 16)
    sentences, tables, _ = case(5, 5, 8)
    sentences = {k: v.repeat_interleave(copies, 0) for k, v in sentences.items()}
    assert (plan_sentences(**sentences).most > 256) == (copies == 130)
    grads = []
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = {k: v.detach().to(dtype).requires_grad_() for k, v in tables.items()}
        out = gene_sentence_embedding(**sentences, **leaves, impl=impl)
        (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)).sum().backward()
        grads.append([leaf.grad.double() for leaf in leaves.values()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-4)


def test_opcheck_and_flops():
    sentences, tables, more = case(12, 5, 16)
    identity, gain = more["identity"]["identity_ID"].requires_grad_(), more["norm"]["gain_D"].requires_grad_()
    own = more["identity"]["identity_N"]
    plan = plan_sentences(**sentences, identity_N=own, mixed=True)
    at = plan.sentence_U
    floats = [t.requires_grad_() for t in tables.values()]
    arguments = (
        *floats,
        identity,
        gain,
        more["norm"]["bias_D"].requires_grad_(),
        1e-5,
        plan.token_U,
        plan.kind_U,
        plan.slot_U,
        sentences["level_lo_N"][at],
        more["mix"]["level_hi_N"][at],
        more["mix"]["mix_N"][at],
        own[at],
        plan.genes,
        plan.names,
    )
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


@pytest.mark.parametrize("width", [24, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_any_width_are_copied_and_their_gradients_summed(width: int, dtype: torch.dtype):
    sentences, _, _ = case(9, 5, 8)
    plan = plan_sentences(**sentences)
    g = torch.Generator().manual_seed(width)
    rows = torch.randn(plan.kind_U.shape[0], width, generator=g).to(dtype)
    weight = torch.randn(plan.row_S.shape[0], width, generator=g).to(dtype)
    found = []
    for impl in ("triton", "reference"):
        leaf = rows.clone().requires_grad_()
        out = copy_sentence_rows(leaf, plan, impl=impl)
        out.backward(weight)
        found.append((out, leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    exact = torch.zeros(rows.shape, dtype=torch.float64).index_add_(0, plan.row_S.long(), weight.double())
    torch.testing.assert_close(found[0][1].double(), exact, rtol=8e-3 if dtype == torch.bfloat16 else 1e-6, atol=1e-5)


def test_wide_rows_are_taken_fewer_at_once():
    for options in (triton_kernels.COPY, triton_kernels.SUM):
        for width in (16, 512, 1024, 2048, 4096, 16384):
            chosen = triton_kernels.rows_options(options, width)
            assert chosen["R"] == 1 or chosen["R"] * width <= triton_kernels.WIDEST
            assert chosen["R"] <= options["R"]
            assert chosen["BD"] == width
