"""Activation checkpointing: keep a block's input, and compute the block again when its gradient is wanted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, *args: Any, recompute: bool) -> Tensor:
    """Call ``block(*args)``; with ``recompute`` its activations are not kept."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)
