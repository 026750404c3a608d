"""Heads of the readout by kernel ridge regression: against direct formulas, in exports, and in adapted models."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy.spatial.distance import cdist

from comtip_fast.adaptation import correction
from comtip_fast.adaptation.correction import Correction, base_head, corrected_head, with_head
from comtip_fast.export import Bundle
from comtip_fast.inference import GeneQuery, ImageFeatures, Predictor
from comtip_fast.inference import section as section_module
from comtip_fast.inference.section import SectionPrediction
from comtip_fast.models.readout import heads as heads_module
from comtip_fast.models.readout import kernel_map
from comtip_fast.models.readout.features import ReadoutSettings
from comtip_fast.models.readout.heads import NORMS, CohortHead, Readout
from comtip_fast.models.readout.kernel_map import FeatureMap, KernelMap, join
from comtip_fast.models.readout.section_statistics import standardise
from comtip_fast.training.readout.solve import CohortData, ReadoutGrid, SectionTable, fit_cohort

F, G = 9, 6
KEYS = [f"human:G{i}" for i in range(G)]
SETTINGS = ReadoutSettings(views=1, radii=(), vector_dim=4)
FIXED = ReadoutGrid(programmes=(0,), alphas=(0.7,))


def section(seed: int, n: int = 50) -> SectionTable:
    """Expression that is not linear in the features: the same function for all seeds, and noise."""
    rng, same = np.random.default_rng(seed), np.random.default_rng(9)
    x = standardise(rng.normal(size=(n, F)), np.zeros(F), np.ones(F))
    y = np.square(x @ same.normal(size=(F, G)) / 3) + 0.1 * rng.normal(size=(n, G))
    return SectionTable(x, {"cp10k": y, "raw": 2 * y + 1}, np.ones(G, bool))


def fit(
    train: list[SectionTable], *, kinds: tuple[str, ...] = ("kernel",), grid: ReadoutGrid | None = FIXED
) -> CohortHead:
    scale = np.linspace(0.5, 2, F)
    data = CohortData("human_breast", KEYS, train, [], np.zeros(F), np.ones(F), np.arange(G), scale_F=scale)
    return fit_cohort(data, SETTINGS, kinds=kinds, grid=grid)


def matern(a: np.ndarray, b: np.ndarray, length: float) -> np.ndarray:
    r = np.sqrt(3) * cdist(a, b) / length
    return (1 + r) * np.exp(-r)


def block_prediction(head: CohortHead, block: str, x_NF: np.ndarray) -> np.ndarray:
    part = head.blocks[block]["cp10k"]
    scores = head.scores(block, x_NF[:, SETTINGS.columns(block, F)])["cp10k"]
    return part.mean_G + part.std_G * (scores @ part.loading_KG)


def test_all_spots_as_landmarks_give_kernel_ridge_regression() -> None:
    train, test = [section(1), section(2, 30)], section(3)
    head = fit(train)
    assert head.mix["cp10k"] == pytest.approx({"vector": 0.4, "frozen": 0.4, "levels": 0.2})
    columns, scale = SETTINGS.columns("frozen", F), np.linspace(0.5, 2, F)
    own, new = (x[:, columns] * scale[columns] for x in (np.concatenate([s.x_NF for s in train]), test.x_NF))
    distance = cdist(own, own)
    length = np.median(distance[distance > 1e-9])
    # Posterior mean of a Gaussian process with variance 1 and noise of variance 0.7; sections are centred apart.
    y = np.concatenate([s.y["cp10k"] - s.y["cp10k"].mean(0) for s in train])
    mean = np.concatenate([s.y["cp10k"] for s in train]).mean(0)
    weight = np.linalg.solve(matern(own, own, length) + 0.7 * np.eye(len(own)), y)
    want = mean + matern(new, own, length) @ weight
    np.testing.assert_allclose(block_prediction(head, "frozen", test.x_NF), want, atol=2e-5)


def test_fewer_landmarks_than_spots_give_the_subset_of_regressors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_map, "MAX_LANDMARKS", 20)
    train, test = [section(1), section(2, 30)], section(3)
    head = fit(train)
    kernel = head.map_of("frozen").kernels[0]
    assert len(kernel.landmark_MP) == 20
    columns, scale = SETTINGS.columns("frozen", F), np.linspace(0.5, 2, F)
    own, new = (x[:, columns] * scale[columns] for x in (np.concatenate([s.x_NF for s in train]), test.x_NF))
    chosen = own[np.linspace(0, len(own) - 1, 20).round().astype(int)]
    length = float(kernel.length_1[0])
    between, among = matern(own, chosen, length), matern(chosen, chosen, length)
    y = np.concatenate([s.y["cp10k"] - s.y["cp10k"].mean(0) for s in train])
    mean = np.concatenate([s.y["cp10k"] for s in train]).mean(0)
    weight = np.linalg.solve(between.T @ between + 0.7 * among, between.T @ y)
    np.testing.assert_allclose(
        block_prediction(head, "frozen", test.x_NF), mean + matern(new, chosen, length) @ weight, atol=2e-5
    )


def test_components_are_those_with_the_largest_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer spots than features and with more; with all of them, distances are those of the features."""
    rng = np.random.default_rng(0)
    for n in (12, 60):
        x = rng.normal(size=(n, 20)) * np.linspace(3, 0.1, 20)
        full = KernelMap.fit(x, np.ones(20))
        np.testing.assert_allclose(full(x), matern(x, x, float(full.length_1[0])), atol=1e-5)
    monkeypatch.setattr(kernel_map, "MAX_COMPONENTS", 3)
    few = KernelMap.fit(x, np.ones(20))
    assert few.basis_FP.shape == (20, 3)
    want = np.linalg.svd(x)[2][:3]
    np.testing.assert_allclose(np.abs(np.sum(few.basis_FP.T * want, axis=1)), 1, atol=1e-5)


