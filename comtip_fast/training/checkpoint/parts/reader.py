"""Reading of a checkpoint in parts: elements of a parameter from the files that hold them, for any number of ranks."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from comtip_fast.training.checkpoint.content import DELETE, MISFIT, CheckpointError
from comtip_fast.training.checkpoint.parts.index import BUFFER, ShardIndex, part_name, read_index
from comtip_fast.training.checkpoint.parts.writer import TYPES

MOMENTS = ("exp_avg", "exp_avg_sq")
_OF_NAME = {name: dtype for dtype, name in TYPES.items()}


class ShardReader:
    """Reads slices of parameters; a context manager that closes the opened files on exit.

    The hashes of the files must have been checked before.

    Parameters
    ----------
    folder
        Folder of the checkpoint.

    Raises
    ------
    CheckpointError
        The index is invalid. Methods that read tensors raise this error if a file does not hold what the index states, or if a
        value is not finite.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index: ShardIndex = read_index(folder)
        self._parameters = {p.name: p for p in self.index.parameters}
        self._files: dict[int, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()
        self._stack.close()

    def read(self, name: str, key: str, start: int, stop: int) -> Tensor | None:
        """See :meth:`comtip_fast.training.engines.base.PartSource.read`."""
        parameter = self._parameters[name]
        if key not in parameter.keys:
            return None
        out = torch.empty(max(0, stop - start), dtype=_OF_NAME[parameter.dtype])
        for rank, part in enumerate(parameter.slices):
            low, high = max(start, part.offset), min(stop, part.offset + part.length)
            if low < high:
                found = self._slice(rank, f"{key}/{name}", [part.length], parameter.dtype)
                piece = out[low - start : high - start]
                piece.copy_(found[low - part.offset : high - part.offset])
                self._refuse_not_finite(piece, rank, f"{key}/{name}")
        return out

    def step_of(self, name: str) -> float:
        """See :meth:`comtip_fast.training.engines.base.PartSource.step_of`."""
        return self._parameters[name].step or 0.0

    def whole(self, name: str, key: str) -> Tensor | None:
        """Return a full parameter or moment, in its shape; None if the checkpoint has no such moment."""
        parameter = self._parameters[name]
        flat = self.read(name, key, 0, math.prod(parameter.shape))
        return None if flat is None else flat.reshape(parameter.shape)

    def buffers(self) -> dict[str, Tensor]:
        """Return the buffers of the module by name."""
        out = {}
        for buffer in self.index.buffers:
            name = f"{BUFFER}/{buffer.name}"
            found = self._slice(0, name, buffer.shape, buffer.dtype)
            out[buffer.name] = found[...] if buffer.shape else self._open(0).get_tensor(name)
            self._refuse_not_finite(out[buffer.name], 0, name)
        return out

    def check_fits(self, module: nn.Module) -> None:
        """Check that the checkpoint has exactly the parameters and buffers of a module, in the same shapes.

        Raises
        ------
        CheckpointError
            A tensor is missing, unknown or of another shape; the message names one such tensor.
        """
        wanted = {name: list(p.shape) for name, p in module.named_parameters()}
        wanted |= {name: list(module.get_buffer(name).shape) for name in buffer_names(module)}
        found = {item.name: item.shape for item in self.index.items}
        different = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
        if different:
            k = different[0]
            raise CheckpointError(
                f"{self.folder}: the weights do not fit the model of the config ({len(different)} tensors, e.g. {k}: "
                f"{found.get(k, 'absent')} in the checkpoint, {wanted.get(k, 'absent')} in the model); {MISFIT}"
            )

    @torch.no_grad()
    def load_untrained(self, module: nn.Module) -> None:
        """Load buffers and frozen parameters, which every rank holds, into a module."""
        for name, buffer in self.buffers().items():
            module.get_buffer(name).copy_(buffer)
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                value = self.whole(name, "weight")
                assert value is not None  # the index requires it
                parameter.copy_(value)

    def model(self) -> dict[str, Tensor]:
        """Return all parameters and buffers, whole, by name."""
        tensors = {p.name: self.whole(p.name, "weight") for p in self.index.parameters}
        return {name: t for name, t in tensors.items() if t is not None} | self.buffers()

    def optim(self) -> dict[str, Tensor]:
        """Return the whole optimizer state, named ``<parameter>/<entry>``."""
        out: dict[str, Tensor] = {}
        for p in self.index.parameters:
            if p.step is None:
                continue
            out |= {f"{p.name}/{key}": t for key in MOMENTS if (t := self.whole(p.name, key)) is not None}
            out[f"{p.name}/step"] = torch.tensor(p.step)
        return out

    def _open(self, rank: int) -> Any:
        path = self.folder / part_name(rank)
        if rank not in self._files:
            try:
                self._files[rank] = self._stack.enter_context(safe_open(path, "pt"))
            except (SafetensorError, ValueError, OSError) as error:
                raise CheckpointError(f"{path}: not safetensors ({error}); {DELETE}") from error
        return self._files[rank]

    def _slice(self, rank: int, name: str, shape: list[int], dtype: str) -> Any:
        """Return a tensor of a file as a slice that reads elements only when it is indexed."""
        path = self.folder / part_name(rank)
        try:
            found = self._open(rank).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: no tensor {name!r} ({error}); {DELETE}") from error
        if list(found.get_shape()) != shape or found.get_dtype() != dtype:
            raise CheckpointError(
                f"{path}: {name} is {found.get_dtype()} {found.get_shape()}, not {dtype} {shape} as the index states; {DELETE}"
            )
        return found

    def _refuse_not_finite(self, tensor: Tensor, rank: int, name: str) -> None:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            path = self.folder / part_name(rank)
            raise CheckpointError(f"{path}: {name} holds values that are not finite; {DELETE}")


def buffer_names(module: nn.Module) -> list[str]:
    """Return the names of the buffers in the state dict of a module."""
    named = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return [name for name in module.state_dict() if name not in named]
