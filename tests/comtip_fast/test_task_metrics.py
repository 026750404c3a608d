"""Metrics of the downstream tasks against direct formulas; intervals cover; controls are at chance."""

import gzip
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import roc_auc_score

from comtip_fast.evaluation.baselines import fit_ridge
from comtip_fast.evaluation.feature_files import FeatureFiles
from comtip_fast.evaluation.folds import spatial_folds
from comtip_fast.evaluation.tasks import retrieval
from comtip_fast.evaluation.tasks.context import TaskOptions
from comtip_fast.evaluation.tasks.domains import agreement, cluster, is_labelled
from comtip_fast.evaluation.tasks.expression import _predicted, _Shuffled, _with_control
from comtip_fast.evaluation.tasks.gene_sets import (
    closeness_by_species,
    members,
    orthologues,
    read_gmt,
    set_closeness,
    set_scores,
)
from comtip_fast.evaluation.tasks.intervals import (
    block_weights,
    interval,
    label_weights,
    mean_interval,
    resampled,
    section_interval,
    spatial_blocks,
    weighted_pcc,
)
from comtip_fast.evaluation.tasks.labels import LabelFile
from comtip_fast.evaluation.tasks.pairs import PairScores, RankedPairs, gain
from comtip_fast.evaluation.tasks.retrieval import Ranking, chance, ranks, recall_at
from comtip_fast.evaluation.tasks.rows import TaskRow, table
from comtip_fast.evaluation.tasks.space import _agreement_rows
from comtip_fast.genes.families import families
from comtip_fast.metrics import mean_pcc


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def grid(side: int) -> np.ndarray:
    return np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2).astype(float)


# -- intervals ----------------------------------------------------------------------------------------------------


def test_blocks_are_squares_of_neighbours():
    block = spatial_blocks(grid(20))
    assert np.unique(block).tolist() == list(range(25))
    assert np.bincount(block).tolist() == [16] * 25
    for b in range(25):
        assert (np.ptp(grid(20)[block == b], axis=0) == 3).all()
    assert np.unique(spatial_blocks(np.zeros((4, 2)))).tolist() == [0]


def test_draws_use_whole_blocks_and_repeat():
    block = spatial_blocks(grid(10))
    weights = block_weights(block, 50, seed=0, section="s")
    assert weights.shape == (50, 100)
    assert (weights == block_weights(block, 50, seed=0, section="s")).all()
    assert (weights != block_weights(block, 50, seed=1, section="s")).any()
    for b in range(25):
        assert (weights[:, block == b] == weights[:, block == b][:, :1]).all()
    assert len(block_weights(np.arange(4), 50, seed=0, section="s")) == 0


def test_intervals_over_blocks_cover_smooth_fields_where_single_spots_do_not(rng):
    """Each field is one random value per block: the interval of its mean must contain 0 in about 95 % of the cases."""
    xy = grid(20)
    block, covered = spatial_blocks(xy), {"blocks": 0, "spots": 0}
    weights = {"blocks": block_weights(block, 200, seed=0, section="s")}
    weights["spots"] = block_weights(np.arange(400), 200, seed=0, section="s")
    for _ in range(100):
        values = rng.normal(size=25)[block]
        for name, w in weights.items():
            low, high = mean_interval(values, w)
            covered[name] += low <= 0 <= high
    assert covered["blocks"] >= 86
    assert covered["spots"] <= 60


