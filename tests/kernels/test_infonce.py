"""InfoNCE against the reference in fp64: every implementation, mask, dtype and awkward input."""

import pytest
import torch
from comtip_kernels import infonce, unit_vectors
from comtip_kernels.infonce import allowed_pairs, cpu, unit
from torch.nn import functional as F

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
KINDS = ("plain", "same", "other", "class", "weight", "all")
HOSTILE = ("opposite", "half opposite", "identical", "rows opposite")


def vectors(B: int, M: int, D: int, dtype: torch.dtype = F64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(B * 31 + M)
    return torch.randn(B, D, generator=g, dtype=F64).to(dtype), torch.randn(M, D, generator=g, dtype=F64).to(dtype)


def hostile(kind: str, B: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors whose logits at scale 100 are all equal, all opposite or far apart, so that sums underflow."""
    x, y = vectors(B, B, D)
    if kind == "rows opposite":
        x[: B // 2] = -y[:1] * 3
        return x, y[:1] + 0.01 * y
    x = x[:1].expand(B, -1).clone()
    sign = torch.ones(B, 1, dtype=F64)
    if kind == "opposite":
        sign.neg_()
    if kind == "half opposite":
        sign[::2] = -1
    return x, x * sign


def options_of(kind: str, B: int, M: int) -> dict[str, object]:
    g = torch.Generator().manual_seed(9)
    group = torch.randint(3, (M,), generator=g)
    classes = torch.cat([torch.randint(B // 2 + 1, (B,), generator=g), torch.randint(B, (M - B,), generator=g)])
    weight = (torch.rand(B, generator=g, dtype=F64) * 2).round(decimals=1) + 0.1
    weight[1::3] = 0
    groups = {"group_rows": group[:B], "group_columns": group}
    ids = {"class_rows": classes[:B], "class_columns": classes}
    return {
        "plain": {},
        "same": {"negatives": "same_group", **groups},
        "other": {"negatives": "other_group", **groups},
        "class": ids,
        "weight": {"weight_B": weight},
        "all": {"negatives": "same_group", **groups, **ids, "weight_B": weight},
    }[kind]


def run(impl: str, x, y, scale: float, device: torch.device | None = None, **options: object) -> list[torch.Tensor]:
    """Return the loss and the gradients of x, y and the scale, on the CPU."""
    device = device or torch.device("cpu")
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    wide = F64 if F64 in (x.dtype, y.dtype) else F32
    leaves = [x.to(device), y.to(device), torch.tensor(scale, dtype=wide, device=device)]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    loss = infonce(*leaves, impl=impl, **options)
    loss.backward()
    return [t.detach().cpu() for t in (loss, *(leaf.grad for leaf in leaves))]


def dense_loss(x, y, scale, *, weight_B=None, **masks) -> torch.Tensor:
    """The reference's formula for vectors that are not normalised again."""
    B, M = x.shape[0], y.shape[0]
    weight = x.new_ones(B) if weight_B is None else weight_B.to(x.dtype)
    ok = allowed_pairs(B, M, **masks)
    excluded = weight == 0
    ok &= ~(excluded[:, None] | torch.cat([excluded, excluded.new_zeros(M - B)])[None])
    ok |= torch.eye(B, M, dtype=torch.bool)
    s = (scale * x @ y.T).masked_fill(~ok, -torch.inf)
    both = s.logsumexp(1) + s[:, :B].logsumexp(0) - 2 * s.diagonal()
    return (weight * both).sum() / (2 * weight.sum())


def truth_of_rounded(fast, x, y, scale: float, dtype: torch.dtype, **options: object) -> list[torch.Tensor]:
    """Return loss and gradients in fp64 of the unit vectors as the implementation rounds them."""
    leaves = [
        x.to(F64).requires_grad_(),
        y.to(F64).requires_grad_(),
        torch.tensor(scale, dtype=F64, requires_grad=True),
    ]
    wide = [t.to(fast.device, torch.promote_types(t.dtype, F32)) for t in (x, y)]
    rounded = [v.cpu().to(F64) for v in unit_vectors(*wide, dtype=dtype)]
    unit = [F.normalize(leaf, dim=-1) for leaf in leaves[:2]]
    loss = dense_loss(*(u + (r - u).detach() for u, r in zip(unit, rounded, strict=True)), leaves[2], **options)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in each direction on the CPU, of which some are kept and some recomputed."""
    monkeypatch.setattr(cpu, "KEPT_BYTES", 5 * 16 * 16 * 8)
    monkeypatch.setattr(cpu, "TILE", 16)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.to(F64) - want.to(F64)).norm() / want.to(F64).norm().clamp_min(1e-12))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("B", "M", "D"), [(1, 1, 3), (2, 5, 1), (33, 33, 20), (40, 71, 48)])
def test_equals_the_reference(fast, kind: str, B: int, M: int, D: int):
    x, y = vectors(B, M, D)
    options = options_of(kind, B, M)
    got = run(fast.impl, x.to(fast.dtype), y.to(fast.dtype), 9.0, fast.device, **options)
    for a, b in zip(got, run("reference", x, y, 9.0, **options), strict=True):
        torch.testing.assert_close(a.to(F64), b, rtol=fast.rtol, atol=fast.atol)


def test_more_rows_of_tiles_than_a_group(fast):
    """Ten rows of tiles in the interpreter: a group of eight, and one of two."""
    x, y = vectors(300, 310, 16)
    got = run(fast.impl, x.to(fast.dtype), y.to(fast.dtype), 9.0, fast.device)
    for a, b in zip(got, run("reference", x, y, 9.0), strict=True):
        torch.testing.assert_close(a.to(F64), b, rtol=fast.rtol, atol=fast.atol)


@pytest.mark.parametrize("kind", ["plain", "all"])
@pytest.mark.parametrize("D", [300, 600, 1024])
def test_every_slice_of_wide_vectors(fast, kind: str, D: int):
    x, y = vectors(19, 37, D)
    got = run(fast.impl, x.to(fast.dtype), y.to(fast.dtype), 9.0, fast.device, **options_of(kind, 19, 37))
    want = run("reference", x, y, 9.0, **options_of(kind, 19, 37))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.to(F64), b, rtol=fast.rtol, atol=2e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "pair", [(BF16, BF16), (F32, BF16), (BF16, F32)], ids=["bf16", "fp32 and bf16", "bf16 and fp32"]
)
def test_bf16_and_mixed_dtypes_with_every_mask(fast, kind: str, pair: tuple[torch.dtype, torch.dtype]):
    x, y = (v.to(dtype) for v, dtype in zip(vectors(35, 41, 24), pair, strict=True))
    options = options_of(kind, 35, 41)
    got = run(fast.impl, x, y, 20.0, fast.device, **options)
    want = truth_of_rounded(fast, x, y, 20.0, BF16, **options)
    assert got[0].dtype == F32
    assert [t.dtype for t in got[1:3]] == list(pair)
    assert abs(float(got[0]) - float(want[0])) < 2e-5
    for a, b in zip(got[1:], want[1:], strict=True):
        assert relative_error(a, b) < 2**-7  # bf16 rounds g, and the gradients of bf16 leaves


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_inputs_at_scale_100(fast, kind: str, dtype: torch.dtype):
    x, y = (v.to(dtype) for v in hostile(kind, 37, 16))
    got, want = run(fast.impl, x, y, 100.0, fast.device), truth_of_rounded(fast, x, y, 100.0, dtype)
    assert abs(float(got[0]) - float(want[0])) < 2e-5 * max(1.0, abs(float(want[0])))
    for a, b in zip(got[1:], want[1:], strict=True):
        assert torch.isfinite(a).all()
        tolerance = 1e-3 if dtype == F32 else 2**-7
        assert float((a.to(F64) - b).norm()) <= tolerance * max(1.0, float(b.norm()))


def test_hostile_inputs_in_fp64(fast):
    if fast.dtype != F64:
        pytest.skip("fp64 is not supported")
    for kind in HOSTILE:
        x, y = hostile(kind, 37, 16)
        for a, b in zip(run(fast.impl, x, y, 100.0), run("reference", x, y, 100.0), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["plain", *HOSTILE])
@pytest.mark.parametrize("D", [32, 512])
def test_lse_is_within_2e_5_of_fp64_at_scale_100(fast, kind: str, D: int):
    """Absolute, at values around 100, where one step of fp32 is 8e-6."""
    x, y = vectors(64, 64, D) if kind == "plain" else hostile(kind, 64, D)
    x, y = (F.normalize(v, dim=-1).float() for v in (x, y))
    if fast.triton:
        from comtip_kernels.infonce.triton_op import infonce_lse

        scale = torch.tensor(100.0, device=fast.device)
        got = infonce_lse(x.to(fast.device), y.to(fast.device), scale, 0, None, None, None, None, None, False)[:2]
    else:
        got = cpu.row_and_column_lse(cpu.Exponentials(x, y, 100.0, cpu.Masks("all", None, None, None, None)))
    logits = 100.0 * (x.double() @ y.double().T)
    for lse, want in zip(got, (logits.logsumexp(1), logits.logsumexp(0)), strict=True):
        assert float((lse.cpu().double() - want).abs().max()) < 2e-5


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_further_text_equal_to_its_image_among_sums_that_underflow(fast, weighted: bool, dtype: torch.dtype):
    """It has no softmax of its own: exp(100) times a weight of 0 must be 0 and not NaN."""
    x = vectors(1, 1, 8)[0].expand(4, -1)
    y = torch.cat([-x, x[:2]])
    options = {"weight_B": torch.tensor([1.0, 0.0, 2.0, 1.0], dtype=F64)} if weighted else {}
    x, y = x.to(dtype), y.to(dtype)
    got, want = (
        run(fast.impl, x, y, 100.0, fast.device, **options),
        truth_of_rounded(fast, x, y, 100.0, dtype, **options),
    )
    for a, b in zip(got[:3], want[:3], strict=True):
        torch.testing.assert_close(
            a.to(F64), b, rtol=1e-6 if dtype == F32 else 2**-7, atol=2e-5 if dtype == F32 else 0.05
        )


def test_a_batch_without_weight_or_without_pairs(fast):
    """A batch that is excluded as a whole costs 0 and not NaN (trl 6859)."""
    x, y = (v.to(fast.dtype) for v in vectors(4, 6, 3))
    for weight, rows in ((torch.zeros(4), 4), (None, 0)):
        got = run(fast.impl, x[:rows], y, 5.0, fast.device, weight_B=weight)
        assert all(float(t.abs().sum()) == 0 for t in got)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_strides_and_stride_0_gradients(fast, dtype: torch.dtype):
    x, y = (v.to(dtype) for v in vectors(20, 30, 24))
    want = run(fast.impl, x, y, 5.0, fast.device)
    wide = torch.zeros(20, 48, dtype=dtype, device=fast.device)
    wide[:, ::2] = x.to(fast.device)
    view = wide[:, ::2].detach().requires_grad_()
    turned = y.to(fast.device).T.contiguous().T
    loss = infonce(view, turned, fast.scalar(5.0, dtype), impl=fast.impl)
    loss.expand(2).sum().backward()
    torch.testing.assert_close(view.grad.cpu(), 2 * want[1])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_nothing_beyond_the_end_is_read_or_left_unwritten(fast, dtype: torch.dtype, nan_outputs: None):
    """Outputs start as NaN, and the inputs lie inside memory full of NaN (a batch that no tile divides)."""
    x, y = (v.to(dtype) for v in vectors(35, 37, 20))
    padded = [torch.full((n + 40, 28), float("nan"), dtype=dtype, device=fast.device) for n in (35, 37)]
    for big, small in zip(padded, (x, y), strict=True):
        big[: small.shape[0], :20] = small.to(fast.device)
    for options in ({}, options_of("all", 35, 37)):
        got = run(fast.impl, padded[0][:35, :20], padded[1][:37, :20], 9.0, fast.device, **options)
        for a, b in zip(got, run(fast.impl, x, y, 9.0, fast.device, **options), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_two_runs_are_equal_to_the_bit(fast, dtype: torch.dtype):
    x, y = (v.to(dtype) for v in vectors(50, 80, 24))
    one, two = (run(fast.impl, x, y, 20.0, fast.device, **options_of("all", 50, 80)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_nan_and_infinity_are_not_hidden(fast, bad: float, dtype: torch.dtype):
    x, y = (v.to(dtype).to(fast.device) for v in vectors(20, 20, 8))
    x[3, 2] = bad
    assert not torch.isfinite(infonce(x, y, fast.scalar(5.0, dtype), impl=fast.impl))


def test_what_is_saved_grows_with_b_and_not_with_b_squared(fast):
    """Chunks of logits must not be saved for the backward pass (open_clip 942, 1214)."""
    sizes = {}
    for B in (64, 256):
        x, y = (v.to(fast.device, F32).requires_grad_() for v in vectors(B, B, 8))
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: (s.append(t.numel()), t)[1], lambda t: t):
            infonce(x, y, fast.scalar(5.0, F32), impl=fast.impl)
        sizes[B] = sum(saved)
    assert sizes[256] < 4.2 * sizes[64]


def test_classes_that_differ_in_their_upper_half_only_are_different_texts(fast):
    x, y = vectors(6, 6, 16)
    classes = torch.tensor([7, 7 + 2**32, 7 - 2**40, 7, -1, 2**32 - 1])
    ids = {"class_rows": classes, "class_columns": classes}
    got = run(fast.impl, x.to(fast.dtype), y.to(fast.dtype), 9.0, fast.device, **ids)
    for a, b in zip(got, run("reference", x, y, 9.0, **ids), strict=True):
        torch.testing.assert_close(a.to(F64), b, rtol=fast.rtol, atol=fast.atol)


def test_many_bf16_gradients_are_summed_in_fp32(fast):
    """Hundreds of rows pull one text in one direction; in bf16 their sum would stop growing (Liger-Kernel 512, 830)."""
    x, y = vectors(1, 1, 16)
    x, y = x.expand(300, -1).to(BF16), torch.cat([y.expand(300, -1), -y]).to(BF16)
    want = truth_of_rounded(fast, x, y, 1.0, BF16)
    assert relative_error(run(fast.impl, x, y, 1.0, fast.device)[2][-1], want[2][-1]) < 2e-2


def test_fp64_and_fp16_are_refused_by_triton_only(fast):
    for dtype in (torch.float16, F64) if fast.triton else ():
        x, y = (v.to(fast.device, dtype) for v in vectors(4, 4, 8))
        with pytest.raises(ValueError, match=f"does not support {dtype}; cast the operands to torch.bfloat16"):
            infonce(x, y, torch.tensor(5.0), impl="triton")
        with pytest.raises(ValueError, match=f"does not support {dtype}"):
            infonce(x.float(), y, torch.tensor(5.0), impl="triton")
    x, y = (v.to(fast.device, torch.float16) for v in vectors(4, 4, 8))
    assert torch.isfinite(infonce(x, y, torch.tensor(5.0)))  # auto


def test_a_scale_on_the_cpu_is_moved(fast):
    x, y = (v.to(fast.device, F32) for v in vectors(6, 6, 8))
    scale = torch.tensor(5.0, requires_grad=True)
    infonce(x, y, scale, impl=fast.impl).backward()
    assert scale.grad.device.type == "cpu"


def test_vectors_that_the_kernels_do_not_take_are_not_rounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unit, "can_launch", lambda device: True)
    monkeypatch.setattr(unit, "product_mode", lambda dtype: "tf32")
    x, y = vectors(3, 4, 8)
    wide, rounded = unit_vectors(x, y.float(), dtype=F32)
    torch.testing.assert_close(wide, F.normalize(x, dim=-1), rtol=0, atol=0)
    assert (rounded != F.normalize(y.float(), dim=-1)).any()
