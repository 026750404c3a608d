"""``comtip bench loader`` and ``bench/loader/compare.py`` measure every contender; peers do the same work as our loaders."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from comtip_shards import ShardSet

from bench.loader import compare
from bench.loader.peers import H5Tiles, TileViews, write_h5
from comtip_fast.benchmarks import loaders as bench
from comtip_fast.benchmarks.rounds import Contender, run_rounds
from comtip_fast.config.schema import DataConfig
from comtip_fast.data.augment.views import rotate_flip
from comtip_fast.data.loaders.factory import dali_is_installed

ROOT = Path(__file__).parents[2]


def test_the_command_measures_every_contender(tiny_shards: ShardSet, tmp_path: Path):
    command = [
        sys.executable,
        "-c",
        "import sys; from comtip_fast.cli import main; sys.exit(main())",
        "bench",
        "loader",
    ]
    command += ["--shards", str(tiny_shards.path), "--work", str(tmp_path), "--rounds", "1", "--spots", "24"]
    command += ["--batch-size", "8", "--epochs", "1", "--workers", "1", "--panel", "5"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert "commit" in lines[0]
    assert "32 px tiles, batches of 8, panels of 5 genes" in lines[1]
    rows = {r["contender"]: r for r in csv.DictReader(lines[2:])}
    wanted = {bench.TORCH, bench.WDS, bench.PIL_LIMIT, bench.OWN_PIL_LIMIT}
    if dali_is_installed():
        wanted |= {bench.DALI, bench.DALI_TABLE, bench.DALI_LIMIT}
        assert "DALI loader / DALI decoding, nothing else: " in done.stdout
    assert wanted == set(rows)
    assert all(float(r["spots_per_s"]) > 0 and float(r["cpu_ms_per_spot"]) > 0 for r in rows.values())
    assert (tmp_path / "memory.csv").read_text().count(",1,") == 1 + dali_is_installed()


def test_a_panel_larger_than_the_trained_genes_is_refused(tiny_shards: ShardSet):
    setting = bench.Setting(tiny_shards, 1, 8, 1, 24, panel=10**6)
    with pytest.raises(ValueError, match=r"trained genes, fewer than the 1000000 of a panel; give a smaller `panel`"):
        bench.load_inputs(setting)


def test_a_large_panel_selects_more_genes_than_the_default(tiny_shards: ShardSet):
    assert bench.Setting(tiny_shards, 1, 8, 1, 24).config.genes.per_cohort == 300
    config = bench.Setting(tiny_shards, 1, 8, 1, 24, panel=2048).config
    assert (config.genes.per_cohort, config.panel.min_genes, config.panel.max_genes) == (4096, 2048, 2048)


def test_the_cost_without_the_decoder_is_a_difference_per_round():
    def contender(name: str, cpu: list[float]) -> Contender:
        return Contender(name, iter(()), 1.0, [1.0] * len(cpu), cpu)  # type: ignore[arg-type]

    both = [contender(bench.DALI, [0.5, 1.5, 0.6]), contender(bench.DALI_LIMIT, [0.4, 1.2, 0.4])]
    assert bench.costs_without_decoder(both) == {bench.DALI: pytest.approx(0.2)}
    assert bench.costs_without_decoder(both[:1]) == {}


def test_the_comparison_measures_peers_and_loaders(tiny_shards: ShardSet, tmp_path: Path):
    command = [sys.executable, str(ROOT / "bench" / "loader" / "compare.py"), "--shards", str(tiny_shards.path)]
    command += ["--work", str(tmp_path), "--rounds", "1", "--spots", "24", "--batch-size", "8", "--epochs", "1"]
    command += ["--workers", "1"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "results.csv").read_text().splitlines()
    rows = {r["contender"]: r for r in csv.DictReader(lines[2:])}
    wanted = {compare.WEBDATASET, compare.WEBDATASET_PILLOW, compare.H5, bench.TORCH, bench.WDS}
    wanted |= {bench.PIL_LIMIT, bench.OWN_PIL_LIMIT}
    if dali_is_installed():
        wanted |= {bench.DALI, bench.DALI_TABLE, compare.DALI_READER, bench.DALI_LIMIT}
        assert "DALI loader / webdataset + PIL, numpy views: " in done.stdout
    assert wanted <= set(rows)
    assert all(float(r["spots_per_s"]) > 0 and float(r["cpu_ms_per_spot"]) > 0 for r in rows.values())
    assert float(rows[compare.H5]["bytes_per_spot"]) == 3 * 32 * 32
    # One rate-limited row per kind of storage access.
    assert sum("storage of 100 MB/s" in name for name in rows) == 1 + dali_is_installed()


def test_the_package_does_not_import_the_peers():
    sources = (ROOT / "comtip_fast").rglob("*.py")
    assert not [p for p in sources if "bench.loader" in p.read_text()]


def test_a_batch_that_is_larger_than_the_set_is_refused(tiny_shards: ShardSet):
    with pytest.raises(ValueError, match=r"training spots, fewer than a batch of 10000; give a smaller `batch_size`"):
        bench.load_inputs(bench.Setting(tiny_shards, 1, 10_000, 1, 24))


def test_ratios_are_computed_per_round():
    def contender(name: str, rates: list[float]) -> Contender:
        return Contender(name, iter(()), 1.0, rates, [1.0] * len(rates))  # type: ignore[arg-type]

    # The machine is slow in the second round: the ratio of medians would be 2, that of each round is 3.
    found = bench.ratios(
        [contender(bench.DALI, [300, 30, 330]), contender(compare.WEBDATASET, [100, 10, 110])], compare.RATIOS
    )
    assert found == {"DALI loader / webdataset + PIL, numpy views": pytest.approx(3)}


def test_rounds_are_interleaved_and_warm_batches_do_not_count():
    order: list[str] = []

    def batches(name: str):
        while True:
            order.append(name)
            yield 10

    both = [Contender(n, batches(n), 1.0) for n in "ab"]
    run_rounds(both, rounds=2, spots=25, warm=2)
    assert "".join(order) == ("a" * 5 + "b" * 5) * 2
    assert all(len(c.spots_per_s) == 2 for c in both)


def test_peers_make_the_same_views(tiny_shards: ShardSet):
    tile = tiny_shards.tiles([3])[0]
    table = np.random.default_rng(0).integers(0, 256, (3, 256)).astype(np.uint8)
    views = [TileViews(tiny_shards, DataConfig(), how) for how in ("numpy", "pillow")]
    for turn in range(8):
        want = rotate_flip(tile, turn)
        want = np.stack([table[c][want[..., c]] for c in range(3)])
        for one in views:
            np.testing.assert_array_equal(one.view(tile, turn, table), want)


def test_h5_files_hold_the_training_tiles(tiny_shards: ShardSet, tmp_path: Path):
    write_h5(tiny_shards, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t1.h5", "t2.h5"]
    views = TileViews(tiny_shards, DataConfig(jitter=0.0, stain="none"), "numpy")
    views.view = lambda image, turn, table: image  # type: ignore[method-assign]
    tiles = H5Tiles(tmp_path, tiny_shards, np.zeros((98, 2), np.uint8), views, 0.0)
    train = tiny_shards.select(split="train")
    assert len(tiles) == train.size
    for i in (0, 48, 49, 97):
        np.testing.assert_array_equal(tiles[i][0], tiny_shards.tiles(train[[i]])[0])
