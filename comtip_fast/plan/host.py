"""Number of operators that the host issues in a step without compilation.

The counts were fitted to recordings of the real step (``python -m testkit.rehearsal``) with several depths, numbers of
micro-batches and engines; a test compares them with every step in ``bench/rehearsal.csv`` to 2 %.
"""

from __future__ import annotations

from comtip_fast.plan.engine import EngineSpec
from comtip_fast.plan.sizes import Sizes

# Operators of a transformer block: forward and backward, forward alone, and recomputation under activation checkpointing.
VISION_BLOCK, VISION_FORWARD, VISION_AGAIN = 43, 19, 18
VISION_BOTH = 48
"""Operators of a block, forward and backward, if all patches and the visible patches take one pass."""
TEXT_BLOCK, TEXT_FORWARD, TEXT_AGAIN = 34, 14, 17
PREFIX, PREFIX_FORWARD, PREFIX_BOTH = 8, 4, 11
"""Operators of class and register tokens per call of the image encoder: forward and backward, forward alone, and if all
patches and the visible patches take one pass."""
EMBEDDED_ONCE = 8
"""Operators before and after the blocks that are issued only once if all patches and the visible patches take one pass."""
FIXED = 859
"""All other operators of a step without micro-batches: embeddings, heads, pooling, losses, draws, optimizer."""
FIXED_PIECES, PER_PIECE = 743, 337
"""All other operators of a step with micro-batches: once per step, and per micro-batch."""
DDP, ZERO_PIECE, RING_HOP = 59, 268, 51
"""Further operators of DDP, of ZeRO per micro-batch, and of the ring loss per other rank."""


def operators(s: Sizes, e: EngineSpec, ranks: int) -> int:
    """Return the number of operators in one rank's step with the losses of the default config."""
    n, branches = e.micro_batches, 2 if s.has_mfm else 1
    if s.has_mfm and s.one_pass and not e.activation_checkpointing:
        image = VISION_BOTH * s.depth + PREFIX_BOTH * (s.prefix > 0) - EMBEDDED_ONCE
    else:
        image = branches * (VISION_BLOCK * s.depth + PREFIX * (s.prefix > 0))
    text = TEXT_BLOCK * s.text_depth
    if n == 1:
        out = FIXED + image + text
    else:
        first_pass = VISION_FORWARD * s.depth + PREFIX_FORWARD * (s.prefix > 0)
        out = FIXED_PIECES + n * (PER_PIECE + image + first_pass) + text + TEXT_FORWARD * s.text_depth
    if e.activation_checkpointing:
        out += n * branches * VISION_AGAIN * s.depth + TEXT_AGAIN * s.text_depth
    out += {"single": 0, "ddp": DDP, "deepspeed": n * ZERO_PIECE}[e.kind]
    return out + (RING_HOP * (ranks - 1) if e.loss_form == "ring" else 0)
