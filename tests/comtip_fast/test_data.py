"""Expression levels, gene choice, panels and batches."""

import numpy as np
import pytest
from comtip_shards import ShardSet
from scipy import sparse

from comtip_fast.config.io import load_config
from comtip_fast.config.schema import GenesConfig, LevelsConfig, PanelConfig
from comtip_fast.data.expression.level_fit import CHUNK, CountSample, fit_levels
from comtip_fast.data.expression.levels import LevelTable, log1p_cp10k
from comtip_fast.data.expression.panel import choose_genes, draw_panel, rank_by_variance
from comtip_fast.data.expression.training_tables import training_tables
from comtip_fast.data.loaders.torch import TorchLoader


def counts(seed: int = 0, n: int = 60, g: int = 5) -> sparse.csr_matrix:
    return sparse.csr_matrix(np.random.default_rng(seed).poisson([0.2, 1, 3, 8, 0.01], (n, g)).astype(np.int32))


class Columns:
    """Positive values by gene, of any matrix."""

    def __init__(self, values: sparse.csc_matrix, raw: sparse.csc_matrix) -> None:
        self.values, self.raw = values, raw
        self.n_genes, self.nnz = values.shape[1], values.nnz

    def column(self, gene: int) -> tuple[np.ndarray, np.ndarray]:
        own = slice(*self.values.indptr[gene : gene + 2])
        return self.values.data[own], self.raw.data[own]


def fitted(values: sparse.csc_matrix, raw: sparse.csc_matrix, config: LevelsConfig) -> LevelTable:
    return fit_levels(Columns(values, raw), np.full(values.shape[1], values.shape[0]), config)


def test_log1p_cp10k_matches_the_formula():
    c = counts()
    c = sparse.csr_matrix(np.vstack([c.toarray(), np.zeros((1, 5), np.int32)]))  # an empty spot stays 0
    dense = c.toarray().astype(float)
    want = np.log1p(dense / np.maximum(dense.sum(1, keepdims=True), 1) * 1e4)
    np.testing.assert_allclose(log1p_cp10k(c).toarray(), want, rtol=1e-6)


def test_levels_are_quantiles_of_the_positive_values():
    c = counts()
    values, raw = log1p_cp10k(c).tocsc(), c.astype(np.float32).tocsc()
    raw.data = np.log1p(raw.data)
    table = fitted(values, raw, LevelsConfig(n_levels=5, min_positive=10))
    dense = values.toarray()
    got = table.levels(dense, np.arange(5))
    for g in range(4):
        positive = np.sort(dense[:, g][dense[:, g] > 0])
        # Gene 0 has too few positive values and uses the global edges.
        pool = positive if positive.size >= 10 else np.sort(dense[dense > 0])
        edges = [e for e in np.quantile(pool, [0.25, 0.5, 0.75]) if e > pool.min()]
        for n in range(len(dense)):
            v = dense[n, g]
            want = 0 if v == 0 else 1 + sum(np.float32(e) <= v for e in sorted(set(edges)))
            assert got[n, g] == want
    # The value of a level is the median of its bin; level 0 is 0; frequencies sum to 1.
    q = int(got[dense[:, 3] > 0, 3].max())
    assert table.value_cp10k[3, q] == pytest.approx(np.median(dense[:, 3][got[:, 3] == q]))
    assert (table.value_cp10k[:, 0] == 0).all()
    np.testing.assert_allclose(np.exp(table.log_prior).sum(1), 1, rtol=1e-5)
    assert table.edges.shape == (6, 3)


