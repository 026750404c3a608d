"""AnnData files as they occur: other keys, layers, versions, encodings; each with its expected value or refusal."""

import gzip
import json
import shutil
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from comtip_shards import SourceError
from comtip_shards.genes.identifiers import map_genes
from comtip_shards.sections.facts import CountOptions
from comtip_shards.sources import detect, open_source
from comtip_shards.sources.anndata_parts.preview import preview_genes
from comtip_shards.sources.anndata_parts.store import open_store
from PIL import Image
from scipy import sparse as sp

from testkit.option_reads import declared, fields_read

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = ["ENSG00000141736", "ENSG00000019582", "ENSG00000119888", "ENSG00000198851", "ENSG00000108821", "ENSG00000026025"]
SYM = ["ERBB2", "CD74", "EPCAM", "CD3E", "COL1A1", "VIM"]
N = 60
ROW, COL = np.divmod(np.arange(N), 10)
COL = COL * 2 + ROW % 2
X, Y = 60 + COL * 25.0, 60 + ROW * 43.3
XY = np.column_stack([X, Y])
BC = ["".join("ACGT"[i >> 2 * k & 3] for k in range(16)) + "-1" for i in range(N)]
FACTS = {"tissue": "breast", "platform": "Visium"}
COUNTS = np.random.default_rng(0).poisson(3, (N, 6)).astype(np.float32)
FACTORS = {"tissue_hires_scalef": 1.0, "spot_diameter_fullres": 32.5}


def picture(w: int = 640, h: int = 400) -> np.ndarray:
    a = np.full((h, w, 3), 235, np.uint8)
    a[30 : h - 30, 30 : w - 30] = (190, 120, 170)
    a[::7, ::5] = (120, 60, 140)
    return a


def adata() -> ad.AnnData:
    obs = pd.DataFrame({"in_tissue": 1, "array_row": ROW, "array_col": COL}, index=BC)
    a = ad.AnnData(COUNTS.copy(), obs, pd.DataFrame({"gene_ids": IDS}, index=SYM))
    a.obsm["spatial"] = XY.copy()
    a.uns["spatial"] = {"lib": {"images": {"hires": picture()}, "scalefactors": dict(FACTORS)}}
    return a


def write(tmp_path: Path, a: ad.AnnData, name: str = "a") -> Path:
    path = tmp_path / f"{name}.h5ad"
    a.write_h5ad(path)
    return path


def read(path: Path, **facts: str):
    (source,) = open_source(path, overrides=FACTS | facts)
    return source.read()


def is_the_data(section, counts: np.ndarray = COUNTS) -> None:
    assert section.spot_ids == BC
    assert section.meta.species == "human"
    np.testing.assert_array_equal(section.counts.toarray(), counts)
    np.testing.assert_allclose(section.xy, XY)
    assert section.meta.mpp == pytest.approx(2.0, rel=0.01)
    with section.open_slide() as slide:
        assert slide.size == (640, 400)


# -- libraries ----------------------------------------------------------------------------------------------


def test_cellxgene_visium(tmp_path: Path):
    a = adata()
    a.raw = a.copy()
    a.X = np.log1p(a.X)
    a.var = pd.DataFrame({"feature_name": SYM, "feature_biotype": "gene"}, index=IDS)
    a.raw.var.index = IDS
    a.uns["spatial"]["is_single"] = True
    a.obs["assay"], a.obs["organism"], a.obs["tissue"] = "Visium Spatial Gene Expression V1", "Homo sapiens", "breast"
    section = open_source(write(tmp_path, a))[0].read()
    is_the_data(section)
    assert (section.meta.platform, section.meta.section_id) == ("Visium", "a")
    assert any("counts are those of raw/X" in n for n in section.notes)


def test_cellxgene_slide_seq_has_no_library(tmp_path: Path):
    a = adata()
    a.uns["spatial"] = {"is_single": True}
    path = write(tmp_path, a)
    with pytest.raises(SourceError, match=r"no image in uns\['spatial'\]; set `image`"):
        read(path)
    Image.fromarray(picture()).save(tmp_path / "full.png")
    section = read(path, image=str(tmp_path / "full.png"))
    np.testing.assert_array_equal(section.counts.toarray(), COUNTS)


