"""Activation checkpointing: save a block's input and recompute the block in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, *args: Any, recompute: bool) -> Tensor:
    """Call ``block(*args)``; with ``recompute``, use activation checkpointing."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)
