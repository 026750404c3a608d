"""HEST-1k folders: joined by barcode, from the WSI or from patches, with every lost spot counted."""

import json
import shutil
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
import tifffile
from comtip_shards import ShardSet, SourceError
from comtip_shards.builder.build import build_shards
from comtip_shards.qc import check_section
from comtip_shards.sections.benchmark import guard_benchmark, load_benchmark
from comtip_shards.sources import detect, open_source
from comtip_shards.sources.hest import NO_PATCH

from testkit.hest import DEFAULT, GENES, HestSection, counts, picture, spots, write_hest, write_patches, write_table
from testkit.option_reads import declared, fields_read

VISIUM, XENIUM, MOUSE = DEFAULT


@pytest.fixture(scope="module")
def hest_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hest(tmp_path_factory.mktemp("hest"))


@pytest.fixture
def folder(hest_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hest_folder, tmp_path / "hest"))


def read(folder: Path, name: str = "TENX1", **facts: str):
    return open_source(folder, samples=[name], overrides=facts)[0].read()


def tiles(section, um: float = 112.0, px: int = 56, min_mpp: float = 0.5) -> np.ndarray:
    with section.open_slide() as slide:
        return slide.tiles(section.xy, section.meta.mpp, um, px, min_mpp).astype(int)


def test_it_is_recognised_and_says_why(folder: Path):
    reader, why = detect(folder)
    assert reader.name == "hest"
    assert why == "st/*.h5ad with wsis/, patches/, metadata/, HEST_v1_1_0.csv"


def test_spots_are_joined_by_barcode_and_lost_ones_counted(folder: Path):
    section = read(folder)
    ids, xy = spots(VISIUM)
    assert section.spot_ids == ids[3:]
    assert section.dropped == {NO_PATCH: 3}
    assert section.gene_ids == list(GENES)
    np.testing.assert_array_equal(section.counts.toarray(), counts(VISIUM)[3:])
    np.testing.assert_allclose(section.xy, xy[3:])
    assert section.image_path == folder / "wsis/TENX1.tif"
    meta = section.meta
    assert (meta.species, meta.tissue, meta.platform, meta.mpp) == ("human", "Breast", "Visium", 0.7)
    assert (meta.spot_diameter_um, meta.spot_pitch_um, meta.pooling) == (55, 100, "")
    # "Patient 1" of one study is not that of another; and what is not stated stays so.
    assert meta.donor == "A study, with a comma: Patient 1"
    assert read(folder, "TENX2").meta.donor == ""
    assert "NC" in meta.licence
    assert "the study's own: CC BY 4.0" in meta.licence


def test_pooled_sections_keep_their_names_and_counts(folder: Path):
    section = read(folder, "TENX2")
    assert section.spot_ids[0] == "000x003"
    assert section.counts.dtype == np.int32
    np.testing.assert_array_equal(section.counts.toarray(), counts(XENIUM)[3:])
    assert section.meta.pooling == "squares of 100 um, pooled by HEST"
    assert section.meta.spot_diameter_um == section.meta.spot_pitch_um == 100
    assert read(folder, "MISC3").meta.species == "mouse"


def test_patches_instead_of_the_wsi_give_the_same_tiles(folder: Path):
    from_wsi, from_patches = read(folder), read(folder, pixels="patches")
    assert from_patches.image_path == folder / "patches/TENX1.h5"
    assert from_patches.spot_ids == from_wsi.spot_ids
    # Corners are whole px, and patches were resampled once more.
    for um, px, min_mpp in ((112.0, 56, 0.5), (80.0, 64, 0.5), (112.0, 28, 4.0)):
        difference = np.abs(tiles(from_wsi, um, px, min_mpp) - tiles(from_patches, um, px, min_mpp))
        assert difference.mean() < 2.5, (um, px, min_mpp)
    # A neighbour's patch would be far off: red says the column.
    assert np.abs(tiles(from_wsi)[0] - tiles(from_patches)[1]).mean() > 10
    with from_patches.open_slide() as slide:
        small, factor = slide.overview(100)
        assert slide.size[::-1] == picture(VISIUM).shape[:2]
    assert factor == pytest.approx(slide.size[0] / small.shape[1])


