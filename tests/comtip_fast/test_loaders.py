"""All loaders return the same batches, from any position and on any number of ranks; damage is reported and counted."""

import gc
import io
import json
import os
import resource
import shutil
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from comtip_shards import ShardError, ShardSet
from comtip_shards.format.image_header import check_size
from comtip_shards.sampling.balance import balanced_draw
from PIL import Image
from torch import Tensor

from comtip_fast.collectives import share_of
from comtip_fast.config.io import load_config
from comtip_fast.data.batch import Batch
from comtip_fast.data.expression.training_tables import TrainingTables, training_tables
from comtip_fast.data.loaders import factory
from comtip_fast.data.loaders.base import BaseLoader
from comtip_fast.data.loaders.factory import dali_is_installed, make_loader
from comtip_fast.data.loaders.prefetch import Prefetcher
from comtip_fast.data.loaders.schedule import EpochSchedule
from comtip_fast.training.task import build_task
from comtip_fast.training.trainer import Trainer

needs_dali = pytest.mark.skipif(not dali_is_installed(), reason="DALI is not installed (extra dali-cu13)")
THREADS = ["torch", pytest.param("dali", marks=needs_dali)]
LOADERS = [
    *THREADS,
    "wds",
    "torch,own",
    pytest.param("dali,own", marks=needs_dali),
    pytest.param("dali,apart", marks=needs_dali),
]
"""Values of data.loader; ``own``: in a process of its own; ``apart``: which sends what it reads to a decoder in this process."""
NAMES = ("tiles", "panel", "levels", "measured", "section", "spot_index")
JPEG_TOLERANCE = 3


@pytest.fixture(scope="module")
def tables(tiny_shards: ShardSet, tiny_overrides: list[str]) -> TrainingTables:
    return training_tables(tiny_shards, load_config(None, tiny_overrides))


@pytest.fixture
def loader(tiny_shards: ShardSet, tiny_overrides: list[str]):
    """Return a factory of loaders, which are closed when the test ends."""
    loaders: list[BaseLoader] = []

    def make(*overrides: str, shards: ShardSet = tiny_shards, rank: int = 0, world: int = 1) -> BaseLoader:
        own = [f"data.loader_process={'own' if ',' in word else 'training'}" for word in overrides if "loader=" in word]
        words = [word.partition(",")[0] if "loader=" in word else word for word in overrides]
        config = load_config(None, [*tiny_overrides, "data.zoom=0.2", "data.workers=2", *own, *words])
        loaders.append(make_loader(config, shards, training_tables(shards, config), rank=rank, world=world))
        if any(word.endswith(",apart") for word in overrides):
            loaders[-1].decodes_apart = True
        return loaders[-1]

    yield make
    for one in loaders:
        one.close()


def same(one: Batch, two: Batch, tolerance: int = 0) -> None:
    assert one.step == two.step
    for name in NAMES[1:]:
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert one.tiles is not None
    assert two.tiles is not None
    assert one.tiles.shape == two.tiles.shape
    assert (one.tiles.int() - two.tiles.int()).abs().max() <= tolerance


def whole_epoch(loader: BaseLoader) -> list[Batch]:
    return [loader.batch(spots, step, 0) for step, spots in enumerate(loader.batches(0), start=1)]


# -- the same batches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("expression", ["table", "records"])
@pytest.mark.parametrize("name", LOADERS)
def test_every_loader_returns_the_batches_of_the_reference_loader(loader, name: str, expression: str):
    plain = loader("data.loader=torch", "data.workers=0", "data.expression=table")
    tested = loader(f"data.loader={name}", f"data.expression={expression}")
    tolerance = JPEG_TOLERANCE if "dali" in name else 0
    # Past the end of an epoch, through both interfaces.
    n = len(plain.batches(0)) + 2
    for want, got in zip(islice(plain.iterate(0, 1, 5), n), islice(tested.iterate(0, 1, 5), n), strict=True):
        same(want, got, tolerance)
    for step, spots in enumerate(plain.batches(1), start=1):
        same(plain.batch(spots, step, 1), tested.batch(spots, step, 1), tolerance)


