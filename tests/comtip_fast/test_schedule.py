"""The schedule at the size of large sets: sequential reads with balancing, time, and one computation per epoch."""

import os
import pickle
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from comtip_shards.sampling.order import by_section

from comtip_fast.config.schema import DataConfig
from comtip_fast.data.loaders import schedule as module
from comtip_fast.data.loaders.schedule import EpochSchedule


def schedule_of(sizes: list[int], platforms: list[str], **settings: Any) -> EpochSchedule:
    first = np.cumsum([0, *sizes[:-1]])
    sections = [SimpleNamespace(first_spot=int(f), platform=p) for f, p in zip(first, platforms, strict=True)]
    tars = [SimpleNamespace(first_spot=int(t)) for f, n in zip(first, sizes, strict=True) for t in range(f, f + n, TAR)]
    shards: Any = SimpleNamespace(manifest=SimpleNamespace(sections=sections, shards=tars))
    return EpochSchedule(shards, np.arange(sum(sizes)), DataConfig(**{"balance": "platform"} | settings), seed=3)


TAR = 100


def reads(batches: list[np.ndarray]) -> int:
    """Return the number of sequential reads, and so of seeks, of an epoch."""
    return sum(1 + int((np.diff(np.unique(b)) != 1).sum()) for b in batches)


@pytest.mark.parametrize("k", [None, 4])
def test_balanced_epochs_read_runs(k: int | None):
    """Regression test: with balancing, ``data.run`` was silently ignored."""
    sizes, platforms = [4000, 3000, 300, 250], ["a", "a", "b", "b"]
    common = {"batch_size": 512, "sections_per_batch": k}
    single, runs = (schedule_of(sizes, platforms, run=run, **common) for run in (1, 32))
    for schedule in (single, runs):
        drawn = np.concatenate(schedule.batches(0))
        assert drawn.size == sum(sizes)
        assert abs(int((drawn < 7000).sum()) * 2 - drawn.size) <= 1
        assert np.bincount(drawn, minlength=7550)[:7000].max() == 1
        counts = np.bincount(drawn, minlength=7550)[7000:]
        assert counts.max() - counts.min() <= 1
    # 7,550 / 32 runs, one more at each end of a section and pass, and one split at each end of a piece.
    n_pieces = 4 * len(runs.batches(0))
    assert reads(runs.batches(0)) <= 7550 // 32 + 2 * (2 + 2 * 8) + 2 * n_pieces
    assert reads(runs.batches(0)) < 0.12 * reads(single.batches(0))
    assert [b.tolist() for b in runs.batches(0)] != [b.tolist() for b in runs.batches(1)]
    seen = {int(s) for epoch in range(12) for b in runs.batches(epoch) for s in b}
    assert len(seen) > 0.99 * sum(sizes)


def test_without_runs_the_balanced_order_is_as_before():
    batches = schedule_of([40, 30, 9], ["a", "a", "b"], batch_size=16, sections_per_batch=2).batches(0)
    assert batches[0][:8].tolist() == PINNED


@pytest.mark.parametrize("run", [1, 8])
def test_slots_and_balancing_work_together(run: int):
    """Nodes read their share of the tars, groups have their share of the spots, and no spot of a large group repeats."""
    sizes, platforms = [4000, 3000, 800, 700], ["a", "a", "b", "b"]
    schedule = schedule_of(sizes, platforms, batch_size=256, sections_per_batch=32, run=run, slots=16)
    batches = schedule.batches(0)
    drawn = np.concatenate(batches)
    assert drawn.size == sum(sizes)
    assert abs(int((drawn < 7000).sum()) * 2 - drawn.size) <= 1
    assert np.bincount(drawn)[:7000].max() == 1
    of_node = [np.unique(np.concatenate([b.reshape(4, -1)[n] for b in batches[:-1]]) // TAR) for n in range(4)]
    assert sum(tars.size for tars in of_node) <= sum(-(-n // TAR) for n in sizes) + 3
    assert [b.tolist() for b in batches] != [b.tolist() for b in schedule.batches(1)]


PINNED = [64, 54, 52, 51, 44, 5, 6, 23]


def test_sections_are_found_in_one_pass():
    """Regression test: each section was found by a comparison with all spots: 33 s for 20 M spots of 3,000 sections."""
    ascending = np.repeat(np.arange(200), 20)
    parts = list(by_section(ascending))
    assert all(isinstance(at, slice) for _, at in parts), "spots in the order of the set are not sorted or copied"
    for section in (ascending, np.random.default_rng(0).permutation(ascending), np.zeros(0, np.int64)):
        parts = list(by_section(section))
        assert [s for s, _ in parts] == np.unique(section).tolist()
        positions = np.arange(section.size)
        for s, at in parts:
            assert positions[at].tolist() == np.flatnonzero(section == s).tolist()


def test_threads_share_one_computation(monkeypatch: pytest.MonkeyPatch):
    schedule = schedule_of([400, 300], ["a", "b"], batch_size=64)
    computed: list[int] = []
    started, real = threading.Event(), EpochSchedule._compute

    def slow(self: EpochSchedule, epoch: int) -> list[np.ndarray]:
        computed.append(epoch)
        started.wait(1.0)
        return real(self, epoch)

    monkeypatch.setattr(EpochSchedule, "_compute", slow)
    threads = [threading.Thread(target=schedule.batches, args=(0,)) for _ in range(3)]
    for t in threads:
        t.start()
    started.set()
    for t in threads:
        t.join(10)
    assert computed == [0]


def test_the_next_epoch_is_computed_ahead(monkeypatch: pytest.MonkeyPatch):
    schedule = schedule_of([400, 300], ["a", "b"], batch_size=64)
    monkeypatch.setattr(module, "COMPUTED_AHEAD", 100)
    next(schedule.iterate(0, 0, 1))
    for t in threading.enumerate():
        if t.name == "next epoch's order":
            t.join(10)
    assert sorted(schedule._epochs) == [0, 1]


def test_each_epoch_is_computed_once(monkeypatch: pytest.MonkeyPatch):
    """Regression test: the order that was computed ahead evicted that of the step's epoch, while batches were prefetched."""
    schedule = schedule_of([400, 300], ["a", "b"], batch_size=64)
    monkeypatch.setattr(module, "COMPUTED_AHEAD", 100)
    computed: list[int] = []
    real = EpochSchedule._compute

    def counted(self: EpochSchedule, epoch: int) -> list[np.ndarray]:
        computed.append(epoch)
        return real(self, epoch)

    monkeypatch.setattr(EpochSchedule, "_compute", counted)
    prefetched: list[int] = []
    for batch in schedule.iterate(0, 0, 1):
        for t in threading.enumerate():
            if t.name == "next epoch's order":
                t.join(10)
        prefetched.append(batch.epoch)
        if len(prefetched) > 3 and len(schedule.batches(prefetched[-4])) and prefetched[-4] == 4:
            break
    assert computed == [0, 1, 2, 3, 4, 5]


def test_a_forked_worker_does_not_wait_for_a_lock_of_its_parent():
    schedule = schedule_of([400, 300], ["a", "b"], batch_size=64)
    with schedule._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if schedule.batches(0) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(pickle.loads(pickle.dumps(schedule)).batches(0)) == len(schedule.batches(0))