def test_kernel_heads_follow_expression_that_is_not_linear_in_the_features() -> None:
    train, test = [section(seed, 150) for seed in (1, 2)], section(3)

    def pcc(head: CohortHead) -> float:
        predicted = Readout(SETTINGS, [head]).predict(test.x_NF, KEYS)[0]["cp10k"]
        return float(np.mean([np.corrcoef(predicted[:, g], test.y["cp10k"][:, g])[0, 1] for g in range(G)]))

    kernel, linear = pcc(fit(train, grid=None)), pcc(fit(train, kinds=("linear",), grid=None))
    assert kernel > 0.4
    assert kernel > linear + 0.2


def test_a_tile_unlike_all_landmarks_gets_the_mean_expression() -> None:
    head = fit([section(1), section(2)])
    far = np.full((1, F), 1e4)
    np.testing.assert_allclose(block_prediction(head, "frozen", far)[0], head.blocks["frozen"]["cp10k"].mean_G)


def test_spots_with_equal_features_and_features_without_variance_do_not_fail() -> None:
    one = section(1)
    twice = SectionTable(np.repeat(one.x_NF[:25], 2, axis=0), one.y, one.measured_G)
    assert np.isfinite(block_prediction(fit([twice, one]), "vector", one.x_NF)).all()
    constant = SectionTable(np.zeros((50, F)), one.y, one.measured_G)
    head = fit([constant])
    np.testing.assert_allclose(block_prediction(head, "vector", one.x_NF), np.tile(one.y["cp10k"].mean(0), (50, 1)))
    # An export that had no component would be refused.
    assert {head.map_of(b).kernels[0].basis_FP.shape[1] for b in head.blocks} == {1}


def test_scores_do_not_depend_on_the_number_of_spots_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    head, x = fit([section(1), section(2)]), section(3).x_NF
    whole = block_prediction(head, "vector", x)
    monkeypatch.setattr(heads_module, "VALUES_AT_ONCE", 7 * 100)
    np.testing.assert_allclose(block_prediction(head, "vector", x), whole, rtol=1e-12)
    assert block_prediction(head, "vector", x[:0]).shape == (0, G)


