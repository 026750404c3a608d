"""Random draws of a training step: pure functions of (seed, step, index), on the device of the index.

A draw does not depend on the rank, on other spots in the batch or on earlier draws, so a step can be repeated from its
number and its spots, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from comtip_shards.sampling import rng
from comtip_shards.sampling.rng import key
from torch import Tensor

from comtip_fast.runtime.device_rng import uniform, uniforms_of

GENE_BITS = 20
"""A (spot, gene) pair is keyed by ``spot << GENE_BITS | gene``."""


def masked_patches(seed: int, step: int, spot_index: Tensor, n_patches: int, ratio: float) -> tuple[Tensor, Tensor]:
    """Draw which floor(ratio P) of the P patches of each tile are hidden.

    Parameters
    ----------
    seed, step
        The run's seed and the optimizer step.
    spot_index
        int64 (B,).
    n_patches
        Number of patches of a tile, P.
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


def vector_uniforms_on_host(seed: int, step: int, genes: np.ndarray) -> np.ndarray:
    """Return :func:`vector_uniforms` of genes in host memory; bit-identical."""
    return rng.uniform(seed, "vector", step, index=genes)


def mispairings(
    seed: int, step: int, n: int, spot_index: Tensor, genes: Tensor, purposes: Sequence[str], *, choose: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Draw the uniform numbers for all mispairings of a step.

    Parameters
    ----------
    seed, step
        The run's seed and the optimizer step.
    n
        Number of candidates.
    spot_index, genes
        int64 (B,) and (G,).
    purposes
        What the numbers are for: ``from`` and ``to`` (orders of the genes of a stratum), ``spot`` (other spots).
    choose
        Whether each spot chooses between permuting levels within strata and taking levels of other spots.

    Returns
    -------
    tuple
        ``{purpose: independent uniform numbers in [0, 1)}``, float64 (n, B, G); and, if ``choose``, bool (B,): True (probability
        0.5) for spots that permute levels within strata, False for spots that take levels of other spots; otherwise None.
    """
    index = spot_index[:, None] * (1 << GENE_BITS) + genes
    keys = [key(seed, f"mispair-{purpose}", step, i) for purpose in purposes for i in range(n)]
    mode = [(key(seed, "mispair-mode", step),)] if choose else []
    u, *own = uniforms_of((keys, index), *((k, spot_index) for k in mode))
    by_purpose = u.view(len(purposes), n, *index.shape).unbind()
    return dict(zip(purposes, by_purpose, strict=True)), own[0][0] < 0.5 if own else None
