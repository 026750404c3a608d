"""Sections of one source are told apart, and spots that belong to none of them are counted."""

from __future__ import annotations

import logging
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from comtip_shards import SourceError
from comtip_shards.sources import open_source, stimage
from comtip_shards.sources.files.names import by_section_id
from comtip_shards.sources.tenx.space_ranger_files import find_runs
from comtip_shards.sources.xenium_parts.files import find_runs as find_xenium_runs

from comtip_fast.data.convert import read_section
from comtip_fast.data.sections import open_section
from comtip_fast.data.tile_sources import TileGeometry
from tests.data_shards.test_reader_cases_anndata import FACTS, N, adata, write
from tests.data_shards.test_reader_cases_anndata_libraries import concatenated

pytestmark = pytest.mark.filterwarnings("ignore")
TILE = TileGeometry(16, 64.0, 2.0)
ALIKE = r"have the same section id {}, in which characters other than .* rename one"


def test_names_with_one_section_id_are_refused():
    assert by_section_id(["A/1", "B", "B"], "regions", "x") == {"A_1": "A/1", "B": "B"}
    assert by_section_id(["A_1", "A/1"], "files", "x", str) == {"A_1": "A_1", "A/1": "A/1"}
    with pytest.raises(SourceError, match="^x: the regions 'A/1' and 'A_1' " + ALIKE.format("A_1")):
        by_section_id(["A/1", "A_1"], "regions", "x")


def test_regions_of_a_spatialdata_store_with_one_section_id_are_refused(tmp_path: Path):
    pytest.importorskip("spatialdata")
    from spatialdata.models import TableModel

    from tests.data_shards import test_sources_spatialdata as sd

    data = sd.store(np.arange(12))
    data.shapes["spots."] = data.shapes["spots"]
    obs = data["table"].obs.copy()
    other = ad.AnnData(sd.COUNTS.astype(np.float32), obs.assign(region=pd.Categorical(["spots."] * 12)))
    data.tables["second"] = TableModel.parse(other, region="spots.", region_key="region", instance_key="spot")
    data.write(tmp_path / "a.zarr")
    with pytest.raises(SourceError, match="the regions '(spots|spots.)' and '(spots|spots.)' " + ALIKE.format("spots")):
        open_source(tmp_path / "a.zarr", overrides=sd.FACTS)


@pytest.mark.parametrize("name", ["GSM1_A-", "GSM1_A."])
def test_downloads_whose_prefixes_give_one_section_id_are_refused(tmp_path: Path, name: str):
    for prefix in ("GSM1_A_", name):
        (tmp_path / f"{prefix}tissue_positions.csv").touch()
        (tmp_path / f"{prefix}transcripts.parquet").touch()
    for finder in (find_runs, find_xenium_runs):
        with pytest.raises(SourceError, match="prefixes .* " + ALIKE.format("GSM1_A")):
            finder(tmp_path)


def test_slides_of_a_table_with_one_section_id_are_refused(tmp_path: Path):
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/meta_all_gene.csv").write_text(
        "slide,species,tissue,tech\nA 1,human,breast,Visium\nA+1,human,liver,ST\n"
    )
    with pytest.raises(SourceError, match="the slides 'A 1' and 'A.1' " + ALIKE.format("A_1")):
        stimage.table_rows(tmp_path)


@pytest.mark.parametrize("missing", [np.nan, "", "NA"])
def test_spots_without_a_library_are_counted(tmp_path: Path, missing: object, caplog: pytest.LogCaptureFixture):
    both = concatenated()
    library = adata().uns["spatial"]["lib"]
    both.uns["spatial"] = {"A": library, "B": library}
    names = both.obs["library_id"].astype(object)
    names.iloc[:7] = missing
    both.obs["library_id"] = pd.Categorical(names)
    path, told = (
        write(tmp_path, both),
        "7 spots of the file belong to no section, because obs['library_id'] has no value for them",
    )
    sections = [source.read() for source in open_source(path, overrides=FACTS)]
    assert [len(s.spot_ids) for s in sections] == [N - 7, N]
    assert all(told in s.notes for s in sections)
    with caplog.at_level(logging.WARNING):
        assert len(open_section(f"{path}:B", TILE, {"platform": "Visium"}).tiles) == N
        assert read_section(f"{path}:B").n_obs == N
    assert [told in m for m in caplog.messages] == [True, True]
    both.obs["library_id"] = ["A"] * N + ["B"] * N
    whole = write(tmp_path, both)
    assert not any("no section" in n for s in open_source(whole, overrides=FACTS) for n in s.read().notes)
