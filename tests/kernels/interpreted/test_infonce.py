"""InfoNCE's Triton kernels: operators, and rounding as tensor cores do it. Values are tested in ../test_infonce.py."""

import os

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs inside tests/kernels/test_interpreted.py", allow_module_level=True)

from comtip_kernels import infonce, unit_vectors
from comtip_kernels.infonce import triton_op
from comtip_kernels.infonce.triton_op import infonce_grads, infonce_lse
from comtip_kernels.infonce.unit import round_operand
from torch.nn import functional as F
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

F64 = torch.float64
FORWARD_ONLY = ("test_schema", "test_faketensor")
"""For operators that are a backward pass: they have no gradient of their own."""


def tensors(B: int, M: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(B * 31 + M)
    return torch.randn(B, D, generator=g), torch.randn(M, D, generator=g)


def toward_zero(x: np.ndarray) -> np.ndarray:
    """Round fp64 to fp32 by dropping bits, as the accumulator of a tensor core does."""
    return (x.view(np.uint64) & np.uint64(0xFFFFFFFFE0000000)).view(np.float64).astype(np.float32)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """Drop the bits of fp32 operands that tf32 does not have."""
    return (np.ascontiguousarray(x, dtype=np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as tensor cores compute them: operands truncated to tf32, groups of 16 terms added toward zero.

    Tiles are large, as the interpreter's time goes with their number.
    """

    def dot(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: object, _: int
    ) -> TensorHandle:
        parts = [(a.data, b.data)]
        if mode == "tf32":
            parts = [(to_tf32(a.data), to_tf32(b.data))]
        if mode == "tf32x3":
            (a_hi, a_lo), (b_hi, b_lo) = ((to_tf32(t.data), to_tf32(t.data - to_tf32(t.data))) for t in (a, b))
            parts = [(a_lo, b_hi), (a_hi, b_lo), (a_hi, b_hi)]
        out = d.data
        for left, right in parts:
            for k in range(0, left.shape[1], 16):
                terms = left[:, k : k + 16].astype(np.float64) @ right[k : k + 16].astype(np.float64)
                out = toward_zero(out + terms)
        return TensorHandle(out, d.dtype.scalar)

    mode = "bf16"

    def remember(dtype: torch.dtype) -> str:
        nonlocal mode
        mode = real(dtype)
        return mode

    real = triton_op.product_mode
    monkeypatch.setattr(triton_op, "product_mode", remember)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(triton_op, "SMALL", {"BM": 512, "BN": 512, "BK": 128})


def pairs_of_cosine(B: int, D: int, cosine: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return unit vectors whose positives have this cosine, and whose negatives are random."""
    x, noise = (F.normalize(v, dim=-1) for v in tensors(B, B, D))
    noise = F.normalize(noise - (noise * x).sum(-1, keepdim=True) * x, dim=-1)
    return x, cosine * x + (1 - cosine**2) ** 0.5 * noise


def exact_loss(x: torch.Tensor, y: torch.Tensor, scale: float) -> float:
    s = scale * x.to(F64) @ y.to(F64).T
    return float((s.logsumexp(1) + s.logsumexp(0) - 2 * s.diagonal()).mean() / 2)


SIZES = [
    *((1024, cosine) for cosine in (0.0, 0.5, 1.0)),
    *(pytest.param(4096, cosine, marks=pytest.mark.nightly) for cosine in (0.0, 0.5)),
    pytest.param(4096, 1.0, marks=pytest.mark.slow),
]
"""(B, cosine of the positives)."""


@pytest.mark.parametrize(("B", "cosine"), SIZES)
@pytest.mark.parametrize("image_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32 and bf16"])
def test_the_loss_has_no_bias(B: int, cosine: float, image_dtype: torch.dtype, tensor_cores: None):
    x, y = pairs_of_cosine(B, 512, cosine)
    x, y = x.to(image_dtype), y.bfloat16()
    loss = infonce(x, y, torch.tensor(100.0), impl="triton")
    assert abs(float(loss) - exact_loss(*unit_vectors(x, y, dtype=torch.bfloat16), 100.0)) < 2e-5


LARGE_FP32 = [pytest.param(4096, cosine, marks=pytest.mark.nightly) for cosine in (0.0, 0.5, 1.0)]


@pytest.mark.parametrize(("B", "cosine"), [*SIZES[:3], *LARGE_FP32])
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_the_loss_in_fp32_has_no_bias(precision: str, B: int, cosine: float, tensor_cores: None):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        x, y = pairs_of_cosine(B, 512, cosine)
        loss = infonce(x, y, torch.tensor(100.0), impl="triton")
        rounded = unit_vectors(x, y, dtype=torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(rounded[0], F.normalize(x, dim=-1)) == (precision == "highest")
    # Three products are three times as many additions toward zero.
    assert abs(float(loss) - exact_loss(*rounded, 100.0)) < (5e-5 if precision == "highest" else 2e-5)


def test_autocast_selects_bf16():
    x, y = tensors(20, 30, 16)
    y = y[:20]
    as_bf16 = exact_loss(*unit_vectors(x, y, dtype=torch.bfloat16), 20.0)
    plain = infonce(x, y, torch.tensor(20.0), impl="triton")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = infonce(x, y, torch.tensor(20.0), impl="triton")
    assert abs(float(loss) - as_bf16) < 1e-5 < abs(float(plain) - as_bf16)
    assert plain.dtype == loss.dtype == torch.float32


def test_rounding_passes_gradients_unchanged():
    x = torch.randn(5, 7, requires_grad=True)
    grad = torch.randn(5, 7)
    round_operand(x, torch.bfloat16).backward(grad)
    assert torch.equal(x.grad, grad)
    assert torch.equal(round_operand(x, torch.bfloat16), x.bfloat16().float())


def test_opcheck_and_flops():
    x, y = (F.normalize(t, dim=-1).requires_grad_() for t in tensors(9, 12, 8))
    ids = torch.zeros(12, dtype=torch.int32)
    arguments = (x, y, torch.tensor(5.0, requires_grad=True), 1, ids[:9].clone(), ids, None, None, None, False)
    torch.library.opcheck(infonce_lse, arguments)
    half, low = torch.full((9,), 0.5), torch.zeros(9)
    more = (half, half, low, low, *arguments[3:])
    torch.library.opcheck(infonce_grads, (x.detach(), y.detach(), torch.tensor(5.0), *more), test_utils=FORWARD_ONLY)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        sum(infonce_lse(*arguments)).sum().backward()
    # 1 u forward, 3 u backward.
    assert counter.get_total_flops() == 4 * 2 * 9 * 12 * 8
