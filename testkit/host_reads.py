"""Record the calls with which a program would make the host wait for a GPU, while it runs on CPU tensors.

The host waits when it reads a value, and for operators whose output shape depends on data. On a CPU neither takes time, so the
calls are recorded with their name and their position in the code.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WAITING_OPERATORS = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique",
    "aten::_unique",
    "aten::is_nonzero",
    "aten::equal",
    "aten::bincount",
)
# PyTorch copies a Python number among the operands of torch.where to the device, and waits for the copy.
NUMBERS_COPIED = ("where",)
READING_METHODS = ("tolist", "numpy", "cpu", "item", "__array__")
CPU_PATHS = ("/cpu.py", "/reference.py", "/peers.py")
"""File names of implementations that run only on CPUs."""
PACKAGES = ("comtip_fast", "comtip_kernels", "comtip_shards")


class HostReads:
    """Context manager that records host reads and data-dependent shapes.

    Reads inside CPU implementations (:data:`CPU_PATHS`, functions named ``*_cpu``) are not recorded.

    Parameters
    ----------
    allowed
        Names of functions inside which reads are not recorded.
    """

    def __init__(self, *allowed: str) -> None:
        self.allowed = allowed
        self.found: list[str] = []
        """``operator at file:line`` of each read, in order."""
        self._modes = (_Operators(self), _Methods(self))

    def __enter__(self) -> HostReads:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def record(self, name: str) -> None:
        """Record a read with the position of the innermost frame in this project, unless the read is excluded."""
        frame, where = sys._getframe(1), None
        while frame is not None:
            code = frame.f_code
            if code.co_name in self.allowed or code.co_name.endswith("_cpu"):
                return
            if where is None and any(f"/{package}/" in code.co_filename for package in PACKAGES):
                if code.co_filename.endswith(CPU_PATHS):
                    return
                where = f"{Path(code.co_filename).name}:{frame.f_lineno}"
            frame = frame.f_back  # type: ignore[assignment]
        self.found.append(f"{name} at {where}")


class _Operators(TorchDispatchMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        kwargs = kwargs or {}
        if name.startswith(WAITING_OPERATORS):
            self.reads.record(name)
        elif name.startswith("aten::index") and len(args) > 1 and isinstance(args[1], (list, tuple)):
            if any(isinstance(t, torch.Tensor) and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
                self.reads.record(f"{name} by a mask")
        elif name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
            self.reads.record(f"{name} without output_size")
        return func(*args, **kwargs)


class _Methods(TorchFunctionMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READING_METHODS and args and isinstance(args[0], torch.Tensor):
            self.reads.record(f"Tensor.{name}")
        if name in NUMBERS_COPIED and any(isinstance(a, (int, float)) for a in args):
            self.reads.record(f"{name} with a number")
        return func(*args, **(kwargs or {}))
