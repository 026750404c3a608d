"""Losses against direct formulas; mispairing changes only the pairing of genes and values."""

import math

import pytest
import torch

from comtip_fast.data.expression.strata import gene_strata
from comtip_fast.objectives import (
    choose_hardest,
    counted_swaps,
    feature_health,
    masked_feature_loss,
    pair_auc,
    pair_loss,
    permute_within_strata,
    same_text_hash,
    take_from_other_spots,
)

B, G, Q, C = 9, 24, 6, 4


@pytest.fixture
def levels() -> torch.Tensor:
    return torch.randint(Q, (B, G), generator=torch.Generator().manual_seed(1))


def uniform(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- mispairing -------------------------------------------------------------------------------------------------


def test_permutation_within_strata_keeps_the_values_of_every_stratum(levels):
    strata = torch.arange(G).remainder(3).expand(B, G).clone()
    strata[:, -4:] = 3  # unmeasured genes form their own stratum
    out = permute_within_strata(levels, strata, uniform(2, C, B, G), uniform(3, C, B, G))
    assert out.shape == (C, B, G)
    for s in range(4):
        own = strata[0] == s
        torch.testing.assert_close(out[..., own].sort(-1).values, levels[:, own].sort(-1).values.expand(C, -1, -1))
    assert (out != levels).any(-1).all()
    assert (out[0] != out[1]).any()


def test_permutation_within_strata_is_uniform():
    levels = torch.arange(3).expand(1, 3)
    n = 6000
    out = permute_within_strata(levels, torch.zeros(1, 3, dtype=torch.long), uniform(4, n, 1, 3), uniform(5, n, 1, 3))
    _, count = out[:, 0].unique(dim=0, return_counts=True)
    assert len(count) == 6
    assert (count.double() / n - 1 / 6).abs().max() < 0.02


def test_levels_come_from_another_spot_of_the_section_and_the_same_gene():
    section = torch.tensor([0, 1, 0, 1, 0, 2, 1, 0, 1])
    tagged = torch.arange(B)[:, None] * G + torch.arange(G)  # levels that encode their origin
    out = take_from_other_spots(tagged, section, uniform(6, 200, B, G))
    spot, gene = out // G, out % G
    assert (gene == torch.arange(G)).all()
    assert (section[spot] == section[:, None]).all()
    alone = section == 2
    assert (spot[:, alone] == 5).all()
    assert (spot[:, ~alone] != torch.arange(B)[~alone][:, None]).all()
    # Every other spot of the section can be drawn.
    assert set(spot[:, 0].unique().tolist()) == {2, 4, 7}


def test_levels_of_other_spots_stay_uint8_and_do_not_depend_on_the_slice():
    """Ranks exchange levels as bytes; only the levels that a rank uses may be widened."""
    section = torch.tensor([0, 1, 0, 1, 0, 2, 1, 0, 1])
    levels, u = (torch.arange(B * G).reshape(B, G) % 251).byte(), uniform(7, 3, B, G)
    expected = take_from_other_spots(levels.long(), section, u)
    for rows in (slice(0, 4), slice(4, 9), slice(9, 9)):
        got = take_from_other_spots(levels, section, u[:, rows], rows)
        assert got.dtype == torch.uint8
        assert torch.equal(got.long(), expected[:, rows])


def test_a_swap_counts_only_if_the_level_changes_enough(levels):
    moved = (levels + torch.arange(G).remainder(4)).clamp_max(Q - 1)
    measured = torch.arange(G).expand(B, G) % 5 != 0
    got = counted_swaps(levels, moved, measured, 2)
    for b in range(B):
        for g in range(G):
            assert bool(got[b, g]) == (bool(measured[b, g]) and abs(int(levels[b, g]) - int(moved[b, g])) >= 2)


def test_the_adversary_chooses_complete_permutations():
    logits = torch.tensor([[[0.0, 9.0], [1.0, 1.0]], [[3.0, 3.0], [5.0, -9.0]]])  # (C=2, B=2, G=2)
    counted = torch.tensor([[[True, False], [True, True]], [[True, True], [True, True]]])
    assert choose_hardest(logits, counted).tolist() == [1, 0]
    assert choose_hardest(logits, counted & torch.tensor([False, True])[:, None, None]).tolist() == [1, 1]


def test_strata_contain_genes_of_similar_detection_and_level():
    mean = torch.tensor([[0.1, 3.0, 0.2, 2.9, 1.0, 1.1]])
    detection = torch.tensor([[0.1, 1.0, 0.1, 1.0, 0.5, 0.5]])
    measured = torch.tensor([[True, True, True, True, True, False]])
    got = gene_strata(mean, detection, measured, 2)[0]
    assert got[5] == 2
    assert got[0] == got[2]
    assert got[1] == got[3]
    assert got[0] != got[1]


# -- losses -----------------------------------------------------------------------------------------------------


def test_pair_loss_and_auc_match_loops():
    true, false = uniform(7, B, G) * 4 - 2, (uniform(8, B, G) * 4 - 2).round(decimals=1)
    true = true.round(decimals=1)  # ties
    counted = uniform(9, B, G) < 0.4
    pairs = [(float(true[b, g]), float(false[b, g])) for b in range(B) for g in range(G) if counted[b, g]]
    want = sum(math.log1p(math.exp(-t)) + math.log1p(math.exp(f)) for t, f in pairs) / (2 * len(pairs))
    assert float(pair_loss(true, false, counted)) == pytest.approx(want, rel=1e-12)
    wins = sum((t > f) + 0.5 * (t == f) for t, _ in pairs for _, f in pairs)
    assert pair_auc(true, false, counted) == pytest.approx(wins / len(pairs) ** 2)
    nothing = counted & False
    assert float(pair_loss(true, false, nothing)) == 0.0
    assert math.isnan(pair_auc(true, false, nothing))


@pytest.mark.parametrize("distance", ["smooth_l1", "mse", "cosine"])
def test_masked_feature_loss_matches_loops(distance: str):
    predicted, target = uniform(10, 2, 3, 5).requires_grad_(), (uniform(11, 2, 3, 5) * 7).requires_grad_()
    got = masked_feature_loss(predicted, target, distance)
    values = []
    for b in range(2):
        for k in range(3):
            t = target[b, k].tolist()
            mean = sum(t) / 5
            std = math.sqrt(sum((v - mean) ** 2 for v in t) / 5 + 1e-5)
            t, p = [(v - mean) / std for v in t], predicted[b, k].tolist()
            if distance == "cosine":
                dot = sum(a * c for a, c in zip(t, p, strict=True))
                values.append(1 - dot / math.sqrt(sum(a * a for a in t) * sum(c * c for c in p)))
                continue
            for a, c in zip(t, p, strict=True):
                d = abs(a - c)
                values.append(d * d if distance == "mse" else (0.5 * d * d if d < 1 else d - 0.5))
    assert float(got.detach()) == pytest.approx(sum(values) / len(values), rel=1e-5)
    got.backward()
    assert target.grad is None
    assert predicted.grad is not None


def test_masked_feature_loss_rejects_unknown_distances():
    with pytest.raises(ValueError, match="l7"):
        masked_feature_loss(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), "l7")


def test_feature_health_detects_collapse():
    good = uniform(12, 8, 16, 32)
    flat = good.mean(1, keepdim=True).expand(-1, 16, -1)
    one = torch.ones(8, 16, 1, dtype=torch.float64) * uniform(13, 32)
    healthy, same_in_tile, same = feature_health(good), feature_health(flat), feature_health(one)
    assert healthy["patch_variance"] > 0.5
    assert healthy["patch_rank"] > 20
    assert same_in_tile["patch_variance"] < 1e-6
    assert same["patch_rank"] < 1.5


def test_the_text_hash_ignores_unmeasured_genes(levels):
    measured = torch.ones(B, G, dtype=torch.bool)
    measured[:, 5] = False
    again = levels.clone()
    again[3] = again[0]
    again[3, 5] += 1
    ids = same_text_hash(again, measured)
    assert ids[3] == ids[0]
    assert ids.unique().numel() == B - 1
