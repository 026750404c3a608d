"""Gene statistics: exact, independent of how a set was built, and computed once for sets without them."""

from __future__ import annotations

import io
import logging
import shutil
import tracemalloc
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from comtip_shards import ShardError, ShardSet
from comtip_shards.format.statistics import (
    FILE,
    SectionStatistics,
    StatisticsSum,
    check_statistics,
    encode_statistics,
    iter_statistics,
    largest_size,
    write_statistics,
)
from comtip_shards.reader import statistics
from comtip_shards.reader.shard_files import SetFiles
from comtip_shards.reader.statistics import gene_statistics, section_statistics


@pytest.fixture
def copy(tiny_shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny set without statistics, as earlier versions built them, and an empty cache folder."""
    monkeypatch.setenv("COMTIP_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny_shards.path, tmp_path / "set")
    (tmp_path / "set" / FILE).unlink()
    return tmp_path / "set"


def arrays(sections: Iterable[statistics.SectionStatistics]) -> list[list[object]]:
    return [[s.n_spots, s.detected.tolist(), s.total.tolist(), s.square.tolist()] for s in sections]


def test_a_build_writes_the_statistics_of_its_counts(tiny_shards: ShardSet):
    built = list(gene_statistics(tiny_shards))
    assert arrays(built) == arrays([section_statistics(tiny_shards, i) for i in range(len(built))])
    for number, one in enumerate(built):
        counts = tiny_shards.counts(tiny_shards.select(sections=[number])).toarray()
        counts = counts[:, tiny_shards.measured(number)].astype(float)
        values = np.log1p(counts / np.maximum(counts.sum(1, keepdims=True), 1) * 1e4)
        assert one.n_spots == counts.shape[0]
        assert (one.detected == (counts > 0).sum(0)).all()
        np.testing.assert_allclose(one.total, values.sum(0), rtol=1e-6)
        np.testing.assert_allclose(one.square, (values**2).sum(0), rtol=1e-6)


def test_the_sums_do_not_depend_on_how_many_records_are_added_at_a_time():
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.7, (200, 30))
    parts = [np.split(np.arange(200), cuts) for cuts in ([], [1, 7, 150])]
    results = []
    for rows in parts:
        total = StatisticsSum(30)
        for part in rows:
            own = counts[part]
            indptr = np.concatenate([[0], np.cumsum((own > 0).sum(1))])
            total.add(indptr, np.nonzero(own)[1], own[own > 0])
        results.append(arrays([total.result(np.arange(30))]))
    assert results[0] == results[1]


def test_an_older_set_gets_its_statistics_once(copy: Path, tiny_shards: ShardSet, monkeypatch: pytest.MonkeyPatch):
    assert arrays(gene_statistics(ShardSet(copy))) == arrays(gene_statistics(tiny_shards))
    assert (copy / FILE).read_bytes() == (tiny_shards.path / FILE).read_bytes()
    monkeypatch.setattr(statistics, "section_statistics", lambda *_: pytest.fail("computed again"))
    gene_statistics(ShardSet(copy))


def test_the_statistics_of_a_read_only_set_are_kept_in_the_cache(
    copy: Path, tiny_shards: ShardSet, monkeypatch: pytest.MonkeyPatch
):
    write = statistics.write_atomic

    def read_only(path: Path, data: bytes) -> None:
        if path.is_relative_to(copy):
            raise PermissionError(13, "Permission denied", str(path))
        write(path, data)

    monkeypatch.setattr(statistics, "write_atomic", read_only)
    first = gene_statistics(ShardSet(copy))
    assert not (copy / FILE).exists()
    monkeypatch.setattr(statistics, "section_statistics", lambda *_: pytest.fail("computed again"))
    assert arrays(gene_statistics(ShardSet(copy))) == arrays(first) == arrays(gene_statistics(tiny_shards))


def test_a_damaged_or_foreign_file_is_replaced(copy: Path, tiny_shards: ShardSet, caplog: pytest.LogCaptureFixture):
    good = (tiny_shards.path / FILE).read_bytes()
    other = encode_statistics("0" * 64, list(gene_statistics(tiny_shards)))
    for data in (b"", good[:-100], other):
        (copy / FILE).write_bytes(data)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            gene_statistics(ShardSet(copy))
        assert FILE in caplog.text
        assert (copy / FILE).read_bytes() == good
    with pytest.raises(ShardError, match="another shard set"):
        check_statistics(io.BytesIO(other), tiny_shards.manifest, "x")


def test_a_link_is_not_followed_and_the_statistics_are_kept_in_the_cache(
    copy: Path, tiny_shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Regression test: the file that a link in the set names was overwritten, and every start computed again."""
    document = tmp_path / "document.txt"
    document.write_text("of the user")
    (copy / FILE).symlink_to(document)
    first = gene_statistics(ShardSet(copy))
    assert document.read_text() == "of the user"
    monkeypatch.setattr(statistics, "section_statistics", lambda *_: pytest.fail("computed again"))
    assert arrays(gene_statistics(ShardSet(copy))) == arrays(first) == arrays(gene_statistics(tiny_shards))


def test_changed_bytes_are_an_error_or_change_nothing(tiny_shards: ShardSet):
    """Regression test: a changed flag in the header of a zip member raised a RuntimeError."""
    good = (tiny_shards.path / FILE).read_bytes()
    kept = arrays(gene_statistics(tiny_shards))
    entry = good.index(b"PK\x01\x02")
    for at in range(entry, entry + 30):
        data = bytearray(good)
        data[at] ^= 1
        try:
            check_statistics(io.BytesIO(data), tiny_shards.manifest, "x")
            assert arrays(iter_statistics(io.BytesIO(data), tiny_shards.manifest)) == kept
        except ShardError:
            continue


def test_statistics_of_other_spots_are_refused(tiny_shards: ShardSet):
    sections = list(gene_statistics(tiny_shards))
    digest = tiny_shards.manifest.digest
    for change in ({"n_spots": 1}, {"total": sections[0].total * np.float32("nan")}):
        data = encode_statistics(digest, [replace(sections[0], **change), *sections[1:]])
        with pytest.raises(ShardError, match="not the statistics of all spots"):
            check_statistics(io.BytesIO(data), tiny_shards.manifest, "x")


def test_memory_does_not_grow_with_the_sections(tmp_path: Path):
    """Regression test: the file was read as a whole, and above 1 GiB (some 4,500 sections) it was never used."""
    genes, sections = 2_000, 300
    section: Any = SimpleNamespace(n_spots=9, n_assay_genes=genes)
    manifest: Any = SimpleNamespace(sections=[section] * sections, digest="d" * 64)
    rng = np.random.default_rng(0)
    values = [
        SectionStatistics(9, rng.integers(10, size=genes, dtype=np.uint32), *rng.random((2, genes), np.float32))
        for _ in range(sections)
    ]
    path = tmp_path / FILE
    tracemalloc.start()
    with path.open("wb") as file:
        write_statistics(file, manifest.digest, [9] * sections, genes * sections, lambda: iter(values))
    with path.open("rb") as file:
        check_statistics(file, manifest, "x")
        for one, want in zip(iter_statistics(file, manifest), values, strict=True):
            np.testing.assert_array_equal(
                [one.detected, one.total, one.square], [want.detected, want.total, want.square]
            )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 5
    assert path.stat().st_size <= largest_size(manifest)


def test_the_file_has_the_bytes_of_numpys_savez(tiny_shards: ShardSet):
    sections = list(gene_statistics(tiny_shards))
    out = io.BytesIO()
    np.savez(
        out,
        version=np.array([1]),
        digest=np.frombuffer(tiny_shards.manifest.digest.encode(), np.uint8),
        n_spots=np.array([s.n_spots for s in sections], np.int64),
        detected=np.concatenate([s.detected for s in sections]),
        total=np.concatenate([s.total for s in sections]),
        square=np.concatenate([s.square for s in sections]),
    )
    assert out.getvalue() == (tiny_shards.path / FILE).read_bytes()


def test_a_failing_server_is_an_error_and_not_a_damaged_record(copy: Path, monkeypatch: pytest.MonkeyPatch):
    """Regression test: genes were selected from the records that had been received."""
    plain = ShardSet.counts

    def counts(self: ShardSet, spots: np.ndarray):
        if 3 in spots:
            raise ShardError("the server does not respond", kind="remote")
        return plain(self, spots)

    monkeypatch.setattr(ShardSet, "counts", counts)
    with pytest.raises(ShardError, match="does not respond"):
        gene_statistics(ShardSet(copy))


def test_damaged_counts_are_left_out_and_nothing_is_kept(copy: Path, caplog: pytest.LogCaptureFixture):
    shards = ShardSet(copy)
    entry = shards.manifest.shards[0]
    offsets, _ = shards.member_ranges(entry)
    with (copy / entry.file).open("r+b") as file:
        file.seek(int(offsets[3, 1]) + 6)
        file.write(b"\xff")
    with caplog.at_level(logging.WARNING):
        computed = list(gene_statistics(ShardSet(copy)))
    assert "damaged records left out of the gene statistics: 1" in caplog.text
    assert computed[0].n_spots == shards.manifest.sections[0].n_spots - 1
    assert not (copy / FILE).exists()


def test_counts_are_read_without_tiles(tiny_shards: ShardSet, monkeypatch: pytest.MonkeyPatch):
    """Records at most 64 KiB apart were read in one request, with every tile between their counts."""
    read: list[int] = []
    plain = SetFiles.read_spans

    def counted(self, name, digest, n_bytes, spans):
        read.extend(end - start for start, end in spans)
        return plain(self, name, digest, n_bytes, spans)

    monkeypatch.setattr(SetFiles, "read_spans", counted)
    spots = tiny_shards.select(sections=[0])
    _, sizes = tiny_shards.member_ranges(tiny_shards.manifest.shards[0])
    tiny_shards.counts(spots)
    assert sum(read) < sizes[:, 1].sum() + 0.5 * sizes[:, 0].sum()
    read.clear()
    tiny_shards.members_of(spots, ("tile", "expr"))
    assert len(read) == 1, "tiles and counts of consecutive records are still one request"
