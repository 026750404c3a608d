"""Several sets that are read as one equal the set that a merge of them writes."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from comtip_shards import ShardError, ShardSet, SourceError, open_sets
from comtip_shards.builder.build import build_shards
from comtip_shards.builder.merge import merge_sets
from comtip_shards.reader.joined_set import JoinedSet
from comtip_shards.reader.statistics import gene_statistics
from comtip_shards.sources import open_source
from numpy.testing import assert_array_equal

from testkit.tiny import TinySection, write_tiny_source

TILES = {"tile_px": 32, "tile_um": 224.0, "min_mpp": 5.0}
A = (TinySection("t1", "donor_a", "train"), TinySection("v1", "donor_v", "val"))
B = (TinySection("t2", "donor_b", "train"), TinySection("x1", "donor_x", "test"))


def build(
    folder: Path, sections: tuple[TinySection, ...], seed: int, genes: slice = slice(None), **tiles: float
) -> Path:
    """Build a set whose sections measured some of the genes of :mod:`testkit.tiny`."""
    source = write_tiny_source(folder / "source", sections, side=5, seed=seed).parent
    for path in source.glob("*.tsv.gz"):
        pd.read_csv(path, sep="\t", index_col=0).iloc[:, genes].to_csv(path, sep="\t")
    build_shards(open_source(source), folder / "set", **(TILES | tiles))
    return folder / "set"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return two sets: the first lacks the last genes, the second the first ones."""
    folder = tmp_path_factory.mktemp("parts")
    return build(folder / "a", A, 0, slice(0, 25)), build(folder / "b", B, 1, slice(5, 30))


@pytest.fixture(scope="module")
def merged(parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    out = tmp_path_factory.mktemp("merged") / "set"
    merge_sets(parts, out)
    return ShardSet(out)


@pytest.fixture(scope="module")
def joined(parts: tuple[Path, Path]) -> ShardSet:
    return open_sets(parts)


def test_a_joined_set_has_the_numbers_of_the_merged_one(joined: ShardSet, merged: ShardSet) -> None:
    assert joined.genes == merged.genes
    assert joined.manifest.n_genes == 30
    pd.testing.assert_frame_equal(joined.spots, merged.spots)
    assert all("spots" not in vars(one) for one in joined.sets), "the spots are in memory twice"
    for one, other in zip(joined.manifest.sections, merged.manifest.sections, strict=True):
        assert replace(one, fingerprint="", source={}) == replace(other, fingerprint="", source={})
    for section in range(4):
        assert_array_equal(joined.measured(section), merged.measured(section))
        assert_array_equal(joined.overview(section)[0], merged.overview(section)[0])
    assert [joined.set_of_section(i) for i in range(4)] == [0, 0, 1, 1]
    assert_array_equal(joined.select("train"), merged.select("train"))


def test_records_of_both_sets_are_read_in_the_order_asked(joined: ShardSet, merged: ShardSet) -> None:
    spots = np.random.default_rng(0).permutation(len(merged))[:40]
    again = pickle.loads(pickle.dumps(joined))
    for one in (joined, again):
        assert (one.counts(spots) != merged.counts(spots)).nnz == 0
        assert one.counts(spots).has_sorted_indices == merged.counts(spots).has_sorted_indices
        assert_array_equal(one.tiles(spots), merged.tiles(spots))
    assert_array_equal(joined.shards_of(spots), merged.shards_of(spots))
    assert joined.counts([]).shape == (0, 30)
    shard = joined.manifest.shards[-1]
    assert_array_equal(joined.member_ranges(shard)[1], merged.member_ranges(merged.manifest.shards[-1])[1])
    assert joined.where(60).startswith(joined.sets[1].name)


def test_statistics_are_those_of_the_merged_set(joined: ShardSet, merged: ShardSet) -> None:
    for one, other in zip(gene_statistics(joined), gene_statistics(merged), strict=True):
        for key, value in vars(one).items():
            assert_array_equal(value, getattr(other, key), err_msg=key)


def test_one_path_is_a_set_and_no_set_is_given_twice(parts: tuple[Path, Path]) -> None:
    assert not isinstance(open_sets(parts[0]), JoinedSet)
    assert not isinstance(open_sets([str(parts[0])]), JoinedSet)
    with pytest.raises(ShardError, match="is given twice; give each set once"):
        open_sets([parts[0], parts[0]])
    with pytest.raises(ShardError, match="are the same shard set; give only one of them"):
        open_sets([parts[0], parts[0].parent / "." / "set" / ".." / "set"])
    with pytest.raises(ShardError, match="no shard set is given"):
        open_sets([])
    with pytest.raises(ShardError, match=r"no such folder; give several sets as a list, e\.g\. \[hest, own\]"):
        open_sets(f"{parts[0]},{parts[1]}")
    assert open_sets(parts).paths == [*parts]
    assert open_sets(parts[0]).paths == [parts[0]]


@pytest.mark.parametrize(
    ("sections", "tiles", "error", "message"),
    [
        ((A[0],), {}, ShardError, "section t1 is in .* and in .*; build one of the sets without it"),
        ((replace(A[0], section_id="T1"),), {}, ShardError, "T1 .* differ only in case"),
        ((replace(B[0], donor="donor_x"),), {"tile_px": 16}, ShardError, "differ in tile: .*px=32.* and .*px=16"),
        (
            (TinySection("t3", "donor_x", "train"),),
            {},
            SourceError,
            "donor donor_x is in the test section x1 and in t3",
        ),
    ],
)
def test_sets_that_do_not_fit_are_refused(
    sections: tuple[TinySection, ...],
    tiles: dict[str, float],
    error: type[Exception],
    message: str,
    parts: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        open_sets([*parts, build(tmp_path, sections, 2, **tiles)])
