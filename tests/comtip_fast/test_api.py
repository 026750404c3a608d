"""The Python interface: its docstring examples run in order on the tiny set."""

import doctest
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comtip_shards import SourceError

import comtip_fast
from comtip_fast import api, plots
from comtip_fast.cli import main
from comtip_fast.config.io import dump_config, load_config
from comtip_fast.inference.predictor import Predictor
from tests.conftest import TINY

EXAMPLES = (
    api.build_shards,
    api.pretrain,
    api.evaluate,
    api.evaluate_tasks,
    api.load,
    api.Model.predict,
    api.Model.compare,
    api.Model.embed,
    api.Model.predict_slide,
    api.Model.predict_tiles,
    api.adapt,
    plots.maps,
    plots.pcc_distribution,
    plots.calibration,
    plots.clusters,
    plots.scores,
    plots.ranked_genes,
)


@pytest.fixture(scope="module")
def folder(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(tiny_source, folder / "sections")
    settings = [*TINY, "data.shards=set", "train.validate_every=10"]
    (folder / "tiny.yaml").write_text(dump_config(load_config(None, settings)))
    return folder


def test_every_example_of_the_interface_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(folder)
    for function in EXAMPLES:
        found = doctest.DocTestFinder(recurse=False).find(function, function.__name__, globs={})
        assert [example.source for test in found for example in test.examples], f"{function.__name__} has no example"
        for test in found:
            runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
            runner.run(test)
            assert runner.summarize(verbose=False).failed == 0, capsys.readouterr().out
    assert (folder / "scores/report.html").is_file()


def test_the_package_exports_the_interface():
    for name in comtip_fast.__all__:
        assert getattr(comtip_fast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = comtip_fast.nothing


def test_facts_are_checked_before_anything_is_read(folder: Path):
    with pytest.raises(SourceError, match=r"unknown fact 'specie'"):
        comtip_fast.build_shards(folder / "sections", folder / "never", facts={"specie": "human"})
    assert not (folder / "never").exists()


@pytest.mark.parametrize(
    "call",
    [
        comtip_fast.load,
        lambda run: comtip_fast.evaluate(run, "set"),
        lambda run: comtip_fast.adapt(run, "set:x1"),
        lambda run: main(["predict", run, "set:x1", "--genes", "ACTB", "--out", "x.h5ad"]),
        lambda run: main(["embed", run, "set:x1", "--out", "x.h5ad"]),
        lambda run: main(["evaluate", run, "--shards", "set", "--out", "o"]),
        lambda run: main(["adapt", run, "set:x1", "--out", "o"]),
    ],
    ids=["load", "evaluate", "adapt", "comtip predict", "comtip embed", "comtip evaluate", "comtip adapt"],
)
def test_a_gpu_is_used_where_there_is_one(
    call: Callable[[str], object], tiny_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    class StopHereError(Exception):
        pass

    def stop(path: object, device: object = "cpu", vectors: object = None) -> None:
        raise StopHereError(str(device))

    monkeypatch.setattr(Predictor, "load", stop)
    with pytest.raises(StopHereError, match=r"^cuda$"):
        call(str(tiny_run))
