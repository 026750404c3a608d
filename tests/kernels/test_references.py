"""Each operation's reference against a formula written another way: plain loops, one number at a time, fp64."""

import math

import pytest
import torch
from comtip_kernels import (
    gene_sentence_embedding,
    infonce,
    level_cross_entropy,
    packed_attention,
    pair_scores,
    pool_weights,
    prefer,
    table_pool,
)

F64 = torch.float64


@pytest.fixture(autouse=True)
def the_reference():
    """Run the reference unless a test selects another implementation; on a CPU, ``auto`` selects the blocked path."""
    with prefer("reference"):
        yield


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def randn(rng: torch.Generator, *shape: int, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, generator=rng, dtype=F64).requires_grad_(grad)


def randint(rng: torch.Generator, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(high, shape, generator=rng)


# -- infonce ----------------------------------------------------------------------------------------------------


def slow_infonce(
    x, y, scale, *, group_r=None, group_c=None, rule="all", class_r=None, class_c=None, weight=None
) -> float:
    B, M = len(x), len(y)
    x = [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in x.tolist()]
    y = [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in y.tolist()]
    weight = [1.0] * B if weight is None else weight.tolist()

    def s(i: int, j: int) -> float:
        return scale * sum(a * b for a, b in zip(x[i], y[j], strict=True))

    def allowed(i: int, j: int) -> bool:
        if i == j:
            return True
        if weight[i] == 0 or (j < B and weight[j] == 0):
            return False
        if rule == "same_group" and group_r[i] != group_c[j]:
            return False
        if rule == "other_group" and group_r[i] == group_c[j]:
            return False
        return class_r is None or class_r[i] != class_c[j]

    total = 0.0
    for i in range(B):
        rows = math.log(sum(math.exp(s(i, j)) for j in range(M) if allowed(i, j)))
        columns = math.log(sum(math.exp(s(k, i)) for k in range(B) if allowed(k, i)))
        total += weight[i] * (rows - s(i, i) + columns - s(i, i)) / 2
    return total / sum(weight)


@pytest.mark.parametrize("rule", ["all", "same_group", "other_group"])
@pytest.mark.parametrize("further", [0, 3])
def test_infonce_matches_loops(rng, rule: str, further: int):
    B = 7
    x, y = randn(rng, B, 5), randn(rng, B + further, 5)
    group = torch.tensor([0, 0, 1, 1, 2, 0, 1])
    group_c = torch.cat([group, group[:further]])
    classes = torch.tensor([0, 1, 2, 3, 0, 4, 5])
    class_c = torch.cat([classes, torch.arange(10, 10 + further)])
    weight = torch.tensor([1, 1, 0, 2, 1, 0.5, 1], dtype=F64)
    got = infonce(
        x,
        y,
        torch.tensor(3.0, dtype=F64),
        negatives=rule,
        group_rows=group,
        group_columns=group_c,
        class_rows=classes,
        class_columns=class_c,
        weight_B=weight,
    )
    want = slow_infonce(
        x,
        y,
        3.0,
        rule=rule,
        group_r=group.tolist(),
        group_c=group_c.tolist(),
        class_r=classes.tolist(),
        class_c=class_c.tolist(),
        weight=weight,
    )
    assert float(got) == pytest.approx(want, rel=1e-12)


def test_infonce_gradients(rng):
    x, y, scale = (
        randn(rng, 4, 3, grad=True),
        randn(rng, 6, 3, grad=True),
        torch.tensor(2.0, dtype=F64, requires_grad=True),
    )
    group = torch.tensor([0, 0, 1, 1])

    def loss(x, y, scale):
        return infonce(
            x, y, scale, negatives="same_group", group_rows=group, group_columns=torch.tensor([0, 0, 1, 1, 0, 1])
        )

    assert torch.autograd.gradcheck(loss, (x, y, scale))


def test_infonce_knows_its_limits(rng):
    x = randn(rng, 5, 4)
    one = torch.tensor(1.0, dtype=F64)
    # Perfect alignment at a high temperature costs nothing; no information costs log(B).
    eye = torch.eye(5, dtype=F64)
    assert float(infonce(eye, eye, one * 100)) < 1e-12
    assert float(infonce(x[:1].expand(5, -1), x, one * 0)) == pytest.approx(math.log(5))
    # A spot of weight 0 changes nothing, whatever its vectors are.
    weight = torch.tensor([1, 1, 1, 1, 0], dtype=F64)
    y = randn(rng, 5, 4)
    assert float(infonce(x, y, one, weight_B=weight)) == pytest.approx(float(infonce(x[:4], y[:4], one)))
    with pytest.raises(ValueError, match="4 text columns for 5 images"):
        infonce(x, y[:4], one)
    with pytest.raises(ValueError, match="negatives='some'"):
        infonce(x, y, one, negatives="some")
    with pytest.raises(ValueError, match="needs group ids"):
        infonce(x, y, one, negatives="same_group")
    with pytest.raises(ValueError, match="impl='triton' cannot run on cpu"):
        infonce(x, y, one, impl="triton")


# -- gene sentences ---------------------------------------------------------------------------------------------


def test_gene_sentence_embedding_matches_loops(rng):
    N, T, D, V, Q = 5, 6, 4, 11, 3
    token, kind, position, level = (randn(rng, n, D) for n in (V, 3, T, Q))
    ids, length = randint(rng, V, N, T), torch.tensor([2, 6, 3, 4, 5])
    lo, hi, mix = randint(rng, Q, N), randint(rng, Q, N), torch.rand(N, generator=rng, dtype=F64)
    tables = (ids, length, lo, token, kind, position, level)
    got = gene_sentence_embedding(*tables, level_hi_N=hi, mix_N=mix, impl="reference")
    want = []
    for n in range(N):
        for t in range(int(length[n])):
            if t == length[n] - 1:
                want.append((1 - mix[n]) * level[lo[n]] + mix[n] * level[hi[n]] + kind[2] + position[t])
            else:
                want.append(token[ids[n, t]] + kind[0 if t == 0 else 1] + position[t])
    torch.testing.assert_close(got, torch.stack(want), rtol=0, atol=1e-14)
    pure = gene_sentence_embedding(*tables, impl="reference")
    same = gene_sentence_embedding(*tables, level_hi_N=hi, mix_N=mix * 0, impl="reference")
    torch.testing.assert_close(pure, same, rtol=0, atol=0)


def test_gene_sentence_embedding_gradients(rng):
    ids, length, lo = randint(rng, 5, 3, 4), torch.tensor([2, 4, 3]), torch.tensor([0, 1, 1])
    own = torch.tensor([2, 0, 1])
    tables = tuple(randn(rng, n, 2, grad=True) for n in (5, 3, 4, 2, 3))
    norm = (randn(rng, 2, grad=True), randn(rng, 2, grad=True))

    def embed(token, kind, position, level, identity, gain, bias, impl):
        return gene_sentence_embedding(
            ids,
            length,
            lo,
            token,
            kind,
            position,
            level,
            identity_N=own,
            identity_ID=identity,
            gain_D=gain,
            bias_D=bias,
            eps=0.1,
            impl=impl,
        )

    for impl in ("reference", "cpu"):
        assert torch.autograd.gradcheck(lambda *t, impl=impl: embed(*t, impl=impl), (*tables, *norm))


def test_packed_attention_never_leaves_its_sentence(rng):
    H, E = 2, 3
    length = torch.tensor([1, 3, 6, 2])
    start = length.cumsum(0) - length
    q, k, v = (randn(rng, int(length.sum()), H, E) for _ in range(3))
    got = packed_attention(q, k, v, length, impl="reference")
    for first, size in zip(start.tolist(), length.tolist(), strict=True):
        for h in range(H):
            for t in range(first, first + size):
                scores = [float(q[t, h] @ k[j, h]) / math.sqrt(E) for j in range(first, first + size)]
                top = max(scores)
                weight = [math.exp(s - top) for s in scores]
                want = sum(w * v[first + j, h] for j, w in enumerate(weight)) / sum(weight)
                torch.testing.assert_close(got[t, h], want, rtol=1e-12, atol=1e-12)


# -- the sentence table -----------------------------------------------------------------------------------------


def table_case(rng, B: int = 5, G: int = 4, Q: int = 3, D: int = 6):
    levels = randint(rng, Q, B, G)
    mask = torch.rand(B, G, generator=rng) < 0.7
    mask[0], mask[1] = True, False
    return randn(rng, G, Q, D), randn(rng, G, Q), levels, mask


def slow_weights(scores, levels, mask, b: int) -> list[float]:
    G = scores.shape[0]
    raw = [math.exp(float(scores[g, levels[b, g]])) if mask[b, g] else 0.0 for g in range(G)]
    return [r / sum(raw) if sum(raw) else 0.0 for r in raw]


def test_table_pool_matches_loops(rng):
    table, scores, levels, mask = table_case(rng)
    got = table_pool(table, scores, levels, mask)
    for b in range(len(levels)):
        weight = slow_weights(scores, levels, mask, b)
        want = sum(w * table[g, levels[b, g]] for g, w in enumerate(weight))
        torch.testing.assert_close(got[b], want * torch.ones(6, dtype=F64), rtol=1e-12, atol=1e-14)
    assert (got[1] == 0).all()
    table.requires_grad_()
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda t, s: table_pool(t, s, levels, mask), (table, scores))


