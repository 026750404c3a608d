"""What one rank computes in a step: its share of the batch, the parts of the step, and what their kernels load."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from comtip_kernels.ledger.sizes import Sized

from comtip_fast.plan.cost import Cost, Precision, total


@dataclass(frozen=True)
class StepPart:
    """One part of a step on one rank."""

    name: str
    costs: Sequence[Cost]
    times: int = 1
    """Number of executions per step."""
    phase: str = ""
    """Phase of a step with several micro-batches: ``losses`` over all of them, or ``pieces``, the encoders after it. What one phase stores
    is released before the other stores anything. Empty for a step with one micro-batch."""

    def sum(self, field: str) -> float:
        """Return the total per step of one field of :class:`Cost` (FLOPs or bytes moved), over all costs and executions of this part."""
        return self.times * total(self.costs, field)

    @property
    def saved(self) -> float:
        """Bytes stored for the backward pass; successive executions reuse the memory."""
        return total(self.costs, "saved")


def stored_together(parts: Sequence[StepPart]) -> list[StepPart]:
    """Return the parts whose stored bytes are in memory at the same time: those of the phase that stores most, in their order."""
    of_phase = {phase: [p for p in parts if p.phase == phase] for phase in sorted({p.phase for p in parts})}
    return max(of_phase.values(), key=lambda own: sum(p.saved for p in own), default=[])


@dataclass(frozen=True, kw_only=True)
class RankShare:
    """One rank's share of a step, and how it is computed."""

    spots: int
    """Number of spots b of the rank."""
    micro_batches: int = 1
    """Number of micro-batches. If there are several, each is embedded twice, and the losses read all micro-batches together."""
    images: int
    """Number of images that the rank's text columns are compared with."""
    columns: int
    """Number of text columns of the rank, mispaired ones included."""
    table_rows: int
    """Number of sentences that the rank encodes."""
    precision: Precision
    gpu: bool
    checkpointing: bool = False
    """Whether activation checkpointing is used."""
    compiled: bool = False
    """Whether Inductor compiles the blocks."""
    fused: bool = False
    """Whether blocks are fused (``engine.fused_blocks``), if they are of a kind that can be."""
    ring: bool = False
    """Whether InfoNCE passes blocks of images around."""

    @property
    def micro_batch_spots(self) -> int:
        """Number of spots of a micro-batch."""
        return ceil(self.spots / self.micro_batches)


def on_l2(cost: Cost, w: RankShare, passes: Iterable[Sized]) -> Cost:
    """Return ``cost`` with what its kernels load from the L2 cache of a GPU and read again from memory, as their ledger counts it in bf16.

    Parameters
    ----------
    cost, w
        Cost of an operation, and how the rank computes it. On a CPU and in fp32, the cost is returned as it is: products in fp32
        are limited by the FLOPs.
    passes
        Forward and backward pass of the operation (:mod:`comtip_kernels.ledger.sizes`).
    """
    if not w.gpu or not w.precision.is_bf16:
        return cost
    forward, backward = passes
    programs = min(forward.programs, backward.programs)
    first, second = forward.moved, backward.moved
    return replace(
        cost,
        loaded=first.loaded,
        back_loaded=second.loaded,
        again=first.again,
        back_again=second.again,
        programs=programs,
    )
