"""Options at and beyond their bounds are refused by name, before any work: 0, nan, inf, negative, empty, a folder for a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from comtip_shards import SourceError
from comtip_shards.sections.splits import propose_split

from comtip_fast.cli import main
from comtip_fast.cli.options import at_least, names_in
from comtip_fast.shards import build_shards, open_sections, plan_build
from testkit.tiny import write_tiny_source

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs/demo_cpu.yaml")
PLAN, EVALUATE = ["plan", "--config", CONFIG], ["evaluate", "run", "--shards", "set", "--out", "out"]
BUILD, CHECK = ["shards", "build", "{source}", "--out", "{out}"], ["shards", "check", "{source}", "--out", "{out}"]
PREDICT, ADAPT = ["predict", "run", "{source}", "--out", "{out}.h5ad"], ["adapt", "run", "{source}", "--out", "{out}"]
VECTORS = ["genes", "vectors", "{source}", "--out", "{out}.safetensors"]

REFUSED = {
    "an empty list of sections": ([*BUILD, "--samples", ","], "--samples ',' names nothing"),
    "an empty list of sections to check": ([*CHECK, "--samples", ""], "--samples '' names nothing"),
    "an empty list of sections to score": ([*EVALUATE, "--sections", " , "], "names nothing"),
    "an unknown section": ([*BUILD, "--samples", "nope"], "no section 'nope'"),
    "strict in a dry run": ([*BUILD, "--strict", "--dry-run"], "--strict has no effect here: a dry run reads headers only"),
    "a cache for a local source": ([*BUILD, "--cache", "x"], "--cache has no effect here"),
    "a cache for a local source in a dry run": ([*BUILD, "--cache", "x", "--dry-run"], "--cache has no effect here"),
    "a cache for a check": ([*CHECK, "--cache", "x"], "--cache has no effect here"),
    "trust without a scale": ([*BUILD, "--trust-mpp", "yes"], "--trust-mpp has no effect here: no --mpp is stated"),
    "a seed without auto-split": ([*BUILD, "--seed", "1"], "--seed has no effect here"),
    "a negative seed": ([*BUILD, "--seed", "-1"], "give an integer of at least 0"),
    "no processes": ([*BUILD, "--jobs", "0"], "give an integer of at least 1"),
    "shares that are no numbers": ([*BUILD, "--auto-split", "nan,0.5,0.5"], "--auto-split nan,0.5,0.5: invalid shares"),
    "an infinite share": ([*BUILD, "--auto-split", "inf,0,0"], "--auto-split inf,0,0: invalid shares"),
    "a filter without values": ([*BUILD, "--where", "tissue="], "--where key tissue"),
    "a filter without a key": ([*BUILD, "--where", "=breast"], "--where key '' is unknown"),
    "a split of an unknown section": ([*BUILD, "--split", "nope=train"], "no section nope"),
    "an unknown exception": ([*BUILD, "--allow-benchmark", "nope"], "nope"),
    "ids in a folder": ([*BUILD, "--benchmark-ids", "{folder}"], "cannot be read as a list of benchmark ids"),
    "a part of none": ([*BUILD, "--part", "0/0"], "--part 0/0 is out of range"),
    "a quality of 0": ([*BUILD, "--quality", "0"], "--quality 0 is out of range"),
    "a tile of no px": ([*BUILD, "--tile-px", "0"], "--tile-px 0 is out of range; use 8 to 4096"),
    "a scale of nan": ([*BUILD, "--mpp", "nan"], "--mpp nan"),
    "an infinite scale": ([*CHECK, "--mpp", "inf"], "--mpp inf"),
    "a negative scale": ([*PREDICT, "--mpp", "-1"], "--mpp -1"),
    "a share of nan": ([*BUILD, "--min-cover", "nan"], "--min-cover nan"),
    "a tissue of spaces": ([*BUILD, "--tissue", "  "], "--tissue"),
    "an image that is a folder": ([*BUILD, "--image", "{folder}"], "--image"),
    "an output that is a file": ([*BUILD[:-1], "{file}"], "is a file; give a folder"),
    "a report that is a file": ([*CHECK[:-1], "{file}"], "is a file; give a folder"),
    "scores in a file": ([*EVALUATE[:-1], "{file}"], "--out {file}: is a file; give a folder"),
    "an adapted model in a file": ([*ADAPT[:-1], "{file}"], "--out {file}: is a file; give a folder"),
    "a run in a file": (["pretrain", "--config", CONFIG, "--out", "{file}"], "--out {file}: is a file; give a folder"),
    "an export in a file": (["export", "run", "--out", "{file}"], "--out {file}: is a file; give a folder"),
    "a sweep in a file": ([*PLAN, "--sweep", "--out", "{file}"], "--out {file}: is a file; give a folder"),
    "a benchmark in a file": (["bench", "loader", "--out", "{file}"], "--out {file}: is a file; give a folder"),
    "negative draws of the null": ([*EVALUATE, "--null-draws", "-1"], "give an integer of at least 0"),
    "negative draws": ([*EVALUATE, "--tasks", "pairs", "--bootstrap", "-1"], "give an integer of at least 0"),
    "no epochs": ([*EVALUATE, "--tasks", "finetune", "--epochs", "0"], "give an integer of at least 1"),
    "a negative seed of nulls": ([*EVALUATE, "--seed", "-3"], "give an integer of at least 0"),
    "no splits": ([*ADAPT, "--splits", "0"], "give an integer of at least 1"),
    "a negative seed of blocks": ([*ADAPT, "--seed", "-1"], "give an integer of at least 0"),
    "a share of spots of nan": ([*ADAPT, "--fraction", "nan"], "--fraction nan"),
    "a prediction that is a folder": (["predict", "run", "{source}", "--out", "{h5ad}"], "is a folder; give the name of a file"),
    "an embedding that is a folder": (["embed", "run", "{source}", "--out", "{h5ad}"], "is a folder; give the name of a file"),
    "no components": ([*VECTORS, "--components", "0"], "give an integer of at least 1"),
    "a detection of nan": ([*VECTORS, "--min-detection", "nan"], "--min-detection nan"),
    "vectors without a file": (["genes", "vectors", "x", "--out", "x.txt"], "give a name that ends in .safetensors"),
    "a config that is a folder": (["plan", "--config", "{folder}"], "{folder}: a folder or device, not a file; give a YAML file"),
    "no devices": ([*PLAN, "--gpus", "0"], "not a cluster"),
    "an infinite tile": ([*PLAN, "--tile-kb", "inf"], "--tile-kb inf: must be a finite number above 0"),
    "a tile of nan": ([*PLAN, "--tile-kb", "nan"], "--tile-kb nan: must be a finite number above 0"),
    "an efficiency of nan": ([*PLAN, "--link-efficiency", "nan"], "--link-efficiency nan: give a share of the peak rate, above 0 and at most 1"),
    "a launch time of nan": ([*PLAN, "--launch-us", "nan"], "--launch-us nan: give a finite number of microseconds"),
    "an infinite launch time": ([*PLAN, "--launch-us", "inf"], "--launch-us inf: give a finite number of microseconds"),
    "an infinite loader": ([*PLAN, "--loader-tiles-per-s", "inf"], "--loader-tiles-per-s inf: must be a finite number above 0"),
    "no devices in a sweep": ([*PLAN, "--sweep", "--most", "0"], "--most 0: give a number of devices of at least 1"),
    "a share of slightly more than 1": ([*PLAN, "--link-efficiency", "1.0000001"], "--link-efficiency 1.0000001: give a share"),
    "a prediction in a file": (["predict", "run", "{source}", "--out", "{file}/x.h5ad"], "{file} is not a folder; give a path in a folder"),
    "a conversion in a file": (["convert", "{source}", "--out", "{file}/x.zarr"], "{file} is not a folder; give a path in a folder"),
    "a grid of no slide": ([*PREDICT[:2], "{folder}/a.tif", *PREDICT[3:], "--grid", "square"], "a.tif does not exist; check the path"),
    "a grid of a folder of sections": ([*PREDICT, "--grid", "square"], "with an --out that ends in .h5ad, the folder {source} is read as sections"),
    "a tile of no px in a benchmark": (["bench", "loader", "--px", "0"], "--px 0: give a width from 8 to 4096 px"),
    "a name that is too long": (["export", "run", "--out", "a" * 300], " has 300 bytes, but file systems allow 255; give a shorter name"),
    "negative epochs": (["bench", "loader", "--epochs", "-1"], "give an integer of at least 0"),
}  # fmt: skip


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("paths")
    (folder / "file").write_text("x")
    (folder / "a.h5ad").mkdir()
    source = write_tiny_source(folder / "source").parent
    return {
        "source": str(source),
        "folder": str(folder),
        "file": str(folder / "file"),
        "h5ad": str(folder / "a.h5ad"),
        "out": str(folder / "out"),
    }


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_out_of_bounds_is_refused_by_the_name_of_its_option(
    name: str, paths: dict[str, str], capsys: pytest.CaptureFixture[str]
):
    arguments, message = REFUSED[name]
    try:
        code = main([a.format(**paths) for a in arguments])
    except SystemExit as end:  # argparse
        code = end.code
    told = capsys.readouterr().err
    assert message.format(**paths) in told
    assert code == 2
    assert "Traceback" not in told
    assert not Path(paths["out"]).exists()


@pytest.mark.parametrize("um", [0.0, -1.0, float("nan"), float("inf"), 1e6])
def test_a_width_of_a_tile_out_of_bounds_is_refused_by_build_check_and_dry_run(
    um: float, paths: dict[str, str], capsys: pytest.CaptureFixture[str]
):
    for arguments in (BUILD, CHECK, [*BUILD, "--dry-run"]):
        assert main([a.format(**paths) for a in [*arguments, "--tile-um", str(um)]]) == 2
        assert f"--tile-um {um:g}: out of range; give the width of a tile in um, 1 to 10000" in capsys.readouterr().err
    assert not Path(paths["out"]).exists()


def test_the_python_functions_refuse_the_same(paths: dict[str, str], tmp_path: Path):
    for function in (open_sections, plan_build, lambda source, **kw: build_shards(source, tmp_path / "x", **kw)):
        with pytest.raises(SourceError, match="`samples` names no section; give ids such as "):
            function(paths["source"], samples=[])
        with pytest.raises(SourceError, match=r"`cache` has no effect here: .* names no URL"):
            function(paths["source"], cache=tmp_path)
    table = tmp_path / "study.csv"
    table.write_text(f"path\n{paths['source']}\n")
    with pytest.raises(SourceError, match=r"`cache` has no effect here: .*study\.csv names no URL"):
        open_sections(table, cache=tmp_path)
    with pytest.raises(SourceError, match="invalid shares"):
        propose_split([], [np.nan, 0.5, 0.5], 0)


def test_the_dry_run_tells_what_the_policy_does(
    paths: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    table = tmp_path / "study.csv"
    table.write_text(f"path,id\n{paths['source']},\n{tmp_path / 'nowhere.h5ad'},x\n")
    told = {}
    for policy in ("stop", "skip"):
        assert (
            main(["shards", "build", str(table), "--out", str(tmp_path / "s"), "--dry-run", "--on-error", policy]) == 1
        )
        told[policy] = capsys.readouterr().out
    assert "with --on-error stop a build ends with the first of these sections" in told["stop"]
    assert "with --on-error skip a build leaves these sections out" in told["skip"]


def test_helpers():
    assert at_least(0)("0") == 0
    assert names_in("--x", ["a, b", "b", "c,"]) == ["a", "b", "c"]
