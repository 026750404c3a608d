"""Mispairing: genes of a spot are paired with wrong levels to give the negatives of pair-aware adversarial training (PAAT).

The functions draw no random numbers: callers pass uniform numbers.

Shapes: C candidates, B spots, b of them on this rank, G genes of the panel. Levels are integers; masks are True for measured
genes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def permute_within_strata(levels_BG: Tensor, stratum_BG: Tensor, u_CBG: Tensor, v_CBG: Tensor) -> Tensor:
    """Return C random permutations (C, B, G) of each spot's levels among the genes of the same stratum.

    Two independent random orders of the genes, both sorted by stratum, are matched element by element. This gives a uniform
    permutation within each stratum, so the set of a spot's levels does not change.

    Parameters
    ----------
    levels_BG, stratum_BG
        Level and stratum of each gene in each spot, integers.
    u_CBG, v_CBG
        Independent uniform numbers in [0, 1), which define the two orders.
    """
    target_CBG = (stratum_BG + u_CBG).argsort(dim=-1, stable=True)
    source_CBG = (stratum_BG + v_CBG).argsort(dim=-1, stable=True)
    values_CBG = levels_BG.expand_as(u_CBG.long()).gather(-1, source_CBG)
    return torch.empty_like(values_CBG).scatter_(-1, target_CBG, values_CBG)


def take_from_other_spots(levels_BG: Tensor, section_B: Tensor, u_CbG: Tensor, rows: slice = slice(None)) -> Tensor:
    """Replace each level by the level of the same gene in another spot of the section, and return the levels (C, b, G).

    The only spot of a section keeps its levels. Each gene's marginal distribution in the section is preserved in expectation, so
    that only the image or the other genes can reveal the replacement.

    Parameters
    ----------
    levels_BG, section_B
        Levels and section of all B spots.
    u_CbG
        Uniform numbers in [0, 1) for the b spots in ``rows``.
    rows
        The spots whose levels are replaced; by default all.
    """
    order_B = section_B.argsort(stable=True)
    rank_b = order_B.argsort(stable=True)[rows]
    sorted_B, section_b = section_B[order_B], section_B[rows]
    start_b = torch.searchsorted(sorted_B, section_b)
    count_b = torch.searchsorted(sorted_B, section_b, right=True) - start_b
    own_b = rank_b - start_b
    others_b1 = (count_b - 1).clamp_min(0)[:, None]
    step_CbG = (u_CbG * others_b1).long().clamp_max((count_b - 2).clamp_min(0)[:, None].expand(u_CbG.shape[1:]))
    other_CbG = (own_b[:, None] + 1 + step_CbG) % count_b[:, None]
    other_CbG = torch.where(count_b[:, None] > 1, other_CbG, own_b[:, None])
    spot_CbG = order_B[start_b[:, None] + other_CbG]
    return levels_BG.expand(u_CbG.shape[0], -1, -1).gather(1, spot_CbG)


def counted_swaps(levels_BG: Tensor, mispaired_BG: Tensor, measured_BG: Tensor, min_level_shift: int) -> Tensor:
    """Return a bool mask of the counted swaps: measured genes whose level changed by at least ``min_level_shift``."""
    shifted = (levels_BG.long() - mispaired_BG.long()).abs() >= min_level_shift
    return shifted & measured_BG


def choose_hardest(logits_CBG: Tensor, counted_CBG: Tensor) -> Tensor:
    """Return, for each spot, the index of the candidate whose counted swaps have the largest mean logit, int64 (B,).

    Candidates are selected as a whole, not gene by gene, so that a permutation remains a permutation. A candidate
    without counted swaps is selected only if no candidate has counted swaps.

    Parameters
    ----------
    logits_CBG
        Logits of the pair head for the mispaired sentences.
    counted_CBG
        bool masks from :func:`counted_swaps`.
    """
    number_CB = counted_CBG.sum(-1)
    mean_CB = torch.where(counted_CBG, logits_CBG, torch.zeros_like(logits_CBG)).sum(-1) / number_CB.clamp_min(1)
    return mean_CB.masked_fill(number_CB == 0, float("-inf")).argmax(dim=0)
