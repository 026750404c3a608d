"""The CPU paths over the sentence table: the reference's values and gradients, repeatable, at any size."""

import pytest
import torch
from comtip_kernels import level_cross_entropy, pair_scores, pool_weights, table_pool
from comtip_kernels.level_cross_entropy import cpu

F64 = torch.float64


def case(B: int, G: int, Q: int, D: int, dtype: torch.dtype = F64):
    g = torch.Generator().manual_seed(B + G)
    image, table, scores, prior = (
        torch.randn(*s, generator=g, dtype=dtype) for s in ((B, D), (G, Q, D), (G, Q), (G, Q))
    )
    levels = torch.randint(Q, (B, G), generator=g).to(torch.uint8)
    mask = torch.rand(B, G, generator=g) < 0.7
    if B > 1:
        mask[1] = False
    return image, table, scores, prior, levels, mask


def run(op: str, impl: str, inputs) -> list[torch.Tensor]:
    image, table, scores, prior, levels, mask = inputs
    leaves = [t.detach().clone().requires_grad_() for t in (image, table, scores)]
    scale = torch.tensor(3.0, dtype=image.dtype, requires_grad=True)
    image, table, scores = leaves
    if op == "pool":
        out = table_pool(table, scores, levels, mask, impl=impl)
    elif op == "level":
        out = level_cross_entropy(image, table, levels, mask, scale, prior, impl=impl)
    elif op == "pair":
        out = pair_scores(image, table, levels, impl=impl)
    else:
        weight = pool_weights(scores, levels, mask)
        pooled = table_pool(table, scores, levels, mask, impl="reference")
        other = levels.flip(0)
        out = pair_scores(
            pooled, table * 2, other, true_levels_BG=levels, projected_GQD=table, weight_BG=weight, impl=impl
        )
    probe = torch.linspace(-1, 1, max(1, out.numel()), dtype=out.dtype)[: out.numel()].view(out.shape)
    (out * probe if out.ndim else out).sum().backward()
    return [out.detach(), *(t.grad for t in [*leaves, scale] if t.grad is not None)]


@pytest.mark.parametrize("op", ["pool", "level", "pair", "pair in text"])
@pytest.mark.parametrize("size", [(1, 1, 2, 3), (7, 5, 4, 6), (33, 19, 10, 17)])
def test_equals_the_reference(op: str, size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "BLOCK_BYTES", 4 * size[0] * size[2] * 8)  # several blocks, the last one ragged
    inputs = case(*size)
    for got, want in zip(run(op, "cpu", inputs), run(op, "reference", inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("op", ["pool", "level", "pair"])
def test_twice_the_same_bits(op: str):
    inputs = case(64, 40, 10, 32, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(run(op, "cpu", inputs), run(op, "cpu", inputs), strict=True))


@pytest.mark.parametrize("op", ["pool", "level", "pair"])
def test_empty_batches(op: str):
    inputs = case(0, 4, 3, 5)
    for got, want in zip(run(op, "cpu", inputs), run(op, "reference", inputs), strict=True):
        torch.testing.assert_close(got, want)


def test_gradcheck():
    image, table, scores, prior, levels, mask = case(5, 4, 3, 2)
    scale = torch.tensor(2.0, dtype=F64, requires_grad=True)
    leaves = [t.requires_grad_() for t in (image, table, prior)]
    assert torch.autograd.gradcheck(
        lambda i, t, p, s: level_cross_entropy(i, t, levels, mask, s, p, impl="cpu"), (*leaves, scale)
    )
    assert torch.autograd.gradcheck(lambda i, t: pair_scores(i, t, levels, impl="cpu"), leaves[:2])
    assert torch.autograd.gradcheck(
        lambda t, s: table_pool(t, s, levels, mask, impl="cpu"), (leaves[1], scores.requires_grad_())
    )


def test_strides_and_stride_0_gradients():
    image, table, _, prior, levels, mask = case(9, 6, 4, 8)
    want = run("level", "reference", (image, table, prior, prior, levels, mask))
    wide = torch.zeros(9, 16, dtype=F64)
    wide[:, ::2] = image
    view = wide[:, ::2].detach().requires_grad_()
    loss = level_cross_entropy(
        view,
        table.transpose(0, 1).contiguous().transpose(0, 1),
        levels,
        mask,
        torch.tensor(3.0, dtype=F64),
        prior,
        impl="cpu",
    )
    loss.expand(4).sum().backward()
    torch.testing.assert_close(view.grad, 4 * want[1])


def test_nothing_measured_costs_nothing():
    image, table, scores, prior, levels, mask = case(6, 4, 3, 5)
    image.requires_grad_()
    loss = level_cross_entropy(image, table, levels, mask & False, torch.tensor(2.0, dtype=F64), prior, impl="cpu")
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not image.grad.any()
    assert not table_pool(table, scores, levels, mask & False, impl="cpu").any()