def test_weighted_correlation_equals_that_of_repeated_spots(rng):
    a = rng.normal(size=(60, 4))
    b = a + rng.normal(size=(60, 4))
    b[:, 3] = 1.5
    weights = block_weights(np.arange(60) // 4, 5, seed=0, section="s")
    got = weighted_pcc(a, b, weights)
    for d in range(5):
        index = np.repeat(np.arange(60), weights[d].astype(int))
        want = [pearsonr(a[index, g], b[index, g])[0] for g in range(3)]
        np.testing.assert_allclose(got[d], [*want, 0.0], rtol=1e-9)
    means = resampled(lambda i: float(a[i, 0].mean()), weights)
    assert means == pytest.approx(mean_interval(a[:, 0], weights))


def test_intervals_without_draws_or_with_undefined_draws_are_undefined():
    assert np.isnan(interval(np.zeros(0))).all()
    assert np.isnan(interval(np.array([1.0, np.nan]))).all()
    assert np.isnan(section_interval(np.array([0.3]), 10, seed=0)).all()
    low, high = section_interval(np.array([0.1, 0.2, 0.3]), 500, seed=0)
    assert 0.1 <= low < 0.2 < high <= 0.3


def test_intervals_of_agreement_are_around_the_score(rng):
    """Copies of a spot in a draw agree with each other, so that draws of random clusters are above chance."""
    xy = grid(10)
    labels = rng.integers(0, 10, 100).astype(str)
    weights = block_weights(spatial_blocks(xy), 200, seed=0, section="s")
    context = SimpleNamespace(options=TaskOptions(n_null=0))
    section = SimpleNamespace(section_id="s", xy_N2=xy)
    x, known = rng.normal(size=(100, 4)), np.ones(100, bool)
    rows = _agreement_rows(context, section, "m", labels, x, known, weights)  # type: ignore[arg-type]
    assert [r.metric for r in rows] == ["ari", "nmi"]
    for row in rows:
        assert row.low < row.value < row.high <= 1, row


@pytest.mark.parametrize("side", [4, 8, 12, 20])
def test_draws_for_labels_are_over_labelled_spots_with_several_labels(rng, side: int):
    """Labels in a corner: a draw of blocks of the whole section may have none of them, and equal empty sets agree perfectly."""
    xy = grid(20)
    known = (xy < side).all(1)
    labels = np.where(xy[known, 0] < side / 2, "a", "b")
    weights, left_out = label_weights(xy[known], labels, 100, seed=0, section="s")
    assert len(weights) + left_out == 100
    for w in weights:
        assert set(labels[w > 0]) == {"a", "b"}
    clusters = rng.integers(0, 2, known.sum())
    high = resampled(lambda i: agreement(labels[i], clusters[i])["ari"], weights)[1]
    assert high < 0.6, "clusters at random do not agree with labels"
    if side == 20:  # all spots are labelled: the draws are those of the section
        want = block_weights(spatial_blocks(xy), 100, seed=0, section="s")
        np.testing.assert_array_equal(weights, want[: len(weights)] if not left_out else weights)


def test_draws_for_labels_that_fill_one_block_are_left_out():
    xy = grid(20)
    labels = np.where((xy < 4).all(1), "a", "b")
    weights, left_out = label_weights(xy, labels, 200, seed=0, section="s")
    assert 0.2 * 200 < left_out < 0.5 * 200
    # The block is in no draw of 25 blocks with probability (24 / 25)^25 = 0.36.
    assert all(np.unique(labels[w > 0]).size == 2 for w in weights)


# -- retrieval ----------------------------------------------------------------------------------------------------


def test_ranks_equal_a_direct_computation(rng, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(retrieval, "MAX_SIMILARITIES", 1100 * 400)  # three chunks of queries
    image, text = rng.normal(size=(1100, 8)), rng.normal(size=(1100, 8))
    text += 0.5 * image
    got = ranks(image, text)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text)]
    similar = unit[0] @ unit[1].T
    want = (similar > similar.diagonal()[:, None]).sum(1)
    assert (got.above_N == want).mean() > 0.99  # similarities within the tolerance are equal
    assert recall_at(Ranking(np.array([0, 1, 4, 5]), np.ones(4, int)), 5).tolist() == [1, 1, 1, 0]
    # Three equal keys below four others: two of the three are among the first six.
    assert recall_at(Ranking(np.array([4]), np.array([3])), 6) == pytest.approx([2 / 3])


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_equal_keys_are_at_chance_whatever_the_rounding(rng, kind: type):
    """A model that gives every spot one vector knows nothing, and must not score above chance."""
    query, key = rng.normal(size=(200, 64)).astype(kind), np.repeat(rng.normal(size=(1, 64)).astype(kind), 200, axis=0)
    for a, b in ((query, key), (key, query)):
        found = [recall_at(ranks(a, b), k).mean() for k in (1, 5, 10)]
        assert found == pytest.approx([chance(200, k) for k in (1, 5, 10)])
    pairs = rng.normal(size=(100, 64)).repeat(2, axis=0)
    assert (recall_at(ranks(pairs, pairs), 1) == 0.5).all()
    assert (recall_at(ranks(pairs, pairs), 2) == 1.0).all()


