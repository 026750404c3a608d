"""The readout: its closed form, its features, its file, and how a model with and without one predicts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from comtip_shards import ShardSet
from comtip_shards.slides.tiles import normalise_stain
from safetensors.numpy import save_file

from comtip_fast.config.io import load_config
from comtip_fast.export import Bundle
from comtip_fast.export_checks import HASHED, READOUT, SUMS, write_sums
from comtip_fast.genes.vectors import GeneVectors
from comtip_fast.inference import GeneQuery, Predictor, predict_trained
from comtip_fast.models.readout.features import (
    BLOCKS,
    LAST_NAME,
    STAGES_NAME,
    ReadoutSettings,
    feature_width,
    frozen_columns,
    penalty_scale,
    tile_features,
    turn_tiles,
)
from comtip_fast.models.readout.heads import NORMS, CohortHead, NormHead, Readout
from comtip_fast.models.readout.section_statistics import ADJACENT, neighbour_mean, standardise
from comtip_fast.training.readout import fit as fitting
from comtip_fast.training.readout.solve import (
    KINDS,
    CohortData,
    ReadoutGrid,
    RidgePath,
    SectionTable,
    fit_cohort,
    mixture,
)
from comtip_fast.training.task import build_task

F, G = 12, 9
KEYS = [f"human:G{i}" for i in range(G)]


def fit(
    train: list[SectionTable],
    valid: list[SectionTable],
    settings: ReadoutSettings,
    *,
    cohort: str = "human_breast",
    grid: ReadoutGrid | None = None,
    n_donors: int = 1,
    kinds: tuple[str, ...] = ("linear",),
) -> CohortHead:
    data = CohortData(cohort, KEYS, train, valid, np.zeros(F), np.ones(F), np.arange(G), n_donors)
    return fit_cohort(data, settings, kinds=kinds, grid=grid)


def section(seed: int, n: int = 40, measured: np.ndarray | None = None, rank: int = 2) -> SectionTable:
    """Expression of ``rank`` programmes that are linear in the features, plus noise; one map for all seeds."""
    rng, same = np.random.default_rng(seed), np.random.default_rng(99)
    x = standardise(rng.normal(size=(n, F)), np.zeros(F), np.ones(F))
    y = 2 + x @ same.normal(size=(F, rank)) @ same.normal(size=(rank, G)) + 0.5 * rng.normal(size=(n, G))
    measured = np.ones(G, bool) if measured is None else measured
    y = np.where(measured, y, 0.0)
    return SectionTable(x, {"cp10k": y, "raw": 2 * y + 1}, measured)


def test_with_all_programmes_it_is_ridge_regression_per_gene() -> None:
    sections, alpha = [section(1), section(2, 55)], 0.7
    head = RidgePath(sections, "cp10k").fit(0, alpha)
    got = sections[0].x_NF @ head.weight_FK @ head.loading_KG * head.std_G + head.mean_G
    x = np.concatenate([s.x_NF for s in sections])
    y = np.concatenate([s.y["cp10k"] - s.y["cp10k"].mean(0) for s in sections])
    # Ridge by augmented least squares: another computation of the same estimate.
    stacked = np.concatenate([x, np.sqrt(alpha * len(x)) * np.eye(F)])
    weight = np.linalg.lstsq(stacked, np.concatenate([y, np.zeros((F, G))]), rcond=None)[0]
    mean = np.concatenate([s.y["cp10k"] for s in sections]).mean(0)
    np.testing.assert_allclose(got, sections[0].x_NF @ weight + mean, atol=1e-8)


@pytest.mark.parametrize("n", [6, 40])
def test_programmes_are_the_leading_singular_vectors(n: int) -> None:
    """Fewer spots than features take the other decomposition."""
    one = section(1, n)
    head = RidgePath([one], "cp10k").fit(2, 0.3)
    y = one.y["cp10k"] - one.y["cp10k"].mean(0)
    y = y / y.std(0)
    right = np.linalg.svd(y)[2][:2]
    weight = np.linalg.solve(one.x_NF.T @ one.x_NF + 0.3 * n * np.eye(F), one.x_NF.T @ (y @ right.T))
    np.testing.assert_allclose(one.x_NF @ head.weight_FK @ head.loading_KG, one.x_NF @ weight @ right, atol=1e-8)


def test_a_gene_that_one_section_measured_is_learnt_from_that_section() -> None:
    measured = np.ones(G, bool)
    measured[3] = False
    both = [section(1), section(2, measured=measured)]
    head = RidgePath(both, "cp10k").fit(2, 0.1)
    test = section(3)
    predicted = test.x_NF @ head.weight_FK @ head.loading_KG * head.std_G + head.mean_G
    pcc = [np.corrcoef(test.y["cp10k"][:, g], predicted[:, g])[0, 1] for g in range(G)]
    assert pcc[3] > 0.8 * np.mean(pcc), pcc
    np.testing.assert_allclose(head.mean_G[3], both[0].y["cp10k"][:, 3].mean())


def test_strength_is_chosen_on_validation_and_else_by_leaving_sections_out() -> None:
    train, valid = [section(1), section(2)], [section(3)]
    grid = ReadoutGrid(programmes=(1, 2), alphas=(0.1, 1e6))
    settings = ReadoutSettings(2, (), F)
    by_val = fit(train, valid, settings, grid=grid)
    assert by_val.facts["chosen_on"] == "val"
    assert (by_val.facts["vector"]["cp10k"]["programmes"], by_val.facts["vector"]["cp10k"]["alpha"]) == (2, 0.1)
    alone = fit(train, [], settings, grid=grid)
    assert (alone.facts["chosen_on"], alone.facts["vector"]["raw"]["programmes"]) == ("train", 2)
    # Validation sections choose, and move no weight.
    again = RidgePath(train, "cp10k").fit(2, 0.1)
    np.testing.assert_allclose(by_val.blocks["vector"]["cp10k"].weight_FK, again.weight_FK, rtol=1e-10)
    one = fit(train[:1], [], settings)
    assert one.facts["vector"]["cp10k"]["score"] is None


def test_blocks_are_fitted_apart_on_their_own_columns_and_averaged() -> None:
    """Columns: 4 of z and 2 frozen, then their neighbours' means in the same order."""
    settings = ReadoutSettings(2, (ADJACENT,), 4)
    assert settings.columns("vector", F).tolist() == [0, 1, 2, 3, 6, 7, 8, 9]
    assert settings.columns("frozen", F).tolist() == [4, 5, 10, 11]
    train = [section(1), section(2)]
    head = fit(train, [], settings, n_donors=2)
    assert head.mix["raw"] == pytest.approx({"vector": 0.8 / 3, "frozen": 1.6 / 3, "levels": 0.2})
    readout, x = Readout(settings, [head]), section(3).x_NF
    want = np.zeros((len(x), G))
    for block, weight in (("vector", 1 / 3), ("frozen", 2 / 3)):
        part = head.blocks[block]["cp10k"]
        scores = x[:, settings.columns(block, F)] @ part.weight_FK
        want += weight * (scores @ part.loading_KG * part.std_G + part.mean_G)
    np.testing.assert_allclose(readout.predict(x, KEYS)[0]["cp10k"], want, rtol=1e-4)
    np.testing.assert_allclose(readout.levels_weight([KEYS[0], "human:NEW"]), [0.2, 0])


