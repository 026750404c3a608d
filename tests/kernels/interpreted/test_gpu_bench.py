"""The command that times kernels on a GPU, as far as a machine without one can run it: see tests/kernels/test_interpreted.py."""

import csv
import dataclasses
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from comtip_kernels.packed_attention import peers

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
    lines = capsys.readouterr().out.splitlines()
    for op in OPS:
        last = [line.split()[-1] for line in lines if line.startswith(f"{op} ")]
        sizes = 2 if op == "infonce" else 1
        masked = 4 if op == "infonce" else 0
        assert last == ["correct"] * (sizes + masked) + ["ran", "ran"] * sizes
    assert not out.exists()


def test_a_wrong_kernel_is_not_timed():
    case = gpu.table_cases("cpu", True)[0]
    gpu.check(case)
    with pytest.raises(SystemExit, match=r"table_pool .* bf16: a row of output 0 is off by 0.1"):
        gpu.check(dataclasses.replace(case, ours=lambda *t: case.reference(*t) * 1.1))


def test_a_few_wrong_rows_are_found():
    """15 of 8,192 zeroed rows change the norm of the whole tensor by 0.1 %, which bf16's tolerance would allow."""
    want = torch.randn(8192, 16, generator=torch.Generator().manual_seed(0))
    got = want.clone()
    got[-15:] = 0
    assert float((got - want).norm() / want.norm()) < gpu.TOLERANCE["bf16"] * 3
    assert gpu.worst_row(got, want) > 0.5
    case = gpu.attention_case("cpu", True, 16)

    def last_tokens_zeroed(*qkv: torch.Tensor) -> torch.Tensor:
        out = case.ours(*qkv)
        return torch.cat([out[:-5], out[-5:] * 0])

    with pytest.raises(SystemExit, match="a row of output 0 is off by 1"):
        gpu.check(dataclasses.replace(case, ours=last_tokens_zeroed))


def test_a_probe_passes_as_many_rows_as_its_lengths_state(monkeypatch: pytest.MonkeyPatch):
    def varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k):
        assert q.shape[0] == int(cu_seq_q[-1])
        return q

    monkeypatch.setattr(peers, "can_peer", lambda like: True)
    monkeypatch.setattr(peers, "torch_varlen", lambda: varlen)
    assert gpu.probe("varlen", "cpu", 2, 16) == ""
    monkeypatch.setattr(peers, "torch_varlen", lambda: None)
    assert "needs a torch" in gpu.probe("varlen", "cpu", 2, 16)


def test_clip_loss_is_timed_on_the_same_columns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "_import", lambda module, name: lambda: lambda *_: None)
    assert "open_clip" not in gpu.infonce_case("cpu", True).peers
    pairs_only = gpu.infonce_case("cpu", True, further=False)
    assert "open_clip" in pairs_only.peers
    assert pairs_only.inputs[0].shape == pairs_only.inputs[1].shape


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
