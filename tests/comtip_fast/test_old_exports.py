"""An export that an early release wrote gives the same predictions as that release.

``fixtures/export_version_1`` was written by commit 7921d93 (2026-11-23, version 0.1.0) after 200 steps on a tiny synthetic source;
its predictions for the tiles of :func:`tiles` are in ``export_version_1_predictions.safetensors``, computed by the same commit.
Its settings are in ``config.json``; its model card was removed.
"""

from pathlib import Path

import numpy as np
import pytest
from comtip_shards.slides.tiles import StainStats
from safetensors.numpy import load_file

from comtip_fast.inference import GeneQuery, Predictor

FIXTURES = Path(__file__).parent / "fixtures"
EXPORT = FIXTURES / "export_version_1"
BOUND = 2e-5
"""Largest difference, relative to the largest value of the array: rounding of fp32 in another order of operations."""
STAINS = {"": None, "_stain": StainStats((0.4, 0.5, 0.3), (0.2, 0.15, 0.1))}


def tiles() -> np.ndarray:
    """Return uint8 tiles (4, 3, 32, 32) of several colours."""
    n = 4 * 3 * 32 * 32
    out = (np.arange(n, dtype=np.uint64) * 2654435761 % 2**32 >> 24).astype(np.uint8).reshape(4, 3, 32, 32)
    out[1] //= 2
    out[2] = 255 - out[2] // 3
    out[3, 0] = 90
    return out


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor.load(EXPORT, "cpu")


@pytest.mark.parametrize("stain", sorted(STAINS))
def test_an_export_of_version_1_gives_the_same_predictions(stain: str, predictor: Predictor):
    expected = load_file(FIXTURES / "export_version_1_predictions.safetensors")
    genes = [GeneQuery(g.symbol, g.name, g.key) for g in predictor.bundle.genes]
    genes.append(GeneQuery("EGFR", "epidermal growth factor receptor"))  # not in the export
    features = predictor.image_features(tiles(), STAINS[stain])
    found = {"vector": features.vector_ND, **predictor.predict(features, genes)}
    for name in ("vector", "cp10k", "raw"):
        want = expected[name + stain]
        assert found[name].shape == want.shape
        assert np.abs(found[name] - want).max() <= BOUND * np.abs(want).max(), name
        assert np.abs(want - want[:1]).max() > 1000 * BOUND * np.abs(want).max(), name  # tiles differ by more


def test_what_an_export_of_version_1_lacks_is_none(predictor: Predictor):
    bundle = predictor.bundle
    assert bundle.readout is None
    assert bundle.lineage is not None
    assert not bundle.lineage.parents_known
    assert [s["section_id"] for s in bundle.sections] == ["t1", "t2", "v1", "x1"]
    assert sum(p.stat().st_size for p in [*EXPORT.iterdir(), *FIXTURES.glob("export_*.safetensors")]) < 100_000