def test_patches_are_not_stretched_to_larger_tiles(folder: Path):
    section = read(folder, pixels="patches")
    with pytest.raises(
        SourceError,
        match=r"TENX1\.h5: patches are 112 um wide, too small for tiles of 224 um.*`tile_um` of at most 112",
    ):
        tiles(section, um=224.0)
    with section.open_slide() as slide, pytest.raises(SourceError, match="no pixels between them"):
        slide.whole()


def test_coords_alone_choose_the_spots_of_the_wsi(tmp_path: Path):
    folder = write_hest(tmp_path, [VISIUM], img=False)
    assert read(folder).dropped == {NO_PATCH: 3}
    with pytest.raises(SourceError, match="coords but no img"):
        read(folder, pixels="patches")


def test_without_patches_all_spots_are_cut_from_the_wsi(tmp_path: Path):
    section = read(write_hest(tmp_path, [VISIUM], patches=False))
    assert len(section.spot_ids) == 25
    assert any("no patches/TENX1.h5" in n for n in section.notes)
    with pytest.raises(SourceError, match=r"neither wsis/TENX1\.tif nor patches/TENX1\.h5"):
        read(write_hest(tmp_path / "b", [VISIUM], patches=False, wsis=False))


def test_sections_are_chosen_by_organ_species_and_technology(folder: Path):
    for where, ids in (
        ({"organ": ["breast", "lung"]}, ["TENX1", "TENX2"]),
        ({"species": ["mouse"]}, ["MISC3"]),
        ({"technology": ["Visium", "Xenium"], "species": ["human"]}, ["TENX1", "TENX2"]),
    ):
        assert sorted(s.meta.section_id for s in open_source(folder, where=where)) == sorted(ids)
    (folder / "st/TENX2.h5ad").unlink()
    assert len(open_source(folder)) == 2


def test_the_table_alone_or_the_metadata_alone_is_enough(folder: Path):
    shutil.move(folder / "metadata", folder / "moved")
    assert read(folder).meta.mpp == 0.7
    shutil.move(folder / "moved", folder / "metadata")
    (folder / "HEST_v1_1_0.csv").unlink()
    section = read(folder)
    assert (section.meta.tissue, section.meta.mpp) == ("Breast", 0.7)
    (folder / "metadata/TENX1.json").unlink()
    with pytest.raises(SourceError, match=r"no scale \(pixel_size_um_estimated\) of TENX1.*`mpp`"):
        read(folder)


def test_the_newest_table_counts(folder: Path):
    write_table(folder / "HEST_v1_10_0.csv", [HestSection("TENX1", title="New"), XENIUM, MOUSE])
    write_table(folder / "HEST_v1_3_0.csv", [HestSection("TENX1", title="Old"), XENIUM, MOUSE])
    assert "New" in read(folder).meta.attribution


def test_a_spacing_that_is_not_the_stated_one_is_reported(folder: Path):
    path = folder / "metadata/TENX1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"inter_spot_dist": 58.0}))
    section = read(folder)
    assert any(
        "the spot pitch is 100.0 um at 0.7000 um per px, but inter_spot_dist is 58 um" in n for n in section.notes
    )


def test_a_scale_that_is_stated_nowhere_may_be_in_the_wsi(folder: Path):
    (folder / "HEST_v1_1_0.csv").unlink()
    path = folder / "metadata/TENX1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pixel_size_um_estimated": None}))
    with pytest.raises(SourceError, match=r"no scale .pixel_size_um_estimated"):
        read(folder)
    per_cm = round(10_000 / 0.7)
    tifffile.imwrite(
        folder / "wsis/TENX1.tif",
        picture(VISIUM),
        photometric="rgb",
        tile=(256, 256),
        resolution=(per_cm, per_cm),
        resolutionunit="CENTIMETER",
    )
    section = read(folder)
    assert section.meta.mpp == pytest.approx(0.7, rel=1e-3)
    assert any("resolution tag of TENX1.tif" in n for n in section.notes)


def test_donors_are_named_as_in_the_list_of_benchmark_donors(tmp_path: Path):
    # The list spells donors as this reader does; a section of one of them is held back, whatever its id.
    one = HestSection("NEW1", title="FFPE Human Breast using the Entire Sample Area", patient="patient 1")
    meta = open_source(write_hest(tmp_path, [one], wsis=False))[0].meta
    guarded, notes = guard_benchmark([meta], benchmark=load_benchmark())
    assert guarded[0].split == "test"
    assert "benchmark" in notes["NEW1"]