@pytest.mark.parametrize("column", ["library_id", "batch", "slide"])
@pytest.mark.parametrize("category", [True, False])
def test_libraries_are_distinguished_by_any_column(tmp_path: Path, column: str, category: bool):
    a, b = adata(), adata()
    b.X = b.X + 1
    both = ad.concat({"A": a, "B": b}, label=column, index_unique="-")
    both.var = a.var
    both.obs["other"] = 1
    if not category:
        both.obs[column] = both.obs[column].astype(str)
    both.uns["spatial"] = {"A": a.uns["spatial"]["lib"], "B": a.uns["spatial"]["lib"], "is_single": False}
    one, two = (s.read() for s in open_source(write(tmp_path, both), overrides=FACTS))
    assert (one.meta.section_id, two.meta.section_id) == ("A", "B")
    np.testing.assert_array_equal(one.counts.toarray(), COUNTS)
    np.testing.assert_array_equal(two.counts.toarray(), COUNTS + 1)


def test_two_columns_that_disagree_are_refused(tmp_path: Path):
    a, b = adata(), adata()
    both = ad.concat({"A": a, "B": b}, label="batch", index_unique="-")
    both.var = a.var
    both.obs["slide"] = both.obs["batch"].to_numpy()[::-1]
    both.uns["spatial"] = {"A": a.uns["spatial"]["lib"], "B": a.uns["spatial"]["lib"]}
    with pytest.raises(SourceError, match=r"assign spots to libraries differently; add obs\['library_id'\]"):
        open_source(write(tmp_path, both), overrides=FACTS)


# -- species and genes --------------------------------------------------------------------------------------


def symbols_only() -> ad.AnnData:
    a = adata()
    a.var = pd.DataFrame(index=SYM)
    return a


@pytest.mark.parametrize("how", ["option", "organism", "species", "ontology", "uns", "uns ontology"])
def test_symbols_only_with_the_species_stated(tmp_path: Path, how: str):
    a = symbols_only()
    stated = {}
    if how == "option":
        stated = {"species": "human"}
    elif how == "uns":
        a.uns["organism"] = "Homo sapiens"
    elif how == "uns ontology":
        a.uns["organism_ontology_term_id"] = "NCBITaxon:9606"
    else:
        value = {"organism": "Homo sapiens", "species": "homo_sapiens", "ontology": "NCBITaxon:9606"}[how]
        a.obs[how if how != "ontology" else "organism_ontology_term_id"] = value
    section = read(write(tmp_path, a), **stated)
    is_the_data(section)
    assert section.gene_ids == SYM
    if how == "option":
        with pytest.raises(SourceError, match=r"species not detected, because gene ids such as ERBB2.*set `species`"):
            read(write(tmp_path, a))


def test_a_stated_species_that_the_ids_contradict(tmp_path: Path):
    path = write(tmp_path, adata())
    with pytest.raises(
        SourceError, match=r"stated as mouse, but gene ids such as ENSG.* are of human; set `species` to human"
    ):
        read(path, species="mouse")


def test_two_genomes(tmp_path: Path):
    a = adata()
    ids = ["GRCh38_" + i for i in IDS[:4]] + ["mm10___ENSMUSG00000018209", "mm10___ENSMUSG00000026395"]
    a.var = pd.DataFrame({"gene_ids": ids}, index=[f"GRCh38_{s}" for s in SYM[:4]] + ["mm10___Stk4", "mm10___Ptprc"])
    section = read(write(tmp_path, a), species="human")
    is_the_data(section, COUNTS[:, :4])
    assert (section.gene_ids, section.gene_symbols) == (IDS[:4], SYM[:4])
    share = COUNTS[:, 4:].sum() / COUNTS.sum()
    assert f"2 features excluded: genome mm10 (mouse), with {share:.1%} of the counts" in section.notes


@pytest.mark.parametrize(
    ("human", "mouse"),
    [("GRCh38-", "mm10---"), ("GRCh38.", "mm10..."), ("GRCh38-2020-A-", "mm10-2020-A-"), ("HUMAN_", "MOUSE_")],
)
def test_genomes_after_seurat_and_r(tmp_path: Path, human: str, mouse: str):
    """Seurat changes underscores to hyphens, R changes hyphens to dots, and some references name the species."""
    a = adata()
    a.var = pd.DataFrame(index=[*(human + s for s in SYM[:4]), mouse + "Stk4", mouse + "Ptprc"])
    section = read(write(tmp_path, a), species="human")
    is_the_data(section, COUNTS[:, :4])
    assert section.gene_ids == SYM[:4]
    assert any(note.startswith("2 features excluded: genome ") for note in section.notes)


