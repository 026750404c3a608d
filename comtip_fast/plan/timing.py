"""How long a step takes and what bounds each part: a roofline per operation, links per collective, what overlaps hidden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from comtip_fast.plan.cost import Cost, Precision
from comtip_fast.plan.hardware import Cluster
from comtip_fast.plan.parts import Part
from comtip_fast.plan.traffic import Collective


@dataclass(frozen=True)
class Timed:
    """One line of the time table."""

    name: str
    seconds: float
    bound: str
    """``compute``, ``memory``, ``link`` or ``loader``."""
    hidden: float = 0.0
    """Seconds besides that run beside something else."""


def rates(c: Cluster, p: Precision) -> tuple[float, float]:
    """Return FLOP/s and bytes/s that the plan counts on."""
    peak = c.device.bf16 if p.is_bf16 else c.device.fp32
    return peak * c.efficiency.compute, c.device.memory_bytes_per_s * c.efficiency.memory


def cost_seconds(costs: Sequence[Cost], c: Cluster, p: Precision) -> tuple[float, float, float]:
    """Return seconds forward and backward, and how many of both are bound by memory."""
    flops, width = rates(c, p)
    forward = backward = memory = 0.0
    for cost in costs:
        for f, m, is_forward in ((cost.flops, cost.moved, True), (cost.back_flops, cost.back_moved, False)):
            compute, move = f / flops, m / width
            seconds = max(compute, move)
            forward, backward = forward + seconds * is_forward, backward + seconds * (not is_forward)
            memory += move if move > compute else 0.0
    return forward, backward, memory


def time_parts(parts: Sequence[Part], c: Cluster, p: Precision) -> list[Timed]:
    """Return the computation of every part."""
    out = []
    for part in parts:
        forward, backward, memory = cost_seconds(part.costs, c, p)
        seconds = forward + backward
        bound = "memory" if memory > seconds / 2 else "compute"
        out.append(Timed(part.name, seconds * part.times, bound))
    return out


def time_collectives(traffic: Sequence[Collective], c: Cluster, beside: dict[str, float]) -> list[Timed]:
    """Return what is waited for, by part; ``beside`` says how many seconds there are to hide behind, and is used up."""
    left = dict(beside)
    waited: dict[str, float] = {}
    hidden: dict[str, float] = {}
    for item in traffic:
        seconds = item.seconds(c)
        behind = min(seconds, left.get(item.hidden_by, 0.0))
        if item.hidden_by:
            left[item.hidden_by] = left.get(item.hidden_by, 0.0) - behind
        waited[item.part] = waited.get(item.part, 0.0) + seconds - behind
        hidden[item.part] = hidden.get(item.part, 0.0) + behind
    return [Timed(f"wait: {part}", waited[part], "link", hidden[part]) for part in waited]


def optimizer_cost(elements: float) -> Cost:
    """AdamW and clipping over so many fp32 elements: ten reads or writes each."""
    return Cost("AdamW", moved=10 * 4 * elements)
