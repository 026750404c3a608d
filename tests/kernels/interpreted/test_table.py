"""The Triton kernels over the sentence table, run by Triton's interpreter: see tests/kernels/test_interpreted.py."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs inside tests/kernels/test_interpreted.py", allow_module_level=True)

from comtip_kernels import level_cross_entropy, pair_scores, pool_weights, table_pool
from comtip_kernels.sentence_table import triton_op as op

F64 = torch.float64
SIZES = [(1, 1, 2, 3), (33, 19, 10, 20), (18, 5, 32, 40), (5, 3, 70, 24)]


def case(B: int, G: int, Q: int, D: int):
    g = torch.Generator().manual_seed(B + G)
    image, table, scores, prior = (torch.randn(*s, generator=g) for s in ((B, D), (G, Q, D), (G, Q), (G, Q)))
    image, table = (torch.nn.functional.normalize(t, dim=-1) for t in (image, table))
    levels = torch.randint(Q, (B, G), generator=g).to(torch.uint8)
    mask = torch.rand(B, G, generator=g) < 0.7
    if B > 1:
        mask[1] = False
    return image, table, scores, prior, levels, mask


def run(what: str, impl: str, inputs, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    *floats, levels, mask = inputs
    image, table, scores, prior = (t.detach().to(dtype).requires_grad_() for t in floats)
    scale = torch.tensor(10.0, dtype=F64 if dtype == F64 else torch.float32, requires_grad=True)
    if what == "pool":
        out = table_pool(table, scores, levels, mask, impl=impl)
    elif what == "level":
        out = level_cross_entropy(image, table, levels, mask, scale, prior, impl=impl)
    elif what == "level without prior":
        out = level_cross_entropy(image, table, levels, mask, scale, impl=impl)
    elif what == "pair":
        out = pair_scores(image, table, levels, impl=impl)
    else:
        weight = pool_weights(scores, levels, mask)
        pooled = table_pool(table, scores, levels, mask, impl=impl)
        out = pair_scores(
            pooled, table * 2, levels.flip(0), true_levels_BG=levels, projected_GQD=table, weight_BG=weight, impl=impl
        )
    probe = torch.linspace(-1, 1, max(1, out.numel()), dtype=out.dtype)[: out.numel()].view(out.shape)
    (out * probe if out.ndim else out).sum().backward()
    leaves = (image, table, scores, prior, scale)
    return [out.detach(), *(t.grad for t in leaves if t.grad is not None)]


@pytest.mark.parametrize("what", ["pool", "level", "level without prior", "pair", "pair in text"])
@pytest.mark.parametrize("size", SIZES)
def test_equals_fp64_truth(what: str, size: tuple[int, ...]):
    inputs = case(*size)
    for got, want in zip(run(what, "triton", inputs), run(what, "reference", inputs, F64), strict=True):
        # A spot with one measured gene has no text but that gene: what is left of it is 0, times 1 / 1e-3.
        atol = 5e-3 if what == "pair in text" else 1e-5
        torch.testing.assert_close(got.to(F64), want, rtol=2e-5, atol=atol)


@pytest.mark.parametrize("what", ["pool", "level", "pair"])
def test_bf16_is_no_worse_than_torch_in_bf16(what: str):
    inputs = tuple(t.to(torch.bfloat16) if t.is_floating_point() else t for t in case(33, 19, 10, 32))
    truth = run(what, "reference", inputs, F64)
    ours, theirs = (run(what, impl, inputs, torch.bfloat16) for impl in ("triton", "reference"))
    for a, b, t in zip(ours, theirs, truth, strict=True):
        assert float((a.to(F64) - t).norm()) <= 2 * float((b.to(F64) - t).norm()) + 1e-2 * float(t.norm())


@pytest.mark.parametrize("what", ["pool", "level", "pair"])
@pytest.mark.parametrize("size", [(0, 4, 3, 5), (4, 0, 3, 5)])
def test_empty(what: str, size: tuple[int, ...]):
    inputs = case(*size)
    for got, want in zip(run(what, "triton", inputs), run(what, "reference", inputs), strict=True):
        torch.testing.assert_close(got, want)


def test_strides_and_stride_0_gradients():
    image, table, _, prior, levels, mask = case(20, 6, 4, 24)
    want = run("level", "triton", (image, table, prior, prior, levels, mask))
    wide = torch.zeros(20, 48)
    wide[:, ::2] = image
    view = wide[:, ::2].detach().requires_grad_()
    turned = table.transpose(0, 2).contiguous().transpose(0, 2)
    loss = level_cross_entropy(
        view, turned, levels.T.contiguous().T, mask.T.contiguous().T, torch.tensor(10.0), prior, impl="triton"
    )
    loss.expand(4).sum().backward()
    torch.testing.assert_close(view.grad, 4 * want[1])
    view.grad = None
    pair_scores(view, turned, levels, impl="triton").sum().backward()
    again = image.clone().requires_grad_()
    pair_scores(again, table, levels, impl="reference").sum().backward()
    torch.testing.assert_close(view.grad, again.grad)


@pytest.mark.parametrize("what", ["pool", "level", "pair"])
def test_nothing_past_the_end_is_read_or_left_unwritten(what: str, monkeypatch: pytest.MonkeyPatch):
    """Outputs start as NaN, and the inputs lie inside memory full of NaN."""
    real = torch.empty
    inputs = case(19, 7, 5, 20)
    want = run(what, "reference", inputs)
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real(*a, **k).fill_(float("nan")))
    padded = []
    for t in inputs[:4]:
        big = torch.full([n + 9 for n in t.shape], float("nan"))
        view = big[tuple(slice(n) for n in t.shape)]
        view.copy_(t)
        padded.append(view)
    for a, b in zip(run(what, "triton", (*padded, *inputs[4:])), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ["pool", "level", "pair"])
def test_twice_the_same_bits(what: str):
    inputs = case(33, 9, 10, 24)
    assert all(torch.equal(a, b) for a, b in zip(run(what, "triton", inputs), run(what, "triton", inputs), strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_show(bad: float):
    image, table, scores, prior, levels, mask = case(6, 4, 3, 8)
    wrong, row = image.clone(), table.clone()
    wrong[0, 2] = bad
    row[1, :, 2] = bad
    assert not torch.isfinite(
        level_cross_entropy(wrong, table, levels, mask | True, torch.tensor(3.0), prior, impl="triton")
    )
    assert not torch.isfinite(table_pool(row, scores, levels, mask | True, impl="triton")).any(0)[2]
    scored = torch.isfinite(pair_scores(wrong, table, levels, impl="triton"))
    assert not scored[0].any()
    assert scored[1:].all()


def test_many_bf16_gradients_are_summed_in_fp32():
    """A row of the table takes a gradient from every spot: in bf16 the sum stops growing at 256 (Liger-Kernel 512, 830)."""
    table = torch.zeros(1, 2, 16, dtype=torch.bfloat16).requires_grad_()
    image, levels = torch.ones(700, 16, dtype=torch.bfloat16), torch.zeros(700, 1, dtype=torch.uint8)
    pair_scores(image, table, levels, impl="triton").sum().backward()
    assert table.grad[0, 0, 0] == 700


def test_opcheck_and_flops():
    image, table, _, prior, levels, mask = case(9, 5, 3, 8)
    image.requires_grad_()
    table.requires_grad_()
    weight = torch.rand(9, 5, requires_grad=True)
    scale = torch.tensor(5.0, requires_grad=True)
    torch.library.opcheck(op.sampled_dot, (image, table, levels, False))
    torch.library.opcheck(op.weighted_sum, (weight, table, levels, False))
    torch.library.opcheck(op.weighted_sum_transpose, (image, weight, levels, 3, False))
    arguments = (image, table, levels, mask.to(torch.uint8), scale, prior.requires_grad_(), False)
    torch.library.opcheck(op.level_loss, arguments)
    torch.library.opcheck(op.level_loss, (*arguments[:5], None, False))
    backward = (*(t.detach() for t in arguments[:-1]), torch.tensor(1.0), False)
    torch.library.opcheck(op.level_loss_grads, backward, test_utils=("test_schema", "test_faketensor"))
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        op.level_loss(*arguments).backward()
    # One product forward; backward two, each with the scores made again.
    assert counter.get_total_flops() == 5 * 2 * 9 * 15 * 8


def test_too_many_levels_are_refused():
    image, table, _, _, levels, _ = case(2, 1, 300, 4)
    with pytest.raises(ValueError, match="at most 256"):
        pair_scores(image, table, levels, impl="triton")