def test_double_symbols_are_summed(tmp_path: Path):
    a = adata()
    a.var = pd.DataFrame(index=["ERBB2", "CD74", "TBCE", "TBCE", "COL1A1", "VIM"])
    section = read(write(tmp_path, a), species="human")
    is_the_data(section, np.column_stack([COUNTS[:, :2], COUNTS[:, 2] + COUNTS[:, 3], COUNTS[:, 4:]]))
    assert any(n.startswith("1 columns have the identifier of another one") for n in section.notes)


def test_names_of_spreadsheets_and_r(tmp_path: Path):
    a = adata()
    a.var = pd.DataFrame(index=["2-Sep", "HLA.A", "MT.CO1", "NKX2.1", "TBCE", "TBCE-1"])
    section = read(write(tmp_path, a), species="human")
    genes = map_genes(section.gene_ids, "human", symbols=section.gene_symbols)
    assert genes.keys == [f"human:{s}" for s in ("SEPTIN2", "HLA-A", "MT-CO1", "NKX2-1", "TBCE")]
    want = np.column_stack([COUNTS[:, :4], COUNTS[:, 4] + COUNTS[:, 5]])
    np.testing.assert_array_equal(genes.sum_columns(section.counts).toarray(), want)


# -- counts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["raw_counts", "raw_count", "raw", "umi", "Counts"])
def test_counts_in_a_layer_of_another_name(tmp_path: Path, layer: str):
    a = adata()
    a.layers[layer] = sp.csr_matrix(a.X)
    a.X = np.log1p(a.X)
    section = read(write(tmp_path, a))
    is_the_data(section)
    assert any(f"counts are those of layers/{layer}, the only layer" in n for n in section.notes)


def test_layers_that_might_be_counts_are_named(tmp_path: Path):
    a = adata()
    a.layers["spliced"], a.layers["unspliced"] = a.X + 1, a.X + 2
    a.X = np.log1p(a.X)
    path = write(tmp_path, a)
    with pytest.raises(
        SourceError, match=r"values that are not counts, the first is \d\.\d+ .*`layer` .*\(spliced, unspliced\)"
    ):
        read(path)
    is_the_data(read(path, layer="unspliced"), COUNTS + 2)
    with pytest.raises(SourceError, match="no layer 'nuclear'; set `layer` to one of spliced, unspliced, X"):
        read(path, layer="nuclear")


def test_a_stated_layer_wins(tmp_path: Path):
    a = adata()
    a.layers["counts"] = a.X + 5
    a.raw = a.copy()
    a.raw.X[:] += 1
    path = write(tmp_path, a)
    is_the_data(read(path), COUNTS + 5)
    is_the_data(read(path, layer="X"), COUNTS)
    is_the_data(read(path, layer="raw"), COUNTS + 1)


def test_fractional_counts_are_rounded_by_option_only(tmp_path: Path):
    a = adata()
    a.X = a.X + 0.1387 * (a.X > 0)
    path = write(tmp_path, a)
    with pytest.raises(
        SourceError, match=r"X has \d+ values that are not counts, the first is \d\.1387 .*set `round_counts` to yes"
    ):
        read(path)
    section = read(path, round_counts="yes")
    is_the_data(section)
    assert any(n.startswith("X rounded to integers (`round_counts`): ") for n in section.notes)
    with pytest.raises(SourceError, match="`round_counts` maybe: must be 'yes' or 'no'"):
        read(path, round_counts="maybe")


def test_negative_values_are_never_rounded(tmp_path: Path):
    a = adata()
    a.X = a.X - 1.5
    with pytest.raises(SourceError, match="raw counts are needed"):
        read(write(tmp_path, a), round_counts="yes")


@pytest.mark.parametrize("encode", [sp.csc_matrix, sp.csr_matrix, np.asarray])
@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.float64])
def test_matrices_of_any_encoding(tmp_path: Path, encode, dtype):
    a = adata()
    a.X = encode(COUNTS.astype(dtype))
    is_the_data(read(write(tmp_path, a)))


# -- obs and positions --------------------------------------------------------------------------------------

