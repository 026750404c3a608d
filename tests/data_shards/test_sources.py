"""Readers: what they read, and what each bad input is told. Fixtures are made here, faithful to the real layouts."""

import gzip
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from comtip_shards import SourceError
from comtip_shards.sources import detect, open_source
from PIL import Image
from scipy import io as scipy_io
from scipy import sparse

from comtip_fast.testing.tiny import SYMBOLS, TinySection, write_tiny_source


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
    "scale is absurd": (lambda f: edit(f, "manifest.tsv", mpp_um_per_px="5000"), "cannot be"),
    "unknown species": (lambda f: edit(f, "manifest.tsv", species="zebrafish"), "species.*human or mouse"),
    "unknown split": (lambda f: edit(f, "manifest.tsv", split="dev"), "split 'dev'"),
    "column gone": (lambda f: edit_drop(f, "manifest.tsv", "donor"), "lacks the columns donor"),
    "image gone": (lambda f: (f / "t1.png").unlink(), r"t1\.png.*no such file"),
    "image too small": (break_image_small, r"t1\.png: the image is 100 x 100 px, but \d+ of 16 spots lie outside"),
    "image truncated": (break_image_bytes, r"t1\.png"),
    "counts gone": (lambda f: (f / "t1.tsv.gz").unlink(), r"t1\.tsv\.gz.*no such file"),
    "counts truncated": (break_gzip, r"t1\.tsv\.gz: cannot be read.*whole"),
    "negative count": (set_count(-1), "negative values.*spot 3x1, gene CD74"),
    "fraction": (set_count(0.5), "not integers.*raw counts"),
    "missing count": (set_count(""), "missing values"),
    "text": (set_count("many"), "CD74 holds text"),
    "no join": (rename_spots, "share no spot id.*spot0"),
    "gene twice": (repeat_gene, "genes in the header.*more than once.*ERBB2"),
    "spot twice": (repeat_spot, "spot ids.*more than once"),
    "positions gone": (lambda f: edit_drop(f, "t1_spots.tsv", "pixel_x"), "lacks the column pixel_x"),
    "position is text": (lambda f: edit(f, "t1_spots.tsv", pixel_x="here"), "'here', not a number"),
    "position missing": (lambda f: edit(f, "t1_spots.tsv", pixel_x=""), "have no position"),
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


def test_legacy_st_asks_for_what_it_cannot_know(legacy: Path):
    with pytest.raises(SourceError, match="give --tissue"):
        open_source(legacy, overrides={"species": "human"})
    with pytest.raises(SourceError, match="unknown fact"):
        open_source(legacy, overrides={"colour": "blue"})


def test_legacy_st_beyond_the_array_is_refused(legacy: Path):
    table = pd.read_csv(legacy / "A1.tsv.gz", sep="\t", index_col=0)
    table.index = ["60x3", *table.index[1:]]
    table.to_csv(legacy / "A1.tsv.gz", sep="\t")
    with pytest.raises(SourceError, match="beyond 33 x 35"):
        open_source(legacy, overrides=FACTS)[0].read()


# -- Space Ranger -----------------------------------------------------------------------------------------------

GENES = ["ENSG00000141736", "ENSG00000186847", "ENSG00000019582", "CTRL1"]
NAMES = ["ERBB2", "KRT14", "CD74", "control"]
KINDS = ["Gene Expression"] * 3 + ["Antibody Capture"]


