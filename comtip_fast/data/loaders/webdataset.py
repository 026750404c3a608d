"""Worker processes read the WebDataset tars: a PyTorch ``DataLoader``, in this project's order."""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterator
from itertools import islice
from typing import Any

import torch
from comtip_shards import ShardError
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from comtip_fast.data.loaders.base import BaseLoader, Made
from comtip_fast.data.loaders.schedule import Request


class WdsLoader(BaseLoader):
    """Each of ``data.workers`` processes makes every n-th batch; about ``data.prefetch`` batches are ready.

    Batches come through shared memory; where that is small (containers often have 64 MB), give the container more or
    take another loader.
    """

    def _stream(self, requests: Iterator[Request]) -> Generator[Made, None, None]:
        data = self.config.data
        # A tee would hold on to requests; workers make their own from the first one.
        first = next(requests, None)
        if first is None:
            return
        n = data.workers
        ahead = max(1, data.prefetch // n) if n else None
        batches = _Batches(self, first)
        loader = DataLoader(batches, batch_size=None, num_workers=n, prefetch_factor=ahead)
        for made in forked(loader) if n else loader:
            if isinstance(made, ShardError):
                raise made
            yield made


def forked(loader: DataLoader) -> Iterator[Any]:
    """Start a ``DataLoader``'s worker processes so that they never collect what they inherited.

    A pipeline of DALI, when it is collected, waits for its threads, which a fork has not: the worker would hang for ever.
    """
    frozen = gc.get_freeze_count()
    gc.collect()  # thawed, garbage would count as old and stay for long
    gc.freeze()
    try:
        return iter(loader)
    finally:
        if not frozen:
            gc.unfreeze()


class _Batches(IterableDataset):
    """Worker w of n makes batches w, w + n, ...; a ``DataLoader`` takes them in turn, so in order."""

    def __init__(self, loader: WdsLoader, first: Request) -> None:
        self.loader, self.first = loader, first

    def __iter__(self) -> Iterator[Made | ShardError]:
        info = get_worker_info()
        start, step = (info.id, info.num_workers) if info else (0, 1)
        if info:
            torch.set_num_threads(1)
        first = self.first
        for request in islice(self.loader.plan.requests(first.epoch, first.position, first.step), start, None, step):
            try:
                made: Made | ShardError = self.loader._make(request)
            except ShardError as error:
                made = error
            yield made
            if isinstance(made, ShardError):
                return
