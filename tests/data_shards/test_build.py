"""A shard set is a function of its inputs, and complete or absent."""

import dataclasses
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import webdataset
from comtip_shards import ShardError, ShardSet, SourceError
from comtip_shards.builder import build as build_module
from comtip_shards.builder.build import build_shards
from comtip_shards.builder.writer import layout
from comtip_shards.slides.tiles import cut_tiles, stain_stats
from comtip_shards.sources import open_source
from PIL import Image

from testkit.tiny import TinySection, write_tiny_source

SIZE = {"tile_px": 32, "tile_um": 224.0, "min_mpp": 5.0}


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_counts_and_positions_come_back_exactly(tiny_source: Path, tiny_shards: ShardSet):
    number = tiny_shards.section_number("x1")
    spots = tiny_shards.source_order(number)
    assert sorted(spots) == tiny_shards.select(sections=[number]).tolist()
    table = pd.read_csv(tiny_source / "x1.tsv.gz", sep="\t", index_col=0)
    symbols = [g.symbol for g in tiny_shards.genes]
    got = pd.DataFrame(tiny_shards.counts(spots).toarray(), columns=symbols)[table.columns.tolist()]
    np.testing.assert_array_equal(got.to_numpy(), table.to_numpy())
    meta = tiny_shards.spots.loc[spots]
    assert meta["spot_id"].tolist() == table.index.tolist()
    assert meta["x_px"].tolist()[:3] == [40.0, 80.0, 120.0]
    assert tiny_shards.measured(number).sum() == table.shape[1]


def test_png_tiles_are_exact_and_stain_is_theirs(tiny_source: Path, tmp_path: Path):
    build_shards(open_source(tiny_source, samples=["t1"]), tmp_path / "s", codec="png", **SIZE)
    shards = ShardSet(tmp_path / "s")
    image = np.asarray(Image.open(tiny_source / "t1.png"))
    order = shards.source_order(0)
    want = cut_tiles(image, shards.spots.loc[order, ["x_px", "y_px"]].to_numpy(), 224 / 5, 32)
    np.testing.assert_array_equal(shards.tiles(order), want)
    assert shards.stain(0) == stain_stats(want)


def test_two_builds_are_the_same_bytes(tiny_source: Path, tmp_path: Path):
    for name in ("a", "b"):
        build_shards(open_source(tiny_source), tmp_path / name, **SIZE)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


@pytest.mark.parametrize("killed_at", [1, 2, 3])
def test_a_killed_build_continues_and_ends_the_same(
    tiny_source: Path, tmp_path: Path, killed_at: int, monkeypatch: pytest.MonkeyPatch
):
    whole = tmp_path / "whole"
    build_shards(open_source(tiny_source), whole, **SIZE)
    out, calls = tmp_path / "out", []
    real = build_module.stage_section

    def stage(*args):
        calls.append(args[1].section_id)
        if len(calls) > killed_at:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(build_module, "stage_section", stage)
    with pytest.raises(KeyboardInterrupt):
        build_shards(open_source(tiny_source), out, **SIZE)
    with pytest.raises(ShardError, match=r"no manifest\.json"):
        ShardSet(out)
    monkeypatch.setattr(build_module, "stage_section", real)
    sources = open_source(tiny_source)
    # Staged sections are not read again: reading them would fail.
    done = set(calls[:killed_at])

    def refuse():
        raise AssertionError("read again")

    again = [dataclasses.replace(s, load=refuse) if s.meta.section_id in done else s for s in sources]
    build_shards(again, out, **SIZE)
    assert files_of(out) == files_of(whole)


def test_building_again_is_no_work_and_another_set_is_refused(tiny_source: Path, tmp_path: Path):
    build_shards(open_source(tiny_source), tmp_path / "s", **SIZE)
    before = files_of(tmp_path / "s")
    assert "already built" in build_shards(open_source(tiny_source), tmp_path / "s", **SIZE).text
    assert files_of(tmp_path / "s") == before
    with pytest.raises(ShardError, match="another shard set"):
        build_shards(open_source(tiny_source, samples=["t1"]), tmp_path / "s", **SIZE)
    assert files_of(tmp_path / "s") == before


def test_a_folder_with_other_files_is_left_alone(tiny_source: Path, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ShardError, match=r"not empty \(thesis.txt\)"):
        build_shards(open_source(tiny_source), tmp_path, **SIZE)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_webdataset_reads_the_shards(tiny_shards: ShardSet):
    shard = tiny_shards.manifest.shards[0]
    url = str(tiny_shards.path / shard.file)
    records = list(webdataset.WebDataset(url, shardshuffle=False))
    assert len(records) == shard.records
    assert json.loads(records[0]["json"])["section_id"] == shard.section_id
    assert Image.open(io.BytesIO(records[0]["jpg"])).size == (32, 32)


