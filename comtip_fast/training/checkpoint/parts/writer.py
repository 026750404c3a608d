"""Writing of the part of a checkpoint that a rank owns, and the index of the parts of all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from comtip_shards.storage.atomic import flush
from safetensors.torch import save_file
from torch import Tensor

from comtip_fast.training.checkpoint.content import sha256_of
from comtip_fast.training.checkpoint.parts.index import (
    BUFFER,
    IndexedBuffer,
    IndexedParameter,
    PartFile,
    ShardIndex,
    Slice,
    part_name,
)
from comtip_fast.training.checkpoint.tensor_file import TYPES
from comtip_fast.training.engines.base import ParameterPart


@dataclass
class RankPart:
    """What one rank writes, in host memory: its tensors by their name in the file, and their offsets."""

    rank: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    parameters: list[IndexedParameter] = field(default_factory=list)
    """Each with the slice of this rank only."""
    buffers: list[IndexedBuffer] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Return the size of the tensors in bytes."""
        return sum(t.nbytes for t in self.tensors.values())


@dataclass(frozen=True)
class Written:
    """A written part, without its tensors."""

    file: PartFile
    parameters: list[IndexedParameter]
    buffers: list[IndexedBuffer]


def part_of_rank(rank: int, parts: Iterable[ParameterPart], buffers: dict[str, Tensor], *, copy: bool) -> RankPart:
    """Return what a rank writes.

    Parameters
    ----------
    rank
        The rank; rank 0 also writes the buffers.
    parts
        The parts of parameters that the rank owns.
    buffers
        Buffers of the module, equal on all ranks.
    copy
        Whether to copy tensors that are in host memory, so that the next step cannot change them.
    """
    out = RankPart(rank)
    for part in parts:
        weight = part.tensors["weight"]
        keys: Any = list(part.tensors)
        own = Slice(part.start, weight.numel())
        dtype: Any = TYPES[weight.dtype]
        out.parameters.append(IndexedParameter(part.name, list(part.shape), dtype, keys, part.step, [own]))
        if weight.numel():
            out.tensors |= {f"{key}/{part.name}": _on_host(t, copy) for key, t in part.tensors.items()}
    if rank == 0:
        for name, buffer in buffers.items():
            kind: Any = TYPES[buffer.dtype]
            out.buffers.append(IndexedBuffer(name, list(buffer.shape), kind))
            out.tensors[f"{BUFFER}/{name}"] = _on_host(buffer, copy=True)  # buffers may share memory
    return out


def _on_host(tensor: Tensor, copy: bool) -> Tensor:
    """Return the tensor in host memory, contiguous; always a copy if ``copy`` is set."""
    if tensor.device.type != "cpu":
        return tensor.detach().cpu().contiguous()
    return tensor.detach().clone(memory_format=torch.contiguous_format) if copy else tensor.detach().contiguous()


def write_part(folder: Path, part: RankPart) -> Written:
    """Write, flush and hash the file of one rank, and release its tensors; an incomplete file is removed."""
    path = folder / part_name(part.rank)
    try:
        save_file(part.tensors, path)
        path.chmod(0o644)  # safetensors creates files with mode 0600
        flush(path)
        file = PartFile(path.name, path.stat().st_size, sha256_of(path))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    part.tensors.clear()
    return Written(file, part.parameters, part.buffers)


def index_of(written: list[Written]) -> ShardIndex:
    """Return the index of the parts of all ranks, in the order of the ranks."""
    first = written[0]
    parameters = []
    for i, parameter in enumerate(first.parameters):
        slices = [part.parameters[i].slices[0] for part in written]
        if any(part.parameters[i].name != parameter.name for part in written):
            raise AssertionError(f"ranks disagree on parameter {i}")
        parameters.append(
            IndexedParameter(parameter.name, parameter.shape, parameter.dtype, parameter.keys, parameter.step, slices)
        )
    return ShardIndex("comtip-shards", 1, len(written), [part.file for part in written], parameters, first.buffers)
