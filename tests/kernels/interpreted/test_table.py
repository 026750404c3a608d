"""The Triton operators over the sentence table. Values and gradients are tested in ../test_table.py."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs inside tests/kernels/test_interpreted.py", allow_module_level=True)

from comtip_kernels import flops, pair_scores
from comtip_kernels.sentence_table import triton_op as op


def test_opcheck_and_flops():
    g = torch.Generator().manual_seed(14)
    image, table, prior = (torch.randn(*s, generator=g).requires_grad_() for s in ((9, 8), (5, 3, 8), (5, 3)))
    levels = torch.randint(3, (9, 5), generator=g).to(torch.uint8)
    mask = torch.rand(9, 5, generator=g) < 0.7
    weight = torch.rand(9, 5, requires_grad=True)
    scale = torch.tensor(5.0, requires_grad=True)
    torch.library.opcheck(op.sampled_dot, (image, table, levels, False))
    torch.library.opcheck(op.weighted_sum, (weight, table, levels, False))
    torch.library.opcheck(op.weighted_sum_transpose, (image, weight, levels, 3, False))
    arguments = (image, table, levels, mask.to(torch.uint8), scale, prior, False)
    torch.library.opcheck(op.level_loss, arguments)
    torch.library.opcheck(op.level_loss, (*arguments[:5], None, False))
    backward = (*(t.detach() for t in arguments[:-1]), torch.tensor(1.0), False)
    torch.library.opcheck(op.level_loss_grads, backward, test_utils=("test_schema", "test_faketensor"))
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        op.level_loss(*arguments).backward()
    # One product forward; backward the scores again and two products.
    assert counter.get_total_flops() == 4 * 2 * 9 * 15 * 8


def test_chunks_of_genes_add_up_to_the_whole_panel(monkeypatch: pytest.MonkeyPatch):
    g = torch.Generator().manual_seed(5)
    image, table, prior = (torch.randn(*s, generator=g) for s in ((9, 8), (150, 3, 8), (150, 3)))
    levels = torch.randint(3, (9, 150), generator=g).to(torch.uint8)
    measured = (torch.rand(9, 150, generator=g) < 0.7).to(torch.uint8)
    arguments = (image, table, levels, measured, torch.tensor(5.0), prior, torch.tensor(0.5), False)
    whole = op.level_loss_grads(*arguments)
    monkeypatch.setattr(flops, "CHUNK_BYTES", 1)
    assert flops.level_chunk(9, 3, 4) == 64
    for got, want in zip(op.level_loss_grads(*arguments), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    leaves = [t.double().requires_grad_() for t in (image, table, prior)]
    scores = 5 * torch.einsum("bd,gqd->bgq", leaves[0], leaves[1]) + leaves[2]
    own = scores.gather(2, levels.long()[..., None])[..., 0]
    ((scores.logsumexp(2) - own) * measured * 0.5).sum().backward()
    for got, leaf, factor in zip(whole, leaves, (5, 5, 1), strict=True):
        torch.testing.assert_close(got.double() * factor, leaf.grad, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_the_transpose():
    g = torch.Generator().manual_seed(3)
    vector, weight = torch.randn(9, 8, generator=g), torch.rand(9, 5, generator=g)
    levels = torch.randint(3, (9, 5), generator=g)
    hot = torch.nn.functional.one_hot(levels, 3).double()
    probe = torch.randn(5, 3, 8, generator=g)
    leaves = [vector.clone().requires_grad_(), weight.clone().requires_grad_()]
    (op.weighted_sum_transpose(*leaves, levels, 3, False) * probe).sum().backward()
    exact = [vector.double().requires_grad_(), weight.double().requires_grad_()]
    (torch.einsum("bg,bgq,bd->gqd", exact[1], hot, exact[0]) * probe).sum().backward()
    for a, b in zip(leaves, exact, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=2e-5, atol=1e-5)


def test_gradients_of_an_fp32_table_stay_fp32_under_bf16_products():
    table = torch.randn(4, 3, 16, requires_grad=True)
    image, levels = torch.randn(300, 16), torch.zeros(300, 4, dtype=torch.uint8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = pair_scores(image, table, levels, impl="triton")
    out.sum().backward()
    want = image.bfloat16().double().sum(0)
    assert out.dtype == table.grad.dtype == torch.float32
    torch.testing.assert_close(table.grad[0, 0].double(), want, rtol=1e-5, atol=1e-4)


def test_too_many_levels_are_refused():
    with pytest.raises(ValueError, match="at most 256"):
        pair_scores(torch.randn(2, 4), torch.randn(1, 300, 4), torch.zeros(2, 1, dtype=torch.int64), impl="triton")
