"""Device selection, and the precision of forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


def reads_are_free(device: torch.device) -> bool:
    """Return whether the host can read tensors of ``device`` without a synchronization; True for the CPU only.

    On other devices, training steps avoid such reads: shapes do not depend on data, and losses stay on the device until a row
    is logged.
    """
    return device.type == "cpu"


def pick_device(requested: str | torch.device) -> torch.device:
    """Return the requested device: ``auto`` (a GPU if there is one, else the CPU), ``cpu``, ``cuda`` or ``cuda:NUMBER``.

    Raises
    ------
    ValueError
        PyTorch has no device of this name, or no such GPU.
    """
    name = str(requested)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r}: not a device of PyTorch; use auto, cpu, cuda or cuda:NUMBER") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name}: PyTorch finds no GPU; use auto or cpu, and see `comtip doctor`")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(
            f"device {name}: no such GPU; PyTorch numbers its GPUs from 0 to {torch.cuda.device_count() - 1}, so use one of these "
            "numbers, or cuda"
        )
    return device


def in_bf16(precision: str, device: torch.device) -> bool:
    """Return whether forward passes run in bf16 on ``device`` with ``precision`` (``train.precision``)."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context of a forward pass with ``precision`` (``train.precision``): bf16 autocast, or a null context for fp32.

    Parameters stay fp32 in both cases.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16) if in_bf16(precision, device) else nullcontext()


@contextmanager
def fp32_convolutions() -> Iterator[None]:
    """Compute convolutions of fp32 tensors in fp32 on a GPU within the block, as a CPU does; cuDNN's default is tf32."""
    cudnn: Any = torch.backends.cudnn  # PyTorch declares no types for its precisions
    conv = cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        conv.fp32_precision = before