IN_TISSUE = {
    "text of R": ["TRUE"] * 59 + ["FALSE"],
    "text": ["True"] * 59 + ["False"],
    "numbers as text": ["1"] * 59 + ["0"],
    "numbers as text with a point": ["1.0"] * 59 + ["0.0"],
    "bool": [True] * 59 + [False],
    "nullable bool": pd.array([True] * 59 + [None], dtype="boolean"),
    "nullable int": pd.array([1] * 59 + [0], dtype="Int64"),
    "float": [1.0] * 59 + [0.0],
    "category of text": pd.Categorical(["TRUE"] * 59 + ["FALSE"]),
    "category of int": pd.Categorical([1] * 59 + [0]),
}


@pytest.mark.parametrize("kind", IN_TISSUE)
def test_in_tissue_of_any_type(tmp_path: Path, kind: str):
    a = adata()
    a.obs["in_tissue"] = IN_TISSUE[kind]
    section = read(write(tmp_path, a))
    assert section.spot_ids == BC[:59]
    assert section.dropped == {"not in tissue": 1}


def test_in_tissue_of_unknown_words_is_refused(tmp_path: Path):
    a = adata()
    a.obs["in_tissue"] = ["perhaps"] * N
    with pytest.raises(SourceError, match=r"obs\['in_tissue'\]: 'perhaps' is not yes or no; use 1 and 0"):
        read(write(tmp_path, a))


@pytest.mark.parametrize("key", ["X_spatial", "spatial_coords", "coords"])
def test_positions_under_another_key(tmp_path: Path, key: str):
    a = adata()
    a.obsm[key] = a.obsm.pop("spatial")
    section = read(write(tmp_path, a))
    is_the_data(section)
    assert f"positions from obsm['{key}']" in section.notes


def test_positions_under_an_unknown_key_are_named(tmp_path: Path):
    a = adata()
    a.obsm["X_pca"] = np.zeros((N, 2))
    a.obsm["mine"] = a.obsm.pop("spatial")
    path = write(tmp_path, a)
    assert detect(path)[0].name == "anndata"
    with pytest.raises(
        SourceError, match=r"no obsm\['spatial'\].*set `positions` to the key that has them \(obsm has X_pca, mine\)"
    ):
        read(path)
    is_the_data(read(path, positions="mine"))
    with pytest.raises(SourceError, match=r"no obsm\['yours'\]; set `positions` to the key with spot centres"):
        read(path, positions="yours")


@pytest.mark.parametrize(
    "names", [("x", "y"), ("y", "x"), ("row", "col"), ("pxl_row_in_fullres", "pxl_col_in_fullres")]
)
def test_positions_as_a_table_are_read_by_name(tmp_path: Path, names: tuple[str, str]):
    a = adata()
    first_is_y = names[0] in ("y", "row", "pxl_row_in_fullres")
    values = XY[:, ::-1] if first_is_y else XY
    a.obsm["spatial"] = pd.DataFrame(values, index=BC, columns=list(names))
    is_the_data(read(write(tmp_path, a)))


@pytest.mark.parametrize("names", [("pxl_col_in_fullres", "pxl_row_in_fullres"), ("imagecol", "imagerow")])
def test_positions_in_obs(tmp_path: Path, names: tuple[str, str]):
    a = adata()
    xy = a.obsm.pop("spatial")
    a.obs[names[0]], a.obs[names[1]] = xy[:, 0], xy[:, 1]
    is_the_data(read(write(tmp_path, a)))


def test_no_positions_at_all(tmp_path: Path):
    a = adata()
    a.obsm.clear()
    with pytest.raises(SourceError, match=r"no obsm\['spatial'\]; store spot centres there"):
        read(write(tmp_path, a))


@pytest.mark.parametrize("factor", [10.0, 0.1, 2.0])
def test_a_scale_that_contradicts_the_slide_is_refused(tmp_path: Path, factor: float):
    path = write(tmp_path, adata())
    with pytest.raises(
        SourceError, match=rf"spot pitch is {factor * 100:.0f}\.\d um, but on a Visium slide.*set `mpp` to 2"
    ):
        read(path, mpp=str(2.0 * factor))
    is_the_data(read(path, mpp="2.0"))
    if factor != 2.0:  # without a stated platform the array tells Visium, with a wide margin
        with pytest.raises(SourceError, match="on a Visium slide"):
            open_source(path, overrides={"tissue": "breast", "mpp": str(2.0 * factor)})


# -- versions, encodings and packaging ----------------------------------------------------------------------


