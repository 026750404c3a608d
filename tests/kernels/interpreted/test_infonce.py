"""InfoNCE's Triton kernels, run by Triton's interpreter (TRITON_INTERPRET=1): see tests/kernels/test_interpreted.py."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs inside tests/kernels/test_interpreted.py", allow_module_level=True)

from comtip_kernels import infonce
from comtip_kernels.infonce.triton_op import infonce_grads, infonce_lse

F64 = torch.float64
FORWARD_ONLY = ("test_schema", "test_faketensor")
"""For operators that are a backward: they have none of their own."""


def tensors(B: int, M: int, D: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(B * 31 + M)
    return torch.randn(B, D, generator=g).to(dtype), torch.randn(M, D, generator=g).to(dtype)


def run(impl: str, x: torch.Tensor, y: torch.Tensor, scale: float, dtype: torch.dtype, **options: object):
    x, y = x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()
    s = torch.tensor(scale, dtype=F64 if dtype == F64 else torch.float32, requires_grad=True)
    loss = infonce(x, y, s, impl=impl, **options)
    loss.backward()
    return loss.detach(), x.grad, y.grad, s.grad


def options_of(kind: str, B: int, M: int) -> dict[str, object]:
    g = torch.Generator().manual_seed(9)
    group = torch.randint(3, (M,), generator=g)
    classes = torch.cat([torch.randint(B // 2 + 1, (B,), generator=g), torch.randint(B, (M - B,), generator=g)])
    weight = torch.rand(B, generator=g) + 0.1
    weight[1::3] = 0
    groups = {"group_rows": group[:B], "group_columns": group}
    return {
        "plain": {},
        "same": {"negatives": "same_group", **groups},
        "other": {"negatives": "other_group", **groups},
        "all": {
            "negatives": "same_group",
            **groups,
            "class_rows": classes[:B],
            "class_columns": classes,
            "weight_B": weight,
        },
    }[kind]


@pytest.mark.parametrize("kind", ["plain", "same", "other", "all"])
@pytest.mark.parametrize(("B", "M", "D"), [(1, 1, 4), (33, 33, 20), (40, 71, 48)])
def test_equals_fp64_truth(kind: str, B: int, M: int, D: int):
    x, y = tensors(B, M, D)
    truth = run("reference", x, y, 9.0, F64, **options_of(kind, B, M))
    for got, want in zip(run("triton", x, y, 9.0, torch.float32, **options_of(kind, B, M)), truth, strict=True):
        torch.testing.assert_close(got.to(F64), want, rtol=2e-5, atol=2e-6)


def test_bf16_is_no_worse_than_torch_in_bf16():
    x, y = tensors(33, 40, 32, torch.bfloat16)
    truth = run("reference", x, y, 9.0, F64)
    ours, theirs = run("triton", x, y, 9.0, torch.bfloat16), run("reference", x, y, 9.0, torch.bfloat16)
    for a, b, t in zip(ours, theirs, truth, strict=True):
        assert float((a.to(F64) - t).norm()) <= 2 * float((b.to(F64) - t).norm()) + 2e-2 * float(t.norm())


@pytest.mark.parametrize("kind", ["opposite", "half opposite", "identical"])
def test_underflow_gets_its_exact_pass(kind: str):
    x, _ = tensors(40, 40, 16)
    x = x[:1].expand(40, -1).clone()
    y = {"opposite": -x, "identical": x, "half opposite": x * torch.tensor([1.0, -1.0]).repeat(20)[:, None]}[kind]
    truth = run("reference", x, y, 100.0, F64)
    got = run("triton", x, y, 100.0, torch.float32)
    assert abs(float(got[0]) - float(truth[0])) < 2e-5 * max(1.0, abs(float(truth[0]))) * 10
    for a, b in zip(got[1:], truth[1:], strict=True):
        assert torch.isfinite(a).all()
        assert float((a.to(F64) - b).norm()) <= 1e-3 * max(1.0, float(b.norm()))


@pytest.mark.parametrize("kind", ["plain", "opposite", "half opposite", "identical"])
@pytest.mark.parametrize("D", [32, 512])
def test_lse_is_within_2e_5_of_fp64_at_scale_100(kind: str, D: int):
    x, y = tensors(40, 40, D)
    if kind != "plain":
        x = x[:1].expand(40, -1).clone()
        y = {"opposite": -x, "identical": x, "half opposite": x * torch.tensor([1.0, -1.0]).repeat(20)[:, None]}[kind]
    x, y = (torch.nn.functional.normalize(t, dim=-1) for t in (x, y))
    got = infonce_lse(x, y, torch.tensor(100.0), 0, None, None, None, None, None, False)[:2]
    logits = 100.0 * (x.double() @ y.double().T)
    for lse, want in zip(got, (logits.logsumexp(1), logits.logsumexp(0)), strict=True):
        assert float((lse.double() - want).abs().max()) < 2e-5


def test_a_further_text_like_its_image_beside_sums_that_underflowed():
    """It has no softmax of its own: exp(100) times a weight of 0 must be 0, not NaN."""
    x, _ = tensors(1, 1, 8)
    x, y = x.expand(4, -1).clone(), torch.cat([-x.expand(4, -1), x.expand(2, -1)])
    (loss, _, dy, _), want = (
        run("triton", x, y.clone(), 100.0, torch.float32),
        run("reference", x, y.clone(), 100.0, F64),
    )
    torch.testing.assert_close(loss.to(F64), want[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(dy.to(F64), want[2], rtol=0, atol=1e-5)


def test_nobody_in_the_batch():
    """An all-ignored batch must cost 0, not NaN (trl 6859)."""
    x, y = tensors(4, 6, 3)
    for weight, rows in ((torch.zeros(4), 4), (None, 0)):
        got = run("triton", x[:rows], y, 5.0, torch.float32, weight_B=weight)
        assert all(float(t.abs().sum()) == 0 for t in got)


def test_many_bf16_gradients_are_summed_in_fp32():
    """Hundreds of rows pull one text the same way; in bf16 their sum would stop growing (Liger-Kernel 512, 830)."""
    x, y = tensors(1, 1, 16)
    x, y = x.expand(300, -1), torch.cat([y.expand(300, -1), -y])
    truth = run("reference", x, y, 1.0, F64)
    got = run("triton", x, y, 1.0, torch.bfloat16)
    torch.testing.assert_close(got[2][-1].to(F64), truth[2][-1], rtol=2e-2, atol=1e-6)


def test_what_is_saved_grows_with_b_and_not_with_b_squared():
    """A loss that keeps its chunks keeps them all (open_clip 942, 1214)."""
    sizes = {}
    for B in (32, 128):
        x, y = (t.requires_grad_() for t in tensors(B, B, 8))
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: (s.append(t.numel()), t)[1], lambda t: t):
            infonce(x, y, torch.tensor(5.0), impl="triton")
        sizes[B] = sum(saved)
    assert sizes[128] < 4.2 * sizes[32]


def test_strides_and_stride_0_gradients():
    x, y = tensors(20, 30, 24)
    want = run("triton", x, y, 5.0, torch.float32)
    wide = torch.zeros(20, 48)
    wide[:, ::2] = x
    view = wide[:, ::2].detach().requires_grad_()
    loss = infonce(view, y.T.contiguous().T, torch.tensor(5.0), impl="triton")
    loss.expand(2).sum().backward()
    torch.testing.assert_close(view.grad, 2 * want[1])


def test_nothing_past_the_end_is_read_or_left_unwritten(monkeypatch: pytest.MonkeyPatch):
    """Outputs start as NaN, and the inputs lie inside memory full of NaN (a batch that no tile divides)."""
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real(*a, **k).fill_(float("nan")))
    x, y = tensors(35, 37, 20)
    padded = [torch.full((n + 40, 28), float("nan")) for n in (35, 37)]
    for big, small in zip(padded, (x, y), strict=True):
        big[: small.shape[0], :20] = small
    got = run("triton", padded[0][:35, :20], padded[1][:37, :20], 9.0, torch.float32)
    for a, b in zip(got, run("reference", x, y, 9.0, torch.float32), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_twice_the_same_bits_and_nan_shows():
    x, y = tensors(20, 20, 8)
    one, two = (run("triton", x, y, 20.0, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    for bad in (float("nan"), float("inf")):
        z = x.detach().clone()
        z[3, 2] = bad
        assert not torch.isfinite(infonce(z, y, torch.tensor(5.0), impl="triton"))


def test_classes_that_differ_in_their_upper_half_only_are_different_texts():
    x, y = tensors(6, 6, 16)
    classes = torch.tensor([7, 7 + 2**32, 7 - 2**40, 7, -1, 2**32 - 1])
    truth = run("reference", x, y, 9.0, F64, class_rows=classes, class_columns=classes)
    for got, want in zip(
        run("triton", x, y, 9.0, torch.float32, class_rows=classes, class_columns=classes), truth, strict=True
    ):
        torch.testing.assert_close(got.to(F64), want, rtol=2e-5, atol=2e-6)


def test_opcheck_and_flops():
    x, y = (torch.nn.functional.normalize(t, dim=-1).requires_grad_() for t in tensors(9, 12, 8))
    ids = torch.zeros(12, dtype=torch.int32)
    arguments = (x, y, torch.tensor(5.0, requires_grad=True), 1, ids[:9].clone(), ids, None, None, None, False)
    torch.library.opcheck(infonce_lse, arguments)
    half, low = torch.full((9,), 0.5), torch.zeros(9)
    more = (half, half, low, low, *arguments[3:])
    torch.library.opcheck(infonce_grads, (x.detach(), y.detach(), torch.tensor(5.0), *more), test_utils=FORWARD_ONLY)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        sum(infonce_lse(*arguments)).sum().backward()
    # 1 u forward, 4 u backward.
    assert counter.get_total_flops() == 5 * 2 * 9 * 12 * 8