def test_random_vectors_are_at_chance(rng):
    hits = recall_at(ranks(rng.normal(size=(500, 6)), rng.normal(size=(500, 6))), 50)
    assert hits.mean() == pytest.approx(chance(500, 50), abs=0.05)
    assert chance(3, 5) == 1.0


# -- domains ------------------------------------------------------------------------------------------------------


def test_clusters_that_equal_the_labels_score_one_and_random_labels_zero(rng):
    labels = np.repeat(["a", "b", "c"], 40)
    x = np.repeat(rng.normal(size=(3, 30)) * 5, 40, axis=0) + rng.normal(size=(120, 30))
    found = cluster(x, 3, seed=0)
    assert agreement(labels, found) == pytest.approx({"ari": 1.0, "nmi": 1.0})
    assert abs(agreement(rng.permutation(labels), found)["ari"]) < 0.05
    assert (found == cluster(x, 3, seed=0)).all()


def test_a_feature_of_large_scale_does_not_decide(rng):
    labels = np.repeat([0, 1], 50)
    x = np.column_stack(
        [labels * 4 + rng.normal(size=100), labels * 4 + rng.normal(size=100), 1e4 * rng.normal(size=100)]
    )
    assert agreement(labels, cluster(x, 2, seed=0))["ari"] > 0.7


def test_spots_without_a_label_are_recognised():
    assert is_labelled(np.array(["tumour", "", "undetermined", "Unknown", "nan", "GL"])).tolist() == [
        True,
        *[False] * 4,
        True,
    ]


# -- pairs --------------------------------------------------------------------------------------------------------


def test_the_auc_equals_sklearn_with_ties_and_weights(rng):
    true, false = rng.integers(2, 9, 200).astype(float), rng.integers(0, 7, 200).astype(float)
    spot = rng.integers(0, 20, 200)
    ranked = RankedPairs(PairScores(true, false, spot))
    y, scores = np.repeat([1, 0], 200), np.concatenate([true, false])
    assert ranked.auc(np.ones(20)) == pytest.approx(roc_auc_score(y, scores))
    weight = rng.integers(0, 4, 20).astype(float)
    want = roc_auc_score(y, scores, sample_weight=np.tile(weight[spot], 2))
    assert ranked.auc(weight) == pytest.approx(want)
    assert np.isnan(ranked.auc(np.zeros(20)))


def test_a_head_that_ignores_the_context_has_no_gain(rng):
    spot, true = np.repeat(np.arange(10), 5), rng.normal(1, 1, 50)
    ranked = RankedPairs(PairScores(true, rng.normal(size=50), spot))
    assert ranked.auc(np.ones(10)) > 0.6
    assert gain(ranked, ranked, np.ones(10)) == 0.0


# -- gene sets ----------------------------------------------------------------------------------------------------


def test_families_and_orthologues():
    keys = [
        "human:KRT5",
        "human:KRT14",
        "human:KRT17",
        "human:ERBB2",
        "human:CD3E",
        "human:CD8A",
        "human:CD74",
        "mouse:Krt5",
    ]
    found = families(keys)
    assert found["human:KRT"] == keys[:3]
    assert found["human:CD"] == ["human:CD3E", "human:CD8A", "human:CD74"]
    assert set(found) == {"human:KRT", "human:CD"}
    assert orthologues(keys) == [("human:KRT5", "mouse:Krt5")]
    assert members({"a": ["krt5", "KRT14", "NONE"], "b": ["KRT5"]}, keys)["a"].tolist() == [0, 1, 7]


