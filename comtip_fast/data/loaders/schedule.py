"""The batch schedule: the spots of each global batch, a pure function of the training spots, ``data``, seed and epoch.

Ranks take slices of the global batch, so a run can resume at the same batch with a different number of ranks.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from comtip_shards import ShardSet
from comtip_shards.sampling.balance import balanced_draw
from comtip_shards.sampling.order import epoch_batches, runs
from comtip_shards.sampling.slots import slot_batches

from comtip_fast.config.schema import DataConfig

COMPUTED_AHEAD = 100_000
"""Smallest number of spots for which the next epoch's order is computed in the background; for fewer, it takes < 0.1 s."""


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
        The shard set, which gives the section, organ and platform of each spot.
    spots
        int64, the training spots, ascending.
    config
        ``batch_size``, ``sections_per_batch``, ``balance``, ``balance_temperature``, ``run`` and ``slots`` are read.
    seed
        The run's seed.
    """

    def __init__(self, shards: ShardSet, spots: np.ndarray, config: DataConfig, seed: int) -> None:
        self.spots, self.config, self.seed = spots, config, seed
        self._first_spot = np.array([s.first_spot for s in shards.manifest.sections], np.int64)
        self._first_of_tar = np.array(
            [] if config.slots is None else [s.first_spot for s in shards.manifest.shards], np.int64
        )
        self._group = np.array(balance_groups(shards, config.balance))
        self._epochs: dict[int, list[np.ndarray]] = {}
        self._lock, self._process = threading.Lock(), os.getpid()

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k != "_lock"} | {"_process": -1}

    def section_of(self, spots: np.ndarray) -> np.ndarray:
        """Return the section index of each spot, int64 in the shape of ``spots``."""
        return np.searchsorted(self._first_spot, spots, side="right") - 1

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return the epoch's global batches, int64 arrays of spots; without balancing, each spot is in exactly one batch.

        The results of three epochs are cached; a second thread that requests an epoch waits for the first.
        """
        if self._process != os.getpid():  # a forked worker may have inherited a lock that nobody releases
            self._lock, self._process = threading.Lock(), os.getpid()
        with self._lock:
            if epoch not in self._epochs:
                # The step's epoch, the next one, which batches are prefetched from, and the one after it, which is computed ahead.
                while len(self._epochs) > 2:
                    self._epochs.pop(min(self._epochs))
                self._epochs[epoch] = self._compute(epoch)
            return self._epochs[epoch]

    def iterate(self, epoch: int, position: int, step: int) -> Iterator[ScheduledBatch]:
        """Yield batches without end, from batch ``position`` of ``epoch``, which is step ``step``; yield nothing without spots."""
        while True:
            batches = self.batches(epoch)
            if not batches:
                return
            if self.spots.size >= COMPUTED_AHEAD:
                threading.Thread(target=self.batches, args=(epoch + 1,), name="next epoch's order", daemon=True).start()
            for i in range(position, len(batches)):
                yield ScheduledBatch(epoch, i, step, batches[i])
                step += 1
            epoch, position = epoch + 1, 0

    def find(self, spots: np.ndarray, epoch: int) -> int | None:
        """Return the position of the batch ``spots`` in ``epoch``, or None if the epoch does not contain it."""
        for i, batch in enumerate(self.batches(epoch)):
            if np.array_equal(batch, spots):
                return i
        return None

    def _compute(self, epoch: int) -> list[np.ndarray]:
        """Return the batches of an epoch, drawn with repetition if ``data.balance`` is set."""
        data = self.config
        if data.balance == "none":
            return self._batches_of(self.spots, self.spots, epoch, data.run)
        section = self.section_of(self.spots)
        group = self._group[section]
        if data.run == 1:
            drawn = balanced_draw(group, self.spots, self.seed, epoch, None, data.balance_temperature)
            run: int | np.ndarray = 1
        else:
            run_of = runs(section, self.spots, data.run, self.seed, epoch)
            drawn = balanced_draw(group, self.spots, self.seed, epoch, run_of, data.balance_temperature)
            # A run of the draw ends at the end of the run of its spots, or at the beginning of the next pass over a group.
            of_drawn = run_of[np.searchsorted(self.spots, drawn)]
            ends = (np.diff(of_drawn) != 0) | (np.diff(drawn) <= 0)
            run = np.concatenate([[0], np.cumsum(ends)])
        # A balanced draw repeats spots, so batches are formed of indices into the draw.
        return [drawn[rows] for rows in self._batches_of(drawn, np.arange(drawn.size), epoch, run)]

    def _batches_of(
        self, spots: np.ndarray, entries: np.ndarray, epoch: int, run: int | np.ndarray
    ) -> list[np.ndarray]:
        """Return batches of ``entries`` (n,), where entry i belongs to the spot ``spots[i]``."""
        data, section = self.config, self.section_of(spots)
        size, k = data.batch_size, data.sections_per_batch
        if data.slots is None:
            return epoch_batches(section, entries, size, k, self.seed, epoch, run)
        tar = np.searchsorted(self._first_of_tar, spots, side="right") - 1
        return slot_batches(tar, section, entries, size, data.slots, k, self.seed, epoch, run)


def balance_groups(shards: ShardSet, balance: str) -> list[str]:
    """Return the group of each section under ``data.balance``.

    For ``set``, the group is the section's shard set; for ``organ``, its cohort; otherwise, its platform in lower case.
    """
    sections = shards.manifest.sections
    if balance == "set":
        return [f"{shards.set_of_section(i):06d}" for i in range(len(sections))]
    if balance == "organ":
        return [shards.cohort_of_section(i) for i in range(len(sections))]
    return [s.platform.strip().lower() for s in sections]
