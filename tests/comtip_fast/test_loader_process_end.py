"""The end of a loader's process: errors, signals, processes that hang, and a training process that ends first."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from comtip_shards import ShardError
from comtip_shards.storage.cache import FileCache

from comtip_fast.data.loaders import process as module
from comtip_fast.data.loaders.process import LoaderProcess
from comtip_fast.data.loaders.schedule import ScheduledBatch
from comtip_fast.training.distributed.signals import hold_run
from tests.comtip_fast.test_loader_process import arrays_of, ended, is_running, scheduled, started


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
    """An error that cannot be passed to another process, also where a library has taught pickle to restore any exception."""

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("not pickled")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(5, "disk"), OSError),
        (ShardError("a", kind="checksum"), ShardError),
        (NotPickled("1 and 2"), RuntimeError),
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
    assert getattr(caught.value, "kind", None) == getattr(error, "kind", None)
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


HANGING = """
import os, sys, time
from pathlib import Path
from comtip_fast.data.loaders import process as module
from comtip_fast.training.distributed.signals import hold_run
from tests.comtip_fast.test_loader_process import started
module.END_S = float(sys.argv[2])

def hangs(batches):
    yield 1
    while True:
        time.sleep(600)

with hold_run(Path(sys.argv[1])):
    process = started(hangs)
    next(process)
    print(process.pid, flush=True)
    os._exit(0)
"""


def orphan(folder: Path, end_s: float) -> int:
    """Return the process id of a worker that hangs, and whose training process held ``folder`` and has ended."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", HANGING, str(folder), str(end_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as training:
        assert training.stdout is not None
        return int(training.stdout.readline())


def test_a_worker_that_hangs_ends_with_the_training_process(tmp_path: Path):
    assert ended(orphan(tmp_path, 0.2))


def test_a_worker_that_hangs_does_not_hold_the_run(tmp_path: Path):
    pid = orphan(tmp_path, 600)
    try:
        assert is_running(pid)
        with hold_run(tmp_path):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_message_that_cannot_be_read_is_an_error_of_the_loader():
    """Regression test: the worker waited for further messages without end."""
    process = started(arrays_of, ahead=1)
    process._pipe.send_bytes(b"not a pickle")
    with pytest.raises(pickle.UnpicklingError):
        list(process)
    assert ended(process.pid)


def test_a_worker_that_closes_its_pipe_and_hangs_is_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "END_S", 1.0)
    monkeypatch.setattr(module, "ORPHAN_S", 0.1)

    def hangs(batches: Any) -> Iterator[int]:
        yield 1
        batches.gi_frame.f_locals["self"]._pipe.close()
        while True:
            time.sleep(600)

    process = started(hangs)
    assert next(process) == 1
    with pytest.raises(RuntimeError, match=r"process \d+ closed its pipe before .*data.loader=torch"):
        next(process)
    assert ended(process.pid)


def test_ctrl_c_while_a_worker_ends_leaves_no_worker(monkeypatch: pytest.MonkeyPatch):
    def hangs(batches: Iterator[ScheduledBatch]) -> Iterator[int]:
        yield 1
        while True:
            time.sleep(600)

    process = started(hangs)
    next(process)
    real = process._process.join

    def interrupted(seconds: float | None = None) -> None:
        if seconds is not None:
            raise KeyboardInterrupt
        real()

    monkeypatch.setattr(process._process, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        process.close()
    assert process._process.exitcode == -signal.SIGKILL


def test_an_error_of_the_order_leaves_no_worker():
    def fails() -> Iterator[ScheduledBatch]:
        yield next(scheduled(1))
        raise OSError("no order")

    before = set(multiprocessing.active_children())
    with pytest.raises(OSError, match="no order"):
        LoaderProcess(arrays_of, fails(), ahead=2, slot_bytes=100, lent=2, name="tiny: loader")
    assert set(multiprocessing.active_children()) == before


def test_a_worker_removes_the_partial_files_of_its_fetches(tmp_path: Path):
    cache = FileCache(tmp_path, 1 << 20)

    def fetches(batches: Iterator[ScheduledBatch]) -> Iterator[int]:
        pool, writes, never = ThreadPoolExecutor(1), Event(), Event()
        pool.submit(fetch, writes, never)
        writes.wait()
        try:
            yield 1
            yield from (2 for _ in batches)
        finally:
            pool.shutdown(wait=False)

    def fetch(writes: Event, never: Event) -> None:
        with cache.tmp_path() as path:
            path.write_bytes(b"part")
            writes.set()
            never.wait()

    with cache.tmp_path() as own:
        own.write_bytes(b"part of another process")
        process = started(fetches)
        assert next(process) == 1
        assert len(list((tmp_path / "fetching").iterdir())) == 2
        process.close()
        assert list((tmp_path / "fetching").iterdir()) == [own]
