"""Memory of a rank, row by row: state that persists between steps, and the peak that a step adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from comtip_kernels.flops import infonce_chunk_bytes, level_chunk_bytes

from comtip_fast.plan.cost import INDEX
from comtip_fast.plan.engine import ELEMENT, EngineSpec
from comtip_fast.plan.parts import largest_block, table_bytes
from comtip_fast.plan.rank_share import RankShare, StepPart, stored_together
from comtip_fast.plan.sizes import Sizes

MAX_LIVE = 1_000_000_000
"""Largest number of gathered parameter elements that ZeRO 3 keeps, DeepSpeed's default (``stage3_max_live_parameters``)."""


@dataclass(frozen=True)
class MemoryRow:
    """One line of the memory table."""

    name: str
    bytes: float
    where: str = "device"
    """``device``, ``host`` or ``nvme``."""
    lasts: bool = False
    """Whether this memory persists between steps."""
    note: str = ""


def state_rows(s: Sizes, e: EngineSpec, ranks: int) -> list[MemoryRow]:
    """Return the rows of parameters, gradients, optimizer state and buckets of one rank."""
    return [*_parameters(s, e, ranks), _gradients(s, e, ranks), *_optimizer(s, e, ranks), *_buckets(s, e)]


def _parameters(s: Sizes, e: EngineSpec, ranks: int) -> list[MemoryRow]:
    """Return the rows of trained and frozen weights."""
    full = s.trained * ELEMENT
    frozen = [MemoryRow("frozen weights and buffers", s.frozen * ELEMENT, lasts=True)] if s.frozen else []
    if e.zero_stage < 3:
        return [MemoryRow("parameters", full, lasts=True), *frozen]
    shard = MemoryRow("parameters, own shard", full / ranks, _location(e.offload_param), lasts=True)
    # DeepSpeed releases a parameter between two uses only if the model has more elements than this.
    live = min(s.trained, MAX_LIVE) * ELEMENT
    rows = [shard, MemoryRow("parameters, gathered", live, note="at most, during the step"), *frozen]
    if full > live:
        # Validation and the export gather all parameters between steps; this is what exceeds the step's own gathering.
        note = "beyond the step's; validation, export"
        rows.append(MemoryRow("parameters, full on rank 0", full - live, note=note))
    if s.frozen:
        # The loader uses a frozen stem of the unsharded module, which therefore stays in memory.
        rows.append(MemoryRow("frozen weights, own shard", s.frozen * ELEMENT / ranks, lasts=True))
    return rows


def _gradients(s: Sizes, e: EngineSpec, ranks: int) -> MemoryRow:
    """Return the row of gradients."""
    if e.zero_stage < 1:
        # Without DeepSpeed, the next step frees them when it starts.
        return MemoryRow("gradients", s.trained * ELEMENT, lasts=e.kind != "deepspeed")
    where = "device" if e.offload_optimizer == "none" else "host"
    return MemoryRow("gradients, own shard", s.trained * ELEMENT / ranks, where, lasts=e.zero_stage == 3)


def _optimizer(s: Sizes, e: EngineSpec, ranks: int) -> list[MemoryRow]:
    """Return the rows of moments, of the optimizer's copy of the weights and of averaged weights."""
    shards = ranks if e.zero_stage >= 1 else 1
    location, shard = _location(e.offload_optimizer), s.trained * ELEMENT / shards
    rows = [MemoryRow("AdamW moments", 2 * shard, location, lasts=True)]
    if e.has_masters:
        rows.insert(0, MemoryRow("parameters, optimizer shard", shard, location, lasts=True))
    if e.ema:
        held = ranks if e.zero_stage == 3 else 1
        # An average is in memory where its weights are, but never in files.
        where = "device" if e.offload_param == "none" else "host"
        rows.append(MemoryRow("averaged weights", s.trained * ELEMENT / held, where, lasts=True))
    return rows


def _buckets(s: Sizes, e: EngineSpec) -> list[MemoryRow]:
    """Return the row of DeepSpeed's gradient bucket; empty without ZeRO, also for DDP, whose gradients are views of its buckets."""
    if e.kind != "deepspeed" or e.zero_stage == 0:
        return []
    bucket = e.bucket_bytes if e.zero_stage == 3 else min(e.bucket_bytes, s.trained * ELEMENT)
    return [
        MemoryRow(
            "gradient bucket", bucket, lasts=e.zero_stage == 3, note=f"engine.bucket_mb={e.bucket_bytes / 2**20:g}"
        )
    ]


