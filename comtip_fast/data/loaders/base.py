"""Base class of the loaders. It determines the order and the content of the batches, and replaces or reports damaged records.

A batch has one augmented view of each spot's tile (or its features), the gene panel of the step, and the spots' expression levels of
these genes. For given data and settings, it depends on its spots, step and epoch only. The loader knows the batch order and prepares
the next batches in the background. A batch that is requested out of order is the same, but takes longer.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from comtip_shards import RECORD_FAULTS, ShardError, ShardSet
from scipy import sparse
from torch import Tensor

from comtip_fast.collectives import share_of
from comtip_fast.config.schema import RunConfig
from comtip_fast.data.augment.apply_views import apply_views
from comtip_fast.data.augment.views import ViewPlan, plan_views, view_indices
from comtip_fast.data.batch import Batch, pads_panels
from comtip_fast.data.expression.batch_levels import levels_from_counts, levels_from_table
from comtip_fast.data.expression.panel import draw_panel
from comtip_fast.data.expression.training_tables import TrainingTables
from comtip_fast.data.loaders.fetch_ahead import fetched_ahead
from comtip_fast.data.loaders.prepared import PreparedBatch, uses_own_process
from comtip_fast.data.loaders.process import LoaderProcess
from comtip_fast.data.loaders.schedule import EpochSchedule, ScheduledBatch
from comtip_fast.data.loaders.stem_features import Stem, StemFeatures
from comtip_fast.data.loaders.tile_memory import TileMemory
from comtip_fast.data.loaders.tile_views import decode_views
from comtip_fast.data.records import Csr, DecodedSpots, EncodedSpots, SpotReader
from comtip_fast.data.upload import PackedTensors, upload
from comtip_fast.genes.panel_sizes import padded_genes

log = logging.getLogger("comtip_fast")
MAX_LOGGED_FAULTS = 20
"""Number of damaged records that are logged; further ones are only counted."""


class BaseLoader(ABC):
    """Loads a rank's share of the global batches of training spots.

    Parameters
    ----------
    shards
        The shard set.
    tables
        Result of :func:`comtip_fast.data.expression.training_tables.training_tables`.
    config
        Config of the run.
    rank, world
        This rank and the number of ranks, which share each global batch; the panel is drawn for the global batch.
        Only the rank that read a damaged record knows which spot replaced it. Ranks must therefore exchange levels and
        sections of their batches, and not derive them from spot indices.
    device
        Device of the batches; on a GPU, decoded tiles are moved there before views are computed.
    frozen_stem
        Maps uint8 tiles (N, 3, S, S) to features (N, P, c). If given, batches of :meth:`batch` contain features instead of tiles.
        The stem runs once on every view of every training spot when :meth:`prepare` is called or the first batch is requested, in
        a fixed order, so that a resumed run has bit-identical features. They are kept in memory.

    Raises
    ------
    ValueError
        ``rank`` is not from 0 to ``world - 1``.
    """

    name: ClassVar[str]
    """``data.loader`` of the class."""

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
            raise ValueError(f"rank {rank} of {world} ranks: the rank must be from 0 to {world - 1}")
        self.shards, self.tables, self.config = shards, tables, config
        self.rank, self.world, self.device = rank, world, torch.device(device)
        self.seed = config.train.seed
        self.schedule = EpochSchedule(shards, tables.spots, config.data, self.seed)
        self.records = SpotReader(shards, with_counts=tables.levels is None)
        self._memory = TileMemory(config.data.prefetch + 1)
        self.faults: dict[int, ShardError] = {}
        """Errors of all damaged records of this rank so far, by spot index."""
        self._stem = None if frozen_stem is None else StemFeatures(frozen_stem, tables.spots, config.data.views)
        self._running: Generator[PreparedBatch, None, None] | None = None
        self._expected: tuple[int, int, int] | None = None
        """Epoch, step and position of the batch that ``_running`` yields next."""
        self._wait_s = 0.0

    # -- interface to training ------------------------------------------------------------------------

    def prepare(self) -> None:
        """Compute the features of the frozen stem, if there is one; without this call, the first :meth:`batch` computes them.

        Raises the errors of :meth:`tiles`.
        """
        if self._stem is not None:
            self._stem.compute(self.tiles)

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return the epoch's global batches as int64 arrays of spot indices."""
        return self.schedule.batches(epoch)

    def batch(self, spot_index: np.ndarray, step: int, epoch: int) -> Batch:
        """Return this rank's share of the global batch ``spot_index``.

        Batches in the order of :meth:`batches` are prepared in the background; any other batch is loaded on demand. With a frozen
        stem, every batch is assembled on demand from the stem's features.

        Raises
        ------
        ShardError
            A record is damaged and ``data.faults`` is ``stop``; more than ``data.max_faults`` records are damaged; or all
            records of the batch are damaged.
        """
        start = time.perf_counter()
        prepared = self._next_prepared(np.asarray(spot_index, np.int64), step, epoch)
        batch = self._deliver(prepared)
        self._wait_s += time.perf_counter() - start
        return batch

    def iterate(self, epoch: int = 0, position: int = 0, step: int = 1) -> Generator[Batch, None, None]:
        """Yield this rank's batches without end, beginning with batch ``position`` of ``epoch`` as optimizer step ``step``.

        The batches have tiles, even with a frozen stem. Closing the iterator stops its workers. Raises the errors of
        :meth:`batch`.
        """
        stream = self._stream(self.schedule.iterate(epoch, position, step))
        try:
            for prepared in stream:
                yield self._deliver(prepared)
        finally:
            stream.close()

    def metrics(self) -> dict[str, float]:
        """Return values to log: ``loader_wait_s``, the seconds waited since the last call, and numbers of damaged records.

        ``faults`` counts all damaged records so far, ``faults_KIND`` the damaged records of one kind.
        """
        kinds = Counter(error.kind for error in self.faults.values())
        out = {"loader_wait_s": self._wait_s, "faults": float(len(self.faults))}
        self._wait_s = 0.0
        return out | {f"faults_{kind}": float(kinds[kind]) for kind in RECORD_FAULTS}

    def close(self) -> None:
        """Stop background work; the next request for a batch restarts it."""
        if self._running is not None:
            self._running.close()
        self._running = self._expected = None
        self._memory.clear()

    def tiles(self, spot_index: np.ndarray, view: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Read the tiles of the given spots, and return one view of each in CPU memory.

        Parameters
        ----------
        spot_index, view
            Indices of spots of the set, and the number of the view of each, int64 (N,).

        Returns
        -------
        spots, tiles
            Indices of the n spots that were read, int64 (n,), and their tiles, uint8 (n, 3, S, S); without damaged spots if
            ``data.faults`` is ``skip``.

        Raises
        ------
        ShardError
            A record is damaged and ``data.faults`` is ``stop``, or more than ``data.max_faults`` records are damaged.
        """
        decoded = self.records.read(spot_index)
        if self.config.data.faults == "stop":
            decoded.raise_faults()
        self._record_faults({int(spot_index[i]): error for i, error in decoded.faults.items()})
        readable = np.setdiff1d(np.arange(spot_index.size), list(decoded.faults)).astype(np.int64)
        plan = self._plan_views(spot_index[readable], view[readable])
        return decoded.spots[readable], apply_views(torch.from_numpy(decoded.tiles_NSS3[readable]), plan)

    def counts(self, spot_index: np.ndarray) -> tuple[np.ndarray, sparse.csr_matrix]:
        """Read the raw counts of the given spots.

        Returns the indices of the n spots that were read, int64 (n,), and their counts, int32 CSR (n, genes). Damaged spots are left
        out or raise ShardError, as in :meth:`tiles`.
        """
        counts, faults = self.records.counts(spot_index)
        if faults and self.config.data.faults == "stop":
            raise faults[min(faults)]
        self._record_faults({int(spot_index[i]): error for i, error in faults.items()})
        return np.delete(spot_index, list(faults)), counts

    # -- loading a batch ------------------------------------------------------------------------------

    @abstractmethod
    def _stream(self, batches: Iterator[ScheduledBatch]) -> Generator[PreparedBatch, None, None]:
        """Load the batches and yield them in their order; with workers, the next ones are prefetched."""

    def _ahead(self, batches: Iterator[ScheduledBatch]) -> Iterator[ScheduledBatch]:
        """Yield the batches, and fetch the shards of the next ones in the background if the set is remote."""
        depth = self.config.data.fetch_ahead
        return fetched_ahead(batches, self.shards, depth, rank=self.rank, world=self.world)

    def _next_prepared(self, spots: np.ndarray, step: int, epoch: int) -> PreparedBatch:
        """Return a batch from the stem cache, from the running stream, or loaded on demand."""
        if self._stem is not None:
            return self._from_stem(self._stem, ScheduledBatch(epoch, 0, step, spots))
        if self._running is None or not self._is_expected(spots, step, epoch):
            self.close()
            position = self.schedule.find(spots, epoch)
            if position is None:
                return self._load(ScheduledBatch(epoch, 0, step, spots))
            self._running = self._stream(self.schedule.iterate(epoch, position, step))
        try:
            prepared = next(self._running)
        except BaseException:
            self.close()
            raise
        s = prepared.scheduled
        is_last = s.position + 1 == len(self.schedule.batches(s.epoch))
        self._expected = (s.epoch + 1, s.step + 1, 0) if is_last else (s.epoch, s.step + 1, s.position + 1)
        return prepared

    def _is_expected(self, spots: np.ndarray, step: int, epoch: int) -> bool:
        """Return whether the running stream yields this batch next."""
        if self._expected is None or self._expected[:2] != (epoch, step):
            return False
        batches, position = self.schedule.batches(epoch), self._expected[2]
        return position < len(batches) and np.array_equal(batches[position], spots)

    @property
    def has_own_process(self) -> bool:
        """Whether batches are prepared in a process of their own (``data.loader_process``)."""
        return uses_own_process(self.config.data, self.device, self.name)

    def _from_process(
        self,
        work: Callable[[Iterator[ScheduledBatch]], Iterator[Any]],
        batches: Iterator[ScheduledBatch],
        ahead: int,
        lent: int = 2,
    ) -> LoaderProcess:
        """Start a process that yields the results of ``work``, which needs about ``ahead`` batches at a time.

        The caller may keep ``lent`` results; two are the batch of the step and the next one.
        """
        data = self.config.data
        if self.shards.fetches_shards:
            ahead += data.fetch_ahead
        name = f"{self.shards.name}: loader of rank {self.rank}"
        return LoaderProcess(work, batches, ahead=ahead, slot_bytes=self._largest_bytes(), lent=lent, name=name)

    def _largest_bytes(self) -> int:
        """Return about the bytes of the arrays of this rank's largest batch."""
        data, S = self.config.data, self.shards.manifest.tile.px
        n_global = data.batch_size + 1  # a final batch of one spot is merged into the batch before it
        genes = padded_genes(self.config.panel.max_genes, self.config.engine.panel_sizes, self.config.panel.max_genes)
        per_spot = 3 * S * S + 2 * genes + 1024  # tile; levels and measured; view (792 bytes) and indices
        return -(-n_global // self.world) * per_spot + 16 * genes + 2**16

    def _load(self, scheduled: ScheduledBatch) -> PreparedBatch:
        """Read, decode and assemble one batch in this thread."""
        encoded = self.records.fetch(scheduled.spots[share_of(scheduled.spots.size, self.rank, self.world)])
        if self.device.type == "cpu" and not encoded.faults and not self.config.data.zoom:
            prepared = self._undecoded(scheduled, encoded, None)
            assert prepared.view_plan is not None
            tiles = decode_views(self.shards, encoded, prepared.view_plan, self._memory.empty)
            if tiles is not None:
                return replace(prepared, batch=replace(prepared.batch, tiles=tiles), view_plan=None)
        return self._assemble(scheduled, self._read(scheduled, lambda _: self.records.decode(encoded)))

    def _read(self, scheduled: ScheduledBatch, read: Callable[[np.ndarray], DecodedSpots]) -> DecodedSpots:
        """Read this rank's records; ``data.faults`` decides whether a damaged record raises or another spot replaces it."""
        own = share_of(scheduled.spots.size, self.rank, self.world)
        decoded = read(scheduled.spots[own])
        if self.config.data.faults == "stop":
            decoded.raise_faults()
        for i in sorted(decoded.faults):
            error = decoded.faults[i]
            spares = self._replacements(scheduled.spots, own.start + i)
            if not any(decoded.replace(i, self.records.read(spare)) for spare in spares):
                raise ShardError(
                    f"{self.shards.name}: all {scheduled.spots.size} records of a batch are damaged (first error: {error}); check "
                    "the set with `comtip shards verify`, then build it again"
                )
        return decoded

    def _replacements(self, spots: np.ndarray, index: int) -> Iterator[np.ndarray]:
        """Yield the batch's other spots, those of the same section first; the order does not depend on the ranks."""
        section = self.schedule.section_of(spots)
        following = (index + 1 + np.arange(spots.size - 1)) % spots.size
        following = following[np.argsort(section[following] != section[index], kind="stable")]
        yield from spots[following][:, None]

    def _assemble(self, scheduled: ScheduledBatch, decoded: DecodedSpots) -> PreparedBatch:
        """Combine tiles with panel, levels and sections; compute the views on a CPU, or pack the tensors for a GPU."""
        tiles = torch.as_tensor(decoded.tiles_NSS3)
        prepared = self._undecoded(scheduled, decoded.encoded, None if self.device.type == "cpu" else tiles)
        prepared.faults = decoded.replaced
        return self._with_tiles(prepared, tiles) if self.device.type == "cpu" else prepared

    def _undecoded(self, scheduled: ScheduledBatch, encoded: EncodedSpots, tiles: Tensor | None) -> PreparedBatch:
        """Return a batch without its views; for a GPU, its tensors are packed, with decoded tiles of the host if they are given."""
        csr = self.records.csr(encoded) if self.records.with_counts else None
        batch = self._without_tiles(scheduled, encoded.spots, csr)
        view = view_indices(self.config.data.views, encoded.spots, seed=self.seed, epoch=scheduled.epoch)
        plan = self._plan_views(encoded.spots, view)
        prepared = PreparedBatch(scheduled, batch, view_plan=plan)
        if self.device.type != "cpu":
            tensors = batch.tensors() | {f"view_{name}": t for name, t in plan.tensors().items()}
            if tiles is not None:
                tensors["decoded"] = tiles
            prepared.packed = PackedTensors.pack(tensors, self.device)
            # The packed copies are used; a worker process sends only these, and what is needed on the host.
            prepared.batch = batch.with_tensors(dict.fromkeys(batch.tensors(), torch.empty(0)))
            prepared.view_plan = plan.margins_only()
        return prepared

    def _with_tiles(self, prepared: PreparedBatch, tiles: Tensor) -> PreparedBatch:
        """Return a batch with its decoded tiles, uint8 (b, S, S, 3): views are computed here on a CPU, later on a GPU."""
        if self.device.type != "cpu":
            return replace(prepared, tiles_NSS3=upload(tiles, self.device))
        assert prepared.view_plan is not None
        views = apply_views(tiles, prepared.view_plan, empty=self._memory.empty)
        batch = replace(prepared.batch, tiles=views)
        return replace(prepared, batch=batch, view_plan=None)

    def _deliver(self, prepared: PreparedBatch) -> Batch:
        """Record the damaged records of the batch; for a GPU, copy the batch there and compute its views."""
        self._record_faults(prepared.faults)
        batch = prepared.batch
        if self.device.type == "cpu":
            return batch
        packed = prepared.packed or PackedTensors.pack(batch.tensors(), self.device)
        arrays = packed.to(self.device)
        batch = batch.with_tensors(arrays)
        tiles = arrays.get("decoded", prepared.tiles_NSS3)
        if tiles is not None and prepared.view_plan is not None:
            view = {name.removeprefix("view_"): t for name, t in arrays.items() if name.startswith("view_")}
            batch.tiles = apply_views(tiles, prepared.view_plan, batched=True, tensors=view)
        return batch

    def _record_faults(self, faults: dict[int, ShardError]) -> None:
        """Record damaged records and log the first ones; raise ShardError if there are more than ``data.max_faults``."""
        limit = self.config.data.max_faults
        for spot, error in faults.items():
            if spot not in self.faults and len(self.faults) < MAX_LOGGED_FAULTS:
                log.warning("skipped a damaged record: %s", error)
            self.faults[spot] = error
            if len(self.faults) > limit:
                raise ShardError(
                    f"{self.shards.name}: more than data.max_faults={limit} records are damaged (last error: {error}); check the "
                    "set with `comtip shards verify`, then build it again or raise data.max_faults"
                )

    def _without_tiles(self, scheduled: ScheduledBatch, spots: np.ndarray, csr: Csr | None) -> Batch:
        """Return the batch without tiles and features."""
        panel = self.panel(self.schedule.section_of(scheduled.spots), scheduled.step)
        section = self.schedule.section_of(spots)
        if csr is None:
            levels = levels_from_table(self.tables, spots, panel)
        else:
            levels = levels_from_counts(self.tables, csr, panel)
        batch = Batch(
            tiles=None,
            features=None,
            panel=torch.from_numpy(panel.astype(np.int32)),
            levels=torch.from_numpy(levels),
            measured=torch.from_numpy(self.tables.measured[section][:, panel]),
            section=torch.from_numpy(section.astype(np.int32)),
            spot_index=torch.from_numpy(spots),
            step=scheduled.step,
            panel_host=panel,
        )
        if not pads_panels(self.config, self.device):
            return batch
        size = padded_genes(panel.size, self.config.engine.panel_sizes, self.config.panel.max_genes)
        return batch.padded(size, self.tables.genes.trained.size)

    def panel(self, section: np.ndarray, step: int) -> np.ndarray:
        """Draw the panel of a step from the genes that the given sections measured; return indices into the trained genes."""
        measured = self.tables.measured[np.unique(section)]
        return draw_panel(
            self.tables.genes.trained,
            self.tables.variance,
            measured.any(0),
            self.config.panel,
            seed=self.seed,
            step=step,
            balance=self.tables.balance,
            measured=None if self.tables.balance is None else measured,
        )

    def _plan_views(self, spots: np.ndarray, view: np.ndarray) -> ViewPlan:
        px = self.shards.manifest.tile.px
        section = self.schedule.section_of(spots)
        return plan_views(spots, view, section, self.shards.stain, self.config.data, tile_px=px, seed=self.seed)

    # -- frozen stem ----------------------------------------------------------------------------------

    def _from_stem(self, stem: StemFeatures, scheduled: ScheduledBatch) -> PreparedBatch:
        """Return a batch of a frozen stem's features; spots known to be damaged are replaced by other spots of the batch."""
        stem.compute(self.tiles)
        own = share_of(scheduled.spots.size, self.rank, self.world)
        spots = scheduled.spots[own].copy()
        for i in np.flatnonzero(np.isin(spots, list(self.faults))):
            spares = (int(spare[0]) for spare in self._replacements(scheduled.spots, own.start + i))
            spots[i] = next((spare for spare in spares if spare not in self.faults), spots[i])
        view = view_indices(self.config.data.views, spots, seed=self.seed, epoch=scheduled.epoch)
        csr = self.records.csr(self.records.fetch(spots)) if self.records.with_counts else None
        batch = self._without_tiles(scheduled, spots, csr)
        batch.features = stem.of(spots, view)
        return PreparedBatch(scheduled, batch)