def test_kernels_pass_through_arrays_and_header(tmp_path: Path) -> None:
    readout = Readout(SETTINGS, [fit([section(1), section(2)])])
    arrays, header = readout.to_arrays()
    save_file(arrays, tmp_path / "x.safetensors")
    again = Readout.from_arrays(load_file(tmp_path / "x.safetensors"), header)
    x = section(3).x_NF
    assert again.heads[0].map_of("vector").linear is False
    for norm in NORMS:
        np.testing.assert_allclose(again.predict(x, KEYS)[0][norm], readout.predict(x, KEYS)[0][norm], atol=1e-4)
    linear = Readout(SETTINGS, [fit([section(1)], kinds=("linear",))])
    assert not any("kernel" in name for name in linear.to_arrays()[0])


def test_joined_heads_have_the_programmes_of_each() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(30, 4))
    first, second = (KernelMap.fit(rng.normal(size=(n, 4)), np.ones(4)) for n in (8, 11))
    maps = [FeatureMap([first], linear=False), FeatureMap(), FeatureMap([second], linear=True)]
    weights = [rng.normal(size=(rows, k)) for rows, k in ((8, 2), (4, 3), (15, 1))]
    joined, weight = join(maps, weights)
    want = np.concatenate([m(x) @ w for m, w in zip(maps, weights, strict=True)], axis=1)
    np.testing.assert_allclose(joined(x) @ weight, want, atol=1e-12)
    assert (joined.linear, weight.shape) == (True, (8 + 11 + 4, 6))
    alone, same = join(maps[:1], weights[:1])
    assert not alone.linear
    np.testing.assert_array_equal(same, weights[0])


def test_a_kernel_that_several_heads_have_is_kept_once() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(30, 4))
    first, second = (KernelMap.fit(rng.normal(size=(n, 4)), np.ones(4)) for n in (8, 11))
    loaded = KernelMap(*(v.copy() for v in vars(first).values()))
    maps = [FeatureMap([first, second], linear=False), FeatureMap([second, loaded], linear=True)]
    weights = [rng.normal(size=(rows, 2)) for rows in (19, 23)]
    joined, weight = join(maps, weights)
    assert [len(k.landmark_MP) for k in joined.kernels] == [8, 11]
    want = np.concatenate([m(x) @ w for m, w in zip(maps, weights, strict=True)], axis=1)
    np.testing.assert_allclose(joined(x) @ weight, want, atol=1e-12)


