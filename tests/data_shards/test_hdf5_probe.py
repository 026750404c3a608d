"""HDF5 files on which the HDF5 library hangs or crashes are refused by name, in bounded time, by every command."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from comtip_shards import SourceError
from comtip_shards.sources.hdf5 import probe as hdf5_probe
from comtip_shards.sources.hdf5.opening import open_hdf5
from comtip_shards.sources.hdf5.probe import Hdf5Probe

from comtip_fast.cli import main
from comtip_fast.cli.options import is_answer
from comtip_fast.evaluation.feature_files import read_embeddings
from comtip_fast.slide_prediction.run import stored_plan
from testkit.damaged_hdf5 import endless_attribute, endless_text, zero_heaps

CPU_S = 60
"""Without the check the commands would use CPU time forever; this ends the test."""


@pytest.fixture(autouse=True)
def limited() -> Iterator[None]:
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + CPU_S
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))
    yield
    hdf5_probe._probe.close()  # it inherited the limit
    resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, hard))


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an AnnData with an image whose attributes never end."""
    path = tmp_path_factory.mktemp("endless") / "s.h5ad"
    obs = pd.DataFrame({"in_tissue": 1}, index=[f"spot{i}" for i in range(8)])
    data = ad.AnnData(np.ones((8, 3), np.float32), obs, pd.DataFrame(index=["ERBB2", "CD74", "EPCAM"]))
    data.obsm["spatial"] = np.zeros((8, 2))
    data.write_h5ad(path)
    zero_heaps(path)
    return path


@pytest.mark.parametrize(
    ("write", "location"), [(endless_attribute, "/X"), (endless_text, "/group/names")], ids=["attribute", "text"]
)
def test_a_file_that_hangs_is_refused_by_name(write: Callable[[Path], Path], location: str, tmp_path: Path):
    path = write(tmp_path / "a.h5")
    for _ in range(2):  # the second time from what is known
        with pytest.raises(
            SourceError, match=rf"a\.h5: damaged, the HDF5 library never returns at '?{location}.*download"
        ):
            open_hdf5(path, "an HDF5 file", "download it again")
    open_hdf5(intact(tmp_path / "b.h5"), "an HDF5 file", "download it again").close()  # by a new helper process


def intact(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        file["names"] = np.array(["a", "b"], h5py.string_dtype())
        file["names"].attrs["x"] = "text"
    return path


def test_one_helper_process_serves_many_files_and_none_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    probe, started = Hdf5Probe(), []
    popen = hdf5_probe.subprocess.Popen
    monkeypatch.setattr(hdf5_probe.subprocess, "Popen", lambda *a, **k: started.append(1) or popen(*a, **k))
    try:
        for n in range(20):
            probe.check(intact(tmp_path / f"{n}.h5"))
        assert started == [1]
        monkeypatch.setattr(probe, "_ask", lambda path: "asked again")
        probe.check(tmp_path / "3.h5")
        with h5py.File(tmp_path / "3.h5", "a") as file:
            file["more"] = np.zeros(1000)
        with pytest.raises(SourceError, match="asked again"):
            probe.check(tmp_path / "3.h5")
    finally:
        probe.close()


def test_a_file_that_crashes_the_library_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    crash = tmp_path / "walk.py"
    crash.write_text("import os, signal\nprint('\"/obs\"', flush=True)\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setattr(hdf5_probe, "WALK", crash)
    probe = Hdf5Probe()
    with pytest.raises(SourceError, match=r"a\.h5: damaged, the HDF5 library crashes at '?/obs"):
        probe.check(intact(tmp_path / "a.h5"))


def test_a_helper_that_something_else_ends_blames_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    killed = tmp_path / "walk.py"
    killed.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setattr(hdf5_probe, "WALK", killed)
    Hdf5Probe().check(intact(tmp_path / "a.h5"))
    assert (
        "a.h5: not checked for damage that can make the HDF5 library hang, but read all the same, because signal 9 ended the helper process"
        in caplog.text
    )


def test_an_interrupted_question_is_not_answered_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(line: str) -> str:
        raise KeyboardInterrupt

    probe = Hdf5Probe()
    probe.check(intact(tmp_path / "a.h5"))
    process = probe._process
    intact(tmp_path / "b.h5")
    with monkeypatch.context() as patch:
        patch.setattr(hdf5_probe.json, "loads", interrupt)
        with pytest.raises(KeyboardInterrupt):
            probe.check(tmp_path / "b.h5")
    assert process is not None
    assert process.returncode == -signal.SIGKILL
    probe.check(intact(tmp_path / "c.h5"))
    probe.close()


def test_a_forked_process_has_a_helper_of_its_own(tmp_path: Path):
    hdf5_probe.probe_hdf5(intact(tmp_path / "a.h5"))
    before = hdf5_probe._probe
    child = os.fork()
    if child == 0:
        os._exit(0 if hdf5_probe._probe is not before else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_without_a_helper_process_files_are_read_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refuse(*args: object, **kwargs: object) -> None:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(hdf5_probe.subprocess, "Popen", refuse)
    Hdf5Probe().check(intact(tmp_path / "a.h5"))
    assert (
        "read all the same, because no helper process can be started (no more processes); allow more processes"
        in caplog.text
    )


def test_features_and_earlier_outputs_that_hang_are_refused(endless: Path):
    with pytest.raises(SourceError, match="never returns"):
        read_embeddings(endless)
    assert not is_answer(endless)
    assert stored_plan(endless) == ""


@pytest.mark.parametrize("command", ["build", "dry-run", "check", "predict", "embed", "evaluate"])
def test_every_command_refuses_a_file_that_hangs(
    command: str, endless: Path, quick: Path, tiny_shards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    facts = ["--species", "human", "--tissue", "breast", "--platform", "Visium", "--mpp", "1"]
    evaluate = ["evaluate", str(quick), "--shards", str(tiny_shards.path), "--out", str(tmp_path / "e"), "--tasks"]
    out = str(tmp_path / "x.h5ad")
    argv = {
        "build": ["shards", "build", str(endless), "--out", str(tmp_path / "o"), *facts],
        "dry-run": ["shards", "build", str(endless), "--out", str(tmp_path / "o"), "--dry-run", *facts],
        "check": ["shards", "check", str(endless), "--out", str(tmp_path / "o"), *facts],
        "predict": ["predict", str(quick), str(endless), "--out", out],
        "embed": ["embed", str(quick), str(endless), "--out", out],
        "evaluate": [*evaluate, "domains", "--labels", f"{endless}:in_tissue"],
    }[command]
    began = time.process_time()
    assert main(argv) > 0
    assert "s.h5ad: damaged, the HDF5 library never returns at" in "".join(capsys.readouterr())
    assert time.process_time() - began < CPU_S
