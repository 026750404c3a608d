"""Files as laboratories and download sites provide them: 10x Genomics folders, each with its expected value or refusal."""

import gzip
import json
import shutil
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from comtip_shards import SourceError
from comtip_shards.sources import detect, open_source, space_ranger
from comtip_shards.study.headers import section_size
from PIL import Image
from scipy import io as sio
from scipy import sparse as sp

IDS = ["ENSG00000141736", "ENSG00000019582", "ENSG00000119888", "ENSG00000198851", "ENSG00000108821", "ENSG00000026025"]
SYM = ["ERBB2", "CD74", "EPCAM", "CD3E", "COL1A1", "VIM"]
N = 60
ROW, COL = np.divmod(np.arange(N), 10)
COL = COL * 2 + ROW % 2
X, Y = 60 + COL * 25.0, 60 + ROW * 43.3
BC = ["".join("ACGT"[i >> 2 * k & 3] for k in range(16)) + "-1" for i in range(N)]
VIS = {"tissue": "breast", "image": "hires"}
XEN = {"tissue": "breast", "min_pooled": "1"}
SPATIAL = ("tissue_positions.csv", "scalefactors_json.json", "tissue_hires_image.png")
COUNTS = np.random.default_rng(0).poisson(3, (N, 6)).astype(np.int32)
TRANSCRIPTS = 4000


def h5_10x(path: Path, m: np.ndarray, bcs: list[str], ids=IDS, names=SYM, kinds=None) -> None:
    s = sp.csr_matrix(m)
    with h5py.File(path, "w") as f:
        for k, v in {
            "barcodes": np.array(bcs, "S"),
            "data": s.data,
            "indices": s.indices.astype("i8"),
            "indptr": s.indptr.astype("i8"),
            "shape": np.array([len(ids), len(bcs)]),
            "features/id": np.array(ids, "S"),
            "features/name": np.array(names, "S"),
            "features/feature_type": np.array(kinds or ["Gene Expression"] * len(ids), "S"),
        }.items():
            f["matrix/" + k] = v


def mex(folder: Path, prefix: str = "", features: bool = True, packed: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = "".join(f"{i}\t{s}\tGene Expression\n" for i, s in zip(IDS, SYM, strict=True))
    texts = {"barcodes.tsv": "\n".join(BC) + "\n"} | ({"features.tsv": rows} if features else {})
    sio.mmwrite(folder / "m.mtx", sp.coo_matrix(COUNTS.T))
    texts["matrix.mtx"] = (folder / "m.mtx").read_text()
    (folder / "m.mtx").unlink()
    for name, text in texts.items():
        (folder / f"{prefix}{name}{'.gz' if packed else ''}").write_bytes(
            gzip.compress(text.encode()) if packed else text.encode()
        )


def picture(w: int = 640, h: int = 400) -> Image.Image:
    a = np.full((h, w, 3), 235, np.uint8)
    a[30 : h - 30, 30 : w - 30] = (190, 120, 170)
    a[::7, ::5] = (120, 60, 140)
    return Image.fromarray(a)


def positions() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "barcode": BC,
            "in_tissue": 1,
            "array_row": ROW,
            "array_col": COL,
            "pxl_row_in_fullres": Y.round().astype(int),
            "pxl_col_in_fullres": X.round().astype(int),
        }
    )


def visium(d: Path, m: np.ndarray | None = None, **more) -> Path:
    (d / "spatial").mkdir(parents=True)
    ids = more.get("ids", IDS)
    m = np.random.default_rng(1).poisson(3, (N, len(ids))) if m is None and len(ids) != 6 else m
    h5_10x(d / "filtered_feature_bc_matrix.h5", COUNTS if m is None else m, BC, **more)
    positions().to_csv(d / "spatial/tissue_positions.csv", index=False)
    scale = {"spot_diameter_fullres": 32.5, "tissue_hires_scalef": 1.0, "tissue_lowres_scalef": 0.3}
    (d / "spatial/scalefactors_json.json").write_text(json.dumps(scale))
    picture().save(d / "spatial/tissue_hires_image.png")
    return d


