"""AnnData files as scanpy and squidpy write them."""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from comtip_shards import SourceError
from comtip_shards.sources import detect, open_source
from PIL import Image
from scipy import sparse

pytestmark = pytest.mark.filterwarnings("ignore:(Observation|Variable) names are not unique")
GENES = ["ERBB2", "KRT14", "CD74", "TBCE", "TBCE", "tag"]
ENSEMBL = ["ENSG00000141736", "ENSG00000186847", "ENSG00000019582", "ENSG00000284770", "ENSG00000285053", "A1"]
KINDS = ["Gene Expression"] * 5 + ["Antibody Capture"]
FACTS = {"tissue": "breast"}


def picture() -> np.ndarray:
    """Return an image of 500 x 400 px in full resolution: red encodes the column, green the row."""
    y, x = np.mgrid[0:400, 0:500]
    return np.stack([x / 2, y / 2, np.full(x.shape, 90)], axis=-1).astype(np.uint8)


def visium(seed: int = 0) -> ad.AnnData:
    """Return an AnnData as of scanpy's Visium reader: symbols with duplicates in var_names, Ensembl ids, a hires image."""
    rng = np.random.default_rng(seed)
    row, col = np.divmod(np.arange(20), 5)
    xy = np.stack([60 + 80 * col + 40 * (row % 2), 60 + 80 * row * np.sqrt(3) / 2], axis=1)
    obs = pd.DataFrame(
        {"in_tissue": [0, 1] + [1] * 18, "array_row": row, "array_col": 2 * col + row % 2},
        index=[f"ACGT{i:02d}-1" for i in range(20)],
    )
    var = pd.DataFrame({"gene_ids": ENSEMBL, "feature_types": KINDS, "genome": "GRCh38"}, index=GENES)
    hires = np.asarray(Image.fromarray(picture()).resize((250, 200), Image.Resampling.BOX)) / np.float32(255)
    counts = sparse.csr_matrix(rng.poisson(2, (20, 6)).astype(np.float32))
    factors = {"tissue_hires_scalef": 0.5, "tissue_lowres_scalef": 0.1, "spot_diameter_fullres": 44.0}
    spatial = {"V1": {"images": {"hires": hires}, "scalefactors": factors, "metadata": {"chemistry": "x"}}}
    return ad.AnnData(counts, obs, var, uns={"spatial": spatial}, obsm={"spatial": xy})


@pytest.fixture
def data() -> ad.AnnData:
    return visium()


def write(data: ad.AnnData, path: Path) -> Path:
    data.strings_to_categoricals()
    data.write_h5ad(path)
    return path


def read(path: Path, **facts: str):
    return open_source(path, overrides=FACTS | {"mpp": "1.25"} | facts)[0].read()


def test_what_scanpy_writes_is_read(data: ad.AnnData, tmp_path: Path):
    path = write(data, tmp_path / "run 1.h5ad")
    reader, why = detect(path)
    assert (reader.name, why) == ("anndata", "run 1.h5ad has obsm['spatial'] and uns['spatial']")
    section = read(path)
    assert section.meta.section_id == "run_1"
    assert section.meta.species == "human"
    assert section.gene_ids == ENSEMBL[:5]
    assert section.gene_symbols == GENES[:5]
    assert section.dropped == {"not in tissue": 1}
    np.testing.assert_array_equal(section.counts.toarray(), data.X.toarray()[1:, :5])
    np.testing.assert_allclose(section.xy, data.obsm["spatial"][1:] * 0.5)
    # um per px and widths are of the picture that tiles are cut from; spots are 44 px wide, 80 px apart.
    assert section.meta.mpp == pytest.approx(2.5)
    assert section.meta.spot_diameter_um == pytest.approx(55)
    assert section.meta.spot_pitch_um == pytest.approx(100)
    assert any("hires image in the file, scale 0.5 of" in n for n in section.notes)
    assert "1 features are not genes: Antibody Capture" in section.notes
    with section.open_slide() as slide:
        assert slide.size == (250, 200)
        tile = slide.tiles(section.xy[:1], 2.5, 50.0, 20, 0.5)[0].astype(float)
    np.testing.assert_allclose(tile[..., :2].mean((0, 1)), data.obsm["spatial"][1] / 2, atol=1)


