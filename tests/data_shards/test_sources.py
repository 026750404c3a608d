"""Readers: the values they return, and the error of each bad input. Fixtures are written in the real layouts."""

import gzip
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from comtip_shards import SourceError
from comtip_shards.sources import detect, open_source
from PIL import Image

from testkit.tiny import SYMBOLS, TinySection, write_tiny_source


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_tiny_source(tmp_path / "s", [TinySection("t1", "a", "train"), TinySection("t2", "b", "test")], side=4)
    return tmp_path / "s"


def counts_of(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "t1.tsv.gz", sep="\t", index_col=0)


def edit(folder: Path, name: str, **changes: object) -> None:
    table = pd.read_csv(folder / name, sep="\t", dtype=str, keep_default_na=False)
    for column, value in changes.items():
        table[column] = value
    table.to_csv(folder / name, sep="\t", index=False)


def read(folder: Path, **options):
    return open_source(folder, samples=["t1"], **options)[0].read()


def test_manifest_table_reads_what_was_written(source: Path):
    section = read(source)
    table = counts_of(source)
    assert section.spot_ids == table.index.tolist()
    assert section.gene_ids == list(SYMBOLS)
    np.testing.assert_array_equal(section.counts.toarray(), table.to_numpy())
    assert section.counts.dtype == np.int32
    assert section.meta.mpp == 5.0
    assert section.meta.split == "train"
    assert section.load_image().shape == (200, 200, 3)


def test_a_scale_that_is_not_stated_may_be_in_the_picture(source: Path):
    edit(source, "manifest.tsv", mpp_um_per_px="")
    Image.open(source / "t1.png").save(source / "t1.png", dpi=(25_400 / 5, 25_400 / 5))
    section = read(source)
    assert section.meta.mpp == pytest.approx(5.0, rel=1e-3)
    assert any("resolution tag of t1.png" in n for n in section.notes)


def test_counts_may_be_written_1_0(source: Path):
    table = counts_of(source)
    table.astype(float).to_csv(source / "t1.tsv.gz", sep="\t")
    np.testing.assert_array_equal(read(source).counts.toarray(), table.to_numpy())


def test_r_style_header_has_one_name_fewer(source: Path):
    table = counts_of(source)
    text = "\t".join(table.columns) + "\n" + table.to_csv(sep="\t", header=False)
    (source / "t1.tsv.gz").write_bytes(gzip.compress(text.encode()))
    assert read(source).gene_ids == list(SYMBOLS)


def test_spots_not_in_tissue_or_not_in_the_counts_are_counted(source: Path):
    spots = pd.read_csv(source / "t1_spots.tsv", sep="\t")
    spots.loc[0:2, "in_tissue"] = 0
    spots.to_csv(source / "t1_spots.tsv", sep="\t", index=False)
    counts_of(source).drop(index=spots["spot_id"][5]).to_csv(source / "t1.tsv.gz", sep="\t")
    section = read(source)
    assert len(section.spot_ids) == 16 - 4
    assert section.dropped == {"not in tissue": 3, "in tissue but not in the counts": 1}


def test_join_follows_ids_and_not_rows(source: Path):
    before = read(source)
    counts_of(source).iloc[::-1].to_csv(source / "t1.tsv.gz", sep="\t")
    after = read(source)
    assert after.spot_ids == before.spot_ids
    np.testing.assert_array_equal(after.counts.toarray(), before.counts.toarray())


def break_image_small(folder: Path):
    Image.new("RGB", (100, 100)).save(folder / "t1.png")


def break_image_bytes(folder: Path):
    (folder / "t1.png").write_bytes((folder / "t1.png").read_bytes()[:60])


def break_gzip(folder: Path):
    (folder / "t1.tsv.gz").write_bytes((folder / "t1.tsv.gz").read_bytes()[:200])


def write_counts(folder: Path, table: pd.DataFrame):
    table.to_csv(folder / "t1.tsv.gz", sep="\t")


