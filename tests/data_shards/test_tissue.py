"""The tissue mask holds in any exposure and under any lamp, and in a picture without glass."""

from pathlib import Path

import numpy as np
import pytest
from comtip_shards.qc.context import CELL, SectionContext
from comtip_shards.qc.picture import background
from comtip_shards.qc.result import FAIL, WARN
from comtip_shards.sections.section import Section, SectionMeta
from PIL import Image
from scipy import ndimage, sparse

MPP = 4.0
SIDE = 400


def picture(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return an H&E-like picture, float (H, W, 3) from 0 to 255, with tissue in its left half, and where tissue is."""
    tissue = np.zeros((SIDE, SIDE), bool)
    tissue[:, : SIDE // 2] = True
    eosin = 0.16 + 0.06 * ndimage.gaussian_filter(rng.normal(size=(SIDE, SIDE)), 2) / 0.14
    nuclei = np.clip(ndimage.gaussian_filter(rng.normal(size=(SIDE, SIDE)), 1.5) / 0.19, 0, 2)
    density = eosin[..., None] * [0.3, 1.0, 0.45] + 0.2 * nuclei[..., None] * [0.9, 1.0, 0.5]
    density = np.where(tissue[..., None], np.clip(density, 0, 2), 0.02)
    return 255 * 10**-density + rng.normal(0, 0.6, (SIDE, SIDE, 1)), tissue


def context(pixels: np.ndarray) -> SectionContext:
    """Return a section with spots on every lattice position of the picture."""
    pixels = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    xy = np.stack(np.meshgrid(*(np.arange(30.0, n - 20, 37.5) for n in pixels.shape[1::-1])), -1).reshape(-1, 2)
    meta = SectionMeta(
        section_id="a",
        dataset="d",
        species="human",
        tissue="breast",
        donor="",
        platform="",
        licence="",
        attribution="",
        mpp=MPP,
        spot_diameter_um=110,
        spot_pitch_um=150,
    )
    counts = sparse.csr_matrix((len(xy), 1), dtype=np.int32)
    ids = [str(i) for i in range(len(xy))]
    section = Section(meta, None, counts, ["g"], [""], ids, xy, xy, [""] * len(xy))  # type: ignore[arg-type]
    return SectionContext(section, pixels, MPP, 1.0, np.zeros((0, 96, 96, 3), np.uint8), np.zeros((0, 2)), 224.0)


LAMPS = {
    "as scanned": np.ones(3),
    "underexposed": np.full(3, 0.45),
    "dim": np.full(3, 0.7),
    "overexposed": np.full(3, 1.02),
    "warm": np.array([1, 0.96, 0.85]),
    "cool": np.array([0.88, 0.95, 1]),
    "dim and warm": np.array([0.7, 0.68, 0.6]),
    "uneven": np.linspace(0.6, 1, SIDE)[None, :, None],
    "uneven, from below": np.linspace(1, 0.6, SIDE)[:, None, None],
}


@pytest.mark.parametrize("lamp", LAMPS)
def test_tissue_and_glass_are_distinguished_in_any_exposure(lamp: str):
    pixels, tissue = picture(np.random.default_rng(0))
    found = context(pixels * LAMPS[lamp])
    want = tissue[::CELL, ::CELL]
    inner = ndimage.binary_erosion(want, iterations=6)
    outer = ndimage.binary_erosion(~want, iterations=10)
    assert found.tissue[inner].mean() > 0.95
    assert found.tissue[outer].mean() < 0.02


@pytest.mark.parametrize("exposure", [0.3, 0.45, 0.7, 1.0])
def test_a_picture_full_of_tissue_is_tissue(exposure: float):
    pixels, _ = picture(np.random.default_rng(1))
    found = context(pixels[:, : SIDE // 2] * exposure)
    assert found.on_tissue(found.xy).mean() > 0.95


SAMPLES = Path(__file__).parents[2] / "data_shards/samples"
CROPS = {
    "pale corner, bulb": ("mob_st2k/MOB4_HE.jpg", 1, (590, 638, 1265, 807)),
    "pale strip, bulb": ("mob_st2k/MOB1_HE.jpg", 1, (606, 834, 1256, 1140)),
    "smooth stroma": ("her2st/C2_HE.jpg", 2, (506, 922, 1090, 1123)),
    "smooth stroma, smaller": ("her2st/C2_HE.jpg", 2, (522, 910, 1016, 1210)),
}


@pytest.mark.parametrize("crop", CROPS)
def test_pale_smooth_tissue_is_not_taken_for_glass(crop: str):
    """Real sections, cropped to tissue: few px are smooth and pale, and a plane through them is steep or magenta."""
    name, factor, box = CROPS[crop]
    with Image.open(SAMPLES / name) as image:
        pixels = np.asarray(image.convert("RGB").reduce(factor).crop(box), float)
    found = context(pixels)
    assert found.tissue.mean() > 0.95
    assert found.on_tissue(found.xy).mean() > 0.95


def test_little_glass_is_glass():
    """A real gap of 3 % of the picture, at one side, in any exposure and under a lamp with a hue."""
    pixels, _ = picture(np.random.default_rng(3))
    tissue = pixels[:, : SIDE // 2]
    with_gap = np.concatenate([tissue, tissue, pixels[:, SIDE - 12 :]], 1)
    for lamp in (1.0, 0.45, np.array([1, 0.96, 0.85])):
        found = context(with_gap * lamp).tissue
        assert found[:, : SIDE // CELL - 8].mean() > 0.95
        assert found[:, -2:].mean() < 0.3


def test_masked_tissue_of_a_dense_array_is_background():
    """Gaps of 40 um between squares are closed by the smoothing of the tissue mask, but are flat."""
    pixels, _ = picture(np.random.default_rng(2))
    full = np.tile(pixels[:, : SIDE // 2], (1, 2, 1))
    spots = context(full).xy
    masked = np.full_like(full, 250)
    for x, y in spots.astype(int):
        masked[y - 12 : y + 13, x - 12 : x + 13] = full[y - 12 : y + 13, x - 12 : x + 13]
    assert background(context(masked)).status in (WARN, FAIL)
    assert background(context(full)).status not in (WARN, FAIL)
