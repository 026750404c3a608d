"""Reading of a checkpoint in parts: elements of a parameter from the files that hold them, for any number of ranks."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn

from comtip_fast.training.checkpoint.content import DELETE, MISFIT, CheckpointError
from comtip_fast.training.checkpoint.parts.index import BUFFER, ShardIndex, part_name, read_index
from comtip_fast.training.checkpoint.reading import Content, LocalReader
from comtip_fast.training.checkpoint.tensor_file import OF_NAME, TYPES, Stored, TensorFile
from comtip_fast.training.protocol import WEIGHT


class ShardReader(LocalReader):
    """Reads slices of parameters; every rank can have its own reader.

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
        self.folder, self.content = folder, Content()
        self.index: ShardIndex = read_index(folder)
        self._parameters = {p.name: p for p in self.index.parameters}
        for p in self.index.parameters:
            self.content.tensors |= {(p.name, key): Stored(tuple(p.shape), OF_NAME[p.dtype]) for key in p.keys}
            if p.step is not None:
                self.content.steps[p.name] = p.step
        for b in self.index.buffers:
            self.content.tensors[b.name, WEIGHT] = Stored(tuple(b.shape), OF_NAME[b.dtype])
        self._files: dict[int, TensorFile] = {}
        self._stack = ExitStack()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()
        self._stack.close()

    def copy(self, out: Tensor, name: str, key: str, start: int) -> None:
        """See :meth:`.reading.LocalReader.copy`; an element may be in the file of any rank."""
        stop = start + out.numel()
        for rank, offset, length, full in self._slices(name, key):
            low, high = max(start, offset), min(stop, offset + length)
            if low < high:
                self._checked(rank, full, name).copy(out[low - start : high - start], full, low - offset)

    def where(self, name: str, key: str, start: int) -> str:
        """See :meth:`.reading.TensorReader.where`."""
        slices = [(rank, full) for rank, offset, length, full in self._slices(name, key) if start < offset + length]
        rank, full = slices[0]
        return f"{self.folder / part_name(rank)}: {full}"

    def _slices(self, name: str, key: str) -> list[tuple[int, int, int, str]]:
        """Return (rank, first element, number of elements, name in the file) of every slice of a parameter or buffer."""
        parameter = self._parameters.get(name)
        if parameter is None:
            return [(0, 0, self.content.tensors[name, key].numel, f"{BUFFER}/{name}")]
        return [(rank, s.offset, s.length, f"{key}/{name}") for rank, s in enumerate(parameter.slices)]

    def check_files(self) -> None:
        """Check that every file has the tensors that the index states, in shape and type; values are not read.

        Raises
        ------
        CheckpointError
            A file is not safetensors, or a tensor is missing or differs from the index.
        """
        for name, key in self.content.tensors:
            for rank, _, length, full in self._slices(name, key):
                if length or name not in self._parameters:
                    self._checked(rank, full, name)

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
        frozen = [(name, p) for name, p in module.named_parameters() if not p.requires_grad]
        for name, target in [*((name, module.get_buffer(name)) for name in buffer_names(module)), *frozen]:
            value = self.whole(name)
            assert value is not None  # see check_fits
            target.copy_(value)

    def _checked(self, rank: int, full: str, name: str) -> TensorFile:
        """Return the file of a rank; raise CheckpointError if its tensor ``full`` is not as the index states."""
        path = self.folder / part_name(rank)
        if rank not in self._files:
            self._files[rank] = self._stack.enter_context(TensorFile(path))
        found = self._files[rank].tensors.get(full)
        if found is None:
            raise CheckpointError(f"{path}: no tensor {full!r}; {DELETE}")
        stated = self.content.tensors[name, WEIGHT]
        if name in self._parameters:
            stated = Stored((self._parameters[name].slices[rank].length,), stated.dtype)
        if found != stated:
            raise CheckpointError(
                f"{path}: {full} is {TYPES[found.dtype]} {list(found.shape)}, not {TYPES[stated.dtype]} {list(stated.shape)} as the "
                f"index states; {DELETE}"
            )
        return self._files[rank]


def buffer_names(module: nn.Module) -> list[str]:
    """Return the names of the buffers in the state dict of a module."""
    named = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return [name for name in module.state_dict() if name not in named]
