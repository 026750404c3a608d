"""Calls of transformer blocks: compiled code for any size of batch and panel, and activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from comtip_fast.runtime import torch_internals


def run_block(block: nn.Module, *args: Any, recompute: bool) -> Any:
    """Call ``block(*args)``; with ``recompute``, use activation checkpointing.

    A compiled block (:meth:`torch.nn.Module.compile`) is traced once for all sizes of the leading dimensions, in each of
    the two gradient modes. Outside of training it runs uncompiled, because it reads ``training`` and would be traced again.
    """
    if torch_internals.is_compiled(block):
        if not block.training:
            return torch_internals.call_uncompiled(block, *args)
        _mark_sizes(args)
    return run_recomputed(block, *args, recompute=recompute)


def run_recomputed(function: Callable[..., Any], *args: Any, recompute: bool) -> Any:
    """Call ``function(*args)``; with ``recompute``, keep its arguments alone for the backward pass, and call it again there."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)


def _mark_sizes(args: tuple[Any, ...]) -> None:
    """Declare all dimensions of each tensor except the last as dynamic, and the only dimension of a vector of integers.

    A vector of other numbers is a bias, of the width of the rows.

    Otherwise PyTorch compiles a variant for the first size, and one for any size when it meets a second size, in each gradient
    mode. Sizes differ between all patches, visible patches and pieces of a batch.
    """
    for x in args:
        if isinstance(x, Tensor) and (x.ndim > 1 or not x.is_floating_point()):
            torch_internals.mark_dynamic(x, list(range(max(1, x.ndim - 1))))