def set_count(value):
    def change(folder: Path):
        table = counts_of(folder).astype(object)
        table.iloc[2, 3] = value
        write_counts(folder, table)

    return change


def rename_spots(folder: Path):
    table = counts_of(folder)
    table.index = [f"spot{i}" for i in range(len(table))]
    write_counts(folder, table)


def repeat_gene(folder: Path):
    write_counts(folder, counts_of(folder).set_axis([*SYMBOLS[:-1], SYMBOLS[0]], axis=1))


def repeat_spot(folder: Path):
    table = counts_of(folder)
    table.index = [table.index[0], *table.index[:-1]]
    write_counts(folder, table)


BAD = {
    "no scale": (lambda f: edit(f, "manifest.tsv", mpp_um_per_px=""), "no scale.*mpp"),
    "scale is text": (lambda f: edit(f, "manifest.tsv", mpp_um_per_px="big"), "not a number"),
    "scale is absurd": (
        lambda f: edit(f, "manifest.tsv", mpp_um_per_px="5000"),
        "5000 um per px of the image is outside the range",
    ),
    "unknown species": (lambda f: edit(f, "manifest.tsv", species="zebrafish"), "species.*human or mouse"),
    "unknown split": (lambda f: edit(f, "manifest.tsv", split="dev"), "split 'dev'"),
    "column gone": (lambda f: edit_drop(f, "manifest.tsv", "donor"), "missing columns donor"),
    "image gone": (lambda f: (f / "t1.png").unlink(), r"t1\.png.*no such file"),
    "image too small": (break_image_small, r"t1\.png: the image is 100 x 100 px, but \d+ of 16 spots lie outside"),
    "image truncated": (break_image_bytes, r"t1\.png"),
    "counts gone": (lambda f: (f / "t1.tsv.gz").unlink(), r"t1\.tsv\.gz.*no such file"),
    "counts truncated": (break_gzip, r"t1\.tsv\.gz: cannot be read.*again"),
    "negative count": (set_count(-1), "not counts, the first is -1 .negative; spot 3x1, gene CD74"),
    "fraction": (set_count(0.5), "not an integer.*raw counts"),
    "missing count": (set_count(""), "missing or infinite"),
    "text": (set_count("many"), "CD74 holds text"),
    "no join": (rename_spots, "share no spot id.*spot0"),
    "gene twice": (repeat_gene, "genes in the header.*more than once.*ERBB2"),
    "spot twice": (repeat_spot, "spot ids.*more than once"),
    "positions gone": (lambda f: edit_drop(f, "t1_spots.tsv", "pixel_x"), "missing column pixel_x"),
    "position is text": (lambda f: edit(f, "t1_spots.tsv", pixel_x="here"), "'here', not a number"),
    "position missing": (lambda f: edit(f, "t1_spots.tsv", pixel_x=""), "spots without a position: 1"),
}


def edit_drop(folder: Path, name: str, column: str):
    pd.read_csv(folder / name, sep="\t", dtype=str).drop(columns=column).to_csv(folder / name, sep="\t", index=False)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_file_and_the_fix(source: Path, name: str):
    change, message = BAD[name]
    change(source)
    with pytest.raises(SourceError, match=message):
        read(source).load_image()


def test_unknown_section_names_the_nearest(source: Path):
    with pytest.raises(SourceError, match="did you mean t1"):
        open_source(source, samples=["t1x"])


def test_unknown_folder_says_what_was_looked_for(tmp_path: Path):
    with pytest.raises(SourceError, match=r"no known format.*manifest\.tsv"):
        open_source(tmp_path)
    with pytest.raises(SourceError, match="no such file"):
        open_source(tmp_path / "gone")


# -- legacy ST --------------------------------------------------------------------------------------------------


