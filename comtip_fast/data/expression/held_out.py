"""Which genes are held out from training, to test the prediction of unseen genes.

A gene is held out by its upper-case symbol, in every cohort and species, because orthologues have the same text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from comtip_shards.sampling.rng import key

from comtip_fast.config.schema import GenesConfig
from comtip_fast.genes.families import families

PURPOSE = "held-out genes"


def drawn_symbols(
    selected: Sequence[np.ndarray], names: np.ndarray, kept: set[str], config: GenesConfig, seed: int
) -> set[str]:
    """Return the upper-case symbols to hold out by ``config.held_out_draw``, without those that ``config.held_out`` names.

    Parameters
    ----------
    selected
        For each cohort, the rows of the genes that may be trained, by decreasing variance.
    names
        Upper-case symbol of each row of the gene table.
    kept
        Symbols that are not held out.
    config
        Settings of the selection (``genes``).
    seed
        Seed of the draws ``random`` and ``families``.

    Raises
    ------
    ValueError
        ``held_out_draw=families``, but no family can be held out.
    """
    if not config.held_out_every:
        return set()
    if config.held_out_draw == "rank":
        ranked = {n for rows in selected for n in names[rows[config.held_out_from :: config.held_out_every]].tolist()}
        return ranked - kept
    # In order of a random number of the symbol, so that a further section or cohort changes few of the drawn genes.
    candidates = {n for rows in selected for n in names[rows[config.held_out_from :]].tolist()} - kept
    most = -(-len(candidates) // config.held_out_every)
    if config.held_out_draw == "random":
        return set(sorted(candidates, key=lambda name: key(seed, PURPOSE, name))[:most])
    return _whole_families(candidates, names, kept, most, seed)


def _whole_families(candidates: set[str], names: np.ndarray, kept: set[str], most: int, seed: int) -> set[str]:
    """Return the symbols of randomly drawn families, which have at most ``most`` candidates; raise ValueError if none fits.

    A family consists of all symbols of the gene table with its root; one with a symbol in ``kept`` is not drawn.
    """
    found: set[str] = set()
    drawn = 0
    of_root = families([f":{name}" for name in dict.fromkeys(names.tolist())])
    for root in sorted(of_root, key=lambda name: key(seed, PURPOSE, name)):
        own = {gene[1:] for gene in of_root[root]}
        n = len(own & candidates)
        if n and not own & kept and drawn + n <= most:
            found |= own
            drawn += n
    if candidates and not found:
        raise ValueError(
            f"genes.held_out_draw=families: no gene family can be held out. At most {most} of the {len(candidates)} genes from "
            "variance rank genes.held_out_from on are held out, and every family of symbols (KRT5, KRT14, ...) has more of them, none, or "
            "also a gene before that rank; set genes.held_out_draw=random, or lower genes.held_out_every or genes.held_out_from"
        )
    return found
