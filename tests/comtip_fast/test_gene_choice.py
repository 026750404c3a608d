"""Which genes are trained, and how often they are drawn, on sections whose true detection and gene lists are known."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from comtip_shards import ShardSet
from comtip_shards.builder.build import build_shards
from comtip_shards.format.statistics import SectionStatistics
from comtip_shards.sources import open_source

from comtip_fast.config.io import ConfigError, load_config
from comtip_fast.config.schema import GenesConfig, PanelConfig
from comtip_fast.data.expression.panel import CohortStatistics, GeneChoice, assay_balance, choose_genes, draw_panel
from comtip_fast.data.expression.training_tables import _more_genes, training_tables
from comtip_fast.data.loaders.torch import TorchLoader
from testkit import tiny

GENES = 2000


def test_too_few_genes_get_the_fix_of_the_setting_that_leaves_too_few() -> None:
    def fix(trained: int, held_out: int, eligible: int, **genes: float) -> str:
        choice = GeneChoice(np.arange(trained), np.arange(held_out), {}, {"human_breast": np.arange(eligible)})
        return _more_genes(choice, GenesConfig(**genes))

    assert fix(1, 3, 9).startswith("hold out fewer genes (genes.held_out_every=6")
    assert fix(1, 0, 9, per_cohort=1) == "raise genes.per_cohort (1)"
    assert fix(0, 0, 0) == "lower genes.min_detection (0.1)"
    assert fix(0, 0, 0, min_detection=0.0) == "train on sections that measured more genes"


def section(rng: np.random.Generator, rate: np.ndarray, n: int = 400) -> SectionStatistics:
    """Return the statistics of n spots in which each gene is detected with its true rate."""
    detected = rng.binomial(n, np.clip(rate, 0, 1))
    return SectionStatistics(n, detected, detected * 1.5, detected * 2.5)


def passing(sections: list[SectionStatistics], rule: str) -> set[int]:
    rows = np.arange(GENES)
    return set(CohortStatistics.of([(rows, s) for s in sections], GENES).ranked(0.1, rule)[0].tolist())


@pytest.fixture(scope="module")
def sections() -> tuple[np.ndarray, list[SectionStatistics]]:
    """True rates, and 100 sections whose depth varies by a factor of about two."""
    rng = np.random.default_rng(0)
    rate = rng.beta(0.4, 2.0, GENES)
    return rate, [section(rng, rate * depth) for depth in rng.lognormal(0, 0.35, 100)]


def test_more_sections_never_leave_fewer_genes(sections: tuple[np.ndarray, list[SectionStatistics]]):
    """A gene had to pass in every section: each further section removed genes."""
    _, all_sections = sections
    nested = [all_sections[:n] for n in (1, 2, 5, 20, 100)]
    now = [passing(part, "any") for part in nested]
    assert all(before <= after for before, after in pairwise(now))
    before = [len(passing(part, "every")) for part in nested]
    assert before[-1] < 0.6 * before[0]
    pooled = [len(passing(part, "pooled")) for part in nested]
    assert min(pooled) > 0.75 * max(pooled)


def test_one_shallow_section_removes_no_gene(sections: tuple[np.ndarray, list[SectionStatistics]]):
    rate, deep = sections
    shallow = section(np.random.default_rng(1), rate * 0.05)
    for rule, keeps in (("any", True), ("every", False)):
        without = passing(deep[:2], rule)
        assert (passing([*deep[:2], shallow], rule) >= without) == keeps
    truly = set(np.flatnonzero(rate > 0.2).tolist())
    assert truly <= passing([*deep[:2], shallow], "any")
    assert not set(np.flatnonzero(rate < 0.02).tolist()) & passing([*deep[:2], shallow], "any")


def test_moments_are_over_the_sections_that_measured_the_gene():
    rng = np.random.default_rng(2)
    panel, atlas = np.arange(300), np.arange(GENES)
    values = rng.gamma(2.0, 1.0, (50, GENES))
    small, large = values[:20, panel], values[20:]
    merged = CohortStatistics.of(
        [
            (panel, SectionStatistics(20, (small > 0).sum(0), small.sum(0), (small**2).sum(0))),
            (atlas, SectionStatistics(30, (large > 0).sum(0), large.sum(0), (large**2).sum(0))),
        ],
        GENES,
    )
    rows, variance = merged.ranked(0.1, "any")
    true = np.where(atlas < 300, values.var(0), large.var(0))
    assert sorted(rows.tolist()) == atlas.tolist()
    np.testing.assert_allclose(variance, true[rows])


def test_scored_genes_are_trained_whatever_their_rank():
    scored, eligible = {"a": np.arange(8)}, {"a": np.concatenate([np.arange(20, 40), np.arange(8)])}
    config = GenesConfig(per_cohort=10, held_out_every=3, held_out_from=5)
    choice = choose_genes(scored, [f"g{i}" for i in range(40)], config, eligible)
    assert set(range(5)) <= set(choice.trained.tolist())
    assert choice.ranked is scored
    assert not set(range(5)) & set(choice.held_out.tolist())


# -- held-out genes ---------------------------------------------------------------------------------------------

FAMILIES = [f"{root}{i}" for root in ("KRT", "COL", "HBB", "MMP", "ZNF") for i in range(1, 7)]
SYMBOLS = [*(f"ONE{chr(65 + i)}" for i in range(30)), *FAMILIES]


def held_out(draw: str, seed: int = 0, **more: int) -> set[str]:
    config = GenesConfig(per_cohort=0, **{"held_out_every": 4, "held_out_from": 6} | more, held_out_draw=draw)
    choice = choose_genes({"a": np.arange(len(SYMBOLS))}, SYMBOLS, config, seed=seed)
    out = {SYMBOLS[r] for r in choice.held_out}
    assert not out & {SYMBOLS[r] for r in choice.trained}
    assert len(out) + choice.trained.size == len(SYMBOLS)
    return out


def test_held_out_genes_are_drawn_at_random_with_the_seed():
    found = held_out("random")
    assert len(found) == 14, "a quarter of the 54 genes from rank 6"
    assert not found & set(SYMBOLS[:6])
    assert found == held_out("random")
    assert found != held_out("random", seed=1)
    ranked = held_out("rank")
    assert ranked == held_out("rank", seed=1) == set(SYMBOLS[6::4])
    # Over many seeds, every gene from the first rank is drawn about equally often.
    count = dict.fromkeys(SYMBOLS, 0)
    for seed in range(400):
        for name in held_out("random", seed=seed):
            count[name] += 1
    rates = np.array([count[s] / 400 for s in SYMBOLS[6:]])
    assert abs(rates - 14 / 54).max() < 0.1


def test_whole_families_are_held_out_together():
    drawn = set()
    for seed in range(10):
        found = held_out("families", seed=seed)
        assert len(found) == 12, "two families of six, a third would exceed 14"
        for root in ("KRT", "COL", "HBB", "MMP", "ZNF"):
            assert sum(name.startswith(root) for name in found) in (0, 6)
        drawn |= found
    assert drawn == set(FAMILIES)
    # A family with a gene that scores need trained is not drawn, although its other genes could be.
    assert not any("KRT1" in held_out("families", seed=s, held_out_from=31) for s in range(20))
    assert not any("KRT2" in held_out("families", seed=s, held_out_from=31) for s in range(20))


def test_families_that_cannot_be_held_out_are_an_error():
    with pytest.raises(
        ValueError, match=r"draw=families: no gene family .* At most 2 of the 54 .* set genes\.held_out_draw=random"
    ):
        held_out("families", held_out_every=27)
    assert held_out("families", held_out_every=0) == set()


def test_a_draw_of_no_genes_is_refused():
    with pytest.raises(ConfigError, match=r"genes\.held_out_draw: random; needs genes\.held_out_every of at least 2"):
        load_config(None, ["genes.held_out_draw=random", "genes.held_out_every=0"])


def test_the_draw_is_that_of_the_runs_seed(tiny_shards: ShardSet, tiny_overrides: list[str]):
    def choice(*more: str) -> list[int]:
        return training_tables(tiny_shards, load_config(None, [*tiny_overrides, *more])).genes.held_out.tolist()

    by_rank, drawn = choice(), choice("genes.held_out_draw=random")
    assert drawn != by_rank
    assert choice("genes.held_out_draw=random") == drawn
    assert choice("genes.held_out_draw=random", "train.seed=1") != drawn
    assert choice("train.seed=1") == by_rank


# -- gene lists of different size -------------------------------------------------------------------------------


def test_genes_of_a_small_list_are_not_drawn_more_often():
    """An atlas of 5,000 genes and a targeted list of 300 of them: the true availability of each gene is known."""
    G, targeted = 5000, np.arange(300)
    measured = np.ones((2, G), bool)
    measured[1, targeted.size :] = False
    balance = assay_balance(measured, np.array([800, 200]), 2)
    assert balance[:300].max() < balance[300:].min() == 1.0
    rng = np.random.default_rng(0)
    config = PanelConfig(min_genes=64, max_genes=64)

    def frequencies(balanced: bool) -> tuple[float, float]:
        drawn = np.zeros(G)
        for step in range(250):
            batch = measured[np.unique(rng.choice(2, 2, p=[0.8, 0.2]))]
            more = {"balance": balance, "measured": batch} if balanced else {}
            panel = draw_panel(np.arange(G), np.ones(G), batch.any(0), config, seed=0, step=step, **more)
            assert np.unique(panel).size == 64
            if balanced:
                assert batch[:, panel].any(1).all(), "a section without a gene trains nothing"
            drawn[panel] += 1
        return drawn[:300].mean(), drawn[300:].mean()

    few, many = frequencies(balanced=False)
    few_balanced, many_balanced = frequencies(balanced=True)
    assert few > 1.4 * many
    assert many > 1
    assert abs(few_balanced / many_balanced - 1) < 0.2


def test_equal_gene_lists_are_drawn_as_without_balance():
    measured = np.ones((3, 100), bool)
    balance = assay_balance(measured, np.array([5, 0, 7]), 2)
    assert balance.tolist() == [1.0] * 100
    weight, config = np.linspace(0.1, 3, 100), PanelConfig(max_genes=40)
    for step in range(50):
        plain = draw_panel(np.arange(100), weight, measured[0], config, seed=1, step=step)
        more = {"balance": balance, "measured": measured}
        assert (
            plain.tolist()
            == draw_panel(np.arange(100), weight, measured[0], config, seed=1, step=step, **more).tolist()
        )


def test_a_gene_is_trained_where_it_was_measured(tmp_path: Path, tiny_overrides: list[str]):
    names = [tiny.TinySection("t1", "donor_a", "train"), tiny.TinySection("t2", "donor_b", "train")]
    source = tiny.write_tiny_source(tmp_path / "source", [*names, tiny.TinySection("v1", "donor_c", "val")]).parent
    counts = pd.read_csv(source / "t2.tsv.gz", sep="\t", index_col=0)
    targeted = list(tiny.SYMBOLS[:6])
    counts[targeted].to_csv(source / "t2.tsv.gz", sep="\t")
    build_shards(open_source(source), tmp_path / "set", tile_px=32, tile_um=224.0, min_mpp=5.0)
    shards = ShardSet(tmp_path / "set")
    config = load_config(None, [*tiny_overrides, f"data.shards={shards.path}", "genes.held_out_every=0"])
    tables = training_tables(shards, config)
    symbols = np.array([shards.genes[row].symbol for row in tables.genes.trained])
    assert sorted(symbols) == sorted(tiny.SYMBOLS), "genes that only one section measured are trained"
    assert set(symbols[tables.measured[shards.section_number("t2")]]) == set(targeted)
    loader = TorchLoader(shards, tables, config)
    for step, spots in enumerate(loader.batches(0) + loader.batches(1), start=1):
        batch = loader.batch(spots, step, 0)
        if batch.panel.numel() > 1:
            assert bool(batch.measured.any(1).all()), "every spot has a gene to train"
        assert not batch.levels[~batch.measured].any()
    loader.close()
