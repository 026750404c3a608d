"""The operations over the sentence table against the reference in fp64: every implementation, dtype and awkward input."""

import pytest
import torch
from comtip_kernels import level_cross_entropy, pair_scores, pool_weights, table_pool
from comtip_kernels.level_cross_entropy import cpu
from torch.nn import functional as F

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
OPS = ("pool", "level", "level without prior", "pair", "pair in text")
SIZES = [(1, 1, 2, 3), (7, 5, 4, 6), (33, 19, 10, 20), (18, 5, 32, 40), (5, 3, 70, 24)]


def case(B: int, G: int, Q: int, D: int, dtype: torch.dtype = F64):
    g = torch.Generator().manual_seed(B + G)
    image, table, scores, prior = (torch.randn(*s, generator=g, dtype=F64) for s in ((B, D), (G, Q, D), (G, Q), (G, Q)))
    image, table = (F.normalize(t, dim=-1) for t in (image, table))
    levels = torch.randint(Q, (B, G), generator=g).to(torch.uint8)
    mask = torch.rand(B, G, generator=g) < 0.7
    if B > 1:
        mask[1] = False
    return (*(t.to(dtype) for t in (image, table, scores, prior)), levels, mask)


def run(op: str, impl: str, inputs, device: torch.device | None = None) -> list[torch.Tensor]:
    """Return the output and the gradients of image, table, scores, prior and scale, on the CPU."""
    *floats, levels, mask = (t.to(device or torch.device("cpu")) for t in inputs)
    image, table, scores, prior = leaves = [t.detach().requires_grad_() for t in floats]
    scale = torch.tensor(10.0, dtype=F64 if image.dtype == F64 else F32, device=image.device, requires_grad=True)
    if op == "pool":
        out = table_pool(table, scores, levels, mask, impl=impl)
    elif op.startswith("level"):
        out = level_cross_entropy(image, table, levels, mask, scale, prior if op == "level" else None, impl=impl)
    elif op == "pair":
        out = pair_scores(image, table, levels, impl=impl)
    else:
        weight = pool_weights(scores, levels, mask)
        pooled = table_pool(table, scores, levels, mask, impl=impl)
        more = {"true_levels_BG": levels, "projected_GQD": table, "weight_BG": weight}
        out = pair_scores(pooled, table * 2, levels.flip(0), **more, impl=impl)
    probe = torch.linspace(-1, 1, max(1, out.numel()), dtype=out.dtype, device=out.device)[: out.numel()].view(
        out.shape
    )
    (out * probe if out.ndim else out).sum().backward()
    return [t.detach().cpu() for t in (out, *(leaf.grad for leaf in (*leaves, scale) if leaf.grad is not None))]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of genes on the CPU, the last one smaller."""
    monkeypatch.setattr(cpu, "BLOCK_BYTES", 4 * 33 * 10 * 8)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_reference(fast, op: str, size: tuple[int, ...]):
    got, want = run(op, fast.impl, case(*size, fast.dtype), fast.device), run(op, "reference", case(*size))
    for a, b in zip(got, want, strict=True):
        # A spot with one measured gene has no text but that gene: what remains is 0, times 1 / 1e-3.
        atol = 5e-3 if op == "pair in text" and fast.triton else fast.atol
        torch.testing.assert_close(a.to(F64), b, rtol=fast.rtol, atol=atol)


@pytest.mark.parametrize("op", ["pool", "pair"])
def test_a_panel_in_parts(fast, op: str):
    """Three parts of 72, 72 and 56 genes in the interpreter, because few spots make few programs."""
    size = (5, 200, 3, 16)
    got, want = run(op, fast.impl, case(*size, fast.dtype), fast.device), run(op, "reference", case(*size))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.to(F64), b, rtol=fast.rtol, atol=fast.atol)


@pytest.mark.parametrize("op", ["pool", "level", "pair"])
@pytest.mark.parametrize("D", [300, 600, 1024])
def test_every_slice_of_wide_vectors(fast, op: str, D: int):
    size = (18, 5, 4, D)
    got, want = run(op, fast.impl, case(*size, fast.dtype), fast.device), run(op, "reference", case(*size))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.to(F64), b, rtol=fast.rtol, atol=1e-6)


@pytest.mark.parametrize("op", ["pool", "level", "pair"])
@pytest.mark.parametrize(
    "pair", [(BF16, BF16), (F32, BF16), (BF16, F32)], ids=["bf16", "fp32 and bf16", "bf16 and fp32"]
)
@pytest.mark.parametrize("size", [(33, 19, 10, 32), (5, 3, 70, 300)])
def test_bf16_and_mixed_dtypes(fast, op: str, pair: tuple[torch.dtype, torch.dtype], size: tuple[int, ...]):
    """Image and table in these dtypes: values to fp32's rounding, gradients to that of bf16 operands."""
    image, table, scores, prior, levels, mask = case(*size)
    inputs = (image.to(pair[0]), table.to(pair[1]), scores.float(), prior.float(), levels, mask)
    got = run(op, fast.impl, inputs, fast.device)
    # Triton rounds both operands to bf16 if either is; the CPU path does not.
    dtype = BF16 if fast.triton and (op != "pool" or pair[1] == BF16) else F64
    exact = [t.to(dtype).to(F64) for t in inputs[:2]]
    want = run(op, "reference", (*exact, *(t.to(F64) for t in inputs[2:4]), levels, mask))
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        error = float((a.to(F64) - b).norm())
        exactly = op == "level" and i == 0 and fast.triton
        assert error <= (2e-6 if exactly else 2**-7) * max(1e-3, float(b.norm()))


