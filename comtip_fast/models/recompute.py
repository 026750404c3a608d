"""Calls of transformer blocks: compiled for any size of batch and panel, and with activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, *args: Any, recompute: bool) -> Tensor:
    """Call ``block(*args)``; with ``recompute``, use activation checkpointing.

    A compiled block (:meth:`torch.nn.Module.compile`) is traced once for all sizes of the leading dimensions, in each of
    the two gradient modes. Outside of training it runs uncompiled: modules read ``training``, so it would be traced again.
    """
    if is_compiled(block):
        if not block.training:
            uncompiled: Callable[..., Tensor] = block._call_impl
            return uncompiled(*args)
        _mark_sizes(args)
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


def is_compiled(block: nn.Module) -> bool:
    """Return whether calls of the block run the code that ``torch.compile`` built for it."""
    return block._compiled_call_impl is not None


def _mark_sizes(args: tuple[Any, ...]) -> None:
    """Declare every dimension but the width of each tensor as dynamic.

    PyTorch would compile for the first size it meets, and for any size only after a second: two variants in each gradient
    mode, for the patches of a tile, its visible patches, and pieces of a batch of unequal sizes.
    """
    from torch._dynamo.decorators import maybe_mark_dynamic  # imported here: it takes seconds, and few runs compile

    for x in args:
        if isinstance(x, Tensor):
            maybe_mark_dynamic(x, list(range(max(1, x.ndim - 1))))
