"""Views: the transformations of a tile, and equality of every implementation with the reference."""

import numpy as np
import pytest
import torch
from comtip_shards.sampling.rng import uniform
from comtip_shards.slides.tiles import StainStats, normalise_stain

from comtip_fast.config.schema import DataConfig
from comtip_fast.data.augment.apply_views import apply_views
from comtip_fast.data.augment.views import make_views, plan_views, view_indices

STAINS = [StainStats((0.2, 0.3, 0.25), (0.1, 0.15, 0.1)), StainStats((0.4, 0.5, 0.3), (0.2, 0.2, 0.1))]
SPOTS = np.arange(10, 26)
VIEW = np.arange(16) % 9
SECTION = np.arange(16) % 2


def tiles(px: int = 24) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (16, px, px, 3)).astype(np.uint8)


def plan(px: int = 24, view: np.ndarray = VIEW, seed: int = 3, **config: object):
    data = DataConfig(**config)  # type: ignore[arg-type]
    return plan_views(SPOTS, view, SECTION, lambda s: STAINS[s], data, tile_px=px, seed=seed)


def test_view_0_is_the_tile_and_every_view_occurs_once():
    identity = plan(view=np.zeros(16, int), stain="none", zoom=0.3)
    np.testing.assert_array_equal(make_views(tiles(), identity), tiles())
    seen = np.stack([view_indices(4, SPOTS, seed=0, epoch=e) for e in range(4)])
    np.testing.assert_array_equal(np.sort(seen, 0), np.tile(np.arange(4)[:, None], 16))


def test_orientations_are_the_eight_symmetries_of_a_square():
    view = np.arange(16) % 8
    got = make_views(tiles(), plan(view=view, stain="none", jitter=0.0))
    for i in range(8):
        want = np.rot90(tiles()[i], i % 4)
        np.testing.assert_array_equal(got[i], want[:, ::-1] if i >= 4 else want)
    one_tile = make_views(np.repeat(tiles()[:1], 8, 0), plan(view=view, stain="none", jitter=0.0).select(slice(8)))
    assert len({t.tobytes() for t in one_tile}) == 8


def test_stain_is_normalised_then_jittered_in_optical_density():
    got = make_views(tiles(), plan(flips=False, jitter=0.1))
    for i in range(16):
        want = normalise_stain(tiles()[i], STAINS[SECTION[i]])
        if VIEW[i]:
            u = uniform(3, "jitter", int(VIEW[i]), int(SPOTS[i]), index=np.arange(6)) * 2 - 1
            density = -np.log10((want + 1.0) / 256) * (1 + 0.1 * u[:3]) + 0.2 * 0.1 * u[3:]
            want = np.clip(np.rint(256 * 10**-density - 1), 0, 255)
        assert np.abs(got[i].astype(int) - want).max() <= (1 if VIEW[i] else 0)


def test_zoom_enlarges_the_centre_within_its_range():
    p = plan(px=64, zoom=0.25, stain="none", jitter=0.0, flips=False)
    max_margin = int(64 * (1 - 1 / 1.25) / 2)
    assert p.margin_N.min() == 0
    assert 0 < p.margin_N.max() <= max_margin
    assert (p.margin_N[VIEW == 0] == 0).all()
    assert len(set(p.margin_N.tolist())) > 3
    ramp = np.broadcast_to((np.arange(64, dtype=np.uint8) * 3)[None, None, :, None], (16, 64, 64, 3))
    got = make_views(np.ascontiguousarray(ramp), p).astype(float)
    for i in range(16):
        # Enlarging by f around the centre divides the slope of a ramp by f and preserves its central value.
        factor = (64 - 2 * p.margin_N[i]) / 64
        slope = np.polyfit(np.arange(8, 56), got[i, 30, 8:56, 0], 1)[0]
        assert slope == pytest.approx(3 * factor, rel=0.02)
        assert got[i, 30, 31:33, 0].mean() == pytest.approx(31.5 * 3, abs=1)


IMPLEMENTATIONS = {
    "as on a GPU": {"batched": True},
    "on a CPU": {"batched": False, "compiled": False},
    "on a CPU, with numba": {"batched": False, "compiled": True},
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "config", [{}, {"stain": "none"}, {"jitter": 0.0, "stain": "none"}, {"flips": False}, {"zoom": 0.3}], ids=str
)
def test_every_implementation_equals_the_reference(implementation: str, config: dict):
    p = plan(**config)
    want = make_views(tiles(), p)
    got = apply_views(torch.from_numpy(tiles()), p, **IMPLEMENTATIONS[implementation]).permute(0, 2, 3, 1).numpy()
    difference = np.abs(got.astype(int) - want)
    if "zoom" in config:
        # Resampling may round differently by 1; the slope of the stain tables is at most 2 here.
        assert difference.max() <= 2
        assert (difference > 0).mean() < 0.01
    else:
        assert difference.max() == 0
    assert (want != tiles()).any()


def test_a_view_does_not_depend_on_its_batch():
    p, rows = plan(zoom=0.3), np.array([5, 2, 11])
    data = DataConfig(zoom=0.3)
    subset = plan_views(SPOTS[rows], VIEW[rows], SECTION[rows], lambda s: STAINS[s], data, tile_px=24, seed=3)
    views = apply_views(torch.from_numpy(tiles()), p)
    assert (views[rows] == apply_views(torch.from_numpy(tiles()[rows]), subset)).all()
    assert (views != apply_views(torch.from_numpy(tiles()), plan(zoom=0.3, seed=4))).any()
