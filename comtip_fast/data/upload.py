"""Copies from host to device: the tensors of a batch are packed into one buffer of pinned memory and copied in one call.

A copy from pageable memory would block the host, and without packing there would be one copy per tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 256
"""Alignment in bytes of every tensor in the buffer, as for CUDA allocations."""
_may_pin = True


@dataclass(frozen=True)
class PackedTensors:
    """Tensors that are packed into one buffer of host memory."""

    buffer: Tensor
    """uint8 (bytes,)."""
    layout: dict[str, tuple[int, torch.dtype, tuple[int, ...]]]
    """Offset in bytes, dtype and shape of each tensor."""

    @classmethod
    def pack(cls, tensors: Mapping[str, Tensor], device: torch.device) -> PackedTensors:
        """Copy tensors on the host into one buffer, which is pinned if ``device`` is a GPU.

        Worker processes do not pin memory, because that would initialise CUDA in a fork; :meth:`to` pins it instead.
        """
        layout, size = {}, 0
        for name, tensor in tensors.items():
            layout[name] = (size, tensor.dtype, tuple(tensor.shape))
            size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        packed = cls(torch.empty(size, dtype=torch.uint8, pin_memory=can_pin(device)), layout)
        for name, target in packed.split(packed.buffer).items():
            target.copy_(tensors[name])
        return packed

    def to(self, device: torch.device) -> dict[str, Tensor]:
        """Copy the buffer to ``device`` and return the tensors, which are views of the copy.

        All tensors are copied at once, asynchronously from pinned memory. If ``device`` is the CPU, nothing is copied.
        """
        buffer = self.buffer
        if can_pin(device) and not buffer.is_pinned():
            buffer = buffer.pin_memory()
        return self.split(buffer.to(device, non_blocking=True))

    def split(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return the tensors of a buffer with this layout, by name, as views."""
        out = {}
        for name, (offset, dtype, shape) in self.layout.items():
            n = torch.Size(shape).numel() * dtype.itemsize
            out[name] = buffer[offset : offset + n].view(dtype).view(shape)
        return out


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on ``device``: the same tensor if it is there already, else a copy.

    A copy from the host to a GPU uses pinned memory and is asynchronous, except in a worker process of a loader.
    """
    if tensor.device.type != "cpu" or not can_pin(device):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def can_pin(device: torch.device) -> bool:
    """Return whether copies to ``device`` can use pinned memory, which worker processes must not allocate."""
    return _may_pin and device.type == "cuda" and torch.cuda.is_available()


def never_pin() -> None:
    """Allocate no pinned memory in this process, a forked worker, in which CUDA cannot be used."""
    global _may_pin
    _may_pin = False
