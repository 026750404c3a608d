"""Sources behind a URL: only required files are requested, each once, and the set equals that from a folder."""

import functools
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from comtip_shards import ShardError, SourceError
from comtip_shards.builder.build import build_shards
from comtip_shards.sections.facts import SectionFacts, SourceOptions
from comtip_shards.sources import open_source
from comtip_shards.sources.selection import fetch as fetch_module
from comtip_shards.sources.selection.fetch import fetch_source
from comtip_shards.storage.remote import Remote

from comtip_fast.cli import main
from testkit.hest import write_hest
from testkit.stimage import DEFAULT as SLIDES
from testkit.stimage import write_stimage
from testkit.tiny import TinySection, write_tiny_source

PATCHES = SourceOptions(facts=SectionFacts(pixels="patches"))
TILES = {"tile_px": 16, "tile_um": 112.0, "min_mpp": 2.0}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def hest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hest(tmp_path_factory.mktemp("hub") / "MahmoodLab" / "hest")


@pytest.fixture
def memory(hest: Path) -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    fs.put(str(hest), "/hub/hest", recursive=True)
    # What nobody asks for must not be fetched.
    fs.pipe("/hub/hest/cellvit_seg/TENX1.zip", b"x" * 1000)
    yield "memory://hub/hest"
    fs.rm("/hub", recursive=True)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names whose bytes were downloaded."""
    names: list[str] = []
    real = Remote._chunks
    monkeypatch.setattr(Remote, "_chunks", lambda self, name, *rest: names.append(name) or real(self, name, *rest))
    return names


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_only_the_files_of_chosen_sections_are_fetched(memory: str, tmp_path: Path, fetched: list[str]):
    found = fetch_source(memory, where={"tissue": ["breast"]}, options=PATCHES, cache=tmp_path)
    assert sorted(fetched) == ["HEST_v1_1_0.csv", "metadata/TENX1.json", "patches/TENX1.h5", "st/TENX1.h5ad"]
    assert (found.fmt, found.why) == ("hest", "found st/MISC3.h5ad")
    assert found.samples == ["TENX1"]
    assert found.n_files == 4
    assert found.n_bytes == sum(p.stat().st_size for p in found.path.rglob("*") if p.is_file())
    # Again, and for one section more: what is there is not fetched again.
    fetched.clear()
    fetch_source(memory, samples=["TENX1", "TENX2"], options=PATCHES, cache=tmp_path)
    assert sorted(fetched) == ["metadata/TENX2.json", "patches/TENX2.h5", "st/TENX2.h5ad"]


def test_a_set_from_a_url_is_that_from_the_folder(memory: str, hest: Path, tmp_path: Path):
    facts = {"pixels": "wsi"}
    away = open_source(memory, where={"species": ["human"]}, overrides=facts, cache=tmp_path / "cache")
    assert [s.meta.section_id for s in away] == ["TENX1", "TENX2"]
    build_shards(away, tmp_path / "a", **TILES)
    # The folder has patches too; without them all spots are taken, as from the URL.
    local = shutil.copytree(hest, tmp_path / "hest")
    shutil.rmtree(local / "patches")
    build_shards(open_source(local, where={"species": ["human"]}, overrides=facts), tmp_path / "b", **TILES)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_an_interrupted_fetch_resumes(memory: str, tmp_path: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch):
    real = Remote.fetch

    def failing(self: Remote, name: str, **more: object) -> Path:
        if name.startswith("st/") and len(fetched) < 4:
            raise ShardError(f"{name}: not fetched", kind="remote")
        return real(self, name, **more)

    monkeypatch.setattr(Remote, "fetch", failing)
    monkeypatch.setattr(fetch_module, "FETCHERS", 1)
    with pytest.raises(ShardError, match="st/TENX1"):
        fetch_source(memory, samples=["TENX1"], options=PATCHES, cache=tmp_path)
    monkeypatch.setattr(Remote, "fetch", real)
    before = list(fetched)
    found = fetch_source(memory, samples=["TENX1"], options=PATCHES, cache=tmp_path)
    assert sorted(fetched) == sorted({*before, "st/TENX1.h5ad"})
    assert open_source(found.path, overrides=PATCHES)[0].read().spot_ids


def test_a_changed_file_is_fetched_again(memory: str, tmp_path: Path):
    first = fetch_source(memory, samples=["TENX1"], options=PATCHES, cache=tmp_path)
    fsspec.filesystem("memory").pipe(
        "/hub/hest/metadata/TENX1.json", b'{"organ": "Skin", "pixel_size_um_estimated": 0.7}'
    )
    again = fetch_source(memory, samples=["TENX1"], options=PATCHES, cache=tmp_path)
    assert again.path == first.path
    assert "Skin" in (again.path / "metadata/TENX1.json").read_text()


def test_stimage_is_fetched_by_species_and_technology(tmp_path: Path, fetched: list[str]):
    write_stimage(tmp_path / "st")
    url = f"file://{tmp_path}/st"
    sources = open_source(url, where={"technology": ["Visium"], "species": ["human"]}, cache=tmp_path / "cache")
    name = SLIDES[1].slide
    assert sorted(fetched) == [
        f"Visium/coord/{name}_coord.csv",
        f"Visium/gene_exp/{name}_count.csv",
        f"Visium/image/{name}.png",
        "meta/meta_all_gene02122025.csv",
    ]
    assert len(sources[0].read().spot_ids) == 16


def test_a_table_of_sections_is_fetched_by_https(tmp_path: Path, fetched: list[str]):
    write_tiny_source(tmp_path / "www/set", [TinySection("t1", "a", "train"), TinySection("t2", "b", "test")], side=3)
    handler = functools.partial(Quiet, directory=str(tmp_path / "www"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/set/manifest.tsv"
        away = open_source(url, samples=["t2"], cache=tmp_path / "cache")
    finally:
        server.shutdown()
        server.server_close()
    assert sorted(fetched) == ["manifest.tsv", "t2.png", "t2.tsv.gz", "t2_spots.tsv"]
    build_shards(away, tmp_path / "a", **TILES)
    build_shards(open_source(tmp_path / "www/set", samples=["t2"]), tmp_path / "b", **TILES)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


RUNS = {
    "visium_hd": (
        {
            "binned_outputs/square_016um/spatial/tissue_positions.parquet",
            "segmented_outputs/cell_segmentations.geojson",
            "binned_outputs/square_016um/filtered_feature_bc_matrix.h5",
            "spatial/tissue_hires_image.png",
        },
        {"binned_outputs/square_002um/filtered_feature_bc_matrix.h5", "possorted_genome_bam.bam", "web_summary.html"},
    ),
    "xenium": (
        {
            "experiment.xenium",
            "transcripts.parquet",
            "cell_feature_matrix.h5",
            "a_he_image.ome.tif",
            "a_he_imagealignment.csv",
        },
        {"morphology.ome.tif", "analysis.zarr.zip", "transcripts.zarr.zip"},
    ),
    "space_ranger": (
        {
            "spatial/tissue_positions.csv",
            "spatial/scalefactors_json.json",
            "a_filtered_feature_bc_matrix.h5",
            "filtered_feature_bc_matrix/matrix.mtx.gz",
            "a_tissue_image.tif",
        },
        {"possorted_genome_bam.bam", "raw_feature_bc_matrix.h5", "analysis/pca.csv"},
    ),
    "spatialdata": ({"zarr.json", "tables/table/zarr.json", "images/he/s0/c/0/0/0", "images/he/zarr.json"}, set()),
}


@pytest.mark.parametrize("fmt", RUNS)
def test_a_run_is_detected_by_its_listing_without_downloading_the_rest(fmt: str, tmp_path: Path, fetched: list[str]):
    needed, rest = RUNS[fmt]
    fs = fsspec.filesystem("memory")
    for name in needed | rest:
        fs.pipe(f"/lab/run7/outs/{name}", name.encode())
    try:
        found = fetch_source("memory://lab/run7/outs", cache=tmp_path)
    finally:
        fs.rm("/lab", recursive=True)
    assert (found.fmt, found.samples) == (fmt, None)
    assert set(fetched) == needed
    # Runs are named by the folder above outs, also where it was fetched to.
    assert found.path.parts[-2:] == ("run7", "outs")
    assert (found.path / min(needed)).read_bytes() == min(needed).encode()
    with pytest.raises(SourceError, match="has no metadata table"):
        fetch_source(f"file://{found.path}", cache=tmp_path, where={"tissue": ["x"]})


def test_the_command_builds_from_a_url(memory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    args = ["--where", "organ=Breast", "--tile-um", "112", "--tile-px", "16", "--cache", str(tmp_path / "cache")]
    assert main(["shards", "build", memory, "--out", str(tmp_path / "set"), *args]) == 0
    message = capsys.readouterr().out
    assert "read as hest (found st/MISC3.h5ad" in message
    assert "TENX1: human Breast" in message


def test_what_cannot_be_done_is_reported(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fsspec.filesystem("memory").pipe("/hub/other/readme.txt", b"x")
    for url, more, message in (
        (
            "memory://hub/other",
            {},
            r"memory://hub/other: unknown format\. Looked for manifest: manifest\.tsv;.*`fmt`",
        ),
        (memory, {"samples": ["TENX9"]}, "no section 'TENX9'; did you mean TENX"),
        (memory, {"where": {"tissue": ["heart"]}}, "no section has tissue heart; choose from: Brain, Breast, Lung"),
    ):
        with pytest.raises(SourceError, match=message):
            fetch_source(url, cache=tmp_path, **more)
    monkeypatch.setattr(fetch_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(SourceError, match=r"GB more are needed, but only .* GB are free in .*; free space there"):
        fetch_source(memory, cache=tmp_path / "full")


@pytest.mark.parametrize("name", ["../../evil.txt", "/etc/evil", "st/../../evil.h5ad", "st\\evil.h5ad", ""])
def test_names_that_leave_the_folder_are_not_followed(name: str):
    assert not fetch_module._is_inside(name)


def test_a_hostile_listing_writes_nothing_outside(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = Remote.sizes

    def hostile(self: Remote, pattern: str = "**") -> dict[str, int | None]:
        names = {"metadata/../../../../evil.json": None, "/evil.json": None} if pattern.startswith("metadata") else {}
        return real(self, pattern) | names

    monkeypatch.setattr(Remote, "sizes", hostile)
    monkeypatch.setattr(fetch_module.fnmatch, "fnmatchcase", lambda name, pattern: True)
    found = fetch_source(memory, samples=["TENX1"], options=PATCHES, cache=tmp_path / "a/b/cache")
    assert found.n_files > 4
    assert not list(tmp_path.rglob("evil*"))


def test_a_section_with_a_pattern_in_its_name_matches_itself_only(tmp_path: Path):
    (tmp_path / "s").mkdir()
    for name in ("a[1].h5ad", "a1.h5ad"):
        (tmp_path / "s" / name).write_bytes(b"x")
    listing = fetch_module._Listing(Remote(f"file://{tmp_path}/s", tmp_path / "cache"))
    assert list(listing.needs(("{id}.h5ad",), "a[1]")) == ["a[1].h5ad"]
