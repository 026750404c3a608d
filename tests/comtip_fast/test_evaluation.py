"""Scores against direct formulas; the null is valid; baselines do not use the scored sections."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from comtip_shards import ShardSet
from scipy import stats

from comtip_fast.evaluation.baselines import ALPHAS, fit_ridge, fit_ridges
from comtip_fast.evaluation.evaluate import choose_sections, evaluate, write_metrics
from comtip_fast.evaluation.folds import ridge_folds
from comtip_fast.evaluation.metrics import Score, null_scores, partial_pcc_per_gene, residuals, score
from comtip_fast.evaluation.nulls import moved_spots
from comtip_fast.evaluation.report import write_report
from comtip_fast.evaluation.scoring import PREDICTORS
from comtip_fast.evaluation.summary import summary_table
from comtip_fast.inference import GeneQuery, Predictor
from comtip_fast.metrics import mean_pcc, mean_with_zeros, pcc_per_gene


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_pcc_matches_scipy(rng):
    a, b = rng.normal(size=(30, 6)), rng.normal(size=(30, 6))
    got = pcc_per_gene(a, b)
    np.testing.assert_allclose(got, [stats.pearsonr(a[:, g], b[:, g])[0] for g in range(6)], rtol=1e-10)
    assert mean_pcc(a, b) == pytest.approx(got.mean())


def test_undefined_genes_count_as_zero_and_are_counted(rng):
    a, b = rng.normal(size=(30, 4)), rng.normal(size=(30, 4))
    b[:, :2] = a[:, :2]
    a[:, 1], b[:, 2] = 0.1, 7.3  # constant, and not exactly representable
    pcc = pcc_per_gene(a, b)
    assert np.isnan(pcc).tolist() == [False, True, True, False]
    assert mean_with_zeros(pcc) == pytest.approx((1.0 + pcc[3]) / 4)
    result = score(a, b, rng.normal(size=(30, 2)), np.array([0, 1]))
    assert result.undefined_genes == 2
    assert result.mean_pcc_50_hvg == pytest.approx(0.5)
    assert mean_with_zeros(np.zeros(0)) is None
    assert np.isnan(mean_pcc(np.zeros((30, 0)), np.zeros((30, 0))))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_mean_pcc_counts_a_gene_without_variance_as_zero(rng, dtype: type):
    """The validation score is the mean of r_g over genes, with r_g = 0 where measured or predicted has no variance."""
    a, b = (rng.normal(size=(40, 5)).astype(dtype) for _ in range(2))
    a[:, 1], b[:, 3] = 0.0, 0.3
    x, y = a.astype(float) - a.mean(0, dtype=float), b.astype(float) - b.mean(0, dtype=float)
    norm = np.sqrt((x * x).sum(0) * (y * y).sum(0))
    want = np.where(norm > 1e-12, (x * y).sum(0) / np.maximum(norm, 1e-12), 0.0).mean()
    assert mean_pcc(a, b) == pytest.approx(want, rel=1e-12)
    assert mean_pcc(a, b) == mean_with_zeros(pcc_per_gene(a, b))


def test_partial_correlation_is_that_of_residuals(rng):
    covariates = rng.normal(size=(40, 3))
    a, b = rng.normal(size=(40, 2)), rng.normal(size=(40, 2))
    design = np.column_stack([np.ones(40), covariates])
    for g in range(2):
        left = a[:, g] - design @ np.linalg.lstsq(design, a[:, g], rcond=None)[0]
        right = b[:, g] - design @ np.linalg.lstsq(design, b[:, g], rcond=None)[0]
        assert partial_pcc_per_gene(a, b, covariates)[g] == pytest.approx(np.corrcoef(left, right)[0, 1])


def test_colour_alone_has_no_partial_correlation(rng):
    colour = rng.normal(size=(50, 3))
    measured = colour @ rng.normal(size=(3, 4)) + 0.1 * rng.normal(size=(50, 4))
    only_colour = colour @ rng.normal(size=(3, 4)) + 5
    result = score(measured, only_colour, colour, np.arange(4))
    assert result.partial_pcc_50_hvg == 0.0
    collinear = np.column_stack([colour, colour[:, 0] * 2])
    np.testing.assert_allclose(residuals(measured, collinear), residuals(measured, colour), atol=1e-9)


def grid(n: int) -> np.ndarray:
    return np.stack(np.meshgrid(np.arange(n), np.arange(n)), -1).reshape(-1, 2).astype(float)


def test_the_null_keeps_spatial_structure_but_not_alignment(rng):
    xy = grid(20)
    field = np.sin(xy[:, 0] / 4) + np.cos(xy[:, 1] / 5)
    moved = moved_spots(xy, 200, seed=0, section="s")
    assert (moved == moved_spots(xy, 200, seed=0, section="s")).all()
    assert (moved != moved_spots(xy, 200, seed=1, section="s")).any()

    def roughness(values: np.ndarray) -> float:
        square = values.reshape(20, 20)
        return float(np.abs(np.diff(square, axis=0)).mean() / values.std())

    shuffled = [roughness(rng.permutation(field)) for _ in range(20)]
    kept = [roughness(field[m]) for m in moved if field[m].std() > 0.2]
    assert np.mean(kept) < 0.4 * np.mean(shuffled)
    pcc = [np.corrcoef(field, field[m])[0, 1] for m in moved]
    assert abs(np.mean(pcc)) < 0.2
    # Smooth maps correlate by chance far more than a permutation of spots suggests.
    assert np.std(pcc) > 3 / np.sqrt(len(xy))


def test_ridge_recovers_the_coefficients_and_regularises_noise(rng):
    x = rng.normal(size=(120, 5))
    section = np.repeat([0, 1, 2], 40)
    truth = rng.normal(size=(5, 3))
    y = x @ truth + 0.01 * rng.normal(size=(120, 3)) + section[:, None] * 10.0  # sections differ in level
    model = fit_ridge(x, y, section)
    new = rng.normal(size=(30, 5))
    assert min(pcc_per_gene(new @ truth, model.predict(new))) > 0.999
    noise = fit_ridge(rng.normal(size=(120, 40)), rng.normal(size=(120, 3)), section)
    assert noise.alpha > model.alpha
    with pytest.raises(ValueError, match="at least 10"):
        fit_ridge(x[:5], y[:5], section[:5])


def test_folds_are_sections_or_compact_parts_of_the_only_section(rng):
    xy = np.stack(np.meshgrid(np.arange(16), np.arange(16)), -1).reshape(-1, 2).astype(float)
    section = np.repeat([7, 9], 128)
    assert ridge_folds(section, xy).tolist() == np.repeat([0, 1], 128).tolist()
    fold = ridge_folds(np.full(256, 7), xy)
    assert np.bincount(fold).tolist() == [64] * 4
    for f in range(4):
        assert np.ptp(xy[fold == f], axis=0).tolist() == [7, 7]


def test_the_penalty_of_one_section_is_that_for_another_section(rng):
    """Features and expression share three smooth patterns, and each has patterns of this section alone.

    Neighbours of a held-out spot reveal the patterns of the section, another section does not have them.
    """
    xy = np.stack(np.meshgrid(np.arange(18), np.arange(18)), -1).reshape(-1, 2) / 18.0
    one, found = np.zeros(len(xy)), []

    def smooth(k: int) -> np.ndarray:
        return np.cos(4 * xy @ rng.normal(size=(k, 2)).T + rng.uniform(0, 6.3, k))

    def section() -> tuple[np.ndarray, np.ndarray]:
        shared = smooth(3)
        x = 0.3 * shared @ of_features + smooth(60)
        return x, shared @ of_genes + smooth(15) + 0.5 * rng.normal(size=(len(xy), 15))

    for _ in range(8):
        of_features, of_genes = rng.normal(size=(3, 60)), rng.normal(size=(3, 15))
        (x, y), (new_x, new_y) = section(), section()
        blocks, spots = fit_ridge(x, y, one, ridge_folds(one, xy)), fit_ridge(x, y, one)
        scores = [float(pcc_per_gene(new_y, m.predict(new_x)).mean()) for m in (blocks, spots)]
        found.append([*scores, blocks.cv_pcc, spots.cv_pcc, blocks.alpha, spots.alpha])
    new_blocks, new_spots, cv_blocks, cv_spots, alpha_blocks, alpha_spots = np.mean(found, axis=0)
    assert new_blocks > new_spots + 0.03
    assert cv_blocks < cv_spots - 0.1, "closer to the score on another section"
    assert alpha_blocks > alpha_spots


def test_ridge_equals_the_normal_equations(rng):
    x, y = rng.normal(size=(60, 4)), rng.normal(size=(60, 2))
    model = fit_ridge(x, y, np.zeros(60))
    z = (x - x.mean(0)) / x.std(0)
    want = np.linalg.solve(z.T @ z + model.alpha * np.eye(4), z.T @ (y - y.mean(0)))
    np.testing.assert_allclose(model.weight_FG, want, atol=1e-10)


def test_sets_of_targets_are_fitted_as_if_each_were_alone(rng, monkeypatch: pytest.MonkeyPatch):
    """Each set has its own penalty, chosen in the same folds; there is one decomposition per fold and one of all spots."""
    x, section = rng.normal(size=(90, 30)), np.repeat([0, 1, 2], 30)
    clear, noise = x[:, :2] @ rng.normal(size=(2, 3)), rng.normal(size=(90, 4))
    alone = [fit_ridge(x, y, section) for y in (clear, noise)]
    real, counted = np.linalg.svd, []
    monkeypatch.setattr(np.linalg, "svd", lambda *a, **k: counted.append(1) or real(*a, **k))
    both = fit_ridges(x, [clear, noise], section)
    assert len(counted) == 4
    assert both[0].alpha != both[1].alpha
    for one, other in zip(alone, both, strict=True):
        assert (one.alpha, one.cv_pcc) == (other.alpha, other.cv_pcc)
        np.testing.assert_array_equal(one.weight_FG, other.weight_FG)
    # The penalty with the highest mean PCC in sections that the fit did not see, by the normal equations.
    scores = dict.fromkeys(ALPHAS, 0.0)
    for s in range(3):
        fit, own = section != s, section == s
        mean, std = x[fit].mean(0), x[fit].std(0)
        z, y = (x - mean) / std, noise - np.stack([noise[section == t].mean(0) for t in section])
        for a in ALPHAS:
            found = z[own] @ np.linalg.solve(z[fit].T @ z[fit] + a * np.eye(30), z[fit].T @ y[fit])
            scores[a] += mean_pcc(noise[own], found) / 3
    assert both[1].alpha == max(scores, key=lambda a: scores[a])
    assert both[1].cv_pcc == pytest.approx(scores[both[1].alpha])


def test_a_null_without_draws_has_no_p_value():
    summary, draws = null_scores([], 0.3)
    assert draws.size == 0
    assert summary["p95_mean_pcc_50_hvg"] is None
    assert summary["p_value"] is None
    draw = Score(mean_pcc_50_hvg=0.4, mean_pcc_all=0.4, partial_pcc_50_hvg=0.4, undefined_genes=0)
    assert null_scores([draw], 0.3)[0]["p_value"] == 1.0


# -- complete evaluation ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluation(tiny_run: Path, tiny_shards: ShardSet):
    return evaluate(Predictor.load(tiny_run), tiny_shards, train_shards=tiny_shards, n_null=20)


def test_metrics_contain_every_key_and_the_model_learned(evaluation, tmp_path: Path):
    write_metrics(evaluation.metrics, tmp_path / "metrics.json")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    entry = metrics["cohorts"]["human_breast"]
    assert entry["sections"] == ["x1"]
    assert not entry["donor_seen_in_training"]
    assert entry["unseen_vectors_shuffled"] == {"cp10k": None, "raw": None}, "the model has no gene vectors"
    for name in PREDICTORS:
        for norm in ("cp10k", "raw") if name != "unseen_vectors_shuffled" else ():
            assert {"mean_pcc_50_hvg", "mean_pcc_all", "partial_pcc_50_hvg", "undefined_genes"} <= set(
                entry[name][norm]
            )
    # The synthetic genes follow the colour, so that a trained model scores far above its null.
    assert entry["zero_shot"]["cp10k"]["mean_pcc_50_hvg"] > 0.3
    assert entry["ridge_colour"]["cp10k"]["mean_pcc_50_hvg"] > 0.5
    assert abs(entry["control_null"]["cp10k"]["mean_pcc_50_hvg"]) < 0.25
    assert metrics["sections"]["x1"]["control_null"]["cp10k"]["p_value"] <= 0.1
    assert "human_breast" in summary_table(evaluation.metrics)
    assert len(entry["genes_50_hvg"]) == len(set(entry["genes_50_hvg"])) > 10


def test_unseen_genes_are_the_held_out_genes(evaluation):
    data = evaluation.sections[0]
    unseen = {data.keys[i] for i in data.unseen}
    assert unseen == set(evaluation.predictor.held_out_genes)
    assert not unseen & set(evaluation.predictor.trained_genes)


def test_choice_of_genes_and_baselines_do_not_read_the_test_section(
    tiny_run: Path, tiny_shards: ShardSet, evaluation, monkeypatch: pytest.MonkeyPatch
):
    """With scrambled counts of the test section, the chosen genes and all predictions are the same."""
    test = set(tiny_shards.select(split="test").tolist())
    real = ShardSet.counts

    def scrambled(self, spots):
        out = real(self, spots)
        return out[::-1] if set(np.asarray(spots).tolist()) == test else out

    monkeypatch.setattr(ShardSet, "counts", scrambled)
    again = evaluate(Predictor.load(tiny_run), tiny_shards, train_shards=tiny_shards, n_null=2)
    one, two = evaluation.sections[0], again.sections[0]
    assert one.keys == two.keys
    np.testing.assert_array_equal(one.predicted["cp10k"], two.predicted["cp10k"])
    assert (
        again.metrics["cohorts"]["human_breast"]["zero_shot"]
        != evaluation.metrics["cohorts"]["human_breast"]["zero_shot"]
    )


def test_sections_are_chosen_by_id_or_split(tiny_run: Path, tiny_shards: ShardSet):
    predictor = Predictor.load(tiny_run)
    assert choose_sections(predictor, tiny_shards, None) == [tiny_shards.section_number("x1")]
    assert choose_sections(predictor, tiny_shards, ["v1"]) == [tiny_shards.section_number("v1")]
    with pytest.raises(ValueError, match="no section 'zz'"):
        choose_sections(predictor, tiny_shards, ["zz"])


def test_a_training_section_is_flagged(tiny_run: Path, tiny_shards: ShardSet):
    result = evaluate(Predictor.load(tiny_run), tiny_shards, sections=["t1"], train_shards=tiny_shards, n_null=2)
    assert result.metrics["sections"]["t1"]["section_seen_in_training"]
    assert result.metrics["cohorts"]["human_breast"]["donor_seen_in_training"]


def test_the_report_is_one_file_that_states_the_training_data(evaluation, tiny_run: Path, tmp_path: Path):
    write_report(tiny_run, evaluation, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "http" not in re.sub(r'src="data:[^"]*"', "", page)
    for text in ("t1", "t2", "v1", "x1", "donor_a", "CC0", "made up", "share one colour scale"):
        assert text in page
    assert page.count("<img") >= 5
    assert all(re.search(r'alt="[^"]+"', tag) for tag in re.findall(r"<img[^>]*>", page))
    assert "The validation section v1 comes from a donor who is also in training" in " ".join(page.split())


# -- prediction -------------------------------------------------------------------------------------------------


def test_predictions_are_the_expectation_over_levels(tiny_run: Path, tiny_shards: ShardSet):
    predictor = Predictor.load(tiny_run)
    predictor.bundle.readout = None  # a model without a readout, as exports of version 1 are
    spots = tiny_shards.select(split="test")[:3]
    features = predictor.image_features(tiny_shards.tiles(spots).transpose(0, 3, 1, 2), tiny_shards.stain(3))
    key = predictor.trained_genes[2]
    gene = next(g for g in predictor.bundle.genes if g.key == key)
    got = predictor.predict(features, [GeneQuery(gene.symbol, gene.name, key), GeneQuery("KRT14", "keratin 14")])
    tokens, rows = predictor._tokens([GeneQuery(gene.symbol, gene.name, key)])
    table = predictor.model.sentence_table(tokens).unit_GQD[0].detach().numpy()
    levels, row = predictor.bundle.levels, int(rows[0])
    scale = float(predictor.model.log_scale_level.detach().exp())
    for n in range(3):
        logits = [scale * float(table[q] @ features.vector_ND[n]) + levels.log_prior[row, q] for q in range(5)]
        weight = np.exp(np.array(logits) - max(logits))
        want = float((weight / weight.sum() * levels.value_cp10k[row]).sum())
        assert got["cp10k"][n, 0] == pytest.approx(want, rel=1e-4)
    assert np.isfinite(got["cp10k"]).all()
    assert got["raw"].shape == (3, 2)
    assert predictor.predict(features, [])["cp10k"].shape == (3, 0)
