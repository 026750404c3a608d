"""PAAT's mispaired spots: right gene names, right values, wrong pairs. Pure functions of given uniforms.

Shapes: C candidates, B spots, G genes of the panel. Levels are integers; True in a mask means measured.
"""

from __future__ import annotations

import torch
from torch import Tensor


def permute_within_strata(levels_BG: Tensor, stratum_BG: Tensor, u_CBG: Tensor, v_CBG: Tensor) -> Tensor:
    """Permute each spot's levels among the genes of one stratum; return (C, B, G).

    Two independent random orders, both grouped by stratum, are matched place by place: within each stratum
    that is a uniform permutation, so a spot keeps exactly its own values.
    """
    slots_CBG = (stratum_BG + u_CBG).argsort(dim=-1, stable=True)
    taken_CBG = (stratum_BG + v_CBG).argsort(dim=-1, stable=True)
    values_CBG = levels_BG.expand_as(u_CBG.long()).gather(-1, taken_CBG)
    return torch.empty_like(values_CBG).scatter_(-1, slots_CBG, values_CBG)


def take_from_other_spots(levels_BG: Tensor, section_B: Tensor, u_CbG: Tensor, rows: slice = slice(None)) -> Tensor:
    """Give each gene of each spot the level it has in another spot of the same section; return (C, b, G).

    A spot that is alone in its section keeps its levels. Each gene's marginal over the section is kept, so
    that only the image, or the other genes, can tell.

    Parameters
    ----------
    levels_BG, section_B
        All spots that can be taken from.
    u_CbG
        Uniforms of the b spots that are asked for.
    rows
        Which of the B spots those are.
    """
    order_B = section_B.argsort(stable=True)
    place_b = order_B.argsort(stable=True)[rows]
    sorted_B, section_b = section_B[order_B], section_B[rows]
    start_b = torch.searchsorted(sorted_B, section_b)
    count_b = torch.searchsorted(sorted_B, section_b, right=True) - start_b
    own_b = place_b - start_b
    others_b1 = (count_b - 1).clamp_min(0)[:, None]
    step_CbG = (u_CbG * others_b1).long().clamp_max((count_b - 2).clamp_min(0)[:, None].expand(u_CbG.shape[1:]))
    other_CbG = (own_b[:, None] + 1 + step_CbG) % count_b[:, None]
    other_CbG = torch.where(count_b[:, None] > 1, other_CbG, own_b[:, None])
    spot_CbG = order_B[start_b[:, None] + other_CbG]
    return levels_BG.expand(u_CbG.shape[0], -1, -1).gather(1, spot_CbG)


def counted_swaps(levels_BG: Tensor, mispaired_BG: Tensor, measured_BG: Tensor, min_level_shift: int) -> Tensor:
    """Return where a swap counts: measured, and the level moved by at least ``min_level_shift``."""
    moved = (levels_BG.long() - mispaired_BG.long()).abs() >= min_level_shift
    return moved & measured_BG


def choose_hardest(logits_CBG: Tensor, counted_CBG: Tensor) -> Tensor:
    """Return the candidate (B,) whose counted swaps the pair head finds most genuine on average.

    Whole candidates are compared, never single swaps, so that the result is still a permutation. A candidate
    in which nothing counts is chosen only where no other exists.
    """
    number_CB = counted_CBG.sum(-1)
    mean_CB = torch.where(counted_CBG, logits_CBG, torch.zeros_like(logits_CBG)).sum(-1) / number_CB.clamp_min(1)
    return mean_CB.masked_fill(number_CB == 0, float("-inf")).argmax(dim=0)