@pytest.mark.parametrize("name", LOADERS)
def test_batches_requested_out_of_order_are_correct(loader, name: str):
    plain, tested = loader("data.loader=torch", "data.workers=0"), loader(f"data.loader={name}")
    order = plain.batches(0)
    for epoch, position, step in ((0, 2, 9), (0, 0, 1), (1, 1, 4), (1, 2, 5), (1, 2, 5), (1, 3, 7)):
        spots = plain.batches(epoch)[position]
        same(plain.batch(spots, step, epoch), tested.batch(spots, step, epoch), JPEG_TOLERANCE)
    odd = np.sort(order[0])[:5]  # not a batch of the schedule
    same(plain.batch(odd, 3, 0), tested.batch(odd, 3, 0), JPEG_TOLERANCE)


def test_batches_in_order_come_from_the_background(loader, monkeypatch: pytest.MonkeyPatch):
    tested = loader("data.loader=torch")
    threads = set()
    real = tested._read

    def read(scheduled, how):
        threads.add(threading.current_thread().name)
        return real(scheduled, how)

    monkeypatch.setattr(tested, "_read", read)
    for step, spots in enumerate(tested.batches(0), start=1):
        tested.batch(spots, step, 0)
    assert threads
    assert all(name.startswith("comtip-loader") for name in threads)
    first = tested.metrics()
    assert first["loader_wait_s"] > 0
    assert tested.metrics()["loader_wait_s"] == 0


# -- ranks, epochs, resuming ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOADERS)
def test_ranks_slice_the_global_batch(loader, name: str):
    whole = loader("data.loader=torch", "data.workers=0")
    parts = [loader(f"data.loader={name}", rank=r, world=3) for r in range(3)]
    for step, spots in enumerate(whole.batches(2), start=1):
        want = whole.batch(spots, step, 2)
        got = [p.batch(spots, step, 2) for p in parts]
        for g in got:
            assert torch.equal(g.panel, want.panel)
        for field in ("tiles", "levels", "measured", "section", "spot_index"):
            all_ranks = torch.cat([getattr(g, field) for g in got])
            difference = (all_ranks.int() - getattr(want, field).int()).abs().max()
            assert difference <= (JPEG_TOLERANCE if "dali" in name and field == "tiles" else 0), field


@pytest.mark.parametrize("name", LOADERS)
def test_a_rank_without_spots_has_an_empty_batch(loader, name: str):
    batch = next(
        loader(f"data.loader={name}", "data.batch_size=2", "data.expression=records", rank=4, world=5).iterate()
    )
    assert batch.tiles is not None
    assert batch.tiles.shape == (0, 3, 32, 32)
    assert batch.levels.shape == (0, batch.panel.numel())
    assert batch.panel.numel() > 0


@pytest.mark.parametrize(
    "more", [(), ("data.sections_per_batch=null",), ("data.run=8",), ("data.batch_size=7",)], ids=str
)
def test_100_kills_over_three_world_sizes_lose_and_repeat_nothing(tiny_shards: ShardSet, tiny_overrides, more):
    config = load_config(None, [*tiny_overrides, *more])
    schedule = EpochSchedule(tiny_shards, tiny_shards.select(split="train"), config.data, seed=5)
    rng = np.random.default_rng(0)
    epoch, position, step, seen = 0, 0, 1, {}
    kills = 0
    while kills < 100:
        world = int(rng.choice([1, 2, 4]))
        for scheduled in islice(schedule.iterate(epoch, position, step), int(rng.integers(0, 9))):
            for rank in range(world):
                spots = scheduled.spots[share_of(scheduled.spots.size, rank, world)]
                seen.setdefault(scheduled.epoch, []).append(spots)
            epoch, position, step = scheduled.epoch, scheduled.position + 1, scheduled.step + 1
        if position == len(schedule.batches(epoch)):
            epoch, position = epoch + 1, 0
        kills += 1
    complete = [e for e in seen if e < epoch]
    assert len(complete) >= 3
    for e in complete:
        assert sorted(np.concatenate(seen[e]).tolist()) == schedule.spots.tolist()
    assert [b.tolist() for b in schedule.batches(0)] != [b.tolist() for b in schedule.batches(1)]


