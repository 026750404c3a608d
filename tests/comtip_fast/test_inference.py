"""Prediction in chunks: equal to prediction at once, and memory that grows with the answer only."""

from __future__ import annotations

import gc
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from comtip_shards import ShardSet, SourceError
from comtip_shards.slides.base import ArraySlide

from comtip_fast.api import Model
from comtip_fast.data.anndata_file import read_annotation, read_h5ad
from comtip_fast.data.tile_sources import ArrayTiles, ShardTiles, SlideTiles, TileChunk, TileGeometry, TileSource
from comtip_fast.export import Bundle
from comtip_fast.inference import GeneQuery, Predictor, levels, predict_section, section
from comtip_fast.models.readout import section_statistics
from comtip_fast.models.readout.section_statistics import (
    MIN_SECTION_SPOTS,
    Moments,
    Neighbours,
    neighbour_mean,
    neighbour_means,
)


def queries(bundle: Bundle) -> list[GeneQuery]:
    return [GeneQuery(g.symbol, g.name, g.key) for g in bundle.genes] + [GeneQuery("XYZ1", "", "human:XYZ1")]


def parts_of(shards: ShardSet, name: str):
    number = shards.section_number(name)
    spots = shards.source_order(number)
    return ShardTiles(shards, spots), shards.stain(number), shards.spots.loc[spots, ["x_px", "y_px"]].to_numpy(float)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every chunk smaller than the section: spots, genes, scores, and features in memory."""
    for name, value in {"MIN_BLOCK": 5, "MAX_BLOCK": 9, "FEATURES_IN_MEMORY": 1000, "GENES_PER_CHUNK": 7}.items():
        monkeypatch.setattr(section, name, value)
    monkeypatch.setattr(levels, "SCORE_BYTES", 4 * 7 * 5 * 3)


@pytest.mark.parametrize("readout", ["context", "alone", "none"])
@pytest.mark.parametrize("cohort", [None, "human_breast"])
@pytest.mark.usefixtures("small_blocks")
def test_blocks_of_spots_and_genes_give_the_prediction_of_the_whole(
    quick: Path, tiny_shards: ShardSet, readout: str, cohort: str | None
):
    bundle = Bundle.load(quick / "export")
    assert bundle.readout is not None
    assert bundle.readout.settings.context
    if readout == "none":
        bundle = replace(bundle, readout=None)
    predictor = Predictor(bundle)
    tiles, stain, xy = parts_of(tiny_shards, "x1")
    positions = None if readout == "alone" else xy
    genes = queries(bundle)
    whole = predictor.predict(predictor.image_features(tiles, stain, positions), genes, cohort=cohort)
    parts = predict_section(predictor, tiles, stain, positions, genes, cohort)
    for name, value in whole.items():
        assert parts[name].dtype == np.float32
        np.testing.assert_allclose(parts[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small_blocks")
def test_a_model_with_a_frozen_stem_predicts_the_same_in_blocks(tiny_run: Path, tiny_shards: ShardSet):
    predictor = Predictor.load(tiny_run)
    assert predictor.view_width > predictor.config.align.dim
    tiles, stain, xy = parts_of(tiny_shards, "x1")
    genes = queries(predictor.bundle)
    whole = predictor.predict(predictor.image_features(tiles, stain, xy), genes)
    parts = predict_section(predictor, tiles, stain, xy, genes)
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-5, atol=1e-5)
    assert len(predictor.fingerprint) == 64


def test_a_section_without_spots_or_with_one_is_predicted(quick: Path, tiny_shards: ShardSet):
    predictor = Predictor.load(quick)
    tiles, stain, xy = parts_of(tiny_shards, "x1")
    for n in (0, 1, 3):
        part = predict_section(
            predictor, ArrayTiles(tiles.all()[:n]), stain, xy[:n], [GeneQuery("ERBB2", "", "human:ERBB2")]
        )
        assert part["cp10k"].shape == (n, 1)
        assert np.isfinite(part["cp10k"]).all()


def test_moments_and_neighbours_of_parts_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    x, xy = rng.normal(1e3, 1, (MIN_SECTION_SPOTS * 3, 4)), rng.random((MIN_SECTION_SPOTS * 3, 2))
    moments = Moments()
    for part in np.split(x, [0, 1, 2, 30]):
        moments.add(part)
    np.testing.assert_allclose(moments.mean_F, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(moments.std_F, x.std(0), rtol=1e-10)
    near = Neighbours(xy, (1.3, 3.4))
    index, masks = near.of(np.arange(len(xy)))
    for rows in (np.arange(7), np.array([50, 3])):
        found, some = near.of(rows)
        np.testing.assert_array_equal(found, index[rows])
        for of_rows, of_all in zip(some, masks, strict=True):
            np.testing.assert_array_equal(of_rows, of_all[rows])
    assert neighbour_mean(x[:1], xy[:1]) is not None


def test_neighbours_within_several_radii_of_a_lattice():
    """All spots within a radius, but at most 6 adjacent ones and 46 within 3.4 spacings."""
    side = 15
    hexagonal = np.array([[i + 0.5 * (j % 2), j * 0.75**0.5] for j in range(side) for i in range(side)]) * 100
    x = np.random.default_rng(0).normal(size=(len(hexagonal), 3))
    adjacent, wide = neighbour_means(x, hexagonal, (1.3, 3.4))
    np.testing.assert_allclose(adjacent, neighbour_mean(x, hexagonal), rtol=1e-12)
    distance = np.linalg.norm(hexagonal[:, None] - hexagonal, axis=2) / 100
    middle = side * (side // 2) + side // 2
    for mean, radius, count in ((adjacent, 1.3, 6), (wide, 3.4, 36)):
        near = (distance[middle] <= radius) & (distance[middle] > 0)
        assert near.sum() == count
        np.testing.assert_allclose(mean[middle], x[near].mean(0))
    # Cells at the same position: the nearest 6 and 46 count.
    dense = np.concatenate([np.zeros((80, 2)), hexagonal + 10_000])
    index, (few, many) = Neighbours(dense, (1.3, 3.4)).of(np.arange(3))
    assert few.sum(1).max() <= 6
    assert many.sum(1).max() <= 46
    assert index.shape == (3, 47)


class GeneratedTiles(TileSource):
    """Random tiles that are drawn when they are read."""

    def __init__(self, n: int, tile_px: int) -> None:
        self.n, self.tile_px = n, tile_px

    def __len__(self) -> int:
        return self.n

    def chunks(self, size: int = 128) -> Iterator[TileChunk]:
        rng = np.random.default_rng(0)
        for start in range(0, self.n, size):
            rows = np.arange(start, min(start + size, self.n))
            yield TileChunk(rows, rng.integers(0, 256, (rows.size, self.tile_px, self.tile_px, 3), np.uint8))


def peak_beyond_the_answer(predictor: Predictor, n: int, *, at_once: bool) -> int:
    """Return the peak of allocated bytes, less the answer and the positions."""
    side = int(np.ceil(n**0.5))
    xy = np.stack(np.divmod(np.arange(n), side), axis=1).astype(float)
    tiles, genes = GeneratedTiles(n, predictor.tile_px), [GeneQuery("ERBB2", "", "human:ERBB2"), GeneQuery("XYZ1")]
    tracemalloc.start()
    if at_once:
        out = predictor.predict(predictor.image_features(tiles, None, xy), genes)
    else:
        out = predict_section(predictor, tiles, None, xy, genes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak - sum(v.nbytes for v in out.values()) - 2 * xy.nbytes


def test_memory_grows_with_the_answer_only(quick: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(section, "FEATURES_IN_MEMORY", 100_000)
    monkeypatch.setattr(section, "MAX_BLOCK", 256)  # below the smaller section, so that no chunk is a whole section
    monkeypatch.setattr(section_statistics, "QUERY_ROWS", 256)
    predictor = Predictor.load(quick)
    small, large = 1_500, 6_000
    first, second = (peak_beyond_the_answer(predictor, n, at_once=False) for n in (small, large))
    whole = peak_beyond_the_answer(predictor, large, at_once=True) - peak_beyond_the_answer(
        predictor, small, at_once=True
    )
    # Features of 4,500 more spots take 1.2 MB several times over; what is left is the search for neighbours.
    assert second - first < (large - small) * 100, (first, second)
    assert whole > 5 * (second - first), "the measure must see the features of a section"


def test_no_tensor_of_scores_grows_with_spots(quick: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    plain = levels.expected_values

    def counted(image_ND, unit_GQD, *rest):
        seen.append(4 * image_ND.shape[0] * unit_GQD.shape[0] * unit_GQD.shape[1])
        return plain(image_ND, unit_GQD, *rest)

    monkeypatch.setattr(levels, "expected_values", counted)
    monkeypatch.setattr(levels, "SCORE_BYTES", 20_000)
    predictor = Predictor.load(quick)
    genes = queries(predictor.bundle)
    predict_section(predictor, GeneratedTiles(400, predictor.tile_px), None, None, genes)
    assert len(seen) > 5
    assert max(seen) <= 20_000


def test_the_image_encoder_and_the_sentences_run_in_the_precision_of_the_run(quick: Path):
    bundle = Bundle.load(quick / "export")
    tile = np.random.default_rng(0).integers(0, 256, (4, bundle.sizes.tile_px, bundle.sizes.tile_px, 3), np.uint8)
    answers = {}
    for precision in ("auto", "fp32", "bf16"):
        config = replace(bundle.config, train=replace(bundle.config.train, precision=precision))
        predictor, dtypes = Predictor(replace(bundle, config=config)), set()
        for module in (predictor.model.project_image.deep[1], predictor.model.project_text.deep[1]):
            module.register_forward_hook(lambda _m, _i, out, dtypes=dtypes: dtypes.add(out.dtype))
        answers[precision] = predict_section(predictor, ArrayTiles(tile), None, None, [GeneQuery("XYZ1")])["cp10k"]
        assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float32}
    np.testing.assert_array_equal(answers["auto"], answers["fp32"])
    np.testing.assert_allclose(answers["bf16"], answers["fp32"], rtol=0.05, atol=0.02)


def test_tiles_of_a_slide_are_read_once_in_chunks_and_in_any_order():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (400, 300, 3), np.uint8)
    xy = rng.uniform(0, 300, (50, 2))
    tile, opened = TileGeometry(16, 64.0, 4.0), []

    def opener():
        opened.append(1)
        return ArraySlide(pixels, Path("x.png"))

    tiles = SlideTiles(opener, xy, 2.0, tile)
    chunks = list(tiles.chunks(8))
    assert max(len(c.rows) for c in chunks) == 8
    assert np.array_equal(np.sort(np.concatenate([c.rows for c in chunks])), np.arange(50))
    assert len(opened) == 1
    np.testing.assert_array_equal(tiles.all(), ArraySlide(pixels, Path("x.png")).tiles(xy, 2.0, 64.0, 16, 4.0))


def test_an_h5ad_is_predicted_without_reading_its_counts(quick: Path, tiny_shards: ShardSet, tmp_path: Path):
    model = Model(Predictor.load(quick))
    data = model.embed(f"{tiny_shards.path}:x1")
    data = ad.AnnData(np.full((data.n_obs, 30), np.nan, np.float32), data.obs, obsm=data.obsm, uns=data.uns)
    data.layers["counts"] = data.X.copy()
    data.write_h5ad(tmp_path / "a.h5ad")
    seen = read_annotation(tmp_path / "a.h5ad")
    assert (seen.shape, seen.X, list(seen.layers)) == ((49, 30), None, [])
    np.testing.assert_array_equal(seen.obsm["spatial"], read_h5ad(tmp_path / "a.h5ad").obsm["spatial"])
    answer = model.predict(tmp_path / "a.h5ad", ["ERBB2"])
    assert np.isfinite(answer.X).all()


def test_tiles_are_read_ahead_in_order_and_errors_reach_the_caller():
    class Damaged(GeneratedTiles):
        def chunks(self, size: int = 128) -> Iterator[TileChunk]:
            yield from super().chunks(size)
            raise SourceError("a window cannot be decoded")

    tiles = GeneratedTiles(30, 8)
    for one, two in zip(tiles.ahead(7), tiles.chunks(7), strict=True):
        np.testing.assert_array_equal(one.rows, two.rows)
        np.testing.assert_array_equal(one.tiles_NSS3, two.tiles_NSS3)
    with pytest.raises(SourceError, match="cannot be decoded"):
        list(Damaged(30, 8).ahead(7))
    before = threading.active_count()
    for _ in GeneratedTiles(3000, 8).ahead(7):
        break
    gc.collect()
    assert threading.active_count() <= before


def test_the_fingerprint_is_of_the_weights_the_levels_and_the_readout(quick: Path):
    plain = Predictor.load(quick).fingerprint
    assert Predictor.load(quick).fingerprint == plain
    found = {plain}
    for change in ("weight", "levels", "readout", "scalar"):
        bundle = Bundle.load(quick / "export")
        assert bundle.readout is not None
        if change == "weight":
            bundle.model.project_image.skip.bias.data[0] += 1e-3
        elif change == "levels":
            bundle.levels.log_prior[0, 0] += 1e-3
        elif change == "readout":
            bundle.readout.heads[0].mean_F[0] += 1e-3
        else:  # as the counters of batch norms are
            bundle.model.register_buffer("counter", torch.tensor(3))
        found.add(Predictor(bundle).fingerprint)
    assert len(found) == 5