def test_the_original_image_may_be_given(data: ad.AnnData, tmp_path: Path):
    path = write(data, tmp_path / "a.h5ad")
    Image.fromarray(picture()).save(tmp_path / "a_full.png", dpi=(25_400 / 0.8, 25_400 / 0.8))
    section = open_source(path, overrides=FACTS | {"image": str(tmp_path / "{id}_full.png")})[0].read()
    np.testing.assert_allclose(section.xy, data.obsm["spatial"][1:])
    assert section.meta.mpp == pytest.approx(0.8, rel=1e-4)
    assert any("resolution tag of a_full.png" in n for n in section.notes)
    stated = open_source(path, overrides=FACTS | {"image": str(tmp_path / "a_full.png"), "platform": "Visium"})[
        0
    ].read()
    assert stated.meta.mpp == pytest.approx(100 / 80)
    assert any("100 um pitch of Visium" in n for n in stated.notes)


def test_facts_come_from_columns_that_say_one_thing(data: ad.AnnData, tmp_path: Path):
    data.obs["tissue"], data.obs["donor_id"], data.obs["organism"] = "lung", "P7", "Homo sapiens"
    data.obs["label"] = np.where(np.arange(20) < 9, "tumour", "stroma")
    data.uns["spatial"]["V1"]["scalefactors"]["microns_per_pixel"] = 0.7
    section = open_source(write(data, tmp_path / "a.h5ad"))[0].read()
    meta = section.meta
    assert (meta.tissue, meta.donor, meta.species) == ("lung", "P7", "human")
    assert meta.mpp == pytest.approx(1.4)
    assert section.labels[0] == "tumour"


def test_several_libraries_and_several_files(data: ad.AnnData, tmp_path: Path):
    second = visium(1)
    for one in (data, second):
        one.var_names_make_unique()
    both = ad.concat({"V1": data, "V2": second}, label="library_id", index_unique="-")
    both.uns["spatial"] = data.uns["spatial"] | {"V2": data.uns["spatial"]["V1"]}
    both.var = data.var
    (tmp_path / "both").mkdir()
    write(both, tmp_path / "both/all.h5ad")
    sections = open_source(tmp_path / "both", overrides=FACTS | {"mpp": "1.25"})
    assert [s.meta.section_id for s in sections] == ["V1", "V2"]
    other = sections[1].read()
    assert other.spot_ids[0] == "ACGT01-1-V2"
    np.testing.assert_array_equal(other.counts.toarray(), second.X.toarray()[1:, :5])
    write(data, tmp_path / "both/V1.h5ad")
    with pytest.raises(SourceError, match=r"section V1 also exists in V1\.h5ad"):
        open_source(tmp_path / "both")
    (tmp_path / "both/V1.h5ad").unlink()
    with pytest.raises(SourceError, match=r"`image` is one file but there are 2 sections; use \{id\}"):
        open_source(tmp_path / "both", overrides=FACTS | {"image": "a.png"})
    del both.obs["library_id"]
    write(both, tmp_path / "both/all.h5ad")
    with pytest.raises(SourceError, match="no obs\\['library_id'\\]"):
        open_source(tmp_path / "both", overrides=FACTS)


@pytest.mark.parametrize("location", ["layers['counts']", "raw.X"])
def test_counts_are_found_where_x_is_normalised(data: ad.AnnData, tmp_path: Path, location: str):
    counts = data.X.copy()
    if location == "raw.X":
        data.raw = data.copy()
    else:
        data.layers["counts"] = counts
    data.X = counts.log1p()
    section = read(write(data, tmp_path / "a.h5ad"))
    np.testing.assert_array_equal(section.counts.toarray(), counts.toarray()[1:, :5])
    assert any("counts are those of" in n for n in section.notes)


def test_an_h5ad_with_uint16_counts(data: ad.AnnData, tmp_path: Path):
    data.X = data.X.astype(np.uint16)
    assert read(write(data, tmp_path / "a.h5ad")).counts.dtype == np.int32


def normalised(data: ad.AnnData):
    data.X = data.X.log1p()


def symbols_only(data: ad.AnnData):
    del data.var["gene_ids"]
    data.var_names_make_unique()


