"""Tables and file names as spreadsheets, R, Windows and browsers write them, each with its expected value or refusal."""

import gzip
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from comtip_shards import SourceError
from comtip_shards.sources import detect, open_source
from comtip_shards.study.table import read_study

from tests.data_shards.test_reader_cases import (
    BC,
    COL,
    COUNTS,
    IDS,
    ROW,
    SYM,
    VIS,
    XEN,
    N,
    X,
    Y,
    is_the_run,
    mex,
    picture,
    positions,
    read,
    visium,
    xenium,
)

HEADER = "sample_id\tspecies\ttissue\tdonor\timage\tcounts\tspots\tmpp_um_per_px\tspot_pitch_um\n"
ROW_1 = "s1\thuman\tbreast\tP1\ta.png\tcounts.tsv\tspots.tsv\t2.0\t100\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return visium(tmp_path / "run")


# -- positions ----------------------------------------------------------------------------------------------


def decimal_comma(t: pd.DataFrame) -> str:
    rows = t.pxl_row_in_fullres.map("{:.1f}".format).str.replace(".", ",")
    return t.assign(pxl_row_in_fullres=rows).to_csv(index=False, sep=";")


SEURAT = {
    "in_tissue": "tissue",
    "array_row": "row",
    "array_col": "col",
    "pxl_row_in_fullres": "imagerow",
    "pxl_col_in_fullres": "imagecol",
}
TABLES = {
    "decimal comma": decimal_comma,
    "cleared rows": lambda t: t.to_csv(index=False) + "\n,,,,,\n,,,,,\n",
    "cleared rows, no header": lambda t: t.to_csv(index=False, header=False) + ",,,,,\n",
    "cleared columns, no header": lambda t: t.to_csv(index=False, header=False).replace("\n", ",,\n"),
    "other order": lambda t: t[t.columns[::-1]].to_csv(index=False),
    "other order and case": lambda t: t[t.columns[::-1]].rename(columns=str.upper).to_csv(index=False),
    "index of pandas": lambda t: t.to_csv(),
    "names of Seurat": lambda t: t.rename(columns=SEURAT).to_csv(index=False),
    "row names of R": lambda t: t.rename(columns=SEURAT).set_index("barcode").to_csv(index_label=""),
}


@pytest.mark.parametrize("form", TABLES)
def test_positions_after_a_spreadsheet_or_r(run: Path, form: str):
    (run / "spatial/tissue_positions.csv").write_text(TABLES[form](positions()))
    is_the_run(*read(run))


@pytest.mark.parametrize("barcode", ["S1_{}", "{}_1", "{}_2_1", "GSM1_S1#{}", "S1:{}"])
def test_barcodes_with_the_affix_of_a_sample(run: Path, barcode: str):
    t = positions()
    t.assign(barcode=[barcode.format(b) for b in t.barcode]).to_csv(run / "spatial/tissue_positions.csv", index=False)
    is_the_run(*read(run))


def test_barcodes_of_two_samples_are_not_joined(run: Path):
    t = positions()
    both = pd.concat([t.assign(barcode=f"{s}_" + t.barcode) for s in ("S1", "S2")])
    both.to_csv(run / "spatial/tissue_positions.csv", index=False)
    with pytest.raises(SourceError, match="share no spot id"):
        read(run)


def test_positions_in_another_encoding_are_named(run: Path):
    (run / "spatial/tissue_positions.csv").write_bytes(b"barcode \xe4" + positions().to_csv(index=False).encode())
    with pytest.raises(SourceError, match=r"not UTF-8 text .*save the table as UTF-8"):
        read(run)


# -- manifest.tsv -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path, names = tmp_path / "set", [f"s{i}" for i in range(N)]
    path.mkdir()
    t = pd.DataFrame({"spot_id": names, "pixel_x": X, "pixel_y": Y, "array_x": COL, "array_y": ROW})
    t.to_csv(path / "spots.tsv", sep="\t", index=False)
    pd.DataFrame(COUNTS, index=names, columns=SYM).to_csv(path / "counts.tsv", sep="\t")
    picture().save(path / "a.png")
    return path


