"""A whole checkpoint is read tensor by tensor: by rank 0 for all ranks, of which each keeps what its engine owns."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from comtip_fast.training.checkpoint import store
from comtip_fast.training.checkpoint.content import Checkpoint, CheckpointError
from comtip_fast.training.checkpoint.parts.writer import index_of, part_of_rank, write_part
from comtip_fast.training.checkpoint.reading import HeldReader
from comtip_fast.training.checkpoint.schema import check_optimizer_state
from comtip_fast.training.checkpoint.tensor_file import TYPES, TensorFile, pieces
from comtip_fast.training.engines.base import ParameterPart
from testkit.distributed import run_distributed

WORKER = str(Path(__file__).with_name("restore_worker.py"))


def test_every_engine_restores_its_own_part_of_what_rank_zero_reads(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    output = run_distributed([WORKER, str(tmp_path)], 2, timeout_s=280, fork=True)
    for text in output:
        for what in ("ddp", "zero1", "zero2", "zero3", "weight of", "exp_avg_sq of", "an error of rank 0"):
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


HEADERS = {
    "a sequence instead of an entry": {"a": ["F32", [16], [0, 64]]},
    "a mapping instead of a type": {"a": {"dtype": {"F32": None}, "shape": [16], "data_offsets": [0, 64]}},
    "a dimension that PyTorch has not": {
        "a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]},
        "b": {"dtype": "F32", "shape": [2**63, 0], "data_offsets": [64, 64]},
    },
}
"""Headers that the library of safetensors accepts."""


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_an_older_checkpoint_is_used_if_a_header_cannot_be_read(tmp_path: Path, header: dict[str, object]) -> None:
    for step in (1, 2):
        store.save(tmp_path, step, Checkpoint({"a": torch.ones(16)}, {}, {"step": step}))
    folder, text = store.folder_of(tmp_path, 2), json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in store.FILES}
    (folder / "SHA256SUMS").write_text("".join(f"{found}  {name}\n" for name, found in sums.items()))
    found = store.newest_good(tmp_path, store.load_state)
    assert found is not None
    assert found[0] == 1


def test_an_older_checkpoint_is_used_if_a_part_lacks_a_tensor(tmp_path: Path) -> None:
    for step in (1, 2):
        parts = tmp_path / store.new_parts_folder(tmp_path, step)
        written = []
        for rank in range(2):
            tensors = {"weight": torch.ones(4), "exp_avg": torch.ones(4), "exp_avg_sq": torch.ones(4)}
            own = part_of_rank(rank, [ParameterPart("a", (8,), 4 * rank, tensors, 1.0)], {}, copy=True)
            if (rank, step) == (1, 2):
                del own.tensors["exp_avg/a"]
            written.append(write_part(parts, own))
        store.publish_parts(tmp_path, step, parts, index_of(written), {"step": step})
    found = store.newest_good(tmp_path, store.load_state)
    assert found is not None
    assert found[0] == 1


def test_an_average_of_another_shape_is_refused() -> None:
    module = torch.nn.Module()
    module.scale = torch.nn.Parameter(torch.ones(1))
    moments = {"scale/exp_avg": torch.ones(()), "scale/exp_avg_sq": torch.ones(()), "scale/step": torch.ones(())}
    check_optimizer_state(module, HeldReader(Checkpoint({}, moments, {}, {"scale": torch.ones(1)})))
    with pytest.raises(CheckpointError, match="moving average 'scale' does not fit"):
        check_optimizer_state(module, HeldReader(Checkpoint({}, moments, {}, {"scale": torch.ones(())})))
