"""The plan of equal tokens, and the options of the embedding. Values are tested in test_gene_sentence_embedding.py."""

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


def run(impl: str, inputs, kind: str, dtype: torch.dtype | None = None, **options: object) -> list[torch.Tensor]:
    sentences, tables, more = inputs
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


def test_the_plan_finds_equal_tokens_and_nothing_else():
    inputs = case(200, 9, 4)
    sentences = inputs[0]
    plan = plan_sentences(**sentences)
    out = gene_sentence_embedding(**sentences, **inputs[1], impl="reference")
    assert plan.row_S.shape[0] == int(sentences["length_N"].sum())
    rows = out[plan.order_S[plan.start_U1[:-1]]]
    torch.testing.assert_close(rows[plan.row_S], out, rtol=0, atol=0)
    # Random rows are all different, so there are no more rows than the plan says.
    assert torch.unique(out, dim=0).shape[0] == rows.shape[0] < plan.row_S.shape[0] / 3
    assert plan.most == int(torch.bincount(plan.row_S).max())
    with_plan = run("cpu", inputs, "norm", plan=plan)
    assert all(torch.equal(a, b) for a, b in zip(with_plan, run("cpu", inputs, "norm"), strict=True))


def test_identity_and_mix_keep_rows_apart():
    sentences, _, more = case(40, 5, 6)
    bare = plan_sentences(**sentences)
    own = plan_sentences(**sentences, identity_N=more["identity"]["identity_N"])
    mixed = plan_sentences(**sentences, mixed=True)
    names = int((bare.kind_U != 2).sum())
    assert int((own.kind_U == 0).sum()) > int((bare.kind_U == 0).sum()) == 1
    assert mixed.kind_U.shape[0] == names + 40


def test_sentence_start():
    assert sentence_start(torch.tensor([3, 2, 4])).tolist() == [0, 3, 5]


def test_options_by_half_are_refused():
    sentences, tables, more = case(3, 4, 5)
    with pytest.raises(ValueError, match="pass both"):
        gene_sentence_embedding(**sentences, **tables, level_hi_N=more["mix"]["level_hi_N"])
    with pytest.raises(ValueError, match="without identity_N"):
        gene_sentence_embedding(**sentences, **tables, identity_ID=more["identity"]["identity_ID"])
