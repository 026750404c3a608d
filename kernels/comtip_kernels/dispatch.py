"""One rule for choosing an implementation, shared by every operation.

Each operation registers what it has under the names ``reference`` (readable PyTorch), ``cpu`` (fast on a
CPU) and ``triton`` (GPU). ``impl="auto"`` takes the fastest that can run on the tensor's device and says so
once in the log; any other name is an order, and an order that cannot be carried out raises.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from comtip_kernels.tl_common import can_launch, triton

Impl = Literal["auto", "triton", "cpu", "reference"]
_PREFERENCE = {"cuda": ("triton", "reference"), "cpu": ("cpu", "reference")}
_log = logging.getLogger("comtip_kernels")
_said: set[tuple[str, str]] = set()
_preferred: str = "auto"


def with_triton(module: str, name: str) -> Callable[..., Any]:
    """Return a function of a module that needs Triton, or, where there is none, one that is never called (``can_launch``)."""
    if triton is None:
        return lambda *_args, **_kwargs: None
    return getattr(importlib.import_module(module), name)


@contextmanager
def prefer(impl: Impl) -> Iterator[None]:
    """Let ``impl`` stand for ``"auto"`` inside the ``with`` block, in every operation: to compare, or to find a fault.

    Raises
    ------
    ValueError
        When an operation is called that has no such implementation, or where it cannot run.
    """
    global _preferred
    before, _preferred = _preferred, impl
    try:
        yield
    finally:
        _preferred = before


@torch.compiler.assume_constant_result
def _say(op: str, name: str, device: str) -> None:
    """Log once which implementation 'auto' took."""
    if (op, name) not in _said:
        _said.add((op, name))
        _log.info("%s: impl='auto' chose '%s' on %s", op, name, device)


def choose(
    op: str, impl: str, like: Tensor, have: Mapping[str, Callable[..., Any]], order: Sequence[str] | None = None
) -> Callable[..., Any]:
    """Return the implementation of ``op`` to call for tensors like ``like``.

    Parameters
    ----------
    op
        Name of the operation, for messages.
    impl
        ``"auto"`` or the name of one implementation.
    like
        One of the operands: its device and its dtype count. The Triton kernels sum in fp32, so fp64 is not theirs.
    have
        Implementations of this operation by name; ``reference`` is always among them.
    order
        What ``auto`` tries, first to last, where the operation knows better than the device alone says.

    Raises
    ------
    ValueError
        If ``impl`` is no known name, or is known but not available for this operation.
    """
    device = like.device
    impl = _preferred if impl == "auto" else impl
    if impl == "auto":
        able = can_launch(device) and like.dtype != torch.float64
        tried = _PREFERENCE.get(device.type, ()) if order is None else order
        ready = [n for n in tried if n in have and (n != "triton" or able)]
        name = (ready or ["reference"])[0]
        _say(op, name, device.type)
        return have[name]
    if impl not in have:
        raise ValueError(f"{op}: impl={impl!r} is not available; choose 'auto' or one of {sorted(have)}")
    if impl == "triton" and not can_launch(device):
        raise ValueError(
            f"{op}: impl='triton' cannot run on {device.type}: it needs a CUDA device and the triton package "
            "(or TRITON_INTERPRET=1, for tests)"
        )
    if impl == "triton" and like.dtype == torch.float64:
        raise ValueError(f"{op}: impl='triton' sums in fp32 and takes no fp64; use 'auto' or 'reference'")
    return have[impl]
