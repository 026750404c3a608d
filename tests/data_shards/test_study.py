"""A study: many sources in one table, planned from headers and built with a policy for bad sections."""

import csv
import dataclasses
import errno
import json
import re
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from comtip_shards import ShardError, ShardSet, SourceError
from comtip_shards.builder import build as build_module
from comtip_shards.builder import staging
from comtip_shards.builder.tile_choice import choose_tile
from comtip_shards.sources import manifest_table, open_source
from comtip_shards.sources.tenx.run import picture_word
from comtip_shards.study import COLUMNS, is_study, read_study
from comtip_shards.study.dry_run import tile_bytes
from comtip_shards.study.headers import section_size
from comtip_shards.study.sections import _located
from PIL import Image
from scipy import sparse

import comtip_fast
from comtip_fast.cli import main
from testkit.tiny import TinySection, write_tiny_source

SIZE = {"tile_px": 32, "tile_um": 224.0, "min_mpp": 5.0}
IDS = [f"ENSG{i:011d}" for i in (141736, 19582, 186847, 75624, 111640, 136997)]
TILE = ["--tile-px", "32", "--tile-um", "224", "--min-mpp", "5"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Three folders with one section each."""
    for seed, name in enumerate("abc"):
        write_tiny_source(tmp_path / "in" / name, [TinySection(f"s{name}", f"d{name}", "train")], seed=seed)
    return tmp_path / "in"


def table(folder: Path, text: str, name: str = "study.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


TABLES = {
    "study.csv": "path,id,split\na,one,train\n\nb,,test\n",
    "semicolon.csv": "Path;ID;Split\na;one;train\nb;;test\n",
    "tabs.csv": "path\tid\tsplit\na\tone\ttrain\nb\t\ttest\n",
    "commas.tsv": "path,id,split\na,one,train\nb,,test\n",
    "study.tsv": "path\tid\tsplit\na\tone\ttrain\nb\t\ttest\n",
    "comments.csv": '# a, comment with "one quote\n\npath,id,split\n  # of P1\na,one,train\n#b,two,test\nb,,test\n#\n',
    "comments.tsv": "#path\tid\npath\tid\tsplit\na\tone\ttrain\n# b; c\nb\t\ttest\n",
    "study.yaml": "- path: a\n  id: one\n  split: train\n- path: b\n  split: test\n",
    "study.yml": "sections:\n- {path: a, id: one, split: train}\n- {path: b, split: test}\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_every_form_of_the_table_gives_the_same_set(sources: Path, tmp_path: Path, name: str):
    study = table(sources, TABLES[name], name)
    assert is_study(study)
    report = comtip_fast.build_shards(study, tmp_path / "set", **SIZE)
    found = {s.section_id: (s.split, s.donor) for s in ShardSet(tmp_path / "set").manifest.sections}
    assert found == {"one": ("train", "da"), "sb": ("test", "db")}
    assert report.skipped == {}


def test_cells_override_the_source_and_the_command_line(sources: Path, tmp_path: Path):
    study = table(sources, "path,donor,tissue,mpp,split\na,other,,,\nb,,lung,4.5,val\n")
    args = ["shards", "build", str(study), "--out", str(tmp_path / "set"), "--tissue", "skin", "--split", "sa=test"]
    assert main([*args, *TILE]) == 0
    found = {s.section_id: s for s in ShardSet(tmp_path / "set").manifest.sections}
    assert (found["sa"].donor, found["sa"].tissue, found["sa"].mpp, found["sa"].split) == ("other", "skin", 5.0, "test")
    assert (found["sb"].donor, found["sb"].tissue, found["sb"].mpp, found["sb"].split) == ("db", "lung", 4.5, "val")


def test_a_renamed_section_has_the_tiles_and_counts_of_the_source(sources: Path, tmp_path: Path):
    comtip_fast.build_shards(table(sources, "path,id\na,new\n"), tmp_path / "new", **SIZE)
    build_module.build_shards(open_source(sources / "a"), tmp_path / "old", **SIZE)
    new, old = ShardSet(tmp_path / "new"), ShardSet(tmp_path / "old")
    rows = new.source_order(0), old.source_order(0)
    np.testing.assert_array_equal(new.tiles(rows[0]), old.tiles(rows[1]))
    np.testing.assert_array_equal(new.counts(rows[0]).toarray(), old.counts(rows[1]).toarray())
    assert json.loads((tmp_path / "new/report/new.json").read_text())["section_id"] == "new"


def test_lines_of_a_table_are_counted_with_comments_and_a_quoted_hash_is_a_value(tmp_path: Path):
    text = '# one\npath,id,attribution\n# two\na,x,"first\n# second"\n"#b",y,# third\n# four\nc,z,\n'
    rows = read_study(table(tmp_path, text))
    assert [(row.number, row.path, row.id) for row in rows] == [(5, "a", "x"), (6, "#b", "y"), (8, "c", "z")]
    assert [row.options.facts.attribution for row in rows] == ["first\n# second", "# third", None]
    with pytest.raises(SourceError, match=r"study\.csv, line 4: column split 'dev'"):
        read_study(table(tmp_path, "#\npath,split\n#\na,dev\n"))
    with pytest.raises(SourceError, match="no column path"):
        read_study(table(tmp_path, "# only\n# comments\n"))


BAD_TABLES = {
    "misspelt": ("path,specie\na,human\n", r"unknown column 'specie'; did you mean species\? The columns are path"),
    "twice": ("path,path\na,b\n", "duplicate column path; remove one"),
    "no path": ("id\na\n", "no column path; add it"),
    "empty": ("path\n", "the table has no rows"),
    "value": ("path,mpp\na,0\n", r"study.csv, line 2: column mpp 0: .*must be greater than 0"),
    "species": ("path,species\na,frog\n", r"line 2: column species frog: must be 'human' or 'mouse'"),
    "split": ("path,split\na,dev\n", r"line 2: column split 'dev': input should be 'train', 'val' or 'test'"),
    "format": ("path,format\na,zip\n", r"line 2: column format 'zip': input should be 'auto', 'manifest'"),
    "id": ("path,id\na,../x\n", r"line 2: column id: the section id '../x'"),
    "no source": ("path,id\n,x\n", r"line 2: column path '': .*required"),
    "many": ("path,id\na,b,c\n", r"line 2: 3 values for 2 columns; quote values that contain ','"),
    "long": (f"path,donor\na,{'x' * 5000}\n", r"line 2: donor has more than 4,096 characters"),
    "quotes": ('path,id\n"a,b\n', r"correct the quotes"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_bad_table_is_refused_before_any_source_is_opened(tmp_path: Path, case: str):
    text, message = BAD_TABLES[case]
    with pytest.raises(SourceError, match=message):
        comtip_fast.build_shards(table(tmp_path, text), tmp_path / "set")
    assert not (tmp_path / "set").exists()


BAD_YAML = {
    "alias": ("- &a {path: x}\n- *a\n", r"aliases \(\*name\) are not read; write the values"),
    "twice": ("- path: a\n  path: b\n", "duplicate key 'path'; remove one"),
    "text": ("hello", r"not a list of sources; write one entry per source: - path: FOLDER"),
    "nested": ("- path: [a, b]\n", r"entry 1: path is not a single value"),
    "object": ("- !!python/object/apply:os.system [touch x]\n", "not YAML"),
    "broken": ("- path: 'a\n", "not YAML"),
}


@pytest.mark.parametrize("case", BAD_YAML)
def test_bad_yaml_is_refused(tmp_path: Path, case: str):
    text, message = BAD_YAML[case]
    with pytest.raises(SourceError, match=message):
        read_study(table(tmp_path, text, "study.yaml"))


def test_bytes_that_are_no_table_are_refused(tmp_path: Path):
    for raw, message in (
        (b"\xff\x00\xfa" * 9, "not UTF-8"),
        (b"", r"empty \(0 bytes\)"),
        (b"x" * (17 << 20), "larger than"),
    ):
        (tmp_path / "study.csv").write_bytes(raw)
        with pytest.raises(SourceError, match=message):
            read_study(tmp_path / "study.csv")
    with pytest.raises(SourceError, match=r"mem: cannot be read \(Input/output error\)"):
        read_study(Path("/proc/self/mem"))


def test_a_table_of_excel_is_read(tmp_path: Path):
    (tmp_path / "u.csv").write_bytes("path;pool-um\nx;64\n".encode("utf-8-sig"))
    (tmp_path / "v.tsv").write_bytes("path\tpool_um\nx\t64\n".encode("utf-16"))
    for name in ("u.csv", "v.tsv"):
        assert [(r.path, r.options.pooling.pool_um) for r in read_study(tmp_path / name)] == [("x", 64.0)]


@pytest.mark.parametrize("text", ["path,id,,\r\na,one,,\r\nb,,,\r\n", "path,id\ra,one\rb,\r", "path,id\na,one,,\nb\n"])
def test_cleared_columns_and_old_line_ends_of_spreadsheets(tmp_path: Path, text: str):
    path = tmp_path / "s.csv"
    path.write_bytes(text.encode())
    assert [(row.path, row.id) for row in read_study(path)] == [("a", "one"), ("b", None)]


def test_a_source_of_a_known_format_is_no_study(sources: Path):
    assert not is_study(sources / "a/manifest.tsv")
    assert not is_study("https://example.org/study.csv")
    assert {"path", "id", "sample", "split", "format", "donor", "mpp", "image", "pool_um"} <= set(COLUMNS)


ROWS = {
    "missing": ("nothing,x", "no such file or folder"),
    "same id": ("b,sa", r"the section id sa is already that of .*line 2; state another in column id"),
    "sample": ("b,,zz", "no section 'zz'"),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_bad_row_ends_the_build_or_is_left_out(sources: Path, tmp_path: Path, case: str, capsys):
    line, message = ROWS[case]
    study = table(sources, f"path,id,sample\na,,\n{line}\nc,,\n")
    args = ["shards", "build", str(study), "--out", str(tmp_path / "set"), *TILE]
    assert main(args) == 2
    assert "line 3" in capsys.readouterr().err
    assert not (tmp_path / "set/manifest.json").exists()
    assert main([*args, "--on-error", "skip"]) == 1
    out = capsys.readouterr().out
    assert "sections that could not be built and were left out (1 of 3)" in out
    assert re.search(message, out)
    assert [s.section_id for s in ShardSet(tmp_path / "set").manifest.sections] == ["sa", "sc"]


def test_a_section_that_fails_while_it_is_read_is_left_out_and_built_later(sources: Path, tmp_path: Path):
    study = table(sources, "path\na\nb\nc\n")
    whole = tmp_path / "whole"
    comtip_fast.build_shards(study, whole, **SIZE)
    good = (sources / "b/sb.tsv.gz").read_bytes()
    (sources / "b/sb.tsv.gz").write_bytes(good[:200])
    out = tmp_path / "set"
    with pytest.raises(SourceError, match=r"sb\.tsv\.gz"):
        comtip_fast.build_shards(study, out, **SIZE)
    report = comtip_fast.build_shards(study, out, on_error="skip", **SIZE)
    assert list(report.skipped) == ["sb"]
    assert "sb.tsv.gz" in report.skipped["sb"]
    assert "sections that could not be built and were left out (1 of 3)" in report.text
    assert main(["shards", "verify", str(out)]) == 0
    again = comtip_fast.build_shards(study, out, on_error="skip", **SIZE)
    assert again.skipped == report.skipped
    (sources / "b/sb.tsv.gz").write_bytes(good)
    done = comtip_fast.build_shards(study, out, on_error="skip", **SIZE)
    assert done.skipped == {}
    assert files_of(out) == files_of(whole)
    assert not (out / ".building").exists()


def test_finished_sections_are_not_read_again(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    study = table(sources, "path\na\nb\nc\n")
    good = (sources / "b/sb.tsv.gz").read_bytes()
    (sources / "b/sb.tsv.gz").write_bytes(good[:200])
    comtip_fast.build_shards(study, tmp_path / "set", on_error="skip", **SIZE)
    (sources / "b/sb.tsv.gz").write_bytes(good)
    written = []
    real = staging._write_section
    monkeypatch.setattr(staging, "_write_section", lambda s, *rest: (written.append(s.meta.section_id), real(s, *rest)))
    comtip_fast.build_shards(study, tmp_path / "set", on_error="skip", **SIZE)
    assert written == ["sb"]


def test_a_bug_in_one_section_does_not_end_the_others(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = staging._write_section

    def fail(section, *rest):
        if section.meta.section_id == "sb":
            raise TypeError("unsupported operand")
        real(section, *rest)

    monkeypatch.setattr(staging, "_write_section", fail)
    study = table(sources, "path\na\nb\nc\n")
    report = comtip_fast.build_shards(study, tmp_path / "set", on_error="skip", **SIZE)
    assert "unexpected TypeError (unsupported operand)" in report.skipped["sb"]


def test_strict_and_skip_leave_out_what_fails_a_check(sources: Path, tmp_path: Path):
    counts = sources / "b/sb.tsv.gz"
    frame = pd.read_csv(counts, sep="\t", index_col=0)
    frame.iloc[:40] = 0
    frame.to_csv(counts, sep="\t")
    study = table(sources, "path\na\nb\nc\n")
    report = comtip_fast.build_shards(study, tmp_path / "set", on_error="skip", strict=True, **SIZE)
    assert "empty_spots" in report.skipped["sb"]
    assert "sc" in report.sections
    assert sorted([*report.sections, *report.skipped]) == ["sa", "sb", "sc"]


def test_errors_of_the_set_and_of_the_disk_are_raised(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    leak = table(sources, "path,donor,split\na,one,train\nb,one,test\n")
    with pytest.raises(SourceError, match="donor"):
        comtip_fast.build_shards(leak, tmp_path / "leak", on_error="skip", **SIZE)
    study = table(sources, "path\na\nb\n")
    with pytest.raises(SourceError, match="cannot be combined with `part`"):
        comtip_fast.build_shards(study, tmp_path / "p", on_error="skip", part=(1, 2), **SIZE)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(staging, "_write_section", full)
    with pytest.raises(ShardError, match="free disk space"):
        comtip_fast.build_shards(study, tmp_path / "full", on_error="skip", **SIZE)


def test_nothing_is_written_if_every_section_fails(sources: Path, tmp_path: Path):
    with pytest.raises(
        SourceError, match=r"no section can be built\nsections that could not be built and were left out \(2 of 2\)"
    ):
        comtip_fast.build_shards(table(sources, "path\nx\ny\n"), tmp_path / "set", on_error="skip", **SIZE)
    assert not (tmp_path / "set").exists()


def test_a_benchmark_section_cannot_be_renamed(tmp_path: Path):
    write_tiny_source(tmp_path / "in", [TinySection("hest_TENX95", "d", "")])
    study = table(tmp_path, "path,id,split\nin,mine,train\n")
    with pytest.raises(SourceError, match=r"benchmark task .* must keep its id"):
        comtip_fast.build_shards(study, tmp_path / "set", **SIZE)


def test_a_dry_run_reads_headers_and_names_what_is_missing(sources: Path, tmp_path: Path, capsys, monkeypatch):
    for column in ("species", "mpp_um_per_px"):
        path = sources / "b/manifest.tsv"
        frame = pd.read_csv(path, sep="\t", dtype=str)
        frame[column] = ""
        frame.to_csv(path, sep="\t", index=False)
    study = table(sources, "path,split\na,train\nb,test\nnowhere,\nhttps://example.org/x.h5ad,\n")

    def never(*_):
        raise AssertionError("a section was read")

    monkeypatch.setattr(manifest_table, "read_counts_table", never)
    monkeypatch.setattr(Image.Image, "load", never)
    before = files_of(sources)
    assert main(["shards", "build", str(study), "--out", str(tmp_path / "set"), *TILE, "--dry-run", "--jobs", "2"]) == 1
    out = capsys.readouterr().out
    assert re.search(
        r"sa: manifest, human breast.*, split train; 49 spots, 30 genes; image sa\.png 320x320, 5 um/px", out
    )
    problems = [line for line in out.splitlines() if "cannot be built" in line]
    assert len(problems) == 3
    wanted = ("--species", "--mpp", "no such file or folder")
    assert all(text in problem for text, problem in zip(wanted, problems, strict=True))
    assert re.search(
        r"sb: manifest, \? breast.*, split test; 49 spots, 30 genes; image sb\.png 320x320, scale missing", out
    )
    assert "https://example.org/x.h5ad: not examined: the files of a URL are downloaded when the set is built" in out
    assert re.search(
        r"1 of 4 sections can be built, 1 at a URL are not examined: about \S+ kB in .* are free\), about \d+ s with 2 processes",
        out,
    )
    assert "78 spots/s per process" in out
    assert files_of(sources) == before
    assert not (tmp_path / "set").exists()


def test_a_dry_run_of_one_source_needs_no_table(tiny_source: Path, tmp_path: Path, capsys):
    args = ["shards", "build", str(tiny_source), "--out", str(tmp_path / "set"), "--dry-run"]
    assert main([*args, "--samples", "t1,v1", *TILE]) == 0
    out = capsys.readouterr().out
    assert "2 of 2 sections can be built" in out
    assert "t1: manifest" in out
    assert "t2" not in out
    assert main([*args, *TILE, "--mpp", "5", "--format", "xenium"]) == 1
    out = capsys.readouterr().out
    assert "  cannot be built: " in out  # there is no table, so no line of one
    assert "line 1" not in out


def test_a_dry_run_shows_the_donor_and_says_if_it_is_missing(sources: Path, tmp_path: Path, capsys):
    path = sources / "b/manifest.tsv"
    frame = pd.read_csv(path, sep="\t", dtype=str).assign(donor="")
    frame.to_csv(path, sep="\t", index=False)
    assert dry_run(table(sources, "path,split\na,train\nb,test\n"), tmp_path / "set") == 0
    out = capsys.readouterr().out
    assert re.search(r"^sa: .*, donor da, split train;", out, re.MULTILINE)
    assert re.search(r"^sb: .*, donor \?, split test;", out, re.MULTILINE)
    assert re.search(r"^1 of 2 sections: the donor is not stated, .* set --donor, or", out, re.MULTILINE)
    assert dry_run(table(sources, "path,split\na,train\n"), tmp_path / "set") == 0
    assert "is not stated" not in capsys.readouterr().out


def dry_run(study: Path, out: Path, *options: str) -> int:
    return main(["shards", "build", str(study), "--out", str(out), *TILE, "--dry-run", *options])


def test_a_dry_run_honours_the_options_of_the_build(sources: Path, tmp_path: Path, capsys):
    study = table(sources, "path\na\nb\nc\n")
    assert dry_run(study, tmp_path / "set", "--split", "sb=test", "--where", "donor=db,dc") == 0
    out = capsys.readouterr().out
    assert re.search(r"sb: .* split test;", out)
    assert "sa:" not in out
    assert "2 of 2 sections can be built" in out
    assert dry_run(study, tmp_path / "set", "--part", "2/3") == 0
    assert "1 of 1 sections can be built" in capsys.readouterr().out
    assert dry_run(study, tmp_path / "set", "--part", "4/3") == 2
    assert dry_run(study, tmp_path / "set", "--part", "1/3", "--on-error", "skip") == 2


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ("a,d\nb,d\n", ["--split", "sb=test"], "donor d is in the test section sb and in sa"),
        ("a,d\nb,e\n", ["--split", "sz=test"], "--split: no section sz; the sections are sa, sb"),
        ("a,d\nb,e\n", ["--auto-split", "0.5,0.2,0.2"], "invalid shares"),
    ],
)
def test_a_dry_run_refuses_the_splits_that_a_build_refuses(
    sources: Path, tmp_path: Path, capsys, rows: str, options: list[str], message: str
):
    study = table(sources, f"path,donor\n{rows}")
    assert dry_run(study, tmp_path / "set", *options) == 1
    assert f"the set cannot be built: {message}" in re.sub(r"--auto-split \S+ ", "", capsys.readouterr().out)
    assert main(["shards", "build", str(study), "--out", str(tmp_path / "set"), *TILE, *options]) == 2


def test_estimated_sizes_are_within_a_factor_of_two(tmp_path: Path):
    """Measured on sections of ``samples/``: um per px of the image, tile, bytes per px of an encoded tile."""
    measured = (
        (2.0, 112, 224, 0.5, "jpeg", 95, 0.368),
        (2.0, 112, 64, 1.75, "jpeg", 95, 0.884),
        (2.0, 112, 32, 3.5, "jpeg", 95, 1.331),
        (3.2, 224, 224, 1.0, "jpeg", 95, 0.457),
        (3.2, 224, 128, 4.0, "jpeg", 95, 0.603),
        (3.2, 224, 224, 1.0, "png", 95, 1.6),
        (3.2, 224, 224, 1.0, "jpeg", 85, 0.29),
        (4.73, 112, 224, 0.5, "jpeg", 95, 0.218),
        (4.73, 224, 128, 4.0, "jpeg", 95, 0.444),
    )
    for mpp, um, px, min_mpp, codec, quality, per_px in measured:
        tile = choose_tile([], px=px, um=um, min_mpp=min_mpp, codec=codec, quality=quality)
        assert 0.5 < tile_bytes(mpp, tile) / (per_px * px * px) < 2, (mpp, um, px, codec, quality)


def test_headers_give_the_size_of_a_section(tmp_path: Path, tiny_source: Path):
    size = section_size(open_source(tiny_source, samples=["t1"])[0])
    assert (size.spots, size.genes, size.image, size.image_px) == (49, 30, "t1.png", (320, 320))
    source = open_source(tiny_source, samples=["t1"])[0]
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["matrix/shape"] = [36601, 40]
    (tmp_path / "matrix.mtx").write_text("%%MatrixMarket matrix\n%\n36601 40 9\n")
    (tmp_path / "damaged.h5").write_bytes(b"no")
    pd.DataFrame({"barcode": range(40)}).to_parquet(tmp_path / "t.parquet")
    np.savetxt(tmp_path / "alignment.csv", np.eye(3), delimiter=",")  # of Xenium, no table of 3 spots
    (tmp_path / "keypoints.csv").write_text("fixedX,fixedY,alignmentX,alignmentY\n1,2,3,4\n")
    for name, want in (
        ("alignment.csv", (None, None)),
        ("keypoints.csv", (None, None)),
        ("m.h5", (40, 36601)),
        ("matrix.mtx", (40, 36601)),
        ("damaged.h5", (None, None)),
        ("t.parquet", (40, None)),
    ):
        found = section_size(dataclasses.replace(source, inputs=(tmp_path / name,)))
        assert (found.spots, found.genes) == want
    (tmp_path / "cells.parquet").write_bytes(b"no")
    pooled = dataclasses.replace(source.meta, pooling="cells of Xenium")
    found = section_size(
        dataclasses.replace(source, meta=pooled, inputs=(tmp_path / "m.h5", tmp_path / "cells.parquet"))
    )
    assert found.spots == 40, "without the area, the number of cells is the bound"


def test_reading_a_table_leaves_the_cell_limit_of_the_process(tmp_path: Path):
    before = csv.field_size_limit(1000)
    try:
        (tmp_path / "study.csv").write_text("path,donor\nx," + "a" * 900 + "\n")
        assert len(read_study(tmp_path / "study.csv")) == 1
        assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(before)


def test_names_of_options_are_read_in_any_case(sources: Path, tmp_path: Path):
    study = table(sources, "path\tsplit\tformat\timage\tpool_from\ttrust_mpp\na\tTrain\tManifest\tHires\tBins\tYES\n")
    (row,) = read_study(study)
    assert (row.split, row.format, row.options.pooling.pool_from) == ("train", "manifest", "bins")
    assert row.options.facts.trust_mpp is True
    (sources / "Hires").mkdir()  # next to the table; the word names the image of the run all the same
    (sources / "hires").mkdir()
    assert _located(row.options, sources).facts.image == "Hires"
    assert picture_word(" HiRes") == "hires"
    assert picture_word("hires.tif") is None
    assert picture_word(None) is None


@pytest.mark.parametrize("kind", ["single", "raw", "layer", "several", "normalised", "unclear"])
def test_a_dry_run_of_an_anndata_agrees_with_the_build(kind: str, tmp_path: Path, capsys):
    rng = np.random.default_rng(0)
    n = 40
    data = ad.AnnData(sparse.csr_matrix(rng.poisson(3, (n, 6)).astype(np.float32)), var=pd.DataFrame(index=IDS))
    data.obs["in_tissue"] = [0] * 4 + [1] * (n - 4)
    data.obsm["spatial"] = np.column_stack([50 + 50.0 * (np.arange(n) % 8), 50 + 50.0 * (np.arange(n) // 8)])
    library = {"images": {"hires": np.full((320, 480, 3), 200, np.uint8)}, "scalefactors": {"tissue_hires_scalef": 1.0}}
    data.uns["spatial"] = {"one": library, "is_single": True}
    genes = 6
    if kind == "raw":
        data.raw, genes = data.copy(), 6
        data = data[:, :4].copy()
        data.X = np.log1p(data.X.toarray())
    elif kind == "layer":
        data.layers["umi_counts"], data.X = data.X.copy(), np.log1p(data.X.toarray())
    elif kind == "several":
        data.obs["library_id"] = ["one"] * 15 + ["two"] * 25
        data.uns["spatial"]["two"] = library
    elif kind == "normalised":
        data.X = np.log1p(data.X.toarray())
    elif kind == "unclear":
        data.X = sparse.csr_matrix((n, 6), dtype=np.float32)
    data.write_h5ad(tmp_path / "file.h5ad")
    facts = ["--mpp", "2", "--species", "human", "--tissue", "breast"]
    study = table(tmp_path, "path,sample,id\nfile.h5ad,two,renamed\n" if kind == "several" else "path\nfile.h5ad\n")
    code = dry_run(study, tmp_path / "set", *facts)
    out = capsys.readouterr().out
    spots = {"several": 25, "normalised": n}.get(
        kind, 36
    )  # no size from a file that is refused but that of its headers
    shown = "?" if kind == "normalised" else genes
    line = rf"{'renamed' if kind == 'several' else 'file'}: anndata.* {spots} spots, (\S+) genes; image hires in file\.h5ad 480x320"
    found = re.search(line, out)
    assert found, out
    assert code == (kind == "normalised")
    source = open_source(tmp_path / "file.h5ad", overrides={"mpp": "2", "species": "human", "tissue": "breast"})[-1]
    if kind in ("normalised", "unclear"):
        with pytest.raises(SourceError):
            source.read()
        assert ("X has values that are not counts, such as" in out) == (kind == "normalised")
        return
    section = source.read()
    assert (len(section.spot_ids), str(len(section.gene_ids))) == (spots, found[1])
    assert str(shown) == found[1]
