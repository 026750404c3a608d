"""Outputs are written completely or not at all and never over an input; a full disk gives one clear message."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from comtip_shards import ShardSet
from comtip_shards.builder import writer as shard_writer
from safetensors import SafetensorError
from scipy import sparse

from comtip_fast.cli import main
from comtip_fast.config.io import load_config
from comtip_fast.data.h5ad import write_h5ad
from comtip_fast.runtime.csv_text import csv_text
from comtip_fast.training.checkpoint import resume
from comtip_fast.training.checkpoint import store as checkpoints
from comtip_fast.training.distributed.failures import RESTART_CODE, RestartError
from comtip_fast.training.protocol import TrainingError
from comtip_fast.training.task import build_task
from comtip_fast.training.trainer import Trainer
from tests.comtip_fast.trainer_standin import StandIn, config_of, fit

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run_dir(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = load_config(None, [*tiny_overrides, "train.steps=2", "train.validate_every=0", "train.device=cpu"])
    folder = tmp_path_factory.mktemp("quick") / "run"
    Trainer(build_task(config, torch.device("cpu")), config, folder).fit()
    return folder


def answer(seed: int = 0, n: int = 60) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    data = ad.AnnData(
        X=sparse.random(n, 40, 0.2, format="csr", dtype=np.float32, random_state=rng),
        obs=pd.DataFrame({"label": ["a", "b"] * (n // 2)}, index=[f"s{i}" for i in range(n)]),
        obsm={"spatial": rng.random((n, 2))},
        uns={"spatial": {"s": {"images": {"hires": rng.random((50, 50, 3))}, "scalefactors": {"x": 1.0}}}},
    )
    data.layers["raw"] = np.asarray(data.X.todense())
    return data


def test_an_h5ad_is_what_anndata_writes(tmp_path: Path):
    data = answer()
    write_h5ad(data, tmp_path / "ours.h5ad")
    data.write_h5ad(tmp_path / "theirs.h5ad", convert_strings_to_categoricals=False)
    ours, theirs = ad.read_h5ad(tmp_path / "ours.h5ad"), ad.read_h5ad(tmp_path / "theirs.h5ad")
    pd.testing.assert_frame_equal(ours.obs, theirs.obs)
    assert (ours.X != theirs.X).nnz == 0
    np.testing.assert_array_equal(ours.layers["raw"], theirs.layers["raw"])
    np.testing.assert_array_equal(ours.obsm["spatial"], theirs.obsm["spatial"])
    np.testing.assert_array_equal(
        ours.uns["spatial"]["s"]["images"]["hires"], theirs.uns["spatial"]["s"]["images"]["hires"]
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.h5ad", "theirs.h5ad"]


LIMITED = """
import sys, resource
from pathlib import Path
import anndata as ad
from comtip_fast.data.h5ad import write_h5ad
from comtip_fast.runtime.csv_text import csv_text
data, target, size = ad.read_h5ad(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
before = target.read_bytes()
for limit in range(0, size, max(1, size // 40)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write_h5ad(data, target)
        raise SystemExit(f"written below a limit of {limit} bytes")
    except OSError as error:
        assert error.filename == str(target), error
    assert target.read_bytes() == before, limit
    assert [p.name for p in target.parent.iterdir()] == [target.name]
print("done")
"""


def test_a_disk_that_fills_at_any_byte_is_an_error_and_no_crash(tmp_path: Path):
    (tmp_path / "out").mkdir()
    write_h5ad(answer(), tmp_path / "in.h5ad")
    write_h5ad(answer(1, 10), tmp_path / "out" / "x.h5ad")
    size = (tmp_path / "in.h5ad").stat().st_size
    arguments = [str(tmp_path / "in.h5ad"), str(tmp_path / "out" / "x.h5ad"), str(size)]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-2000:]


@pytest.fixture
def section(tiny_shards: ShardSet) -> str:
    return f"{tiny_shards.path}:x1"


def limited(size: int, *arguments: str) -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        return main(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("command", ["predict", "embed", "export", "evaluate", "check"])
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(
    command: str, run_dir: Path, section: str, tiny_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shards, old = section.rpartition(":")[0], tmp_path / "old"
    out = tmp_path / ("x.h5ad" if command in ("predict", "embed") else "out")
    arguments = {
        "predict": ["predict", str(run_dir), section, "--genes", "ERBB2"],
        "embed": ["embed", str(run_dir), section],
        "export": ["export", str(run_dir)],
        "check": ["shards", "check", str(tiny_source)],
        "evaluate": ["evaluate", str(run_dir), "--shards", shards, "--sections", "x1", "--null-draws", "2"],
    }[command]
    arguments += ["--out", str(out)]
    if command != "export":  # refuses a folder that is not empty
        assert main(arguments) == 0
        shutil.move(out, old)
        shutil.copytree(old, out) if old.is_dir() else shutil.copy(old, out)
    capsys.readouterr()
    assert limited(600, *arguments) == RESTART_CODE
    error_text = capsys.readouterr().err
    assert str(out) in error_text
    assert "the file exceeds the maximum file size; raise the limit (`ulimit -f`) or use" in error_text
    left = {p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file() and "old" not in p.parts}
    if command == "export":
        assert left == set()
    elif old.is_dir():
        assert {p.relative_to("out") for p in left} == {p.relative_to(old) for p in old.rglob("*") if p.is_file()}
        assert all((out / p.relative_to("out")).read_bytes() == (old / p.relative_to("out")).read_bytes() for p in left)
    else:
        assert left == {Path("x.h5ad")}
        assert out.read_bytes() == old.read_bytes()


def test_an_output_is_never_an_input(run_dir: Path, section: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one = tmp_path / "x.h5ad"
    assert main(["embed", str(run_dir), section, "--out", str(one)]) == 0
    (tmp_path / "soft.h5ad").symlink_to(one)
    os.link(one, tmp_path / "hard.h5ad")
    picture = tmp_path / "picture.h5ad"
    picture.write_text("an image, whatever its name")
    genes = tmp_path / "genes.h5ad"
    genes.write_text("ERBB2\n")
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    capsys.readouterr()
    cases = [
        ["embed", str(run_dir), str(one), "--out", str(tmp_path / n)] for n in ("x.h5ad", "soft.h5ad", "hard.h5ad")
    ]
    cases.append(["predict", str(run_dir), str(one), "--out", str(one)])
    cases.append(["predict", str(run_dir), str(one), "--image", str(picture), "--out", str(picture)])
    cases.append(["predict", str(run_dir), str(one), "--genes", f"@{genes}", "--out", str(genes)])
    for case in cases:
        assert main(case) == 2, case
        assert "is the input" in capsys.readouterr().err
        assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    # A file of a source's folder is refused; an earlier answer there is written anew.
    source = tmp_path / "source"
    source.mkdir()
    data = answer()
    data.write_h5ad(source / "counts.h5ad")
    assert main(["embed", str(run_dir), str(source), "--out", str(source / "counts.h5ad")]) == 2
    assert "is the input" in capsys.readouterr().err
    shutil.copy(one, source / "answer.h5ad")
    main(["embed", str(run_dir), str(source), "--out", str(source / "answer.h5ad")])
    assert "is the input" not in capsys.readouterr().err


def test_evaluate_looks_at_its_options_before_the_work(
    run_dir: Path, section: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shards = section.rpartition(":")[0]
    assert main(["evaluate", str(run_dir), "--shards", shards, "--sections", ",", "--out", str(tmp_path / "o")]) == 2
    assert "--sections ',' names nothing" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_table_holds_no_formula():
    """Names come from a shard set; a spreadsheet runs a cell that starts with = + - or @."""
    text = csv_text(
        pd.DataFrame({"gene": ["=cmd|' /C calc'!A0", "@A", "+A", "-A", "ACGT-1", "-1"], "score": [-1.5] * 6})
    )
    cells = [line.rsplit(",", 1)[0] for line in text.splitlines()[1:]]
    assert cells == ["'=cmd|' /C calc'!A0", "'@A", "'+A", "'-A", "ACGT-1", "-1"]
    assert text.splitlines()[1].endswith(",-1.5")


def test_export_looks_at_its_output_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "out").write_text("x")
    assert main(["export", str(tmp_path / "no_run"), "--out", str(tmp_path / "out")]) == 2
    assert f"--out {tmp_path / 'out'}: is a file; give a folder" in capsys.readouterr().err


COMMANDS = {
    "predict": ["predict", "run", "s.h5ad"],
    "embed": ["embed", "run", "s.h5ad"],
    "evaluate": ["evaluate", "run", "--shards", "set"],
    "adapt": ["adapt", "run", "s.h5ad"],
    "export": ["export", "run"],
    "pretrain": ["pretrain", "--config", "c.yaml"],
    "convert": ["convert", "s.h5ad"],
    "build": ["shards", "build", "source"],
    "check": ["shards", "check", "source"],
    "merge": ["shards", "merge", "part"],
    "vectors": ["genes", "vectors", "s.h5ad"],
    "sweep": ["plan", "--config", "c.yaml", "--sweep"],
    "loader": ["bench", "loader"],
    "step": ["bench", "step", "--config", "c.yaml"],
    "hest": ["bench", "hest", "folder", "--encoder", "x"],
}
SUFFIX = {"predict": ".h5ad", "embed": ".h5ad", "vectors": ".safetensors", "convert": ".zarr"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_looks_at_its_output_before_the_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """No input of these commands exists, so a message about --out comes before any of them is read."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "closed").mkdir()
    (tmp_path / "pointer").symlink_to(tmp_path / "gone")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed" and access(path, mode))
    name = f"x{SUFFIX.get(command, '')}"
    for out, message in (
        (tmp_path / ("n" * 256 + name), "file systems allow 255; give a shorter name"),
        (tmp_path / ("é" * 130) / name, "has 260 bytes, but file systems allow 255"),
        (tmp_path.joinpath(*["f" * 200] * 21, name), "but 4,095 are allowed; give a shorter name"),
        (tmp_path / "file" / name, f"{tmp_path / 'file'} is not a folder"),
        (tmp_path / "file" / "sub" / name, f"{tmp_path / 'file'} is not a folder"),
        (tmp_path / "pointer" / name, f"{tmp_path / 'pointer'} is not a folder"),
        (tmp_path / "closed" / name, f"no permission to write to {tmp_path / 'closed'}; give another folder"),
    ):
        assert main([*COMMANDS[command], "--out", str(out)]) == 2
        told = capsys.readouterr().err
        assert "error: --out" in told
        assert message in told
    assert sorted(p.name for p in tmp_path.iterdir()) == ["closed", "file", "pointer"]
    if command in ("evaluate", "adapt", "export", "pretrain", "hest", "sweep", "loader", "step"):
        assert main([*COMMANDS[command], "--out", str(tmp_path / "closed")]) == 2
        assert "closed: no permission to write to this folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["predict", "embed"])
@pytest.mark.parametrize(
    ("out", "message"),
    [("none/x.h5ad", "does not exist; create it first"), ("x.csv", "give a name that ends in .h5ad")],
)
def test_predict_looks_at_its_output_before_the_work(
    tmp_path: Path, command: str, out: str, message: str, capsys: pytest.CaptureFixture[str]
):
    genes = ["--genes", "ERBB2"] if command == "predict" else []
    arguments = [str(tmp_path / "no_run"), str(tmp_path / "no.h5ad"), *genes, "--out", str(tmp_path / out)]
    assert main([command, *arguments]) == 2
    assert message in capsys.readouterr().err


# -- classes of errors in training ------------------------------------------------------------------------------


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise error

    return fail


def wrapped(number: int) -> Exception:
    return SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")


FIXES = {
    errno.ENOSPC: "free disk space",
    errno.EDQUOT: "delete files of this user",
    errno.EFBIG: "raise the limit (`ulimit -f`)",
    errno.EIO: "check the disk",
    errno.ESTALE: "mount the file system again",
}


@pytest.mark.parametrize("number", FIXES)
@pytest.mark.parametrize("plain", [True, False])
def test_a_full_disk_at_the_export_is_fixed_by_another_start(
    number: int, plain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"
    error = OSError(number, os.strerror(number), "x") if plain else wrapped(number)
    with monkeypatch.context() as patch:
        patch.setattr(StandIn, "export", raising(error))
        with pytest.raises(
            RestartError, match=rf"during the export: .*; {re.escape(FIXES[number])}.*, then a launcher"
        ):
            fit(run)
    assert not (run / "export").exists()
    assert fit(run, resume=True).step == 17
    assert (run / "export" / "model.safetensors").is_file()


@pytest.mark.parametrize("target", ["config", "checkpoint", "export"])
@pytest.mark.parametrize("plain", [True, False])
def test_a_read_only_folder_is_bad_input_because_a_restart_does_not_help(
    target: str, plain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    error = OSError(errno.EROFS, os.strerror(errno.EROFS), "x") if plain else wrapped(errno.EROFS)
    owner, name = {
        "config": (resume, "write_atomic"),
        "checkpoint": (checkpoints, "save_file"),
        "export": (StandIn, "export"),
    }[target]
    monkeypatch.setattr(owner, name, raising(error))
    with pytest.raises(TrainingError, match=r"the file system is read-only.*; make it writable or give another folder"):
        fit(tmp_path / "run", "train.async_checkpoint=false")


def test_an_older_export_stays_until_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = tmp_path / "run"
    fit(run)
    before = (run / "export" / "model.safetensors").read_bytes()
    monkeypatch.setattr(StandIn, "export", raising(OSError(errno.ENOSPC, "No space left on device", "x")))
    config = config_of()
    with pytest.raises(RestartError):
        Trainer(StandIn(config), config, run).fit(resume=True)
    assert (run / "export" / "model.safetensors").read_bytes() == before


def test_a_file_system_without_locks_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    from comtip_fast.training.distributed import signals

    monkeypatch.setattr(signals.fcntl, "flock", raising(OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))))
    assert fit(tmp_path / "run").step == 17
    assert any("has no locks" in m for m in caplog.messages)


def test_a_manifest_is_written_last(tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A set with a manifest counts as complete, so all other files are flushed to the device before it."""
    from comtip_shards.builder.build import build_shards
    from comtip_shards.sources import open_source

    from tests.conftest import TILES

    order: list[str] = []
    for name in ("flush", "flush_tree", "write_atomic"):
        plain = getattr(shard_writer, name)
        monkeypatch.setattr(shard_writer, name, lambda path, *a, p=plain: (order.append(Path(path).name), p(path, *a)))
    build_shards(open_source(tiny_source), tmp_path / "set", **TILES)
    assert order[-1] == "manifest.json"
    assert {"shards", "overview", "genes.tsv", "spots.parquet"} <= set(order)
