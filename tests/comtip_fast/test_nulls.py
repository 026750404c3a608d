"""The fast spatial null equals the direct computation, gene by gene, also where it is undefined."""

import numpy as np
import pytest

from comtip_fast.evaluation.metrics import partial_pcc_per_gene, score, score_from_genes
from comtip_fast.evaluation.nulls import CHUNK, moved_spots, null_partial_pcc, null_pcc
from comtip_fast.metrics import pcc_per_gene


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def xy() -> np.ndarray:
    return np.stack(np.meshgrid(np.arange(9), np.arange(7)), -1).reshape(-1, 2).astype(float)


def test_the_fast_null_equals_the_direct_computation(rng, xy):
    a, b = rng.normal(size=(63, CHUNK + 5)), rng.normal(size=(63, CHUNK + 5)).astype(np.float32)
    covariates = rng.normal(size=(63, 4))
    a[:, 3], b[:, CHUNK + 1] = 0.1, 7.3
    moved = moved_spots(xy, 12, seed=0, section="s")
    moved[5] = 11  # every spot gets the prediction of one spot
    got, partial = null_pcc(a, b, moved), null_partial_pcc(a[:, :6], b[:, :6], covariates, moved)
    assert np.isnan(got[5]).all()
    for draw in range(12):
        np.testing.assert_allclose(got[draw], pcc_per_gene(a, b[moved[draw]]), atol=1e-9)
        np.testing.assert_allclose(
            partial[draw], partial_pcc_per_gene(a[:, :6], b[moved[draw]][:, :6], covariates), atol=1e-9
        )
    hvg, panel = np.arange(6), np.arange(2, 20)
    one = score_from_genes(got[0], partial[0], hvg, panel)
    want = score(a, b[moved[0]], covariates, hvg, panel)
    assert one.undefined_genes == want.undefined_genes == 2
    assert one.mean_pcc_all == pytest.approx(want.mean_pcc_all)
    assert one.mean_pcc_50_hvg == pytest.approx(want.mean_pcc_50_hvg)


def test_no_draws_or_no_genes(rng, xy):
    a = rng.normal(size=(63, 3))
    none = moved_spots(xy, 0, seed=0, section="s")
    assert null_pcc(a, a, none).shape == null_partial_pcc(a, a, a[:, :1], none).shape == (0, 3)
    assert null_pcc(a[:, :0], a[:, :0], moved_spots(xy, 4, seed=0, section="s")).shape == (4, 0)


def test_random_fields_are_centred_near_zero_and_wider_than_shuffles(rng, xy):
    """Independent smooth fields: the null is centred at zero and wider than a permutation of spots."""

    def field() -> np.ndarray:
        k, phase = rng.uniform(-0.6, 0.6, (2, 3)), rng.uniform(0, 6.3, 3)
        return np.sin(xy @ k + phase).sum(1)

    a, b = np.stack([field() for _ in range(40)], 1), np.stack([field() for _ in range(40)], 1)
    moved = moved_spots(xy, 50, seed=3, section="s")
    null = null_pcc(a, b, moved)
    assert abs(np.nanmean(null)) < 0.05
    shuffled = null_pcc(a, b, np.stack([rng.permutation(63) for _ in range(50)]))
    assert np.nanstd(null) > 1.5 * np.nanstd(shuffled)
