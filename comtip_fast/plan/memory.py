"""Bytes that each rank needs, row by row: what lasts from step to step, and what a step adds at its widest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from comtip_fast.plan.cost import INDEX
from comtip_fast.plan.engine import ELEMENT, EngineSpec
from comtip_fast.plan.parts import StepPart, Work, largest_block
from comtip_fast.plan.sizes import Sizes

MAX_LIVE = 1_000_000_000
"""Elements of whole parameters that ZeRO 3 keeps at once: DeepSpeed's default, as is how soon it wants them again."""


@dataclass(frozen=True)
class MemoryRow:
    """One line of the memory table."""

    name: str
    bytes: float
    where: str = "device"
    """``device``, ``host`` or ``nvme``."""
    lasts: bool = False
    """From step to step, or only while a step runs."""
    note: str = ""


def state_rows(s: Sizes, e: EngineSpec, ranks: int) -> list[MemoryRow]:
    """Return parameters, gradients, optimizer state and buckets of one rank."""
    return [*_parameters(s, e, ranks), _gradients(s, e, ranks), *_optimizer(s, e, ranks), *_buckets(s, e)]


def _parameters(s: Sizes, e: EngineSpec, ranks: int) -> list[MemoryRow]:
    whole = s.trained * ELEMENT
    frozen = [MemoryRow("frozen weights and buffers", s.frozen * ELEMENT, lasts=True)] if s.frozen else []
    if e.zero_stage < 3:
        return [MemoryRow("parameters", whole, lasts=True), *frozen]
    shard = MemoryRow("parameters, own shard", whole / ranks, _place(e.offload_param), lasts=True)
    # DeepSpeed lets go of a parameter between its uses only where the model is larger than this.
    live = min(s.trained, MAX_LIVE) * ELEMENT
    rows = [shard, MemoryRow("parameters, gathered", live, note="at most, while the step runs"), *frozen]
    if whole > live:
        # Between steps they take the room of what a step gathers, and here more.
        rows.append(
            MemoryRow("parameters, whole on rank 0", whole - live, note="more than a step; validation, checkpoints")
        )
    if s.frozen:
        # The loader reads a frozen stem of the task's own module, which therefore stays.
        rows.append(MemoryRow("frozen weights, own shard", s.frozen * ELEMENT / ranks, lasts=True))
    return rows


def _gradients(s: Sizes, e: EngineSpec, ranks: int) -> MemoryRow:
    if e.zero_stage < 1:
        return MemoryRow("gradients", s.trained * ELEMENT)
    where = "device" if e.offload_optimizer == "none" else "host"
    return MemoryRow("gradients, own shard", s.trained * ELEMENT / ranks, where, lasts=e.zero_stage == 3)


def _optimizer(s: Sizes, e: EngineSpec, ranks: int) -> list[MemoryRow]:
    shards = ranks if e.zero_stage >= 1 else 1
    place, one = _place(e.offload_optimizer), s.trained * ELEMENT / shards
    moments = MemoryRow("AdamW's two moments", 2 * one, place, lasts=True)
    return (
        [MemoryRow("parameters, the optimizer's shard", one, place, lasts=True), moments]
        if e.has_masters
        else [moments]
    )


def _buckets(s: Sizes, e: EngineSpec) -> list[MemoryRow]:
    """DDP's gradients are views of its buckets; DeepSpeed copies them into one."""
    if e.kind != "deepspeed" or e.zero_stage == 0:
        return []
    bucket = e.bucket_bytes if e.zero_stage == 3 else min(e.bucket_bytes, s.trained * ELEMENT)
    return [
        MemoryRow(
            "gradient bucket", bucket, lasts=e.zero_stage == 3, note=f"engine.bucket_mb={e.bucket_bytes / 2**20:g}"
        )
    ]


def _place(offload: str) -> str:
    return {"none": "device", "cpu": "host", "nvme": "nvme"}[offload]


def work_rows(s: Sizes, e: EngineSpec, w: Work, parts: Sequence[StepPart], ranks: int) -> list[MemoryRow]:
    """Return what a step adds: activations part by part, loss buffers, batch, loader."""
    rows = [MemoryRow(f"activations: {p.name}", p.kept) for p in parts if p.kept]
    if w.checkpointing:
        rows.append(MemoryRow("activations: the block computed again", largest_block(s, w)))
    if e.micro_batches > 1:
        # Vectors and table tensors that the losses read, and their gradients.
        heads = (w.spots * s.D + s.G * s.Q * (3 * s.D + 1)) * ELEMENT
        rows.append(MemoryRow("vectors kept over micro-batches", 2 * heads))
    if e.precision.weight_copies:
        rows.append(
            MemoryRow("bf16 copies of weights", s.matrices * 2, note="autocast keeps them for the backward pass")
        )
    return [*rows, *_loss(s, e, w, ranks), *_pairs(s, ranks), *_batch(s, w, ranks)]


def _loss(s: Sizes, e: EngineSpec, w: Work, ranks: int) -> list[MemoryRow]:
    if not s.has_nce or ranks == 1:
        return []
    own = ceil(s.B / ranks)
    vectors = (own + w.columns) * s.D * 4
    if e.loss_form == "ring":
        # Two blocks of images and two of gradients are about at once: one in work, one on its way.
        return [MemoryRow("loss, ring: own vectors, blocks on their way", vectors + 2 * own * (2 * s.D + 1) * 4)]
    return [MemoryRow("loss, gather: all images and their gradients", vectors + 2 * s.B * s.D * 4 + 16 * s.B)]


def _pairs(s: Sizes, ranks: int) -> list[MemoryRow]:
    """Return what drawing mispaired spots takes while it lasts: about eight tensors of int64 or fp64 per candidate."""
    if not s.mispairs:
        return []
    rows = [MemoryRow("adversary's candidates", 8 * INDEX * s.candidates * ceil(s.B / ranks) * s.G, note="estimate")]
    if s.other_spots and ranks > 1:
        rows.append(MemoryRow("levels of all spots", s.B * s.G, note="loss.paat.mode=strata needs none"))
    return rows


def _batch(s: Sizes, w: Work, ranks: int) -> list[MemoryRow]:
    own = ceil(s.B / ranks)
    tiles = 0 if s.has_stem else own * 3 * s.S**2
    features = w.piece * s.P * s.patch_inputs * 4
    genes = own * s.G * (1 + 1)
    rows = [MemoryRow("batch: tiles, features, levels", tiles + features + genes)]
    # DALI has two batches in work, every loader completes one, and data.prefetch wait.
    dali = s.loader == "dali" or (s.loader == "auto" and w.gpu)
    ahead = s.prefetch + (3 if dali else 1)
    return [*rows, MemoryRow("loader: batches made ahead", ahead * (tiles + own * s.G * 2), note=f"{ahead} batches")]


def on_device(rows: Sequence[MemoryRow]) -> float:
    """Return the bytes of the device: everything at once, which is a step's widest moment or a little above it."""
    return sum(r.bytes for r in rows if r.where == "device")
