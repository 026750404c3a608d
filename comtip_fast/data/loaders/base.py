"""What every loader shares: the order, panel, levels, views, faults, and batches made ahead.

A loader is asked for a batch by its spots, step and epoch; the answer is a function of those alone. It knows the
order, so it makes the batches that come next in the background; a guess that proves wrong costs time, never truth.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from comtip_shards import RECORD_FAULTS, ShardError, ShardSet
from scipy import sparse
from torch import Tensor
from tqdm import tqdm

from comtip_fast.collectives import share_of
from comtip_fast.config.schema import RunConfig
from comtip_fast.data.augment.apply_views import apply_views
from comtip_fast.data.augment.views import ViewPlan, plan_views, view_of
from comtip_fast.data.batch import Batch
from comtip_fast.data.expression.batch_levels import levels_from_counts, levels_from_table
from comtip_fast.data.expression.panel import draw_panel
from comtip_fast.data.expression.training_tables import TrainingTables
from comtip_fast.data.loaders.schedule import EpochSchedule, Request
from comtip_fast.data.records import Csr, DecodedSpots, SpotReader

log = logging.getLogger("comtip_fast")
Stem = Callable[[Tensor], Tensor]
MAX_LOGGED = 20


@dataclass
class Made:
    """A batch on its way: whole but for its views where a GPU makes those."""

    request: Request
    batch: Batch
    tiles_NSS3: Tensor | None = None
    """Decoded tiles, where ``batch.tiles`` is still to be made from them."""
    plan: ViewPlan | None = None
    faults: dict[int, ShardError] = field(default_factory=dict)
    """What was wrong with the records of spots that others stand in for."""


class BaseLoader(ABC):
    """Makes a rank's part of global batches of training spots.

    Parameters
    ----------
    shards
        The shard set.
    tables
        What :func:`comtip_fast.data.expression.training_tables.training_tables` made of its training split.
    config
        The run.
    rank, world
        Which part of each global batch is made; the panel is that of the global batch. What ranks must know of one
        another's spots (levels, sections) they gather from the batches themselves: where a damaged record was skipped,
        only the rank that read it knows who stands in.
    device
        Where views are made: on a GPU decoded tiles are moved first.
    frozen_stem
        Maps uint8 tiles (N, 3, S, S) to features (N, P, c). Given, it is run once over every view of every
        training spot, in a fixed order (so that a resumed run gets the same bits), and batches carry features.
        That happens when the first batch is asked for: a run that is already finished does not wait for it.
    """

    def __init__(
        self,
        shards: ShardSet,
        tables: TrainingTables,
        config: RunConfig,
        frozen_stem: Stem | None = None,
        *,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world} ranks cannot be")
        self.shards, self.tables, self.config = shards, tables, config
        self.rank, self.world, self.device = rank, world, torch.device(device)
        self.seed = config.train.seed
        self.plan = EpochSchedule(shards, tables.spots, config.data, self.seed)
        self.records = SpotReader(shards, with_counts=tables.levels is None)
        self.faults: dict[int, ShardError] = {}
        """Damaged records met so far, by spot."""
        self._stem = frozen_stem
        self._running: Generator[Made, None, None] | None = None
        self._next: tuple[int, int, int] | None = None
        self._wait_s = 0.0

    # -- what training asks for -----------------------------------------------------------------------

    def prepare(self) -> None:
        """Run the frozen stem now, where there is one; else the first batch does."""
        if self._stem is not None:
            self._cache  # noqa: B018

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return the epoch's global batches as arrays of spot indices."""
        return self.plan.batches(epoch)

    def batch(self, spot_index: np.ndarray, step: int, epoch: int) -> Batch:
        """Make this rank's part of the global batch ``spot_index``.

        Asked for in the order of :meth:`batches`, batches come from the background; any other is made at once.

        Raises
        ------
        ShardError
            A record is damaged and ``data.faults`` is ``stop``, or too many were.
        """
        began = time.perf_counter()
        made = self._made(np.asarray(spot_index, np.int64), step, epoch)
        batch = self._deliver(made)
        self._wait_s += time.perf_counter() - began
        return batch

    def iterate(self, epoch: int = 0, position: int = 0, step: int = 1) -> Generator[Batch, None, None]:
        """Go through this rank's batches from a place on, for ever; close the iterator to stop its workers."""
        stream = self._stream(self.plan.requests(epoch, position, step))
        try:
            for made in stream:
                yield self._deliver(made)
        finally:
            stream.close()

    def metrics(self) -> dict[str, float]:
        """Return what to log: seconds spent waiting for batches since the last call; damaged records so far, also by kind."""
        kinds = Counter(error.kind for error in self.faults.values())
        out = {"loader_wait_s": self._wait_s, "faults": float(len(self.faults))}
        self._wait_s = 0.0
        return out | {f"faults_{kind}": float(kinds[kind]) for kind in RECORD_FAULTS}

    def close(self) -> None:
        """Stop what works in the background; asked for another batch, the loader starts again."""
        if self._running is not None:
            self._running.close()
        self._running = self._next = None

    def tiles(self, spot_index: np.ndarray, view: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Return any spots' tiles in the views asked for, in memory of the CPU.

        Returns
        -------
        spots, tiles
            int64 (n,) and uint8 (n, 3, S, S): all spots asked for, but for damaged ones under ``data.faults: skip``.
        """
        got = self.records.read(spot_index)
        if self.config.data.faults == "stop":
            got.refuse_faults()
        self._count({int(spot_index[i]): error for i, error in got.faults.items()})
        whole = np.setdiff1d(np.arange(spot_index.size), list(got.faults)).astype(np.int64)
        plan = self._views(spot_index[whole], view[whole])
        return got.spots[whole], apply_views(torch.from_numpy(got.tiles_NSS3[whole]), plan)

    def counts(self, spot_index: np.ndarray) -> tuple[np.ndarray, sparse.csr_matrix]:
        """Return any spots' raw counts: int64 (n,) and int32 CSR (n, n_genes), damaged ones as in :meth:`tiles`."""
        counts, faults = self.records.counts(spot_index)
        if faults and self.config.data.faults == "stop":
            raise faults[min(faults)]
        self._count({int(spot_index[i]): error for i, error in faults.items()})
        return np.delete(spot_index, list(faults)), counts

    # -- making a batch -------------------------------------------------------------------------------

    @abstractmethod
    def _stream(self, requests: Iterator[Request]) -> Generator[Made, None, None]:
        """Make batches in the order asked for, some of them ahead."""

    def _made(self, spots: np.ndarray, step: int, epoch: int) -> Made:
        if self._stem is not None:
            return self._from_cache(Request(epoch, 0, step, spots))
        expected = self._running is not None and self._next is not None and self._next[:2] == (epoch, step)
        if not expected or not self._stands_at(spots):
            self.close()
            position = self.plan.find(spots, epoch)
            if position is None:
                return self._make(Request(epoch, 0, step, spots))
            self._running = self._stream(self.plan.requests(epoch, position, step))
        assert self._running is not None
        try:
            made = next(self._running)
        except BaseException:
            self.close()
            raise
        r = made.request
        last = r.position + 1 == len(self.plan.batches(r.epoch))
        self._next = (r.epoch + 1, r.step + 1, 0) if last else (r.epoch, r.step + 1, r.position + 1)
        return made

    def _stands_at(self, spots: np.ndarray) -> bool:
        assert self._next is not None
        epoch, _, position = self._next
        batches = self.plan.batches(epoch)
        return position < len(batches) and np.array_equal(batches[position], spots)

    def _make(self, request: Request) -> Made:
        """Read, decode and complete one batch in this thread."""
        return self._complete(request, self._read(request, self.records.read))

    def _read(self, request: Request, read: Callable[[np.ndarray], DecodedSpots]) -> DecodedSpots:
        """Read this rank's records; where one is damaged, stop or let another spot of the batch stand in."""
        own = share_of(request.spots.size, self.rank, self.world)
        got = read(request.spots[own])
        if got.faults and self.config.data.faults == "stop":
            got.refuse_faults()
        for i in sorted(got.faults):
            error = got.faults[i]
            others = self._stand_ins(request.spots, own.start + i)
            if not any(got.put(i, self.records.read(other)) for other in others):
                raise ShardError(f"no record of a batch of {request.spots.size} spots is whole; first: {error}")
        return got

    def _stand_ins(self, spots: np.ndarray, place: int) -> Iterator[np.ndarray]:
        """Go through the batch's other spots from ``place`` on, its own section's first: the same on any number of ranks."""
        section = self.plan.section_of(spots)
        after = (place + 1 + np.arange(spots.size - 1)) % spots.size
        after = after[np.argsort(section[after] != section[place], kind="stable")]
        yield from spots[after][:, None]

    def _complete(self, request: Request, got: DecodedSpots) -> Made:
        """Join tiles with panel, levels and sections; make the views unless a GPU does."""
        csr = self.records.csr(got.encoded) if self.records.with_counts else None
        batch = self._labels(request, got.spots, csr)
        tiles = torch.as_tensor(got.tiles_NSS3)
        view = view_of(self.config.data.views, got.spots, seed=self.seed, epoch=request.epoch)
        plan = self._views(got.spots, view)
        if self.device.type != "cpu":
            return Made(request, batch, tiles, plan, got.replaced)
        batch.tiles = apply_views(tiles, plan)
        return Made(request, batch, faults=got.replaced)

    def _deliver(self, made: Made) -> Batch:
        self._count(made.faults)
        if made.tiles_NSS3 is not None and made.plan is not None:
            tiles = made.tiles_NSS3.to(self.device, non_blocking=True)
            made.batch.tiles = apply_views(tiles, made.plan)
        return made.batch

    def _count(self, faults: dict[int, ShardError]) -> None:
        for spot, error in faults.items():
            if spot not in self.faults and len(self.faults) < MAX_LOGGED:
                log.warning("skipped a damaged record: %s", error)
            self.faults[spot] = error
            if len(self.faults) > self.config.data.max_faults:
                most = self.config.data.max_faults
                raise ShardError(f"more than data.max_faults={most} records are damaged; the last one: {error}")

    def _labels(self, request: Request, spots: np.ndarray, csr: Csr | None) -> Batch:
        panel = self.panel(self.plan.section_of(request.spots), request.step)
        section = self.plan.section_of(spots)
        if csr is None:
            levels = levels_from_table(self.tables, spots, panel)
        else:
            levels = levels_from_counts(self.tables, csr, panel)
        return Batch(
            tiles=None,
            features=None,
            panel=torch.from_numpy(panel.astype(np.int32)),
            levels=torch.from_numpy(levels),
            measured=torch.from_numpy(self.tables.measured[section][:, panel]),
            section=torch.from_numpy(section.astype(np.int32)),
            spot_index=torch.from_numpy(spots),
            step=request.step,
        )

    def panel(self, section: np.ndarray, step: int) -> np.ndarray:
        """Draw the step panel from the genes that the global batch's sections measured; positions in ``trained``."""
        available = self.tables.measured[np.unique(section)].any(0)
        return draw_panel(
            self.tables.genes.trained,
            self.tables.variance,
            available,
            self.config.panel,
            seed=self.seed,
            step=step,
        )

    def _views(self, spots: np.ndarray, view: np.ndarray) -> ViewPlan:
        px = self.shards.manifest.tile.px
        section = self.plan.section_of(spots)
        return plan_views(spots, view, section, self.shards.stain, self.config.data, tile_px=px, seed=self.seed)

    # -- a frozen stem --------------------------------------------------------------------------------

    def _from_cache(self, request: Request) -> Made:
        cache = self._cache
        own = share_of(request.spots.size, self.rank, self.world)
        spots = request.spots[own].copy()
        for i in np.flatnonzero(np.isin(spots, list(self.faults))):
            others = (int(other[0]) for other in self._stand_ins(request.spots, own.start + i))
            spots[i] = next((other for other in others if other not in self.faults), spots[i])
        view = view_of(self.config.data.views, spots, seed=self.seed, epoch=request.epoch)
        csr = self.records.csr(self.records.fetch(spots)) if self.records.with_counts else None
        batch = self._labels(request, spots, csr)
        place = np.searchsorted(self.tables.spots, spots)
        batch.features = cache[torch.from_numpy(view), torch.from_numpy(place)].float()
        return Made(request, batch)

    @cached_property
    def _cache(self) -> Tensor:
        """The frozen stem's features (views, n_spots, P, c) in half precision, made when the first batch is asked for."""
        assert self._stem is not None
        return torch.stack([self._stem_view(self._stem, view) for view in range(self.config.data.views)])

    def _stem_view(self, stem: Stem, view: int, size: int = 128) -> Tensor:
        views, spots = self.config.data.views, self.tables.spots
        log.info("frozen stem: view %d of %d, %d tiles", view + 1, views, spots.size)
        out: Tensor | None = None
        label = f"frozen stem, view {view + 1} of {views}"
        for start in tqdm(range(0, spots.size, size), desc=label, leave=False, disable=None):
            part = spots[start : start + size]
            whole, tiles = self.tiles(part, np.full(part.shape, view))
            features = stem(tiles).half()
            if out is None:
                out = torch.zeros((spots.size, *features.shape[1:]), dtype=torch.half)
            out[torch.from_numpy(np.searchsorted(spots, whole))] = features
        assert out is not None
        return out
