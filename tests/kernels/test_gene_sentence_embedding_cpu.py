"""The embedding on the CPU: the reference's values and gradients, each different row made once."""

import pytest
import torch
from comtip_kernels import gene_sentence_embedding, plan_sentences, sentence_start

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
@pytest.mark.parametrize("size", [(1, 2, 3), (30, 9, 7), (200, 17, 32)])
def test_equals_the_reference(kind: str, size: tuple[int, ...]):
    made = case(*size, dtype=F64)
    for got, want in zip(run("cpu", made, kind), run("reference", made, kind), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


def test_no_sentences():
    made = case(3, 4, 5)
    empty = ({k: v[:0] for k, v in made[0].items()}, made[1], {"norm": made[2]["norm"]})
    for got, want in zip(run("cpu", empty, "norm"), run("reference", empty, "norm"), strict=True):
        torch.testing.assert_close(got, want)


def test_the_plan_finds_equal_tokens_and_nothing_else():
    made = case(200, 9, 4)
    sentences = made[0]
    plan = plan_sentences(**sentences)
    out = gene_sentence_embedding(**sentences, **made[1], impl="reference")
    assert plan.row_S.shape[0] == int(sentences["length_N"].sum())
    rows = out[plan.order_S[plan.start_U1[:-1]]]
    torch.testing.assert_close(rows[plan.row_S], out, rtol=0, atol=0)
    # Random rows are all different, so there are no more rows than the plan says.
    assert torch.unique(out, dim=0).shape[0] == rows.shape[0] < plan.row_S.shape[0] / 3
    assert plan.most == int(torch.bincount(plan.row_S).max())
    with_plan = run("cpu", made, "norm", plan=plan)
    assert all(torch.equal(a, b) for a, b in zip(with_plan, run("cpu", made, "norm"), strict=True))


def test_identity_and_mix_keep_rows_apart():
    sentences, _, more = case(40, 5, 6)
    bare = plan_sentences(**sentences)
    own = plan_sentences(**sentences, identity_N=more["identity"]["identity_N"])
    mixed = plan_sentences(**sentences, mixed=True)
    names = int((bare.kind_U != 2).sum())
    assert int((own.kind_U == 0).sum()) > int((bare.kind_U == 0).sum()) == 1
    assert mixed.kind_U.shape[0] == names + 40


def test_twice_the_same_bits_and_stride_0_gradients():
    made = case(300, 9, 16)
    one, two = (run("cpu", made, "mix identity norm") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    sentences, tables, _ = made
    grads = []
    for impl in ("cpu", "reference"):
        token = tables["token_VD"].clone().requires_grad_()
        gene_sentence_embedding(**sentences, **(tables | {"token_VD": token}), impl=impl).sum().backward()
        grads.append(token.grad)
    torch.testing.assert_close(*grads)


def test_sentence_start():
    assert sentence_start(torch.tensor([3, 2, 4])).tolist() == [0, 3, 5]


def test_options_by_half_are_refused():
    sentences, tables, more = case(3, 4, 5)
    with pytest.raises(ValueError, match="pass both"):
        gene_sentence_embedding(**sentences, **tables, level_hi_N=more["mix"]["level_hi_N"])
    with pytest.raises(ValueError, match="needs identity_N"):
        gene_sentence_embedding(**sentences, **tables, identity_ID=more["identity"]["identity_ID"])
