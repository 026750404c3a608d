"""A loader in a process of its own: what passes between the processes, and what happens when one of them ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from comtip_shards import ShardSet
from comtip_shards.storage.remote import Remote

from comtip_fast.config.io import load_config
from comtip_fast.config.schema import DataConfig
from comtip_fast.data.augment.apply_views import apply_views
from comtip_fast.data.expression.training_tables import training_tables
from comtip_fast.data.loaders import base, factory
from comtip_fast.data.loaders.base import BaseLoader
from comtip_fast.data.loaders.factory import dali_is_installed, make_loader
from comtip_fast.data.loaders.prepared import uses_own_process
from comtip_fast.data.loaders.process import LoaderProcess, process_stream
from comtip_fast.data.loaders.schedule import ScheduledBatch
from comtip_fast.data.loaders.shared_slots import SharedSlots, end_of, flatten, restore
from comtip_fast.data.upload import PackedTensors, can_pin

META = torch.device("meta")
needs_dali = pytest.mark.skipif(not dali_is_installed(), reason="DALI is not installed (extra dali-cu13)")


@pytest.fixture
def loader(tiny_shards: ShardSet, tiny_overrides: list[str]) -> Iterator[Any]:
    """Return a factory of loaders in a process of their own, which are closed when the test ends."""
    loaders: list[BaseLoader] = []

    def make(*overrides: str, device: torch.device | str = "cpu") -> BaseLoader:
        own = ["data.loader_process=own", "data.loader=torch", "data.workers=2", *overrides]
        config = load_config(None, [*tiny_overrides, *own])
        loaders.append(make_loader(config, tiny_shards, training_tables(tiny_shards, config), device=device))
        return loaders[-1]

    yield make
    for one in loaders:
        one.close()


def scheduled(count: int) -> Iterator[ScheduledBatch]:
    return (ScheduledBatch(0, i, i + 1, np.arange(i, i + 3)) for i in range(count))


def started(work: Any, count: int = 1000, *, slot_bytes: int = 1 << 16, ahead: int = 2, lent: int = 2) -> LoaderProcess:
    return LoaderProcess(work, scheduled(count), ahead=ahead, slot_bytes=slot_bytes, lent=lent, name="tiny: loader")


def arrays_of(batches: Iterator[ScheduledBatch]) -> Iterator[tuple[ScheduledBatch, np.ndarray]]:
    """Yield each batch with an array that only this batch has."""
    for batch in batches:
        yield batch, np.full(5000, batch.step, np.int32)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ended(pid: int) -> bool:
    for _ in range(200):
        if not is_running(pid):
            return True
        time.sleep(0.1)
    return False


# -- what is passed ------------------------------------------------------------------------------------------


def test_arrays_do_not_pass_through_the_pipe(loader: Any):
    """The pickle of a batch costs the step's thread time in proportion to its size."""
    here = loader("data.workers=0")
    prepared = here._load(next(here.schedule.iterate(0, 0, 1)))
    data, arrays, layout = flatten(prepared)
    tiles = prepared.batch.tiles
    assert sum(a.nbytes for a in arrays) > tiles.nbytes
    assert len(data) < 2000 < prepared.scheduled.spots.nbytes + tiles.nbytes
    buffer = bytearray(sum(layout[-1]))
    for array, (offset, size) in zip(arrays, layout, strict=True):
        buffer[offset : offset + size] = array
    got = restore(data, [memoryview(buffer)[o : o + n] for o, n in layout], prepared.scheduled)
    assert got.scheduled is prepared.scheduled
    assert got.batch.tensors().keys() == prepared.batch.tensors().keys()
    for name, tensor in prepared.batch.tensors().items():
        assert torch.equal(got.batch.tensors()[name], tensor), name
    buffer[:] = bytes(len(buffer))
    assert not got.batch.tiles.any()  # a view, not a copy


def test_kept_batches_stay_as_they_are(loader: Any):
    own, here = loader(), loader("data.workers=0")
    kept = list(islice(own.iterate(), 12))
    for got, want in zip(kept, here.iterate(), strict=False):
        for name, tensor in want.tensors().items():
            assert torch.equal(got.tensors()[name], tensor), (want.step, name)


@pytest.mark.parametrize("keep", [1, 2, 50])
def test_the_memory_of_a_batch_is_used_again_only_when_nobody_has_it(keep: int):
    process, kept = started(arrays_of, 200), []
    for step, (batch, values) in enumerate(process_stream(process), start=1):
        assert batch.step == step
        kept = [*kept[-keep + 1 :], (step, values[:3], values)] if keep > 1 else [(step, values[:3], values)]
        assert all((v == s).all() and (part == s).all() for s, part, v in kept)
    assert step == 200