@pytest.mark.parametrize("kind", ["per_gene", "global"])
def test_a_sample_of_counts_has_the_levels_of_its_dense_values(kind: str):
    c, genes = sparse.vstack([counts(seed, CHUNK // 2 + 7) for seed in range(3)], "csr"), np.array([0, 1, 3])
    c.data[::5] += 300  # more than a byte holds
    sample = CountSample(genes.size)
    for start in range(0, c.shape[0], CHUNK):
        sample.add(c[start : start + CHUNK], genes)
    values, raw = log1p_cp10k(c)[:, genes].tocsc(), c[:, genes].astype(np.float32).tocsc()
    raw.data = np.log1p(raw.data)
    config = LevelsConfig(n_levels=6, kind=kind)
    table = fit_levels(sample, np.full(3, c.shape[0]), config)
    for name, want in fitted(values, raw, config).to_arrays().items():
        np.testing.assert_array_equal(getattr(table, name), want)
    levels = table.levels(values.toarray(), np.arange(3))
    np.testing.assert_array_equal(sample.levels(table), levels)
    section = np.arange(c.shape[0]) * 4 // c.shape[0] + (
        np.arange(c.shape[0]) * 4 // c.shape[0] > 1
    )  # section 2 is empty
    mean, detection = sample.level_means(table, section, 5)
    for s in (0, 1, 3, 4):
        np.testing.assert_array_equal(mean[s], levels[section == s].mean(0))
        np.testing.assert_array_equal(detection[s], (levels[section == s] > 0).mean(0))
    assert not mean[2].any()
    assert not detection[2].any()


def test_an_edge_value_belongs_to_the_upper_level_and_edges_are_distinct():
    values = sparse.csc_matrix(np.array([[1.0], [1.0], [1.0], [1.0], [2.0], [3.0], [0.0]], np.float32))
    table = fitted(values, values, LevelsConfig(n_levels=6, min_positive=1))
    edges = table.edges[0][np.isfinite(table.edges[0])]
    assert len(set(edges.tolist())) == len(edges)
    assert edges.min() > 1.0
    assert table.levels(edges[:1, None].astype(np.float32), np.array([0]))[0, 0] == 2


def test_a_value_between_two_levels_is_interpolated():
    values = log1p_cp10k(counts()).tocsc()
    table = fitted(values, values, LevelsConfig(n_levels=5, min_positive=10))
    lo, hi, mix = table.between(float(table.value_cp10k[3, 2:4].mean()), 3)
    assert (lo, hi) == (2, 3)
    assert mix == pytest.approx(0.5, abs=1e-5)


def test_variance_ranks_over_the_sections_that_measured_the_gene():
    a, b = (np.random.default_rng(s).normal(5, [0.1, 3, 1, 2], (40, 4)).clip(0.01) for s in (0, 1))
    b[:, 3] = 0
    known = [np.array([True] * 4), np.array([True, True, True, False])]
    rows, variance = rank_by_variance([sparse.csr_matrix(a), sparse.csr_matrix(b)], known, 0.1)
    assert rows.tolist()[:2] == [1, 3]
    assert variance[1] == pytest.approx(a[:, 3].var(), rel=1e-6)
    # Measured but not detected in one section: not eligible.
    rows, _ = rank_by_variance([sparse.csr_matrix(a), sparse.csr_matrix(b)], [known[0], known[0]], 0.1)
    assert 3 not in rows


def test_held_out_genes_are_never_the_most_variable_and_include_orthologues():
    symbols = [f"G{i}" for i in range(20)] + [f"g{i}" for i in range(20)]
    ranked = {"human_a": np.arange(20), "mouse_a": np.arange(39, 19, -1)}
    choice = choose_genes(
        ranked, symbols, GenesConfig(per_cohort=20, held_out_every=3, held_out_from=5, held_out=("G7",))
    )
    names = {symbols[r].upper() for r in choice.held_out}
    assert not names & {f"G{i}" for i in (*range(5), *range(15, 20))}
    assert "G7" in names
    assert not {symbols[r].upper() for r in choice.trained} & names
    assert sorted([*choice.trained, *choice.held_out]) == list(range(40))


def test_panels_are_a_function_of_seed_step_and_sections():
    trained, weight = np.arange(100, 200), np.linspace(0.1, 5, 100)
    available = np.arange(100) % 4 != 0
    config = PanelConfig(min_genes=1, max_genes=64)
    sizes = []
    for step in range(300):
        panel = draw_panel(trained, weight, available, config, seed=3, step=step)
        again = draw_panel(trained, weight, available, config, seed=3, step=step)
        assert panel.tolist() == again.tolist() == sorted(set(panel.tolist()))
        assert available[panel].all()
        sizes.append(panel.size)
    assert min(sizes) == 1
    assert max(sizes) > 55
    # Log-uniform: half of the panels have fewer than 8 genes.
    assert 0.35 < np.mean(np.array(sizes) < 8) < 0.65


def test_a_batch_is_a_function_of_spots_step_and_epoch(tiny_shards: ShardSet, tiny_overrides: list[str]):
    config = load_config(None, tiny_overrides)
    tables = training_tables(tiny_shards, config)
    loader, other = TorchLoader(tiny_shards, tables, config), TorchLoader(tiny_shards, tables, config)
    spots = loader.batches(1)[0]
    one, two = loader.batch(spots, 7, 1), other.batch(spots, 7, 1)
    for name in ("tiles", "panel", "levels", "measured", "section", "spot_index"):
        assert (getattr(one, name) == getattr(two, name)).all(), name
    assert one.tiles.shape == (len(spots), 3, 32, 32)
    assert str(one.tiles.dtype) == str(one.levels.dtype) == "torch.uint8"
    values = log1p_cp10k(tiny_shards.counts(spots))
    rows = tables.genes.trained[one.panel.numpy()]
    np.testing.assert_array_equal((values[:, rows].toarray() > 0), one.levels.numpy() > 0)
    # Batches contain training spots only.
    split = [tiny_shards.manifest.sections[s].split for s in one.section.tolist()]
    assert set(split) == {"train"}


def test_a_missing_training_section_is_reported(
    tiny_shards: ShardSet, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ShardSet, "select", lambda *_a, **_k: np.zeros(0, np.int64))
    with pytest.raises(ValueError, match="no section has split 'train'"):
        training_tables(tiny_shards, load_config(None, tiny_overrides))


# -- start of a run ---------------------------------------------------------------------------------------------


def test_the_tables_read_the_counts_of_the_fitted_spots_only(
    tiny_shards: ShardSet, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
):
    """Every spot to fit on was drawn from all over a section, and genes were ranked from its counts."""
    read: list[tuple[str, np.ndarray]] = []
    plain = ShardSet.members_of

    def recorded(self: ShardSet, spots, parts):
        read.extend((part, np.asarray(spots)) for part in parts)
        return plain(self, spots, parts)

    monkeypatch.setattr(ShardSet, "members_of", recorded)
    config = load_config(None, [*tiny_overrides, "data.expression=records", "levels.fit_spots=100"])
    object.__setattr__(config.levels, "fit_spots", 20)
    tables = training_tables(tiny_shards, config)
    assert {part for part, _ in read} == {"expr"}
    spots = np.concatenate([spots for _, spots in read])
    first = [s.first_spot for s in tiny_shards.manifest.sections if s.split == "train"]
    assert spots.tolist() == [f + i for f in first for i in range(10)], "the first records of each section"
    assert tables.genes.trained.size > 10


def test_statistics_do_not_change_what_is_trained(tiny_shards: ShardSet, tiny_overrides: list[str]):
    """Genes, ranking and weights are those of the counts of all training spots."""
    config = load_config(None, tiny_overrides)
    tables = training_tables(tiny_shards, config)
    train = tiny_shards.select(split="train")
    section = tiny_shards.sections_of(train)
    values = log1p_cp10k(tiny_shards.counts(train))
    own = np.unique(section)
    rows, variance = rank_by_variance(
        [values[section == s] for s in own], [tiny_shards.measured(s) for s in own], config.genes.min_detection
    )
    assert tables.genes.ranked["human_breast"].tolist() == rows.tolist()
    trained = np.searchsorted(tables.genes.trained, rows[np.isin(rows, tables.genes.trained)])
    variance = variance[np.isin(rows, tables.genes.trained)]
    np.testing.assert_allclose(tables.variance[trained], variance / variance.mean(), rtol=1e-4)
