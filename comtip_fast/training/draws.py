"""Random draws of a training step: pure functions of (seed, step, index), on the device of the index.

A draw does not depend on the rank, on other spots in the batch or on earlier draws, so a step can be repeated from its
number and its spots, on any number of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from comtip_fast.runtime.device_rng import uniform, uniforms

GENE_BITS = 20
"""A (spot, gene) pair is keyed by ``spot << GENE_BITS | gene``."""


def masked_patches(seed: int, step: int, spot_index: Tensor, n_patches: int, ratio: float) -> tuple[Tensor, Tensor]:
    """Draw the patches to hide from each tile: floor(ratio P) of P.

    Parameters
    ----------
    seed, step
        The run's seed and the optimizer step.
    spot_index
        int64 (B,).
    n_patches
        P.
    ratio
        Share of patches to hide.

    Returns
    -------
    tuple
        int64 (B, V) indices of visible patches and (B, K) indices of hidden patches, each ascending.
    """
    hidden = int(ratio * n_patches)
    patches = torch.arange(n_patches, device=spot_index.device)
    u = uniform(seed, "mask", step, index=spot_index[:, None] * n_patches + patches)
    order = u.argsort(dim=1, stable=True)
    return order[:, hidden:].sort(dim=1).values, order[:, :hidden].sort(dim=1).values


def kept_identities(seed: int, step: int, genes: Tensor, drop: float) -> Tensor:
    """Return bool (G,): whether each gene keeps its identity embedding in the step, with probability 1 - ``drop``."""
    return uniform(seed, "identity", step, index=genes) >= drop


def vector_uniforms(seed: int, step: int, genes: Tensor) -> Tensor:
    """Return float64 (G,) uniforms in [0, 1) that decide whether a gene's name or vector is dropped."""
    return uniform(seed, "vector", step, index=genes)


def mispair_uniforms(seed: int, purpose: str, step: int, n: int, spot_index: Tensor, genes: Tensor) -> Tensor:
    """Return float64 (n, B, G) uniforms in [0, 1), one per candidate, spot and gene; different purposes have independent numbers."""
    index = spot_index[:, None] * (1 << GENE_BITS) + genes
    return uniforms(seed, purpose, step, n=n, index=index)


def mispair_within_stratum(seed: int, step: int, spot_index: Tensor) -> Tensor:
    """Return bool (B,): whether a spot permutes levels within strata (probability 0.5) instead of taking those of other spots."""
    return uniform(seed, "mispair-mode", step, index=spot_index) < 0.5
