"""Tensors of a checkpoint, read one at a time: from its files, from memory, or by rank 0 for all ranks.

An engine asks for the elements that it owns (:class:`.protocol.PartSource`), so no rank holds a checkpoint in addition to its own state.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from comtip_fast.collectives import Group
from comtip_fast.training.checkpoint.content import DELETE, Checkpoint, CheckpointError
from comtip_fast.training.checkpoint.tensor_file import Stored, TensorFile, pieces
from comtip_fast.training.distributed.process_group import Pause, broadcast_into, on_rank_zero
from comtip_fast.training.protocol import AVERAGE, MOMENTS, WEIGHT

STEP = "step"
"""Key of a parameter's number of optimizer steps; its other keys are those of :mod:`.protocol`."""


@dataclass
class Content:
    """What a checkpoint holds, without the values."""

    tensors: dict[tuple[str, str], Stored] = field(default_factory=dict)
    """By name of the parameter or buffer, and key."""
    steps: dict[str, float] = field(default_factory=dict)
    """Number of optimizer steps of each trained parameter."""

    def names(self, key: str) -> list[str]:
        """Return the names of parameters and buffers that have ``key``."""
        return [name for name, own in self.tensors if own == key]


class TensorReader(ABC):
    """Base of all readers: a :class:`.protocol.PartSource`, and a context manager that closes its files on exit.

    Attributes
    ----------
    folder
        Folder of the checkpoint, for messages.
    content
        What the checkpoint holds.
    """

    folder: Path
    content: Content

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    @abstractmethod
    def read(self, name: str, key: str, start: int, stop: int) -> Tensor | None:
        """See :meth:`.protocol.PartSource.read`; raises :class:`CheckpointError` for values that are not finite."""

    def where(self, name: str, key: str, start: int) -> str:
        """Return where an element is, for messages."""
        return f"{self.folder}: {key} of {name}"

    def refuse_not_finite(self, piece: Tensor, name: str, key: str, start: int) -> None:
        """Raise :class:`CheckpointError` if an element of a 1-D piece, which begins at element ``start``, is not finite."""
        if piece.is_floating_point() and not torch.isfinite(piece).all():
            at = start + int(torch.isfinite(piece).logical_not().nonzero()[0])
            raise CheckpointError(f"{self.where(name, key, at)} holds values that are not finite; {DELETE}")

    def step_of(self, name: str) -> float:
        """See :meth:`.protocol.PartSource.step_of`."""
        return self.content.steps.get(name, 0.0)

    def whole(self, name: str, key: str = WEIGHT) -> Tensor | None:
        """Return a parameter, buffer, moment or average in its shape; None if the checkpoint has none."""
        stored = self.content.tensors.get((name, key))
        flat = None if stored is None else self.read(name, key, 0, stored.numel)
        return None if stored is None or flat is None else flat.reshape(stored.shape)

    def all_of(self, key: str) -> Iterator[tuple[str, Tensor]]:
        """Yield name and tensor of everything that has ``key``, one at a time."""
        for name in self.content.names(key):
            found = self.whole(name, key)
            assert found is not None
            yield name, found


class LocalReader(TensorReader):
    """Base of readers that need no other rank."""

    @abstractmethod
    def copy(self, out: Tensor, name: str, key: str, start: int) -> None:
        """Read elements of the flattened ``key`` of a parameter from ``start`` on into ``out`` (1-D), without checking them."""

    def read(self, name: str, key: str, start: int, stop: int) -> Tensor | None:
        """See :meth:`TensorReader.read`."""
        stored = self.content.tensors.get((name, key))
        if stored is None:
            return None
        out = torch.empty(max(0, stop - start), dtype=stored.dtype)
        for low, high in pieces(out.numel(), out.element_size()):
            piece = out[low:high]
            self.copy(piece, name, key, start + low)
            self.refuse_not_finite(piece, name, key, start + low)
        return out


class FileReader(LocalReader):
    """Reads a checkpoint of whole tensors, whose hashes must have been checked.

    Parameters
    ----------
    folder
        Folder of the checkpoint.
    model, optim, average
        Its files; ``average`` is None without ``optim.ema``.

    Raises
    ------
    CheckpointError
        A file is not safetensors, or the optimizer state has an entry that belongs to no parameter.
    """

    def __init__(self, folder: Path, model: Path, optim: Path, average: Path | None) -> None:
        self.folder, self.content, self._stack = folder, Content(), ExitStack()
        self._entries: dict[tuple[str, str], tuple[TensorFile, str]] = {}
        with ExitStack() as opened:
            for path, key in ((model, WEIGHT), (average, AVERAGE)):
                if path is not None:
                    file = opened.enter_context(TensorFile(path))
                    self._add(file, {name: (name, key) for name in file.tensors})
            file = opened.enter_context(TensorFile(optim))
            entries = {full: _split(folder, full) for full in file.tensors}
            steps = {full: name for full, (name, key) in entries.items() if key == STEP}
            several = next((full for full in steps if file.tensors[full].numel != 1), None)
            if several is not None:  # not read, because it may be as large as the file
                raise _misfit(folder, several)
            self.content.steps = {name: _step(folder, full, file.whole(full)) for full, name in steps.items()}
            self._add(file, {full: entry for full, entry in entries.items() if entry[1] != STEP})
            self._stack = opened.pop_all()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def copy(self, out: Tensor, name: str, key: str, start: int) -> None:
        """See :meth:`LocalReader.copy`."""
        file, full = self._entries[name, key]
        file.copy(out, full, start)

    def _add(self, file: TensorFile, entries: dict[str, tuple[str, str]]) -> None:
        for full, entry in entries.items():
            self.content.tensors[entry] = file.tensors[full]
            self._entries[entry] = file, full