def is_the_section(path: Path) -> None:
    (source,) = open_source(path)
    section = source.read()
    assert (section.meta.section_id, section.meta.donor, section.meta.mpp) == ("s1", "P1", 2.0)
    np.testing.assert_array_equal(section.counts.toarray(), COUNTS)
    np.testing.assert_allclose(section.xy, np.column_stack([X, Y]))


MANIFESTS = {
    "byte order mark": lambda t: b"\xef\xbb\xbf" + t.encode(),
    "Unicode text of Excel": lambda t: t.replace("\n", "\r\n").encode("utf-16"),
    "cleared rows": lambda t: (t + "\t" * 8 + "\n" + "\t" * 8 + "\n").encode(),
    "cleared columns": lambda t: t.replace("\n", "\t\t\r\n").encode(),
    "sample_id last": lambda t: "\r\n".join("\t".join(r.split("\t")[::-1]) for r in t.splitlines()).encode(),
}


@pytest.mark.parametrize("form", MANIFESTS)
def test_a_manifest_that_a_spreadsheet_wrote(folder: Path, form: str):
    (folder / "manifest.tsv").write_bytes(MANIFESTS[form](HEADER + ROW_1))
    is_the_section(folder)


def cleared(text: str) -> bytes:
    return (text + "\t" * text.partition("\n")[0].count("\t") + "\n").encode()


FILES = {
    "counts in csv": ("counts.tsv", "counts.csv", lambda t: t.replace("\t", ",").encode()),
    "counts with semicolons": ("counts.tsv", "counts.csv", lambda t: t.replace("\t", ";").encode()),
    "counts with a cleared row": ("counts.tsv", "counts.tsv", cleared),
    "counts that are not gzip": ("counts.tsv", "counts.tsv.gz", str.encode),
    "counts that are gzip": ("counts.tsv", "counts.tsv", lambda t: gzip.compress(t.encode())),
    "counts in GZ": ("counts.tsv", "counts.TSV.GZ", lambda t: gzip.compress(t.encode())),
    "spots in csv": ("spots.tsv", "spots.csv", lambda t: t.replace("\t", ",").encode()),
    "spots with a cleared row": ("spots.tsv", "spots.tsv", cleared),
    "spots that are gzip": ("spots.tsv", "spots.tsv", lambda t: gzip.compress(t.encode())),
    "spots in Unicode text": ("spots.tsv", "spots.txt", lambda t: t.encode("utf-16")),
}


@pytest.mark.parametrize("form", FILES)
def test_tables_of_another_form(folder: Path, form: str):
    old, new, change = FILES[form]
    text = (folder / old).read_text()
    (folder / new).write_bytes(change(text))
    (folder / "manifest.tsv").write_text(HEADER + ROW_1.replace(old, new).replace("human", "Homo sapiens"))
    is_the_section(folder)
    assert not open_source(folder)[0].read().dropped


@pytest.mark.parametrize("name", ["manifest.TSV", "my study.tsv"])
def test_a_manifest_of_another_name(folder: Path, name: str):
    (folder / name).write_text(HEADER + ROW_1)
    is_the_section(folder / name)


def test_a_manifest_with_backslashes(folder: Path):
    (folder / "img").mkdir()
    (folder / "a.png").rename(folder / "img/a.png")
    (folder / "manifest.tsv").write_text(HEADER + ROW_1.replace("a.png", "img\\a.png"))
    is_the_section(folder)


@pytest.mark.parametrize("inside", [True, False])
def test_a_manifest_in_csv_is_named(folder: Path, inside: bool):
    (folder / "manifest.csv").write_text((HEADER + ROW_1).replace("\t", ","))
    with pytest.raises(
        SourceError, match=r"a table with a column sample_id; save it separated by tabs as manifest\.tsv"
    ):
        open_source(folder if inside else folder / "manifest.csv")


