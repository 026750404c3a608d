"""Modules hold the parameters and call the functions: same values, gradients where they belong."""

import pytest
import torch
from comtip_kernels import GeneSentenceEmbedding, InfoNCE, gene_sentence_embedding, infonce


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_infonce_learns_its_temperature():
    loss = InfoNCE(temperature=0.1)
    x, y = randn(6, 8), randn(9, 8)
    value = loss(x, y)
    scale = torch.tensor(10.0, requires_grad=True)
    want = infonce(x, y, scale)
    torch.testing.assert_close(value, want)
    value.backward()
    want.backward()
    # d / d log(scale) = scale * d / d scale
    torch.testing.assert_close(loss.log_scale.grad, 10 * scale.grad)
    assert set(loss.state_dict()) == {"log_scale"}


def test_the_clamp_is_where_it_is_read():
    loss = InfoNCE(temperature=0.001, max_scale=100.0)
    x, y = randn(5, 4), randn(5, 4)
    torch.testing.assert_close(loss(x, y), infonce(x, y, torch.tensor(100.0)))
    assert float(loss.log_scale.detach()) == pytest.approx(6.9078, abs=1e-4)
    with pytest.raises(ValueError, match="give a positive number"):
        InfoNCE(temperature=0.0)


def test_groups_and_implementation_reach_the_function():
    x, y, group = randn(6, 8), randn(6, 8), torch.tensor([0, 0, 1, 1, 2, 2])
    got = InfoNCE(0.1, negatives="same_group", impl="reference")(x, y, group_rows=group, group_columns=group)
    want = infonce(x, y, torch.tensor(10.0), negatives="same_group", group_rows=group, group_columns=group)
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="cannot run on cpu"):
        InfoNCE(impl="triton")(x, y)


@pytest.mark.parametrize("identities", [0, 4])
def test_gene_sentence_embedding(identities: int):
    embed = GeneSentenceEmbedding(11, 5, 3, 8, identities=identities)
    ids = torch.randint(1, 11, (6, 5), generator=torch.Generator().manual_seed(0))
    length, level, own = torch.tensor([2, 5, 3, 4, 5, 2]), torch.tensor([0, 1, 2, 0, 1, 2]), torch.arange(6) % 5
    out = embed(ids, length, level, identity_N=own if identities else None)
    want = gene_sentence_embedding(
        ids,
        length,
        level,
        embed.token_VD,
        embed.type_3D,
        embed.position_TD,
        embed.level_QD,
        identity_N=own if identities else None,
        identity_ID=embed.identity_ID,
        gain_D=embed.norm.weight,
        bias_D=embed.norm.bias,
        impl="reference",
    )
    torch.testing.assert_close(out, want)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in embed.parameters())
