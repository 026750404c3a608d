"""Index of a checkpoint in parts (``shards.json``): which file holds which elements of which parameter.

    step_00000100/{part_00000.safetensors, part_00001.safetensors, ..., shards.json, state.json, SHA256SUMS}

File r was written by rank r. Its tensors are 1-D and named ``<key>/<parameter>``, with the keys ``weight``, ``exp_avg``,
``exp_avg_sq`` and, with ``optim.ema``, ``average``; they hold the elements ``offset`` to ``offset + length`` of the flattened
parameter. The file of rank 0 also holds the buffers, as ``buffer/<name>``. The index is checked, and compared with the sizes of the
files, before any tensor is allocated.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from comtip_fast.training.checkpoint.content import DELETE, CheckpointError, absence

INDEX = "shards.json"
MAX_INDEX_BYTES = 1 << 29
MAX_RANKS = 1 << 16
BUFFER = "buffer"
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Size in bytes of an element, by the name of its type in safetensors."""
Name = Annotated[str, Field(min_length=1, max_length=1024)]
Size = Annotated[int, Field(ge=0, lt=1 << 48)]
Shape = Annotated[list[Size], Field(max_length=16)]
Type = Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
_CHECKS = with_config(ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))


def part_name(rank: int) -> str:
    """Return the name of the file that a rank writes."""
    return f"part_{rank:05d}.safetensors"


@_CHECKS
@dataclass(frozen=True)
class PartFile:
    """One file of tensors."""

    name: Annotated[str, Field(pattern=r"^part_[0-9]{5}\.safetensors$")]
    bytes: Size
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@_CHECKS
@dataclass(frozen=True)
class Slice:
    """The elements of one parameter in one file."""

    offset: Size
    length: Size


@_CHECKS
@dataclass(frozen=True)
class IndexedParameter:
    """One parameter, and its slice in every file, in the order of the ranks."""

    name: Name
    shape: Shape
    dtype: Type
    keys: Annotated[list[Literal["weight", "exp_avg", "exp_avg_sq", "average"]], Field(min_length=1, max_length=4)]
    step: Annotated[float, Field(ge=0, lt=1 << 53)] | None
    """Number of optimizer steps; null for a frozen parameter."""
    slices: Annotated[list[Slice], Field(min_length=1, max_length=MAX_RANKS)]


@_CHECKS
@dataclass(frozen=True)
class IndexedBuffer:
    """One buffer in the file of rank 0."""

    name: Name
    shape: Shape
    dtype: Type


@_CHECKS
@dataclass(frozen=True)
class ShardIndex:
    """Content of ``shards.json``."""

    format: Literal["comtip-shards"]
    version: Literal[1]
    world_size: Annotated[int, Field(ge=1, le=MAX_RANKS)]
    files: Annotated[list[PartFile], Field(min_length=1, max_length=MAX_RANKS)]
    parameters: Annotated[list[IndexedParameter], Field(max_length=1 << 20)]
    buffers: Annotated[list[IndexedBuffer], Field(max_length=1 << 20)]

    @property
    def items(self) -> list[IndexedParameter | IndexedBuffer]:
        """Return parameters and buffers."""
        return [*self.parameters, *self.buffers]

    def to_json(self) -> str:
        """Return the content of the file."""
        return json.dumps(asdict(self)) + "\n"


_INDEX = TypeAdapter(ShardIndex)


def read_index(folder: Path) -> ShardIndex:
    """Read and check the index of a checkpoint in parts; reads no tensors.

    Raises
    ------
    CheckpointError
        The file is missing or too large, a value is out of bounds, the slices of a parameter do not cover it exactly once, or a
        file is smaller than its tensors or not of the stated size.
    """
    path = folder / INDEX
    if not path.is_file():
        raise CheckpointError(f"{path}: {absence(path)}; {DELETE}")
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_INDEX_BYTES >> 20} MiB; {DELETE}")
    try:
        index = _INDEX.validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; {DELETE}") from error
    if problem := _problem(index):
        raise CheckpointError(f"{path}: {problem}; {DELETE}")
    if problem := _wrong_size(index, folder):  # names the file itself
        raise CheckpointError(f"{problem}; {DELETE}")
    return index


def _problem(index: ShardIndex) -> str:
    """Return the first contradiction within an index as text; empty if there is none."""
    if [f.name for f in index.files] != [part_name(rank) for rank in range(index.world_size)]:
        return f"files are not those of {index.world_size} ranks"
    names = [item.name for item in index.items]
    if len(set(names)) != len(names):
        return "a parameter or buffer is listed twice"
    needed = [0] * index.world_size
    needed[0] = sum(math.prod(b.shape) * ITEM_BYTES[b.dtype] for b in index.buffers)
    for parameter in index.parameters:
        if len(parameter.slices) != index.world_size:
            return f"parameter {parameter.name!r}: {len(parameter.slices)} slices do not cover {index.world_size} files"
        end = 0
        for rank, part in enumerate(parameter.slices):
            if part.offset != end:
                return f"parameter {parameter.name!r}: its slices have gaps or overlaps"
            end += part.length
            needed[rank] += part.length * ITEM_BYTES[parameter.dtype] * len(parameter.keys)
        if end != math.prod(parameter.shape):
            return f"parameter {parameter.name!r}: slices of {end} elements do not cover the shape {parameter.shape}"
        if len(set(parameter.keys)) != len(parameter.keys) or parameter.keys[0] != "weight":
            return f"parameter {parameter.name!r}: keys {parameter.keys} are not weight, moments and average"
    for file, size in zip(index.files, needed, strict=True):
        if size > file.bytes:
            return f"{file.name}: {file.bytes} bytes cannot hold tensors of {size} bytes"
    return ""


def _wrong_size(index: ShardIndex, folder: Path) -> str:
    """Return what is wrong with the first file that is missing or does not have the stated size; empty if there is none."""
    for file in index.files:
        path = folder / file.name
        if not path.is_file():
            return f"{path}: {absence(path)}"
        if path.stat().st_size != file.bytes:
            return f"{path}: {path.stat().st_size} bytes, but the index states {file.bytes}"
    return ""