def test_a_manifest_that_is_given_as_a_study_is_named(folder: Path):
    (folder / "manifest.csv").write_text((HEADER + ROW_1).replace("\t", ","))
    with pytest.raises(SourceError, match=r"a column sample_id, .*save the table separated by tabs as manifest\.tsv"):
        read_study(folder / "manifest.csv")


def test_a_manifest_in_another_encoding_is_named(folder: Path):
    (folder / "manifest.tsv").write_bytes((HEADER + ROW_1.replace("P1", "Müller")).encode("latin-1"))
    with pytest.raises(SourceError, match=r"not UTF-8 text .*save the table as UTF-8"):
        open_source(folder)


def test_transposed_counts_are_named(folder: Path):
    pd.DataFrame(COUNTS, [f"s{i}" for i in range(N)], SYM).T.to_csv(folder / "counts.tsv", sep="\t")
    (folder / "manifest.tsv").write_text(HEADER + ROW_1)
    with pytest.raises(SourceError, match=r"counts\.tsv: .*it is genes x spots; transpose it"):
        is_the_section(folder)


def test_transposed_legacy_counts_are_named(tmp_path: Path):
    spots = [f"{x}x{y}" for x in range(2, 12) for y in range(2, 12)]
    t = pd.DataFrame(np.ones((100, 2), int), index=spots, columns=["ERBB2", "CD74"])
    t.T.to_csv(tmp_path / "S0.tsv.gz", sep="\t")
    picture(640, 680).save(tmp_path / "S0_HE.jpg")
    (source,) = open_source(tmp_path, overrides={"species": "human", "tissue": "breast"})
    with pytest.raises(SourceError, match="its columns are spots, so it is genes x spots; transpose it"):
        source.read()


def test_decimal_commas_in_the_table_of_a_study(tmp_path: Path):
    (tmp_path / "s.csv").write_text("path;donor;mpp;qv\na;1,5;0,5;20\nb;P2;0.25;\n")
    first, second = read_study(tmp_path / "s.csv")
    assert (first.options.facts.mpp, first.options.facts.donor, first.options.pooling.qv) == (0.5, "1,5", 20)
    assert second.options.facts.mpp == 0.25


# -- names of files -----------------------------------------------------------------------------------------


def renamed(run: Path, change) -> None:
    for path in [p for p in run.rglob("*") if p.is_file()]:
        path.rename(path.with_name(change(path.name)))


@pytest.mark.parametrize("matrix", ["h5", "mex"])
def test_suffixes_in_capitals(run: Path, matrix: str):
    if matrix == "mex":
        (run / "filtered_feature_bc_matrix.h5").unlink()
        mex(run / "filtered_feature_bc_matrix")
    renamed(run, lambda name: name.partition(".")[0] + "." + name.partition(".")[2].upper())
    is_the_run(*read(run))


@pytest.mark.parametrize("csv", [False, True])
def test_xenium_suffixes_in_capitals(tmp_path: Path, csv: bool):
    (expected,) = (s.read() for s in open_source(xenium(tmp_path / "ref", csv), overrides=XEN))
    path = xenium(tmp_path / "run", csv)
    renamed(path, lambda name: name.partition(".")[0] + "." + name.partition(".")[2].upper())
    (section,) = (s.read() for s in open_source(path, overrides=XEN))
    np.testing.assert_array_equal(section.counts.toarray(), expected.counts.toarray())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize(
    "text", ["4.7\t0\t0\n0\t4.7\t0\n0\t0\t1\n", "4,7;0;0\n0;4,7;0\n0;0;1\n", "4.7;0;0\n0;4.7;0\n0;0;1"]
)
def test_an_alignment_that_a_spreadsheet_wrote(tmp_path: Path, text: str, encoding: str):
    path = xenium(tmp_path)
    (expected,) = (s.read() for s in open_source(path, overrides=XEN))
    (path / "S_he_imagealignment.csv").write_text(text, encoding=encoding)
    (section,) = (s.read() for s in open_source(path, overrides=XEN))
    np.testing.assert_allclose(section.xy, expected.xy)