@pytest.mark.parametrize("name", LOADERS)
def test_a_new_loader_resumes_in_the_middle_of_an_epoch_on_a_different_number_of_ranks(loader, name: str):
    whole = [b.spot_index for b in islice(loader("data.loader=torch", "data.workers=0").iterate(0, 0, 1), 5)]
    first = [loader(f"data.loader={name}", rank=r, world=2).iterate(0, 0, 1) for r in range(2)]
    then = [loader(f"data.loader={name}", rank=r, world=3).iterate(0, 2, 3) for r in range(3)]
    got = [torch.cat([next(it).spot_index for it in first]) for _ in range(2)]
    got += [torch.cat([next(it).spot_index for it in then]) for _ in range(3)]
    for it in (*first, *then):
        it.close()
    for want, have in zip(whole, got, strict=True):
        assert torch.equal(want, have)


# -- balance -------------------------------------------------------------------------------------------------


def test_groups_have_equal_weight_and_large_ones_show_all_their_spots_over_epochs():
    group = np.repeat(["a", "b", "c"], [90, 9, 21])
    spots = np.arange(1000, 1120)
    seen: dict[int, int] = {}
    for epoch in range(12):
        drawn = balanced_draw(group, spots, 0, epoch)
        assert drawn.size == spots.size
        counts = np.bincount(drawn - 1000, minlength=120)
        for name in "abc":
            own = counts[group == name]
            assert own.sum() == 40
            assert own.max() - own.min() <= 1  # complete rounds and a fraction of the next
        for spot in drawn:
            seen[int(spot)] = seen.get(int(spot), 0) + 1
    assert set(seen) == set(spots.tolist())
    assert (balanced_draw(group, spots, 0, 3) == balanced_draw(group, spots, 0, 3)).all()
    assert (balanced_draw(group, spots, 0, 3) != balanced_draw(group, spots, 0, 4)).any()


def test_balanced_batches_contain_both_platforms_equally(
    tiny_shards: ShardSet, loader, monkeypatch: pytest.MonkeyPatch
):
    from comtip_fast.data.loaders import schedule as module

    monkeypatch.setattr(module, "balance_groups", lambda shards, _: ["x", "y", "y", "y"])
    # 49 spots of one training section and 9 of the other.
    few = loader("data.balance=platform")
    spots = np.concatenate([np.arange(49), np.arange(49, 58)])
    plan = EpochSchedule(tiny_shards, spots, few.config.data, seed=0)
    drawn = np.concatenate(plan.batches(0))
    assert (drawn < 49).sum() == 29
    assert (drawn >= 49).sum() == 29
    assert set(drawn[drawn >= 49].tolist()) == set(range(49, 58))
    whole = few.batch(few.batches(0)[0], 1, 0)
    assert whole.tiles is not None


# -- bounds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", THREADS)
def test_prefetching_is_bounded(loader, name: str, monkeypatch: pytest.MonkeyPatch):
    tested = loader(f"data.loader={name}", "data.prefetch=3")
    started = []
    real = tested.records.fetch
    monkeypatch.setattr(tested.records, "fetch", lambda spots: started.append(spots) or real(spots))
    stream = tested.iterate(0, 0, 1)
    for consumed in range(1, 6):
        next(stream)
        for _ in range(50):
            before = len(started)
            threading.Event().wait(0.02)
            if len(started) == before:
                break
        # Ready, in progress, and (DALI, on a CPU) four batches in its pipeline.
        assert consumed < len(started) <= consumed + 3 + (5 if name == "dali" else 0)
    stream.close()


def test_the_prefetcher_raises_errors_of_its_source_and_stops():
    def numbers(n: int):
        yield from range(n)
        raise ValueError("bad")

    prefetcher = Prefetcher(numbers(3), 1)
    got = []
    with pytest.raises(ValueError, match="bad"):
        got.extend(prefetcher)
    prefetcher.stop()
    endless = Prefetcher(iter(int, 1), 2)
    assert next(iter(endless)) == 0
    endless.stop()
    assert not endless._thread.is_alive()
    assert list(Prefetcher(iter([1, 2]), 5)) == [1, 2]


def threads_of_loaders() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("comtip-loader")}


