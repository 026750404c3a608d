"""Random draws of a step depend on the seed, the step and the spot or gene, and on nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from comtip_fast.training import draws

SPOTS = torch.tensor([7, 3, 2**33, 11])
GENES = torch.tensor([5, 0, 9])
DRAWS = {
    "masked": lambda seed, step, spots: torch.cat(draws.masked_patches(seed, step, spots, 16, 0.6), dim=1),
    "mispair": lambda seed, step, spots: draws.mispair_uniforms(seed, "mispair-from", step, 2, spots, GENES)[0],
    "stratum": draws.mispair_within_stratum,
    "identities": lambda seed, step, genes: draws.kept_identities(seed, step, genes, 0.5),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_does_not_depend_on_the_other_rows(name: str):
    draw = DRAWS[name]
    every: Tensor = draw(1, 2, SPOTS)
    assert torch.equal(draw(1, 2, SPOTS.flip(0)), every.flip(0))
    for row in range(len(SPOTS)):
        assert torch.equal(draw(1, 2, SPOTS[row : row + 1]), every[row : row + 1])


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_depends_on_seed_and_step(name: str):
    draw, spots = DRAWS[name], torch.arange(200)
    assert not torch.equal(draw(1, 2, spots), draw(2, 2, spots))
    assert not torch.equal(draw(1, 2, spots), draw(1, 3, spots))


def test_masked_and_visible_patches_are_a_partition():
    visible, hidden = draws.masked_patches(3, 4, SPOTS, 16, 0.6)
    assert visible.shape == (4, 7)
    assert hidden.shape == (4, 9)
    assert torch.equal(torch.cat([visible, hidden], dim=1).sort(dim=1).values, torch.arange(16).expand(4, 16))


def test_shares_are_the_expected_ones():
    genes = torch.arange(20_000)
    assert draws.kept_identities(1, 1, genes, 0.25).double().mean() == pytest.approx(0.75, abs=0.02)
    assert draws.mispair_within_stratum(1, 1, genes).double().mean() == pytest.approx(0.5, abs=0.02)


def test_candidates_and_purposes_differ():
    u = draws.mispair_uniforms(1, "mispair-from", 1, 3, SPOTS, GENES)
    assert u.shape == (3, 4, 3)
    assert u.unique().numel() == u.numel()
    assert not torch.equal(u, draws.mispair_uniforms(1, "mispair-to", 1, 3, SPOTS, GENES))