def test_repeated_adaptation_to_new_tissues_adds_neither_kernels_nor_programmes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without that, their numbers doubled each time, until the export of the adapted model was refused."""
    other = replace(fit([section(2)]), cohort="human_skin")
    readout = Readout(SETTINGS, [fit([section(1)]), other])
    for tissue in ("lung", "liver", "heart"):
        readout = with_head(readout, base_head(readout, f"human_{tissue}", "human"))
        arrays, header = readout.to_arrays()
        readout = Readout.from_arrays(arrays, header)
        assert len(readout.heads[-1].map_of("vector").kernels) == 2
        assert readout.heads[-1].blocks["vector"]["cp10k"].weight_FK.shape[1] == 2 * G
    monkeypatch.setattr(correction, "MOST_KERNELS", 1)
    with pytest.raises(ValueError, match="no head for human_brain, and the 5 heads of human have 2 kernels"):
        base_head(readout, "human_brain", "human")


def test_programmes_that_are_merged_predict_as_before() -> None:
    readout, x = (
        Readout(SETTINGS, [fit([section(1)]), replace(fit([section(2)]), cohort="human_skin")]),
        section(3).x_NF,
    )
    for tissue in ("lung", "liver"):
        want = readout.predict(x, KEYS, None)[0]
        readout = with_head(readout, base_head(readout, f"human_{tissue}", "human"))
        found = readout.predict(x, KEYS, f"human_{tissue}")[0]
        np.testing.assert_allclose(found["raw"], want["raw"], atol=1e-5)


def test_leave_one_out_scores_do_not_depend_on_features_of_the_section_that_is_left_out() -> None:
    """They are the scores that the section has as the only validation section of a fit to the others."""
    sections = [section(1), section(2, n=30), section(4, n=20)]
    scale = np.linspace(0.5, 2, F)
    found = fit(sections).facts["vector"]["cp10k"]["score"]
    each = []
    for left_out in sections:
        train = [s for s in sections if s is not left_out]
        data = CohortData("human_breast", KEYS, train, [left_out], np.zeros(F), np.ones(F), np.arange(G), scale_F=scale)
        each.append(fit_cohort(data, SETTINGS, kinds=("kernel",), grid=FIXED).facts["vector"]["cp10k"]["score"])
    assert found == pytest.approx(np.mean(each), rel=1e-12)


def test_spots_at_once_are_fewer_with_more_landmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    head, x, sizes = fit([section(1), section(2)]), section(3).x_NF, []
    monkeypatch.setattr(heads_module, "VALUES_AT_ONCE", 7 * 100)
    values = KernelMap.__call__
    monkeypatch.setattr(KernelMap, "__call__", lambda self, x: sizes.append(len(x)) or values(self, x))
    block_prediction(head, "vector", x)
    assert sizes == [7] * 7 + [1]


def test_a_section_computes_kernels_once_for_all_genes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Genes are predicted in chunks. An export with kernels is read again, and its model card says that it has features of spots."""
    bundle = Bundle.load(Path(__file__).parent / "fixtures" / "export_version_1")
    trained, D = [g for g in bundle.genes if g.trained][:G], bundle.config.align.dim
    rng, settings = np.random.default_rng(0), ReadoutSettings(views=1, radii=(), vector_dim=D)
    table = replace(section(1), x_NF=rng.normal(size=(50, D)))
    data = CohortData(
        "human_breast", [g.key for g in trained], [table], [], np.zeros(D), np.ones(D), np.arange(len(trained))
    )
    table.y.update({norm: y[:, : len(trained)] for norm, y in table.y.items()})
    head = fit_cohort(replace(data, train=[replace(table, measured_G=np.ones(len(trained), bool))]), settings)
    replace(bundle, readout=Readout(settings, [head])).save(tmp_path / "out")
    assert "- human_breast: 50 spots\n" in (tmp_path / "out" / "README.md").read_text()
    predictor = Predictor(Bundle.load(tmp_path / "out"))
    stored = rng.normal(size=(60, 2 * D)).astype(np.float32)
    genes = [GeneQuery(g.symbol, g.name, g.key) for g in trained]
    want = predictor.predict(ImageFeatures(stored[:, :D], stored[:, :0], stored[:, D:]), genes)
    monkeypatch.setattr(section_module, "GENES_PER_CHUNK", 2)
    calls, values = [], KernelMap.__call__
    monkeypatch.setattr(KernelMap, "__call__", lambda self, x: calls.append(len(x)) or values(self, x))
    found = SectionPrediction(predictor, genes).predict_all(SimpleNamespace(read=lambda rows: stored[rows]), 60, None)
    assert len(genes) > 2
    assert calls == [60]
    for norm in NORMS:
        np.testing.assert_allclose(found[norm], want[norm], atol=1e-5)


def test_kernel_values_need_no_more_than_two_arrays_of_their_size() -> None:
    rng = np.random.default_rng(0)
    kernel = KernelMap(
        np.eye(8, dtype=np.float32), rng.normal(size=(500, 8)).astype(np.float32), np.ones(1, np.float32)
    )
    x = rng.normal(size=(2000, 8)).astype(np.float32)
    tracemalloc.start()
    try:
        size = kernel(x).nbytes
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.2 * size


