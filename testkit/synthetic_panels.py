"""Panels of synthetic runs, and the sizes that they give a step."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from comtip_fast.collectives import counts_of, share_of
from comtip_fast.config.schema import PanelConfig, RunConfig, TextConfig
from comtip_fast.data.expression.panel import draw_panel
from comtip_fast.genes import GeneTokenizer
from comtip_fast.genes.panel_sizes import padded_genes
from comtip_fast.genes.tokens import HostTokens, gene_tokens
from testkit.synthetic_task import gene_names

DRAWS = 2000
"""Steps over which sizes are counted."""
Shapes = Callable[[np.ndarray], tuple[int, ...]]


def table_shards(config: RunConfig, ranks: int) -> int:
    """Return over how many ranks the sentences of a panel are divided."""
    return ranks if config.engine.shard_table else 1


def shapes_of(host: HostTokens, config: RunConfig, shards: int, rank: int = 0) -> Shapes:
    """Return a function from a panel (G,) to everything of it that shapes of a step depend on.

    Parameters
    ----------
    host
        Tokens of all genes; with :attr:`HostTokens.padded`, the last one pads panels.
    config
        Config of the run.
    shards, rank
        Number of ranks over which the sentences of a panel are divided, and the rank whose shapes are returned.
    """
    vocabulary, n_levels = _vocabulary(), config.levels.n_levels

    def shapes(panel: np.ndarray) -> tuple[int, ...]:
        if host.padded is not None:
            size = padded_genes(panel.size, config.engine.panel_sizes, config.panel.max_genes)
            # A panel of one gene has no pair loss.
            single, panel = (
                panel.size < 2,
                np.pad(panel, (0, size - panel.size), constant_values=host.length_G.size - 1),
            )
        taken, n = host.take(panel), panel.size * n_levels
        counts = counts_of(n, shards if 1 < shards <= n else 1)
        own = share_of(n, rank if len(counts) > 1 else 0, len(counts))
        if host.padded is None:
            sizes = taken.sizes(n_levels, vocabulary, own)
            return panel.size, taken.ids_GT.shape[1], sizes.tokens, sizes.genes, sizes.names
        sizes, added = taken.padded_sizes(n_levels, vocabulary, own, counts)
        return int(single), panel.size, sizes.tokens, sizes.genes, sizes.names, added

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
    n = host.length_G.size - (host.padded is not None)
    following = np.arange(n)
    lengths = np.unique(host.length_G)
    while lengths.size:
        for length in lengths:
            genes = np.flatnonzero(host.length_G[:n] == length)
            following[genes] = np.roll(genes, -1)
        other = following[panel].astype(panel.dtype)
        if (other != panel).any() and shapes(other) == shapes(panel):
            return other
        lengths, following = lengths[1:], np.arange(n)
    raise ValueError(
        f"no other panel of {panel.size} genes with the sizes {shapes(panel)} is found; choose a larger panel"
    )


def shapes_over_steps(config: RunConfig, ranks: int) -> int:
    """Return the number of distinct sets of shapes over :data:`DRAWS` steps of panels, on rank 0."""
    n = max(config.genes.per_cohort, config.panel.max_genes)
    shapes = shapes_of(tokens_of(n, config.text, config.engine.panel_sizes > 0), config, table_shards(config, ranks))
    return len({shapes(drawn) for drawn in panels_of(config)})


def panels_of(config: RunConfig) -> list[np.ndarray]:
    """Return the panels of the first :data:`DRAWS` steps of a run in which every section measured all genes."""
    n = max(config.genes.per_cohort, config.panel.max_genes)
    return _panels(n, config.panel, config.train.seed)


@cache
def tokens_of(n: int, text: TextConfig, padded: bool = False) -> HostTokens:
    """Return the tokens of the first n protein-coding genes of the shipped table, with ``padded`` also those of the padding gene."""
    tokens = gene_tokens(GeneTokenizer.load(), gene_names(n), np.arange(1, n + 1), text)
    host = tokens.with_padding().host if padded else tokens.host
    assert host is not None
    return host


@cache
def _panels(n: int, panel: PanelConfig, seed: int) -> list[np.ndarray]:
    all_genes, weight = np.arange(n), np.ones(n)
    return [draw_panel(all_genes, weight, weight > 0, panel, seed=seed, step=step) for step in range(1, DRAWS + 1)]
