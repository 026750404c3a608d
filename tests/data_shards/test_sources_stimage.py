"""STimage-1K4M folders: y before x, names with a prefix, images with a wrong extension, no stated scale."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from comtip_shards import SourceError
from comtip_shards.builder.build import build_shards
from comtip_shards.sources import detect, open_source
from PIL import Image

from testkit.option_reads import declared, fields_read
from testkit.stimage import DEFAULT, GENES, coord, counts, write_meta, write_slide, write_stimage

ST, VISIUM, MOUSE = DEFAULT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_stimage(tmp_path / "stimage")


def read(folder: Path, one=ST, **facts: str):
    return open_source(folder, samples=[one.slide], overrides=facts)[0].read()


def test_it_is_recognised_and_says_why(folder: Path):
    reader, why = detect(folder)
    assert (reader.name, why) == ("stimage", "ST, Visium with coord/*_coord.csv")


@pytest.mark.parametrize("one", DEFAULT, ids=lambda s: s.slide)
def test_a_slide_is_read_and_joined_by_name(folder: Path, one):
    section = read(folder, one)
    want, where = counts(one), coord(one)
    assert section.spot_ids[:2] == ["1x1", "1x2"]
    assert section.gene_ids == list(GENES)
    np.testing.assert_array_equal(section.counts.toarray(), want.to_numpy())
    np.testing.assert_allclose(section.xy, where[["xaxis", "yaxis"]])
    np.testing.assert_allclose(section.array_xy[1], [1, 2])
    meta = section.meta
    assert (meta.species, meta.tissue, meta.platform, meta.donor) == (one.species, one.tissue, one.tech, "")
    assert meta.mpp == pytest.approx(one.mpp)
    assert (meta.spot_pitch_um, meta.spot_diameter_um) == ((200, 100) if one.tech == "ST" else (100, 55))
    assert "pmid 123,456" in meta.attribution
    assert any("assumed a spot pitch of" in n and f"{one.mpp:.4f} um per px" in n for n in section.notes)
    # The picture is opened by what it holds; red says the column.
    with section.open_slide() as slide:
        tile = slide.tiles(section.xy[5:6], meta.mpp, 60.0, 16, 0.5)[0]
        assert tile[..., 0].mean() == pytest.approx(255 * section.xy[5, 0] / slide.size[0], abs=3)
        assert tile[..., 1].mean() == pytest.approx(255 * section.xy[5, 1] / slide.size[1], abs=3)


def test_the_scale_may_be_stated(folder: Path):
    section = read(folder, mpp="3.5")
    assert section.meta.mpp == 3.5
    assert not any("assumed" in n for n in section.notes)


def test_a_radius_that_contradicts_the_spacing_is_refused(folder: Path):
    write_slide(folder, replace(ST, drawn_um=30.0))
    with pytest.raises(
        SourceError,
        match=r"A1_coord\.csv: the spot pitch is 50\.0 px and r is 3\.8 px.*set `mpp` \(to 3 if this is a 2k",
    ):
        read(folder)


def test_bins_of_no_known_width_need_a_scale(folder: Path):
    hd = replace(VISIUM, slide="HD1", tech="VisiumHD")
    write_slide(folder, hd)
    facts = {"species": "human", "tissue": "breast"}
    with pytest.raises(SourceError, match=r"HD1_coord\.csv: no scale; set `mpp`"):
        read(folder, hd, **facts)
    assert read(folder, hd, mpp="1.0", **facts).meta.spot_pitch_um == pytest.approx(100)


def test_slides_are_chosen_by_species_tissue_and_technology(folder: Path):
    for where, ids in (
        ({"tissue": ["breast"]}, [ST.slide, VISIUM.slide]),
        ({"species": ["mouse"]}, [MOUSE.slide]),
        ({"technology": ["ST"], "species": ["human"]}, [ST.slide]),
    ):
        assert [s.meta.section_id for s in open_source(folder, where=where)] == ids
    shutil.rmtree(folder / "meta")
    with pytest.raises(SourceError, match=r"no species for .*`species`"):
        read(folder)
    assert read(folder, species="human", tissue="skin").meta.tissue == "skin"


def test_tables_of_any_age_are_read_and_the_newest_counts(folder: Path):
    write_meta(folder / "meta/meta_all_gene.csv", [replace(ST, tissue="old")], sep="\t", title="plain")
    assert read(folder).meta.tissue == "breast"
    write_meta(folder / "meta/meta_all_gene01012026.csv", [replace(ST, tissue="new")])
    assert read(folder).meta.tissue == "new"
    for path in (folder / "meta").glob("*gene0*"):
        path.unlink()
    assert read(folder).meta.tissue == "old"


def test_spots_in_one_file_only_are_counted(folder: Path):
    path = folder / f"ST/gene_exp/{ST.slide}_count.csv"
    counts(ST).drop(index=f"{ST.slide}_2x2").to_csv(path)
    section = read(folder)
    assert section.dropped == {"in tissue but not in the counts": 1}


def test_a_set_is_built_from_it(folder: Path, tmp_path: Path):
    report = build_shards(open_source(folder), tmp_path / "set", tile_px=16, tile_um=112.0, min_mpp=5.0)
    assert report.n_spots == 48
    assert "donor unstated:GSE1_GSM2" in report.text


def rewrite(folder: Path, name: str, change):
    path = folder / "ST" / name.format(ST.slide)
    path.write_text(change(path.read_text()))


BAD = {
    "no counts": (
        lambda f: (f / f"ST/gene_exp/{ST.slide}_count.csv").unlink(),
        r"A1_count\.csv: no such file.*counts of",
    ),
    "no image": (lambda f: (f / f"ST/image/{ST.slide}.png").unlink(), r"A1\.png: no such file.*image of"),
    "image damaged": (lambda f: (f / f"ST/image/{ST.slide}.png").write_bytes(b"GIF"), r"A1\.png: not an image"),
    "no radius": (
        lambda f: rewrite(f, "coord/{}_coord.csv", lambda t: t.replace(",r\n", ",q\n")),
        r"coord\.csv: missing column r",
    ),
    "x is text": (
        lambda f: rewrite(f, "coord/{}_coord.csv", lambda t: t.replace("50.0", "far", 1)),
        "'far', not a number",
    ),
    "other slide": (lambda f: counts(MOUSE).to_csv(f / f"ST/gene_exp/{ST.slide}_count.csv"), "share no spot id"),
    "fractions": (lambda f: (counts(ST) / 2).to_csv(f / f"ST/gene_exp/{ST.slide}_count.csv"), "raw counts are needed"),
    "table": (
        lambda f: (f / "meta/meta_all_gene02122025.csv").write_text("slide,tech\na,b\n"),
        "missing column species, tissue",
    ),
    "picture of another": (
        lambda f: Image.new("RGB", (50, 50)).save(f / f"ST/image/{ST.slide}.png"),
        r"A1\.png: the image is 50 x 50 px, but",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_of_bad_files_name_the_file_and_the_fix(folder: Path, name: str):
    change, message = BAD[name]
    change(folder)
    with pytest.raises(SourceError, match=message):
        read(folder).load_image()


def test_nothing_there(tmp_path: Path):
    with pytest.raises(SourceError, match="no TECH/coord"):
        open_source(tmp_path, fmt="stimage")


def test_every_declared_option_is_read(folder: Path):
    assert fields_read(folder) == declared(folder)
