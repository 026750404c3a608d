"""Predict, embed and adapt refuse a section with the same faults as a build, and name file and fix."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from comtip_shards import ShardSet, SourceError
from comtip_shards.builder.build import build_shards
from comtip_shards.reader.verify import verify
from comtip_shards.sources import open_source
from comtip_shards.sources.base import SectionSource

from comtip_fast.cli import main
from tests.comtip_fast.test_sections import XY, N, adata
from tests.conftest import TILES

BUILD = {"mpp": "2", "tissue": "breast", "species": "human"}
Change = Callable[[ad.AnnData], None]


def factor(name: str, value: object) -> Change:
    return lambda a: a.uns["spatial"]["lib"]["scalefactors"].update({name: value})


def positions(row: int, value: object) -> Change:
    return lambda a: a.obsm["spatial"].__setitem__(row, value)


def unchanged(a: ad.AnnData) -> None:
    pass


FAULTS: dict[str, tuple[Change, list[str], str]] = {
    "a position of nan": (positions(3, np.nan), ["--mpp", "2"], "spots have no position|spots without a position: 1"),
    "an infinite position": (positions(3, np.inf), ["--mpp", "2"], "spots have no position|spots without a position: 1"),
    "a position outside": (positions(3, 9999.0), ["--mpp", "2"], "1 of 60 spots lie outside"),
    "a stated scale of 0": (unchanged, ["--mpp", "0"], "--mpp 0: must be greater than 0"),
    "a stated scale too small": (unchanged, ["--mpp", "0.0005"], r"with 0\.0005 um per px the spots are .* set --mpp"),
    "a scale of 0 in the file": (factor("microns_per_pixel", 0.0), [], "microns_per_pixel is 0, expected a positive number; set --mpp"),
    "a scale too small in the file": (factor("microns_per_pixel", 0.0005), [], r"with 0\.0005 um per px the spots are .* set --mpp"),
    "a factor of 0": (factor("tissue_hires_scalef", 0.0), ["--mpp", "2"], "tissue_hires_scalef is 0, expected a positive number"),
    "a negative factor": (factor("tissue_hires_scalef", -1.0), ["--mpp", "2"], "tissue_hires_scalef is -1, expected a positive number"),
    "no scale": (unchanged, [], "no scale; set --mpp"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_a_section_is_refused_by_every_command(
    name: str, quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    change, options, message = FAULTS[name]
    data = adata()
    change(data)
    data.write_h5ad(tmp_path / "a.h5ad")
    source, out = str(tmp_path / "a.h5ad"), tmp_path / "out.h5ad"
    commands = {
        "build": ["shards", "build", source, "--out", str(tmp_path / "set"), "--tissue", "x"],
        "check": ["shards", "check", source, "--strict", "--out", str(tmp_path / "check"), "--tissue", "x"],
        "predict": ["predict", str(quick), source, "--genes", "ERBB2", "--out", str(out)],
        "embed": ["embed", str(quick), source, "--out", str(out)],
        "adapt": ["adapt", str(quick), source, "--out", str(tmp_path / "adapted")],
    }
    for command, arguments in commands.items():
        # A check reports what it finds while reading a section, and continues with the next one.
        assert main([*arguments, *options]) in ((1, 2) if command == "check" else (2,)), command
        told = "".join(capsys.readouterr())
        assert re.search(message, told), (command, told)
        assert "Traceback" not in told
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {"a.h5ad"}


def test_columns_of_positions_are_read_by_their_names_by_every_command(quick: Path, tmp_path: Path):
    answers = []
    for kind in ("plain", "swapped"):
        a, folder = adata(), tmp_path / kind
        folder.mkdir()
        if kind == "swapped":
            a.obsm["spatial"] = pd.DataFrame(XY[:, ::-1], index=a.obs_names, columns=["y", "x"])
        a.write_h5ad(folder / "a.h5ad")
        source, out = str(folder / "a.h5ad"), ["--mpp", "2", "--out", str(folder / "out.h5ad")]
        assert main(["predict", str(quick), source, "--genes", "ERBB2", *out]) == 0
        predicted = ad.read_h5ad(folder / "out.h5ad")
        assert main(["embed", str(quick), source, *out]) == 0
        embedded = ad.read_h5ad(folder / "out.h5ad")
        build_shards(open_source(folder / "a.h5ad", overrides=BUILD), folder / "set", **TILES)
        shards = ShardSet(folder / "set")
        answers.append((predicted.X, embedded.obsm["X_comtip"], shards.tiles(shards.source_order(0))))
    for plain, swapped in zip(*answers, strict=True):
        np.testing.assert_array_equal(plain, swapped)


# -- values that a shard set cannot store -----------------------------------------------------------------------


def read_nothing(*_: object, **__: object) -> None:
    raise AssertionError("a section was read")


@pytest.mark.parametrize(
    ("n", "diameter", "message"),
    [
        (1, True, "the distance between spots is nan um, but must be above 0 .* at least two spots"),
        (1, False, "the spot diameter is nan um, but must be above 0 .* at least two spots"),
    ],
)
def test_a_section_of_one_spot_is_refused_before_anything_is_read(
    n: int, diameter: bool, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    one = adata()[:n].copy()
    if not diameter:
        del one.uns["spatial"]["lib"]["scalefactors"]["spot_diameter_fullres"]
    one.write_h5ad(tmp_path / "a.h5ad")
    sources = open_source(tmp_path / "a.h5ad", overrides=BUILD)
    monkeypatch.setattr(SectionSource, "read", read_nothing)
    with pytest.raises(SourceError, match=f"^section a: {message}"):
        build_shards(sources, tmp_path / "set", **TILES)
    assert not (tmp_path / "set").exists()


def test_one_spot_is_predicted(quick: Path, tmp_path: Path):
    adata()[:1].copy().write_h5ad(tmp_path / "a.h5ad")
    arguments = ["predict", str(quick), str(tmp_path / "a.h5ad"), "--genes", "ERBB2", "--mpp", "2"]
    assert main([*arguments, "--out", str(tmp_path / "out.h5ad")]) == 0
    assert np.isfinite(ad.read_h5ad(tmp_path / "out.h5ad").X).all()


def test_spots_at_one_position_are_refused_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    same = adata()
    same.obsm["spatial"] = np.full((N, 2), 100.0)
    same.write_h5ad(tmp_path / "a.h5ad")
    sources = open_source(tmp_path / "a.h5ad", overrides=BUILD)
    monkeypatch.setattr(SectionSource, "read", read_nothing)
    with pytest.raises(SourceError, match=r"^section a: the distance between spots is 0 um"):
        build_shards(sources, tmp_path / "set", **TILES)


@pytest.mark.parametrize("diameter", [None, "NA", np.nan])
def test_a_section_without_a_spot_diameter_is_built(diameter: object, tmp_path: Path):
    a = adata()
    del a.uns["spatial"]["lib"]["scalefactors"]["spot_diameter_fullres"]
    if diameter is not None:
        a.uns["spatial"]["lib"]["scalefactors"]["spot_diameter_fullres"] = diameter
    a.write_h5ad(tmp_path / "a.h5ad")
    build_shards(open_source(tmp_path / "a.h5ad", overrides=BUILD), tmp_path / "set", **TILES)
    assert ShardSet(tmp_path / "set").manifest.sections[0].spot_diameter_um == pytest.approx(100, rel=0.01)
    assert verify(tmp_path / "set").ok


def test_the_longest_label_is_stored_and_a_longer_one_is_refused(tmp_path: Path):
    a = adata()
    for length in (4096, 4097):
        a.obs["label"] = ["L" * length, *["b"] * (N - 1)]
        a.write_h5ad(tmp_path / f"{length}.h5ad")
    build_shards(open_source(tmp_path / "4096.h5ad", overrides=BUILD), tmp_path / "set", **TILES)
    shards = ShardSet(tmp_path / "set")
    assert shards.spots["label"].str.len().max() == 4096
    assert verify(tmp_path / "set").ok
    with pytest.raises(SourceError, match=r"a label of 4,097 characters .* at most 4,096 are stored"):
        build_shards(open_source(tmp_path / "4097.h5ad", overrides=BUILD), tmp_path / "other", **TILES)
    assert not (tmp_path / "other" / "manifest.json").exists()