BAD = {
    "normalised": (normalised, "not an integer.*raw counts are needed"),
    "no positions": (lambda d: d.obsm.clear(), r"no obsm\['spatial'\]"),
    "no image": (lambda d: d.uns.clear(), r"no image in uns\['spatial'\].*`image`"),
    "no picture": (
        lambda d: d.uns["spatial"]["V1"].pop("images"),
        r"uns\['spatial'\]\['V1'\]: no image \(fullres, hires",
    ),
    "no scale factor": (lambda d: d.uns["spatial"]["V1"].update(scalefactors={}), "tissue_hires_scalef is missing"),
    "species unknown": (symbols_only, "species not detected, because gene ids such as ERBB2.*`species`"),
    "beyond the image": (
        lambda d: d.obsm.update(spatial=d.obsm["spatial"] * 3),
        r"a\.h5ad: the image is 250 x 200 px, but",
    ),
    "spots twice": (lambda d: setattr(d, "obs_names", ["x"] * d.n_obs), "obs names.*more than once"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_of_bad_files_name_the_file_and_the_fix(data: ad.AnnData, tmp_path: Path, name: str):
    change, message = BAD[name]
    change(data)
    path = write(data, tmp_path / "a.h5ad")
    with pytest.raises(SourceError, match=message) as error:
        open_source(path, fmt="anndata", overrides=FACTS | {"mpp": "1.25"})[0].read()
    assert "a.h5ad" in str(error.value)


def test_scale_tissue_and_damage(data: ad.AnnData, tmp_path: Path):
    path = write(data, tmp_path / "a.h5ad")
    with pytest.raises(SourceError, match=r"no scale; set `mpp`.*`platform=Visium`"):
        open_source(path, overrides=FACTS)
    with pytest.raises(SourceError, match="neither obs nor uns states one tissue; set `tissue`"):
        open_source(path, overrides={"mpp": "1"})
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(SourceError, match=r"a\.h5ad: not an \.h5ad that can be read"):
        open_source(path, fmt="anndata")


def test_a_stated_scale_that_the_file_contradicts_is_used_and_reported(
    data: ad.AnnData, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    data.uns["spatial"]["V1"]["scalefactors"]["microns_per_pixel"] = 1.25
    path = write(data, tmp_path / "a.h5ad")
    read(path, platform="Slide-seq")
    assert "check `mpp`" not in caplog.text
    section = read(path, platform="Slide-seq", mpp="0.625")
    assert section.meta.mpp == pytest.approx(1.25)
    assert "the stated scale of 0.625 um per px is used, but the file states 1.25" in section.notes
    assert "a.h5ad: `mpp` 0.625 is used, but uns['spatial'] states 1.25 um per px; check `mpp`" in caplog.text


@pytest.mark.parametrize("mpp", ["0.125", "12.5"])
def test_a_tenfold_wrong_scale_is_refused_and_used_where_it_is_trusted(data: ad.AnnData, tmp_path: Path, mpp: str):
    data.uns["spatial"]["V1"]["scalefactors"]["microns_per_pixel"] = 1.25
    path = write(data, tmp_path / "a.h5ad")
    with pytest.raises(SourceError, match=r"a\.h5ad: `mpp` [\d.]+ is (0\.1|10) times the 1\.25 .*set `trust_mpp=yes`"):
        read(path, platform="Slide-seq", mpp=mpp)
    assert read(path, platform="Slide-seq", mpp=mpp, trust_mpp="yes").meta.mpp == pytest.approx(2 * float(mpp))
    with pytest.raises(SourceError, match="`trust_mpp` has no effect here: no `mpp` is stated"):
        open_source(path, overrides=FACTS | {"trust_mpp": "yes"})


@pytest.mark.parametrize("mpp", ["25", "0.00001"])
def test_a_distance_of_spots_that_no_platform_has_is_refused(data: ad.AnnData, tmp_path: Path, mpp: str):
    path = write(data, tmp_path / "a.h5ad")
    with pytest.raises(
        SourceError,
        match=r"the spots are \S+ um apart, but those of every platform are 0.1 to 1000 um apart; set `mpp`",
    ):
        read(path, platform="Slide-seq", mpp=mpp)