class HeldReader(LocalReader):
    """Reads tensors that are in memory, named as in :class:`.content.Checkpoint`."""

    def __init__(self, checkpoint: Checkpoint, folder: Path = Path()) -> None:
        self.folder, self.content, self._held = folder, Content(), {}
        named = [((name, WEIGHT), t) for name, t in checkpoint.model.items()]
        named += [((name, AVERAGE), t) for name, t in checkpoint.ema.items()]
        for full, tensor in checkpoint.optim.items():
            name, key = _split(folder, full)
            if key == STEP:
                self.content.steps[name] = _step(folder, full, tensor)
            else:
                named.append(((name, key), tensor))
        self._held = {entry: t.detach().reshape(-1) for entry, t in named}
        self.content.tensors = {entry: Stored(tuple(t.shape), t.dtype) for entry, t in named}

    def copy(self, out: Tensor, name: str, key: str, start: int) -> None:
        """See :meth:`LocalReader.copy`."""
        out.copy_(self._held[name, key][start : start + out.numel()])


class SharedReader(TensorReader):
    """Reads on rank 0 and sends every tensor to all ranks, in pieces; each rank keeps the elements that it asks for.

    Every rank must read the same tensors in the same order, but may ask for other elements of them, or for none.

    Parameters
    ----------
    folder
        Folder of the checkpoint, for messages.
    content
        What the checkpoint holds.
    group
        Ranks of the run.
    own
        Reader of rank 0; None on the other ranks.
    """

    def __init__(self, folder: Path, content: Content, group: Group, own: LocalReader | None) -> None:
        self.folder, self.content, self._group, self._own = folder, content, group, own

    def read(self, name: str, key: str, start: int, stop: int) -> Tensor | None:
        """See :meth:`TensorReader.read`; every rank checks what was sent, so that all raise the same error."""
        stored = self.content.tensors.get((name, key))
        if stored is None:
            return None
        out = torch.empty(max(0, stop - start), dtype=stored.dtype)
        for low, high in pieces(stored.numel, out.element_size()):
            piece = self._sent(stored, name, key, low, high)
            self.refuse_not_finite(piece, name, key, low)
            first, last = max(start, low), min(stop, high)
            if first < last:
                out[first - start : last - start] = piece[first - low : last - low]
        return out

    def _sent(self, stored: Stored, name: str, key: str, low: int, high: int) -> Tensor:
        """Return elements ``low`` to ``high`` on every rank; if rank 0 cannot read them, every rank raises its error."""
        size, error = (high - low) * stored.dtype.itemsize, None
        sent = torch.zeros(size + 1, dtype=torch.uint8)
        piece = sent[:size].view(stored.dtype)
        try:
            if self._own is not None:
                self._own.copy(piece, name, key, low)
        except Exception as failed:
            error, sent[-1] = failed, 1  # the last byte tells the other ranks, which wait for the piece
        broadcast_into(sent, self._group)
        if sent[-1]:
            on_rank_zero(lambda: _raise(error), self._group)
        return piece


def _raise(error: Exception | None) -> None:
    assert error is not None
    raise error


@contextmanager
def shared_reader(
    open_reader: Callable[[Path], LocalReader], folder: Path, group: Group, pause: Pause = nullcontext
) -> Iterator[TensorReader]:
    """Open a checkpoint on rank 0 and yield a reader for all ranks, so that a file server is read once; a collective call.

    Raises
    ------
    CheckpointError, TrainingError
        Rank 0 cannot open the checkpoint: :class:`CheckpointError` on rank 0, :class:`TrainingError` on the others.
    """
    with ExitStack() as stack:
        own: list[LocalReader] = []

        def opened() -> Content:
            own.append(stack.enter_context(open_reader(folder)))
            return own[0].content

        content = on_rank_zero(opened, group, pause)
        yield own[0] if group.size == 1 else SharedReader(folder, content, group, own[0] if own else None)


def _split(folder: Path, full: str) -> tuple[str, str]:
    """Return parameter and key of an entry ``<parameter>/<key>`` of the optimizer state; raise CheckpointError for other names."""
    name, _, key = full.rpartition("/")
    if not name or key not in (*MOMENTS, STEP):
        raise _misfit(folder, full)
    return name, key


def _step(folder: Path, full: str, tensor: Tensor) -> float:
    """Return a number of optimizer steps; raise CheckpointError if it is not one finite number."""
    if tensor.numel() != 1 or not math.isfinite(float(tensor)):
        raise _misfit(folder, full)
    return float(tensor)


def _misfit(folder: Path, full: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: optimizer state {full!r} does not fit a parameter of the model, by name or shape; {DELETE}"
    )