def test_an_h5ad_of_before_version_0_7(tmp_path: Path):
    a = adata()
    path = write(tmp_path, a)
    with h5py.File(path, "a") as f:
        for k in ("obs", "var"):
            t = getattr(a, k).reset_index()
            del f[k]
            rows = [tuple(map(str, r)) for r in t.itertuples(index=False)]
            f[k] = np.array(rows, [(str(n), "S40") for n in t.columns])
        for n in list(f.attrs):
            del f.attrs[n]
    is_the_data(read(path))


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("folder", [False, True])
def test_anndata_in_zarr(tmp_path: Path, version: int, folder: bool):
    path = tmp_path / "d" / "a.zarr"
    path.parent.mkdir()
    with ad.settings.override(zarr_write_format=version):
        adata().write_zarr(path)
    given = path.parent if folder else path
    assert detect(given)[0].name == "anndata"
    section = read(given)
    is_the_data(section)
    assert section.meta.section_id == "a"


def test_zarr_encoded_with_pickle_is_refused(tmp_path: Path):
    path = tmp_path / "a.zarr"
    with ad.settings.override(zarr_write_format=2):
        adata().write_zarr(path)
    meta = path / "obs/_index/.zarray"
    text = json.loads(meta.read_text())
    text["filters"] = [{"id": "pickle", "protocol": 5}]
    meta.write_text(json.dumps(text))
    with pytest.raises(SourceError, match=r"obs/_index/\.zarray: the codec 'pickle' is not allowed"):
        read(path)


def test_a_missing_compression_plugin_is_named(tmp_path: Path):
    path = write(tmp_path, adata())
    with h5py.File(path, "a") as f:
        del f["X"]
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((N, 6))
        plist.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, ())
        space = h5py.h5s.create_simple((N, 6))
        data = h5py.h5d.create(f.id, b"X", h5py.h5t.IEEE_F32LE, space, plist)
        h5py.Dataset(data).attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        data.write_direct_chunk((0, 0), COUNTS.tobytes(), 0)
    with pytest.raises(SourceError, match=r"X is compressed with zstd \(HDF5 filter 32015\).*pip install hdf5plugin"):
        read(path)


def test_an_h5ad_packed_with_gzip(tmp_path: Path):
    path = write(tmp_path, adata())
    packed = tmp_path / "d/GSM1_a.h5ad.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for given in (packed, packed.parent):
        section = read(given)
        is_the_data(section)
        assert section.meta.section_id == "GSM1_a"


def test_appledouble_files_next_to_h5ad_files_are_ignored(tmp_path: Path):
    path = tmp_path / "d"
    path.mkdir()
    shutil.move(write(tmp_path, adata()), path / "S1.h5ad")
    (path / "._S1.h5ad").write_bytes(b"\0\5\x16\7" + bytes(4092))
    assert detect(path)[0].name == "anndata"
    is_the_data(read(path))


