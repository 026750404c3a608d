"""Panels of synthetic runs, and the sizes that they give a step."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from comtip_fast.collectives import share_of
from comtip_fast.config.schema import PanelConfig, RunConfig, TextConfig
from comtip_fast.data.expression.panel import draw_panel
from comtip_fast.genes import GeneTokenizer
from comtip_fast.genes.tokens import HostTokens, gene_tokens
from testkit.synthetic_task import gene_names

DRAWS = 2000
"""Steps over which sizes are counted."""
Shapes = Callable[[np.ndarray], tuple[int, ...]]


def table_shards(config: RunConfig, ranks: int) -> int:
    """Return over how many ranks the sentences of a panel are divided."""
    return ranks if config.engine.shard_table else 1


def shapes_of(host: HostTokens, n_levels: int, shards: int) -> Shapes:
    """Return a function from a panel (G,) to everything of it that shapes of a step depend on, on rank 0 of ``shards``."""
    vocabulary = _vocabulary()

    def shapes(panel: np.ndarray) -> tuple[int, ...]:
        taken, n = host.take(panel), panel.size * n_levels
        sizes = taken.sizes(n_levels, vocabulary, share_of(n, 0, shards) if 1 < shards <= n else slice(0, n))
        return panel.size, taken.ids_GT.shape[1], sizes.tokens, sizes.genes, sizes.names

    return shapes


@cache
def _vocabulary() -> int:
    return GeneTokenizer.load().vocab_size


def same_sizes(host: HostTokens, panel: np.ndarray, shapes: Shapes) -> np.ndarray:
    """Return a panel of other genes, or of the same ones in another order, with the shapes of ``panel``.

    Genes are exchanged with the next one whose name has as many tokens. The number of distinct tokens can differ then, so
    fewer lengths are exchanged until it agrees.

    Raises
    ------
    ValueError
        No such panel is found.
    """
    following = np.arange(host.length_G.size)
    lengths = np.unique(host.length_G)
    while lengths.size:
        for length in lengths:
            genes = np.flatnonzero(host.length_G == length)
            following[genes] = np.roll(genes, -1)
        other = following[panel].astype(panel.dtype)
        if (other != panel).any() and shapes(other) == shapes(panel):
            return other
        lengths, following = lengths[1:], np.arange(host.length_G.size)
    raise ValueError(
        f"no other panel of {panel.size} genes with the sizes {shapes(panel)} is found; choose a larger panel"
    )


def shapes_over_steps(config: RunConfig, ranks: int) -> int:
    """Return the number of distinct sets of shapes over :data:`DRAWS` steps of panels, on rank 0."""
    n = max(config.genes.per_cohort, config.panel.max_genes)
    shards = table_shards(config, ranks)
    return _distinct_shapes(n, config.panel, config.train.seed, config.text, config.levels.n_levels, shards)


@cache
def _distinct_shapes(n: int, panel: PanelConfig, seed: int, text: TextConfig, n_levels: int, shards: int) -> int:
    shapes = shapes_of(tokens_of(n, text), n_levels, shards)
    return len({shapes(drawn) for drawn in _panels(n, panel, seed)})


@cache
def tokens_of(n: int, text: TextConfig) -> HostTokens:
    """Return the tokens of the first n protein-coding genes of the shipped table."""
    host = gene_tokens(GeneTokenizer.load(), gene_names(n), np.arange(1, n + 1), text).host
    assert host is not None
    return host


@cache
def _panels(n: int, panel: PanelConfig, seed: int) -> list[np.ndarray]:
    """Return the panels of the first steps of a run in which every section measured all of its n genes."""
    all_genes, weight = np.arange(n), np.ones(n)
    return [draw_panel(all_genes, weight, weight > 0, panel, seed=seed, step=step) for step in range(1, DRAWS + 1)]
