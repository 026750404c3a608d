"""Tiles decoded by NVIDIA DALI: by its threads on a CPU, by its JPEG units on a GPU, in this project's order.

DALI's own WebDataset reader shuffles in a buffer and cannot be told an order, so records are read here, in big runs,
and DALI is given their bytes: reading costs a few per cent of decoding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from comtip_shards import ShardError
from comtip_shards.format.image_header import check_size
from comtip_shards.format.record import encode_tile

from comtip_fast.collectives import share_of
from comtip_fast.data.loaders.base import BaseLoader, Made
from comtip_fast.data.loaders.prefetch import Ahead
from comtip_fast.data.loaders.schedule import Request
from comtip_fast.data.records import DecodedSpots, EncodedSpots

DEPTH_CPU, DEPTH_GPU = 4, 2
"""Batches inside DALI. On a CPU its threads and the one that completes batches want the same cores: the more batches are
ready, the less they wait for one another (a tenth more spots/s with four than with two). On a GPU memory is dearer."""


class DaliLoader(BaseLoader):
    """One thread reads and completes batches, ``data.workers`` threads of DALI decode them.

    At most ``data.prefetch`` batches wait, one is completed and :attr:`Decoder.depth` are in DALI.
    """

    def _stream(self, requests: Iterator[Request]) -> Generator[Made, None, None]:
        if self.config.data.workers == 0:
            yield from self._decoded(requests)
            return
        ahead = Ahead(self._decoded(requests), self.config.data.prefetch)
        try:
            yield from ahead
        finally:
            ahead.stop()

    def _decoded(self, requests: Iterator[Request]) -> Iterator[Made]:
        decoder = self._decoder()
        waiting: deque[tuple[Request, EncodedSpots]] = deque()
        for request in requests:
            got = self._fetch(request)
            if got.faults or not got.spots.size:
                # Damage is rare; Pillow makes this batch, after those before it.
                yield from self._finish(decoder, waiting)
                yield self._make(request)
                continue
            decoder.start(got.tiles)
            waiting.append((request, got))
            if len(waiting) == decoder.depth:
                yield self._take(decoder, waiting)
        yield from self._finish(decoder, waiting)

    def _decoder(self) -> Decoder:
        size = self.config.data.batch_size + 1  # a batch of one is joined to the one before it
        device_id = None if self.device.type == "cpu" else self.device.index or 0
        return Decoder(-(-size // self.world), max(1, self.config.data.workers), device_id)

    def _fetch(self, request: Request) -> EncodedSpots:
        """Read this rank's records; what DALI must not see is a fault."""
        got = self.records.fetch(request.spots[share_of(request.spots.size, self.rank, self.world)])
        tile = self.shards.manifest.tile
        for i, data in enumerate(got.tiles):
            if i not in got.faults:
                try:
                    check_size(data, tile.px, tile.codec, partial(self.shards.where, int(got.spots[i])))
                except ShardError as error:
                    got.faults[i] = error
        return got

    def _finish(self, decoder: Decoder, waiting: deque[tuple[Request, EncodedSpots]]) -> Iterator[Made]:
        while waiting:
            yield self._take(decoder, waiting)

    def _take(self, decoder: Decoder, waiting: deque[tuple[Request, EncodedSpots]]) -> Made:
        request, got = waiting.popleft()
        try:
            tiles = decoder.take()
        except RuntimeError:
            # DALI does not say which tile it could not decode, and its pipeline is of no more use; Pillow finds the tile.
            decoder.restart([encoded.tiles for _, encoded in waiting])
            return self._make(request)
        made = self._complete(request, DecodedSpots(got, tiles))
        decoder.release()
        return made


class Decoder:
    """DALI's image decoder, fed by hand.

    Parameters
    ----------
    batch_size
        Largest number of tiles at once.
    threads
        Of DALI.
    device_id
        GPU that decodes; None for the CPU.
    """

    def __init__(self, batch_size: int, threads: int, device_id: int | None) -> None:
        self.depth = DEPTH_CPU if device_id is None else DEPTH_GPU
        self._settings = (batch_size, threads, device_id)
        self._pipe = self._build()

    def start(self, tiles: list[bytes]) -> None:
        """Begin to decode a batch."""
        self._pipe.feed_input("tiles", [np.frombuffer(data, np.uint8) for data in tiles])
        self._pipe.schedule_run()

    def take(self) -> Any:
        """Return the oldest batch, uint8 (b, S, S, 3): an array, or a tensor on the GPU; valid until :meth:`release`.

        Raises
        ------
        RuntimeError
            DALI could not decode a tile; call :meth:`restart`.
        """
        (out,) = self._pipe.share_outputs()
        if self._settings[2] is None:
            return np.asarray(out.as_tensor())
        return torch.from_dlpack(out.as_tensor()).clone()

    def release(self) -> None:
        """Give the memory of the last batch taken back to DALI."""
        self._pipe.release_outputs()

    def restart(self, batches: list[list[bytes]]) -> None:
        """Start a new pipeline and decode ``batches`` again."""
        self._pipe = self._build()
        for tiles in batches:
            self.start(tiles)

    def _build(self) -> Any:
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
        # The first run of a pipeline runs all places of its queue; a picture of one pixel in each gets that over with.
        dot = np.frombuffer(encode_tile(np.zeros((1, 1, 3), np.uint8), "png", 0), np.uint8)
        for _ in range(self.depth):
            pipe.feed_input("tiles", [dot])
        pipe.schedule_run()
        for _ in range(self.depth):
            pipe.share_outputs()
            pipe.release_outputs()
        return pipe