def h5ad(path: Path) -> Path:
    obs = pd.DataFrame({"in_tissue": 1, "array_row": ROW, "array_col": COL}, index=BC)
    a = ad.AnnData(COUNTS.astype(np.float32), obs, pd.DataFrame({"gene_ids": IDS}, index=SYM))
    a.obsm["spatial"] = np.column_stack([X, Y])
    factors = {"tissue_hires_scalef": 1.0, "spot_diameter_fullres": 32.5}
    a.uns["spatial"] = {"lib": {"images": {"hires": np.asarray(picture())}, "scalefactors": factors}}
    a.write_h5ad(path.with_name("written.h5ad"))
    return path.with_name("written.h5ad").rename(path)


@pytest.mark.parametrize("name", ["S1.H5AD", "S1.h5", "S1.hdf5", "S1.h5ad (1)", "S1.H5AD.GZ"])
def test_an_anndata_of_another_name(tmp_path: Path, name: str):
    path = h5ad(tmp_path / name)
    if name.endswith("GZ"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert detect(path)[0].name == "anndata"
    (source,) = open_source(path, overrides={"tissue": "breast", "platform": "Visium"})
    assert source.meta.section_id.startswith("S1")
    np.testing.assert_array_equal(source.read().counts.toarray(), COUNTS)


def test_positions_that_are_shares_of_the_image_are_named(tmp_path: Path):
    path = h5ad(tmp_path / "a.h5ad")
    with h5py.File(path, "a") as file:
        file["obsm/spatial"][...] = np.column_stack([X / 640, Y / 400])
    with pytest.raises(SourceError, match=r"positions lie between 0 and 1, .*store x and y in image px"):
        open_source(path, overrides={"tissue": "breast", "platform": "Visium"})


def test_a_folder_of_anndata_in_capitals(tmp_path: Path):
    for name in ("S1.h5ad", "S2.H5AD"):
        h5ad(tmp_path / name)
    sources = open_source(tmp_path, overrides={"tissue": "breast", "platform": "Visium"})
    assert [s.meta.section_id for s in sources] == ["S1", "S2"]


@pytest.mark.parametrize("name", ["filtered_feature_bc_matrix.h5", "spatial/scalefactors_json.json"])
def test_one_file_of_a_run_names_the_folder(run: Path, name: str):
    with pytest.raises(SourceError, match=r"one file of a source; give its folder, .*run"):
        open_source(run / name, overrides=VIS)


def test_the_folder_of_positions_names_the_folder_above(run: Path):
    with pytest.raises(SourceError, match="give the Space Ranger output folder above it"):
        open_source(run / "spatial", overrides=VIS)


def test_a_second_download_is_named(run: Path):
    name = "filtered_feature_bc_matrix (1).h5"
    (run / "filtered_feature_bc_matrix.h5").rename(run / name)
    with pytest.raises(SourceError, match=r"or rename filtered_feature_bc_matrix \(1\)\.h5 if it is this matrix"):
        open_source(run, overrides=VIS)
    (run / name).rename(run / "filtered_feature_bc_matrix.h5")
    is_the_run(*read(run))


def test_bins_of_visium_hd_in_a_renamed_folder_are_named(tmp_path: Path):
    (tmp_path / "016um/spatial").mkdir(parents=True)
    (tmp_path / "016um/spatial/scalefactors_json.json").write_text('{"bin_size_um": 16}')
    (tmp_path / "016um/spatial/tissue_positions.parquet").write_bytes(b"PAR1")
    with pytest.raises(SourceError, match="name the folder square_016um"):
        open_source(tmp_path / "016um", overrides=VIS)
