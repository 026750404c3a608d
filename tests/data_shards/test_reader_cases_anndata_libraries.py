"""AnnData files as they occur: placeholders for counts, scale factors of R, ids in any column, sections named in obs."""

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from comtip_shards import SourceError
from comtip_shards.genes.identifiers import map_genes
from comtip_shards.sections.facts import CountOptions, SectionFacts
from comtip_shards.slides.open import open_slide
from comtip_shards.sources import open_source
from comtip_shards.sources.anndata_parts.counts import raw_counts
from comtip_shards.sources.anndata_parts.obs_facts import facts_of
from comtip_shards.sources.anndata_parts.store import MemoryStore, open_store
from PIL import Image
from scipy import sparse as sp

from comtip_fast.data.anndata_file import rows_copy
from tests.data_shards.test_reader_cases_anndata import (
    COUNTS,
    FACTS,
    IDS,
    SYM,
    XY,
    N,
    adata,
    is_the_data,
    picture,
    read,
    write,
)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    "empty", [sp.csr_matrix((N, 6), dtype=np.float32), np.zeros((N, 6), np.float32), None, COUNTS > 2]
)
def test_a_matrix_without_counts_is_only_a_placeholder(tmp_path: Path, empty):
    a = adata()
    a.layers["raw_counts"], a.X = a.X.copy(), empty
    section = read(write(tmp_path, a))
    is_the_data(section)
    assert any("counts are those of layers/raw_counts" in n for n in section.notes)


@pytest.mark.parametrize(
    ("matrix", "message"), [(np.zeros((N, 6)), "every value of X is 0"), (COUNTS > 2, "X holds true and false")]
)
def test_no_counts_anywhere_is_refused(tmp_path: Path, matrix: np.ndarray, message: str):
    a = adata()
    a.X = matrix
    with pytest.raises(SourceError, match=f"{message}; add raw counts to the file"):
        read(write(tmp_path, a))


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_rounding_is_recommended_only_where_it_helps(tmp_path: Path, value: float):
    a = adata()
    a.X[3, 2] = value
    with pytest.raises(SourceError, match="raw counts are needed") as caught:
        read(write(tmp_path, a))
    assert "round_counts" not in str(caught.value)


@pytest.mark.parametrize("column", ["ENSEMBL", "feature_id", "id", "gene_ids-0", "Accession"])
def test_ensembl_ids_in_any_column(tmp_path: Path, column: str):
    a = adata()
    a.var = pd.DataFrame({"n_cells": range(6), column: [f"{i}.12" for i in IDS]}, index=[f"g{i}" for i in range(6)])
    section = read(write(tmp_path, a))
    is_the_data(section)
    assert map_genes(section.gene_ids, "human").unmapped == []


@pytest.mark.parametrize("column", ["Symbol", "gene_short_name", "gene_symbol", "Gene"])
def test_symbols_in_any_column(tmp_path: Path, column: str):
    a = adata()
    a.var = pd.DataFrame({column: SYM}, index=[str(i) for i in range(6)])
    section = read(write(tmp_path, a), species="human")
    assert map_genes(section.gene_ids, "human", symbols=section.gene_symbols).unmapped == []


def test_genes_without_an_id_are_not_summed(tmp_path: Path):
    a = adata()
    a.var = pd.DataFrame({"ENSEMBL": [*IDS[:4], np.nan, np.nan]}, index=SYM)
    section = read(write(tmp_path, a))
    is_the_data(section)
    assert section.gene_ids == [*IDS[:4], *SYM[4:]]


@pytest.mark.parametrize("value", [np.array([1.0]), "1.0", np.array([[1]])])
def test_a_scale_factor_as_r_writes_it(tmp_path: Path, value):
    a = adata()
    a.uns["spatial"]["lib"]["scalefactors"]["tissue_hires_scalef"] = value
    is_the_data(read(write(tmp_path, a)))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tissue_hires_scalef", np.ones(2), "tissue_hires_scalef is not a single value, .*set `image`"),
        ("tissue_hires_scalef", "abc", "tissue_hires_scalef is abc, .*set `image`"),
        ("microns_per_pixel", "abc", "microns_per_pixel is abc, expected a positive number; set `mpp`"),
    ],
)
def test_a_scale_factor_that_is_no_number_is_named(tmp_path: Path, key: str, value, message: str):
    a = adata()
    a.uns["spatial"]["lib"]["scalefactors"][key] = value
    path = write(tmp_path, a)
    with pytest.raises(SourceError, match=message):
        read(path)
    if key == "microns_per_pixel":
        is_the_data(read(path, mpp="2.0"))


@pytest.mark.parametrize("value", [np.nan, -5.0, "NA"])
def test_an_unknown_diameter_of_spots_is_no_error(tmp_path: Path, value):
    a = adata()
    a.uns["spatial"]["lib"]["scalefactors"]["spot_diameter_fullres"] = value
    section = read(write(tmp_path, a))
    is_the_data(section)
    assert section.meta.spot_diameter_um == pytest.approx(100, rel=0.01)
    assert any("the diameter of spots is unknown" in n for n in section.notes)


