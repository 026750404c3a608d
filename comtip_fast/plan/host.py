"""Number of operators that the host issues in a step without compilation.

The counts were fitted to recordings of the real step (``python -m testkit.rehearsal``) with several depths, numbers of
micro-batches and engines; a test compares them with every step in ``bench/rehearsal.csv`` to 2 %.
"""

from __future__ import annotations

from dataclasses import dataclass

from comtip_fast.plan.engine import EngineSpec
from comtip_fast.plan.fused import packs_images
from comtip_fast.plan.sizes import Sizes

# Operators of a transformer block: forward and backward, forward alone, and recomputation under activation checkpointing.
VISION_BLOCK, VISION_FORWARD, VISION_AGAIN = 43, 19, 18
VISION_BOTH = 48
"""Operators of a block, forward and backward, if all patches and the visible patches take one pass."""
FUSED_BLOCK, FUSED_FORWARD, FUSED_TEXT_FORWARD = 18, 11, 7
"""Operators of a fused block (``engine.fused_blocks``) of either encoder, forward and backward, and forward alone by encoder."""
FUSED_AGAIN, FUSED_TEXT_AGAIN, FUSED_WHOLE = 22, 17, 4
"""Further operators of a fused block under activation checkpointing: recomputation by encoder, and to add the branch before a block, in
a pass without gradients."""
FUSED_FIXED, FUSED_FIXED_PIECES, FUSED_PER_PIECE = 875, 735, 319
"""As :data:`FIXED`, :data:`FIXED_PIECES` and :data:`PER_PIECE`, if the blocks of both encoders are fused."""
UNPACKED_IMAGES, FUSED_SCALES = 14, 22
"""Further operators of a fused block of the image encoder: if PyTorch computes attention within two sets of patches, and for layer scales."""
CASTS = 6
"""Operators per fused block and micro-batch by which autocast casts weights under ZeRO; other engines cast a block's in one call."""
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


@dataclass(frozen=True)
class Counts:
    """Operators of the parts of a step."""

    image: int
    """Of a block of the image encoder for one set of patches, forward and backward."""
    both: int
    """The same, if all patches and the visible patches take one pass."""
    image_forward: int
    image_again: int
    text: int
    text_forward: int
    text_again: int
    fixed: int
    fixed_pieces: int
    per_piece: int
    zero: int
    """Further operators of ZeRO per micro-batch."""


def _counts(s: Sizes, e: EngineSpec) -> Counts:
    """Return the numbers of operators for plain blocks, or for fused ones."""
    image = (VISION_BLOCK, VISION_BOTH, VISION_FORWARD, VISION_AGAIN)
    if not e.fused:
        return Counts(*image, TEXT_BLOCK, TEXT_FORWARD, TEXT_AGAIN, FIXED, FIXED_PIECES, PER_PIECE, ZERO_PIECE)
    added = FUSED_WHOLE * e.activation_checkpointing
    zero = DDP + CASTS * s.text_depth
    if s.can_fuse:
        zero += CASTS * s.depth
        unpacked = 0 if _packs_images(s, e) else UNPACKED_IMAGES
        scaled = FUSED_SCALES * s.layer_scale
        one, both = FUSED_BLOCK + unpacked // 2 + scaled, FUSED_BLOCK + unpacked + scaled
        image = (one, both, FUSED_FORWARD + added + unpacked // 4, FUSED_AGAIN + unpacked // 4)
    text = (FUSED_BLOCK, FUSED_TEXT_FORWARD + added, FUSED_TEXT_AGAIN)
    return Counts(*image, *text, FUSED_FIXED, FUSED_FIXED_PIECES, FUSED_PER_PIECE, zero)


def _packs_images(s: Sizes, e: EngineSpec) -> bool:
    """Return whether the packed kernel computes attention within images."""
    return packs_images(e.precision, s.P + s.prefix)


def operators(s: Sizes, e: EngineSpec, ranks: int) -> int:
    """Return the number of operators in one rank's step with the losses of the default config."""
    n, branches, c = e.micro_batches, 2 if s.has_mfm else 1, _counts(s, e)
    if s.has_mfm and s.one_pass and not e.activation_checkpointing:
        image = c.both * s.depth + PREFIX_BOTH * (s.prefix > 0) - EMBEDDED_ONCE
    else:
        image = branches * (c.image * s.depth + PREFIX * (s.prefix > 0))
    text = c.text * s.text_depth
    if n == 1:
        out = c.fixed + image + text
    else:
        first_pass = c.image_forward * s.depth + PREFIX_FORWARD * (s.prefix > 0)
        out = c.fixed_pieces + n * (c.per_piece + image + first_pass) + text + c.text_forward * s.text_depth
    if e.activation_checkpointing:
        out += n * branches * c.image_again * s.depth + c.text_again * s.text_depth
    out += {"single": 0, "ddp": DDP, "deepspeed": n * c.zero}[e.kind]
    return out + (RING_HOP * (ranks - 1) if e.loss_form == "ring" else 0)


LAUNCHES, LAUNCHES_PIECES, LAUNCHES_HOP = 34, 47, 4
"""Launches of this package's kernels in a step with plain blocks: without and with micro-batches, and per other rank in the ring."""


def launches(s: Sizes, e: EngineSpec, ranks: int) -> int:
    """Return the number of launches of this package's kernels in one rank's step, in addition to :func:`operators`.

    A pass over a fused block launches two norms with their sums, one GELU and, for images, one attention per set of patches. The first
    norm of an encoder's first block is PyTorch's, with activation checkpointing that of every block.
    """
    n, both = e.micro_batches, s.has_mfm
    out = LAUNCHES if n == 1 else LAUNCHES_PIECES
    out += LAUNCHES_HOP * (ranks - 1) if e.loss_form == "ring" else 0
    if not e.fused:
        return out
    again = e.activation_checkpointing
    passes = 3 if again else 2
    attends = int(_packs_images(s, e))
    # A pass of images: norms, GELU and attention; norms that the first block lacks.
    one, first = (2 + attends, 0) if again else (3 + attends, 1)
    text = (2 if again else 3) * s.text_depth - first
    out += text * (passes + (n > 1))
    if s.can_fuse:
        if both:
            image = 2 * one * s.depth if again else (one + attends) * s.depth - first
        else:
            image = one * s.depth - first
        out += n * (passes * image + (n > 1) * (one * s.depth - first))
    return out
