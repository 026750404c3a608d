"""Communication of a step: every collective with its size, and the bytes on each link.

For a tensor of n bytes in total, each rank sends, by the bandwidth-optimal algorithms of NCCL and gloo: (W-1)/W n for
all-gather and reduce-scatter, twice that for all-reduce, and W-1 blocks for a ring of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from comtip_fast.plan.engine import ELEMENT, EngineSpec
from comtip_fast.plan.hardware import Cluster
from comtip_fast.plan.memory import MAX_LIVE
from comtip_fast.plan.sizes import Sizes

FP32, ID = 4, 16
"""Bytes of a number in the loss, which is always fp32, and of an image's metadata (text class, section, weight)."""


@dataclass(frozen=True)
class Collective:
    """One collective of a step."""

    part: str
    """``loss``, ``pairs``, ``table``, ``gradients`` or ``parameters``."""
    what: str
    kind: str
    """``all_gather``, ``reduce_scatter``, ``all_reduce`` or ``ring``."""
    size: float
    """Bytes of the complete tensor; for a ring, of all W blocks."""
    times: float = 1.0
    """Number of executions per step."""
    hidden_by: str = ""
    """Computation that hides the collective: ``forward``, ``backward`` or a part's name; empty if none does."""

    def sent(self, ranks: int) -> float:
        """Return the bytes that each rank sends per step."""
        factor = 2 if self.kind == "all_reduce" else 1
        return factor * self.times * self.size * (ranks - 1) / ranks

    def on_links(self, c: Cluster) -> tuple[float, float]:
        """Return the bytes per device and step on the link inside a node and on the fabric between nodes.

        Collectives use the adapters of all devices of a node. A ring of blocks does not: the last device of a node sends
        every block over its adapter, the others send over the link. For each kind of link, the bytes of the device that
        sends most over it are returned.
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
        """Return the seconds of the collective without overlap."""
        if c.ranks == 1:
            return 0.0
        link, fabric = self.on_links(c)
        factor = 2 if self.kind == "all_reduce" else 1
        hops = factor * self.times * ((c.per_node - 1) * c.link.latency_s + (c.nodes - 1) * c.fabric.latency_s)
        if self.kind == "ring" and c.nodes > 1:
            # Every step of the ring waits for the hop between nodes.
            hops = self.times * (c.ranks - 1) * c.fabric.latency_s
        rate = c.efficiency.link
        return max(link / (rate * c.link.bytes_per_s), fabric / (rate * c.fabric.bytes_per_s)) + hops


def loss_traffic(s: Sizes, e: EngineSpec) -> list[Collective]:
    """Return the collectives of the InfoNCE loss; an empty list if its weight is 0.

    Only data of images (vectors, row statistics, gradients) are sent. Text vectors stay on their rank, so the texts with wrong
    levels that are added as negatives (``loss.paat.hard_columns``) cause no communication here.
    """
    if not s.has_nce:
        return []
    vectors, numbers = s.B * s.D * FP32, s.B * FP32
    out = [Collective("loss", "image metadata", "all_gather", s.B * ID)]
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
    """Return the gather of all levels, one byte each: a mispaired spot may get a level from a spot of another rank.

    The result is empty if no spots are mispaired, or if mispaired levels come from other genes of the same spot.
    """
    if not s.mispairs or not s.other_spots:
        return []
    return [Collective("pairs", "levels and sections of all spots", "all_gather", s.B * (s.G + 4))]


def table_traffic(s: Sizes, e: EngineSpec, ranks: int) -> list[Collective]:
    """Return the gather of a sharded table's rows and the reduce-scatter of their gradients; empty if the table is not sharded."""
    if not e.shares_table(s.G * s.Q, ranks):
        return []
    numbers = s.G * s.Q * (s.D + 1)
    rows = numbers * e.precision.operand
    return [
        Collective("table", "rows and scores", "all_gather", rows, times=2 if e.micro_batches > 1 else 1),
        Collective("table", "rows' gradients", "reduce_scatter", numbers * ELEMENT),
    ]


def gradient_traffic(s: Sizes, e: EngineSpec) -> list[Collective]:
    """Return the gradient reduction and, under ZeRO, the parameter gathering, as DDP and DeepSpeed perform them.

    Each of n micro-batches uses the parameters of the image side; the last micro-batch also uses the
    parameters of the text side.
    """
    full, n = s.trained * ELEMENT, e.micro_batches
    per_micro_batch = (s.image_side * n + s.trained - s.image_side) * ELEMENT
    if e.zero_stage == 3:
        # The parameters of a model below DeepSpeed's limit stay gathered between forward and backward pass.
        gathered = _gathered_for_micro_batches(s, e) if n > 1 else full * (1 if s.trained <= MAX_LIVE else 2)
        return [
            Collective("parameters", "gathered for use", "all_gather", gathered, hidden_by="forward"),
            Collective("gradients", "to their owners", "reduce_scatter", per_micro_batch, hidden_by="backward"),
        ]
    reduced = per_micro_batch if e.zero_stage == 2 else full
    out = [Collective("gradients", "summed", "all_reduce", reduced, hidden_by="backward")]
    if e.zero_stage:
        out.append(Collective("parameters", "gathered after the step", "all_gather", full))
    return out


def _gathered_for_micro_batches(s: Sizes, e: EngineSpec) -> int:
    """Return the bytes of parameters that ZeRO 3 gathers for n micro-batches, as measured with DeepSpeed 0.19.

    A module is gathered whenever it is called; the image encoder is called once per pass over its blocks. A module stays
    gathered between its forward and backward pass only if the previous pass used the same modules, which holds from the third
    micro-batch on. The first pass follows the trace of the previous step and gathers everything. If all patches and the visible
    patches take one pass, the blocks are gathered twice more for the backward pass. The output projections of attention, which
    are called for each of the two sets of patches, are then gathered once more per micro-batch.
    """
    n, full = e.micro_batches, s.trained_in("image encoder", "image head")
    encoder = s.trained_in("image encoder")
    replay = full + (s.trained_in("mask generator") if s.has_mfm else 0)
    again = 0
    if s.has_mfm and s.one_pass and not e.activation_checkpointing:
        again = 2 * encoder + (n * s.depth * s.d * (s.d + 1) if s.vision_trained else 0)
    elif s.has_mfm:
        replay += encoder
    text = s.trained - s.image_side
    # Embedded once, replayed n times, and gathered twice more for the backward pass.
    return ELEMENT * (s.trained + (n - 1) * full + (n + 2) * replay + again + 2 * text)


def step_traffic(s: Sizes, e: EngineSpec, ranks: int) -> list[Collective]:
    """Return all collectives of a step; empty for one rank."""
    if ranks == 1:
        return []
    return [*loss_traffic(s, e), *pair_traffic(s), *table_traffic(s, e, ranks), *gradient_traffic(s, e)]
