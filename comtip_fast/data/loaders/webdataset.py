"""Loader with worker processes: a PyTorch ``DataLoader`` over the WebDataset tars, in this project's batch order."""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from comtip_shards import ShardError
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from comtip_fast.data.loaders.base import BaseLoader, PreparedBatch
from comtip_fast.data.loaders.schedule import ScheduledBatch
from comtip_fast.data.upload import PackedTensors


class WdsLoader(BaseLoader):
    """Loader on n = ``data.workers`` processes, each of which loads every n-th batch.

    About ``data.prefetch`` batches are prepared in advance, at least one per process. With 0 workers, a batch is loaded in this
    process when it is requested.

    Batches are passed through shared memory. If ``/dev/shm`` is too small (containers often have 64 MB), enlarge it or
    use another loader.
    """

    def _stream(self, batches: Iterator[ScheduledBatch]) -> Generator[PreparedBatch, None, None]:
        data = self.config.data
        # Only the first batch is taken here, because each worker iterates over the schedule.
        first = next(batches, None)
        if first is None:
            return
        n = data.workers
        prefetch_factor = max(1, data.prefetch // n) if n else None
        dataset = _WorkerBatches(self, first)
        loader = DataLoader(dataset, batch_size=None, num_workers=n, prefetch_factor=prefetch_factor)
        for item in start_workers(loader) if n else loader:
            if isinstance(item, ShardError):
                raise item
            yield self._received(item) if n else item

    def _received(self, sent: _Sent) -> PreparedBatch:
        """Return the batch of a worker with its tensors, which are views of the buffer that was sent."""
        # On a GPU the buffer is copied as it is, and the tensors are views of the copy.
        views = sent.packed.to(self.device) if self.device.type == "cpu" else {}
        tensors: dict[str, Any] = {name: views.get(name, torch.empty(0)) for name in sent.names}
        batch = replace(sent.without_tensors.batch, **tensors)
        return replace(sent.without_tensors, batch=batch, packed=None if views else sent.packed)


@dataclass(frozen=True)
class _Sent:
    """A batch on its way from a worker, with all its tensors in one buffer.

    Each tensor that is passed on its own costs the receiver about 0.2 ms, for which a step waits (``bench/loader/feeding.py``).
    """

    without_tensors: PreparedBatch
    names: tuple[str, ...]
    """Fields of the batch that are tensors."""
    packed: PackedTensors

    @classmethod
    def of(cls, prepared: PreparedBatch) -> _Sent:
        """Pack the tensors of a batch, unless they are packed for a GPU already."""
        tensors = prepared.batch.tensors()
        packed = prepared.packed or PackedTensors.pack(tensors, torch.device("cpu"))
        nothing: dict[str, Any] = dict.fromkeys(tensors)
        return cls(replace(prepared, batch=replace(prepared.batch, **nothing), packed=None), tuple(tensors), packed)


def start_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start the worker processes of a ``DataLoader`` so that they never garbage-collect inherited objects.

    The destructor of a DALI pipeline waits for threads that do not exist after a fork, so the worker would hang.
    """
    frozen = gc.get_freeze_count()
    gc.collect()  # otherwise garbage would be frozen, and unfreeze would move it to the oldest generation
    gc.freeze()
    try:
        return iter(loader)
    finally:
        if not frozen:
            gc.unfreeze()


class _WorkerBatches(IterableDataset[Any]):
    """Batches of a worker: worker w of n loads batches w, w + n, ...; the ``DataLoader`` reads workers in turn, in order."""

    def __init__(self, loader: WdsLoader, first: ScheduledBatch) -> None:
        self.loader, self.first = loader, first

    def __iter__(self) -> Iterator[PreparedBatch | _Sent | ShardError]:
        info = get_worker_info()
        start, step = (info.id, info.num_workers) if info else (0, 1)
        if info:
            torch.set_num_threads(1)
        first = self.first
        batches = self.loader.schedule.iterate(first.epoch, first.position, first.step)
        for scheduled in self.loader._ahead(islice(batches, start, None, step)):
            try:
                prepared = self.loader._load(scheduled)
            except ShardError as error:
                yield error
                return
            yield _Sent.of(prepared) if info else prepared