def test_validation_sections_without_a_scored_gene_leave_the_choice_to_training_sections() -> None:
    train, measured = [section(1), section(2)], np.arange(G) >= 3
    unscored = replace(section(3), measured_G=measured)
    data = CohortData("human_breast", KEYS, train, [unscored], np.zeros(F), np.ones(F), np.arange(3))
    head = fit_cohort(data, SETTINGS, kinds=("linear",), grid=FIXED)
    assert head.facts["chosen_on"] == "train"
    assert head.facts["vector"]["raw"]["score"] is not None


def test_each_normalisation_has_the_kind_that_scores_higher_on_validation() -> None:
    """Here, expression is linear in the features under one normalisation, and a square of them under the other."""
    weight = np.random.default_rng(9).normal(size=(F, G)) / 3

    def mixed(seed: int) -> SectionTable:
        one = section(seed, 120)
        noise = 0.3 * np.random.default_rng(seed + 50).normal(size=(120, G))
        return SectionTable(one.x_NF, {"cp10k": one.y["cp10k"], "raw": one.x_NF @ weight + noise}, one.measured_G)

    train, valid, test = [mixed(1), mixed(2)], [mixed(3)], mixed(4)
    data = CohortData("human_breast", KEYS, train, valid, np.zeros(F), np.ones(F), np.arange(G))
    settings = ReadoutSettings(views=1, radii=(), vector_dim=F)
    head, kernel, linear = (
        fit_cohort(data, settings, kinds=k) for k in (("kernel", "linear"), ("kernel",), ("linear",))
    )
    assert [head.facts["vector"][norm]["kind"] for norm in NORMS] == ["kernel", "linear"]
    assert head.map_of("vector").linear
    assert len(head.map_of("vector").kernels) == 1
    for norm, alone in (("cp10k", kernel), ("raw", linear)):
        got, want = (Readout(settings, [h]).predict(test.x_NF, KEYS)[0][norm] for h in (head, alone))
        np.testing.assert_allclose(got, want, atol=1e-6)
        assert head.facts["vector"][norm]["score"] == alone.facts["vector"][norm]["score"]


def test_a_head_of_one_kind_has_no_features_of_the_other() -> None:
    train, valid = [section(1), section(2)], [section(3)]
    data = CohortData("human_breast", KEYS, train, valid, np.zeros(F), np.ones(F), np.arange(G))
    head = fit_cohort(data, ReadoutSettings(views=1, radii=(), vector_dim=F))
    assert head.facts["vector"]["raw"]["kind"] == "kernel"
    assert not head.map_of("vector").linear
    # Without sections to compare kinds on, the first is used.
    alone = fit([section(1)], kinds=("kernel", "linear"), grid=None)
    assert {alone.facts[b][norm]["kind"] for b in alone.blocks for norm in NORMS} == {"kernel"}


def test_records_of_results_name_the_kind_of_every_head() -> None:
    kernel, linear = fit([section(1)]), replace(fit([section(2)], kinds=("linear",)), cohort="human_skin")
    found = Readout(SETTINGS, [kernel, linear]).describe()
    assert {found["human_breast"][b][norm]["kind"] for b in kernel.blocks for norm in NORMS} == {"kernel"}
    assert {found["human_skin"][b][norm]["kind"] for b in linear.blocks for norm in NORMS} == {"linear"}
    weights = [found["human_breast"][b]["cp10k"]["weight"] for b in kernel.blocks]
    assert sum(weights) + found["human_breast"]["levels"] == pytest.approx(1)
    added = Correction("vector", linear.blocks["vector"]["cp10k"], {})
    adapted = corrected_head(
        base_head(Readout(SETTINGS, [kernel]), "human_breast", "human"), np.arange(G), {"cp10k": added, "raw": None}
    )
    assert [adapted.kind_of("vector", norm) for norm in NORMS] == ["kernel and linear", "kernel"]
