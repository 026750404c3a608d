"""Residual sum with LayerNorm and bias with GELU against plain PyTorch in fp64: values, gradients, dtypes and awkward input."""

import logging
from collections.abc import Callable

import pytest
import torch
from comtip_kernels import bias_gelu, dispatch, residual_norm
from torch import Tensor
from torch.nn import functional as F

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
EPS = 1e-3
DTYPES = {
    "fp32": (F32, F32, F32),
    "bf16 stream": (BF16, BF16, F32),
    "bf16 branch": (F32, BF16, F32),
    "fp32 branch": (BF16, F32, F32),
    "bf16 parameters": (F32, BF16, BF16),
}
"""{name: dtypes of stream, branch and parameters}; GELU has those of branch and parameters."""
SIZES = [(1, 1), (127, 33), (129, 48), (7, 768), (5, 1100)]
"""Rows and width: tails of a program's 128 rows, of a tile of 4 rows, and of slices of 512 columns."""
NORM, GELU = "residual_norm", "bias_gelu"


def case(op: str, N: int, d: int, dtypes: str = "fp32") -> list[Tensor]:
    """Return the operands; rows have means and scales of their own, so that statistics of another row would show."""
    g = torch.Generator().manual_seed(N + d)
    stream, branch, parameter = DTYPES[dtypes]

    def rows(dtype: torch.dtype) -> Tensor:
        return (
            torch.randn(N, d, generator=g) * (1 + torch.arange(N)[:, None] % 3) + torch.randn(N, 1, generator=g)
        ).to(dtype)

    vectors = [torch.randn(d, generator=g).to(parameter) for _ in range(3)]
    return [rows(stream), rows(branch), *vectors] if op == NORM else [rows(branch), vectors[0]]


def call(op: str, impl: str) -> Callable[..., tuple[Tensor, ...]]:
    if op == NORM:
        return lambda *t: residual_norm(*t, eps=EPS, impl=impl)
    return lambda *t: (bias_gelu(*t, impl=impl),)


