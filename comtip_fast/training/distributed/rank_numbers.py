"""Reduction of a step's losses and logged numbers over ranks, by name.

Ranks may hold different names: a rank without spots has no patch features, a rank without counted swaps has no AUC. A
collective over vectors of different lengths aborts or hangs, so the length must not depend on one rank. The ranks agree on a
sorted list of names and always send a value for each of them. A rank that holds a further name sets a flag inside the same
collective, and all ranks then extend the list together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from comtip_fast.collectives import Group


@dataclass(frozen=True)
class Reduced:
    """The numbers of all ranks; the same on every rank, except for the order of the names."""

    sums: dict[str, float]
    """Sum over the ranks that hold the name; not finite if the value of one rank is not."""
    means: dict[str, float]
    """Mean over the ranks where the number is finite; NaN where it is finite on none."""
    flags: list[bool]
    """Whether any rank raised the flag."""


class RankNumbers:
    """Sums and means over ranks that need not hold the same names.

    Parameters
    ----------
    group
        The ranks. Every rank constructs its own object at the same point of the run.
    device
        Device of the vectors that are reduced.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        self.group, self.device = group, device
        self._names: tuple[list[str], list[str]] = ([], [])

    def reduce(self, sums: Mapping[str, float], means: Mapping[str, float], flags: Sequence[bool] = ()) -> Reduced:
        """Reduce over ranks; a collective call, with the same number of flags on every rank.

        Parameters
        ----------
        sums
            Values to add up, for example this rank's shares of the losses.
        means
            Values to average, for example diagnostics. Values that are not finite are left out of the mean.
        flags
            Conditions to combine over ranks with a logical or.

        Returns
        -------
        Reduced
            Results for the names that at least one rank passed; the rank's own names come first, in its order.
        """
        found = self._attempt(sums, means, flags)
        if found is None:
            self._agree(sums, means)
            found = self._attempt(sums, means, flags)
        assert found is not None, "all names have been agreed on"
        return found

    def _attempt(self, sums: Mapping[str, float], means: Mapping[str, float], flags: Sequence[bool]) -> Reduced | None:
        """Reduce under the agreed names; return None on every rank if any rank holds a further name."""
        sum_names, mean_names = self._names
        unknown = bool(sums.keys() - set(sum_names)) or bool(means.keys() - set(mean_names))
        finite = {k: v for k, v in means.items() if math.isfinite(v)}
        values = [
            float(unknown),
            *map(float, flags),
            *(sums.get(k, 0.0) for k in sum_names),
            *(float(k in sums) for k in sum_names),
            *(finite.get(k, 0.0) for k in mean_names),
            *(float(k in finite) for k in mean_names),
            *(float(k in means) for k in mean_names),
        ]
        total = self.group.sum(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()
        if total[0]:
            return None
        blocks, start = [], 1 + len(flags)
        for names in (sum_names, sum_names, mean_names, mean_names, mean_names):
            blocks.append(dict(zip(names, total[start : start + len(names)], strict=True)))
            start += len(names)
        summed, sum_holders, mean_total, mean_count, mean_holders = blocks
        return Reduced(
            {k: summed[k] for k in _order(sums, sum_names) if sum_holders[k]},
            {
                k: mean_total[k] / mean_count[k] if mean_count[k] else math.nan
                for k in _order(means, mean_names)
                if mean_holders[k]
            },
            [v > 0 for v in total[1 : 1 + len(flags)]],
        )

    def _agree(self, sums: Mapping[str, float], means: Mapping[str, float]) -> None:
        """Add the names of all ranks to the agreed names; a collective call."""
        own = json.dumps([sorted(sums), sorted(means)]).encode()
        every = [json.loads(text) for text in _gather_bytes(own, self.group, self.device)]
        old_sums, old_means = self._names
        self._names = (
            sorted(set(old_sums).union(*(names[0] for names in every))),
            sorted(set(old_means).union(*(names[1] for names in every))),
        )


def _order(own: Mapping[str, float], agreed: list[str]) -> list[str]:
    """Return this rank's names in its order, followed by the other agreed names."""
    return [*own, *(k for k in agreed if k not in own)]


def _gather_bytes(own: bytes, group: Group, device: torch.device) -> list[bytes]:
    """Return the bytes of every rank, padded with spaces to the longest."""
    most = int(group.max(torch.tensor(len(own), device=device)))
    row = torch.from_numpy(np.frombuffer(own.ljust(most), dtype=np.uint8).copy()).to(device)
    rows: Tensor = group.gather_rows(row[None], [1] * group.size)
    return [bytes(r.tolist()) for r in rows.cpu()]
