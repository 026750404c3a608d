"""Space Ranger folders of every version: synthetic ones in each layout, and two real ones, reduced (fixtures/README.md)."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from comtip_shards import ShardSet, SourceError
from comtip_shards.builder.build import build_shards
from comtip_shards.reader.verify import verify
from comtip_shards.sources import detect, open_source
from PIL import Image

from comtip_fast.cli import main
from testkit.tenx import GENES, NAMES, he_picture, write_h5, write_mex

REAL = Path(__file__).parent / "fixtures/space_ranger"
KINDS = ["Gene Expression"] * 3 + ["Antibody Capture"]
PITCH = 35.0
COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
BARCODES = [f"ACGT{i:02d}-1" for i in range(12)]
COUNTS = np.random.default_rng(0).poisson(2, (4, 10))
FACTS = {"tissue": "breast"}


def positions() -> pd.DataFrame:
    """Return 12 spots on a hexagonal grid 35 px apart; all but the first two are in tissue."""
    rows, cols = np.divmod(np.arange(12), 4)
    y, x = 75 + rows * PITCH * np.sqrt(3) / 2, 75 + cols * PITCH + (rows % 2) * PITCH / 2
    values = [BARCODES, [0, 0] + [1] * 10, rows, 2 * cols + rows % 2, y.round(1), x.round(1)]
    return pd.DataFrame(dict(zip(COLUMNS, values, strict=True)))


def write_positions(spatial: Path, layout: str) -> Path:
    table = positions()
    if layout == "v1":
        path = spatial / "tissue_positions_list.csv"
        table.astype(dict.fromkeys(COLUMNS[2:], int)).to_csv(path, header=False, index=False)
    elif layout == "v2":
        path = spatial / "tissue_positions.csv"
        table.to_csv(path, index=False)
    elif layout == "list with a header":
        path = spatial / "tissue_positions_list.csv"
        table[[*COLUMNS[:2], *COLUMNS[:1:-1]]].to_csv(path, index=False)  # and in another order
    elif layout == "packed":
        path = spatial / "GSM1_tissue_positions_list.csv.gz"
        table.to_csv(path, header=False, index=False)
    else:
        path = spatial / "tissue_positions.parquet"
        table.to_parquet(path)
    return path


def write_run(folder: Path, *, layout: str = "v2", counts: str = "h5", picture: str = "hires") -> Path:
    spatial = folder / "spatial"
    spatial.mkdir(parents=True)
    write_positions(spatial, layout)
    factors = {"spot_diameter_fullres": PITCH * 0.55, "tissue_hires_scalef": 0.5, "tissue_lowres_scalef": 0.25}
    (spatial / "scalefactors_json.json").write_text(json.dumps(factors))
    scale = factors[f"tissue_{picture}_scalef"]
    he_picture(int(300 * scale), int(250 * scale)).save(spatial / f"tissue_{picture}_image.png")
    stem = "raw_feature_bc_matrix" if counts == "raw" else "filtered_feature_bc_matrix"
    everything = COUNTS if counts != "raw" else np.concatenate([np.ones((4, 2), int), COUNTS], axis=1)
    barcodes = BARCODES if counts == "raw" else BARCODES[2:]
    if "mex" in counts:
        write_mex(folder / stem, everything, barcodes, kinds=KINDS, prefix="GSM1_" if "prefix" in counts else "")
    else:
        prefix = "GSM1_" if "prefix" in counts else ""
        write_h5(folder / f"{prefix}{stem}.h5", everything, barcodes, kinds=KINDS)
    return folder


@pytest.fixture
def full(tmp_path: Path) -> str:
    he_picture(300, 250).save(tmp_path / "full.png")
    return str(tmp_path / "full.png")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


@pytest.mark.parametrize("layout", ["v1", "v2", "list with a header", "packed", "parquet"])
@pytest.mark.parametrize("counts", ["h5", "mex", "h5 prefix", "mex prefix", "raw"])
def test_every_layout_reads_the_same(tmp_path: Path, full: str, layout: str, counts: str):
    folder = write_run(tmp_path / "run" / "outs", layout=layout, counts=counts)
    reader, why = detect(folder)
    assert (reader.name, "tissue_positions" in why) == ("space_ranger", True)
    section = open_source(folder, overrides={**FACTS, "image": full})[0].read()
    assert section.meta.section_id == "run"
    assert section.meta.species == "human"
    assert section.gene_ids == list(GENES[:3])
    assert section.gene_symbols == list(NAMES[:3])
    assert section.spot_ids == BARCODES[2:]
    np.testing.assert_array_equal(section.counts.toarray(), COUNTS[:3].T)
    # x = column, y = row, in px of the original image; version 1 wrote whole px.
    np.testing.assert_allclose(section.xy[0], [75 + 2 * PITCH, 75], atol=1)
    np.testing.assert_allclose(section.array_xy[0], [4, 0])
    assert section.meta.mpp == pytest.approx(100 / PITCH, rel=2e-2)
    assert any("from the 100 um spot pitch" in n for n in section.notes)
    assert "1 features are not genes: Antibody Capture" in section.notes
    assert any("12 spots; a complete slide has 4,992 or 14,336" in n for n in section.notes)
    assert (section.dropped == {"not in tissue": 2}) == (counts == "raw")
    assert any("no filtered matrix" in n for n in section.notes) == (counts == "raw")


def test_round_trip_through_a_shard_set(run: Path, full: str, tmp_path: Path):
    options = ["--tissue", "breast", "--image", full, "--tile-px", "16", "--tile-um", "100", "--min-mpp", "3"]
    assert main(["shards", "build", str(run), "--out", str(tmp_path / "s"), *options]) == 0
    assert verify(tmp_path / "s").ok
    shards = ShardSet(tmp_path / "s")
    want = pd.DataFrame(COUNTS[:3].T, index=BARCODES[2:], columns=NAMES[:3])
    order = shards.source_order(0)
    got = pd.DataFrame(shards.counts(order).toarray(), columns=[g.symbol for g in shards.genes])
    np.testing.assert_array_equal(got[want.columns].to_numpy(), want.to_numpy())
    spots = shards.spots.loc[order]
    assert spots["spot_id"].tolist() == want.index.tolist()
    table = positions().iloc[2:]
    np.testing.assert_allclose(spots[["x_px", "y_px"]], table[COLUMNS[:3:-1]].to_numpy(float))


def test_shrunk_pictures_are_taken_only_when_asked_for(run: Path):
    with pytest.raises(SourceError, match=r"set `image` to the microscope image .*set `image` to hires"):
        open_source(run, overrides=FACTS)
    section = open_source(run, overrides={**FACTS, "image": "hires"})[0].read()
    np.testing.assert_allclose(section.xy[0], [(75 + 2 * PITCH) * 0.5, 75 * 0.5])
    assert section.meta.mpp == pytest.approx(100 / PITCH / 0.5, rel=1e-3)
    assert any("from tissue_hires_image.png, scale 0.5000 of full resolution" in n for n in section.notes)
    with pytest.raises(
        SourceError, match=r"tissue_lowres_image.png: no such file \(the folder has tissue_hires_image\.png"
    ):
        open_source(run, overrides={**FACTS, "image": "lowres"})
    (run / "spatial/tissue_hires_image.png").unlink()
    with pytest.raises(SourceError, match=r"no tissue_hires_image\.png to use instead"):
        open_source(run, overrides=FACTS)


def test_an_image_of_another_size_is_refused(run: Path, tmp_path: Path):
    he_picture(380, 250).save(tmp_path / "other.png")
    with pytest.raises(SourceError, match="380 x 250 px, but the positions belong to an image of about 300 x 250"):
        open_source(run, overrides={**FACTS, "image": str(tmp_path / "other.png")})
    shutil.copyfile(run / "spatial/tissue_hires_image.png", tmp_path / "mine.png")
    with pytest.raises(SourceError, match="this is the hires image: set `image` to hires"):
        open_source(run, overrides={**FACTS, "image": str(tmp_path / "mine.png")})


def test_the_original_is_found_next_to_the_run(run: Path):
    he_picture(300, 250).save(run / "run_image.tif")
    section = open_source(run, overrides=FACTS)[0].read()
    assert section.image_path.name == "run_image.tif"
    assert "full-resolution image: run_image.tif" in section.notes
    he_picture(300, 250).save(run / "other_image.tif")
    with pytest.raises(SourceError, match=r"more than one image .*`image`.*other_image\.tif, run_image\.tif"):
        open_source(run, overrides=FACTS)


def test_an_image_that_is_not_he_is_reported(run: Path, tmp_path: Path):
    Image.new("RGB", (300, 250), (230, 20, 130)).save(tmp_path / "pink.png")
    section = open_source(run, overrides={**FACTS, "image": str(tmp_path / "pink.png")})[0].read()
    assert any("pink.png does not look like H&E: pink without haematoxylin" in n for n in section.notes)


def test_the_scale_is_checked_against_the_spacing(run: Path, full: str):
    facts = {**FACTS, "image": full}
    assert open_source(run, overrides={**facts, "mpp": "2.86"})[0].meta.mpp == 2.86
    with pytest.raises(SourceError, match=r"0\.5 um per px is stated, but the spot pitch of 35\.0 px .* 2\.85"):
        open_source(run, overrides={**facts, "mpp": "0.5"})
    factors = run / "spatial/scalefactors_json.json"
    factors.write_text(json.dumps({**json.loads(factors.read_text()), "microns_per_pixel": 0.5}))
    with pytest.raises(SourceError, match=r"0\.5 um per px is stated.*remove microns_per_pixel from scalefactors_json"):
        open_source(run, overrides=facts)


def test_a_whole_slide_of_11_mm(run: Path, full: str):
    row, col = (a.ravel() for a in np.mgrid[0:128, 0:112])
    col = 2 * col + row % 2
    names = [*BARCODES, *(f"T{i}-1" for i in range(128 * 112 - 12))]
    x, y = 10 + col * 0.5 * 2.5, 5 + row * 0.75**0.5 * 2.5
    values = [names, np.arange(len(row)) < 12, row, col, y, x]
    table = pd.DataFrame(dict(zip(COLUMNS, values, strict=True)))
    table.astype({"in_tissue": int}).to_csv(run / "spatial/tissue_positions.csv", index=False)
    (run / "spatial/scalefactors_json.json").write_text(json.dumps({"spot_diameter_fullres": 2.5 * 0.65}))
    section = open_source(run, overrides={**FACTS, "image": full})[0].read()
    assert section.meta.mpp == pytest.approx(40.0)
    assert section.dropped == {"in tissue but not in the counts": 2}
    assert not any("whole slide" in n for n in section.notes)


def edit_positions(run: Path, **changes) -> None:
    path = run / "spatial/tissue_positions.csv"
    table = pd.read_csv(path)
    for column, values in changes.items():
        table[column] = values
    table.to_csv(path, index=False)


def swap_columns(run: Path) -> None:
    edit_positions(run, array_row=np.random.default_rng(0).permutation(12))


def break_factors(run: Path) -> None:
    path = run / "spatial/scalefactors_json.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"spot_diameter_fullres": 10.0}))


def cut_h5(run: Path) -> None:
    path = run / "filtered_feature_bc_matrix.h5"
    path.write_bytes(path.read_bytes()[:3000])


def second_matrix(run: Path) -> None:
    (run / "filtered_feature_bc_matrix.h5").rename(run / "A_filtered_feature_bc_matrix.h5")
    shutil.copyfile(run / "A_filtered_feature_bc_matrix.h5", run / "B_filtered_feature_bc_matrix.h5")


BAD = {
    "of the same run": (break_factors, "of the same Space Ranger run"),
    "columns mixed up": (swap_columns, "array_row and array_col"),
    "too few": (lambda r: edit_positions(r, array_row=0), "the spots are on one line"),
    "position is text": (lambda r: edit_positions(r, pxl_row_in_fullres="here"), "'here', not a number"),
    "barcode twice": (lambda r: edit_positions(r, barcode=BARCODES[:1] * 12), "barcodes: 1 occurs more than once"),
    "no join": (lambda r: edit_positions(r, barcode=[f"T{i}-1" for i in range(12)]), "share no spot id"),
    "position gone": (
        lambda r: edit_positions(r, pxl_row_in_fullres=""),
        "12 spots without array coordinates or position",
    ),
    "column gone": (
        lambda r: (r / "spatial/tissue_positions.csv").write_text("barcode,in_tissue\nA-1,1\n"),
        "2 columns.*expected barcode",
    ),
    "no rows": (lambda r: (r / "spatial/tissue_positions.csv").write_text(",".join(COLUMNS) + "\n"), "no rows"),
    "no table": (lambda r: (r / "spatial/tissue_positions.csv").unlink(), "none of tissue_positions.parquet"),
    "no counts": (lambda r: (r / "filtered_feature_bc_matrix.h5").unlink(), "neither filtered_feature_bc_matrix.h5"),
    "two matrices": (second_matrix, "more than one count matrix: A_filtered"),
    "not hdf5": (
        lambda r: (r / "filtered_feature_bc_matrix.h5").write_bytes(b"text"),
        "not an HDF5 file that can be read",
    ),
    "cut h5": (cut_h5, r"filtered_feature_bc_matrix\.h5"),
    "factors not json": (lambda r: (r / "spatial/scalefactors_json.json").write_text("{"), "not valid JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_file_and_the_fix(run: Path, full: str, name: str):
    change, message = BAD[name]
    change(run)
    with pytest.raises(SourceError, match=message):
        open_source(run, fmt="space_ranger", overrides={**FACTS, "image": full})[0].read()


def test_what_the_folder_does_not_say_is_asked_for(run: Path, full: str):
    with pytest.raises(SourceError, match="set `tissue`"):
        open_source(run)
    write_h5(run / "filtered_feature_bc_matrix.h5", COUNTS, BARCODES[2:], ids=["a", "b", "c", "d"])
    with pytest.raises(SourceError, match="set `species`"):
        open_source(run, overrides={**FACTS, "image": full})


@pytest.mark.parametrize("where", ["positions", "counts"])
def test_barcodes_without_the_suffix_still_join(run: Path, full: str, where: str):
    if where == "positions":
        edit_positions(run, barcode=[b.removesuffix("-1") for b in BARCODES])
    else:
        write_h5(run / "filtered_feature_bc_matrix.h5", COUNTS, [b.removesuffix("-1") for b in BARCODES[2:]])
    assert len(open_source(run, overrides={**FACTS, "image": full})[0].read().spot_ids) == 10


def test_two_runs_in_one_matrix_are_not_guessed_at(run: Path, full: str):
    edit_positions(run, barcode=[b.removesuffix("-1") for b in BARCODES])
    both = [*BARCODES[2:], *(b.replace("-1", "-2") for b in BARCODES[2:])]
    write_h5(run / "filtered_feature_bc_matrix.h5", np.hstack([COUNTS, COUNTS]), both)
    with pytest.raises(SourceError, match="share no spot id"):
        open_source(run, overrides={**FACTS, "image": full})[0].read()


# -- real folders -----------------------------------------------------------------------------------------------


def real(name: str, tmp_path: Path) -> Path:
    """Copy a real folder, with its table of positions uncompressed as the pipeline wrote it."""
    shutil.copytree(REAL / name, tmp_path / name)
    for packed in (tmp_path / name / "spatial").glob("*.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    return tmp_path / name


def test_real_version_1_heart(tmp_path: Path):
    folder = real("visium_sr1_h5", tmp_path)
    assert detect(folder)[0].name == "space_ranger"
    with pytest.raises(SourceError, match="set `image` to lowres"):
        open_source(folder, overrides={"tissue": "heart"})
    with pytest.raises(SourceError, match=r"tissue_hires_image\.png: no such file \(the folder has tissue_lowres"):
        open_source(folder, overrides={"tissue": "heart", "image": "hires"})
    section = open_source(folder, overrides={"tissue": "heart", "image": "lowres"})[0].read()
    assert section.counts.shape == (100, 100)
    assert int((section.counts > 0).sum()) == 656
    assert section.meta.species == "human"
    # The matrix was cut to 100 barcodes by those who published it; 4,135 more spots lie in tissue.
    assert section.dropped == {"in tissue but not in the counts": 4135}
    assert section.meta.mpp * 0.045004502 == pytest.approx(0.725, abs=1e-3)
    assert not any("does not look like H&E" in n or "whole slide" in n for n in section.notes)
    sources = open_source(folder, overrides={"tissue": "heart", "image": "lowres"})
    build_shards(sources, tmp_path / "s", tile_px=16, tile_um=224.0, min_mpp=16.0)
    assert verify(tmp_path / "s").ok
    shards = ShardSet(tmp_path / "s")
    assert len(shards) == 100
    # Genes that the current nomenclature does not know are excluded and reported; nothing else is lost.
    source = shards.manifest.sections[0].source
    assert int(shards.counts(range(100)).sum()) + source["counts_left_out"] == int(section.counts.sum())


def test_real_version_3_placenta_says_what_is_wrong_with_its_picture(tmp_path: Path):
    folder = real("visium_sr3_mex", tmp_path)
    section = open_source(folder, overrides={"tissue": "placenta", "image": "lowres"})[0].read()
    assert section.counts.shape == (2898, 30)
    assert int(section.counts.sum()) == 768_852
    assert section.meta.species == "mouse"
    assert section.dropped == {}
    assert any("coarser than a microscope scan" in n for n in section.notes)
    assert any("tissue_lowres_image.png does not look like H&E: pink without haematoxylin" in n for n in section.notes)
    x, y = section.xy.T  # spots in tissue lie on the embryo, in the left half of the picture
    assert 50 < x.min() < x.max() < 330
    assert 154 < y.min() < y.max() < 445
