"""The command that times kernels on a GPU, as far as a machine without one can run it: see tests/kernels/test_interpreted.py."""

import csv
import dataclasses
import os
import sys
from pathlib import Path

import pytest
import torch
from comtip_kernels.packed_attention import peers

from bench.evidence import cases, check
from bench.kernels import gpu

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs inside tests/kernels/test_interpreted.py", allow_module_level=True)


def test_a_wrong_kernel_is_not_timed():
    case = cases.table_cases("cpu", 20, 9, 5, 32)[0]
    check.check(case)
    with pytest.raises(SystemExit, match=r"table_pool .* bf16: a row of output 0 is off by 0.1"):
        check.check(dataclasses.replace(case, ours=lambda *t: case.reference(*t) * 1.1))


def test_a_few_wrong_rows_are_found():
    """15 of 8,192 zeroed rows change the norm of the whole tensor by 0.1 %, which bf16's tolerance would allow."""
    want = torch.randn(8192, 16, generator=torch.Generator().manual_seed(0))
    got = want.clone()
    got[-15:] = 0
    assert float((got - want).norm() / want.norm()) < check.PRECISIONS[0].tolerance * 3
    assert check.worst_row(got, want) > 0.5
    case = cases.attention_case("cpu", 12, 2, 16, 16)

    def last_tokens_zeroed(*qkv: torch.Tensor) -> torch.Tensor:
        out = case.ours(*qkv)
        return torch.cat([out[:-5], out[-5:] * 0])

    with pytest.raises(SystemExit, match="a row of output 0 is off by 1"):
        check.check(dataclasses.replace(case, ours=last_tokens_zeroed))


def test_a_probe_passes_as_many_rows_as_its_lengths_state(monkeypatch: pytest.MonkeyPatch):
    def varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k):
        assert q.shape[0] == int(cu_seq_q[-1])
        return q

    monkeypatch.setattr(peers, "can_peer", lambda like: True)
    monkeypatch.setattr(peers, "torch_varlen", lambda: varlen)
    assert cases.probe("varlen", "cpu", 2, 16) == ""
    monkeypatch.setattr(peers, "torch_varlen", lambda: None)
    assert "needs torch.nn.attention.varlen" in cases.probe("varlen", "cpu", 2, 16)


def test_clip_loss_is_timed_on_the_same_columns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cases, "find", lambda module, name: lambda: lambda *_: None)
    assert "open_clip ClipLoss" not in cases.infonce_case("cpu", 40, 60, 32).peers
    pairs_only = cases.infonce_case("cpu", 40, 40, 32)
    assert "open_clip ClipLoss" in pairs_only.peers
    assert pairs_only.inputs[0].shape == pairs_only.inputs[1].shape


def test_rows_that_are_left_unwritten_are_found():
    case = cases.table_cases("cpu", 20, 9, 5, 32)[0]

    def last_row_unwritten(*inputs: torch.Tensor) -> torch.Tensor:
        out = case.ours(*inputs)
        return torch.cat([out[:-1], torch.empty(1, out.shape[1], dtype=out.dtype)])

    with pytest.raises(SystemExit, match="a row of output 0 is off by inf"):
        check.check(dataclasses.replace(case, ours=last_row_unwritten))


def test_two_runs_with_other_bits_are_found():
    case, calls = cases.table_cases("cpu", 20, 9, 5, 32)[0], [0]

    def drifting(*inputs: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return case.ours(*inputs) * (1 + 2e-6 * calls[0])

    found = check.compare(dataclasses.replace(case, ours=drifting), check.PRECISIONS[1])
    assert found.error < found.tolerance
    assert found.changed == 0
    assert not found.ok


def test_a_missing_gpu_is_reported(monkeypatch: pytest.MonkeyPatch):
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