def test_a_donor_in_train_and_test_is_refused(tmp_path: Path):
    sections = [TinySection("a", "same", "train"), TinySection("b", "same", "test")]
    write_tiny_source(tmp_path / "s", sections, side=3)
    with pytest.raises(SourceError, match="donor same is in the test section b and in a"):
        build_shards(open_source(tmp_path / "s"), tmp_path / "out", **SIZE)
    report = build_shards(open_source(tmp_path / "s"), tmp_path / "out", splits={"b": "val"}, **SIZE)
    assert "also a training donor" in report.text


def test_sections_without_a_donor_are_their_own(tmp_path: Path):
    write_tiny_source(tmp_path / "s", [TinySection("a", "unknown", "train"), TinySection("b", "", "test")], side=3)
    build_shards(open_source(tmp_path / "s"), tmp_path / "out", **SIZE)
    assert [s.donor for s in ShardSet(tmp_path / "out").manifest.sections] == ["unstated:a", "unstated:b"]


def test_splits_name_sections_that_exist(tiny_source: Path, tmp_path: Path):
    with pytest.raises(SourceError, match="`splits`: no section zz"):
        build_shards(open_source(tiny_source), tmp_path / "out", splits={"zz": "val"}, **SIZE)


def test_genes_that_do_not_map_are_left_out_and_reported(tmp_path: Path):
    write_tiny_source(tmp_path / "s", [TinySection("a", "d", "train")], side=3)
    table = pd.read_csv(tmp_path / "s/a.tsv.gz", sep="\t", index_col=0)
    table = table.rename(columns={"KRT14": "AL513523.2", "KRT17": "ERBB2L", "CD74": "HER2"})
    table.to_csv(tmp_path / "s/a.tsv.gz", sep="\t")
    report = build_shards(open_source(tmp_path / "s"), tmp_path / "out", **SIZE)
    shards = ShardSet(tmp_path / "out")
    assert "not mapped" in report.text
    assert "AL513523.2" in report.text
    # HER2 is an alias of ERBB2, which is also present: summed and reported.
    row = [g.key for g in shards.genes].index("human:ERBB2")
    np.testing.assert_array_equal(
        shards.counts(shards.source_order(0))[:, row].toarray().ravel(), (table["ERBB2"] + table["HER2"]).to_numpy()
    )
    assert "human:ERBB2 <- ERBB2 + HER2" in report.text


def test_shards_hold_at_most_what_was_asked_for(tiny_source: Path, tmp_path: Path):
    build_shards(open_source(tiny_source, samples=["t1"]), tmp_path / "s", max_records=20, **SIZE)
    shards = ShardSet(tmp_path / "s")
    assert [s.records for s in shards.manifest.shards] == [20, 20, 9]
    with tarfile.open(tmp_path / "s" / shards.manifest.shards[1].file) as tar:
        assert tar.getnames()[0] == "000000020.jpg"
    shutil.rmtree(tmp_path / "s")


def test_the_index_is_what_dalis_own_tool_writes(tiny_shards: ShardSet, tmp_path: Path):
    wds2idx = pytest.importorskip("wds2idx", reason="comes with nvidia-dali")
    for shard in tiny_shards.manifest.shards:
        path = tiny_shards.path / shard.file
        wds2idx.IndexCreator(str(path), str(tmp_path / "x.idx"), verbose=False).create_index()
        assert (tiny_shards.path / shard.index).read_text() == (tmp_path / "x.idx").read_text()


def test_dali_reads_shards_by_their_index(tiny_shards: ShardSet):
    pytest.importorskip("nvidia.dali", reason="extra dali-cu12 or dali-cu13")
    from nvidia.dali import fn, pipeline_def

    shards = tiny_shards.manifest.shards[:2]

    @pipeline_def(batch_size=sum(s.records for s in shards), num_threads=1, device_id=None)
    def pipeline() -> object:
        paths = [str(tiny_shards.path / s.file) for s in shards]
        index = [str(tiny_shards.path / s.index) for s in shards]
        return tuple(fn.readers.webdataset(paths=paths, index_paths=index, ext=["jpg", "expr", "json"]))

    pipe = pipeline()
    pipe.build()
    for column, part in zip(pipe.run(), ["tile", "expr", "json"], strict=True):
        want = tiny_shards.members(range(len(column)), part)
        assert [np.asarray(column.at(i)).tobytes() for i in range(len(column))] == want


def test_a_run_of_records_is_a_random_draw_from_the_section(tiny_shards: ShardSet):
    for number, section in enumerate(tiny_shards.manifest.sections):
        rows = tiny_shards.spots.loc[tiny_shards.select(sections=[number]), "source_row"].to_numpy()
        np.testing.assert_array_equal(rows, layout(section.section_id, section.n_spots))
        assert sorted(rows) == list(range(section.n_spots))
    many = layout("s", 4000)
    # In raster order a quarter of the records covers a quarter of the section; a random sample covers all of it.
    halves = (many[:1000] < 2000).mean()
    assert 0.45 < halves < 0.55
    assert abs(np.corrcoef(np.arange(4000), many)[0, 1]) < 0.05
