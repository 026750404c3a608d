"""Reading of a safetensors file by offset: a tensor, or a piece of one, goes into memory that the caller provides.

The functions of the library map the file, so that its pages count as memory of the process until the file is closed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from comtip_fast.training.checkpoint.content import DELETE, CheckpointError

PIECE_BYTES = 4 << 20
"""Size in bytes of the pieces in which tensors are read, checked and sent."""
MOST_ELEMENTS = 1 << 48
"""Largest dimension of a tensor; PyTorch has no dimension of 2^63 elements."""
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Name of each type in safetensors."""
OF_NAME = {name: dtype for dtype, name in TYPES.items()}


@dataclass(frozen=True)
class Stored:
    """Shape and type of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


class TensorFile:
    """Reads tensors of a safetensors file; a context manager that closes the file on exit.

    Parameters
    ----------
    path
        The file, whose hash must have been checked.

    Raises
    ------
    CheckpointError
        The file cannot be opened, is not safetensors, or has a tensor of a type that no model uses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, "pt"):  # checks the whole header, and that the tensors fill the file
                pass
            self._file = path.open("rb", buffering=0)
        except (SafetensorError, ValueError, OSError) as error:
            raise CheckpointError(f"{path}: not safetensors ({error}); {DELETE}") from error
        self.tensors: dict[str, Stored] = {}
        self._begin: dict[str, int] = {}
        try:
            self._read_header()
        except CheckpointError:
            self._file.close()
            raise
        except (TypeError, KeyError, IndexError, ValueError, AttributeError) as error:
            # The library also reads headers in forms that no writer of safetensors writes.
            self._file.close()
            raise CheckpointError(
                f"{path}: its header is not one that a library of safetensors writes; {DELETE}"
            ) from error

    def _read_header(self) -> None:
        """Read shape, type and position of every tensor."""
        header_bytes = int.from_bytes(self._file.read(8), "little")
        header = json.loads(os.pread(self._file.fileno(), header_bytes, 8))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            if dtype not in OF_NAME:
                raise CheckpointError(f"{self.path}: tensors of type {dtype}, which no model has; {DELETE}")
            if max(shape, default=0) > MOST_ELEMENTS:
                raise CheckpointError(f"{self.path}: {name} has the shape {list(shape)}, which no model has; {DELETE}")
            self.tensors[name] = Stored(shape, OF_NAME[dtype])
            self._begin[name] = 8 + header_bytes + entry["data_offsets"][0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def copy(self, out: Tensor, name: str, start: int = 0) -> None:
        """Read elements of a flattened tensor, from ``start`` on.

        Parameters
        ----------
        out
            1-D, contiguous, in host memory and of the type of the tensor; filled.
        name
            Name of the tensor.
        start
            Index of the first element.

        Raises
        ------
        CheckpointError
            The file has become shorter.
        """
        left = memoryview(out.view(torch.uint8).numpy())  # type: ignore[arg-type]
        at = self._begin[name] + start * out.element_size()
        while left:
            count = os.preadv(self._file.fileno(), [left], at)
            if not count:
                raise CheckpointError(f"{self.path}: ends within the tensor {name}; {DELETE}")
            left, at = left[count:], at + count

    def whole(self, name: str) -> Tensor:
        """Return a tensor in its shape."""
        stored = self.tensors[name]
        out = torch.empty(stored.numel, dtype=stored.dtype)
        self.copy(out, name)
        return out.reshape(stored.shape)


def pieces(numel: int, item_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) element of pieces of at most :data:`PIECE_BYTES` of a tensor of ``numel`` elements."""
    length = max(1, PIECE_BYTES // item_bytes)
    for low in range(0, numel, length):
        yield low, min(numel, low + length)