@pytest.mark.parametrize("n", [60, 400])
def test_float32_features_give_the_weights_of_float64_ones(n: int) -> None:
    """Both decompositions, with features that are nearly collinear, as those of neighbouring spots are."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 8)) @ rng.normal(size=(8, 150)) + 1e-3 * rng.normal(size=(n, 150))
    y = x @ rng.normal(size=(150, G)) / 10 + rng.normal(size=(n, G))
    measured = np.ones(G, bool)
    exact, rounded = (SectionTable(x.astype(kind), {"cp10k": y}, measured) for kind in (np.float64, np.float32))
    want, found = (RidgePath([s], "cp10k").fit(0, 0.3) for s in (exact, rounded))
    predicted = [head.scores(x) @ head.loading_KG for head in (want, found)]
    np.testing.assert_allclose(predicted[1], predicted[0], atol=1e-4 * predicted[0].std())


def test_columns_of_a_block_have_the_means_within_every_radius() -> None:
    settings = ReadoutSettings(2, (1.3, 3.4), 2)
    assert settings.width(9) == 3
    assert settings.columns("vector", 9).tolist() == [0, 1, 3, 4, 6, 7]
    assert settings.columns("frozen", 9).tolist() == [2, 5, 8]


def test_the_penalty_weights_features_by_their_scale() -> None:
    """A feature with factor s in the penalty is one whose values are multiplied by s, and the head is that of the features as given."""
    settings, train, test = ReadoutSettings(2, (), F), [section(1), section(2)], section(3)
    scale = np.linspace(0.2, 3, F)
    data = CohortData("human_breast", KEYS, train, [], np.zeros(F), np.ones(F), np.arange(G), scale_F=scale)
    grid = ReadoutGrid(programmes=(2,), alphas=(5.0,))
    head = fit_cohort(data, settings, kinds=["linear"], grid=grid).blocks["vector"]["cp10k"]
    scaled = [replace(s, x_NF=s.x_NF * scale) for s in train]
    want = RidgePath(scaled, "cp10k").fit(2, 5.0)
    np.testing.assert_allclose(head.scores(test.x_NF), want.scores(test.x_NF * scale), rtol=1e-9)
    plain = fit(train, [], settings, grid=grid).blocks["vector"]["cp10k"]
    assert np.abs(head.weight_FK - plain.weight_FK).max() > 0.01


def test_every_stage_of_the_stem_has_equal_weight_in_the_penalty(bundle: Bundle) -> None:
    assert bundle.readout is not None
    settings, stem = bundle.readout.settings, bundle.model.vision.stem
    power = np.square(penalty_scale(bundle.model, settings)).reshape(1 + len(settings.radii), -1)
    assert (power[:, : settings.vector_dim] == 1).all()
    frozen = power[:, settings.vector_dim :].reshape(len(power), 2, -1)
    ends = np.cumsum(stem.stage_widths)
    of_stages = [part.sum(-1) for part in np.split(frozen, ends[:-1], axis=-1)]
    np.testing.assert_allclose(of_stages, ends[-1] / len(ends), rtol=1e-12)
    assert frozen.shape[-1] == ends[-1]


def test_the_head_on_learnt_features_can_require_several_donors() -> None:
    both = ["vector", "frozen"]
    assert mixture(both, "kernel", 1, 1) == pytest.approx({"vector": 0.4, "frozen": 0.4, "levels": 0.2})
    assert mixture(both, "linear", 1, 1) == pytest.approx({"vector": 0.8 / 3, "frozen": 1.6 / 3, "levels": 0.2})
    for kind in KINDS:
        assert mixture(both, kind, 1, 2) == pytest.approx({"vector": 0.0, "frozen": 2 / 3, "levels": 1 / 3})
        assert mixture(["vector"], kind, 1, 2) == pytest.approx({"vector": 2 / 3, "levels": 1 / 3})
    assert mixture(both, "kernel", 3, 2)["vector"] == pytest.approx(0.4)


def readout_of(sections: list[SectionTable], cohort: str = "human_breast") -> Readout:
    settings = ReadoutSettings(2, (), F)
    return Readout(settings, [fit(sections, [], settings, cohort=cohort)])


def test_unseen_genes_follow_the_genes_that_their_vectors_resemble() -> None:
    train = [section(1), section(2)]
    readout = readout_of(train)
    same = np.random.default_rng(99)
    same.normal(size=(F, 2))
    true = same.normal(size=(2, G)).T  # the programmes of the synthetic genes
    rng = np.random.default_rng(5)
    new = rng.normal(size=(6, 2))
    keys = [f"human:G{i}" for i in range(G)] + [f"human:N{i}" for i in range(6)]
    # Readout and vectors are both of standardised genes.
    unit = np.concatenate([true, new]) / np.linalg.norm(np.concatenate([true, new]), axis=1, keepdims=True)
    vector = unit @ rng.normal(size=(2, 3))
    moments = np.tile([2.0, 1.5, 3.0, 0.5], (len(keys), 1))
    vectors = GeneVectors(keys, vector.astype(np.float32), moments.astype(np.float32), np.ones(len(keys), np.float32))
    test = section(4)
    asked = [keys[0], *keys[G:], "human:NOTHING"]
    values, known = readout.predict(test.x_NF, asked, vectors=vectors)
    assert known.tolist() == [True] * 7 + [False]
    first = np.random.default_rng(99)
    scores = test.x_NF @ first.normal(size=(F, 2))
    for i in range(6):
        assert np.corrcoef(values["cp10k"][:, 1 + i], scores @ new[i])[0, 1] > 0.9
    np.testing.assert_allclose(values["cp10k"][:, 1:7].mean(0), 2.0, atol=1e-4)
    without, known = readout.predict(test.x_NF, asked)
    assert known.tolist() == [True] + [False] * 7
    np.testing.assert_array_equal(without["cp10k"][:, 0], values["cp10k"][:, 0])
    one = np.ones((1, 3), np.float32)
    strange = GeneVectors(["human:N"], one, np.ones((1, 4), np.float32), one[0, :1])
    with pytest.raises(ValueError, match="contain 0 of the 9 genes of a head of the readout"):
        readout.predict(test.x_NF, ["human:N"], vectors=strange)
    zero = replace(vectors, vector_GK=np.where(np.arange(len(keys))[:, None] < G, 0, vectors.vector_GK))
    with pytest.raises(ValueError, match=f"gene vectors of all {G} genes of a head .* are 0"):
        readout.predict(test.x_NF, asked, vectors=zero)
    other = GeneVectors(["mouse:N"], one, np.ones((1, 4), np.float32), one[0, :1])
    assert not readout.predict(test.x_NF, ["mouse:N"], vectors=other)[1].any()


def test_the_head_of_the_cohort_is_used_and_else_the_mean_over_heads() -> None:
    a, b = readout_of([section(1)], "human_breast"), readout_of([section(8)], "human_lung")
    both = Readout(a.settings, [*a.heads, *b.heads])
    x, key = section(3).x_NF, ["human:G1"]
    of_a, of_b = a.predict(x, key)[0]["cp10k"], b.predict(x, key)[0]["cp10k"]
    np.testing.assert_array_equal(both.predict(x, key, "human_lung")[0]["cp10k"], of_b)
    for cohort in (None, "human_skin"):
        np.testing.assert_allclose(both.predict(x, key, cohort)[0]["cp10k"], (of_a + of_b) / 2, rtol=1e-5)


def test_neighbours_and_standardisation() -> None:
    xy = np.array([[0, 0], [10, 0], [20, 0], [0, 10], [500, 500]], float)
    x = np.arange(5.0)[:, None]
    np.testing.assert_allclose(neighbour_mean(x, xy)[:, 0], [2.0, 1.0, 1.0, 0.0, 4.0])
    few, mean, std = np.ones((3, 1)) * 7, np.array([5.0]), np.array([2.0])
    np.testing.assert_allclose(standardise(few, mean, std), 1.0)
    many = np.random.default_rng(0).normal(3, 4, (50, 1))
    out = standardise(many, mean, std)
    np.testing.assert_allclose([out.mean(), out.std()], [0, 1], atol=1e-12)
    assert neighbour_mean(x[:1], xy[:1]).shape == (1, 1)


def test_the_eight_views_are_the_eight_symmetries_of_a_square() -> None:
    tile = torch.arange(9).view(1, 1, 3, 3)
    views = {tuple(turn_tiles(tile, v).flatten().tolist()) for v in range(8)}
    assert len(views) == 8
    assert torch.equal(turn_tiles(tile, 0), tile)


def test_arrays_and_header_round_trip() -> None:
    readout = readout_of([section(1), section(2)])
    arrays, header = readout.to_arrays()
    again = Readout.from_arrays(arrays, json.loads(json.dumps(header)))
    assert again.settings == readout.settings
    x = section(3).x_NF
    np.testing.assert_allclose(again.predict(x, KEYS)[0]["raw"], readout.predict(x, KEYS)[0]["raw"], rtol=1e-4)


# -- in the product -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tiny_run: Path) -> Bundle:
    return Bundle.load(tiny_run / "export")


def test_a_finished_run_exports_a_readout_over_its_trained_genes(bundle: Bundle) -> None:
    assert bundle.readout is not None
    trained = {g.key for g in bundle.genes if g.trained}
    held_out = {g.key for g in bundle.genes if g.held_out}
    (head,) = bundle.readout.heads
    assert set(head.keys) == trained
    assert held_out, "the test needs genes that training did not see"
    assert head.facts["chosen_on"] == "val"
    assert set(head.blocks) == {"vector", "frozen"}


def tiles_of(shards: ShardSet, name: str):
    number = shards.section_number(name)
    spots = shards.select(sections=[number])
    xy = shards.spots.loc[spots, ["x_px", "y_px"]].to_numpy(float)
    return shards.tiles(spots).transpose(0, 3, 1, 2), shards.stain(number), xy


def queries(bundle: Bundle) -> list[GeneQuery]:
    return [GeneQuery(g.symbol, g.name, g.key) for g in bundle.genes] + [GeneQuery("XYZ1", "", "human:XYZ1")]


def test_trained_genes_come_from_the_readout_and_unseen_genes_still_from_their_sentences(
    bundle: Bundle, tiny_shards: ShardSet
) -> None:
    predictor = Predictor(bundle)
    features = predictor.image_features(*tiles_of(tiny_shards, "x1"))
    genes = queries(bundle)
    out = predictor.predict(features, genes, cohort="human_breast")
    assert all(np.isfinite(v).all() and v.std(0).min() > 0 for v in out.values())
    tokens, rows = predictor._tokens(genes)
    levels = predict_trained(bundle.model, tokens, torch.from_numpy(features.vector_ND), bundle.levels, rows)
    seen = np.array([g.key in bundle.readout.heads[0].keys for g in genes])
    np.testing.assert_allclose(out["cp10k"][:, ~seen], levels["cp10k"][:, ~seen], rtol=1e-5)
    share = bundle.readout.levels_weight([g.key for g in genes], "human_breast")
    np.testing.assert_array_equal(share > 0, seen)
    linear = bundle.readout.predict(features.readout_NF, [g.key for g in genes], "human_breast")[0]["cp10k"]
    mean_ND = features.readout_NF[:, : bundle.config.align.dim]
    unit = torch.from_numpy(mean_ND / np.linalg.norm(mean_ND, axis=1, keepdims=True))
    viewed = predict_trained(bundle.model, tokens, unit, bundle.levels, rows)["cp10k"]
    viewed = 0.5 * viewed + 0.5 * neighbour_mean(viewed, features.xy_N2)
    want = (1 - share) * linear + share * viewed
    np.testing.assert_allclose(out["cp10k"][:, seen], want[:, seen], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hashed", [True, False])
def test_an_export_of_version_1_loads_and_predicts_from_levels_as_before(
    tiny_run: Path, tiny_shards: ShardSet, tmp_path: Path, hashed: bool
) -> None:
    old = tmp_path / "old"
    shutil.copytree(tiny_run / "export", old)
    (old / READOUT).unlink()
    meta = json.loads((old / "config.json").read_text())
    meta["version"] = 1
    del meta["config"]["readout"], meta["readout"]
    if hashed:
        (old / "config.json").write_text(json.dumps(meta))
        write_sums(old, HASHED)
    else:
        del meta["hashes"]
        (old / "config.json").write_text(json.dumps(meta))
        (old / SUMS).unlink()
    predictor = Predictor.load(old)
    features = predictor.image_features(*tiles_of(tiny_shards, "x1"))
    assert features.readout_NF is None
    genes = queries(predictor.bundle)
    tokens, rows = predictor._tokens(genes)
    bundle = predictor.bundle
    levels = predict_trained(bundle.model, tokens, torch.from_numpy(features.vector_ND), bundle.levels, rows)
    np.testing.assert_array_equal(predictor.predict(features, genes)["raw"], levels["raw"])


def test_the_plain_vectors_do_not_depend_on_the_readout(bundle: Bundle, tiny_shards: ShardSet) -> None:
    with_readout = Predictor(bundle).image_features(*tiles_of(tiny_shards, "x1"))
    bare = Bundle(**{**vars(bundle), "readout": None})
    np.testing.assert_array_equal(
        Predictor(bare).image_features(*tiles_of(tiny_shards, "x1")).vector_ND, with_readout.vector_ND
    )


def test_embeddings_do_without_the_features_of_the_readout(bundle: Bundle, tiny_shards: ShardSet) -> None:
    predictor, tiles = Predictor(bundle), tiles_of(tiny_shards, "x1")
    with_features = predictor.image_features(*tiles)
    without = predictor.image_features(*tiles, readout=False)
    assert without.readout_NF is None
    np.testing.assert_array_equal(without.vector_ND, with_features.vector_ND)


def test_gene_vectors_need_a_readout_and_change_untrained_genes_only(bundle: Bundle, tiny_shards: ShardSet) -> None:
    keys = [*(g.key for g in bundle.genes), "human:XYZ1"]
    vector = np.random.default_rng(0).normal(size=(len(keys), 3)).astype(np.float32)
    moments = np.tile([2.0, 1.5, 3.0, 0.5], (len(keys), 1)).astype(np.float32)
    vectors = GeneVectors(keys, vector, moments, np.ones(len(keys), np.float32))
    with pytest.raises(ValueError, match="no readout"):
        Predictor(Bundle(**{**vars(bundle), "readout": None}), vectors=vectors)
    tiles, genes = tiles_of(tiny_shards, "x1"), queries(bundle)
    plain, decoding = Predictor(bundle), Predictor(bundle, vectors=vectors)
    one = plain.predict(plain.image_features(*tiles), genes)["cp10k"]
    two = decoding.predict(decoding.image_features(*tiles), genes)["cp10k"]
    trained = np.array([g.key in set(plain.trained_genes) for g in genes])
    np.testing.assert_array_equal(one[:, trained], two[:, trained])
    assert (np.abs(one - two)[:, ~trained].max(0) > 0).all()


def test_features_are_the_mean_over_views(bundle: Bundle, tiny_shards: ShardSet) -> None:
    tiles = torch.from_numpy(np.ascontiguousarray(tiles_of(tiny_shards, "x1")[0][:4]))
    with torch.no_grad():
        settings = [ReadoutSettings(n, vector_dim=bundle.config.align.dim) for n in (1, 2)]
        one, two = (tile_features(bundle.model, tiles, s)[1] for s in settings)
        turned = tile_features(bundle.model, turn_tiles(tiles, 6).contiguous(), settings[0])[1]
    torch.testing.assert_close(two, (one + turned) / 2, rtol=0, atol=1e-5)
    assert two.shape[1] == feature_width(bundle.model, settings[0]) == bundle.config.align.dim + 2 * 784


def test_statistics_of_features_under_autocast_are_those_of_fp32(bundle: Bundle, tiny_shards: ShardSet) -> None:
    """The stem runs in fp32 under autocast, and means and standard deviations of its stages are not rounded."""
    tiles = torch.from_numpy(np.ascontiguousarray(tiles_of(tiny_shards, "x1")[0][:4]))
    settings = ReadoutSettings(1, (), bundle.config.align.dim)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = tile_features(bundle.model, tiles, settings)[1]
        stages = bundle.model.vision.stem_stages(tiles)[1]
    assert stages.dtype == torch.float32
    want = torch.cat([stages.mean(1), stages.std(1)], dim=1)
    torch.testing.assert_close(features[:, settings.vector_dim :], want)


def test_features_of_all_stages_contain_those_that_the_encoder_embeds(bundle: Bundle, tiny_shards: ShardSet) -> None:
    model, dim = bundle.model, bundle.config.align.dim
    tiles = torch.from_numpy(np.ascontiguousarray(tiles_of(tiny_shards, "x1")[0][:4]))
    stages, encoded = ReadoutSettings(1, (), dim), ReadoutSettings(1, (), dim, stages=False)
    with torch.no_grad():
        plain, wanted = tile_features(model, tiles, encoded)
        output, found = tile_features(model, tiles, stages)
    torch.testing.assert_close(output.vector_BD, plain.vector_BD)
    torch.testing.assert_close(found[:, :dim], wanted[:, :dim])
    columns = frozen_columns(model, stages)
    assert list(frozen_columns(model, encoded)) == [LAST_NAME]
    assert columns[STAGES_NAME].size == 2 * 784
    stem = model.vision.stem
    mean, std = found[:, columns[LAST_NAME]].chunk(2, dim=1)
    standardised = torch.cat([(mean - stem.out_mean) / stem.out_std, std / stem.out_std], dim=1)
    torch.testing.assert_close(standardised, wanted[:, frozen_columns(model, encoded)[LAST_NAME]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("context", [True, False])
def test_a_readout_of_version_1_has_its_features(
    tiny_run: Path, tiny_shards: ShardSet, tmp_path: Path, context: bool
) -> None:
    """Version 1 stated ``context``: means over adjacent spots or none, and features that the encoder embeds."""
    old = tmp_path / "old"
    shutil.copytree(tiny_run / "export", old)
    now = Bundle.load(old)
    assert now.readout is not None
    model, dim = now.model, now.config.align.dim
    settings = ReadoutSettings(1, (ADJACENT,) if context else (), dim, stages=False)
    width = feature_width(model, settings) * (2 if context else 1)
    rng = np.random.default_rng(0)

    def head(block: str) -> NormHead:
        weight = rng.normal(size=(settings.columns(block, width).size, 2)) / 10
        return NormHead(weight, rng.normal(size=(2, 3)), rng.normal(size=3), rng.random(3))

    blocks = {b: {norm: head(b) for norm in NORMS} for b in settings.block_names(width)}
    mix = {"vector": 0.25, "frozen": 0.75, "levels": 0.0}
    keys = now.readout.heads[0].keys[:3]
    cohort = CohortHead("human_breast", keys, np.zeros(width), np.ones(width), blocks, dict.fromkeys(NORMS, mix))
    arrays, header = Readout(settings, [cohort]).to_arrays()
    header |= {"version": 1, "settings": {"views": 1, "context": context, "vector_dim": dim}}
    header["heads"][0]["mix"] = mix
    del header["heads"][0]["maps"]
    save_file(arrays, old / READOUT, metadata={"header": json.dumps(header)})
    write_sums(old, (*HASHED, READOUT))
    predictor = Predictor.load(old)
    tiles, stain, xy = tiles_of(tiny_shards, "x1")
    genes = [GeneQuery(k.split(":")[1], "", k) for k in keys]
    got = predictor.predict(predictor.image_features(tiles, stain, xy), genes, cohort="human_breast")["cp10k"]

    plain = predictor.encode(tiles.transpose(0, 2, 3, 1), stain)
    stem = model.vision.stem_features(
        torch.from_numpy(
            np.ascontiguousarray(normalise_stain(tiles.transpose(0, 2, 3, 1), stain).transpose(0, 3, 1, 2))
        )
    )
    x = np.concatenate([plain.vector_nD, stem.mean(1), stem.std(1)], axis=1).astype(np.float64)
    own = [np.arange(dim), np.arange(dim, x.shape[1])]
    if context:
        distance = np.linalg.norm(xy[:, None] - xy, axis=2)
        spacing = np.median(np.where(distance == 0, np.inf, distance).min(1))
        near = (distance <= 1.3 * spacing) & (distance > 0)
        around = np.where(near.any(1, keepdims=True), near @ x / np.maximum(near.sum(1, keepdims=True), 1), x)
        own = [np.concatenate([c, c + x.shape[1]]) for c in own]
        x = np.concatenate([x, around], axis=1)
    x = (x - x.mean(0)) / np.where(x.std(0) > 1e-9, x.std(0), 1)
    want = sum(
        weight * (x[:, columns] @ part.weight_FK @ part.loading_KG * part.std_G + part.mean_G)
        for weight, columns, part in zip((0.25, 0.75), own, (blocks[b]["cp10k"] for b in BLOCKS), strict=True)
    )
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-3)


def test_fitting_the_readout_leaves_the_random_state_and_the_weights(
    tiny_overrides: list[str],
) -> None:
    task = build_task(load_config(None, [*tiny_overrides, "train.device=cpu"]), torch.device("cpu"))
    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    state = torch.get_rng_state()
    copy = task._copy_of_model()
    assert torch.equal(torch.get_rng_state(), state)
    assert copy is not task.model
    assert all(torch.equal(before[k], v) for k, v in copy.state_dict().items())


def test_without_a_readout_nothing_of_it_is_exported(
    tiny_overrides: list[str], tmp_path: Path, tiny_shards: ShardSet
) -> None:
    config = load_config(None, [*tiny_overrides, "train.device=cpu", "readout.kind=levels"])
    build_task(config, torch.device("cpu")).export(tmp_path / "export")
    assert not (tmp_path / "export" / READOUT).exists()
    assert Predictor.load(tmp_path / "export").bundle.readout is None


@pytest.mark.parametrize("stem", [(), ("vision.stem=efficientnet_lite0",)], ids=["pixels", "stem"])
def test_the_readout_is_fitted_on_the_features_of_a_prediction(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch, stem: tuple[str, ...]
):
    """In bf16, too: heads that were fitted on other features than they are applied to would be biased."""
    config = load_config(None, [*tiny_overrides, "train.precision=bf16", "readout.max_spots=20", *stem])
    task, read = build_task(config, torch.device("cpu")), []
    real = fitting.tile_features

    def recorded(model, tiles, settings):
        read.append((tiles, real(model, tiles, settings)[1]))
        return None, read[-1][1]

    monkeypatch.setattr(fitting, "tile_features", recorded)
    readout = fitting.fit_readout(task.model, config, task.shards, task.tables, task.loader)
    predictor = Predictor(replace(task.bundle(), readout=readout))
    for tiles, features in read:
        views = predictor.encode(tiles.permute(0, 2, 3, 1).numpy(), None).views_nF
        np.testing.assert_array_equal(views, features.numpy())
    assert read