def exact(op: str, stored: torch.dtype) -> Callable[..., tuple[Tensor, ...]]:
    """Return the operation in plain PyTorch; the norm is that of the sum as it is stored."""

    def norm(x: Tensor, branch: Tensor, branch_bias: Tensor, gain: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        stream = x + branch + branch_bias
        stream = stream + (stream.detach().float().to(stored).double() - stream.detach())
        return stream, F.layer_norm(stream, gain.shape, gain, bias, EPS)

    return norm if op == NORM else lambda x, bias: (F.gelu(x + bias),)


def probes(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return a gradient for each output."""
    g = torch.Generator().manual_seed(7)
    return [torch.randn(out.shape, generator=g).to(out.device, out.dtype) for out in outputs]


def results(function: Callable[..., tuple[Tensor, ...]], operands: list[Tensor], read: tuple[int, ...] = (0, 1)):
    """Return outputs and gradients on the CPU; only the outputs ``read`` have a gradient."""
    leaves = [t.detach().requires_grad_() for t in operands]
    outputs = function(*leaves)
    chosen = [i for i in read if i < len(outputs)]
    torch.autograd.backward([outputs[i] for i in chosen], [probes(outputs)[i] for i in chosen])
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return [t.detach().cpu() for t in (*outputs, *grads)]


def impl_of(fast) -> str:
    """Return the implementation; there is none for CPUs alone."""
    return "triton" if fast.triton else "reference"


def worst_row(got: Tensor, want: Tensor) -> float:
    got, want = (t.double().reshape(t.shape[0] if t.ndim > 1 else 1, -1) for t in (got, want))
    norms = want.norm(dim=1)
    return float(((got - want).norm(dim=1) / torch.maximum(norms, norms.mean()).clamp_min(0.1)).nan_to_num(9).max())


def check(fast, op: str, operands: list[Tensor], read: tuple[int, ...] = (0, 1)) -> list[Tensor]:
    """Compare outputs and gradients with fp64, row by row, and return them."""
    got = results(call(op, impl_of(fast)), [t.to(fast.device) for t in operands], read)
    want = results(exact(op, operands[0].dtype), [t.double() for t in operands], read)
    for index, (a, like) in enumerate(zip(got[-len(operands) :], operands, strict=True)):
        assert (a.dtype, a.shape) == (like.dtype, like.shape), index
    narrow = any(t.dtype == BF16 for t in operands)
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        # bf16 results are off by half a unit of 2^-8; gradients read probes that were rounded to the dtype of an output.
        assert not a.numel() or worst_row(a, b) <= (2**-6 if narrow else 3e-6), index
    return got


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("op", [NORM, GELU])
def test_equals_plain_pytorch_in_fp64(fast, op: str, size: tuple[int, int], dtypes: str, nan_outputs: None):
    check(fast, op, case(op, *size, dtypes))


@pytest.mark.parametrize("dtypes", ["fp32", "bf16 branch"])
@pytest.mark.parametrize("op", [NORM, GELU])
def test_many_rows_and_none(fast, op: str, dtypes: str, nan_outputs: None):
    """Three programs of the backward pass; without rows, gradients of parameters are 0."""
    check(fast, op, case(op, 300, 20, dtypes))
    got = check(fast, op, case(op, 0, 20, dtypes))
    assert all((t == 0).all() for t in got)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16 stream", "bf16 branch"])
@pytest.mark.parametrize("read", [(0,), (1,)], ids=["sum", "norm"])
def test_one_of_the_two_results_is_not_read(fast, read: tuple[int, ...], dtypes: str, nan_outputs: None):
    got = check(fast, NORM, case(NORM, 9, 33, dtypes), read)
    if read == (0,):
        assert (got[-2] == 0).all()
        assert (got[-1] == 0).all()


def test_dtypes_of_results(fast):
    """The norm has the dtype of the branch, which a product has computed, unless another is asked for."""
    for dtypes, (stream, branch, _) in DTYPES.items():
        operands = [t.to(fast.device) for t in case(NORM, 3, 8, dtypes)]
        assert [t.dtype for t in call(NORM, impl_of(fast))(*operands)] == [stream, branch]
        asked = residual_norm(*operands, dtype=F32, impl=impl_of(fast))
        assert [t.dtype for t in asked] == [stream, F32]
        (out,) = call(GELU, impl_of(fast))(*(t.to(fast.device) for t in case(GELU, 3, 8, dtypes)))
        assert out.dtype == branch


@pytest.mark.parametrize("op", [NORM, GELU])
def test_strides_of_operands_and_gradients(fast, op: str):
    """Transposed and sliced rows, rows and parameters that are one repeated, and transposed and stride-0 gradients."""
    operands = [t.to(fast.device) for t in case(op, 10, 33)]
    rows = [t for t in operands if t.ndim == 2]
    turned = [t.T.contiguous().T for t in rows]
    sliced = [torch.stack([t, t + 1], dim=1)[:, 0] for t in rows]
    once = [t[:1].expand(10, -1) for t in rows]
    vectors = [torch.stack([t, t + 1], dim=1)[:, 0] for t in operands if t.ndim == 1]
    want = results(call(op, impl_of(fast)), operands)
    for views in (turned, sliced):
        assert not any(t.is_contiguous() for t in (*views, *vectors))
        for a, b in zip(results(call(op, impl_of(fast)), [*views, *vectors]), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    both = (results(call(op, impl_of(fast)), [*t, *vectors]) for t in (once, [t.contiguous() for t in once]))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for grad in (torch.randn(33, 10, device=fast.device).T, torch.ones((), device=fast.device).expand(10, 33)):
        found = []
        for given in (grad, grad.contiguous()):
            leaves = [t.detach().requires_grad_() for t in operands]
            torch.autograd.backward(call(op, impl_of(fast))(*leaves), [given] * (2 if op == NORM else 1))
            found.append([leaf.grad for leaf in leaves])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16 branch"])
@pytest.mark.parametrize("op", [NORM, GELU])
def test_only_its_row_is_read(fast, op: str, dtypes: str, nan_outputs: None):
    """The inputs lie in memory full of NaN; a row of NaN changes no other row of a result, and two runs have the same bits."""
    operands = case(op, 9, 33, dtypes)
    inside = []
    for t in operands:
        big = torch.full((t.shape[0] + 8, *t.shape[1:]), float("nan"), dtype=t.dtype, device=fast.device)
        big[: t.shape[0]] = t.to(fast.device)
        inside.append(big[: t.shape[0]])
        assert inside[-1].is_contiguous()
    want = results(call(op, impl_of(fast)), [t.to(fast.device) for t in operands])
    got = results(call(op, impl_of(fast)), inside)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    inside[0][4] = float("nan")
    others = torch.arange(9) != 4
    for a, b in zip(results(call(op, impl_of(fast)), inside), want, strict=True):
        if a.ndim == 2:
            assert torch.equal(a[others], b[others])
    assert torch.isnan(call(op, impl_of(fast))(*inside)[0][4]).all()


def test_large_means_and_equal_values(fast):
    """The variance is that of centred values: a mean of 1,000 loses 2^-13 of them, not everything; a constant row has norm 0."""
    operands = case(NORM, 6, 64)
    operands[0] = operands[0] + 1000
    got = results(call(NORM, impl_of(fast)), [t.to(fast.device) for t in operands])
    want = results(exact(NORM, F32), [t.double() for t in operands])
    for a, b in zip(got, want, strict=True):
        assert worst_row(a, b) <= 1e-4
    same = [torch.full((3, 64), 2.0), torch.zeros(3, 64), torch.zeros(64), torch.ones(64), torch.zeros(64)]
    stream, norm = call(NORM, impl_of(fast))(*(t.to(fast.device) for t in same))
    assert (stream == 2).all()
    assert (norm == 0).all()


def test_gelu_of_large_values(fast):
    """Beyond 6, GELU and its derivative are x and 1; below -20 they are 0."""
    x = torch.tensor([[-300.0, -50.0, -30.0, 7.0, 50.0, 300.0]])
    out, dx, _ = results(call(GELU, impl_of(fast)), [x.to(fast.device), torch.zeros(6, device=fast.device)])
    assert torch.equal(out, torch.tensor([[0.0, 0.0, 0.0, 7.0, 50.0, 300.0]]))
    assert torch.equal(dx, torch.where(x > 0, probes((x,))[0], 0.0))


def test_the_tensors_may_be_one(fast):
    """The gradient of both operands may be one tensor, which must not be added to itself in place."""
    found = []
    for function, dtype in ((call(NORM, impl_of(fast)), F32), (exact(NORM, F32), F64)):
        x, *rest = (t.to(fast.device, dtype) for t in (case(NORM, 5, 12)[0], *case(NORM, 5, 12)[2:]))
        x.requires_grad_()
        stream, norm = function(x, x, *rest)
        (stream.sum() + norm.square().sum()).backward()
        found.append(x.grad.double())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [F16, F64])
@pytest.mark.parametrize("op", [NORM, GELU])
def test_other_dtypes_take_the_reference(fast, op: str, dtype: torch.dtype):
    operands = [t.to(fast.device, dtype) for t in case(op, 4, 12)]
    got, want = (results(call(op, impl), operands) for impl in ("auto", "reference"))
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(got, want, strict=True))
    if fast.triton:
        with pytest.raises(ValueError, match=f"{op}: impl='triton' does not support {dtype}; cast the operands"):
            call(op, "triton")(*operands)


@pytest.mark.parametrize("op", [NORM, GELU])
def test_auto_on_a_cpu_is_the_reference(op: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "_reported", set())
    with caplog.at_level(logging.INFO, "comtip_kernels"):
        call(op, "auto")(*case(op, 2, 4))
    assert caplog.messages == [f"{op}: impl='auto' chose 'reference' on cpu"]
    with pytest.raises(ValueError, match="impl='cpu' is not available"):
        call(op, "cpu")(*case(op, 2, 4))


@pytest.mark.parametrize("op", [NORM, GELU])
def test_gradcheck_of_the_reference(op: str):
    operands = [t.double().requires_grad_() for t in case(op, 3, 5)]
    assert torch.autograd.gradcheck(call(op, "reference"), operands)
