"""Selection of an implementation, shared by all operations.

Each operation registers its implementations by name: ``reference`` (readable PyTorch), ``cpu`` (fast on a CPU) and
``triton`` (GPU). ``impl="auto"`` selects the fastest one that supports the operands and logs the choice once; inside
:func:`prefer`, ``"auto"`` stands for the name passed to it. Any other name selects that implementation or raises.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from comtip_kernels.tl_common import HAS_TRITON, INTERPRETING, TRITON_DTYPES, can_launch

Impl = Literal["auto", "triton", "cpu", "reference"]
BLACKWELL_NEEDS = (3, 8)
"""Oldest Triton that compiles every kernel for sm_100. Triton 3.6 and 3.7 fail inside a pass of their compiler."""
_PREFERENCE = {"cuda": ("triton", "reference"), "cpu": ("cpu", "reference")}
_log = logging.getLogger("comtip_kernels")
_reported: set[tuple[str, str]] = set()
_preferred: str = "auto"


def with_triton(module: str, name: str) -> Callable[..., Any]:
    """Import a function that needs Triton; without Triton return a placeholder that :func:`choose` never selects."""
    if not HAS_TRITON:
        return lambda *_args, **_kwargs: None
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def runs_kernels(device: torch.device) -> bool:
    """Return whether the Triton kernels run on a device, so that ``"auto"`` selects them."""
    return can_launch(device)


@contextmanager
def prefer(impl: Impl) -> Iterator[None]:
    """Use ``impl`` wherever ``"auto"`` is requested inside the ``with`` block, to compare implementations or debug.

    Parameters
    ----------
    impl
        Name of the implementation.

    Raises
    ------
    ValueError
        When an operation is called that has no implementation of this name, or one that does not support the operands.
    """
    global _preferred
    before, _preferred = _preferred, impl
    try:
        yield
    finally:
        _preferred = before


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _log_choice(op: str, name: str, device: str) -> None:
    """Log once which implementation ``"auto"`` selected."""
    if (op, name) not in _reported:
        _reported.add((op, name))
        _log.info("%s: impl='auto' chose '%s' on %s", op, name, device)


def choose(
    op: str,
    impl: str,
    operands: Sequence[Tensor],
    implementations: Mapping[str, Callable[..., Any]],
    order: Sequence[str] | None = None,
) -> Callable[..., Any]:
    """Return the implementation of ``op`` to call for these operands.

    Parameters
    ----------
    op
        Name of the operation, for messages.
    impl
        ``"auto"`` or the name of one implementation.
    operands
        Floating-point tensors of the call; their dtypes and the device of the first one decide.
    implementations
        Implementations of this operation by name; must contain ``reference``, which ``"auto"`` selects if no other fits.
    order
        Names that ``"auto"`` tries, in order; by default they depend on the device alone.

    Raises
    ------
    ValueError
        If ``impl`` is unknown, not available for this operation, or does not support the operands, or if ``triton`` is selected
        and the installed Triton cannot compile for the GPU.
    """
    device = operands[0].device
    impl = _preferred if impl == "auto" else impl
    unsupported = [x.dtype for x in operands if x.dtype not in TRITON_DTYPES]
    if impl == "auto":
        names = _PREFERENCE.get(device.type, ()) if order is None else order
        triton_runs = can_launch(device) and not unsupported
        ready = [n for n in names if n in implementations and (n != "triton" or triton_runs)]
        name = (ready or ["reference"])[0]
        if name == "triton":
            _check_compiler(op, device)
        _log_choice(op, name, device.type)
        return implementations[name]
    if impl not in implementations:
        raise ValueError(f"{op}: impl={impl!r} is not available; choose 'auto' or one of {sorted(implementations)}")
    if impl == "triton" and not can_launch(device):
        raise ValueError(
            f"{op}: impl='triton' cannot run on {device.type}: it needs a CUDA device and the triton package "
            "(or TRITON_INTERPRET=1, for tests); use impl='auto'"
        )
    if impl == "triton" and unsupported:
        raise ValueError(
            f"{op}: impl='triton' does not support {unsupported[0]}; cast the operands to torch.bfloat16 or "
            "torch.float32, or use impl='auto'"
        )
    if impl == "triton":
        _check_compiler(op, device)
    return implementations[impl]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _check_compiler(op: str, device: torch.device) -> None:
    """Raise ValueError if the installed Triton is too old for the GPU: Triton 3.6 would abort the process in the first step."""
    if INTERPRETING or device.type != "cuda":
        return
    import triton

    if release_of(triton.__version__) >= BLACKWELL_NEEDS:
        return
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 10:
        wanted = ".".join(map(str, BLACKWELL_NEEDS))
        raise ValueError(
            f"{op}: Triton {triton.__version__} cannot compile the kernels for sm_{major}{minor}; install a PyTorch with Triton "
            f"{wanted} or newer, or use impl='reference'"
        )


def release_of(version: str) -> tuple[int, ...]:
    """Return the major and minor number of a Triton version, e.g. (3, 8) for 3.8.0."""
    return tuple(int(part) for part in version.split(".")[:2])
