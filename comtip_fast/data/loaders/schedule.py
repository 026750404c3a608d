"""The batch schedule: which spots form which global batch, a pure function of (seed, epoch, balance).

The world size only slices the global batch, so a run can resume at the same batch on a different number of ranks.
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
class ScheduledBatch:
    """One global batch and its position in the run."""

    epoch: int
    position: int
    """Index of the batch in its epoch."""
    step: int
    """Optimizer step, from 1."""
    spots: np.ndarray
    """int64 (B,), spots of all ranks."""


class EpochSchedule:
    """The global batches of every epoch.

    Parameters
    ----------
    shards
        Gives the section of each spot, and so its organ and platform.
    spots
        int64, the training spots, ascending.
    config
        ``batch_size``, ``sections_per_batch``, ``balance`` and ``run`` are read.
    seed
        The run's seed.
    """

    def __init__(self, shards: ShardSet, spots: np.ndarray, config: DataConfig, seed: int) -> None:
        self.spots, self.config, self.seed = spots, config, seed
        self._first_spot = np.array([s.first_spot for s in shards.manifest.sections], np.int64)
        self._group = np.array(balance_groups(shards, config.balance))
        self._epochs: dict[int, list[np.ndarray]] = {}

    def section_of(self, spots: np.ndarray) -> np.ndarray:
        """Return the section of each spot: int64, in the shape of ``spots``."""
        return np.searchsorted(self._first_spot, spots, side="right") - 1

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return the epoch's global batches, int64 arrays of spots; without balancing, each spot is in exactly one."""
        if epoch not in self._epochs:
            while len(self._epochs) > 1:  # keep the current epoch, and the next one for prefetching
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = self._compute(epoch)
        return self._epochs[epoch]

    def iterate(self, epoch: int, position: int, step: int) -> Iterator[ScheduledBatch]:
        """Yield the batches from a position on, epoch after epoch, without end."""
        while True:
            batches = self.batches(epoch)
            if not batches:
                return
            for i in range(position, len(batches)):
                yield ScheduledBatch(epoch, i, step, batches[i])
                step += 1
            epoch, position = epoch + 1, 0

    def find(self, spots: np.ndarray, epoch: int) -> int | None:
        """Return the position of a batch in its epoch, or None if the epoch does not contain it."""
        for i, batch in enumerate(self.batches(epoch)):
            if np.array_equal(batch, spots):
                return i
        return None

    def _compute(self, epoch: int) -> list[np.ndarray]:
        data, k = self.config, self.config.sections_per_batch
        if data.balance == "none":
            section = self.section_of(self.spots)
            return epoch_batches(section, self.spots, data.batch_size, k, self.seed, epoch, data.run)
        drawn = balanced_draw(self._group[self.section_of(self.spots)], self.spots, self.seed, epoch)
        # A balanced draw repeats spots, so batches are formed of indices into the draw. ``data.run`` does not apply:
        # consecutive indices are not consecutive records.
        batches = epoch_batches(self.section_of(drawn), np.arange(drawn.size), data.batch_size, k, self.seed, epoch)
        return [drawn[rows] for rows in batches]


def balance_groups(shards: ShardSet, balance: str) -> list[str]:
    """Return the group of each section to which ``data.balance`` gives equal weight."""
    sections = shards.manifest.sections
    if balance == "organ":
        return [shards.cohort_of_section(i) for i in range(len(sections))]
    return [s.platform.strip().lower() for s in sections]