def _location(offload: str) -> str:
    """Return where state with this offload setting is stored."""
    return {"none": "device", "cpu": "host", "nvme": "nvme"}[offload]


def step_rows(s: Sizes, e: EngineSpec, w: RankShare, parts: Sequence[StepPart], ranks: int) -> list[MemoryRow]:
    """Return the rows that a step adds: activations, copies of weights, loss buffers, draws of mispaired spots, batches."""
    rows = [MemoryRow(f"activations: {p.name}", p.saved) for p in stored_together(parts) if p.saved]
    if w.checkpointing:
        rows.append(MemoryRow("activations: recomputed block", largest_block(s, w)))
    if e.micro_batches > 1:
        # The vectors and table tensors that the losses read; gradients of the table are among the sentence table's.
        inputs = 2 * w.spots * s.D * ELEMENT + table_bytes(s, w.precision)
        rows.append(MemoryRow("loss inputs of all micro-batches", inputs))
    if e.precision.weight_copies:
        note = "autocast keeps them for the backward pass"
        rows.append(MemoryRow("bf16 copies of weights", s.matrices * 2, note=note))
    if w.gpu and s.has_nce:
        chunk = infonce_chunk_bytes(w.images, w.columns, w.precision.operand)
        rows.append(MemoryRow("InfoNCE: derivatives of the logits", chunk, note="one chunk"))
    if w.gpu and s.has_level:
        chunk = level_chunk_bytes(w.spots, s.G, s.Q, w.precision.operand)
        rows.append(MemoryRow("L_level: derivatives of the scores", chunk, note="one chunk"))
    return [*rows, *_loss(s, e, w, ranks), *_pairs(s, ranks), *_batch(s, w, ranks)]


def _loss(s: Sizes, e: EngineSpec, w: RankShare, ranks: int) -> list[MemoryRow]:
    """Return the row of vectors that InfoNCE exchanges; empty for one rank or without InfoNCE."""
    if not s.has_nce or ranks == 1:
        return []
    own = ceil(s.B / ranks)
    vectors = (own + w.columns) * s.D * 4
    if e.loss_form == "ring":
        # Two blocks of images and two of gradients exist at a time: one in use, one in transfer.
        return [MemoryRow("loss, ring: own vectors, blocks in transfer", vectors + 2 * own * (2 * s.D + 1) * 4)]
    return [MemoryRow("loss, gather: all images and their gradients", vectors + 2 * s.B * s.D * 4 + 16 * s.B)]


def _pairs(s: Sizes, ranks: int) -> list[MemoryRow]:
    """Return the rows of drawing mispaired spots: eight int64 or fp64 tensors per candidate (estimate), levels of other ranks."""
    if not s.mispairs:
        return []
    rows = [MemoryRow("adversary's candidates", 8 * INDEX * s.candidates * ceil(s.B / ranks) * s.G, note="estimate")]
    if s.other_spots and ranks > 1:
        rows.append(MemoryRow("levels of all spots", s.B * s.G, note="none with loss.paat.mode=strata"))
    return rows


def _batch(s: Sizes, w: RankShare, ranks: int) -> list[MemoryRow]:
    """Return the rows of the current batch and of the prefetched batches."""
    own = ceil(s.B / ranks)
    tiles = 0 if s.has_stem else own * 3 * s.S**2
    features = w.micro_batch_spots * s.P * s.patch_inputs * 4
    genes = own * s.G * (1 + 1)
    rows = [MemoryRow("batch: tiles, features, levels", tiles + features + genes)]
    # data.prefetch batches are ready, one is being assembled, and DALI decodes two.
    dali = s.loader == "dali" or (s.loader == "auto" and w.gpu)
    count = s.prefetch + (3 if dali else 1)
    return [*rows, MemoryRow("loader: prefetched batches", count * (tiles + own * s.G * 2), note=f"{count} batches")]


def on_device(rows: Sequence[MemoryRow]) -> float:
    """Return the bytes of all rows on the device, an upper bound of the peak."""
    return sum(r.bytes for r in rows if r.where == "device")