def flat(d: Path, to: Path, prefix: str, packed: bool = True, matrix: str = "h5", spatial: str = "") -> Path:
    """Copy a run into one flat folder with prefixed names, as GEO provides it."""
    (to / spatial).mkdir(parents=True, exist_ok=True)
    if matrix == "mex":
        mex(to, prefix)
    else:
        raw = (d / "filtered_feature_bc_matrix.h5").read_bytes()
        name = f"{prefix}filtered_feature_bc_matrix.h5"
        (to / (name + ".gz" if matrix == "h5.gz" else name)).write_bytes(
            gzip.compress(raw) if matrix == "h5.gz" else raw
        )
    for n in SPATIAL:
        raw = (d / "spatial" / n).read_bytes()
        (to / spatial / f"{prefix}{n}{'.gz' if packed else ''}").write_bytes(gzip.compress(raw) if packed else raw)
    return to


def xenium(d: Path, csv: bool = False, prefix: str = "", image: str = "S_") -> Path:
    d.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    description = {"pixel_size": 0.2125, "panel_organism": "Human", "analysis_sw_version": "R&D"}
    (d / f"{prefix}experiment.xenium").write_text(json.dumps(description))
    tx = pd.DataFrame(
        {
            "feature_name": rng.choice([*SYM, "NegControlProbe_1"], TRANSCRIPTS),
            "x_location": rng.uniform(0, 600, TRANSCRIPTS),
            "y_location": rng.uniform(0, 500, TRANSCRIPTS),
            "qv": 30.0,
        }
    )
    cells = pd.DataFrame(
        {
            "cell_id": [f"c{i}-1" for i in range(N)],
            "x_centroid": rng.uniform(0, 600, N),
            "y_centroid": rng.uniform(0, 500, N),
        }
    )
    for t, what in ((tx, "transcripts"), (cells, "cells")):
        if csv:
            t.to_csv(d / f"{prefix}{what}.csv.gz", index=False)
        else:
            t.to_parquet(d / f"{prefix}{what}.parquet")
    h5_10x(d / f"{prefix}cell_feature_matrix.h5", COUNTS, list(cells.cell_id))
    picture(700, 600).save(d / f"{image}he_image.tif")
    np.savetxt(d / f"{image}he_imagealignment.csv", np.diag([4.7, 4.7, 1]), delimiter=",")
    return d


def read(path: Path, **facts: str):
    return [s.read() for s in open_source(path, overrides=VIS | facts)]


def is_the_run(section) -> None:
    """Check that the section has the counts, ids and positions of :func:`visium`."""
    assert section.spot_ids == BC
    assert section.gene_ids == IDS
    np.testing.assert_array_equal(section.counts.toarray(), COUNTS)
    np.testing.assert_allclose(section.xy, np.column_stack([X, Y]), atol=0.51)
    assert section.meta.mpp == pytest.approx(2.0, rel=0.01)
    with section.open_slide() as slide:
        assert slide.size == (640, 400)


# -- packaging: Space Ranger --------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return visium(tmp_path / "run")


