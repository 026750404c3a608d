"""H&E is distinguished from other stains, on the real sample sections and on images mixed from known dyes."""

from pathlib import Path

import numpy as np
import pytest
from comtip_shards.slides.appearance import looks_like_he
from PIL import Image

SAMPLES = Path(__file__).parents[2] / "data_shards/samples"
# Optical density of each dye in red, green and blue (Macenko 2009; DAB from Ruifrok and Johnston 2001).
HAEMATOXYLIN, EOSIN, DAB = (0.56, 0.72, 0.41), (0.22, 0.80, 0.56), (0.27, 0.57, 0.78)


def stained(*dyes: tuple[float, float, float]) -> np.ndarray:
    """Return an image of 100 x 100 px whose left half is background and whose right half is tissue."""
    rng = np.random.default_rng(0)
    density = np.zeros((100, 100, 3))
    for dye in dyes:
        density[:, 50:] += rng.uniform(0.1, 0.6, (100, 50, 1)) * np.array(dye)
    return np.clip(256 * 10.0**-density - 1, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "name", ["her2st/A1_HE.jpg", "her2st/C3_HE.jpg", "mob_st2k/MOB1_HE.jpg", "mob_stahl2016/Rep9_HE.jpg"]
)
def test_real_sections_look_like_he(name: str):
    with Image.open(SAMPLES / name) as image:
        image.draft("RGB", (500, 500))
        rgb = np.asarray(image.convert("RGB"))
    looks, reason = looks_like_he(rgb)
    assert looks, reason
    grey = np.repeat(rgb.mean(-1, keepdims=True), 3, axis=-1).astype(np.uint8)
    assert not looks_like_he(grey)[0]
    assert not looks_like_he(255 - rgb)[0]


def test_dyes_are_distinguished():
    assert looks_like_he(stained(HAEMATOXYLIN, EOSIN))[0]
    for dyes, word in (((EOSIN,), "pure eosin"), ((DAB, HAEMATOXYLIN, DAB), "antibody"), ((), "blank")):
        looks, reason = looks_like_he(stained(*dyes))
        assert not looks
        assert word in reason


def test_fluorescence_is_reported():
    rng = np.random.default_rng(0)
    nuclei = np.zeros((100, 100, 3), np.uint8)
    assert "black" in looks_like_he(nuclei)[1]
    nuclei[..., 2] = rng.integers(80, 256, (100, 100))
    nuclei[..., :2] = 20
    looks, reason = looks_like_he(nuclei)
    assert not looks
    assert "fluorescence" in reason


def test_other_arrays_are_refused():
    with pytest.raises(ValueError, match=r"pass uint8 \(H, W, 3\) RGB"):
        looks_like_he(np.zeros((4, 4, 3)))