def test_a_set_is_built_from_it(folder: Path, tmp_path: Path):
    sources = open_source(folder, where={"species": ["human"]}, overrides={"pixels": "patches"})
    report = build_shards(sources, tmp_path / "set", tile_px=32, tile_um=112.0, min_mpp=1.0)
    assert report.n_spots == 44
    # The checks of a curator use what there is: patches at the spots, a small picture of the whole.
    for source in sources:
        figures = {f.name: f.figure for f in check_section(source.read()).findings}
        assert figures["blur"] is not None
        assert figures["stain"] is not None
    assert f"3 spots left out: {NO_PATCH}" in report.text
    section = ShardSet(tmp_path / "set").manifest.sections[0]
    assert "BY-NC" in section.licence
    assert section.donor == "A study, with a comma: Patient 1"


def edit(path: Path, **changes: object):
    with h5py.File(path, "a") as file:
        for name, values in changes.items():
            attributes = dict(file[name].attrs)
            del file[name]
            if values is not None:
                file[name] = values
                file[name].attrs.update(attributes)


def shift(folder: Path, by: float):
    path = folder / "patches/TENX1.h5"
    with h5py.File(path) as file:
        coords = file["coords"][()]
    edit(path, coords=coords + by)


def other_scale(folder: Path):
    with h5py.File(folder / "patches/TENX1.h5", "a") as file:
        file["img"].attrs["pixel_size"] = 0.25


BAD = {
    "patches of another section": (
        lambda f: write_patches(f / "patches/TENX1.h5", XENIUM, 0),
        r"TENX1\.h5: no patch has the barcode",
    ),
    "patches elsewhere": (
        lambda f: shift(f, 500),
        r"TENX1\.h5: the median distance of patches from their spots is .* px",
    ),
    "patches of another scale": (other_scale, r"TENX1\.h5: extracted at 0\.25 um per px, but the section has 0\.7"),
    "no barcodes": (lambda f: edit(f / "patches/TENX1.h5", barcode=None), r"TENX1\.h5: missing 'barcode'"),
    "barcodes twice": (
        lambda f: edit(f / "patches/TENX1.h5", barcode=["a"] * 22),
        r"TENX1\.h5: barcodes.*more than once",
    ),
    "fewer corners": (
        lambda f: edit(f / "patches/TENX1.h5", coords=np.zeros((5, 2))),
        r"TENX1\.h5: 22 barcodes, but coords of shape \(5, 2\)",
    ),
    "patches damaged": (
        lambda f: (f / "patches/TENX1.h5").write_bytes(b"x"),
        r"TENX1\.h5: not an HDF5 file that can be read",
    ),
    "metadata damaged": (lambda f: (f / "metadata/TENX1.json").write_text("{"), r"TENX1\.json: not valid JSON"),
    "expression damaged": (
        lambda f: (f / "st/TENX1.h5ad").write_bytes(b"x"),
        r"TENX1\.h5ad: not an \.h5ad that can be read",
    ),
    "table without ids": (
        lambda f: (f / "HEST_v1_1_0.csv").write_text("a,b\n1,2\n"),
        r"HEST_v1_1_0\.csv: missing column id",
    ),
    "wsi damaged": (
        lambda f: (f / "wsis/TENX1.tif").write_bytes(b"II+\0" + b"\0" * 30),
        r"TENX1\.tif: cannot be read as a slide",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_of_bad_files_name_the_file_and_the_fix(folder: Path, name: str):
    change, message = BAD[name]
    change(folder)
    with pytest.raises(SourceError, match=message):
        read(folder)


def test_coords_that_are_centres_are_reported(folder: Path):
    shift(folder, 80)
    assert any("coords are patch centres" in n for n in read(folder).notes)


def test_normalised_expression_is_refused(folder: Path):
    data = ad.read_h5ad(folder / "st/TENX1.h5ad")
    data.X = data.X.log1p()
    data.write_h5ad(folder / "st/TENX1.h5ad")
    with pytest.raises(SourceError, match=r"TENX1\.h5ad: .*\(not an integer; .*raw counts"):
        read(folder)
    with pytest.raises(SourceError, match="`pixels` svg: must be 'wsi' or 'patches'"):
        read(folder, pixels="svg")


def test_every_declared_option_is_read(tmp_path: Path):
    folder = write_hest(tmp_path / "hest")
    assert fields_read(folder) == declared(folder)