def test_gmt_files_are_read_and_damage_is_named(tmp_path: Path):
    path = tmp_path / "sets.gmt"
    path.write_text("A\tdescription\tKRT5\tKRT14\tKRT5\n\nB\t\tCD74\n")
    assert read_gmt(path) == {"A": ["KRT5", "KRT14"], "B": ["CD74"]}
    for text, message in (
        ("A\tx\n", "line 1: no genes"),
        ("\tx\tKRT5\n", "line 1: no name"),
        ("A\t\tX\nA\t\tY\n", "line 2: A occurs twice"),
        ("", "no gene set"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_gmt(path)
    with pytest.raises(FileNotFoundError, match="GMT"):
        read_gmt(tmp_path / "none.gmt")


def test_genes_of_a_set_that_point_one_way_are_found_and_shuffled_ones_are_not(rng):
    rows = [np.arange(i * 5, i * 5 + 5) for i in range(6)]
    vectors = rng.normal(size=(60, 16)) + 10  # a common mean must not count
    for r in rows:
        vectors[r] += 2 * rng.normal(size=16)
    found = set_closeness(vectors, rows, seed=0)
    assert found.auc > 0.9
    assert found.shuffled == pytest.approx(0.5, abs=0.12)
    assert found.set_auc_S.shape == (6,)
    x = vectors - vectors.mean(0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    together = {(i, j) for r in rows for i in r for j in r}
    across = [x[i] @ x[j] for i in range(60) for j in range(i) if (i, j) not in together]
    within = [x[i] @ x[j] for i in rows[0] for j in rows[0] if i < j]
    direct = roc_auc_score(np.repeat([1, 0], [len(within), len(across)]), within + across)
    assert found.set_auc_S[0] == pytest.approx(direct, abs=0.02)  # pairs across sets are sampled


def test_a_large_gene_set_needs_no_vector_per_pair(rng):
    """A set of 400 genes has 79,800 pairs, whose vectors would take 327 MB."""
    vectors = rng.normal(size=(450, 256))
    tracemalloc.start()
    found = set_closeness(vectors, [np.arange(400), np.arange(390, 420)], seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.auc == pytest.approx(0.5, abs=0.05)
    assert peak < 100e6


def test_sets_without_a_pair_apart_have_no_score(rng):
    found = set_closeness(rng.normal(size=(20, 4)), [np.arange(20)], seed=0)
    assert np.isnan(found.auc)
    assert np.isnan(found.shuffled)


def test_orthologues_make_no_gene_set_close(rng):
    """Random sets of symbols have no pattern, though both species have a gene of almost the same vector."""
    symbols = [f"G{i}" for i in range(300)]
    keys = [*(f"human:{s}" for s in symbols), *(f"mouse:{s.capitalize()}" for s in symbols)]
    human = rng.normal(size=(300, 32))
    vectors = np.concatenate([human, human + 0.1 * rng.normal(size=human.shape) + 5])
    sets = {f"S{i}": rng.choice(symbols, 5, replace=False).tolist() for i in range(40)}
    found = closeness_by_species(vectors, keys, sets, seed=0)
    alone = [closeness_by_species(vectors[part], keys[part], sets, seed=0) for part in (slice(300), slice(300, 600))]
    assert found is not None
    assert alone[0] is not None
    assert alone[1] is not None
    assert found.auc == pytest.approx(0.5, abs=0.03)
    np.testing.assert_array_equal(found.set_auc_S, np.concatenate([alone[0].set_auc_S, alone[1].set_auc_S]))
    assert found.shuffled == pytest.approx((alone[0].shuffled + alone[1].shuffled) / 2)
    one = set_closeness(human, list(members(sets, keys[:300]).values()), seed=0)
    np.testing.assert_array_equal(alone[0].set_auc_S, one.set_auc_S)
    assert closeness_by_species(vectors, keys, {"few": ["G1", "G2"]}, seed=0) is None, "two genes in each species"


def test_set_scores_are_means_of_standardised_genes(rng):
    values = rng.normal(size=(30, 5)) * [1, 10, 100, 1, 0]
    got = set_scores(values, [np.array([0, 1, 2]), np.array([3, 4])])
    z = (values - values.mean(0)) / np.where(values.std(0) > 0, values.std(0), 1)
    np.testing.assert_allclose(got, np.column_stack([z[:, :3].mean(1), z[:, 3:].mean(1)]))


def test_ridge_fits_a_gene_to_the_sections_that_measured_it(rng):
    """Counts of a gene that a section did not measure are 0, which is no measurement."""
    x = rng.normal(size=(80, 3))
    y = x @ rng.normal(size=(3, 2)) + 0.1 * rng.normal(size=(80, 2))
    number = np.repeat([0, 1], 40)
    y[number == 1, 1] = 0
    train = [SimpleNamespace(features={"e": x[number == s]}, xy_N2=grid(10)[:40]) for s in (0, 1)]
    known = np.array([[True, True], [True, False]])
    got = _predicted(train, "e", y, known, x)
    alone = fit_ridge(x[:40], y[:40, 1:], number[:40], spatial_folds(grid(10)[:40]))
    np.testing.assert_allclose(got[:, 1], alone.predict(x)[:, 0])
    np.testing.assert_allclose(got[:, 0], fit_ridge(x, y[:, :1], number).predict(x)[:, 0])
    assert np.abs(np.corrcoef(got[:, 0], y[:, 0])[0, 1]) > 0.9
    none = _predicted(train, "e", y, np.array([[True, False], [True, False]]), x)
    assert (none[:, 1] == 0).all()
    both, control = _with_control(train, "e", y, known, x, y, 30, seed=0)
    np.testing.assert_array_equal(both, got)
    assert abs(control) < 0.3
    assert np.isnan(_with_control(train, "e", y, known, x, y, 0, seed=0)[1])


def test_the_control_of_ridge_is_the_mean_over_targets_shuffled_within_sections(rng, monkeypatch: pytest.MonkeyPatch):
    """Every draw is a regression of its own, but all draws share the decompositions of the features: one per fold and one of all."""
    x, number = rng.normal(size=(60, 8)), np.repeat([0, 1, 2], 20)
    y = x[:, :3] + rng.normal(size=(60, 3)) + 5.0 * number[:, None]
    train = [SimpleNamespace(features={"e": x[number == s]}, xy_N2=grid(5)[:20]) for s in range(3)]
    new, measured = rng.normal(size=(25, 8)), rng.normal(size=(25, 3))
    real, counted = np.linalg.svd, []
    monkeypatch.setattr(np.linalg, "svd", lambda *a, **k: counted.append(1) or real(*a, **k))
    control = _with_control(train, "e", y, np.ones((3, 3), bool), new, measured, 20, seed=4)[1]
    assert len(counted) == 4
    targets = _Shuffled(y, number, 20, 4, "e")
    assert len(targets) == 21
    draws = []
    for t in list(targets)[1:]:
        for s in range(3):
            own = number == s
            assert sorted(t[own, 0]) == sorted(y[own, 0]), "values stay in their section"
        assert (np.lexsort(t[:20].T) != np.lexsort(y[:20].T)).any()
        draws.append(mean_pcc(measured, fit_ridge(x, t, number).predict(new)))
    assert np.std(draws) > 0.02
    assert control == pytest.approx(np.mean(draws))


# -- files --------------------------------------------------------------------------------------------------------


def test_labels_from_a_table_and_from_an_anndata(tmp_path: Path):
    pd.DataFrame({"section": ["A", "A", "B"], "spot": ["1x1", "1x2", "1x1"], "label": ["t", "u", "v"]}).to_csv(
        tmp_path / "labels.tsv", sep="\t", index=False
    )
    labels = LabelFile(str(tmp_path / "labels.tsv"))
    assert labels.of("A", ["1x2", "9x9", "1x1"]).tolist() == ["u", "", "t"]
    assert labels.of("B", ["1x1"]).tolist() == ["v"]
    obs = pd.DataFrame({"layer": pd.Categorical(["gl", None])}, index=["s1", "s2"])
    ad.AnnData(np.zeros((2, 1), np.float32), obs).write_h5ad(tmp_path / "x.h5ad")
    assert LabelFile(f"{tmp_path / 'x.h5ad'}:layer").of("any", ["s2", "s1"]).tolist() == ["", "gl"]
    with pytest.raises(ValueError, match=r"names no column of the AnnData; give FILE\.h5ad:COLUMN"):
        LabelFile(str(tmp_path / "x.h5ad"))
    with pytest.raises(ValueError, match="no column 'nope'"):
        LabelFile(f"{tmp_path / 'x.h5ad'}:nope")
    (tmp_path / "two.csv").write_text("spot,label\na,x\na,y\n")
    with pytest.raises(ValueError, match="several labels for spot a of s; add a column section"):
        LabelFile(str(tmp_path / "two.csv")).of("s", ["a"])
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(b"spot,label\na,x\n" * 99)[:20])
    with pytest.raises(ValueError, match=r"cut\.csv\.gz: cannot be read as a table"):
        LabelFile(str(tmp_path / "cut.csv.gz"))


def test_labels_without_a_section_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "labels.csv").write_text("section,spot,label\nA,1x1,t\n,1x2,u\n  ,1x3,v\n")
    obs = pd.DataFrame({"section_id": pd.Categorical(["A", None]), "layer": ["gl", "gl"]}, index=["1x1", "1x2"])
    ad.AnnData(np.zeros((2, 1), np.float32), obs).write_h5ad(tmp_path / "x.h5ad")
    for spec, told, want in (
        (tmp_path / "labels.csv", "2 of 3 rows name no section", ["t", "", ""]),
        (f"{tmp_path / 'x.h5ad'}:layer", "1 of 2 rows name no section", ["gl", "", ""]),
    ):
        caplog.clear()
        assert LabelFile(str(spec)).of("A", ["1x1", "1x2", "1x3"]).tolist() == want
        assert told in caplog.text


def test_embeddings_from_a_table_are_joined_by_spot(tmp_path: Path):
    path = tmp_path / "features.csv"
    path.write_text("section,spot,f0,f1\nA,b,1,2\nA,a,3,4\nB,a,5,6\n")
    found = FeatureFiles(path).of("A")
    assert found.rows_of(["a", "b"], "x").tolist() == [[3, 4], [1, 2]]
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"cut\.parquet: cannot be read as a \.parquet table"):
        FeatureFiles(tmp_path / "cut.parquet")
    with pytest.raises(ValueError, match="no embedding for 1 of 2 spots"):
        found.rows_of(["a", "c"], "x")
    with pytest.raises(ValueError, match="no rows of section C"):
        FeatureFiles(path).of("C")
    path.write_text("section,spot,f0\nA,a,nan\n")
    with pytest.raises(ValueError, match="not finite"):
        FeatureFiles(path).of("A")


def test_the_table_shows_intervals_and_leaves_undefined_cells_empty():
    text = table([TaskRow("pairs", "A", "head", "auc", 0.75, 0.7, 0.8, 0.5), TaskRow("probe", "A", "mean", "mse", 1.0)])
    first, second = text.splitlines()[1:]
    assert first.split() == ["pairs", "A", "head", "auc", "0.750", "0.700", "to", "0.800", "0.500", "-"]
    assert second.split() == ["probe", "A", "mean", "mse", "1.000", "-", "-"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [("section,spot,f0,note", "not numbers: note; keep"), ("section,spot", "no column of features; add")],
)
def test_a_table_of_features_names_the_columns_that_are_not_numbers(columns: str, message: str, tmp_path: Path):
    values = {"section": "s", "spot": "a", "f0": "1.5", "note": "tumour"}
    table = tmp_path / "features.csv"
    table.write_text(f"{columns}\n{','.join(values[c] for c in columns.split(','))}\n")
    with pytest.raises(ValueError, match=message):
        FeatureFiles(table)