def test_batches_that_are_larger_than_a_slot_pass_too(caplog: pytest.LogCaptureFixture):
    too_small = started(arrays_of, 5, slot_bytes=100)
    assert [(b.step, int(v.sum())) for b, v in process_stream(too_small)] == [(i, 5000 * i) for i in range(1, 6)]
    found = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(found) == 1
    assert "tiny: loader: a batch of 20000 bytes is larger than its 4096 bytes of shared memory" in found[0]


def test_a_loader_with_small_slots_returns_the_same_batches(loader: Any, monkeypatch: pytest.MonkeyPatch):
    own, here = loader(), loader("data.workers=0")
    monkeypatch.setattr(own, "_largest_bytes", lambda: 1)
    for got, want in islice(zip(own.iterate(), here.iterate(), strict=False), 5):
        assert all(torch.equal(got.tensors()[n], t) for n, t in want.tensors().items())


def test_slots_are_large_enough_for_every_batch(loader: Any):
    here = loader("data.workers=0", "data.expression=records")
    for batch in islice(here.schedule.iterate(0, 0, 1), 2 * len(here.batches(0))):
        layout = flatten(here._load(batch))[2]
        assert sum(layout[-1]) <= here._largest_bytes()


def test_slots_are_large_enough_for_batches_of_a_gpu(loader: Any):
    """Regression test: the view plan was sent twice, so that batches of configs/1gpu.yaml did not fit."""
    there = loader("data.workers=0", "data.batch_size=64", "data.jitter=0.2", "data.views=8", device=META)
    for batch in islice(there.schedule.iterate(0, 0, 1), 3):
        prepared = there._load(batch)
        assert "view_lut" in prepared.packed.layout
        n, genes = prepared.packed.layout["levels"][2]
        _, arrays, layout = flatten(prepared)
        gaps = 256 * (len(arrays) + len(prepared.packed.layout))  # covered by the constant part of the estimate
        missing = 2 * (there.config.panel.max_genes - genes)  # the largest panel has levels and measured of more genes
        # 65 spots, because a final batch of one spot is merged.
        assert (end_of(layout) - gaps) / n + missing <= (there._largest_bytes() - 2**16) / 65


def test_at_most_the_lent_slots_are_handed_out():
    slots = SharedSlots(3, 100, lent=1)
    slots.write(0, [memoryview(b"a")], [(0, 1)])
    slots.write(1, [memoryview(b"b")], [(0, 1)])
    first, second = slots.read(0, [(0, 1)]), slots.read(1, [(0, 1)])
    assert slots.released() == [1]  # copied
    slots.write(1, [memoryview(b"c")], [(0, 1)])
    assert (first[0].tobytes(), second[0].tobytes()) == (b"a", b"b")
    del first
    assert slots.released() == [0]


class Handler(SimpleHTTPRequestHandler):
    """Serves files without logging requests."""

    def log_message(self, *_args: object) -> None:
        """Log nothing."""


