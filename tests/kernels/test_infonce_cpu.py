"""InfoNCE's CPU path: kept tiles, autocast and second-order checks. Values and gradients are tested in test_infonce.py."""

import pytest
import torch
from comtip_kernels import infonce
from comtip_kernels.infonce import cpu

F64 = torch.float64


def case(B: int, M: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(B, D, generator=g, dtype=F64), torch.randn(M, D, generator=g, dtype=F64)


def masks(B: int, M: int) -> dict[str, object]:
    g = torch.Generator().manual_seed(9)
    group, classes = torch.randint(3, (M,), generator=g), torch.randint(M, (M,), generator=g)
    weight = torch.rand(B, generator=g, dtype=F64)
    weight[::3] = 0
    groups = {"negatives": "same_group", "group_rows": group[:B], "group_columns": group}
    return groups | {"class_rows": classes[:B], "class_columns": classes, "weight_B": weight}


@pytest.mark.parametrize("masked", [False, True])
def test_kept_tiles_change_no_bit_and_serve_twice(masked: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "TILE", 16)
    x, y = (v.requires_grad_() for v in case(33, 70, 8))
    results = []
    for kept in (0, 3 * 16 * 16 * 8, 1 << 20):
        monkeypatch.setattr(cpu, "KEPT_BYTES", kept)
        x.grad = y.grad = None
        options = masks(33, 70) if masked else {}
        loss = infonce(x, y, torch.tensor(9.0, dtype=F64), impl="cpu", **options)
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
    everything = cpu.Masks("all", None, None, None, None)
    exponentials = cpu.Exponentials(x, y, 1.0, everything, keep_bytes=3 * 16 * 16 * 8 + 7)
    cpu.sums(exponentials)
    assert len(exponentials.kept) == 3


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_vectors_are_processed_in_fp32(autocast: bool):
    x, y = (t.bfloat16() for t in case(65, 80, 32))
    leaves = [
        x.double().requires_grad_(),
        y.double().requires_grad_(),
        torch.tensor(100.0, dtype=F64, requires_grad=True),
    ]
    truth = infonce(*leaves, impl="reference")
    truth.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        xs, ys = x.clone().requires_grad_(), y.clone().requires_grad_()
        scale = torch.tensor(100.0, requires_grad=True)
        loss = infonce(xs, ys, scale, impl="cpu")
    loss.backward()
    assert loss.dtype == torch.float32
    assert xs.grad.dtype == torch.bfloat16
    assert abs(float(loss.detach()) - float(truth.detach())) < 2e-5 * float(truth.detach())
    for got, leaf in zip((xs.grad, ys.grad, scale.grad), leaves, strict=True):
        assert float((got.double() - leaf.grad).norm() / leaf.grad.norm()) < 2**-8  # bf16's own step


def test_gradcheck():
    x, y = (v.requires_grad_() for v in case(5, 8, 4))
    scale = torch.tensor(3.0, dtype=F64, requires_grad=True)
    options = masks(5, 8)
    assert torch.autograd.gradcheck(lambda a, b, s: infonce(a, b, s, impl="cpu", **options), (x, y, scale))


def test_the_reference_accepts_a_batch_without_weight_or_pairs():
    x, y = case(4, 6, 3)
    for weight, rows in ((torch.zeros(4, dtype=F64), 4), (None, 0)):
        leaf = x[:rows].clone().requires_grad_()
        loss = infonce(leaf, y, torch.tensor(5.0, dtype=F64), weight_B=weight, impl="reference")
        loss.backward()
        assert float(loss.detach()) == 0
        assert not leaf.grad.any()


def test_mixed_dtypes_are_promoted():
    x, y = case(6, 8, 5)
    scale = torch.tensor(5.0, dtype=F64)
    want = infonce(x, y.float().double(), scale, impl="reference")
    for impl in ("cpu", "reference"):
        torch.testing.assert_close(infonce(x, y.float(), scale, impl=impl), want)
