"""Which spots make which batch, and which part of a batch is a rank's: a pure function of (seed, epoch, balance).

The world size only slices the global batch, so a run can go on with another number of ranks at the very batch
where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from comtip_shards import ShardSet
from comtip_shards.sampling.balance import balanced_draw
from comtip_shards.sampling.order import epoch_batches

from comtip_fast.config.schema import DataConfig


@dataclass(frozen=True)
class Request:
    """One global batch and where it stands in the run."""

    epoch: int
    position: int
    """Batches of the epoch before it."""
    step: int
    """Optimizer step, from 1."""
    spots: np.ndarray
    """int64 (B,), all ranks' spots."""


class EpochSchedule:
    """The batches of every epoch.

    Parameters
    ----------
    shards
        Says of which section, and so of which organ or platform, a spot is.
    spots
        int64, the training spots, ascending.
    config
        ``batch_size``, ``sections_per_batch`` and ``balance``.
    seed
        The run's seed.
    """

    def __init__(self, shards: ShardSet, spots: np.ndarray, config: DataConfig, seed: int) -> None:
        self.spots, self.config, self.seed = spots, config, seed
        self._starts = np.array([s.first_spot for s in shards.manifest.sections], np.int64)
        self._group = np.array(groups_of(shards, config.balance))
        self._kept: dict[int, list[np.ndarray]] = {}

    def section_of(self, spots: np.ndarray) -> np.ndarray:
        """Return the section of each spot: int64, the shape of ``spots``."""
        return np.searchsorted(self._starts, spots, side="right") - 1

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return the epoch's global batches, int64 arrays of spots; without balancing, every spot is in exactly one."""
        if epoch not in self._kept:
            while len(self._kept) > 1:  # one epoch, and the next where batches are made ahead
                self._kept.pop(min(self._kept))
            self._kept[epoch] = self._make(epoch)
        return self._kept[epoch]

    def requests(self, epoch: int, position: int, step: int) -> Iterator[Request]:
        """Go through the batches from a place on, for ever."""
        while True:
            batches = self.batches(epoch)
            if not batches:
                return
            for place in range(position, len(batches)):
                yield Request(epoch, place, step, batches[place])
                step += 1
            epoch, position = epoch + 1, 0

    def find(self, spots: np.ndarray, epoch: int) -> int | None:
        """Return the place of a batch in its epoch; None where the epoch has no such batch."""
        for place, batch in enumerate(self.batches(epoch)):
            if np.array_equal(batch, spots):
                return place
        return None

    def _make(self, epoch: int) -> list[np.ndarray]:
        data, k = self.config, self.config.sections_per_batch
        if data.balance == "none":
            section = self.section_of(self.spots)
            return epoch_batches(section, self.spots, data.batch_size, k, self.seed, epoch, data.run)
        drawn = balanced_draw(self._group[self.section_of(self.spots)], self.spots, self.seed, epoch)
        # A spot that is drawn twice is two places of the order; runs of places would not be runs of records.
        places = np.arange(drawn.size)
        batches = epoch_batches(self.section_of(drawn), places, data.batch_size, k, self.seed, epoch)
        return [drawn[part] for part in batches]


def groups_of(shards: ShardSet, balance: str) -> list[str]:
    """Return what ``data.balance`` weighs alike, per section."""
    sections = shards.manifest.sections
    if balance == "organ":
        return [shards.cohort_of_section(i) for i in range(len(sections))]
    return [s.platform.strip().lower() for s in sections]
