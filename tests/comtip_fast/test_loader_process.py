"""A loader in a process of its own: what passes between the processes, and what happens when one of them ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
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
from comtip_shards import ShardError, ShardSet
from comtip_shards.storage.remote import Remote

from comtip_fast.config.io import load_config
from comtip_fast.config.schema import DataConfig
from comtip_fast.data.expression.training_tables import training_tables
from comtip_fast.data.loaders import base
from comtip_fast.data.loaders import process as module
from comtip_fast.data.loaders.base import BaseLoader
from comtip_fast.data.loaders.factory import dali_is_installed, make_loader
from comtip_fast.data.loaders.prepared import uses_own_process
from comtip_fast.data.loaders.process import LoaderProcess, process_stream
from comtip_fast.data.loaders.schedule import ScheduledBatch
from comtip_fast.data.loaders.shared_slots import SharedSlots, flatten, restore
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


def test_batches_that_are_larger_than_a_slot_pass_too():
    with_room = started(arrays_of, 5, slot_bytes=100)
    assert [(b.step, int(v.sum())) for b, v in process_stream(with_room)] == [(i, 5000 * i) for i in range(1, 6)]


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
    """For a GPU, the process packs the tensors, and sends DALI's tiles to a decoder in the training process."""
    monkeypatch.setattr(PackedTensors, "to", lambda self, device: self.split(self.buffer.clone()))
    monkeypatch.setattr(base, "upload", lambda tiles, device: tiles.clone())
    there, here = loader(*more, device=META), loader(*more, "data.workers=0")
    there.decodes_apart = True
    for got, want in islice(zip(there.iterate(), here.iterate(), strict=False), 5):
        assert got.tensors().keys() == want.tensors().keys()
        assert all(torch.equal(got.tensors()[n], t) for n, t in want.tensors().items())


def test_the_process_does_not_use_cuda(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert can_pin(torch.device("cuda"))

    def initialises_cuda() -> bool:
        raise AssertionError("CUDA is initialised in a fork")

    monkeypatch.setattr(torch.cuda, "is_available", initialises_cuda)
    process = started(lambda batches: ([can_pin(torch.device("cuda"))] for _ in batches), 1)
    assert list(process_stream(process)) == [[False]]


@pytest.mark.parametrize(
    ("where", "workers", "device", "own"),
    [
        ("auto", 2, "cuda", True),
        ("auto", 2, "cpu", False),
        ("auto", 0, "cuda", False),
        ("own", 2, "cpu", True),
        ("own", 0, "cpu", False),
        ("training", 2, "cuda", False),
    ],
)
def test_where_a_loader_runs(where: Any, workers: int, device: str, own: bool):
    assert uses_own_process(DataConfig(loader_process=where, workers=workers), torch.device(device)) is own


def test_the_log_says_where_the_loader_runs(loader: Any, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", "comtip_fast"):
        loader()
        loader("data.loader_process=training")
        loader("data.loader=wds")
        loader("data.workers=0")
    found = [r.getMessage() for r in caplog.records if r.getMessage().startswith("loader:")]
    assert found == [
        "loader: torch (data.loader=torch) on 2 threads of a process of its own (data.loader_process=own)",
        "loader: torch (data.loader=torch) on 2 threads of the training process (data.loader_process=training)",
        "loader: wds (data.loader=wds) in 2 processes",
        "loader: torch (data.loader=torch) in the thread of the step",
    ]


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


def test_a_process_that_ends_by_itself_is_reported():
    def leaves(batches: Iterator[ScheduledBatch]) -> Iterator[int]:
        yield 1
        os._exit(7)

    process = started(leaves)
    assert next(process) == 1
    with pytest.raises(RuntimeError, match="ended with exit code 7"):
        next(process)
    assert list(process) == []


class NotPickled(Exception):
    """An error that cannot be passed to another process."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(5, "disk"), OSError),
        (ShardError("a", kind="checksum"), ShardError),
        (NotPickled(1, 2), RuntimeError),
    ],
    ids=["OSError", "ShardError", "not pickled"],
)
def test_errors_arrive_with_their_trace(error: Exception, kind: type[Exception]):
    def fails(batches: Iterator[ScheduledBatch]) -> Iterator[int]:
        yield 1
        raise error

    process = started(fails)
    assert next(process) == 1
    with pytest.raises(kind) as caught:
        next(process)
    assert str(error) in str(caught.value)
    assert "in fails" in caught.value.__notes__[0]
    assert ended(process.pid)


def test_signals_of_the_training_process_do_not_end_it():
    """A cluster sends SIGTERM to all processes; the training process then takes its last steps."""
    process = started(arrays_of)
    next(process)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(process.pid, number)
    assert [next(process)[0].step for _ in range(10)] == list(range(2, 12))
    process.close()
    assert ended(process.pid)


def test_closing_ends_a_process_whose_pipe_a_later_process_holds():
    first = started(arrays_of)
    second = started(arrays_of)
    next(first), next(second)
    first.close()
    assert first._process.exitcode == 0  # it was not killed after a wait
    assert next(second)[0].step == 2
    second.close()
    assert second._process.exitcode == 0


def test_a_process_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "END_S", 0.2)

    def hangs(batches: Iterator[ScheduledBatch]) -> Iterator[int]:
        yield 1
        time.sleep(600)

    process = started(hangs)
    assert next(process) == 1
    process.close()
    assert process._process.exitcode == -signal.SIGKILL


SCRIPT = """
import sys, time
from tests.comtip_fast.test_loader_process import arrays_of, started
one, two = started(arrays_of), started(arrays_of)
next(one), next(two)
print(one.pid, two.pid, flush=True)
if sys.argv[1] == "wait":
    time.sleep(600)
"""


@pytest.mark.parametrize("how", ["wait", "return"])
def test_processes_end_with_the_training_process(how: str):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, how], stdout=subprocess.PIPE, text=True, env=environment
    ) as training:
        assert training.stdout is not None
        pids = [int(word) for word in training.stdout.readline().split()]
        assert len(pids) == 2
        if how == "wait":
            training.kill()
        assert training.wait() == (-signal.SIGKILL if how == "wait" else 0)
        assert all(ended(pid) for pid in pids)
