"""Operations whose shapes do not depend on data: masked columns of InfoNCE, and plans from sizes that the host knows."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from comtip_kernels import (
    SentenceSizes,
    gene_sentence_embedding,
    infonce,
    plan_panel,
    plan_sentences,
)
from torch import Tensor

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
IMPLEMENTATIONS = (
    ["triton"] if INTERPRETING else ["reference", "cpu", pytest.param("triton", marks=pytest.mark.gpu, id="triton")]
)


def setting(impl: str) -> tuple[torch.device, torch.dtype, dict[str, float]]:
    """Return the device of an implementation, the widest dtype that it supports, and how close its results must be."""
    if impl != "triton":
        return torch.device("cpu"), torch.float64, {"rtol": 1e-12, "atol": 1e-12}
    return torch.device("cpu" if INTERPRETING else "cuda"), torch.float32, {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("negatives", ["all", "same_group", "other_group"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_masked_columns_equal_selected_ones(impl: str, negatives: str, weighted: bool, share: float):
    B, M, D = 9, 21, 8
    device, dtype, close = setting(impl)
    g = torch.Generator().manual_seed(int(share * 10))
    x, y = (torch.randn(n, D, generator=g, dtype=dtype).to(device).requires_grad_() for n in (B, M))
    use = (torch.rand(M - B, generator=g) < share).to(device)
    columns = torch.cat([torch.ones_like(use[:1]).expand(B), use])
    group, text = (torch.randint(n, (M,), generator=g).to(device) for n in (2, 12))
    weight = torch.rand(B, generator=g, dtype=dtype).to(device) if weighted else None
    if weight is not None:
        weight[::3] = 0
    scale = torch.tensor(20.0, dtype=dtype, device=device, requires_grad=True)

    def run(y: Tensor, group: Tensor, text: Tensor, **more: Tensor) -> list[Tensor]:
        ids = {"group_rows": group[:B], "group_columns": group, "class_rows": text[:B], "class_columns": text}
        loss = infonce(x, y, scale, negatives=negatives, weight_B=weight, impl=impl, **ids, **more)  # type: ignore[arg-type]
        return [loss, *torch.autograd.grad(loss, (x, y, scale))]

    masked = run(y, group, text, excluded_further=~use)
    own = y.detach()[columns].requires_grad_()
    selected = run(own, group[columns], text[columns])
    dy = masked[2]
    assert not dy[~columns].any()
    torch.testing.assert_close([*masked[:2], dy[columns], masked[3]], selected, **close)


# -- plans ----------------------------------------------------------------------------------------------------


def panel(G: int, Q: int, seed: int, first: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ids, lengths, levels, genes and identities of a slice of a panel's sentences, sorted by length."""
    g = torch.Generator().manual_seed(seed)
    longest = 7
    length = torch.randint(2, longest + 1, (G,), generator=g)
    ids = torch.randint(3, 12, (G, longest), generator=g)
    ids[:, 0] = 1
    identity = torch.arange(1, G + 1) * (torch.rand(G, generator=g) < 0.6)
    index = torch.arange(first, stop)
    gene = index // Q
    length_N, order = torch.sort(length[gene], stable=True)
    return ids[gene][order], length_N, (index % Q)[order], gene[order], identity[gene][order]


def sizes_of(ids: Tensor, length: Tensor, genes: int, Q: int, spare: int) -> SentenceSizes:
    inside = (torch.arange(ids.shape[1]) > 0) & (torch.arange(ids.shape[1]) < length[:, None] - 1)
    names = {(int(ids[n, t]), t) for n, t in np.argwhere(inside.numpy())}
    return SentenceSizes(int(length.sum()), genes, len(names) + spare, Q, 12)


@pytest.mark.parametrize(("G", "Q", "first", "stop"), [(1, 3, 0, 3), (13, 5, 0, 65), (13, 5, 17, 42), (6, 4, 23, 24)])
@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_plan_from_known_sizes_gives_the_same_embedding(G: int, Q: int, first: int, stop: int, spare: int, impl: str):
    device, dtype, close = setting(impl)
    drawn = panel(G, Q, G + first, first, stop)
    base = first // Q
    sizes = sizes_of(*drawn[:2], -(-stop // Q) - base, Q, spare)
    ids, length, level, gene, identity = (t.to(device) for t in drawn)
    plans = [
        plan_sentences(ids, length, level, identity_N=identity),
        plan_panel(ids, length, level, gene - base, sizes),
    ]
    g = torch.Generator().manual_seed(0)
    tables = [torch.randn(n, 6, generator=g, dtype=dtype).to(device).requires_grad_() for n in (12, 3, 7, Q, G + 1)]
    gain, bias = (torch.randn(6, generator=g, dtype=dtype).to(device).requires_grad_() for _ in range(2))
    upstream = torch.randn(int(length.sum()), 6, generator=g, dtype=dtype).to(device)
    found = []
    for plan in plans:
        token, kind, slot, levels, own = tables
        out = gene_sentence_embedding(
            ids,
            length,
            level,
            token,
            kind,
            slot,
            levels,
            identity_N=identity,
            identity_ID=own,
            gain_D=gain,
            bias_D=bias,
            plan=plan,
            impl=impl,
        )
        found.append([out, *torch.autograd.grad(out, (*tables, gain, bias), upstream)])
    torch.testing.assert_close(found[1], found[0], **close)
    plan, U = plans[1], plans[1].kind_U.shape[0]
    assert [sizes.genes + sizes.names + Q * 7, plan.genes, plan.names] == [U, sizes.genes, sizes.names]
    assert plan.start_U1[-1] == sizes.tokens
    assert int(plan.start_U1.diff().max()) <= plan.most
    assert (plan.kind_U.diff() >= 0).all()
    assert torch.equal(
        plan.row_S.long()[plan.order_S.long()],
        torch.repeat_interleave(torch.arange(U, device=device), plan.start_U1.diff()),
    )
