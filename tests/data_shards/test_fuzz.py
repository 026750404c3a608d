"""Random damage and forgeries; ``bench/shards/fuzz.py`` runs ten thousand of them."""

import numpy as np
import pytest
from comtip_shards.builder.build import build_shards
from comtip_shards.reader.shard_set import ShardSet
from comtip_shards.sources import open_source

from testkit import fuzz
from testkit.fuzz import Fuzzer
from testkit.tiny import TinySection, write_tiny_source


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Fuzzer:
    folder = tmp_path_factory.mktemp("fuzz")
    write_tiny_source(folder / "source", [TinySection("a", "d", "train"), TinySection("b", "e", "val")], side=2)
    build_shards(open_source(folder / "source"), folder / "set", tile_px=16, tile_um=224.0, min_mpp=4.0, max_records=3)
    return Fuzzer(folder / "set", folder / "work")


@pytest.mark.parametrize("block", range(6))
def test_damage_is_found_and_never_read_as_other_data(fuzzer: Fuzzer, block: int):
    outcomes = [fuzzer.run(np.random.default_rng([20, block, i]), forge=False) for i in range(30)]
    assert [o for o in outcomes if o.wrong] == []
    assert [o for o in outcomes if not o.found and not o.harmless] == []
    assert sum(o.found for o in outcomes) > 20


@pytest.mark.parametrize("block", range(6))
def test_forgeries_neither_crash_nor_hang(fuzzer: Fuzzer, block: int):
    """Any error other than ShardError fails the test, and so does its time limit."""
    outcomes = [fuzzer.run(np.random.default_rng([21, block, i]), forge=True) for i in range(20)]
    assert sum(o.found for o in outcomes) > 5


def test_the_judge_sees_a_reader_that_checks_nothing(fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch):
    """Test of the fuzzer: with CRC checks off, wrong data is returned and detected."""
    monkeypatch.setattr("comtip_shards.reader.record_reader.zlib.crc32", lambda data: 0)
    monkeypatch.setattr(
        "comtip_shards.reader.record_reader.spots.read_crcs",
        lambda *a: np.zeros((len(ShardSet(fuzzer.work)), 3), np.uint32),
    )
    monkeypatch.setattr(fuzz, "BYTES", {"digit changed": fuzz.BYTES["digit changed"]})
    outcomes = [fuzzer.run(np.random.default_rng([22, i]), forge=False) for i in range(40)]
    assert any(o.wrong for o in outcomes)
