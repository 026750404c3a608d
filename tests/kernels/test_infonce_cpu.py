"""The blocked CPU path: the reference's values and gradients, at any size, also where sums underflow."""

import itertools

import pytest
import torch
from comtip_kernels import infonce
from comtip_kernels.infonce import cpu

F64 = torch.float64


def case(B: int, M: int, D: int, *, seed: int = 0, dtype: torch.dtype = F64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, D, generator=g, dtype=dtype).requires_grad_() for n in (B, M))  # type: ignore[return-value]


def value_and_grads(impl: str, x: torch.Tensor, y: torch.Tensor, scale: float, **options: object):
    x, y = x.detach().clone().requires_grad_(), y.detach().clone().requires_grad_()
    s = torch.tensor(scale, dtype=x.dtype, requires_grad=True)
    loss = infonce(x, y, s, impl=impl, **options)
    loss.backward()
    return loss.detach(), x.grad, y.grad, s.grad


def options_of(kind: str, B: int, M: int) -> dict[str, object]:
    g = torch.Generator().manual_seed(9)
    group = torch.randint(3, (M,), generator=g)
    classes = torch.cat([torch.randint(B // 2 + 1, (B,), generator=g), torch.randint(B, (M - B,), generator=g)])
    weight = (torch.rand(B, generator=g, dtype=F64) * 2).round(decimals=1)
    weight[::3] = 0
    return {
        "plain": {},
        "same": {"negatives": "same_group", "group_rows": group[:B], "group_columns": group},
        "other": {"negatives": "other_group", "group_rows": group[:B], "group_columns": group},
        "class": {"class_rows": classes[:B], "class_columns": classes},
        "weight": {"weight_B": weight},
        "all": {"negatives": "same_group", "group_rows": group[:B], "group_columns": group, "class_rows": classes[:B],
                "class_columns": classes, "weight_B": weight},
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["plain", "same", "other", "class", "weight", "all"])
@pytest.mark.parametrize(("B", "M", "D"), [(1, 1, 3), (2, 5, 1), (17, 17, 8), (33, 70, 19)])
def test_equals_the_reference(kind: str, B: int, M: int, D: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "KEPT_BYTES", 5 * 16 * 16 * 8)  # some tiles are kept, some made again
    monkeypatch.setattr(cpu, "TILE", 16)  # several tiles each way, the last ones ragged
    x, y = case(B, M, D)
    options = options_of(kind, B, M)
    for got, want in zip(
        value_and_grads("cpu", x, y, 7.0, **options), value_and_grads("reference", x, y, 7.0, **options), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["plain", "all"])
def test_kept_tiles_change_no_bit_and_serve_again(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "TILE", 16)
    x, y = case(33, 70, 8)
    results = []
    for kept in (0, 3 * 16 * 16 * 8, 1 << 20):
        monkeypatch.setattr(cpu, "KEPT_BYTES", kept)
        x.grad = y.grad = None
        loss = infonce(x, y, torch.tensor(9.0, dtype=F64), impl="cpu", **options_of(kind, 33, 70))
        loss.backward(retain_graph=True)
        once = x.grad.clone()
        loss.backward()
        assert torch.equal(x.grad, 2 * once)
        results.append((loss.detach(), once, y.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_is_kept_has_a_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "TILE", 16)
    x, y = case(64, 64, 8)
    make = cpu.Exponentials(
        x.detach(), y.detach(), 1.0, cpu.Masks("all", None, None, None, None), keep_bytes=3 * 16 * 16 * 8 + 7
    )
    cpu.sums(make)
    assert len(make.kept) == 3


def hostile(kind: str, B: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = (t.detach() for t in case(B, B, D))
    if kind == "opposite":
        y = -x[:1].expand(B, -1) + 0 * y
        x = x[:1].expand(B, -1) + 0 * x
    if kind == "half opposite":
        x = x[:1].expand(B, -1).clone()
        y = x.clone()
        y[::2] *= -1
    if kind == "identical":
        x = x[:1].expand(B, -1).clone()
        y = x.clone()
    if kind == "rows opposite":
        x[: B // 2] = -y[:1] * 3
        y = y[:1] + 0.01 * y
    return x, y


@pytest.mark.parametrize(
    ("kind", "dtype"),
    list(itertools.product(["opposite", "half opposite", "identical", "rows opposite"], [torch.float32, F64])),
)
def test_hostile_inputs_at_scale_100_stay_exact(kind: str, dtype: torch.dtype):
    x, y = hostile(kind, 37, 16)
    truth = value_and_grads("reference", x, y, 100.0)
    got = value_and_grads("cpu", x.to(dtype), y.to(dtype), 100.0)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-9
    assert abs(float(got[0]) - float(truth[0])) < tolerance * max(1.0, abs(float(truth[0])))
    for a, b in zip(got[1:], truth[1:], strict=True):
        assert torch.isfinite(a).all()
        assert float((a.to(F64) - b).norm()) <= (1e-3 if dtype == torch.float32 else 1e-8) * max(1.0, float(b.norm()))


@pytest.mark.parametrize("kind", ["plain", "opposite", "half opposite", "identical", "rows opposite"])
@pytest.mark.parametrize("D", [32, 512])
def test_lse_is_within_2e_5_of_fp64_at_scale_100(kind: str, D: int):
    """Absolute, at numbers around 100, where one step of fp32 is 8e-6."""
    x, y = hostile(kind, 64, D) if kind != "plain" else tuple(t.detach() for t in case(64, 64, D))
    x, y = (torch.nn.functional.normalize(t, dim=-1).float() for t in (x, y))
    got = cpu.row_and_column_lse(cpu.Exponentials(x, y, 100.0, cpu.Masks("all", None, None, None, None)))
    logits = 100.0 * (x.double() @ y.double().T)
    for lse, want in zip(got, (logits.logsumexp(1), logits.logsumexp(0)), strict=True):
        assert float((lse.double() - want).abs().max()) < 2e-5


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_vectors_are_worked_on_in_fp32(autocast: bool):
    x, y = (t.detach().bfloat16() for t in case(65, 80, 32))
    truth = value_and_grads("reference", x.double(), y.double(), 100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        xs, ys = x.clone().requires_grad_(), y.clone().requires_grad_()
        scale = torch.tensor(100.0, requires_grad=True)
        loss = infonce(xs, ys, scale, impl="cpu")
    loss.backward()
    assert loss.dtype == torch.float32
    assert xs.grad.dtype == torch.bfloat16
    assert abs(float(loss.detach()) - float(truth[0])) < 2e-5 * float(truth[0])
    for got, want in zip((xs.grad, ys.grad, scale.grad), truth[1:], strict=True):
        assert float((got.double() - want.double()).norm() / want.double().norm()) < 2**-8  # bf16's own step


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_nobody_in_the_batch(impl: str):
    """No pair, or pairs that all have weight 0: a loss of 0 and gradients of 0, not NaN."""
    x, y = case(4, 6, 3)
    for weight, rows in ((torch.zeros(4, dtype=F64), 4), (None, 0)):
        got = value_and_grads(impl, x[:rows], y, 5.0, weight_B=weight)
        assert all(float(t.abs().sum()) == 0 for t in got)


def test_gradcheck():
    x, y = case(5, 8, 4)
    scale = torch.tensor(3.0, dtype=F64, requires_grad=True)
    options = options_of("all", 5, 8)
    assert torch.autograd.gradcheck(lambda a, b, s: infonce(a, b, s, impl="cpu", **options), (x, y, scale))


def test_strided_inputs_and_stride_0_gradients():
    x, y = case(12, 20, 16)
    wide = torch.randn(12, 32, dtype=F64)
    wide[:, ::2] = x.detach()
    a = value_and_grads("cpu", x, y, 5.0)
    view = wide[:, ::2].requires_grad_()
    loss = infonce(view, y.detach().T.contiguous().T, torch.tensor(5.0, dtype=F64), impl="cpu")
    torch.testing.assert_close(loss.detach(), a[0])
    loss.expand(3).sum().backward()
    torch.testing.assert_close(view.grad, 3 * a[1])


def test_twice_the_same_bits():
    x, y = case(50, 80, 24, dtype=torch.float32)
    one, two = (value_and_grads("cpu", x, y, 20.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_nan_and_inf_are_not_hidden():
    x, y = (t.detach() for t in case(6, 6, 4))
    for bad in (float("nan"), float("inf")):
        z = x.clone()
        z[2, 1] = bad
        assert not torch.isfinite(infonce(z, y, torch.tensor(5.0, dtype=F64), impl="cpu"))


def test_what_is_saved_grows_with_b_and_not_with_b_squared():
    sizes = {}
    for B in (64, 256):
        x, y = case(B, B, 8, dtype=torch.float32)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: (s.append(t.numel()), t)[1], lambda t: t):
            infonce(x, y, torch.tensor(5.0), impl="cpu")
        sizes[B] = sum(saved)
    assert sizes[256] < 4.2 * sizes[64]
