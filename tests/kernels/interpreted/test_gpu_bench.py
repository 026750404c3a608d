"""The command that times kernels on a GPU, as far as a machine without one can run it: see tests/kernels/test_interpreted.py."""

import csv
import dataclasses
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs inside tests/kernels/test_interpreted.py", allow_module_level=True)

SPEC = importlib.util.spec_from_file_location("gpu", Path(__file__).parents[3] / "bench/kernels/gpu.py")
gpu = importlib.util.module_from_spec(SPEC)
sys.modules["gpu"] = gpu  # where its dataclass looks for its module
SPEC.loader.exec_module(gpu)
OPS = (
    "infonce",
    "infonce_block",
    "gene_sentence_embedding",
    "packed_attention",
    "table_pool",
    "level_cross_entropy",
    "pair_scores",
)


def test_every_path_runs_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    out = tmp_path / "results.csv"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--out", str(out)])
    gpu.main()
    reported = capsys.readouterr().out.splitlines()
    for op in OPS:
        assert [line.split()[-1] for line in reported if line.startswith(f"{op} ")] == ["correct", "ran", "ran"]
    assert not out.exists()


def test_a_wrong_kernel_is_not_timed():
    case = gpu.table_cases("cpu", True)[0]
    gpu.check(case)
    with pytest.raises(SystemExit, match=r"table_pool .* output 0 is off by"):
        gpu.check(dataclasses.replace(case, ours=lambda *t: case.reference(*t) * 1.1))


def test_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        gpu.main()


def test_rows_are_appended(tmp_path: Path):
    row = dict.fromkeys(gpu.COLUMNS, "1") | gpu.about()
    for _ in range(2):
        gpu.append(tmp_path / "results.csv", [row])
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert rows[0]["torch"] == torch.__version__
    assert rows[0]["commit"]