@pytest.fixture
def legacy(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path / "legacy"
    folder.mkdir()
    ids = [f"{x}x{y}" for x in (2, 10, 20) for y in (3, 15, 30)]
    pd.DataFrame(rng.poisson(3, (9, 5)), index=ids, columns=SYMBOLS[:5]).to_csv(folder / "A1.tsv.gz", sep="\t")
    Image.new("RGB", (640, 680), (200, 150, 200)).save(folder / "A1_HE.png")
    Image.new("RGB", (640, 680)).save(folder / "A1_overlay.png")
    return folder


FACTS = {"species": "human", "tissue": "breast"}


def test_legacy_st_names_count_tables_that_have_no_image(legacy: Path, caplog: pytest.LogCaptureFixture):
    shutil.copy(legacy / "A1.tsv.gz", legacy / "B7.tsv.gz")
    pd.DataFrame({"note": ["x"]}, index=["first"]).to_csv(legacy / "remarks.tsv", sep="\t")
    (legacy / "cut.tsv.gz").write_bytes((legacy / "A1.tsv.gz").read_bytes()[:30])
    assert [s.meta.section_id for s in open_source(legacy, overrides=FACTS)] == ["A1"]
    assert (
        "left out, because they have no image: B7; put the H&E image of each next to its counts, as B7_HE.jpg"
        in caplog.text
    )
    caplog.clear()
    open_source(legacy, samples=["A1"], overrides=FACTS)
    assert "B7" not in caplog.text
    (legacy / "A1_HE.png").unlink()
    with pytest.raises(
        SourceError, match=r"count tables without images: A1, B7; put .* as A1_HE.jpg. .*gene vectors only"
    ):
        detect(legacy)


def test_legacy_st_without_positions_uses_the_array(legacy: Path):
    assert detect(legacy)[0].name == "legacy_st"
    section = open_source(legacy, overrides=FACTS)[0].read()
    np.testing.assert_allclose(section.xy[0], [(2 - 1) / 32 * 640, (3 - 1) / 34 * 680])
    assert section.meta.mpp == pytest.approx(200 / (640 / 32))
    assert any("array frame" in n for n in section.notes)


def test_legacy_st_reads_selection_and_works_out_the_scale(legacy: Path):
    x, y = np.array([2, 10, 20] * 3), np.repeat([3, 15, 30], 3)
    table = pd.DataFrame(
        {"x": x, "y": y, "new_x": x + 0.01, "new_y": y, "pixel_x": x * 25.0, "pixel_y": y * 20.0, "selected": 1}
    )
    table.loc[0, "selected"] = 0
    table.to_csv(legacy / "A1_selection.tsv", sep="\t", index=False)
    section = open_source(legacy, overrides=FACTS)[0].read()
    assert section.dropped == {"not in tissue": 1}
    assert section.meta.mpp == pytest.approx(200 / np.sqrt(25 * 20), rel=1e-3)


@pytest.mark.parametrize("facts", [FACTS, FACTS | {"mpp": 8.0}], ids=["derived scale", "stated scale"])
@pytest.mark.parametrize("column", ["x", "pixel_x"])
def test_legacy_st_without_a_pitch_is_refused(legacy: Path, column: str, facts: dict[str, object]):
    x, y = np.array([2, 10, 20] * 3), np.repeat([3, 15, 30], 3)
    table = pd.DataFrame({"x": x, "y": y, "pixel_x": x * 25.0, "pixel_y": y * 20.0})
    table[column] = table[column].astype(float).where(table.index != 4, 1e300) if column == "x" else 7.0
    table.to_csv(legacy / "A1_selection.tsv", sep="\t", index=False)
    with pytest.raises(
        SourceError, match=r"are \S+ px apart, expected at least one; correct positions and array coordinates"
    ):
        open_source(legacy, overrides=facts)


def test_legacy_st_without_array_coordinates_needs_a_scale(legacy: Path):
    ids = pd.read_csv(legacy / "A1.tsv.gz", sep="\t", index_col=0).index
    table = pd.DataFrame({"spot_id": ids, "pixel_x": np.arange(9) * 60.0, "pixel_y": np.arange(9) * 50.0})
    table.to_csv(legacy / "A1_spots.tsv", sep="\t", index=False)
    with pytest.raises(SourceError, match=r"spots without array coordinates.*set `mpp`"):
        open_source(legacy, overrides=FACTS)
    section = open_source(legacy, overrides=FACTS | {"mpp": 8.0})[0].read()
    assert section.meta.mpp == 8.0
    assert any("not compared with the array" in n for n in section.notes)


@pytest.mark.parametrize(
    ("spots", "platform", "two_k"),
    [
        ([(2, 6), (40, 6), (2, 60), (41, 59)], "", True),
        ([(x, y) for x in range(2, 22) for y in range(2, 22) if (x + y) % 2 == 0], "", True),
        ([(x, y) for x in range(2, 10) for y in range(2, 10)], "", False),
        ([(2, 6), (4, 6), (6, 6), (4, 8)], "", False),
        ([(2, 6), (4, 6), (6, 6), (4, 8)], "ST 2k array", True),
    ],
    ids=["beyond 33 x 35", "chessboard", "1k", "few spots", "stated"],
)
def test_legacy_st_of_a_2k_array_has_150_um_between_neighbours(
    legacy: Path, spots: list[tuple[int, int]], platform: str, two_k: bool
):
    x, y = np.array(spots).T
    ids = [f"{a}x{b}" for a, b in spots]
    counts = pd.DataFrame(np.ones((len(ids), 2), int), index=ids, columns=SYMBOLS[:2])
    counts.to_csv(legacy / "A1.tsv.gz", sep="\t")
    pd.DataFrame({"x": x, "y": y, "pixel_x": x * 9.0, "pixel_y": y * 9.0}).to_csv(
        legacy / "A1_alignment.tsv", sep="\t", index=False
    )
    meta = open_source(legacy, overrides=FACTS | {"platform": platform})[0].meta
    pitch, diameter, neighbours_px = (150, 110, 9 * np.sqrt(2)) if two_k else (200, 100, 9)
    assert meta.mpp == pytest.approx(pitch / neighbours_px)
    assert (meta.spot_pitch_um, meta.spot_diameter_um) == (pitch, diameter)
    assert ("2k" in meta.platform) == two_k


@pytest.mark.parametrize("name", ["A1_HE.png", "A1_crop_h&e.png", "A1-he.png"])
def test_legacy_st_prefers_the_image_called_he_and_names_the_others(legacy: Path, name: str):
    (legacy / "A1_HE.png").rename(legacy / name.replace("A1-", "A1_x-"))
    Image.new("RGB", (640, 680)).save(legacy / "A1_Annotated.png")
    source = open_source(legacy, overrides=FACTS)[0]
    assert source.inputs[0].name.lower().replace("&", "").endswith("he.png")
    assert any(re.search(r"was taken as the image, not A1_Annotated\.png; `image`", n) for n in source.read().notes)
    source = open_source(legacy, overrides=FACTS | {"image": str(legacy / "A1_Annotated.png")})[0]
    assert source.inputs[0].name == "A1_Annotated.png"
    assert not any("was taken as the image" in n for n in source.read().notes)


def test_legacy_st_asks_for_what_it_cannot_know(legacy: Path):
    with pytest.raises(SourceError, match="set `tissue`"):
        open_source(legacy, overrides={"species": "human"})
    with pytest.raises(SourceError, match="unknown fact"):
        open_source(legacy, overrides={"colour": "blue"})


def test_legacy_st_beyond_the_array_is_refused(legacy: Path):
    table = pd.read_csv(legacy / "A1.tsv.gz", sep="\t", index_col=0)
    table.index = ["60x3", *table.index[1:]]
    table.to_csv(legacy / "A1.tsv.gz", sep="\t")
    with pytest.raises(SourceError, match="exceed 33 x 35"):
        open_source(legacy, overrides=FACTS)[0].read()
