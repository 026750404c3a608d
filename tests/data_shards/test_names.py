"""Names from files are checked before they become paths: nothing elsewhere is written, truncated or read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import pandas as pd
import pytest
from comtip_shards import ShardError, ShardSet, SourceError
from comtip_shards.builder.build import build_shards
from comtip_shards.builder.merge import merge_sets
from comtip_shards.names import inside, problem_with
from comtip_shards.qc import check_sources
from comtip_shards.reader.verify import verify
from comtip_shards.sources import open_source
from comtip_shards.sources.selection.fetch import fetch_source
from comtip_shards.storage.cache import FileCache
from comtip_shards.storage.remote import Remote

from comtip_fast.cli import main
from testkit.shards import change_manifest
from testkit.tiny import TinySection, write_tiny_source

TILES = {"tile_px": 32, "tile_um": 224.0, "min_mpp": 5.0}
BAD = {
    "../../package": "leaves the folder",
    "..": "leaves the folder",
    "/etc/passwd": "leaves the folder",
    "a/b": "contains '/'",
    "..\\..\\x": "leaves the folder",
    "C:\\x": "leaves the folder",
    "C:x": "contains ':'",
    "\\\\host\\share": "leaves the folder",
    "": "is empty",
    ".hidden": "begins with '.'",
    "a\0b": "cannot be printed",
    "a\nb": "cannot be printed",
    "\x1b[2Jx": "cannot be printed",
    "a\u202eb": "cannot be printed",
    "a b": "contains ' '; only ASCII letters",
    "-rf": "begins with '-'; the first character must be a letter or a digit",
    "~root": "contains '~'; only ASCII letters",
    "\u00e9" * 40: "only ASCII letters",
    "x" * 101: "101 characters",
    "x" * 300: "300 characters",
    "NUL": "'NUL' is a device name of Windows",
    "com1.txt": "'com1' is a device name of Windows",
    "a.": "ends with a dot",
}


@pytest.fixture
def copy(tiny_shards: ShardSet, tmp_path: Path) -> Path:
    folder = tmp_path / "deep/in/set"
    shutil.copytree(tiny_shards.path, folder)
    return folder


def tree(folder: Path) -> dict[str, bytes | str]:
    """Return everything below a folder, links not followed."""
    return {
        str(p.relative_to(folder)): str(p.readlink()) if p.is_symlink() else p.read_bytes() if p.is_file() else "folder"
        for p in sorted(folder.rglob("*"))
    }


def rename_section(name: str) -> Callable[[dict], None]:
    def change(data: dict) -> None:
        old = data["sections"][0]["section_id"]
        data["sections"][0]["section_id"] = name
        for shard in data["shards"]:
            shard["section_id"] = name if shard["section_id"] == old else shard["section_id"]

    return change


@pytest.mark.parametrize("name", BAD)
def test_a_section_id_that_is_a_path_is_refused_before_anything_is_written(
    copy: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
):
    change_manifest(copy, rename_section(name), seal=True)
    for victim in ("package-0000.tar", "package.html", "package.json"):
        (tmp_path / "deep" / victim).write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(
        ShardError, match=rf"manifest\.json: sections\.0\.section_id.*{BAD[name]}.*; do not use"
    ) as told:
        merge_sets([copy], tmp_path / "deep/in/out")
    assert str(told.value).isprintable()
    assert tree(tmp_path) == before
    assert main(["shards", "verify", str(copy)]) != 0
    assert "sections.0.section_id" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", [*BAD, "genes.tsv", "shards/t2-0000.tar", "shards/T1-0000.tar", "shards/../manifest.json"]
)
@pytest.mark.parametrize("field", ["genes_file", "spots_file", "overview", "file", "index"])
def test_a_file_is_named_as_a_build_names_it(copy: Path, name: str, field: str):
    if (field, name) == ("genes_file", "genes.tsv"):
        return

    def change(data: dict) -> None:
        if field.endswith("_file"):
            data[field] = name
        elif field == "overview":
            data["sections"][0]["overview"]["file"] = name
        else:
            data["shards"][0][field] = name

    change_manifest(copy, change, seal=True)
    with pytest.raises(ShardError, match=rf"manifest\.json: [a-z0-9_.]*{field}.*; do not use"):
        ShardSet(copy)


@pytest.mark.parametrize("digest", ["../../../../victim", "", "a" * 63, "A" * 64, "/etc/passwd", "0" * 63 + "\n"])
@pytest.mark.parametrize("field", ["genes_sha256", "sha256", "index_sha256"])
def test_a_hash_names_a_file_in_the_cache_so_it_must_be_a_hash(copy: Path, tmp_path: Path, digest: str, field: str):
    def change(data: dict) -> None:
        (data if field == "genes_sha256" else data["shards"][0])[field] = digest

    change_manifest(copy, change, seal=True)
    fs = fsspec.filesystem("memory")
    fs.put(str(copy), "/names/set", recursive=True)
    cache = tmp_path / "a/b/c/cache"
    for depth in (tmp_path, tmp_path / "a", tmp_path / "a/b"):
        depth.mkdir(exist_ok=True)
        (depth / "victim").write_text("mine")
    try:
        with pytest.raises(ShardError, match="not 64 hex digits; do not use"):
            verify("memory://names/set", remote=Remote("memory://names/set", cache))
    finally:
        fs.rm("/names", recursive=True)
    assert [p.read_text() for p in tmp_path.rglob("victim")] == ["mine"] * 3


def test_the_cache_itself_takes_no_path_for_a_key(tmp_path: Path):
    cache = FileCache(tmp_path / "cache", 1000)
    (tmp_path / "victim").mkdir()
    for key in ("../../victim", "..", "", str(tmp_path / "victim")):
        with pytest.raises(ShardError, match="is not a SHA-256"):
            cache.path(key, "x")
        with pytest.raises(ShardError, match="is not a SHA-256"):
            cache.forget(key)
        with pytest.raises(ShardError, match="is not a SHA-256"), cache.locked(key, "here", 0.0):
            pass
    assert (tmp_path / "victim").is_dir()
    for name in ("..", ".", "", "a\0b", "x" * 300, "a/.."):
        assert cache.path("0" * 64, name).name == "file"


def test_names_that_differ_in_case_only_are_refused(copy: Path, tmp_path: Path):
    source = write_tiny_source(
        tmp_path / "src", [TinySection("a1", "d", "train"), TinySection("A1", "e", "train")]
    ).parent
    with pytest.raises(SourceError, match="must not differ only in case: a1 and A1; rename one"):
        build_shards(open_source(source), tmp_path / "out", **TILES)
    parts = []
    for name in ("a1", "A1"):
        one = write_tiny_source(tmp_path / f"src_{name}", [TinySection(name, "d", "train")], seed=len(parts)).parent
        build_shards(open_source(one), tmp_path / name / "set", **TILES)
        parts.append(tmp_path / name / "set")
    with pytest.raises(ShardError, match=r"section a1 of .* and A1 of .* differ only in case"):
        merge_sets(parts, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    change_manifest(copy, lambda m: m["sections"][1].update(section_id="T1"), seal=True)
    with pytest.raises(ShardError, match="'t1' and 'T1' are the same file name"):
        ShardSet(copy)


@pytest.mark.parametrize(
    "link",
    [
        "shards",
        "overview",
        "spots",
        "report",
        ".building",
        ".building/lock",
        "genes.tsv",
        "spots.parquet",
        "report.txt",
        "manifest.json.writing",
        "report/t1.html",
    ],
)
def test_an_unfinished_output_folder_with_a_link_in_it_is_not_written(copy: Path, tmp_path: Path, link: str):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("t1-0000.tar", "t1.jpg", "t1.html", "lock", "file"):
        (elsewhere / name).write_text("mine")
    out = tmp_path / "out"
    is_folder = link in ("shards", "overview", "spots", "report", ".building")
    (out / link).parent.mkdir(parents=True, exist_ok=True)
    (out / link).symlink_to(elsewhere if is_folder else elsewhere / "file")
    before = tree(tmp_path)
    with pytest.raises(ShardError, match=r"is a symbolic link, which no build writes; delete it, or give a new folder"):
        merge_sets([copy], out)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("link", ["report", "report.txt", "report/t1.html", "report/deeper"])
def test_verify_tells_links_among_pages(copy: Path, tmp_path: Path, link: str):
    path = copy / link
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(tmp_path)
    report = verify(copy)
    assert f"{path}: is a symbolic link" in report.text
    assert not report.ok


@pytest.mark.parametrize("name", [n for n in BAD if n and "\n" not in n and "\0" not in n])
def test_a_table_of_sections_names_no_path(tmp_path: Path, name: str):
    table = write_tiny_source(tmp_path / "deep/source", [TinySection("t1", "d", "train")])
    rows = pd.read_csv(table, sep="\t")
    rows["sample_id"] = name
    rows.to_csv(table, sep="\t", index=False)
    before = tree(tmp_path)
    with pytest.raises(SourceError, match=r"manifest\.tsv: sample_id in row 2.*; rename it to"):
        check_sources(open_source(table), tmp_path / "deep/out")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("image", ["/etc/hostname", "../../../../../../../../etc/hostname", "a\\..\\b", "x" * 300])
def test_a_fetched_table_names_no_file_of_this_machine(tmp_path: Path, image: str):
    table = write_tiny_source(tmp_path / "source", [TinySection("t1", "d", "train")])
    rows = pd.read_csv(table, sep="\t")
    rows["image"] = image
    rows.to_csv(table, sep="\t", index=False)
    fs = fsspec.filesystem("memory")
    fs.put(str(table.parent), "/names/source", recursive=True)
    try:
        with pytest.raises(
            SourceError, match=r"the table entry of section t1 names the file .* which leaves the folder"
        ):
            open_source("memory://names/source", cache=tmp_path / "cache")
        with pytest.raises(SourceError, match="leaves the folder"):
            fetch_source("memory://names/source/manifest.tsv", cache=tmp_path / "cache")
    finally:
        fs.rm("/names", recursive=True)


def test_names_of_builds_pass(tmp_path: Path):
    for name in ("t1", "TENX1", "V1_Human-Breast.2", "1", "x" * 100, "console", "nulls", "a.b.c"):
        assert problem_with(name, 100) == ""
    assert inside(tmp_path, "shards/t1-0000.tar") == tmp_path / "shards" / "t1-0000.tar"
    for name in BAD:
        if name not in ("x" * 101, "a/b"):
            with pytest.raises(ShardError, match="the file name"):
                inside(tmp_path, f"shards/{name}")