@pytest.mark.parametrize("value", ["text", np.zeros(3)])
def test_uns_spatial_of_another_type(tmp_path: Path, value):
    a = adata()
    a.uns["spatial"] = value
    with pytest.raises(SourceError, match=r"no image in uns\['spatial'\]; set `image`"):
        read(write(tmp_path, a))


def concatenated(column: str = "library_id", shift: float = 0.0) -> ad.AnnData:
    """Return two sections in one AnnData, as ``anndata.concat`` writes them: without ``uns``."""
    a, b = adata(), adata()
    b.X = b.X + 1
    b.obsm["spatial"] = b.obsm["spatial"] + shift
    both = ad.concat({"A": a, "B": b}, label=column, index_unique="-")
    both.var = a.var
    return both


@pytest.mark.parametrize(
    ("column", "shift"), [("library_id", 0.0), ("library_id", 9e3), ("sample", 0.0), ("sample_id", 7.0)]
)
def test_sections_that_only_obs_distinguishes(tmp_path: Path, column: str, shift: float):
    image = tmp_path / "{id}.png"
    for name in "AB":
        Image.fromarray(picture()).save(tmp_path / f"{name}.png")
    path = write(tmp_path, concatenated(column, shift))
    one, two = open_source(path, overrides=FACTS | {"image": str(image)})
    assert (one.meta.section_id, two.meta.section_id) == ("A", "B")
    np.testing.assert_array_equal(one.read().counts.toarray(), COUNTS)
    assert two.meta.mpp == pytest.approx(2.0, rel=0.01)
    if shift < 100:
        np.testing.assert_array_equal(two.read().counts.toarray(), COUNTS + 1)
    with pytest.raises(SourceError, match="`image` is one file but there are 2 sections"):
        open_source(path, overrides=FACTS | {"image": str(tmp_path / "A.png")})


def test_samples_side_by_side_are_one_section(tmp_path: Path):
    a = adata()
    a.obs["sample"] = ["left" if x < 300 else "right" for x in XY[:, 0]]
    is_the_data(read(write(tmp_path, a)))


def test_only_one_of_the_sections_has_a_picture(tmp_path: Path):
    both = concatenated()
    both.uns["spatial"] = {"A": adata().uns["spatial"]["lib"]}
    path = write(tmp_path, both)
    (one,) = open_source(path, samples=["A"], overrides=FACTS)
    np.testing.assert_array_equal(one.read().counts.toarray(), COUNTS)
    with pytest.raises(
        SourceError, match=r"for section B \(obs\['library_id'\]\); .* or read only sections that have one"
    ):
        open_source(path, overrides=FACTS)


def test_one_picture_for_sections_on_top_of_each_other_is_refused(tmp_path: Path):
    both = concatenated()
    both.uns["spatial"] = adata().uns["spatial"]
    with pytest.raises(
        SourceError, match=r"names 2 libraries .A, B. whose spots lie on top of each other, .* only 'lib'"
    ):
        open_source(write(tmp_path, both), overrides=FACTS)


def test_two_libraries_with_one_section_id_are_refused(tmp_path: Path):
    both = concatenated()
    both.obs["library_id"] = ["A 1" if v == "A" else "A+1" for v in both.obs["library_id"]]
    library = adata().uns["spatial"]["lib"]
    both.uns["spatial"] = {"A 1": library, "A+1": library}
    with pytest.raises(SourceError, match=r"the libraries 'A 1' and 'A.1' have the same section id A_1"):
        open_source(write(tmp_path, both), overrides=FACTS)