@pytest.mark.parametrize("name", THREADS)
def test_memory_stays_flat(loader, name: str):
    before = threads_of_loaders()  # from loaders of other tests
    tested = loader(f"data.loader={name}", "data.batch_size=16")
    stream = tested.iterate(0, 0, 1)
    n = len(tested.batches(0))
    resident = []
    for _epoch in range(60):
        for _ in range(n):
            next(stream)
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
    stream.close()
    # 54 epochs of tiles are 16 MB; a loader that kept them would exceed the limit.
    assert max(resident[5:]) - resident[4] < 8 << 20
    assert not threads_of_loaders() - before


# -- faults --------------------------------------------------------------------------------------------------


def damaged(shards: ShardSet, folder: Path, spots: list[int], part: str) -> ShardSet:
    """Copy a shard set and flip a bit in the middle of a member of the given records."""
    copy = folder / "damaged"
    shutil.copytree(shards.path, copy)
    for spot in spots:
        shard = next(s for s in shards.manifest.shards if s.first_spot <= spot < s.first_spot + s.records)
        offsets, sizes = shards.member_ranges(shard)
        column = ("tile", "expr").index(part)
        at = int(offsets[spot - shard.first_spot, column] + sizes[spot - shard.first_spot, column] // 2)
        path = copy / shard.file
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
    return ShardSet(copy)


@pytest.mark.parametrize("name", LOADERS)
def test_a_damaged_record_stops_the_loader_with_shard_and_key(loader, tiny_shards: ShardSet, tmp_path: Path, name: str):
    tested = loader(f"data.loader={name}", shards=damaged(tiny_shards, tmp_path, [5], "tile"))
    with pytest.raises(ShardError, match=r"t1-0000\.tar: record 000000005.*CRC"):
        whole_epoch(tested)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("name", LOADERS)
def test_damaged_records_are_skipped_counted_and_replaced_the_same_on_any_ranks(
    loader, tiny_shards: ShardSet, tmp_path: Path, name: str, world: int
):
    bad = [5, 6, 60]
    shards = damaged(tiny_shards, tmp_path, bad, "tile")
    ranks = [
        loader(f"data.loader={name}", "data.faults=skip", shards=shards, rank=r, world=world) for r in range(world)
    ]
    for step, spots in enumerate(ranks[0].batches(0), start=1):
        got = torch.cat([r.batch(spots, step, 0).spot_index for r in ranks]).numpy()
        assert got.size == spots.size
        assert not set(bad) & set(got.tolist())
        readable = ~np.isin(spots, bad)
        assert (got[readable] == spots[readable]).all()
        # Replacements come from the same section and the same batch, and do not depend on the ranks.
        for i in np.flatnonzero(~readable):
            assert tiny_shards.sections_of([got[i]]) == tiny_shards.sections_of([spots[i]])
            later = [s for s in np.roll(spots, -i - 1)[:-1] if s not in bad]
            same_section = [s for s in later if tiny_shards.sections_of([s]) == tiny_shards.sections_of([spots[i]])]
            assert got[i] == same_section[0]
    assert set().union(*(r.faults for r in ranks)) == set(bad)
    metrics = [r.metrics() for r in ranks]
    assert sum(m["faults"] for m in metrics) == sum(m["faults_checksum"] for m in metrics) == len(bad)


def test_more_damaged_records_than_the_limit_stop_the_loader(loader, tiny_shards: ShardSet, tmp_path: Path):
    shards = damaged(tiny_shards, tmp_path, [5, 6, 7], "tile")
    tested = loader("data.faults=skip", "data.max_faults=2", shards=shards)
    with pytest.raises(ShardError, match=r"more than data\.max_faults=2"):
        whole_epoch(tested)


def test_spots_with_damaged_counts_are_excluded_from_training(loader, tiny_shards: ShardSet, tmp_path: Path):
    shards = damaged(tiny_shards, tmp_path, [5], "expr")
    with pytest.raises(ShardError, match="record 000000005"):
        loader(shards=shards)
    tested = loader("data.faults=skip", shards=shards)
    assert sorted(np.concatenate(tested.batches(0)).tolist()) == [s for s in range(98) if s != 5]


def test_damaged_records_of_the_fit_and_of_the_other_spots_count_together(
    tiny_shards: ShardSet, tiny_overrides, tmp_path: Path
):
    shards = damaged(tiny_shards, tmp_path, [0, 97], "expr")
    config = load_config(None, [*tiny_overrides, "data.faults=skip", "data.max_faults=1", "levels.fit_spots=100"])
    object.__setattr__(config.levels, "fit_spots", 40)  # spot 0 is one of the 40, spot 97 is not
    with pytest.raises(ShardError, match="2 records are damaged"):
        training_tables(shards, config)


def test_features_of_a_frozen_stem_exclude_damaged_tiles(tiny_shards: ShardSet, tiny_overrides, tmp_path: Path):
    shards = damaged(tiny_shards, tmp_path, [5], "tile")
    config = load_config(None, [*tiny_overrides, "data.faults=skip"])
    stem = lambda tiles: tiles.float().mean((2, 3))[:, None]  # noqa: E731
    tested = make_loader(config, shards, training_tables(shards, config), frozen_stem=stem)
    for step, spots in enumerate(tested.batches(0), start=1):
        batch = tested.batch(spots, step, 0)
        assert 5 not in batch.spot_index.tolist()
        assert batch.features is not None
        assert (batch.features > 0).all()
    assert tested.metrics()["faults"] == 1


def test_features_that_do_not_fit_into_memory_are_not_kept(tiny_shards, tiny_overrides, monkeypatch):
    """Regression test: a large set filled the memory of every rank with the features of all tiles before step 1."""
    ran: list[int] = []

    def stem(tiles: Tensor) -> Tensor:
        ran.append(tiles.shape[0])
        return tiles.float().mean((2, 3))[:, None]

    def batch_of(*overrides: str) -> Batch:
        config = load_config(None, [*tiny_overrides, *overrides])
        tested = make_loader(config, tiny_shards, training_tables(tiny_shards, config), frozen_stem=stem)
        return tested.batch(tested.batches(0)[0], 1, 0)

    assert batch_of().features is not None
    ran.clear()
    monkeypatch.setattr(factory, "STEM_BYTES", 98 * 2 * 3 * 2 - 1)  # spots, views, values of a tile, bytes of a value
    large = batch_of()
    assert large.features is None
    assert large.tiles is not None
    assert ran == [1]
    assert batch_of("data.stem_features=memory").features is not None
    assert batch_of("data.stem_features=batch").features is None


def jpeg(px: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (px, px)).save(out, "JPEG", quality=95)
    return out.getvalue()


def test_tile_sizes_are_checked_before_decoding():
    good = jpeg(32)
    check_size(good, 32, "jpeg", lambda: "here")
    frame = good.index(b"\xff\xc0")
    huge = good[: frame + 5] + b"\xff\xff\xff\xff" + good[frame + 9 :]
    two_frames = good[:frame] + good[frame : frame + 19] + good[frame:]
    for bad in (huge, two_frames, good[:-2], good[: frame + 4], b"", b"\xff\xd8\xff\xd9", good[2:], jpeg(48)):
        with pytest.raises(ShardError, match="here"):
            check_size(bad, 32, "jpeg", lambda: "here")
    out = io.BytesIO()
    Image.new("RGB", (32, 32)).save(out, "PNG")
    check_size(out.getvalue(), 32, "png", lambda: "here")
    with pytest.raises(ShardError, match=r"here.*48"):
        check_size(out.getvalue(), 48, "png", lambda: "here")


@needs_dali
def test_what_dali_cannot_decode_is_found_by_pillow(loader, monkeypatch: pytest.MonkeyPatch):
    plain, tested = loader("data.loader=torch", "data.workers=0"), loader("data.loader=dali")
    real = tested.records.fetch
    calls = []

    def fetch(spots):
        got = real(spots)
        calls.append(spots)
        if len(calls) == 2:  # passes every header check but has an invalid Huffman table
            codes = got.tiles[1].index(b"\xff\xc4") + 5
            got.tiles[1] = got.tiles[1][:codes] + b"\xff" * 16 + got.tiles[1][codes + 16 :]
        return got

    monkeypatch.setattr(tested.records, "fetch", fetch)
    for want, got in zip(islice(plain.iterate(), 5), islice(tested.iterate(), 5), strict=True):
        same(want, got, JPEG_TOLERANCE)
    assert len(calls) >= 6  # one batch is read twice


# -- level tables that do not fit into memory ------------------------------------------------------------------


def test_levels_fitted_on_a_sample_apply_to_all_spots(tiny_shards: ShardSet, tiny_overrides):
    few = load_config(None, [*tiny_overrides, "levels.fit_spots=100"])
    assert training_tables(tiny_shards, few).levels is not None
    object.__setattr__(few.levels, "fit_spots", 40)
    part = training_tables(tiny_shards, few)
    assert part.levels is not None
    assert part.levels.shape == (98, part.genes.trained.size)
    object.__setattr__(few.data, "expression", "records")
    none = training_tables(tiny_shards, few)
    assert none.levels is None
    assert (none.table.edges == part.table.edges).all()
    one, two = make_loader(few, tiny_shards, part), make_loader(few, tiny_shards, none)
    for step, spots in enumerate(one.batches(0), start=1):
        same(one.batch(spots, step, 0), two.batch(spots, step, 0))
    whole = training_tables(tiny_shards, load_config(None, tiny_overrides))
    assert (whole.table.edges.shape != part.table.edges.shape) or (whole.table.edges != part.table.edges).any()


def test_missing_dali_is_reported(tiny_shards: ShardSet, tables, tiny_overrides, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("comtip_fast.data.loaders.factory.dali_is_installed", lambda: False)
    with pytest.raises(ValueError, match=r"comtip-fast\[dali-cu13\]"):
        make_loader(load_config(None, [*tiny_overrides, "data.loader=dali"]), tiny_shards, tables)
    auto = make_loader(load_config(None, tiny_overrides), tiny_shards, tables)
    assert type(auto).__name__ == "TorchLoader"
    with pytest.raises(ValueError, match="rank 2 of 2"):
        make_loader(load_config(None, tiny_overrides), tiny_shards, tables, rank=2, world=2)


def test_a_run_logs_loader_waits_and_damaged_records(tiny_shards: ShardSet, tiny_overrides: list[str], tmp_path: Path):
    before = threads_of_loaders()
    shards = damaged(tiny_shards, tmp_path, [5], "tile")
    more = ["data.faults=skip", "train.steps=8", "train.validate_every=0", "train.checkpoint_every=100"]
    config = load_config(None, [*tiny_overrides, *more, f"data.shards={shards.path}"])
    Trainer(build_task(config, torch.device("cpu")), config, tmp_path / "run").fit()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [r for r in rows if r["kind"] == "train"]
    assert {k: v for k, v in trained[-1].items() if k.startswith("faults")} == {"faults": 1, "faults_checksum": 1}
    assert all(0 <= r["loader_wait_share"] <= 1 for r in trained)
    assert any(r["loader_wait_share"] > 0 for r in trained)
    assert not threads_of_loaders() - before


@pytest.mark.parametrize("part", ["tile", "expr"])
def test_validation_skips_damaged_spots(tiny_shards: ShardSet, tiny_overrides: list[str], tmp_path: Path, part: str):
    val = tiny_shards.select(split="val")
    shards = damaged(tiny_shards, tmp_path, [int(val[3])], part)
    config = load_config(None, [*tiny_overrides, f"data.shards={shards.path}"])
    with pytest.raises(ShardError, match=f"record {val[3]:09d}"):
        build_task(config, torch.device("cpu")).validate()
    task = build_task(
        load_config(None, [*tiny_overrides, f"data.shards={shards.path}", "data.faults=skip"]), torch.device("cpu")
    )
    score, *_ = task.validate()
    assert np.isfinite(score)
    assert set(task.loader.faults) == {int(val[3])}


def test_worker_processes_never_collect_inherited_objects(loader, tmp_path: Path):
    # The destructor of a DALI pipeline in a forked process waits for threads that do not exist there, and can hang.
    class Garbage:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            (tmp_path / f"collected by {os.getpid()}").touch()

    tested = loader("data.loader=wds")
    tested.garbage = Garbage()
    real = tested._load

    def collects(scheduled):
        del tested.garbage
        gc.collect()
        tested.garbage = None
        return real(scheduled)

    tested._load = collects
    for step, spots in enumerate(tested.batches(0), start=1):
        assert tested.batch(spots, step, 0).spot_index.tolist() == spots.tolist()
    tested.close()
    assert isinstance(tested.garbage, Garbage)  # workers loaded the batches
    assert not list(tmp_path.iterdir())
