"""Tiles that are decoded into their views: the batches of the reference, without copies, in memory that is used again."""

import gc
import threading
from itertools import islice

import numpy as np
import pytest
import torch
from comtip_shards import ShardError, ShardSet
from comtip_shards.format import record

from comtip_fast.config.io import load_config
from comtip_fast.data.augment.apply_views import apply_view
from comtip_fast.data.augment.views import ViewPlan, make_views, view_indices
from comtip_fast.data.expression.training_tables import training_tables
from comtip_fast.data.loaders import base
from comtip_fast.data.loaders.base import BaseLoader
from comtip_fast.data.loaders.factory import make_loader
from comtip_fast.data.loaders.tile_memory import TileMemory
from comtip_fast.data.records import SpotReader

CONFIGS = [(), ("data.stain=none", "data.jitter=0"), ("data.stain=none", "data.jitter=0", "data.flips=false")]


@pytest.fixture
def loader(tiny_shards: ShardSet, tiny_overrides: list[str]):
    """Return a factory of ``torch`` loaders without zoom in the calling thread, which are closed when the test ends."""
    loaders: list[BaseLoader] = []

    def make(*overrides: str) -> BaseLoader:
        words = ["data.loader=torch", "data.workers=0", "data.zoom=0", "data.expression=records", *overrides]
        config = load_config(None, [*tiny_overrides, *words])
        loaders.append(make_loader(config, tiny_shards, training_tables(tiny_shards, config)))
        return loaders[-1]

    yield make
    for one in loaders:
        one.close()


def reference(loader: BaseLoader, spots: np.ndarray, epoch: int) -> np.ndarray:
    view = view_indices(loader.config.data.views, spots, seed=loader.seed, epoch=epoch)
    return make_views(loader.shards.tiles(spots), loader._plan_views(spots, view)).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("lut", [True, False])
def test_a_view_of_one_tile_is_that_of_the_reference(compiled: bool, lut: bool):
    rng = np.random.default_rng(2)
    tables = rng.integers(0, 256, (8, 3, 256)).astype(np.uint8) if lut else None
    plan = ViewPlan(np.zeros(8, np.int64), np.arange(8), tables)
    tiles = rng.integers(0, 256, (8, 10, 10, 4)).astype(np.uint8)
    want = make_views(tiles[..., :3], plan).transpose(0, 3, 1, 2)
    for channels in (3, 4):
        out = np.zeros((8, 3, 10, 10), np.uint8)
        for i in range(8):
            apply_view(np.ascontiguousarray(tiles[i, ..., :channels]), plan, i, out[i], compiled=compiled)
        np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("more", CONFIGS, ids=str)
@pytest.mark.parametrize("where", ["torch,here", "torch,training", "torch,own", "wds,training"])
def test_batches_are_the_views_of_the_reference(loader, where: str, more: tuple[str, ...]):
    name, process = where.split(",")
    workers = [] if process == "here" else ["data.workers=2", f"data.loader_process={process}"]
    tested = loader(*more, f"data.loader={name}", *workers)
    for step, batch in enumerate(islice(tested.iterate(1, 0, 1), 5), start=1):
        assert batch.tiles is not None
        assert batch.step == step
        epoch = 1 if step <= len(tested.batches(1)) else 2
        np.testing.assert_array_equal(batch.tiles.numpy(), reference(tested, batch.spot_index.numpy(), epoch))


def test_a_batch_is_decoded_into_its_views_without_a_copy(loader, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("a copy of the decoded tiles")

    tested = loader()
    monkeypatch.setattr(SpotReader, "decode", refuse)
    monkeypatch.setattr(base, "apply_views", refuse)
    monkeypatch.setattr(record, "decode_tile", refuse)
    monkeypatch.setattr(type(tested.shards), "where", refuse)  # a name per tile is needed in errors only
    batch = tested.batch(tested.batches(0)[0], 1, 0)
    assert batch.tiles is not None
    monkeypatch.undo()
    np.testing.assert_array_equal(batch.tiles.numpy(), reference(tested, batch.spot_index.numpy(), 0))


@pytest.mark.parametrize("part", ["tile", "expr"])
def test_a_batch_with_a_damaged_record_is_that_of_separate_steps(loader, part: str, monkeypatch: pytest.MonkeyPatch):
    tested, stopped = loader("data.faults=skip"), loader("data.faults=stop")
    spots = tested.batches(0)[0]
    real = tested.shards.members_of
    bad = int(spots[1])

    def members(index: np.ndarray, parts: tuple[str, ...]) -> list[list[bytes]]:
        found = real(index, parts)
        for name, data in zip(parts, found, strict=True):
            if name == part:  # past the check of the CRC-32, so that decoding finds the damage
                data[:] = [d[: len(d) // 2] if int(s) == bad else d for s, d in zip(index, data, strict=True)]
        return found

    monkeypatch.setattr(tested.shards, "members_of", members)
    monkeypatch.setattr(tested.shards, "members", lambda index, name: members(np.asarray(index), (name,))[0])
    got = tested.batch(spots, 1, 0)
    assert list(tested.faults) == [bad]
    assert got.spot_index[1] != bad
    monkeypatch.setattr(base, "decode_views", lambda *_: None)
    want = tested.batch(spots, 1, 0)
    for name, tensor in want.tensors().items():
        assert torch.equal(tensor, getattr(got, name)), name
    np.testing.assert_array_equal(got.tiles, reference(tested, got.spot_index.numpy(), 0))
    with pytest.raises(ShardError, match=f"record {bad:09d}"):
        stopped.batch(spots, 1, 0)


# -- memory --------------------------------------------------------------------------------------------------


def test_memory_is_used_again_only_when_nothing_refers_to_it():
    memory = TileMemory(2)
    one = torch.from_numpy(memory.empty((4, 3, 5, 5)))
    address, part = one.data_ptr(), one[2:3]
    del one
    gc.collect()
    two = memory.empty((4, 3, 5, 5))
    assert two.ctypes.data != address  # a slice of the first batch is alive
    del part
    gc.collect()
    assert memory.empty((2, 3, 5, 5)).ctypes.data == address  # smaller, as the last batch of an epoch
    assert memory.allocated == 2
    del two
    larger = memory.empty((8, 3, 5, 5))
    assert larger.shape == (8, 3, 5, 5)
    assert memory.allocated == 3
    assert memory.empty((0, 3, 5, 5)).size == 0


def test_few_free_blocks_are_kept():
    memory = TileMemory(3)
    many = [memory.empty((1000,)) for _ in range(8)]
    del many
    gc.collect()
    assert len(memory._free) == 3
    memory.clear()
    assert not memory._free


def test_threads_never_share_a_block():
    memory, wrong = TileMemory(4), []

    def work(value: int) -> None:
        for _ in range(300):
            block = memory.empty((4096,))
            block[:] = value
            if (block != value).any():
                wrong.append(value)
            del block

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert memory.allocated < 100


@pytest.mark.parametrize("zoom", ["0", "0.2"])
def test_batches_are_written_to_memory_of_earlier_ones(loader, zoom: str):
    tested = loader(f"data.zoom={zoom}")
    kept, n = None, 3 * len(tested.batches(0))
    for batch in islice(tested.iterate(0, 0, 1), n):
        if kept is None:
            kept, content = batch, batch.tiles.clone()
    # The kept batch, the one of the loop, and the next one; twice as many, because the last batch of an epoch may be larger.
    assert 2 <= tested._memory.allocated <= 6 < n
    assert torch.equal(kept.tiles, content)
