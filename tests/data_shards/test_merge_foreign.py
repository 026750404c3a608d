"""Untrusted sets whose hashes all match: merge and verify refuse invalid content, and report pages are rendered again."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from comtip_shards import ShardError, ShardSet
from comtip_shards.builder.build import build_shards
from comtip_shards.builder.merge import merge_sets
from comtip_shards.format import spot_table as spots
from comtip_shards.format.image_header import check_size
from comtip_shards.format.manifest import read_manifest
from comtip_shards.format.record import decode_expr, decode_json, encode_expr, encode_json
from comtip_shards.reader.verify import verify
from comtip_shards.sources import open_source
from PIL import Image

from testkit.shards import change_manifest, reseal, rewrite, seal_files
from testkit.tiny import TinySection, write_tiny_source


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    sections = [TinySection("t1", "a", "train"), TinySection("t2", "b", "train")]
    source = write_tiny_source(folder / "source", sections, side=3).parent
    build_shards(open_source(source), folder / "set", tile_px=32, tile_um=224.0, min_mpp=5.0)
    return folder / "set"


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "set"))


def genes(change: Callable[[list[list[str]]], object]) -> Callable[[Path], None]:
    def forge(folder: Path) -> None:
        path = folder / "genes.tsv"
        rows = [line.split("\t") for line in path.read_text().splitlines()]
        change(rows)
        path.write_text("\n".join("\t".join(r) for r in rows) + "\n")
        seal_files(folder)

    return forge


def manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda folder: change_manifest(folder, change, seal=True)


def spot(**values: object) -> Callable[[Path], None]:
    """Change the .json of the first record."""

    def forge(folder: Path) -> None:
        def change(members: dict[str, bytes]) -> None:
            meta = decode_json(members["000000000.json"], "") | values
            members["000000000.json"] = encode_json({k: v for k, v in meta.items() if v is not ...})

        rewrite(folder / "shards/t1-0000.tar", change)
        reseal(folder, read_manifest(folder))

    return forge


def unmeasured(folder: Path) -> None:
    """Mark a gene with counts as not measured."""

    def change(data: dict) -> None:
        bits = bytearray(base64.b64decode(data["sections"][0]["assay_genes"]))
        bits[0] &= 0x7F
        data["sections"][0]["assay_genes"] = base64.b64encode(bytes(bits)).decode()
        data["sections"][0]["n_assay_genes"] -= 1

    def count(members: dict[str, bytes]) -> None:
        rows, counts = decode_expr(members["000000000.expr"], 30, "")
        have = dict(zip(rows.tolist(), counts.tolist(), strict=True)) | {0: 5}
        members["000000000.expr"] = encode_expr(sorted(have), [have[k] for k in sorted(have)])

    rewrite(folder / "shards/t1-0000.tar", count)
    reseal(folder, read_manifest(folder))
    change_manifest(folder, change, seal=True)


def large_picture(px: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (px, px)).save(out, "JPEG")
    return out.getvalue()


def large_tile(folder: Path) -> None:
    rewrite(folder / "shards/t1-0000.tar", lambda m: m.update({"000000000.jpg": large_picture(2000)}))
    reseal(folder, read_manifest(folder))


def overview(data: bytes) -> Callable[[Path], None]:
    def forge(folder: Path) -> None:
        import hashlib

        (folder / "overview/t1.jpg").write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        change_manifest(folder, lambda m: m["sections"][0]["overview"].update(sha256=digest), seal=True)

    return forge


def first(**values: object) -> Callable[[Path], None]:
    return manifest(lambda m: m["sections"][0].update(values))


def source(**values: object) -> Callable[[Path], None]:
    def change(data: dict) -> None:
        data["sections"][0]["source"].update(values)

    return manifest(change)


def spot_table(column: str, row: int, value: object) -> Callable[[Path], None]:
    """Set a value of spots.parquet."""

    def forge(folder: Path) -> None:
        columns = pq.read_table(folder / spots.FILE).to_pydict()
        columns[column][row] = value(columns[column]) if callable(value) else value
        pq.write_table(pa.table(columns, schema=spots.SCHEMA), folder / spots.FILE)
        seal_files(folder)

    return forge


BROKEN = {
    "a gene twice": (
        genes(lambda r: r.__setitem__(2, r[1])),
        r"genes\.tsv: line 3: the key 'human:[A-Z0-9-]+' is a duplicate",
    ),
    "a gene of no species": (genes(lambda r: r[1].__setitem__(0, "B2M")), r"genes\.tsv: line 2: the key 'B2M' is not"),
    "another species": (genes(lambda r: r[1].__setitem__(1, "mouse")), r"line 2: the key .* is not species:symbol"),
    "no symbol": (
        genes(lambda r: r.__setitem__(1, ["human:", "human", "", "", ""])),
        "line 2: the key 'human:' has no symbol",
    ),
    "escapes in a gene": (
        genes(lambda r: r.__setitem__(1, ["human:\x1b[2J", "human", "\x1b[2J", "", ""])),
        r"line 2: the key 'human:\\x1b",
    ),
    **{
        f"a formula in column {column}": (
            genes(lambda r, row=row: r.__setitem__(1, row)),
            "line 2: the key .* a spreadsheet would run",
        )
        for column, row in {
            "symbol": ["human:=1+1", "human", "=1+1", "", ""],
            "ensembl": ["human:B2M", "human", "B2M", "@SUM(1)", ""],
            "name": ["human:B2M", "human", "B2M", "", "+cmd|' /C calc'!A0"],
        }.items()
    },
    "a long gene": (
        genes(lambda r: r[1].__setitem__(4, "x" * 5000)),
        "line 2: the key .* has a text of more than 1,000 characters",
    ),
    "counts of a gene that was not measured": (unmeasured, "counts for a gene that .* did not measure"),
    "a tile of another size": (large_tile, r"record 000000000: the tile is 2000 x 2000 px"),
    "an overview that is text": (overview(b"<script>"), r"overview/t1\.jpg: the overview cannot be decoded"),
    "a position of nan in the table": (spot_table("x_px", 0, math.nan), "a spot of section t1 has no position"),
    "an infinite position in the table": (spot_table("y_px", 17, math.inf), "a spot of section t2 has no position"),
    "a position of null in the table": (spot_table("x_px", 0, None), r"column x_px has type double and 1 nulls"),
    "an id twice in the table": (spot_table("spot_id", 1, lambda ids: ids[0]), "duplicate spot id in section t1"),
    "a source row twice in the table": (
        spot_table("source_row", 0, 99),
        "source_row of section t1 is not a permutation",
    ),
    "another order in the table": (spot_table("spot_index", 0, 7), "spot_index is not 0 to 17"),
    "a long label in the table": (
        spot_table("label", 0, "x" * 5000),
        "column label .* texts of at most 4096 characters",
    ),
    "a spot of another section": (spot(section_id="t2"), r"000000000\.json: section_id is t2"),
    "a spot elsewhere": (spot(x_px=7.5), r"x_px is 7\.5, but the spot table states"),
    "a spot at infinity": (spot(x_px=10**400), r"'x_px' is '1000.*which no build writes"),
    "text for a number": (spot(x_px="1"), r"'x_px' is '1', which no build writes"),
    "a truth for a number": (spot(source_row=True), r"'source_row' is 'True', which no build writes"),
    "a list for an id": (spot(spot_id=["a"]), r"'spot_id' is .*which no build writes"),
    "a field more": (spot(surprise=1), r"'surprise' is '1', which no build writes"),
    "a long label": (spot(label="x" * 5000), r"'label' is .*which no build writes"),
    "a field less": (spot(x_px=...), "missing x_px"),
    "an overview larger than stated": (
        overview(large_picture(4000)),
        r"overview/t1\.jpg: 4000 x 4000 px, but the manifest",
    ),
    "an overview without end": (
        manifest(lambda m: m["sections"][0]["overview"].update(width=10**6)),
        r"sections\.0\.overview\.width",
    ),
    "an empty source": (manifest(lambda m: m["sections"][0].update(source={})), r"sections\.0\.source"),
    "notes that are not a list": (source(notes="x"), r"sections\.0\.source"),
    "a status that is none": (
        source(checks=[{"name": "x", "status": "<b>", "figure": 1.0, "said": "", "advice": ""}]),
        r"sections\.0\.source",
    ),
    "a print that is none": (
        source(print={"spots": "AA==", "picture": ""}),
        r"sections\.0\.source.*print\.spots .* has 1 bytes",
    ),
    "mpp 0": (first(mpp=0.0), r"sections\.0\.mpp"),
    "mpp 1e-300": (first(mpp=1e-300), r"sections\.0\.mpp"),
    "a diameter without end": (first(spot_diameter_um=1e300), r"sections\.0\.spot_diameter_um"),
    "a diameter of 0": (first(spot_diameter_um=0.0), r"sections\.0\.spot_diameter_um"),
    "a negative distance": (first(spot_pitch_um=-1.0), r"sections\.0\.spot_pitch_um"),
    "another species of the section": (first(species="orc"), r"sections\.0\.species"),
    "another split": (first(split="training"), r"sections\.0\.split"),
    "a long donor": (first(donor="x" * 10**6), r"sections\.0\.donor"),
    "no spread of stain": (
        first(stain={"od_mean": [0.5, 0.5, 0.5], "od_std": [0.0, 0.1, 0.1]}),
        r"sections\.0\.stain.*not an optical density",
    ),
    "more genes than it measured": (first(n_assay_genes=7), r"sections\.0\.n_assay_genes is 7, but assay_genes has"),
    "an overview of 0 um": (
        manifest(lambda m: m["sections"][0]["overview"].update(um_per_px=0.0)),
        r"sections\.0\.overview\.um_per_px",
    ),
    "tiles of 0 um": (manifest(lambda m: m["tile"].update(um=0.0)), r"tile\.um"),
    "tiles without end": (manifest(lambda m: m["tile"].update(um=1e300)), r"tile\.um"),
    "quality 1000": (manifest(lambda m: m["tile"].update(quality=1000)), r"tile\.quality"),
    "no records in a shard": (manifest(lambda m: m.update(records_per_shard=0)), "records_per_shard"),
    "genes without end": (manifest(lambda m: m.update(n_genes=2**62)), "n_genes"),
    "a part of another number": (
        manifest(lambda m: m.update(part={"index": 1, "of": 1, "sections": [0, 0], "whole": ""})),
        r"part\.sections",
    ),
    "part 0": (
        manifest(lambda m: m.update(part={"index": 0, "of": 1, "sections": [0, 1], "whole": ""})),
        r"part\.index",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_set_is_neither_whole_nor_merged(copy: Path, tmp_path: Path, name: str):
    forge, message = BROKEN[name]
    forge(copy)
    with pytest.raises(ShardError, match=message) as caught:
        merge_sets([copy], tmp_path / "out")
    assert str(caught.value).isprintable()
    assert not (tmp_path / "out/manifest.json").exists()
    try:
        report = verify(copy)
    except ShardError:
        return  # it has no readable manifest
    assert not report.ok


def test_parts_hold_each_section_once(built: Path, tmp_path: Path):
    copies = []
    for i in (1, 2):
        copies.append(Path(shutil.copytree(built, tmp_path / f"p{i}")))
        part = {"index": i, "of": 2, "sections": [i - 1, i + 1], "whole": "0" * 64}
        change_manifest(copies[-1], lambda m, part=part: m.update(part=part), seal=True)
    with pytest.raises(ShardError, match="do not hold the sections of one build"):
        merge_sets(copies, tmp_path / "out")


# -- pages --------------------------------------------------------------------------------------------------------

SCRIPT = "<script>alert(1)</script>"


def test_pages_of_a_build_are_merged_to_the_byte(copy: Path, tmp_path: Path):
    report = merge_sets([copy], tmp_path / "out")
    for page in sorted((copy / "report").iterdir()):
        assert (tmp_path / "out/report" / page.name).read_bytes() == page.read_bytes()
    assert "left out" not in report.text


def test_a_page_is_rendered_again_and_not_copied(copy: Path, tmp_path: Path):
    page = copy / "report/t1.html"
    before = page.read_bytes()
    page.write_text(page.read_text().replace("</main>", f"{SCRIPT}</main>"))
    merge_sets([copy], tmp_path / "out")
    assert (tmp_path / "out/report/t1.html").read_bytes() == before


def test_text_of_a_report_is_escaped(copy: Path, tmp_path: Path):
    path = copy / "report/t1.json"
    data = json.loads(path.read_text())
    data["facts"] |= {"tissue": SCRIPT, "notes": [SCRIPT], "dropped_spots": {SCRIPT: 3}}
    data["findings"][0] |= {"name": SCRIPT, "said": SCRIPT, "advice": SCRIPT}
    path.write_text(json.dumps(data))
    merge_sets([copy], tmp_path / "out")
    html = (tmp_path / "out/report/t1.html").read_text()
    assert html.count("&lt;script&gt;alert(1)") == 6
    assert "<script" not in html


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path) -> None:
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target)


def link_to(target: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return change


def folder_link(path: Path) -> None:
    path.parent.rename(path.parent.with_name("pages"))
    path.parent.symlink_to("pages")


def fields(**values: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path = path.with_suffix(".json")
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def endless(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def picture(path: Path) -> None:
    out = io.BytesIO()
    Image.new("RGB", (5000, 10)).save(out, "JPEG")
    path.write_text(f'<img src="data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}">')


@pytest.mark.parametrize(
    "damage",
    [
        pipe,
        link,
        link_to("/etc/passwd"),
        link_to("/dev/zero"),
        link_to("nowhere"),
        folder_link,
        endless,
        picture,
        lambda p: p.unlink(),
        lambda p: p.with_suffix(".json").write_text("{"),
        lambda p: p.with_suffix(".json").write_text("[" * 10**5),
        lambda p: p.write_text(f'{SCRIPT}<img src="data:image/jpeg;base64,AAAA">'),
        lambda p: p.write_bytes(b"\xff\xfe"),
        fields(section_id="t2"),
        fields(section_id="../x"),
        fields(status="<b>"),
        fields(findings=[{}]),
        fields(facts=7),
        fields(surprise=SCRIPT),
        fields(version=2),
    ],
)
def test_a_page_that_is_none_is_left_out_and_reported(copy: Path, tmp_path: Path, damage: Callable[[Path], None]):
    damage(copy / "report/t1.html")
    report = merge_sets([copy], tmp_path / "out")
    assert "t1: its report page was left out: " in report.text
    names = {p.name for p in (tmp_path / "out/report").iterdir()}
    assert not {"t1.html", "t1.json"} & names
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))
    index = (tmp_path / "out/report/index.html").read_text()
    assert "t1.html" not in index
    assert "script" not in index
    assert ("t2.html" in index) is ("t2.html" in names)
    assert verify(tmp_path / "out").ok


def test_a_set_without_pages_merges_in_silence(copy: Path, tmp_path: Path):
    shutil.rmtree(copy / "report")
    assert "left out" not in merge_sets([copy], tmp_path / "out").text
    assert len(ShardSet(tmp_path / "out")) == 18


@pytest.mark.parametrize("codec", ["png", "webp"])
def test_a_decompression_bomb_is_a_damaged_image(built: Path, monkeypatch: pytest.MonkeyPatch, codec: str):
    """Pillow raises an error of its own, which is neither an OSError nor a ValueError."""
    tile = io.BytesIO()
    Image.new("RGB", (100, 100)).save(tile, codec)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ShardError, match=r"record 7: the tile cannot be decoded .*Bomb"):
        check_size(tile.getvalue(), 100, codec, lambda: "record 7")
    with pytest.raises(ShardError, match=r"the overview cannot be decoded .*bomb"):
        ShardSet(built).overview(0)
