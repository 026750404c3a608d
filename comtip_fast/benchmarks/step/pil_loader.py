"""A straightforward loader for comparison: a dataset of spots, one PIL decode per item, PyTorch's ``DataLoader`` with workers."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from comtip_fast.data.batch import Batch
from comtip_fast.data.expression.batch_levels import levels_from_table
from comtip_fast.data.records import SpotReader
from comtip_fast.training.task import CoMTIPTask

Scheduled = Iterator[tuple[np.ndarray, int, int]]


class PilTiles(Dataset[Tensor]):
    """Tiles of spots, uint8 (3, S, S), half of them mirrored left to right at random; without this project's views."""

    def __init__(self, reader: SpotReader) -> None:
        self.reader = reader

    def __getitem__(self, spot: int) -> Tensor:
        """Return one tile."""
        data = self.reader.fetch(np.array([spot])).tiles[0]
        tile = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)
        return tile.flip(-1) if torch.rand(()) < 0.5 else tile


class PilLoader:
    """Batches of :class:`PilTiles` with panel and levels, for the spots of a schedule.

    Worker processes are started by the constructor and not with the first batch: a process that is forked after another loader has
    started its threads may inherit a lock that one of these threads holds.

    Parameters
    ----------
    task
        The task whose shard set, tables and settings are used; levels come from its table in memory.
    scheduled
        Spots, step and epoch of every batch.
    """

    def __init__(self, task: CoMTIPTask, scheduled: Scheduled) -> None:
        self.task, self.device = task, task.device
        workers = task.config.data.workers
        self._queue: list[tuple[np.ndarray, int]] = []
        self._loader = DataLoader(
            PilTiles(SpotReader(task.shards, with_counts=False)),
            batch_sampler=self._spots(scheduled),
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=task.config.data.prefetch if workers else None,
        )
        self._tiles = iter(self._loader)

    @property
    def prepared_ahead(self) -> int:
        """Most batches that the workers have prepared."""
        return self.task.config.data.workers * self.task.config.data.prefetch

    def _spots(self, scheduled: Scheduled) -> Iterator[list[int]]:
        for spots, step, _ in scheduled:
            self._queue.append((spots, step))
            yield spots.tolist()

    def close(self) -> None:
        """Stop the worker processes."""
        del self._tiles  # PyTorch stops the workers of an iterator that nothing refers to

    def batch(self) -> Batch:
        """Return the next batch on the device."""
        tiles = next(self._tiles)
        spots, step = self._queue.pop(0)
        loader, tables = self.task.loader, self.task.tables
        section = loader.schedule.section_of(spots)
        panel = loader.panel(section, step)
        batch = Batch(
            tiles=tiles,
            features=None,
            panel=torch.from_numpy(panel.astype(np.int32)),
            levels=torch.from_numpy(levels_from_table(tables, spots, panel)),
            measured=torch.from_numpy(tables.measured[section][:, panel]),
            section=torch.from_numpy(section.astype(np.int32)),
            spot_index=torch.from_numpy(spots),
            step=step,
            panel_host=panel,
        )
        return batch.to(self.device)
