"""A whole checkpoint is read tensor by tensor: by rank 0 for all ranks, of which each keeps what its engine owns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from comtip_fast.training.checkpoint.content import CheckpointError
from comtip_fast.training.checkpoint.tensor_file import TYPES, TensorFile, pieces
from testkit.distributed import run_distributed

WORKER = str(Path(__file__).with_name("restore_worker.py"))


def test_every_engine_restores_its_own_part_of_what_rank_zero_reads(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    output = run_distributed([WORKER, str(tmp_path)], 2, timeout_s=280, fork=True)
    for text in output:
        for what in ("ddp", "zero1", "zero2", "zero3", "weight of", "exp_avg_sq of"):
            assert f"OK {what}\n" in text


@pytest.mark.parametrize("dtype", TYPES)
def test_a_piece_of_a_file_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    first, second = torch.arange(6).reshape(2, 3).to(dtype), torch.arange(5).flip(0).to(dtype)
    save_file({"first": first, "second": second, "one": first[1, 1].clone(), "none": first[:0].clone()}, tmp_path / "x")
    with TensorFile(tmp_path / "x") as file:
        out = torch.empty(3, dtype=dtype)
        file.copy(out, "second", 2)
        assert torch.equal(out, second[2:])
        assert torch.equal(file.whole("first"), first)
        assert torch.equal(file.whole("one"), first[1, 1])
        assert file.whole("none").shape == (0, 3)


def test_a_file_that_has_become_shorter_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(9)}, tmp_path / "x")
    with TensorFile(tmp_path / "x") as file:
        (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
        with pytest.raises(CheckpointError, match="ends within the tensor a"):
            file.whole("a")


def test_pieces_cover_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comtip_fast.training.checkpoint.tensor_file.PIECE_BYTES", 12)
    assert list(pieces(7, 4)) == [(0, 3), (3, 6), (6, 7)]
    assert list(pieces(2, 16)) == [(0, 1), (1, 2)]
    assert list(pieces(0, 4)) == []
