"""bf16 copies of the weights of linear layers, computed in one call per block instead of one by one.

Autocast casts each weight and bias when it is first used, and each gradient in the backward pass: two kernels per tensor and
step. Here, one call casts all tensors of a block, and one call casts all their gradients. Values and the order of sums are those
of autocast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from comtip_fast.runtime.torch_internals import copy_all, parameters_of

ParameterNames = Sequence[tuple[nn.Module, str]]
"""Pairs (module, attribute name) of parameters."""


def linear_parameters(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the trained fp32 parameters of all linear layers in a module: (layer, attribute name).

    The bias of a layer that states ``KEEPS_BIAS`` is left out.
    Subclasses of ``nn.Linear`` are left out unless they state ``CASTS_TOGETHER``: another forward pass may need the parameters.
    """
    out: list[tuple[nn.Module, str]] = []
    for layer in module.modules():
        if type(layer) is nn.Linear or getattr(layer, "CASTS_TOGETHER", False):
            found = dict(parameters_of(layer))
            if getattr(layer, "KEEPS_BIAS", False):
                found.pop("bias")
            out += [
                (layer, n) for n, p in found.items() if p is not None and p.requires_grad and p.dtype == torch.float32
            ]
    return out


@contextmanager
def cast_together(groups: Sequence[ParameterNames]) -> Iterator[None]:
    """Let layers use bf16 copies of their parameters inside the block; gradients reach the parameters in fp32.

    Parameters
    ----------
    groups
        Groups of parameters; each group is cast in one call. The gradients of a group are available, e.g. to DDP, when the
        backward pass through all layers of the group is complete.
    """
    before = [(module, name, parameters_of(module)[name]) for group in groups for module, name in group]
    try:
        for group in groups:
            copies = _CastTogether.apply(*[parameters_of(module)[name] for module, name in group])
            for (module, name), copy in zip(group, copies, strict=True):
                parameters_of(module)[name] = copy  # a plain tensor, which the layer reads as its attribute
        yield
    finally:
        for module, name, parameter in before:
            parameters_of(module)[name] = parameter


class _CastTogether(torch.autograd.Function):
    """Cast of fp32 tensors to bf16, and of their gradients to fp32, in one call each."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return bf16 copies."""
        ctx.set_materialize_grads(False)
        return tuple(_cast(tensors, torch.bfloat16))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return fp32 gradients; None for tensors that were not used."""
        cast = iter(_cast([g for g in grads if g is not None], torch.float32))
        return tuple(None if g is None else next(cast) for g in grads)


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return copies of the tensors in ``dtype``, in one call."""
    out = [torch.empty_like(x, dtype=dtype) for x in tensors]
    if out:
        copy_all(out, tensors)
    return out