def space_ranger(folder: Path, *, version: int, mex: bool, image: str = "tissue_hires_image.png") -> sparse.csc_matrix:
    """Write an ``outs`` folder of a Visium run: 12 spots on a hexagonal grid 140 px apart, 10 in tissue."""
    spatial = folder / "spatial"
    spatial.mkdir(parents=True)
    rows, cols = np.divmod(np.arange(12), 4)
    y, x = 300 + rows * 140 * np.sqrt(3) / 2, 300 + cols * 140 + (rows % 2) * 70
    barcodes = [f"ACGT{i:02d}-1" for i in range(12)]
    columns = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
    table = pd.DataFrame(
        dict(
            zip(columns, [barcodes, [0, 0] + [1] * 10, rows, 2 * cols + rows % 2, y.round(1), x.round(1)], strict=True)
        )
    )
    if version == 1:
        table.to_csv(spatial / "tissue_positions_list.csv", header=False, index=False)
    elif version == 2:
        table.to_csv(spatial / "tissue_positions.csv", index=False)
    else:
        table.to_parquet(spatial / "tissue_positions.parquet")
    factors = {"spot_diameter_fullres": 140 * 0.55, "tissue_hires_scalef": 0.5, "tissue_lowres_scalef": 0.25}
    (spatial / "scalefactors_json.json").write_text(json.dumps(factors))
    Image.new("RGB", (600, 500), (220, 180, 220)).save(spatial / image)
    counts = sparse.random(4, 10, 0.6, "csc", random_state=0, data_rvs=lambda n: np.arange(1, n + 1))
    present = barcodes[2:]
    if mex:
        target = folder / "filtered_feature_bc_matrix"
        target.mkdir()
        (target / "barcodes.tsv.gz").write_bytes(gzip.compress(("\n".join(present) + "\n").encode()))
        lines = "\n".join(f"{g}\t{n}\t{k}" for g, n, k in zip(GENES, NAMES, KINDS, strict=True)) + "\n"
        (target / "features.tsv.gz").write_bytes(gzip.compress(lines.encode()))
        scipy_io.mmwrite(target / "matrix.mtx", counts.astype(int))
        raw = (target / "matrix.mtx").read_bytes()
        (target / "matrix.mtx").unlink()
        (target / "matrix.mtx.gz").write_bytes(gzip.compress(raw))
    else:
        with h5py.File(folder / "filtered_feature_bc_matrix.h5", "w") as file:
            group = file.create_group("matrix")
            group["barcodes"] = np.array(present, "S")
            for name, values in (
                ("data", counts.data),
                ("indices", counts.indices),
                ("indptr", counts.indptr),
                ("shape", [4, 10]),
            ):
                group[name] = values
            for name, values in (("id", GENES), ("name", NAMES), ("feature_type", KINDS)):
                group[f"features/{name}"] = np.array(values, "S")
    return counts


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("mex", [False, True])
def test_space_ranger_versions(tmp_path: Path, version: int, mex: bool):
    truth = space_ranger(tmp_path / "run", version=version, mex=mex)
    assert detect(tmp_path / "run")[0].name == "space_ranger"
    section = open_source(tmp_path / "run", overrides={"tissue": "breast"})[0].read()
    assert section.meta.species == "human"
    assert section.gene_ids == GENES[:3]
    np.testing.assert_array_equal(section.counts.toarray(), truth[:3].T.toarray())
    # Positions are px of the hires picture: half of full resolution, x = column.
    np.testing.assert_allclose(section.xy[0], [(300 + 2 * 140) * 0.5, 300 * 0.5])
    assert section.meta.mpp == pytest.approx(100 / 140 / 0.5, rel=1e-3)
    assert any("cut from tissue_hires_image.png" in n for n in section.notes)


def test_space_ranger_takes_the_original_image(tmp_path: Path):
    space_ranger(tmp_path / "run", version=2, mex=False)
    Image.new("RGB", (1200, 1000)).save(tmp_path / "full.png")
    facts = {"tissue": "breast", "image": str(tmp_path / "full.png")}
    section = open_source(tmp_path / "run", overrides=facts)[0].read()
    np.testing.assert_allclose(section.xy[0], [300 + 2 * 140, 300])
    assert section.meta.mpp == pytest.approx(100 / 140, rel=1e-3)


def test_space_ranger_without_hires_says_so(tmp_path: Path):
    space_ranger(tmp_path / "run", version=2, mex=True, image="tissue_lowres_image.png")
    section = open_source(tmp_path / "run", overrides={"tissue": "breast"})[0].read()
    assert any("tissue_hires_image.png is not in the folder" in n for n in section.notes)
    (tmp_path / "run/spatial/tissue_lowres_image.png").unlink()
    with pytest.raises(SourceError, match="give --image"):
        open_source(tmp_path / "run", overrides={"tissue": "breast"})


def test_space_ranger_bad_inputs(tmp_path: Path):
    space_ranger(tmp_path / "run", version=2, mex=False)
    run, facts = tmp_path / "run", {"tissue": "breast"}
    with pytest.raises(SourceError, match="give --tissue"):
        open_source(run)
    wrong = tmp_path / "wrong"
    shutil.copytree(run, wrong)
    factors = json.loads((wrong / "spatial/scalefactors_json.json").read_text()) | {"spot_diameter_fullres": 10.0}
    (wrong / "spatial/scalefactors_json.json").write_text(json.dumps(factors))
    with pytest.raises(SourceError, match="not of one run"):
        open_source(wrong, overrides=facts)
    Image.new("RGB", (100, 80)).save(run / "spatial/tissue_hires_image.png")
    with pytest.raises(SourceError, match="spots lie outside"):
        open_source(run, overrides=facts)[0].read()
    (run / "filtered_feature_bc_matrix.h5").write_bytes(b"not hdf5")
    with pytest.raises(SourceError, match=r"filtered_feature_bc_matrix\.h5: not an HDF5 file"):
        open_source(run, overrides=facts)


def test_barcodes_without_the_suffix_still_join(tmp_path: Path):
    space_ranger(tmp_path / "run", version=2, mex=False)
    path = tmp_path / "run/spatial/tissue_positions.csv"
    path.write_text(path.read_text().replace("-1,", ","))
    assert len(open_source(tmp_path / "run", overrides={"tissue": "breast"})[0].read().spot_ids) == 10
