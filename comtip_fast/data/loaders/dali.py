"""Loader that decodes tiles with NVIDIA DALI, on CPU threads or the GPU's JPEG units, in this project's batch order.

DALI's own WebDataset reader shuffles in a buffer and does not accept an order. Records are therefore read here, in large
contiguous reads, and DALI decodes their bytes; reading takes a few per cent of the time of decoding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from comtip_shards import ShardError
from comtip_shards.format.image_header import check_size
from comtip_shards.format.record import encode_tile

from comtip_fast.collectives import share_of
from comtip_fast.data.loaders.base import BaseLoader
from comtip_fast.data.loaders.prefetch import Prefetcher
from comtip_fast.data.loaders.prepared import PreparedBatch
from comtip_fast.data.loaders.process import READY, process_stream
from comtip_fast.data.loaders.schedule import ScheduledBatch
from comtip_fast.data.records import EncodedSpots

DEPTH_CPU, DEPTH_GPU = 4, 2
"""Number of batches inside DALI. On a CPU, DALI's threads compete for cores with the thread that assembles batches, and wait
less with more batches in flight (measured: 10 % more spots/s with four than with two). On a GPU, memory is scarcer."""

Pending = deque[tuple[PreparedBatch, list[np.ndarray]]]
"""Batches inside DALI, and their encoded tiles."""


@dataclass(frozen=True)
class FetchedBatch:
    """A batch whose tiles have been read, but are not decoded yet."""

    prepared: PreparedBatch
    """The batch without tiles; with them, if ``tiles`` is None."""
    tiles: list[np.ndarray] | JoinedTiles | None
    """The encoded tiles, uint8 (bytes,) each; None if Pillow has decoded them, because a record is damaged."""


@dataclass(frozen=True)
class JoinedTiles:
    """Encoded tiles in one array, which passes from one process to another faster than an array per tile."""

    data: np.ndarray
    """uint8 (bytes,), the tiles one after the other."""
    ends: np.ndarray
    """int64 (b,), the end of each tile in ``data``."""

    @classmethod
    def of(cls, tiles: list[np.ndarray]) -> JoinedTiles:
        """Join tiles."""
        return cls(np.concatenate(tiles), np.cumsum([t.size for t in tiles]))

    def split(self) -> list[np.ndarray]:
        """Return the tiles as views."""
        ends = self.ends.tolist()
        return [self.data[start:end] for start, end in zip([0, *ends], ends, strict=False)]


class DaliLoader(BaseLoader):
    """Loader in which one thread reads and assembles batches, and ``data.workers`` DALI threads decode them.

    At most ``data.prefetch`` batches are ready, one is being assembled, and ``Decoder.depth`` are inside DALI. With 0 workers, the
    calling thread reads and assembles batches, and one DALI thread decodes them.

    In a process of its own (``data.loader_process``), the loader does all of this on a CPU. For a GPU, the process reads records,
    checks them and computes levels, panels and views; tiles are decoded in the training process, which owns the GPU's context.
    """

    name = "dali"
    decodes_apart: bool | None = None
    """Whether the training process decodes what another process has read; None: if it trains on a GPU."""

    def _stream(self, batches: Iterator[ScheduledBatch]) -> Generator[PreparedBatch, None, None]:
        data = self.config.data
        if not self.has_own_process:
            yield from self._threaded(batches) if data.workers else self._decoded(self._fetched(batches))
        elif self.decodes_apart or (self.decodes_apart is None and self.device.type == "cuda"):
            yield from self._decoded_here(batches)
        else:
            ahead = data.prefetch + DEPTH_CPU + READY
            yield from process_stream(self._from_process(lambda own: self._decoded(self._fetched(own)), batches, ahead))

    def _threaded(self, batches: Iterator[ScheduledBatch]) -> Generator[PreparedBatch, None, None]:
        """Read and assemble batches in a thread of this process."""
        prefetcher = Prefetcher(self._decoded(self._fetched(batches)), self.config.data.prefetch)
        try:
            yield from prefetcher
        finally:
            prefetcher.stop()

    def _decoded_here(self, batches: Iterator[ScheduledBatch]) -> Generator[PreparedBatch, None, None]:
        """Decode, with DALI's threads in this process, the tiles that another process reads."""
        # The tiles of batches inside DALI are kept until they are decoded. The process is forked before DALI starts threads here.
        lent = depth_on(self._device_id) + 2
        process = self._from_process(self._fetched_apart, batches, self.config.data.prefetch + READY, lent=lent)
        try:
            yield from self._decoded(process)
        finally:
            process.close()

    def _fetched(self, batches: Iterator[ScheduledBatch]) -> Generator[FetchedBatch, None, None]:
        """Read the batches; Pillow decodes a batch with damaged records, which are rare."""
        for scheduled in self._ahead(batches):
            encoded = self._fetch(scheduled)
            if encoded.faults or not encoded.spots.size:
                yield FetchedBatch(self._load(scheduled), None)
            else:
                tiles = [np.frombuffer(data, np.uint8) for data in encoded.tiles]
                yield FetchedBatch(self._undecoded(scheduled, encoded, None), tiles)

    def _fetched_apart(self, batches: Iterator[ScheduledBatch]) -> Iterator[FetchedBatch]:
        """Read the batches, with all tiles of a batch in one array."""
        for fetched in self._fetched(batches):
            tiles = fetched.tiles
            yield replace(fetched, tiles=JoinedTiles.of(tiles) if isinstance(tiles, list) else tiles)

    def _decoded(self, fetched: Iterator[FetchedBatch]) -> Generator[PreparedBatch, None, None]:
        """Yield the batches, of which up to ``Decoder.depth`` are decoded by DALI at the same time."""
        decoder = self._make_decoder()
        pending: Pending = deque()
        for batch in fetched:
            if batch.tiles is None:
                yield from self._drain(decoder, pending)
                yield batch.prepared
                continue
            tiles = batch.tiles.split() if isinstance(batch.tiles, JoinedTiles) else batch.tiles
            decoder.start(tiles)
            pending.append((batch.prepared, tiles))
            if len(pending) == decoder.depth:
                yield self._next_decoded(decoder, pending)
        yield from self._drain(decoder, pending)

    def _make_decoder(self) -> Decoder:
        """Return a decoder for this rank's largest batch."""
        size = self.config.data.batch_size + 1  # a final batch of one spot is merged into the batch before it
        return Decoder(-(-size // self.world), max(1, self.config.data.workers), self._device_id)

    @property
    def _device_id(self) -> int | None:
        """The GPU that decodes; None for the CPU."""
        return self.device.index or 0 if self.device.type == "cuda" else None

    def _fetch(self, scheduled: ScheduledBatch) -> EncodedSpots:
        """Read this rank's records; a tile whose header is invalid becomes a fault, so that DALI does not decode it."""
        encoded = self.records.fetch(scheduled.spots[share_of(scheduled.spots.size, self.rank, self.world)])
        tile = self.shards.manifest.tile
        for i, data in enumerate(encoded.tiles):
            if i not in encoded.faults:
                try:
                    check_size(data, tile.px, tile.codec, partial(self.shards.where, int(encoded.spots[i])))
                except ShardError as error:
                    encoded.faults[i] = error
        return encoded

    def _drain(self, decoder: Decoder, pending: Pending) -> Iterator[PreparedBatch]:
        """Yield the batches that DALI is still decoding."""
        while pending:
            yield self._next_decoded(decoder, pending)

    def _next_decoded(self, decoder: Decoder, pending: Pending) -> PreparedBatch:
        """Return the oldest batch inside DALI; if DALI fails, Pillow decodes the batch."""
        prepared, _ = pending.popleft()
        try:
            tiles = decoder.get()
        except RuntimeError:
            # DALI does not report which tile failed, and its pipeline cannot be used again; Pillow finds the tile.
            decoder.restart([tiles for _, tiles in pending])
            return self._load(prepared.scheduled)
        done = self._with_tiles(prepared, torch.as_tensor(tiles))
        decoder.release()
        return done


def depth_on(device_id: int | None) -> int:
    """Return the number of batches inside DALI on a GPU, or on the CPU if ``device_id`` is None."""
    return DEPTH_CPU if device_id is None else DEPTH_GPU


class Decoder:
    """DALI pipeline that decodes images from memory.

    Parameters
    ----------
    batch_size
        Largest number of tiles in a batch.
    threads
        Number of DALI threads.
    device_id
        GPU that decodes; None for the CPU.
    """

    def __init__(self, batch_size: int, threads: int, device_id: int | None) -> None:
        self.depth = depth_on(device_id)
        self._settings = (batch_size, threads, device_id)
        self._pipe = self._build()

    def start(self, tiles: Sequence[bytes | np.ndarray]) -> None:
        """Start decoding a batch of encoded tiles; DALI copies them."""
        self._pipe.feed_input("tiles", [np.frombuffer(data, np.uint8) for data in tiles])
        self._pipe.schedule_run()

    def get(self) -> Any:
        """Return the oldest batch, uint8 (b, S, S, 3): an array that is valid until :meth:`release`, or a tensor on the GPU.

        Raises
        ------
        RuntimeError
            DALI could not decode a tile; call :meth:`restart`.
        """
        (out,) = self._pipe.share_outputs()
        if self._settings[2] is None:
            return np.asarray(out.as_tensor())
        # The copy is complete before :meth:`release` lets DALI overwrite the source.
        with torch.cuda.stream(self._copies):
            tiles = torch.from_dlpack(out.as_tensor()).clone()
        self._copies.synchronize()
        tiles.record_stream(torch.cuda.current_stream(torch.device("cuda", self._settings[2])))
        return tiles

    @cached_property
    def _copies(self) -> torch.cuda.Stream:
        """Stream of the copies of all batches, on which the host waits for a copy and not for the training step.

        Freed memory can be allocated again only on the stream on which it was allocated. With another stream for every batch, of
        which PyTorch hands out 32 in turn, the memory of up to 32 batches would stay reserved.
        """
        return torch.cuda.Stream(torch.device("cuda", self._settings[2] or 0))

    def release(self) -> None:
        """Return the memory of the last batch to DALI."""
        self._pipe.release_outputs()

    def restart(self, batches: Sequence[Sequence[bytes | np.ndarray]]) -> None:
        """Build a new pipeline and start decoding ``batches`` again."""
        self._pipe = self._build()
        for tiles in batches:
            self.start(tiles)

    def _build(self) -> Any:
        """Build a pipeline that is ready for its first batch."""
        dali: Any = import_module("nvidia.dali")
        fn, types = dali.fn, dali.types
        batch_size, threads, device_id = self._settings

        @dali.pipeline_def(
            batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=self.depth
        )
        def decode() -> Any:
            data = fn.external_source(name="tiles", dtype=types.UINT8, ndim=1)
            return fn.decoders.image(data, device="cpu" if device_id is None else "mixed", output_type=types.RGB)

        pipe = decode()
        pipe.build()
        # The first run of a pipeline needs inputs for its full queue; these are images of one pixel, which are discarded.
        dot = np.frombuffer(encode_tile(np.zeros((1, 1, 3), np.uint8), "png", 0), np.uint8)
        for _ in range(self.depth):
            pipe.feed_input("tiles", [dot])
        pipe.schedule_run()
        for _ in range(self.depth):
            pipe.share_outputs()
            pipe.release_outputs()
        return pipe
