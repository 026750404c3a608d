"""Recording of Triton kernel launches at the point where the JIT would compile and run them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from comtip_kernels.ledger.aot import LedgerEntry, plain_constant
from comtip_kernels.ledger.entries import PACKAGES
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from testkit.rehearsal.costs import tensor_bytes
from testkit.rehearsal.record import RehearsalError, code_line
from testkit.rehearsal.stand_in import StandInMode, is_stand_in

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
_binders: dict[Any, Any] = {}


class _Pointer:
    """Replacement for a tensor in the JIT's binder, which reads only its dtype and address."""

    def __init__(self, x: Tensor) -> None:
        self.dtype, self._ptr = x.dtype, 4096 + x.storage_offset() * x.element_size()

    def data_ptr(self) -> int:
        return self._ptr


@dataclass(frozen=True)
class Launch:
    """One kernel launch."""

    entry: LedgerEntry = field(compare=False, repr=False)
    """The kernel variant that the JIT would compile for it."""
    grid: tuple[int, ...]
    tensors: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    """Dtype, shape and strides of every tensor."""
    where: str
    """Code line, see :func:`testkit.rehearsal.record.code_line`."""

    @property
    def signature(self) -> str:
        """Signature of the variant, equal for launches that run the same machine code."""
        return self.entry.signature


def op_of(kernel: Any) -> str:
    """Return the name of a kernel's operation in the ledger; for other kernels, the folder of their module."""
    folder = Path(kernel.fn.__code__.co_filename).parent.name
    return next((op for op, package in PACKAGES.items() if package == folder), folder)


def entry_of(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> LedgerEntry:
    """Return the variant that the JIT would compile for this call, as a ledger entry."""
    if kernel not in _binders:
        _binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
    plain = tuple(_Pointer(a) if isinstance(a, Tensor) else a for a in args)
    bound, specialization, rest = _binders[kernel](*plain, **options)
    parsed, types, constants, attrs = kernel._pack_args(BACKEND, options, bound, specialization, rest)
    names = list(types)
    own = {names[path[0]]: plain_constant(value) for path, value in constants.items()}
    aligned = frozenset(names[path[0]] for path, hints in attrs.items() if hints)
    of = {n: t for n, t in types.items() if n not in own}
    entry = LedgerEntry(op_of(kernel), "", kernel, of, own, parsed.num_warps, parsed.num_stages, aligned)
    name = f"{kernel.__name__}-{hashlib.sha256(entry.signature.encode()).hexdigest()[:8]}"
    return replace(entry, name=name)


@contextmanager
def recorded_launches(mode: StandInMode) -> Iterator[None]:
    """Record launches of Triton kernels inside the block, without compiling or running them."""

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        tensors = [a for a in (*args, *options.values()) if isinstance(a, Tensor)]
        _refuse(kernel, tensors, mode)
        entry = entry_of(kernel, args, options)
        shapes = tuple((str(t.dtype).removeprefix("torch."), tuple(t.shape), tuple(t.stride())) for t in tensors)
        if not mode.record.paused:
            mode.record.launches.append(Launch(entry, tuple(grid), shapes, code_line()))
            # A tensor that replaces arguments which a mode of the kernel does not read counts once.
            mode.record.moved_bytes += tensor_bytes({id(x): x for x in tensors}.values())
        if mode.record.observer is not None:
            mode.record.observer.launch(kernel.__name__, (args, options), tuple(grid))

    with mock.patch.object(JITFunction, "run", run):
        yield


def _refuse(kernel: Any, tensors: list[Tensor], mode: StandInMode) -> None:
    """Raise RehearsalError for a launch that would fail on a GPU: a tensor on another device, no device guard, or fp16 or fp64."""
    current = mode.current
    for x in tensors:
        if not is_stand_in(x) or x.device.type != "cuda":
            raise RehearsalError(
                f"{kernel.__name__}: a tensor of shape {tuple(x.shape)} is on the {x.device.type}, not on the GPU; move it"
            )
        if x.device.index != current.index:
            raise RehearsalError(
                f"{kernel.__name__}: a tensor is on {x.device}, but the current device is cuda:{current.index}; launch it "
                "inside torch.cuda.device of the tensor's device"
            )
    if not current.entered:
        raise RehearsalError(f"{kernel.__name__}: launched without a device guard; use tl_common.launch")
    if any(x.dtype in (torch.float16, torch.float64) for x in tensors):
        raise RehearsalError(
            f"{kernel.__name__}: fp16 and fp64 are not supported by the Triton kernels; cast to bf16 or fp32"
        )
