"""Tars that a rank touches in a step, and bytes that a node fetches in an epoch, without and with slots, on synthetic sets.

``PYTHONPATH=.:kernels:data_shards python bench/scale/fetch.py [NAME ...]`` counts in the order of an epoch and needs no tiles.
*Whole tars* is what a node fetches if its cache holds its tars for an epoch; *ranges* is what it fetches by byte ranges
without a cache.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np

from comtip_fast.collectives import share_of
from comtip_fast.config.schema import DataConfig
from comtip_fast.data.loaders.schedule import EpochSchedule

SETS = {"hest": (1_500_000, 1_100), "m5": (5_000_000, 1_500), "m20": (20_000_000, 3_000)}
"""Number of spots and of sections of each set."""
RECORDS, RECORD_BYTES, SLOTS, RANKS_PER_NODE = 512, 28_700, 64, 8


def synthetic(n_spots: int, n_sections: int, **settings: Any) -> tuple[EpochSchedule, np.ndarray]:
    """Return the schedule of a set whose sections have log-normal sizes, and the first spot of each tar."""
    share = np.random.default_rng(0).lognormal(0, 1, n_sections)
    edges = np.concatenate([[0], np.round(np.cumsum(share) / share.sum() * n_spots)]).astype(np.int64)
    sections = [SimpleNamespace(first_spot=int(f), platform=f"p{i % 5 // 4}") for i, f in enumerate(edges[:-1])]
    first = np.concatenate([np.arange(a, b, RECORDS) for a, b in pairwise(edges)])
    tars = [SimpleNamespace(first_spot=int(f)) for f in first]
    shards: Any = SimpleNamespace(manifest=SimpleNamespace(sections=sections, shards=tars))
    return EpochSchedule(shards, np.arange(n_spots), DataConfig(**settings), seed=0), first


def measure(name: str, nodes: int, **settings: Any) -> str:
    """Return the table row of one set."""
    n_spots, n_sections = SETS[name]
    schedule, first = synthetic(n_spots, n_sections, **settings)
    sizes = np.diff(np.append(first, n_spots)) * RECORD_BYTES
    world, read, touched = nodes * RANKS_PER_NODE, np.zeros((nodes, first.size), bool), []
    for number, batch in enumerate(schedule.batches(0)):
        tar = np.searchsorted(first, batch, side="right") - 1
        for node in range(nodes):
            read[node, tar[_of_node(batch.size, node, world)]] = True
        if number < 8:
            touched += [np.unique(tar[share_of(batch.size, rank, world)]).size for rank in range(world)]
    fetched = read @ sizes / 1e9
    cells = [name, nodes, settings.get("slots") or "-", settings.get("balance", "none"), f"{np.mean(touched):.1f}"]
    cells += [f"{fetched.mean():.1f}", f"{fetched.max():.1f}", f"{n_spots * RECORD_BYTES / nodes / 1e9:.1f}"]
    return f"| {' | '.join(map(str, cells))} |"


def _of_node(size: int, node: int, world: int) -> slice:
    ranks = [share_of(size, rank, world) for rank in (node * RANKS_PER_NODE, (node + 1) * RANKS_PER_NODE - 1)]
    return slice(ranks[0].start, ranks[1].stop)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"sets, of {', '.join(SETS)} (default: all)")
    parser.add_argument("--batch", type=int, default=65_536, help="spots per batch (default 65536)")
    parser.add_argument("--run", type=int, default=16, help="data.run: consecutive records read together (default 16)")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 8, 64], help="numbers of nodes (default 1 8 64)")
    args = parser.parse_args()
    print(
        "| set | nodes | slots | balance | tars per rank-step | GB per node, whole tars | largest | GB per node, ranges |"
    )
    print("|---|---|---|---|---|---|---|---|")
    shared = {"batch_size": args.batch, "sections_per_batch": 128, "run": args.run}
    for name in args.names or SETS:
        for nodes in args.nodes:
            for balance in ("none", "platform"):
                for slots in (None, SLOTS):
                    print(measure(name, nodes, **shared, balance=balance, slots=slots), flush=True)


if __name__ == "__main__":
    main()
