"""What ``engine.panel_sizes`` costs and saves: distinct shapes over 2,000 steps, and the tokens and genes that padding adds.

    PYTHONPATH=.:kernels:data_shards python bench/train/panel_sizes.py [--sizes 4 8] [--config 1gpu 8xh100 ...]

Panels are drawn as in a run in which every section measured all genes. Tokens are those of the rank that has the most, for which the
other ranks wait.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from comtip_fast.collectives import counts_of
from comtip_fast.config.io import load_config
from comtip_fast.config.schema import RunConfig
from comtip_fast.genes.tokens import HostTokens
from testkit.synthetic_panels import DRAWS, panels_of, shapes_of, table_shards, tokens_of

ROOT = Path(__file__).parents[2]
RANKS = {"1gpu": 1, "8xh100": 8, "multinode_h100": 64}


def measure(config: RunConfig, ranks: int) -> tuple[int, float, float]:
    """Return the number of distinct shapes, and the ratios of the tokens and of the genes of all steps to those without padding."""
    panels, Q, shards = panels_of(config), config.levels.n_levels, table_shards(config, ranks)
    host = tokens_of(max(config.genes.per_cohort, config.panel.max_genes), config.text, config.engine.panel_sizes > 0)
    shapes = [shapes_of(host, config, shards)(panel) for panel in panels]
    if host.padded is None:
        return len(set(shapes)), 1.0, 1.0
    before = sum(_most_tokens(host, panel, Q, shards) for panel in panels)
    tokens, genes = (sum(shape[i] for shape in shapes) for i in (2, 1))
    return len(set(shapes)), tokens / before, genes / sum(panel.size for panel in panels)


def _most_tokens(host: HostTokens, panel: np.ndarray, n_levels: int, shards: int) -> int:
    """Return the number of tokens of the rank that has the most, without padding."""
    n = panel.size * n_levels
    return int(host.take(panel).tokens_of_ranks(n_levels, counts_of(n, shards if shards <= n else 1)).max())


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4], help="values of engine.panel_sizes (default 4)")
    parser.add_argument(
        "--config", nargs="+", default=[*RANKS], choices=[*RANKS], help="names of configs (default all)"
    )
    args = parser.parse_args()
    print(
        f"| config | ranks | engine.panel_sizes | shapes of {DRAWS} steps | tokens | genes |\n|---|---|---|---|---|---|"
    )
    for name in args.config:
        for sizes in args.sizes:
            config = load_config(ROOT / "configs" / f"{name}.yaml", [f"engine.panel_sizes={sizes}"])
            shapes, tokens, genes = measure(config, RANKS[name])
            print(f"| `{name}` | {RANKS[name]} | {sizes} | {shapes} | x {tokens:.3f} | x {genes:.3f} |", flush=True)


if __name__ == "__main__":
    main()