@pytest.mark.parametrize("link", ["link", "storage"])
def test_data_in_another_file_are_refused(tmp_path: Path, link: str):
    path = write(tmp_path, adata())
    (tmp_path / "secret.bin").write_bytes(bytes(4 * N * 6))
    with h5py.File(path, "a") as f:
        del f["X"]
        if link == "link":
            f["X"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/X")
        else:
            f.create_dataset("X", (N, 6), "f4", external=[(str(tmp_path / "secret.bin"), 0, h5py.h5f.UNLIMITED)])
    with pytest.raises(SourceError, match=r"'/X' is (an external link|stored in another file)"):
        open_source(path, fmt="anndata", overrides=FACTS)


@pytest.mark.parametrize("kind", ["lfs", "html", "empty", "cut"])
def test_files_that_are_no_data(tmp_path: Path, kind: str):
    path = write(tmp_path, adata())
    raw = path.read_bytes()
    content, message = {
        "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        "html": (b"<!doctype html><html></html>", "web page"),
        "empty": (b"", "the file is empty"),
        "cut": (raw[: len(raw) // 2], "truncated file.*again"),
    }[kind]
    path.write_bytes(content)
    with pytest.raises(SourceError, match=f"a.h5ad: .*{message}"):
        open_source(path, fmt="auto" if kind != "cut" else "anndata", overrides=FACTS)


def test_a_picture_of_absurd_size_is_not_read(tmp_path: Path):
    path = write(tmp_path, adata())
    with h5py.File(path, "a") as f:
        images = f["uns/spatial/lib/images"]
        del images["hires"]
        images.create_dataset("hires", (300_000, 300_000, 3), "u1", chunks=(1024, 1024, 3))
        images["hires"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    with pytest.raises(SourceError, match=r"claims 251.5 GiB in \(300000, 300000, 3\)"):
        read(path)


def test_a_scale_factor_of_zero_is_refused(tmp_path: Path):
    a = adata()
    a.uns["spatial"]["lib"]["scalefactors"]["tissue_hires_scalef"] = 0.0
    with pytest.raises(SourceError, match="tissue_hires_scalef is 0, expected a positive number"):
        read(write(tmp_path, a))


# -- habits of R --------------------------------------------------------------------------------------------


def test_nullable_strings_and_raw_as_null(tmp_path: Path):
    a = adata()
    a.obs["note"] = pd.array(["x"] * 59 + [None], dtype="string")
    a.var["gene_ids"] = pd.array(IDS, dtype="string")
    a.var["name"] = pd.array([*SYM[:5], None], dtype="string")
    with ad.settings.override(allow_write_nullable_strings=True):
        path = write(tmp_path, a)
    is_the_data(read(path))


def test_a_picture_of_floats(tmp_path: Path):
    a = adata()
    a.uns["spatial"]["lib"]["images"]["hires"] = picture() / np.float32(255)
    section = read(write(tmp_path, a))
    with section.open_slide() as slide:
        np.testing.assert_array_equal(slide.whole(), picture())


def test_text_in_array_columns(tmp_path: Path):
    a = adata()
    a.obs["array_row"], a.obs["array_col"] = a.obs["array_row"].astype(str), a.obs["array_col"].astype(str)
    section = read(write(tmp_path, a))
    np.testing.assert_array_equal(section.array_xy, np.column_stack([COL, ROW]))


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_read_or_refused(tmp_path: Path, seed: int):
    path = write(tmp_path, adata())
    raw, rng = path.read_bytes(), np.random.default_rng(seed)
    messages = []
    for _ in range(25):
        data = bytearray(raw)
        if rng.integers(3) == 0:
            data = data[: int(rng.integers(len(raw)))]
        else:  # the headers of groups are at the start
            for at in rng.integers(min(len(raw), 20_000), size=rng.integers(1, 30)):
                data[at] = rng.integers(256)
        path.write_bytes(bytes(data))
        try:
            read(path)
        except SourceError as error:
            messages.append(str(error))
    assert len(messages) > 4
    assert all("a.h5ad" in message or "section a" in message for message in messages)


def test_every_declared_option_is_read(tmp_path: Path):
    a = adata()
    a.X = a.X + 0.5
    path = write(tmp_path, a)
    assert fields_read(path, **FACTS) == declared(path)


def test_features_without_a_kind_are_genes(tmp_path: Path):
    """As a concatenation of tables leaves them."""
    a = adata()
    a.var["feature_types"] = pd.Categorical(["Gene Expression", None, *["Gene Expression"] * 3, "Antibody Capture"])
    section = read(write(tmp_path, a))
    np.testing.assert_array_equal(section.counts.toarray(), COUNTS[:, :5])
    assert "1 features are not genes: Antibody Capture" in section.notes


def test_counts_in_half_precision(tmp_path: Path):
    a = adata()
    a.X = COUNTS.astype(np.float16)
    is_the_data(read(write(tmp_path, a)))


NOT_COUNTS = {
    "infinite": (np.where(COUNTS.max() == COUNTS, np.inf, COUNTS), "X has values that are not counts, such as inf"),
    "mask": (COUNTS > 0, "X holds true and false; add raw counts"),
    "empty mask": (sp.csr_matrix(COUNTS.shape, dtype=bool), "X holds true and false; add raw counts"),
    "layer": (None, r"X and raw.X are missing; set `layer` to a layer of integers \(integers\)"),
}


@pytest.mark.parametrize("kind", NOT_COUNTS)
def test_a_dry_run_states_why_values_are_no_counts(tmp_path: Path, kind: str):
    values, message = NOT_COUNTS[kind]
    a = adata()
    if values is None:
        a.layers["integers"] = a.X
    a.X = values
    path = write(tmp_path, a)
    with open_store(path) as store, pytest.raises(SourceError, match=message):
        preview_genes(store, path, CountOptions())
