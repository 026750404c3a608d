"""Visium HD: pooled counts equal sums over single bins, on a grid that is rotated against its image."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from comtip_shards import ShardSet, SourceError
from comtip_shards.reader.verify import verify
from comtip_shards.sources import detect, open_source
from comtip_shards.sources.files.geojson import centroid, iter_features

from comtip_fast.cli import main
from testkit.option_reads import declared, fields_read
from testkit.tenx import GENES, NAMES, he_picture, section_digest, write_h5, write_segmentation, write_visium_hd

MPP, ANGLE, CORNER = 4.0, 0.2, np.array([40.0, 12.0])
TURN = np.array([[np.cos(ANGLE), -np.sin(ANGLE)], [np.sin(ANGLE), np.cos(ANGLE)]])
AFFINE = np.column_stack([TURN / MPP, CORNER])
SHAPE = (20, 25)
"""Rows and columns of 16 um bins: 2 x 3 whole pseudo-spots of 128 um, half ones below, an eighth to the right."""
FACTS = {"tissue": "colon", "donor": "P1"}


def tissue() -> np.ndarray:
    out = np.ones(SHAPE, bool)
    out[:3, :8] = False  # 40 of the 64 bins of the first pseudo-spot stay
    out[:6, 8:16] = False  # 16 of 64
    return out


@pytest.fixture
def run(tmp_path: Path) -> Path:
    root = tmp_path / "colon" / "outs"
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.7, (4, tissue().sum()))
    write_visium_hd(root, 16, counts, tissue(), AFFINE)
    fine = tissue().repeat(2, 0).repeat(2, 1)
    write_visium_hd(root, 8, rng.poisson(0.2, (4, fine.sum())), fine, AFFINE)
    (root / "spatial").mkdir()
    he_picture(80, 65).save(root / "spatial/tissue_hires_image.png")
    he_picture(160, 130).save(tmp_path / "full.png")
    return root


def facts(run: Path, **more: str) -> dict[str, str]:
    return {**FACTS, "image": str(run.parents[1] / "full.png"), **more}


def read(run: Path, **more: str):
    return open_source(run, overrides=facts(run, **more))[0].read()


def truth(run: Path, bin_um: int, pool_um: int) -> dict[str, tuple[int, np.ndarray, np.ndarray]]:
    """Sum bin by bin: {id: (bins in tissue, counts, centre in px)}."""
    folder = run / f"binned_outputs/square_{bin_um:03d}um"
    with h5py.File(folder / "filtered_feature_bc_matrix.h5") as file:
        group = {n: file[f"matrix/{n}"][()] for n in ("indptr", "indices", "data")}
        names = file["matrix/barcodes"].asstr()[()]
        counts = np.zeros((len(names), 4), int)
        for i in range(len(counts)):
            part = slice(group["indptr"][i], group["indptr"][i + 1])
            counts[i, group["indices"][part]] = group["data"][part]
        rows = dict(zip(names, counts, strict=True))
    table = pd.read_parquet(folder / "spatial/tissue_positions.parquet")
    out: dict = {}
    for bin_ in table[table["in_tissue"] == 1].itertuples():
        j, i = bin_.array_row * bin_um // pool_um, bin_.array_col * bin_um // pool_um
        n, total, _ = out.get(f"{j:03d}x{i:03d}", (0, np.zeros(4, int), None))
        centre = AFFINE @ [(i + 0.5) * pool_um, (j + 0.5) * pool_um, 1]
        out[f"{j:03d}x{i:03d}"] = (n + 1, total + rows[bin_.barcode], centre)
    return out


def same(section, want: dict) -> None:
    assert section.spot_ids == sorted(want)
    for i, name in enumerate(section.spot_ids):
        n, counts, centre = want[name]
        assert section.n_pooled[i] == n
        np.testing.assert_array_equal(section.counts[i].toarray()[0], counts)
        np.testing.assert_allclose(section.xy[i], centre, atol=1e-6)


@pytest.mark.parametrize(("bin_um", "more"), [(16, {}), (8, {"bin_um": "8"})])
def test_bins_are_pooled_and_placed(run: Path, bin_um: int, more: dict):
    reader, why = detect(run)
    assert (reader.name, why) == ("visium_hd", "bins of Visium HD in square_016um, square_008um")
    section = read(run, **more)
    want = truth(run, bin_um, 128)
    kept = {k: v for k, v in want.items() if v[0] >= 0.5 * (128 / bin_um) ** 2}
    # Half pseudo-spots at the edge stay, the eighths and the one with 16 of 64 go.
    assert sorted(set(want) - set(kept)) == ["000x001", "000x003", "001x003", "002x003"]
    same(section, kept)
    assert section.gene_ids == list(GENES)
    assert "bin grid: rotated by 11.5 degrees" in section.notes
    meta = section.meta
    assert (meta.section_id, meta.species, meta.platform) == ("colon", "human", "Visium HD")
    assert (meta.mpp, meta.spot_diameter_um, meta.spot_pitch_um) == (pytest.approx(MPP), 128, 128)
    assert meta.pooling == f"bins of {bin_um} um in squares of 128 um, at least 50% of them in tissue"
    assert section.dropped == {"pseudo-spots with under 50% of their bins in tissue": 4}
    lost = [want[k] for k in set(want) - set(kept)]
    held = f"excluded pseudo-spots: {sum(v[0] for v in lost)} bins with {sum(v[1].sum() for v in lost)} counts"
    assert held in section.notes
    assert int(section.counts.sum()) + sum(v[1].sum() for v in lost) == sum(v[1].sum() for v in want.values())


def test_other_sizes_and_shares(run: Path):
    same(read(run, pool_um="48", min_cover="0.01"), truth(run, 16, 48))
    # 40 um is no multiple of 16: the 8 um bins are taken.
    same(read(run, pool_um="40", min_cover="0.01"), truth(run, 8, 40))
    whole = {k: v for k, v in truth(run, 16, 128).items() if v[0] == 64}
    same(read(run, min_cover="1"), whole)
    same(
        open_source(run / "binned_outputs/square_008um", overrides=facts(run, min_cover="1"))[0].read(),
        {k: v for k, v in truth(run, 8, 128).items() if v[0] == 256},
    )


def test_round_trip_through_a_shard_set(run: Path, tmp_path: Path):
    image = ["--image", str(run.parents[1] / "full.png"), "--tissue", "colon", "--donor", "P1"]
    options = [*image, "--pool-um", "128", "--tile-px", "16", "--tile-um", "128", "--min-mpp", "4"]
    assert main(["shards", "build", str(run), "--out", str(tmp_path / "s"), *options]) == 0
    assert verify(tmp_path / "s").ok
    shards = ShardSet(tmp_path / "s")
    symbols = [g.symbol for g in shards.genes]
    want = {k: v for k, v in truth(run, 16, 128).items() if v[0] >= 32}
    counts = pd.DataFrame(shards.counts(range(len(shards))).toarray(), columns=symbols)[list(NAMES)].to_numpy()
    assert sorted(shards.spots["spot_id"]) == sorted(want)
    for spot, row in zip(shards.spots.itertuples(), counts, strict=True):
        n, total, centre = want[spot.spot_id]
        assert spot.n_pooled == n
        np.testing.assert_array_equal(row, total)
        np.testing.assert_allclose([spot.x_px, spot.y_px], centre, atol=1e-3)
    assert shards.manifest.sections[0].pooling.startswith("bins of 16 um")


def test_the_hires_picture_is_taken_only_when_asked_for(run: Path):
    want = {k: (n, c, xy * 0.5) for k, (n, c, xy) in truth(run, 16, 128).items() if n >= 32}
    section = read(run, image="hires")
    same(section, want)
    assert section.meta.mpp == pytest.approx(2 * MPP)
    assert any("from tissue_hires_image.png, scale 0.5000 of full resolution" in n for n in section.notes)
    with pytest.raises(SourceError, match="set `image` to hires"):
        read(run, image="")
    same(read(run), {k: (n, c, xy * 2) for k, (n, c, xy) in want.items()})


def test_bins_outside_tissue_of_a_raw_matrix_are_counted(run: Path):
    folder = run / "binned_outputs/square_016um"
    before = read(run)
    with h5py.File(folder / "filtered_feature_bc_matrix.h5") as file:
        n = len(file["matrix/barcodes"])
    table = pd.read_parquet(folder / "spatial/tissue_positions.parquet")
    inside = np.flatnonzero(table["in_tissue"] == 1)
    raw = np.full((4, len(table)), 3)
    raw[:, inside] = np.random.default_rng(0).poisson(0.7, (4, n))
    (folder / "filtered_feature_bc_matrix.h5").unlink()
    write_h5(folder / "raw_feature_bc_matrix.h5", raw, table["barcode"].tolist())
    after = read(run)
    np.testing.assert_array_equal(after.counts.toarray(), before.counts.toarray())
    left = len(table) - len(inside)
    assert f"{left} bins with {left * 12:,} counts excluded: outside tissue" in after.notes


def test_batches_do_not_matter(run: Path, monkeypatch: pytest.MonkeyPatch):
    before = read(run)
    for module in ("visium_hd_parts.bins", "files.table_batches"):
        monkeypatch.setattr(f"comtip_shards.sources.{module}.BATCH", 37)
    after = read(run)
    assert after.spot_ids == before.spot_ids
    np.testing.assert_array_equal(after.counts.toarray(), before.counts.toarray())
    np.testing.assert_allclose(after.xy, before.xy)


# -- cells ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cells(run: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    centres, counts = rng.uniform([20, 20], [140, 110], (60, 2)), rng.poisson(2, (4, 60))
    write_segmentation(run, counts, centres, MPP, radius=2.0)
    return run, centres, counts


def test_cells_are_pooled_by_their_centres(cells):
    run, centres, counts = cells
    section = read(run, pool_from="cells", pool_um="100", min_pooled="2")
    square = (centres // (100 / MPP)).astype(int)
    want: dict = {}
    for (i, j), column in zip(square, counts.T, strict=True):
        n, total, _ = want.get(f"{j:03d}x{i:03d}", (0, np.zeros(4, int), None))
        want[f"{j:03d}x{i:03d}"] = (n + 1, total + column, (np.array([i, j]) + 0.5) * 100 / MPP)
    kept = {k: v for k, v in want.items() if v[0] >= 2}
    assert 0 < len(kept) < len(want)
    same(section, kept)
    assert section.dropped == {"pseudo-spots with under 2 cells": len(want) - len(kept)}
    assert section.meta.pooling == "segmented cells in squares of 100 um, at least 2"


def test_pooled_cells_keep_their_bytes(cells):
    """The digest is from the separate implementations that the two readers had."""
    run, _, _ = cells
    edit_polygons(run, lambda features: features.pop(7))
    section = read(run, pool_from="cells", pool_um="100", min_pooled="2")
    assert section_digest(section) == "5bad86a7ac8278c621578110a1555f8545d5de913008f1078aacc551af575201"


def test_cells_alone_are_recognised(cells):
    run, _, _ = cells
    shutil.rmtree(run / "binned_outputs")
    assert detect(run)[1] == "segmented cells of Visium HD in segmented_outputs"
    assert read(run).meta.pooling.startswith("segmented cells")


def test_batches_of_cells_do_not_matter(cells, monkeypatch: pytest.MonkeyPatch):
    before = read(cells[0], pool_from="cells")
    monkeypatch.setattr("comtip_shards.sources.tenx.pooled.BATCH", 7)
    assert section_digest(read(cells[0], pool_from="cells")) == section_digest(before)


def edit_polygons(run: Path, change) -> None:
    path = run / "segmented_outputs/cell_segmentations.geojson"
    data = json.loads(path.read_text())
    change(data["features"])
    path.write_text(json.dumps(data))


def test_cells_without_a_polygon_are_counted(cells):
    run, _, counts = cells
    edit_polygons(run, lambda features: features.pop(7))
    section = read(run, pool_from="cells")
    assert f"1 cells with {counts[:, 7].sum()} counts excluded: no polygon" in section.notes
    assert int(section.counts.sum()) == counts.sum() - counts[:, 7].sum()


BAD_CELLS = {
    "no join": (
        lambda r: edit_polygons(
            r, lambda f: [x["properties"].update(cell_id=x["properties"]["cell_id"] + 99) for x in f]
        ),
        "only 0 of its 60 cells have a polygon",
    ),
    "twice": (lambda r: edit_polygons(r, lambda f: f.append(f[0])), "duplicate cell 1"),
    "a point": (lambda r: edit_polygons(r, lambda f: f[0]["geometry"].update(type="Point")), "is not a polygon"),
    "a number": (lambda r: edit_polygons(r, lambda f: f.insert(0, 7)), "7 is not a feature"),
    "no id": (lambda r: edit_polygons(r, lambda f: f[0]["properties"].pop("cell_id")), "has no cell_id"),
    "no polygons": (lambda r: (r / "segmented_outputs/cell_segmentations.geojson").unlink(), "no such file"),
    "other json": (
        lambda r: (r / "segmented_outputs/cell_segmentations.geojson").write_text("[1]"),
        "no list of features",
    ),
    "no counts": (lambda r: (r / "segmented_outputs/filtered_feature_cell_matrix.h5").unlink(), "Space Ranger 4"),
}


@pytest.mark.parametrize("name", BAD_CELLS)
def test_bad_cells_name_the_file_and_the_fix(cells, name: str):
    change, message = BAD_CELLS[name]
    change(cells[0])
    with pytest.raises(SourceError, match=message):
        read(cells[0], pool_from="cells")


def test_polygons_are_read_in_pieces(cells, monkeypatch: pytest.MonkeyPatch):
    path = cells[0] / "segmented_outputs/cell_segmentations.geojson"
    monkeypatch.setattr("comtip_shards.sources.files.geojson._CHUNK", 37)
    features = list(iter_features(path))
    assert features == json.loads(path.read_text())["features"]
    np.testing.assert_allclose([centroid(f, path) for f in features], cells[1])
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(SourceError, match="truncated or damaged"):
        list(iter_features(path))


# -- what is wrong ----------------------------------------------------------------------------------------------


def edit_table(**changes):
    def change(run: Path) -> None:
        path = run / "binned_outputs/square_016um/spatial/tissue_positions.parquet"
        table = pd.read_parquet(path)
        for column, value in changes.items():
            table[column] = value(table) if callable(value) else value
        table.to_parquet(path)

    return change


def edit_factors(**changes):
    def change(run: Path) -> None:
        path = run / "binned_outputs/square_016um/spatial/scalefactors_json.json"
        factors = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in factors.items() if v is not None}))

    return change


def rename_bins(new):
    def change(run: Path) -> None:
        path = run / "binned_outputs/square_016um/filtered_feature_bc_matrix.h5"
        with h5py.File(path, "r+") as file:
            names = [new(i, b) for i, b in enumerate(file["matrix/barcodes"].asstr()[()])]
            del file["matrix/barcodes"]
            file["matrix/barcodes"] = np.array(names, "S")

    return change


def cut_parquet(run: Path) -> None:
    path = run / "binned_outputs/square_016um/spatial/tissue_positions.parquet"
    path.write_bytes(path.read_bytes()[:500])


BAD = {
    "out of the grid": (
        rename_bins(lambda i, b: b.replace("00019", "00090") if i % 50 == 0 or "_00019_" in b else b),
        r"has bins that \S+ does not list .*00090",
    ),
    "other names": (rename_bins(lambda i, b: f"AAAC{i}-1"), "'AAAC0-1' is not of the form s_016um"),
    "other bins": (rename_bins(lambda i, b: b.replace("016um", "008um")), "contains bins of 8 um instead of 16"),
    "nothing in tissue": (edit_table(in_tissue=0), "share no bin in tissue"),
    "bin twice": (
        edit_table(
            array_row=lambda t: t["array_row"] * 0,
            barcode=lambda t: [f"s_016um_00000_{c:05d}-1" for c in t["array_col"]],
        ),
        "475 duplicate bins",
    ),
    "columns disagree": (
        edit_table(array_row=lambda t: t["array_row"][::-1].to_numpy()),
        "barcodes and array_row, array_col differ",
    ),
    "no position": (
        edit_table(pxl_row_in_fullres=np.nan),
        "the column pxl_row_in_fullres has missing or infinite values",
    ),
    "text": (edit_table(pxl_row_in_fullres="here"), "pxl_row_in_fullres has type string, expected numbers"),
    "column gone": (lambda r: edit_table(row=1)(r) or drop_column(r), "missing columns pxl_row_in_fullres"),
    "cut parquet": (cut_parquet, "cannot be read as Parquet"),
    "no scale": (edit_factors(microns_per_pixel=None), "set `mpp`"),
    "wrong pixel size": (edit_factors(microns_per_pixel=0.3), "gives 4.0000 um per px instead of 0.3"),
    "wrong spacing": (edit_factors(microns_per_pixel=8.0, spot_diameter_fullres=2.0), "a pitch of 4.000 px"),
    "wrong bin size": (edit_factors(bin_size_um=8.0), "states bins of 8 um"),
    "no counts": (
        lambda r: (r / "binned_outputs/square_016um/filtered_feature_bc_matrix.h5").unlink(),
        "neither filtered_f",
    ),
}


def drop_column(run: Path) -> None:
    path = run / "binned_outputs/square_016um/spatial/tissue_positions.parquet"
    pd.read_parquet(path).drop(columns="pxl_row_in_fullres").to_parquet(path)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_file_and_the_fix(run: Path, name: str):
    change, message = BAD[name]
    change(run)
    with pytest.raises(SourceError, match=message) as caught:
        read(run)
    assert "square_016um" in str(caught.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"pool_um": "100"}, "not a multiple of a bin width \\(16, 8 um\\); use e.g. 96"),
        ({"bin_um": "2"}, "no bins of 2 um; set `bin_um` to one of 16, 8"),
        ({"pool_um": "-3"}, "`pool_um` -3: must be greater than 0"),
        ({"min_cover": "50"}, "`min_cover` 50: must be less than or equal to 1"),
        ({"qv": "20"}, "`qv` has no effect here"),
        ({"pool_from": "transcripts"}, "use bins or cells for Visium HD"),
        ({"mpp": "2"}, "states 4 um per full-resolution px, but `mpp` is 2"),
        ({"tissue": ""}, "set `tissue`"),
        ({"image": ""}, "set `image` to the microscope image"),
        ({"pool_um": "2048"}, "too few pseudo-spots|reduce `min_cover`"),
    ],
)
def test_settings_that_cannot_be(run: Path, more: dict, message: str):
    with pytest.raises(SourceError, match=message):
        read(run, **more)


def test_bins_given_to_the_space_ranger_reader_are_not_taken_for_spots(run: Path):
    assert detect(run / "binned_outputs/square_016um")[0].name == "visium_hd"
    with pytest.raises(SourceError, match="no effect here: the format space_ranger has spots, which are not pooled"):
        open_source(run / "binned_outputs/square_016um", fmt="space_ranger", overrides=facts(run, pool_um="128"))


def test_every_declared_option_is_read(run: Path):
    write_segmentation(run, np.ones((4, 9), int), np.full((9, 2), 60.0), MPP, radius=2.0)
    read = fields_read(run, **facts(run)) | fields_read(run, **facts(run, pool_from="cells"))
    assert read == declared(run) - {"qv", "alignment"}  # refused by name
