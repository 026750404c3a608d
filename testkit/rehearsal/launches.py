"""Launches of the project's Triton kernels, recorded where the JIT would compile and run them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from comtip_kernels.ledger.aot import LedgerEntry
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from testkit.rehearsal.record import RehearsalError, code_line
from testkit.rehearsal.stand_in import StandInMode, is_stand_in

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
_binders: dict[Any, Any] = {}


class _Pointer:
    """What the JIT reads of a tensor: its dtype and the alignment of its address."""

    def __init__(self, x: Tensor) -> None:
        self.dtype, self._ptr = x.dtype, 4096 + x.storage_offset() * x.element_size()

    def data_ptr(self) -> int:
        return self._ptr


@dataclass(frozen=True)
class Signature:
    """One variant that the JIT compiles: argument types, constants and hints, and launch options."""

    kernel: Any = field(compare=False, repr=False)
    text: str
    """``name=type`` or ``name=constant`` of every argument; ``:16`` marks a multiple of 16."""

    @property
    def name(self) -> str:
        """The kernel's name and a hash of the signature, the name of its ledger row."""
        return f"{self.kernel.__name__}-{hashlib.sha256(self.text.encode()).hexdigest()[:8]}"

    @property
    def op(self) -> str:
        """The kernel's package."""
        return str(Path(self.kernel.fn.__code__.co_filename).parent.name)


@dataclass(frozen=True)
class Launch:
    """One launch."""

    signature: Signature
    entry: LedgerEntry = field(compare=False, repr=False)
    grid: tuple[int, ...]
    tensors: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    """Dtype, shape and strides of every tensor."""
    where: str


def signature_of(entry: LedgerEntry) -> Signature:
    """Return the signature of a ledger entry."""
    words = [entry.kernel.__name__]
    for name in entry.kernel.arg_names:
        if name in entry.constants:
            words.append(f"{name}={entry.constants[name]!r}")
        else:
            words.append(f"{name}={entry.types[name]}{':16' if name in entry.aligned else ''}")
    return Signature(entry.kernel, " ".join([*words, f"warps={entry.num_warps}", f"stages={entry.num_stages}"]))


def entry_of(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> LedgerEntry:
    """Return what the JIT would compile for this call, as a ledger entry."""
    if kernel not in _binders:
        _binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
    plain = tuple(_Pointer(a) if isinstance(a, Tensor) else a for a in args)
    bound, specialization, rest = _binders[kernel](*plain, **options)
    parsed, types, constants, attrs = kernel._pack_args(BACKEND, options, bound, specialization, rest)
    names = list(types)
    own = {names[path[0]]: value for path, value in constants.items()}
    aligned = frozenset(names[path[0]] for path, hints in attrs.items() if hints)
    pointers = {n: t for n, t in types.items() if n not in own}
    entry = LedgerEntry("", "", kernel, pointers, own, parsed.num_warps, parsed.num_stages, aligned)
    of = signature_of(entry)
    return LedgerEntry(of.op, of.name, kernel, pointers, own, parsed.num_warps, parsed.num_stages, aligned)


@contextmanager
def recorded_launches(mode: StandInMode) -> Iterator[None]:
    """Record launches of Triton kernels inside the block and run none."""

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        tensors = [a for a in (*args, *options.values()) if isinstance(a, Tensor)]
        _refuse(kernel, tensors, mode)
        entry = entry_of(kernel, args, options)
        shapes = tuple((str(t.dtype).removeprefix("torch."), tuple(t.shape), tuple(t.stride())) for t in tensors)
        if not mode.record.paused:
            mode.record.launches.append(Launch(signature_of(entry), entry, tuple(grid), shapes, code_line()))

    with mock.patch.object(JITFunction, "run", run):
        yield


def _refuse(kernel: Any, tensors: list[Tensor], mode: StandInMode) -> None:
    """Raise where a GPU would fail: tensors elsewhere, or no guard for their device."""
    current = mode.current
    for x in tensors:
        if not is_stand_in(x) or x.device.type != "cuda":
            raise RehearsalError(f"{kernel.__name__}: a tensor of shape {tuple(x.shape)} is on the {x.device.type}")
        if x.device.index != current.index:
            raise RehearsalError(f"{kernel.__name__}: a tensor is on {x.device}, the current device is {current.index}")
    if not current.entered:
        raise RehearsalError(f"{kernel.__name__}: launched without a device guard; use tl_common.launch")
    if any(x.dtype in (torch.float16, torch.float64) for x in tensors):
        raise RehearsalError(f"{kernel.__name__}: fp16 and fp64 are not supported by the Triton kernels")