@pytest.mark.parametrize("op", ["pool", "level", "pair"])
@pytest.mark.parametrize("size", [(0, 4, 3, 5), (4, 0, 3, 5)])
def test_empty(fast, op: str, size: tuple[int, ...]):
    if not fast.triton and size[1] == 0:
        pytest.skip("a panel without genes is refused earlier")
    inputs = case(*size, fast.dtype)
    for a, b in zip(run(op, fast.impl, inputs, fast.device), run(op, "reference", inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_strides_and_stride_0_gradients(fast, dtype: torch.dtype):
    image, table, _, prior, levels, mask = (t.to(fast.device) for t in case(20, 6, 4, 24, dtype))
    want = run("level", fast.impl, (image, table, prior, prior, levels, mask), fast.device)
    wide = torch.zeros(20, 48, dtype=dtype, device=fast.device)
    wide[:, ::2] = image
    view = wide[:, ::2].detach().requires_grad_()
    turned = table.transpose(0, 2).contiguous().transpose(0, 2)
    turned_levels, turned_mask = (t.T.contiguous().T for t in (levels, mask))
    scale = fast.scalar(10.0, dtype)
    loss = level_cross_entropy(view, turned, turned_levels, turned_mask, scale, prior, impl=fast.impl)
    loss.expand(4).sum().backward()
    torch.testing.assert_close(view.grad.cpu(), 4 * want[1], rtol=1e-5 if dtype == F32 else 2**-6, atol=1e-6)
    view.grad = None
    pair_scores(view, turned, levels, impl=fast.impl).sum().backward()
    again = image.clone().requires_grad_()
    pair_scores(again, table, levels, impl=fast.impl).sum().backward()
    torch.testing.assert_close(view.grad, again.grad)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("op", ["pool", "level", "pair"])
def test_nothing_beyond_the_end_is_read_or_left_unwritten(fast, op: str, dtype: torch.dtype, nan_outputs: None):
    """Outputs start as NaN, and the inputs lie inside memory full of NaN."""
    inputs = case(19, 7, 5, 20, dtype)
    padded = []
    for t in inputs[:4]:
        # On the device: a copy of a view there would leave out the memory around it.
        big = torch.full([n + 9 for n in t.shape], float("nan"), dtype=dtype, device=fast.device)
        view = big[tuple(slice(n) for n in t.shape)]
        view.copy_(t)
        padded.append(view)
    want = run(op, fast.impl, inputs, fast.device)
    for a, b in zip(run(op, fast.impl, (*padded, *inputs[4:]), fast.device), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("op", ["pool", "level", "pair"])
def test_two_runs_are_equal_to_the_bit(fast, op: str, dtype: torch.dtype):
    one, two = (run(op, fast.impl, case(33, 9, 10, 24, dtype), fast.device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_not_hidden(fast, bad: float):
    image, table, scores, prior, levels, mask = (t.to(fast.device) for t in case(6, 4, 3, 8, F32))
    wrong, row = image.clone(), table.clone()
    wrong[0, 2] = bad
    row[1, :, 2] = bad
    everywhere, scale = torch.ones_like(mask), fast.scalar(3.0, F32)
    assert not torch.isfinite(level_cross_entropy(wrong, table, levels, everywhere, scale, prior, impl=fast.impl))
    assert not torch.isfinite(table_pool(row, scores, levels, everywhere, impl=fast.impl)).any(0)[2]
    scored = torch.isfinite(pair_scores(wrong, table, levels, impl=fast.impl))
    assert not scored[0].any()
    assert scored[1:].all()


def test_many_bf16_gradients_are_summed_in_fp32(fast):
    """A row of the table has a gradient from every spot: in bf16 the sum stops growing at 256 (Liger-Kernel 512, 830)."""
    table = torch.zeros(1, 2, 16, dtype=BF16, device=fast.device).requires_grad_()
    image = torch.ones(700, 16, dtype=BF16, device=fast.device)
    levels = torch.zeros(700, 1, dtype=torch.uint8, device=fast.device)
    pair_scores(image, table, levels, impl=fast.impl).sum().backward()
    assert table.grad[0, 0, 0] == 700


def test_nothing_measured_costs_nothing(fast):
    image, table, scores, prior, levels, mask = (t.to(fast.device) for t in case(6, 4, 3, 5, fast.dtype))
    image.requires_grad_()
    nowhere = torch.zeros_like(mask)
    loss = level_cross_entropy(image, table, levels, nowhere, fast.scalar(2.0, fast.dtype), prior, impl=fast.impl)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not image.grad.any()
    assert not table_pool(table, scores, levels, nowhere, impl=fast.impl).any()


def test_fp16_and_fp64_are_refused_by_triton(fast):
    if not fast.triton:
        pytest.skip("the CPU path supports both")
    for dtype in (torch.float16, F64):
        image, table, scores, _, levels, mask = (t.to(fast.device) for t in case(6, 4, 3, 8, dtype))
        for call in (
            lambda i=image, t=table, v=levels: pair_scores(i, t, v, impl="triton"),
            lambda i=image, t=table, v=levels, m=mask: level_cross_entropy(
                i, t, v, m, fast.scalar(1.0, F32), impl="triton"
            ),
            lambda t=table, s=scores, v=levels, m=mask: table_pool(t, s, v, m, impl="triton"),
        ):
            with pytest.raises(ValueError, match=f"does not support {dtype}; cast the operands"):
                call()
