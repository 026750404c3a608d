"""The kernels round the operands that they compute (g, p, ds, w) to bf16, as tensor cores need them.

Each result is compared with the same formula in fp64, once with these operands rounded and once without: it must equal the
first, and differ from the second.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs inside tests/kernels/test_interpreted.py", allow_module_level=True)

from comtip_kernels.block_pointwise import triton_op as pointwise
from comtip_kernels.infonce.triton_op import infonce_grads, infonce_lse
from comtip_kernels.one_query_attention import triton_op as one_query
from comtip_kernels.packed_attention import biased_triton_op as biased
from comtip_kernels.packed_attention.triton_op import attend, attend_grads
from comtip_kernels.sentence_table import triton_op as table
from torch.nn import functional as F

F64, BF16 = torch.float64, torch.bfloat16


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.float().to(BF16).to(F64)


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def check(got: torch.Tensor, with_rounding: torch.Tensor, without: torch.Tensor) -> None:
    step = float((with_rounding - without).norm())
    assert step > 0
    # A few operands lie next to a rounding boundary, and fp32 takes them to the other side.
    assert float((got.to(F64) - with_rounding).norm()) < 0.2 * step


def test_infonce_rounds_g():
    x, y = (F.normalize(randn(i, n, 32).float(), dim=-1).to(BF16).float() for i, n in enumerate((40, 70)))
    scale, nothing = torch.tensor(20.0), (0, None, None, None, None, None, True)
    row, column, _ = infonce_lse(x, y, scale, *nothing)
    weight = torch.full((40,), 1 / 80)
    dx, dy = infonce_grads(x, y, scale, weight, weight, row, column, *nothing)
    x, y, row, column = (t.to(F64) for t in (x, y, row, column))
    s = 20 * x @ y.T
    g = (s - row[:, None]).exp() / 80
    g[:, :40] += (s[:, :40] - column).exp() / 80
    check(dx, rounded(g) @ y, g @ y)
    check(dy, rounded(g).T @ x, g.T @ x)


def test_attention_rounds_p_and_ds():
    q, k, v, grad = (randn(i, 30, 2, 16) for i in range(4))
    first = torch.arange(0, 30, 10, dtype=torch.int32).repeat_interleave(10)
    dq, dk, dv = attend_grads(q, k, v, grad, first, 10)
    out = attend(q, k, v, first, 10)
    q, k, v, grad = (t.to(F64).unflatten(0, (3, 10)).transpose(1, 2) for t in (q, k, v, grad))
    p = (q @ k.mT / 4).softmax(-1)
    dp = grad @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) / 4

    def packed(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).flatten(0, 1)

    # Outputs are bf16 too; the rounding of operands is visible in their sum over many elements.
    pairs = [(out, p, v), (dv, p.mT, grad), (dq, ds, k), (dk, ds.mT, q)]
    for got, operand, other in pairs:
        with_rounding, without = (packed(rounded(packed_op @ other)) for packed_op in (rounded(operand), operand))
        check(got, with_rounding, without)


def test_attention_rounds_q_k_and_v_after_their_bias_was_added():
    """Their sums in fp32 are no operands of tensor cores; images and sentences are the same."""
    qkv, grad, bias = randn(0, 60, 3, 2, 16), randn(1, 60, 2, 16), torch.randn(96) * 2
    first = torch.arange(0, 60, 20, dtype=torch.int32).repeat_interleave(20)
    for where in ((None, [20]), (first, [20])):
        out = biased.attend(qkv, bias, *where)
        dqkv, dbias = biased.attend_grads(qkv, bias, grad, *where)
        g = grad.to(F64).unflatten(0, (3, 20)).transpose(1, 2)
        sums = qkv.to(F64) + bias.to(F64).view(3, 2, 16)
        both = []
        for given in (rounded(sums), sums):
            q, k, v = given.unflatten(0, (3, 20)).permute(2, 0, 3, 1, 4)
            p = (q @ k.mT / 4).softmax(-1)
            dp = g @ v.mT
            ds = rounded(p * (dp - (p * dp).sum(-1, keepdim=True)) / 4)
            of_parts = torch.stack([ds @ k, ds.mT @ q, rounded(p).mT @ g]).permute(1, 3, 0, 2, 4).flatten(0, 1)
            both.append(((rounded(p) @ v).transpose(1, 2).flatten(0, 1), of_parts))
        (want, dwant), (without, dwithout) = both
        check(out, rounded(want), rounded(without))
        check(dqkv, rounded(dwant), rounded(dwithout))
        # The gradient of the bias is the sum before it is rounded.
        close = float((dbias.to(F64) - dwant.sum(0).flatten()).norm())
        assert close < 0.2 * float((dqkv.to(F64).sum(0).flatten() - dwant.sum(0).flatten()).norm())


def test_attention_with_one_query_rounds_p_and_ds():
    query, grad = (randn(i, 40, 4, 16) for i in range(2))
    x = randn(2, 400, 16)
    length = torch.full((40,), 10)
    first = torch.arange(0, 400, 10)
    out = one_query.attend(query, x, first, length, 10, 0.25)
    dquery, dx = one_query.attend_grads(query, x, grad, first, length, 10, 0.25)
    query, grad, x = query.to(F64), grad.to(F64), x.to(F64).view(40, 10, 16)
    p = (query @ x.mT / 4).softmax(-1)
    dp = grad @ x.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) / 4
    check(out, rounded(rounded(p) @ x), rounded(p @ x))
    check(dquery, rounded(rounded(ds) @ x), rounded(ds @ x))
    both = rounded(rounded(ds).mT @ query + rounded(p).mT @ grad), rounded(ds.mT @ query + p.mT @ grad)
    check(dx.view(40, 10, 16), *both)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=["bf16 stream", "fp32 stream"])
def test_the_norm_is_that_of_the_stored_sum(dtype: torch.dtype):
    """A bf16 stream is rounded before its statistics, so that the backward pass computes the same norm again."""
    x, branch = randn(0, 40, 96).to(dtype), randn(1, 40, 96)
    bias, gain = (torch.randn(96, generator=torch.Generator().manual_seed(i)) for i in (2, 3))
    out, norm, _ = pointwise.norm_op(x, branch, bias, gain, bias, 1e-5, torch.float32)
    total = x.to(F64) + branch.to(F64) + bias.to(F64)
    if dtype == BF16:
        assert torch.equal(out.to(F64), rounded(total))
    stored, plain = (F.layer_norm(t, (96,), gain.to(F64), bias.to(F64), 1e-5) for t in (out.to(F64), total))
    if dtype == BF16:
        check(norm, stored, plain)
    else:
        torch.testing.assert_close(norm.to(F64), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=["bf16 stream", "fp32 stream"])
def test_gradients_between_products_are_rounded_once(dtype: torch.dtype):
    """Sums of gradients are those of the fp32 values, not of the bf16 ones that are stored."""
    x, branch, grad, stream_grad = (randn(i, 40, 96) for i in range(4))
    zero, one = torch.zeros(96), torch.ones(96)
    out, _, stats = pointwise.norm_op(x.to(dtype), branch, zero, one, zero, 1e-5, BF16)
    dx, dbranch, sums = pointwise.norm_grads_op(grad, stream_grad.to(dtype), out, stats, one, BF16)
    leaf = out.to(F64).requires_grad_()
    (want,) = torch.autograd.grad(F.layer_norm(leaf, (96,)), leaf, grad.to(F64))
    want = want + stream_grad.to(F64)
    if dtype == BF16:
        check(dx, rounded(want), want)
        assert dbranch.numel() == 0
    else:
        torch.testing.assert_close(dx.to(F64), want, rtol=1e-4, atol=1e-4)
        assert torch.equal(dbranch, dx.to(BF16))
    check(sums[2], want.sum(0), rounded(want).sum(0))
    dx, dbias = pointwise.gelu_grads_op(grad, x, one)
    leaf = (x.to(F64) + 1).requires_grad_()
    (want,) = torch.autograd.grad(F.gelu(leaf), leaf, grad.to(F64))
    check(dx, rounded(want), want)
    check(dbias, want.sum(0), rounded(want).sum(0))


@pytest.mark.parametrize("loss", [False, True])
def test_the_table_rounds_weights(loss: bool):
    image, rows = (F.normalize(randn(i, *s).float(), dim=-1).to(BF16) for i, s in enumerate(((40, 32), (9, 5, 32))))
    levels = torch.randint(5, (40, 9), generator=torch.Generator().manual_seed(0))
    hot = F.one_hot(levels, 5).to(F64)
    if loss:
        scale, measured = torch.tensor(9.0), torch.ones(40, 9, dtype=torch.uint8)
        dimage, dtable, _ = table.level_loss_grads(
            image, rows, levels, measured, scale, None, torch.tensor(1 / 3), True
        )
        weight = ((9 * torch.einsum("bd,gqd->bgq", image.to(F64), rows.to(F64))).softmax(-1) - hot) / 3
    else:
        given = torch.rand(40, 9, generator=torch.Generator().manual_seed(1))
        dimage = table.weighted_sum(given, rows, levels, True)
        dtable = table.weighted_sum_transpose(image, given, levels, 5, True)
        weight = given.to(F64)[..., None] * hot
    for got, formula, other in ((dimage, "bgq,gqd->bd", rows), (dtable, "bgq,bd->gqd", image)):
        check(got, *(torch.einsum(formula, w, other.to(F64)) for w in (rounded(weight), weight)))