@pytest.mark.parametrize("matrix", ["h5", "h5.gz", "mex"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("spatial", ["", "spatial", "GSM1_A_spatial"])
def test_geo_files_flat_prefixed_and_packed(tmp_path: Path, run: Path, matrix: str, packed: bool, spatial: str):
    path = flat(run, tmp_path / "geo", "GSM1_A_", packed, matrix, spatial)
    assert detect(path)[0].name == "space_ranger"
    (section,) = read(path)
    is_the_run(section)
    assert section.meta.section_id == ("GSM1_A" if not spatial else "geo")
    assert any(n.startswith("files: GSM1_A_") for n in section.notes)


def test_several_samples_in_one_folder_are_several_sections(tmp_path: Path, run: Path):
    path = tmp_path / "geo"
    for i, prefix in enumerate(["GSM1_A_", "GSM2_B_"]):
        visium(tmp_path / f"r{i}", COUNTS + i)
        flat(tmp_path / f"r{i}", path, prefix)
    one, two = read(path)
    is_the_run(one)
    assert (one.meta.section_id, two.meta.section_id) == ("GSM1_A", "GSM2_B")
    np.testing.assert_array_equal(two.counts.toarray(), COUNTS + 1)
    picture().save(tmp_path / "full_GSM2_B.png")
    stated = open_source(
        path, samples=["GSM2_B"], overrides={"tissue": "breast", "image": str(tmp_path / "full_{id}.png")}
    )
    assert [s.meta.section_id for s in stated] == ["GSM2_B"]
    with pytest.raises(SourceError, match=r"`image` is one file but there are 2 sections; use \{id\}"):
        open_source(path, overrides={"tissue": "breast", "image": str(tmp_path / "full_GSM2_B.png")})


def test_samples_that_share_one_file_of_features(tmp_path: Path, run: Path):
    path = tmp_path / "geo"
    for prefix in ("GSM1_A_", "GSM2_B_"):
        flat(run, path, prefix)
        (path / f"{prefix}filtered_feature_bc_matrix.h5").unlink()
        mex(path, prefix, features=False)
    mex(tmp_path / "own")
    shutil.copy(tmp_path / "own/features.tsv.gz", path / "GSE9_features.tsv.gz")
    for section in read(path):
        is_the_run(section)


def test_a_sample_without_a_matrix_is_named(tmp_path: Path, run: Path):
    path = tmp_path / "geo"
    for prefix in ("GSM1_A_", "GSM2_B_", "GSM3_C_"):
        flat(run, path, prefix)
    (path / "GSM2_B_filtered_feature_bc_matrix.h5").unlink()
    with pytest.raises(SourceError, match=r"no count matrix for GSM2_B .*same prefix"):
        read(path)


@pytest.mark.parametrize("suffix", ["tar.gz", "tar", "tgz"])
def test_the_archives_of_the_vendor_site_are_read(tmp_path: Path, run: Path, suffix: str):
    path = tmp_path / "site"
    path.mkdir()
    shutil.copy(run / "filtered_feature_bc_matrix.h5", path)
    with tarfile.open(path / f"V1_Breast_spatial.{suffix}", "w" if suffix == "tar" else "w:gz") as t:
        t.add(run / "spatial", "spatial")
    (section,) = read(path)
    is_the_run(section)


@pytest.mark.parametrize("kind", ["bz2", "xz"])
def test_an_archive_that_is_not_read_is_named(tmp_path: Path, run: Path, kind: str):
    """The message must not ask for the folder that is in the archive."""
    path = tmp_path / "site"
    path.mkdir()
    shutil.copy(run / "filtered_feature_bc_matrix.h5", path)
    with tarfile.open(path / f"spatial.tar.{kind}", f"w:{kind}") as t:
        t.add(run / "spatial", "spatial")
    with pytest.raises(SourceError, match=f"spatial.tar.{kind} is an archive; unpack it into this folder first"):
        detect(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("header", "if a table has a header, remove this line"),
        ("transposed", "rows must be features: write the transposed matrix"),
    ],
)
def test_a_matrix_of_another_shape_is_explained(tmp_path: Path, run: Path, change: str, message: str):
    (run / "filtered_feature_bc_matrix.h5").unlink()
    folder = run / "filtered_feature_bc_matrix"
    mex(folder, packed=False)
    if change == "header":
        for name, header in (("barcodes.tsv", "barcode"), ("features.tsv", "id\tname\ttype")):
            (folder / name).write_text(f"{header}\n{(folder / name).read_text()}")
    else:
        sio.mmwrite(folder / "matrix.mtx", sp.coo_matrix(COUNTS))
    with pytest.raises(SourceError, match=f"the matrix shape is .*; {message}"):
        read(run)


def test_a_matrix_archive_is_read(tmp_path: Path, run: Path):
    path = tmp_path / "site"
    shutil.copytree(run / "spatial", path / "spatial")
    mex(tmp_path / "filtered_feature_bc_matrix")
    with tarfile.open(path / "V1_Breast_filtered_feature_bc_matrix.tar.gz", "w:gz") as t:
        t.add(tmp_path / "filtered_feature_bc_matrix", "filtered_feature_bc_matrix")
    is_the_run(read(path)[0])


def test_an_archive_cannot_write_elsewhere(tmp_path: Path, run: Path):
    path = tmp_path / "site"
    path.mkdir()
    shutil.copy(run / "filtered_feature_bc_matrix.h5", path)
    with tarfile.open(path / "spatial.tar.gz", "w:gz") as t:
        t.add(run / "spatial", "spatial")
        t.add(run / "spatial/scalefactors_json.json", "../escaped.json")
        t.add(run / "spatial/scalefactors_json.json", "/escaped.json")
        link = tarfile.TarInfo("spatial/link.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        t.addfile(link)
    is_the_run(read(path)[0])
    assert not Path("/escaped.json").exists()


@pytest.mark.parametrize("where", ["outs", "x/outs", "breast"])
def test_the_folder_above_the_data_is_enough(tmp_path: Path, where: str):
    path = tmp_path / "given"
    visium(path / where)
    is_the_run(read(path)[0])


def test_a_folder_of_several_runs_names_them(tmp_path: Path):
    for name in ("A", "B"):
        visium(tmp_path / "study" / name)
    with pytest.raises(SourceError, match=r"contains sources: A \(space_ranger\), B \(space_ranger\)"):
        detect(tmp_path / "study")


@pytest.mark.parametrize("suffix", ["csv.gz", "parquet"])
def test_one_table_of_positions_in_two_forms(run: Path, suffix: str):
    second = run / f"spatial/tissue_positions.{suffix}"
    table = positions()
    table.to_parquet(second) if suffix == "parquet" else table.to_csv(second, index=False)
    is_the_run(read(run)[0])
    table["pxl_row_in_fullres"] += 40
    table.to_parquet(second) if suffix == "parquet" else table.to_csv(second, index=False)
    with pytest.raises(SourceError, match=r"tissue_positions\.\S+ and tissue_positions\.\S+ differ; remove"):
        read(run)


@pytest.mark.parametrize(
    ("sep", "encoding", "end"),
    [(";", "utf-8", "\n"), ("\t", "utf-8-sig", "\r\n"), (",", "utf-16", "\n"), (", ", "utf-8", "\r\n")],
)
def test_positions_that_a_spreadsheet_wrote(run: Path, sep: str, encoding: str, end: str):
    path = run / "spatial/tissue_positions.csv"
    text = positions().to_csv(index=False).replace(",", sep).replace("\n", end)
    path.write_bytes(text.encode(encoding))
    is_the_run(read(run)[0])


def test_a_table_of_positions_with_a_billion_rows_is_not_read(run: Path, monkeypatch: pytest.MonkeyPatch):
    """Parquet stores repeated values once, so a file of some kB can hold them."""
    (run / "spatial/tissue_positions.csv").unlink()
    positions().to_parquet(run / "spatial/tissue_positions.parquet", index=False)
    is_the_run(read(run)[0])
    monkeypatch.setattr(space_ranger, "MAX_ROWS", N - 1)
    with pytest.raises(SourceError, match=r"tissue_positions\.parquet: 60 rows with .* at most 14,336 spots"):
        read(run)


def test_files_of_the_operating_system_are_never_data(run: Path):
    for p in list(run.rglob("*")):
        if p.is_file():
            (p.parent / f"._{p.name}").write_bytes(b"\0\5\x16\7" + bytes(200))
    for server in ("__MACOSX", "@eaDir", "#recycle"):
        (run / server / "spatial").mkdir(parents=True)
        (run / server / "GSM1_filtered_feature_bc_matrix.h5").write_bytes(b"x")
    (run / "~$tissue_positions.csv").write_bytes(b"x")
    (run / ".DS_Store").write_bytes(b"x")
    is_the_run(read(run)[0])


def test_scale_factors_that_r_wrote(run: Path):
    """R's jsonlite writes numbers as lists of one."""
    path = run / "spatial/scalefactors_json.json"
    factors = json.loads(path.read_text())
    path.write_text(json.dumps({k: [v] if k != "tissue_lowres_scalef" else str(v) for k, v in factors.items()}))
    is_the_run(read(run)[0])


def test_scale_factors_that_are_no_numbers_count_as_missing(run: Path):
    path = run / "spatial/scalefactors_json.json"
    factors = json.loads(path.read_text()) | {"spot_diameter_fullres": float("nan"), "microns_per_pixel": float("inf")}
    path.write_text(json.dumps(factors))
    is_the_run(read(run)[0])


def test_vendor_pictures_are_not_taken_for_the_microscope_image(run: Path):
    for name in ("detected_tissue_image.jpg", "aligned_tissue_image.jpg", "cytassist_image.tiff"):
        picture().save(run / name)
    with pytest.raises(SourceError, match="no full-resolution image; set `image`"):
        read(run, image="")


# -- references and old matrices ----------------------------------------------------------------------------

TWO_IDS = ["GRCh38_" + i for i in IDS] + ["mm10___ENSMUSG00000018209", "mm10___ENSMUSG00000026395"]
TWO_NAMES = ["GRCh38_" + s for s in SYM] + ["mm10___Stk4", "mm10___Ptprc"]


def test_the_stated_species_is_taken_from_two_genomes(tmp_path: Path):
    m = np.concatenate([COUNTS, COUNTS[:, :2]], axis=1)
    path = visium(tmp_path / "x", m, ids=TWO_IDS, names=TWO_NAMES)
    (human,) = read(path, species="human")
    is_the_run(human)
    assert human.gene_symbols == SYM
    share = COUNTS[:, :2].sum() / m.sum()
    assert f"2 features excluded: genome mm10 (mouse), with {share:.1%} of the counts" in human.notes
    (mouse,) = read(path, species="mouse")
    assert (mouse.gene_ids, mouse.gene_symbols) == ([i[7:] for i in TWO_IDS[6:]], ["Stk4", "Ptprc"])
    np.testing.assert_array_equal(mouse.counts.toarray(), COUNTS[:, :2])
    with pytest.raises(SourceError, match="genes of two species, 6 of human and 2 of mouse; set `species`"):
        read(path)


def test_a_prefix_of_one_genome_is_stripped(tmp_path: Path):
    is_the_run(read(visium(tmp_path / "x", ids=TWO_IDS[:6], names=TWO_NAMES[:6]))[0])


def test_symbols_of_two_genomes_without_ensembl_ids(tmp_path: Path):
    m = np.concatenate([COUNTS, COUNTS[:, :2]], axis=1)
    names = ["hg19_" + s for s in SYM] + ["mm10_Stk4", "mm10_Ptprc"]
    (section,) = read(visium(tmp_path / "x", m, ids=names, names=names), species="human")
    assert section.gene_ids == SYM
    np.testing.assert_array_equal(section.counts.toarray(), COUNTS)


def test_a_stated_species_that_the_ids_contradict_is_refused(run: Path):
    with pytest.raises(
        SourceError, match="stated as mouse, but gene ids such as ENSG00000141736 are of human; set `species` to"
    ):
        read(run, species="mouse")


def legacy_h5(path: Path, genomes: dict[str, tuple[np.ndarray, list[str], list[str], list[str]]]) -> None:
    with h5py.File(path, "w") as f:
        for genome, (m, bcs, ids, names) in genomes.items():
            s = sp.csr_matrix(m)
            for k, v in {
                "barcodes": np.array(bcs, "S"),
                "genes": np.array(ids, "S"),
                "gene_names": np.array(names, "S"),
                "data": s.data,
                "indices": s.indices,
                "indptr": s.indptr,
                "shape": [len(ids), len(bcs)],
            }.items():
                f[f"{genome}/{k}"] = v


def test_the_h5_of_cell_ranger_2(run: Path):
    legacy_h5(run / "filtered_feature_bc_matrix.h5", {"GRCh38": (COUNTS, BC, IDS, SYM)})
    is_the_run(read(run)[0])


def test_the_h5_of_cell_ranger_2_with_two_genomes(run: Path):
    mouse = (COUNTS[10:, :1] + 1, BC[10:], ["ENSMUSG00000018209"], ["Stk4"])
    legacy_h5(run / "filtered_feature_bc_matrix.h5", {"GRCh38": (COUNTS, BC, IDS, SYM), "mm10": mouse})
    is_the_run(read(run, species="human")[0])
    (section,) = read(run, species="mouse")
    assert section.counts.toarray()[:, 0].tolist() == [0] * 10 + (COUNTS[10:, 0] + 1).tolist()


def test_antibodies_are_excluded(tmp_path: Path):
    m = np.concatenate([COUNTS, COUNTS[:, :1]], axis=1)
    kinds = ["Gene Expression"] * 6 + ["Antibody Capture"]
    run = visium(tmp_path / "x", m, ids=[*IDS, "CD3E"], names=[*SYM, "CD3E"], kinds=kinds)
    (section,) = read(run)
    is_the_run(section)
    assert "1 features are not genes: Antibody Capture" in section.notes
    assert section_size(open_source(run, overrides=VIS)[0]).genes == 6


@pytest.mark.parametrize("column", [0, 6])
def test_only_counts_of_genes_must_be_counts(tmp_path: Path, column: int):
    """A value that is not finite is refused for a gene by name, and does not matter for an antibody."""
    values = np.concatenate([COUNTS, COUNTS[:, :1]], axis=1).astype(np.float32)
    values[2, column] = np.nan
    kinds = ["Gene Expression"] * 6 + ["Antibody Capture"]
    path = visium(tmp_path / "x", np.ones(values.shape, int), ids=[*IDS, "CD3E"], names=[*SYM, "CD3E"], kinds=kinds)
    with h5py.File(path / "filtered_feature_bc_matrix.h5", "r+") as file:
        del file["matrix/data"]
        file["matrix/data"] = values.ravel()
    if column == 6:
        is_the_run(read(path)[0])
    else:
        with pytest.raises(SourceError, match=f"nan.*{BC[2]}.*{IDS[0]}"):
            read(path)


# -- missing files and stated facts -------------------------------------------------------------------------


def test_a_missing_file_of_scale_factors_is_called_missing(tmp_path: Path, run: Path):
    (run / "spatial/scalefactors_json.json").unlink()
    with pytest.raises(
        SourceError, match=r"scalefactors_json\.json is missing or empty, .*set `image` to the microscope"
    ):
        read(run)
    picture().save(tmp_path / "full.png")
    (section,) = read(run, image=str(tmp_path / "full.png"))
    is_the_run(section)
    assert any("no scalefactors_json.json" in n for n in section.notes)


def hd(path: Path, table: str = "parquet", side: int = 32) -> tuple[Path, np.ndarray]:
    b = path / "binned_outputs/square_016um"
    (b / "spatial").mkdir(parents=True)
    r, c = np.divmod(np.arange(side * side), side)
    bc = [f"s_016um_{i:05d}_{j:05d}-1" for i, j in zip(r, c, strict=True)]
    frame = pd.DataFrame(
        {
            "barcode": bc,
            "in_tissue": 1,
            "array_row": r,
            "array_col": c,
            "pxl_row_in_fullres": 50 + r * 8.0,
            "pxl_col_in_fullres": 50 + c * 8.0,
        }
    )
    target = b / f"spatial/tissue_positions.{table}"
    frame.to_parquet(target) if table == "parquet" else frame.to_csv(target, index=False)
    m = np.random.default_rng(3).poisson(3, (side * side, 6))
    h5_10x(b / "filtered_feature_bc_matrix.h5", m, bc)
    picture(400, 400).save(path / "hd.png")
    return path, m


@pytest.mark.parametrize("mpp", ["2.0", ""])
@pytest.mark.parametrize("table", ["parquet", "csv", "csv.gz"])
def test_visium_hd_without_scale_factors(tmp_path: Path, mpp: str, table: str):
    path, m = hd(tmp_path / "hd", table)
    facts = {"tissue": "breast", "image": str(path / "hd.png")} | ({"mpp": mpp} if mpp else {})
    section = open_source(path, overrides=facts)[0].read()
    assert section.meta.mpp == pytest.approx(2.0)
    blocks = m.reshape(4, 8, 4, 8, 6).sum((1, 3)).reshape(16, 6)
    np.testing.assert_array_equal(section.counts.toarray(), blocks)
    np.testing.assert_allclose(section.xy[0], [50 + 3.5 * 8] * 2)
    origin = "as stated; the pitch of bins gives 2.0000" if mpp else "from the pitch of bins of 16 um"
    assert any(origin in n for n in section.notes)
    with pytest.raises(SourceError, match=r"2\.0000 um per full-resolution px, but `mpp` is 20; omit `mpp`"):
        open_source(path, overrides=facts | {"mpp": "20"})


def test_flat_files_of_visium_hd_are_named(tmp_path: Path):
    path, _ = hd(tmp_path / "hd")
    flat_folder, b = tmp_path / "geo", path / "binned_outputs/square_016um"
    flat_folder.mkdir()
    shutil.copy(b / "filtered_feature_bc_matrix.h5", flat_folder / "GSM1_filtered_feature_bc_matrix.h5")
    shutil.copy(b / "spatial/tissue_positions.parquet", flat_folder / "GSM1_tissue_positions.parquet")
    with pytest.raises(SourceError, match=r"bins of Visium HD; put the files into binned_outputs/square_016um/"):
        read(flat_folder)


# -- packaging: Xenium --------------------------------------------------------------------------------------


def xenium_counts(section) -> int:
    assert section.gene_ids == IDS
    assert section.meta.platform == "Xenium"
    return int(section.counts.sum())


@pytest.fixture
def expected(tmp_path: Path) -> int:
    """Number of gene transcripts in :func:`xenium`."""
    return xenium_counts(open_source(xenium(tmp_path / "plain"), overrides=XEN)[0].read())


@pytest.mark.parametrize("prefix", ["", "Xenium_V1_Breast_"])
@pytest.mark.parametrize("csv", [False, True])
@pytest.mark.parametrize("pool_from", ["transcripts", "cells"])
def test_xenium_with_prefixes_and_csv(tmp_path: Path, expected: int, prefix: str, csv: bool, pool_from: str):
    path = xenium(tmp_path / "x", csv=csv, prefix=prefix)
    assert detect(path)[0].name == "xenium"
    section = open_source(path, overrides=XEN | {"pool_from": pool_from})[0].read()
    assert section.meta.section_id == "x"
    assert xenium_counts(section) == (expected if pool_from == "transcripts" else COUNTS.sum())


def test_several_xenium_runs_in_one_folder(tmp_path: Path, expected: int):
    for prefix in ("GSM1_A_", "GSM2_B_"):
        xenium(tmp_path / "x", prefix=prefix, image=prefix)
    found = [s.read() for s in open_source(tmp_path / "x", overrides=XEN)]
    assert [s.meta.section_id for s in found] == ["GSM1_A", "GSM2_B"]
    assert [xenium_counts(s) for s in found] == [expected] * 2


def test_xenium_parquet_and_csv_of_one_table(tmp_path: Path, expected: int):
    path = xenium(xenium(tmp_path / "x"), csv=True)
    assert xenium_counts(open_source(path, overrides=XEN)[0].read()) == expected


def test_xenium_without_its_description(tmp_path: Path, expected: int):
    path = xenium(tmp_path / "x")
    (path / "experiment.xenium").unlink()
    section = open_source(path, overrides=XEN)[0].read()
    assert xenium_counts(section) == expected
    assert any("no experiment.xenium: assumed 0.2125" in n for n in section.notes)


def test_a_missing_xenium_table_is_called_missing(tmp_path: Path):
    path = xenium(tmp_path / "x")
    (path / "cells.parquet").unlink()
    with pytest.raises(SourceError, match=r"cells\.parquet: no such file; copy the table of cells"):
        open_source(path, overrides=XEN | {"pool_from": "cells"})


def test_appledouble_files_of_a_xenium_run_are_ignored(tmp_path: Path, expected: int):
    path = xenium(tmp_path / "x")
    for p in list(path.iterdir()):
        (path / f"._{p.name}").write_bytes(b"\0\5\x16\7" + bytes(200))
    assert xenium_counts(open_source(path, overrides=XEN)[0].read()) == expected


# -- files that are not data --------------------------------------------------------------------------------

NOT_DATA = {
    "github": (b"404: Not Found", r"an error message of a server \(404: not found\)"),
    "gated": (b"Access to dataset x/y is restricted. You must log in", r"an error message of a server \(access to"),
    "json": (b'{"error":"Repository not found"}', "an error message of a server"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n", "Git LFS pointer.*git lfs pull"),
    "html": (b"<!DOCTYPE html><html><body>Login</body></html>", "web page.*download it again"),
    "html with BOM": (b"\xef\xbb\xbf\n <html><head></head></html>", "web page"),
    "s3": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "error message of a server"),
    "empty": (b"", r"empty \(0 bytes\)"),
    "zeros": (bytes(8000), "zero bytes only.*interrupted"),
}


@pytest.mark.parametrize("kind", NOT_DATA)
@pytest.mark.parametrize("name", ["filtered_feature_bc_matrix.h5", *(f"spatial/{n}" for n in SPATIAL)])
def test_files_that_are_not_data_are_named(run: Path, name: str, kind: str):
    content, message = NOT_DATA[kind]
    (run / name).write_bytes(content)
    with pytest.raises(SourceError, match=f"{Path(name).name}.*{message}"):
        read(run)


@pytest.mark.parametrize("name", ["filtered_feature_bc_matrix.h5", *(f"spatial/{n}" for n in SPATIAL)])
def test_truncated_packed_files_are_named(tmp_path: Path, run: Path, name: str):
    path = flat(run, tmp_path / "geo", "GSM1_", packed=True, matrix="h5.gz")
    file = path / f"GSM1_{Path(name).name}.gz"
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(SourceError, match=rf"{file.name}.*again"):
        read(path)


@pytest.mark.parametrize(
    "name", ["experiment.xenium", "transcripts.parquet", "cell_feature_matrix.h5", "S_he_image.tif"]
)
@pytest.mark.parametrize("kind", ["lfs", "html", "empty"])
def test_xenium_files_that_are_not_data_are_named(tmp_path: Path, name: str, kind: str):
    path = xenium(tmp_path / "x")
    content, message = NOT_DATA[kind]
    (path / name).write_bytes(content)
    with pytest.raises(SourceError, match=f"{name}.*{message}"):
        open_source(path, overrides=XEN)[0].read()


UNKNOWN = {
    "a.tar": ("tar", "a tar archive; unpack it first"),
    "a.zip": (b"PK\x03\x04" + bytes(40), "a zip archive; unpack it first"),
    "a.rds": (gzip.compress(b"RDX3" * 20), "R objects cannot be read; write the object as .h5ad"),
    "a.h5ad": (NOT_DATA["lfs"][0], "Git LFS pointer"),
    "a.xlsx": (b"PK\x03\x04" + bytes(40), "a workbook of a spreadsheet, which cannot be read; save the table as csv"),
    "a.h5ad.crdownload": (b"\x89HDF\r\n\x1a\n" + bytes(9), "a download that did not end; download the file again"),
    "a.webloc": (b"<?xml version='1.0'?><plist/>", "a shortcut to a web page, not the file itself"),
    "a.h5ad.dvc": (b"outs:\n- md5: a\n", "a DVC pointer, not the file itself; run dvc pull"),
    "a.tar.bz2": (b"BZh9" + bytes(40), "a bzip2 file; decompress it first"),
    "a.tar.xz": (b"\xfd7zXZ\0" + bytes(40), "an xz file; decompress it first"),
    "a.loom": (b"x" * 20, "write the object as .h5ad"),
    "V1_filtered_feature_bc_matrix.h5": (
        b"\x89HDF\r\n\x1a\n" + bytes(9),
        "a count matrix without positions; put spatial/",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("inside", [False, True])
def test_unknown_files_are_explained(tmp_path: Path, name: str, inside: bool):
    content, message = UNKNOWN[name]
    path = tmp_path / "d" / name
    path.parent.mkdir()
    if content == "tar":
        with tarfile.open(path, "w") as t:
            t.add(__file__, "x.py")
    else:
        path.write_bytes(content)
    if inside:
        message = (
            r"a\.[\w.]+ is an archive; unpack it" if name.startswith(("a.tar", "a.zip")) else f"{name}: .*{message}"
        )
    with pytest.raises(SourceError, match=message):
        detect(path.parent if inside else path)


def test_an_empty_folder_is_called_empty(tmp_path: Path):
    with pytest.raises(SourceError, match="the folder is empty"):
        detect(tmp_path)
