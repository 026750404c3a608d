"""Random draws of a step depend on the seed, the step and the spot or gene, and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from comtip_shards.sampling import rng
from torch import Tensor

from comtip_fast.training import draws

SPOTS = torch.tensor([7, 3, 2**33, 11])
GENES = torch.tensor([5, 0, 9])


def mispairings(seed: int, step: int, spots: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    u, use_stratum = draws.mispairings(seed, step, 3, spots, GENES, ("from", "to"), choose=True)
    assert use_stratum is not None
    return u, use_stratum


DRAWS = {
    "masked": lambda seed, step, spots: torch.cat(draws.masked_patches(seed, step, spots, 16, 0.6), dim=1),
    "mispair": lambda seed, step, spots: mispairings(seed, step, spots)[0]["to"][1],
    "stratum": lambda seed, step, spots: mispairings(seed, step, spots)[1],
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
    assert mispairings(1, 1, genes)[1].double().mean() == pytest.approx(0.5, abs=0.02)


def test_candidates_and_purposes_differ():
    u = mispairings(1, 1, SPOTS)[0]
    assert u.keys() == {"from", "to"}
    assert all(x.shape == (3, 4, 3) for x in u.values())
    every = torch.stack(list(u.values()))
    assert every.unique().numel() == every.numel()


def test_numbers_of_mispairings_are_those_of_numpy():
    """The keys are part of what a resumed run draws again."""
    u, use_stratum = mispairings(4, 9, SPOTS)
    index = (SPOTS[:, None] * 2**draws.GENE_BITS + GENES).numpy()
    for purpose, found in u.items():
        for i in range(3):
            np.testing.assert_array_equal(found[i].numpy(), rng.uniform(4, f"mispair-{purpose}", 9, i, index=index))
    mode = rng.uniform(4, "mispair-mode", 9, index=SPOTS.numpy())
    np.testing.assert_array_equal(use_stratum.numpy(), mode < 0.5)
    assert draws.mispairings(4, 9, 1, SPOTS, GENES, ("spot",), choose=False)[1] is None


def test_draws_of_vectors_on_the_host_are_those_of_the_device():
    for panel in (GENES, torch.arange(3000)):
        on_host = draws.vector_uniforms_on_host(1, 2, panel.numpy())
        assert np.array_equal(on_host, draws.vector_uniforms(1, 2, panel).numpy())