def test_a_remote_set_is_read_in_the_process(
    tiny_shards: ShardSet, tiny_overrides: list[str], loader: Any, tmp_path: Path
):
    """The connections of this process cannot be used in another one."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tiny_shards.path)))
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    shards = ShardSet(url, remote=Remote(url, tmp_path))
    words = ["data.loader=torch", "data.loader_process=own", "data.workers=2", "data.expression=records"]
    config = load_config(None, [*tiny_overrides, *words])
    tables = training_tables(shards, config)
    here = loader("data.workers=0")
    own = make_loader(config, shards, tables)
    stream = own.iterate()
    for got, want in zip(islice(stream, 8), here.iterate(), strict=False):
        assert all(torch.equal(got.tensors()[n], t) for n, t in want.tensors().items())
    stream.close()
    server.shutdown()
    server.server_close()
    assert list(tmp_path.rglob("*.tar"))


@pytest.mark.parametrize("more", [("data.loader=torch",), pytest.param(("data.loader=dali",), marks=needs_dali)])
def test_a_device_gets_the_batches_of_a_cpu(loader: Any, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    """For a GPU, the process packs the tensors, and sends DALI's tiles to a decoder in the training process.

    Views are computed as on a GPU, by batched operations, in both loaders: :mod:`.test_views` compares these with others.
    """
    monkeypatch.setattr(base, "apply_views", partial(apply_views, batched=True))
    monkeypatch.setattr(PackedTensors, "to", lambda self, device: self.split(self.buffer.clone()))
    monkeypatch.setattr(base, "upload", lambda tiles, device: tiles.clone())
    there, here = loader(*more, device=META), loader(*more, "data.workers=0")
    there.decodes_apart = True
    for got, want in islice(zip(there.iterate(), here.iterate(), strict=False), 5):
        assert got.tensors().keys() == want.tensors().keys()
        assert all(torch.equal(got.tensors()[n], t) for n, t in want.tensors().items())


@pytest.mark.parametrize("name", ["torch", pytest.param("dali", marks=needs_dali)])
def test_the_process_does_not_use_cuda(loader: Any, monkeypatch: pytest.MonkeyPatch, name: str):
    def initialises_cuda() -> None:
        raise AssertionError("CUDA is initialised in a fork")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", initialises_cuda)
    assert can_pin(torch.device("cuda"))
    there = loader(f"data.loader={name}", device="cuda")
    work = there._fetched_apart if name == "dali" else there._threaded
    process = there._from_process(work, there.schedule.iterate(0, 0, 1), 2)
    got = next(process)
    packed = (got.prepared if name == "dali" else got).packed
    process.close()
    assert packed.buffer.numel() > 0
    assert ("decoded" in packed.layout) is (name == "torch")


@pytest.mark.parametrize(
    ("where", "workers", "device", "name", "own"),
    [
        ("auto", 2, "cuda", "dali", True),
        ("auto", 2, "cuda", "torch", False),
        ("auto", 2, "cpu", "dali", False),
        ("auto", 0, "cuda", "dali", False),
        ("own", 2, "cpu", "torch", True),
        ("own", 2, "cuda", "torch", True),
        ("own", 0, "cpu", "dali", False),
        ("training", 2, "cuda", "dali", False),
    ],
)
def test_where_a_loader_runs(where: Any, workers: int, device: str, name: str, own: bool):
    assert uses_own_process(DataConfig(loader_process=where, workers=workers), torch.device(device), name) is own


def test_a_daemonic_process_starts_no_other(monkeypatch: pytest.MonkeyPatch):
    daemon = multiprocessing.get_context("fork").Process(daemon=True)
    monkeypatch.setattr(multiprocessing, "current_process", lambda: daemon)
    assert not uses_own_process(DataConfig(workers=2), torch.device("cuda"), "dali")


def test_the_log_says_where_the_loader_runs(loader: Any, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", "comtip_fast"):
        loader()
        loader("data.loader_process=training")
        loader("data.loader=wds")
        loader("data.workers=0")
        factory._log_choice("dali", loader("data.loader_process=auto").config, torch.device("cuda"), False)
        factory._log_choice("torch", loader("data.loader_process=auto").config, torch.device("cuda"), True)
    found = [r.getMessage() for r in caplog.records if r.getMessage().startswith("loader:")]
    assert found == [
        "loader: torch (data.loader=torch) on 2 threads of a process of its own (data.loader_process=own)",
        "loader: torch (data.loader=torch) on 2 threads of the training process (data.loader_process=training)",
        "loader: wds (data.loader=wds) in 2 processes",
        "loader: torch (data.loader=torch) in the thread of the step",
        THREADS,
        (
            "loader: dali (data.loader=torch) on one thread of a process of its own, and 2 threads of DALI in the training process "
            "(data.loader_process=auto)"
        ),
        THREADS,
        (
            "loader: torch (data.loader=torch) reads tiles once, in the thread of the step; then batches are features of the frozen "
            "stem, from memory"
        ),
    ]


THREADS = "loader: torch (data.loader=torch) on 2 threads of the training process (data.loader_process=auto)"


# -- the end of a process ------------------------------------------------------------------------------------


def test_a_killed_process_is_reported(loader: Any, monkeypatch: pytest.MonkeyPatch):
    own = loader()
    found: list[LoaderProcess] = []
    real = own._from_process
    monkeypatch.setattr(own, "_from_process", lambda *args, **kwargs: found.append(real(*args, **kwargs)) or found[-1])
    stream = own.iterate()
    next(stream)
    os.kill(found[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"loader of rank 0: its process \d+ was killed by SIGKILL.*out of memory"):
        list(stream)
    assert ended(found[0].pid)


@pytest.mark.parametrize("more", ["torch", "wds", pytest.param("dali", marks=needs_dali)])
def test_a_stream_that_is_not_used_starts_no_process(loader: Any, more: str):
    before = set(multiprocessing.active_children())
    own = loader(f"data.loader={more}")
    stream = own._stream(own.schedule.iterate(0, 0, 1))
    assert set(multiprocessing.active_children()) == before
    stream.close()


@needs_dali
def test_a_decoder_that_fails_leaves_no_worker(loader: Any, monkeypatch: pytest.MonkeyPatch):
    own = loader("data.loader=dali")
    own.decodes_apart = True
    before, running = set(multiprocessing.active_children()), []

    def fails() -> None:
        running.extend(set(multiprocessing.active_children()) - before)
        raise RuntimeError("no decoder")

    monkeypatch.setattr(own, "_make_decoder", fails)
    with pytest.raises(RuntimeError, match="no decoder"):
        next(own.iterate())
    assert len(running) == 1, "the worker is forked before DALI starts threads"
    assert set(multiprocessing.active_children()) == before
