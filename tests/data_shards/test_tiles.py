import numpy as np
import pytest
from comtip_shards.slides.tiles import (
    REFERENCE_MEAN,
    REFERENCE_STD,
    StainStats,
    cut_tiles,
    limit_resolution,
    normalise_stain,
    stain_stats,
)
from PIL import Image


def gradient(height: int, width: int) -> np.ndarray:
    """Return an image whose red encodes the column and green the row."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x, y, np.full_like(x, 7)], axis=-1).astype(np.uint8)


def test_tiles_lie_where_the_spot_is_and_have_the_width_asked_for():
    image = gradient(200, 250)
    tile = cut_tiles(image, np.array([[120.0, 80.0]]), 64, 32)[0].astype(float)
    # x is the column. The centre of a tile is its spot; pixel i covers [i, i + 1).
    assert abs(tile[..., 0].mean() - 119.5) < 0.6
    assert abs(tile[..., 1].mean() - 79.5) < 0.6
    step = np.diff(tile[16, 4:-4, 0]).mean()
    assert abs(step - 64 / 32) < 0.05


def test_fractional_widths_are_kept():
    image = np.zeros((100, 100, 3), np.uint8)
    image[:, 60:] = 200
    tile = cut_tiles(image, np.array([[50.0, 50.0]]), 33.4, 334)[0]
    edge = int(np.argmax(tile[167, :, 0] > 100))
    assert abs(edge - (10 + 16.7) * 10) <= 3


@pytest.mark.parametrize(("width", "out"), [(64.0, 32), (33.4, 50), (120.7, 16)])
def test_windows_give_what_the_whole_image_gives(width: float, out: int):
    image = np.random.default_rng(0).integers(0, 256, (150, 180, 3)).astype(np.uint8)
    xy = np.array([[90.0, 70.0], [3.3, 149.0], [179.5, 10.2], [100.4, 80.6]])
    pad = 200
    padded = Image.fromarray(np.pad(image, ((pad, pad), (pad, pad), (0, 0)), constant_values=255))
    for (x, y), tile in zip(xy + pad, cut_tiles(image, xy, width, out), strict=True):
        box = (x - width / 2, y - width / 2, x + width / 2, y + width / 2)
        want = np.asarray(padded.resize((out, out), Image.Resampling.BICUBIC, box=box)).astype(int)
        # Filter weights are rounded: a pixel may differ by one.
        assert np.abs(want - tile).max() <= 1


def test_outside_is_white():
    tile = cut_tiles(np.zeros((50, 50, 3), np.uint8), np.array([[0.0, 25.0], [200.0, 25.0]]), 20, 20)
    assert (tile[0, :, :8] == 255).all()
    assert (tile[0, :, 12:] == 0).all()
    assert (tile[1, :, 10:] == 255).all()


def test_limit_resolution_moves_scale_and_positions_together():
    image = gradient(100, 160)
    small, mpp, scale = limit_resolution(image, 0.5, 2.0)
    assert small.shape == (25, 40, 3)
    assert mpp == 2.0
    assert scale == 0.25
    same, mpp, scale = limit_resolution(image, 4.0, 2.0)
    assert same is image
    assert (mpp, scale) == (4.0, 1.0)


def test_two_scans_of_one_tissue_give_one_tile():
    rng = np.random.default_rng(0)
    coarse = np.kron(rng.integers(60, 200, (20, 20, 1)), np.ones((10, 10, 3))).astype(np.uint8)
    fine = np.kron(coarse, np.ones((4, 4, 1))).astype(np.uint8)
    small, mpp, scale = limit_resolution(fine, 0.5, 2.0)
    a = cut_tiles(small, np.array([[400.0, 400.0]]) * scale, 128 / mpp, 32)
    b = cut_tiles(coarse, np.array([[100.0, 100.0]]), 128 / 2.0, 32)
    assert np.abs(a.astype(int) - b.astype(int)).mean() < 3


def test_stain_statistics_match_a_slow_formula():
    tiles = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    tiles[0] = 255
    density = -np.log10((tiles.astype(float) + 1) / 256)
    tissue = (density.mean(-1) > 0.05) & (density.mean(-1) < 1.5)
    stats = stain_stats(tiles)
    np.testing.assert_allclose(stats.od_mean, density[tissue].mean(0), atol=1e-5)
    np.testing.assert_allclose(stats.od_std, density[tissue].std(0), atol=1e-5)


def test_glass_alone_leaves_the_reference():
    assert stain_stats(np.full((3, 4, 4, 3), 255, np.uint8)) == StainStats(REFERENCE_MEAN, REFERENCE_STD)


def test_normalising_moves_every_section_to_the_reference():
    rng = np.random.default_rng(2)
    density = rng.normal([0.3, 0.35, 0.2], [0.08, 0.06, 0.05], (4, 32, 32, 3))
    tiles = np.clip(256 * 10**-density - 1, 0, 255).astype(np.uint8)
    out = normalise_stain(tiles, stain_stats(tiles))
    after = stain_stats(out)
    np.testing.assert_allclose(after.od_mean, REFERENCE_MEAN, atol=0.01)
    np.testing.assert_allclose(after.od_std, REFERENCE_STD, atol=0.01)
    # The order of brightness within a channel is unchanged.
    flat_in, flat_out = tiles[..., 0].ravel(), out[..., 0].ravel().astype(int)
    assert (np.diff(flat_out[np.argsort(flat_in, kind="stable")]) >= 0).all()