def test_pooling_does_not_know_order_or_padding_genes(rng):
    table, scores, levels, mask = table_case(rng, G=6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    want = table_pool(table, scores, levels, mask)
    torch.testing.assert_close(table_pool(table[order], scores[order], levels[:, order], mask[:, order]), want)
    more = torch.cat([mask, torch.zeros(5, 1, dtype=torch.bool)], 1)
    wide = table_pool(
        torch.cat([table, table[:1]]), torch.cat([scores, scores[:1]]), torch.cat([levels, levels[:, :1]], 1), more
    )
    torch.testing.assert_close(wide, want)


def test_level_cross_entropy_matches_loops(rng):
    table, prior, levels, mask = table_case(rng)
    image, scale = randn(rng, 5, 6), torch.tensor(2.5, dtype=F64)
    got = level_cross_entropy(image, table, levels, mask, scale, prior)
    total, count = 0.0, 0
    for b in range(5):
        for g in range(4):
            if mask[b, g]:
                s = [2.5 * float(image[b] @ table[g, q]) + float(prior[g, q]) for q in range(3)]
                total += math.log(sum(math.exp(v) for v in s)) - s[int(levels[b, g])]
                count += 1
    assert float(got) == pytest.approx(total / count, rel=1e-12)
    assert float(level_cross_entropy(image, table, levels, mask & False, scale)) == 0.0
    inputs = (image.requires_grad_(), table.requires_grad_(), scale.requires_grad_())
    assert torch.autograd.gradcheck(lambda i, t, s: level_cross_entropy(i, t, levels, mask, s, prior), inputs)


def test_pair_scores_take_the_gene_itself_out_of_the_text(rng):
    plain, scores, levels, mask = table_case(rng)
    form = randn(rng, 6, 6)
    judged = plain @ form
    claimed = randint(rng, 3, 5, 4)
    weight = pool_weights(scores, levels, mask)
    pooled = table_pool(plain, scores, levels, mask)
    got = pair_scores(pooled, judged, claimed, true_levels_BG=levels, projected_GQD=plain, weight_BG=weight)
    for b in (0, 2, 3, 4):
        p = slow_weights(scores, levels, mask, b)
        for g in range(4):
            rest = [k for k in range(4) if k != g]
            if sum(p[k] for k in rest) < 1e-3:
                continue
            context = sum(p[k] * plain[k, levels[b, k]] for k in rest) / sum(p[k] for k in rest)
            want = float(context @ judged[g, claimed[b, g]])
            assert float(got[b, g]) == pytest.approx(want, rel=1e-9, abs=1e-9)
    inputs = [t.detach().requires_grad_() for t in (plain, judged, weight)]
    assert torch.autograd.gradcheck(
        lambda p, j, w: pair_scores(
            table_pool(p, scores, levels, mask), j, claimed, true_levels_BG=levels, projected_GQD=p, weight_BG=w
        ),
        inputs,
    )
    image = randn(rng, 5, 6)
    assert float(pair_scores(image, judged, claimed)[2, 1]) == pytest.approx(float(image[2] @ judged[1, claimed[2, 1]]))
