"""Triton operators of attention that adds a bias, within images and sentences. Values and gradients: ../test_image_attention.py."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs inside tests/kernels/test_interpreted.py", allow_module_level=True)

from comtip_kernels import flops, image_attention
from comtip_kernels.packed_attention import IMAGE_TOKENS, adds_bias, triton_kernels
from comtip_kernels.packed_attention import biased_triton_op as op
from torch.utils.flop_counter import FlopCounterMode

BF16, F32 = torch.bfloat16, torch.float32
FIRST = torch.tensor([0, 0, 0, 3, 3, 5, 5, 5, 5, 9, 9, 9], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [None, torch.ones(3 * 2 * 8)], ids=["no bias", "bias"])
@pytest.mark.parametrize("images", [0, 2])
def test_opcheck(images: int, bias: torch.Tensor | None, dtype: torch.dtype):
    """The operators have no gradient of their own: that of ``autograd.Function`` calls them, also while a graph is traced."""
    tests = ("test_schema", "test_faketensor")
    qkv = torch.randn(images * 6, 3, 2, 8).to(dtype)
    for first, tokens in ((None, [4, 2]), (FIRST[: images * 6], [4])):
        torch.library.opcheck(op.attend, (qkv, bias, first, tokens), test_utils=tests)
        torch.library.opcheck(op.attend_grads, (qkv, bias, qkv[:, 0] * 2, first, tokens), test_utils=tests)


def test_flops():
    """Two images in two parts, two heads of 16: 2 products forward and 5 backward, one tile of 32 or 64 tokens per image."""
    qkv = torch.randn(2 * (50 + 26), 3, 2, 16).to(BF16)
    with FlopCounterMode(display=False) as counter:
        out = op.attend(qkv, None, None, [50, 26])
    assert counter.get_total_flops() == 2 * 2 * 2 * 2 * (64 * 64 + 32 * 32) * 16
    with FlopCounterMode(display=False) as counter:
        op.attend_grads(qkv, None, out, None, [50, 26])
    assert counter.get_total_flops() == 5 * 2 * 2 * 2 * (64 * 64 + 32 * 32) * 16
    assert counter.get_total_flops() == sum(flops.image_attention(2, 2, 16, T).backward for T in (50, 26))
    # Sentences of up to 4 tokens: one tile of 32 tokens.
    with FlopCounterMode(display=False) as counter:
        op.attend(qkv[:12], None, FIRST, [4])
    assert counter.get_total_flops() == 2 * 2 * 2 * 32 * 32 * 16


def test_a_second_derivative_is_refused():
    qkv, bias = torch.randn(6, 3, 2, 8, requires_grad=True), torch.randn(48, requires_grad=True)
    out = image_attention(qkv, (3,), bias, impl="triton")
    for first in torch.autograd.grad(out.square().sum(), (qkv, bias), create_graph=True):
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward(retain_graph=True)


def test_more_programs_than_an_axis_of_a_grid_has(monkeypatch: pytest.MonkeyPatch):
    """Images and heads are on grid axis 0, which has 2^31 - 1; axes 1 and 2 have 65,535."""
    grids = []
    monkeypatch.setattr(op, "launch", lambda kernel, grid, *args, **options: grids.append(grid))
    qkv, bias = torch.zeros(140_000, 3, 1, 1), torch.zeros(3)
    out = op.attend(qkv, bias, None, [1, 1])
    op.attend_grads(qkv, bias, out, None, [1, 1])
    assert grids == [(70_000,)] * 4


@pytest.mark.parametrize("mode", IMAGE_TOKENS)
def test_every_number_of_tokens_has_the_smallest_tile(mode: str):
    dtype = BF16 if mode == "bf16" else F32
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if mode == "tf32" else "highest")
    try:
        for T in range(1, IMAGE_TOKENS[mode] + 1):
            qkv = torch.empty(3 * T, 3, 2, 20, dtype=dtype)
            ((rows, window, images, options),) = op._launches(qkv, None, [T], backward=True)
            assert (rows, window, images) == (slice(0, 3 * T), T, 3)
            assert options["BT"] == (32 if T <= 32 else 64)
            assert (mode, options["BT"]) in triton_kernels.LAUNCH
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_a_bias_that_the_kernel_would_spill_is_added_before(precision: str, monkeypatch: pytest.MonkeyPatch):
    """With tf32, kernels that add a bias spill registers: their launches have none, and PyTorch adds it."""
    seen = []
    real = op.launch
    monkeypatch.setattr(op, "launch", lambda *args, **options: (seen.append(options["BIAS"]), real(*args, **options)))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for dtype in (F32, BF16):
            qkv, bias = torch.randn(26, 3, 1, 8, requires_grad=True), torch.randn(24, requires_grad=True)
            image_attention(qkv.to(dtype), (26,), bias, impl="triton").sum().backward()
            assert bias.grad is not None
            assert adds_bias(qkv.device, dtype, 26, images=True) == seen[-1]
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [precision == "highest"] * 2 + [True] * 2


def test_where_attention_adds_a_bias():
    here = torch.device("cpu")
    assert adds_bias(here, BF16, 64, images=True)
    assert adds_bias(here, F32, 32, images=True)
    assert not adds_bias(here, F32, 33, images=True)
    assert not adds_bias(here, BF16, 65, images=True)
    assert adds_bias(here, BF16, 48)
    assert not adds_bias(here, BF16, 49)
    assert not adds_bias(here, BF16, 48, impl="sdpa")
    assert not adds_bias(here, torch.float16, 16)
