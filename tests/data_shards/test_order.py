"""Sample order: a pure function of seed and epoch; every spot once; runs of consecutive records."""

import numpy as np
import pytest
from comtip_shards.sampling.order import epoch_batches

from comtip_fast.collectives import share_of

SECTION = np.repeat([0, 1, 2, 3], [50, 7, 120, 33])


@pytest.mark.parametrize("k", [None, 1, 2, 3])
@pytest.mark.parametrize("batch", [16, 64, 500])
@pytest.mark.parametrize("run", [1, 5, 16])
def test_every_spot_once_per_epoch(k: int | None, batch: int, run: int):
    spots = np.arange(SECTION.size) * 3 + 1
    batches = epoch_batches(SECTION, spots, batch, k, seed=5, epoch=2, run=run)
    assert sorted(np.concatenate(batches).tolist()) == spots.tolist()
    assert all(2 <= b.size <= batch + 1 for b in batches)


def test_order_is_a_function_of_seed_and_epoch():
    spots = np.arange(SECTION.size)

    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate(epoch_batches(SECTION, spots, 32, 2, seed, epoch)).tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_batches_come_from_few_sections():
    section = np.repeat(np.arange(8), 64)
    batches = epoch_batches(section, np.arange(512), 64, 2, seed=0, epoch=0)
    assert len(batches) == 8
    assert {np.unique(section[b]).size for b in batches[:-2]} == {2}
    mixed = epoch_batches(section, np.arange(512), 64, None, seed=0, epoch=0)
    assert min(np.unique(section[b]).size for b in mixed) > 4


def test_the_default_order_is_pinned():
    """Another order would change every training run; runs of length 1 equal no runs."""
    batches = epoch_batches(SECTION, np.arange(SECTION.size), 32, 2, seed=0, epoch=0)
    assert batches[0][:6].tolist() == [49, 47, 3, 14, 4, 42]
    again = epoch_batches(SECTION, np.arange(SECTION.size), 32, 2, seed=0, epoch=0, run=1)
    assert [b.tolist() for b in again] == [b.tolist() for b in batches]


def test_large_sets_are_ordered_by_a_bounded_look_ahead(monkeypatch: pytest.MonkeyPatch):
    from comtip_shards.sampling import order

    # One section has most of the spots, so most batches find a second section only far ahead.
    section = np.repeat(np.arange(6), [20_000, 300, 41, 7, 500, 9])
    spots = np.arange(section.size)
    pieces = order.pieces_of(section, spots, 16, 4, 0, 0, 1)
    assert len(pieces) > 2 * order.WINDOW
    looked: list[int] = []

    def smallest(sizes):
        sizes = list(sizes)
        looked.append(len(sizes))
        return min(sizes)

    monkeypatch.setattr(order, "min", smallest, raising=False)
    bounded = order._combine(pieces, 16)
    assert max(looked) == order.WINDOW
    assert sorted(np.concatenate(bounded).tolist()) == spots.tolist()
    assert all(b.size <= 16 for b in bounded)
    # If the whole queue is within the look-ahead, the bound changes nothing.
    few = order.pieces_of(section[-857:], spots[-857:], 16, 4, 0, 0, 1)
    short = [b.tolist() for b in order._combine(few, 16)]
    monkeypatch.setattr(order, "WINDOW", 1 << 30)
    assert short == [b.tolist() for b in order._combine(few, 16)]


@pytest.mark.parametrize("k", [None, 2])
def test_runs_are_sequential_reads_and_differ_between_epochs(k: int | None):
    section = np.repeat(np.arange(4), 256)
    orders = [np.concatenate(epoch_batches(section, np.arange(1024), 64, k, 1, e, run=16)) for e in range(3)]
    for order in orders:
        seeks = 1 + int((np.diff(order) != 1).sum())
        # 1024 / 16 runs, one more per section for the offset, and one split per full batch.
        assert seeks <= 64 + 4 + 2 * 16
    heads = [set(order[1:][np.diff(order) != 1].tolist()) for order in orders]
    assert heads[0] != heads[1] != heads[2]


@pytest.mark.parametrize("size", [1, 5, 64, 67])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_slice_the_batch(size: int, world: int):
    batch = np.arange(size) * 7
    parts = [batch[share_of(size, r, world)] for r in range(world)]
    assert np.concatenate(parts).tolist() == batch.tolist()
    sizes = [p.size for p in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


# -- resume -----------------------------------------------------------------------------------------------------


def delivered(section: np.ndarray, seed: int, world: int, state: int, steps: int, run: int) -> list[list[int]]:
    """Return what all ranks receive per step in one attempt: a new process that knows only ``state``."""
    out: list[list[int]] = []
    ranks = range(world)
    epoch = done = 0
    while len(out) < steps:
        batches = epoch_batches(section, np.arange(section.size), 24, 2, seed, epoch, run=run)
        for batch in batches[max(0, state - done) :]:
            out.append([int(s) for r in ranks for s in batch[share_of(batch.size, r, world)]])
            if len(out) == steps:
                break
        done += len(batches)
        state = max(state, done)
        epoch += 1
    return out


@pytest.mark.parametrize("run", [1, 8])
def test_a_hundred_kills_on_three_world_sizes_lose_and_repeat_nothing(run: int):
    """A run is killed at random steps and resumes with another number of ranks; its only state is the step."""
    rng = np.random.default_rng(11)
    section = np.repeat([0, 1, 2, 3, 4], [61, 7, 110, 40, 33])
    per_epoch = len(epoch_batches(section, np.arange(section.size), 24, 2, 3, 0, run=run))
    whole = delivered(section, 3, 1, 0, 8 * per_epoch, run)
    kills = 0
    while kills < 100:
        step, lived = 0, []
        while step < len(whole):
            steps = min(int(rng.integers(1, 2 * per_epoch)), len(whole) - step)
            lived += delivered(section, 3, int(rng.choice([1, 2, 3])), step, steps, run)
            step += steps
            kills += 1
        assert lived == whole
    first_epoch = [s for batch in whole[:per_epoch] for s in batch]
    assert sorted(first_epoch) == list(range(section.size))
