"""What travels between ranks in a step: every collective with its size, and what of it crosses which link.

``n`` is the size of the whole tensor. Sent per rank, by the bandwidth-optimal algorithms that NCCL and gloo use:
all-gather and reduce-scatter (W-1)/W n, all-reduce twice that, a ring of blocks (W-1) blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from comtip_fast.plan.engine import ELEMENT, EngineSpec
from comtip_fast.plan.hardware import Cluster
from comtip_fast.plan.memory import MAX_LIVE
from comtip_fast.plan.sizes import Sizes

FP32, ID = 4, 16
"""Bytes of a number of the loss, which is fp32 everywhere, and of what says who is whose negative."""


@dataclass(frozen=True)
class Collective:
    """One kind of message in a step."""

    part: str
    """``loss``, ``pairs``, ``table``, ``gradients`` or ``parameters``."""
    what: str
    kind: str
    """``all_gather``, ``reduce_scatter``, ``all_reduce`` or ``ring``."""
    size: float
    """Bytes of the whole tensor; of all W blocks for a ring."""
    times: float = 1.0
    """How often in a step."""
    hidden_by: str = ""
    """StepPart of the step whose computation it runs beside; empty: it is waited for."""

    def sent(self, ranks: int) -> float:
        """Return the bytes that each rank sends in a step."""
        factor = 2 if self.kind == "all_reduce" else 1
        return factor * self.times * self.size * (ranks - 1) / ranks

    def on_links(self, c: Cluster) -> tuple[float, float]:
        """Return the bytes per device and step on the link inside a node and on the fabric between nodes.

        Collectives share the nodes' adapters out over all devices of a node. A ring of blocks does not: the last device of a
        node sends every block over its own adapter, the others over the link; the busier of each is returned.
        """
        sent = self.sent(c.ranks)
        if c.nodes == 1:
            return sent, 0.0
        if self.kind == "ring":
            return (sent if c.per_node > 1 else 0.0), sent
        factor = 2 if self.kind == "all_reduce" else 1
        between = factor * self.times * self.size * (c.nodes - 1) / (c.nodes * c.per_node)
        return sent - between, between

    def seconds(self, c: Cluster) -> float:
        """Return how long it takes alone."""
        if c.ranks == 1:
            return 0.0
        link, fabric = self.on_links(c)
        factor = 2 if self.kind == "all_reduce" else 1
        hops = factor * self.times * ((c.per_node - 1) * c.link.latency_s + (c.nodes - 1) * c.fabric.latency_s)
        if self.kind == "ring" and c.nodes > 1:
            # Every hop waits for the one that crosses nodes.
            hops = self.times * (c.ranks - 1) * c.fabric.latency_s
        rate = c.efficiency.link
        return max(link / (rate * c.link.bytes_per_s), fabric / (rate * c.fabric.bytes_per_s)) + hops


def loss_traffic(s: Sizes, e: EngineSpec) -> list[Collective]:
    """InfoNCE over all ranks: images move, texts stay, so mispaired columns add nothing."""
    if not s.has_nce:
        return []
    vectors, numbers = s.B * s.D * FP32, s.B * FP32
    out = [Collective("loss", "who is whose negative", "all_gather", s.B * ID)]
    if e.loss_form == "ring":
        return [
            *out,
            Collective("loss", "images", "ring", vectors, hidden_by="InfoNCE"),
            Collective("loss", "row statistics", "ring", numbers, hidden_by="InfoNCE"),
            Collective("loss", "images and statistics again", "ring", vectors + numbers, hidden_by="InfoNCE"),
            Collective("loss", "images' gradients", "ring", vectors, hidden_by="InfoNCE"),
        ]
    return [
        *out,
        Collective("loss", "images", "all_gather", vectors),
        Collective("loss", "row maxima", "all_reduce", numbers),
        Collective("loss", "row sums", "reduce_scatter", numbers),
        Collective("loss", "row statistics", "all_gather", numbers),
        Collective("loss", "images' gradients", "reduce_scatter", vectors),
    ]


def pair_traffic(s: Sizes) -> list[Collective]:
    """Levels of all spots, a byte each: a mispaired spot may take a gene's level from a spot of another rank."""
    if not s.mispairs or not s.other_spots:
        return []
    return [Collective("pairs", "levels and sections of all spots", "all_gather", s.B * (s.G + 4))]


def table_traffic(s: Sizes, e: EngineSpec, ranks: int) -> list[Collective]:
    """Send each rank's rows of a sharded table to all others, and their gradients back."""
    if not e.shares_table(s.G * s.Q, ranks):
        return []
    rows = s.G * s.Q * (s.D + 1) * e.precision.operand
    return [
        Collective("table", "rows and scores", "all_gather", rows, times=2 if e.micro_batches > 1 else 1),
        Collective("table", "rows' gradients", "reduce_scatter", rows),
    ]


def gradient_traffic(s: Sizes, e: EngineSpec) -> list[Collective]:
    """Gradients summed over ranks and, under ZeRO, parameters gathered; as DDP and DeepSpeed do it, counted in the tests.

    Of n micro-batches each goes through the image's parameters, and the last through the text's too.
    """
    whole, n = s.trained * ELEMENT, e.micro_batches
    pieces = (s.image_side * n + s.trained - s.image_side) * ELEMENT
    if e.zero_stage == 3:
        # A model below DeepSpeed's limit stays whole from its forward to its backward pass.
        used = _gathered_in_pieces(s, n) if n > 1 else whole * (1 if s.trained <= MAX_LIVE else 2)
        return [
            Collective("parameters", "gathered for use", "all_gather", used, hidden_by="forward"),
            Collective("gradients", "to their owners", "reduce_scatter", pieces, hidden_by="backward"),
        ]
    summed = pieces if e.zero_stage == 2 else whole
    out = [Collective("gradients", "summed", "all_reduce", summed, hidden_by="backward")]
    if e.zero_stage:
        out.append(Collective("parameters", "gathered after the step", "all_gather", whole))
    return out


def _gathered_in_pieces(s: Sizes, n: int) -> int:
    """Return the bytes of parameters that ZeRO 3 gathers for n micro-batches, as counted of DeepSpeed 0.19.

    A module is gathered whenever it is entered, the image encoder once for each branch, and kept from a forward pass to its
    backward pass only where the pass before was of the same modules: from the third micro-batch on. The first pass is
    gathered by the trace of the step before, which read everything.
    """
    full = s.trained_in("image encoder", "image head")
    replay = full + (s.trained_in("image encoder", "mask generator") if s.has_mfm else 0)
    text = s.trained - s.image_side
    # Embedded once; replayed n times forward, and twice gathered again for the backward pass.
    return ELEMENT * (s.trained + (n - 1) * full + (n + 2) * replay + 2 * text)


def step_traffic(s: Sizes, e: EngineSpec, ranks: int) -> list[Collective]:
    """Return everything that travels in a step; nothing for one rank."""
    if ranks == 1:
        return []
    return [*loss_traffic(s, e), *pair_traffic(s), *table_traffic(s, e, ranks), *gradient_traffic(s, e)]
