"""The CPU paths over the sentence table: second-order checks. Values and gradients are tested in test_table.py."""

import torch
from comtip_kernels import level_cross_entropy, pair_scores, table_pool


def test_gradcheck():
    g = torch.Generator().manual_seed(9)
    image, table, scores, prior = (
        torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in ((5, 2), (4, 3, 2), (4, 3), (4, 3))
    )
    levels = torch.randint(3, (5, 4), generator=g).to(torch.uint8)
    mask = torch.rand(5, 4, generator=g) < 0.7
    mask[1] = False
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    leaves = (image, table, prior, scale)
    assert torch.autograd.gradcheck(
        lambda i, t, p, s: level_cross_entropy(i, t, levels, mask, s, p, impl="cpu"), leaves
    )
    assert torch.autograd.gradcheck(lambda i, t: pair_scores(i, t, levels, impl="cpu"), (image, table))
    assert torch.autograd.gradcheck(lambda t, s: table_pool(t, s, levels, mask, impl="cpu"), (table, scores))