def test_missing_values_of_obs_are_no_facts_and_no_labels(tmp_path: Path):
    a = adata()
    a.obs["donor"], a.obs["tissue"] = "NA", 1
    a.obs["label"] = pd.Categorical(["tumour", None] * (N // 2))
    section = read(write(tmp_path, a))
    assert (section.meta.donor, section.meta.tissue) == ("", "breast")
    assert section.labels == ["tumour", ""] * (N // 2)
    with pytest.raises(SourceError, match="neither obs nor uns states one tissue; set `tissue`"):
        open_source(write(tmp_path, a), overrides={"platform": "Visium"})


@pytest.mark.parametrize("column", ["library_id", "sample"])
def test_a_selection_of_spots_keeps_the_entries_of_other_libraries(tmp_path: Path, column: str):
    """``adata[adata.obs["library_id"] == "A"].copy()`` keeps ``uns`` as it was."""
    both = concatenated(column)
    library = adata().uns["spatial"]["lib"]
    both.uns["spatial"] = {"A": library, "B": library}
    one = both[both.obs[column] == "A"].copy()
    one.obs[column] = one.obs[column].astype(str)
    one.obs_names = adata().obs_names
    is_the_data(read(write(tmp_path, one)))


def test_spots_of_a_library_without_an_entry_are_not_lost(tmp_path: Path):
    a, b, c = adata(), adata(), adata()
    three = ad.concat({"A": a, "B": b, "C": c}, label="library_id", index_unique="-")
    three.var = a.var
    library = a.uns["spatial"]["lib"]
    three.uns["spatial"] = {"A": library, "B": library}
    path = write(tmp_path, three)
    assert [s.meta.section_id for s in open_source(path, samples=["A", "B"], overrides=FACTS)] == ["A", "B"]
    with pytest.raises(
        SourceError, match=r"for section C \(obs\['library_id'\]\); .* or read only sections that have one"
    ):
        open_source(path, overrides=FACTS)


@pytest.mark.parametrize("name", ["VisiumHD", "Visium-HD", "10x Visium_HD"])
def test_bins_of_visium_hd_are_not_scaled_as_spots(tmp_path: Path, name: str):
    a = adata()
    a.obs["platform"] = name
    path = write(tmp_path, a)
    with pytest.raises(SourceError, match="no scale; set `mpp`"):
        open_source(path, overrides={"tissue": "breast"})
    assert open_source(path, overrides={"tissue": "breast", "mpp": "0.2"})[0].meta.platform == "Visium HD"


@pytest.mark.parametrize(
    "names",
    [
        ("y_coord", "x_coord"),
        ("pixel_row", "pixel_col"),
        ("Y_fullres", "X_fullres"),
        ("ycoord", "xcoord"),
        ("posY", "posX"),
    ],
)
def test_the_axes_of_a_table_of_positions_are_those_of_its_names(tmp_path: Path, names: tuple[str, str]):
    a = adata()
    a.obsm["spatial"] = pd.DataFrame(XY[:, ::-1], index=a.obs_names, columns=list(names))
    is_the_data(read(write(tmp_path, a)))


ARRAY = np.column_stack([np.arange(N) // 10, np.arange(N) % 10])


@pytest.mark.parametrize(
    ("array", "pixels"),
    [
        (("array_row", "array_col"), ("pxl_row_in_fullres", "pxl_col_in_fullres")),
        (("row", "col"), ("imagerow", "imagecol")),
    ],
)
def test_a_table_of_positions_may_have_those_of_the_array(
    tmp_path: Path, array: tuple[str, str], pixels: tuple[str, str]
):
    """The tables of Space Ranger and of Seurat; the array must not be taken for px."""
    a = adata()
    a.obsm["spatial"] = pd.DataFrame(np.hstack([ARRAY, XY[:, ::-1]]), index=a.obs_names, columns=[*array, *pixels])
    is_the_data(read(write(tmp_path, a)))


def test_a_mudata_is_named(tmp_path: Path):
    path = tmp_path / "m.h5mu"
    with h5py.File(path, "w") as file:
        for group in ("mod/rna", "mod/prot", "obs", "var"):
            file.create_group(group)
    with pytest.raises(
        SourceError, match=r"a MuData of several modalities \(prot, rna\), not an AnnData; write the one with"
    ):
        read(path)


@pytest.mark.parametrize("mark", [".zattrs", "zarr.json"])
def test_an_image_in_ome_zarr_is_named(tmp_path: Path, mark: str):
    (tmp_path / "i.ome.zarr").mkdir()
    (tmp_path / "i.ome.zarr" / mark).write_text("{}")
    with pytest.raises(SourceError, match=r"not the image .*; convert it to OME-TIFF"):
        read(write(tmp_path, adata()), image=tmp_path / "i.ome.zarr")
    with pytest.raises(SourceError, match="OME-Zarr cannot be read, convert it to OME-TIFF"):
        open_slide(tmp_path / "i.ome.zarr")


def test_a_table_with_two_positions_is_refused(tmp_path: Path):
    a = adata()
    names = ["x_global", "y_global", "x_local", "y_local"]
    a.obsm["spatial"] = pd.DataFrame(np.hstack([XY, XY]), index=a.obs_names, columns=names)
    with pytest.raises(
        SourceError, match=r"several columns for one axis \(x_global, .*; keep those of x and y in image px"
    ):
        read(write(tmp_path, a))


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_counts_of_an_anndata_that_is_backed_by_its_file(tmp_path: Path, form):
    a = adata()
    a.X = form(a.X)
    backed = ad.read_h5ad(write(tmp_path, a), backed="r")
    counts, _, _ = raw_counts(MemoryStore(backed, tmp_path), tmp_path, CountOptions())
    np.testing.assert_array_equal(counts.toarray(), COUNTS)
    held = rows_copy(backed, np.arange(3), {})
    assert not held.isbacked
    assert held.n_obs == 3


def test_a_fact_in_uns_is_one_value_also_in_a_list(tmp_path: Path):
    a = adata()
    a.uns |= {"tissue": np.array(["breast"]), "donor": np.array(["d1", "d2"]), "organism": "Homo sapiens"}
    with open_store(write(tmp_path, a)) as file:
        for store in (MemoryStore(a, tmp_path), file):
            facts = facts_of(a.obs, SectionFacts(), store)
            assert (facts.tissue, facts.donor, facts.species) == ("breast", "", "human")
