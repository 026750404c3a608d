"""How long a step takes and what bounds each part: a roofline per operation, links per collective, what overlaps hidden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from comtip_fast.plan.cost import Cost, Precision
from comtip_fast.plan.hardware import Cluster
from comtip_fast.plan.parts import StepPart
from comtip_fast.plan.traffic import Collective


@dataclass(frozen=True)
class Timed:
    """One line of the time table."""

    name: str
    seconds: float
    bound: str
    """``compute``, ``memory``, ``launches``, ``link`` or ``loader``."""
    hidden: float = 0.0
    """Seconds besides that run beside something else."""


def rates(c: Cluster, p: Precision) -> tuple[float, float]:
    """Return FLOP/s and bytes/s that the plan counts on."""
    peak = c.device.bf16 if p.is_bf16 else c.device.fp32
    return peak * c.efficiency.compute, c.device.memory_bytes_per_s * c.efficiency.memory


@dataclass
class Spent:
    """Seconds of some operations."""

    forward: float = 0.0
    backward: float = 0.0
    by: dict[str, float] = field(default_factory=dict)
    """The same seconds by what bounds each operation."""

    @property
    def bound(self) -> str:
        """What bounds most of it."""
        return max(self.by, key=lambda k: self.by[k]) if self.by else "compute"


def spend(costs: Sequence[Cost], c: Cluster, p: Precision, times: int = 1) -> Spent:
    """Return what operations take: each the longest of its products, its bytes and its launches."""
    flops, width = rates(c, p)
    out, launch = Spent(), c.efficiency.launch_s
    for cost in costs:
        for f, m, least, backward in (
            (cost.flops, cost.moved, launch, False),
            (cost.back_flops, cost.back_moved, 2 * launch, True),
        ):
            if not f and not m:
                continue
            seconds, bound = max((f / flops, "compute"), (m / width, "memory"), (least, "launches"))
            seconds *= times
            out.by[bound] = out.by.get(bound, 0.0) + seconds
            if backward:
                out.backward += seconds
            else:
                out.forward += seconds
    return out


def time_parts(parts: Sequence[StepPart], c: Cluster, p: Precision) -> list[Timed]:
    """Return the computation of every part."""
    out = []
    for part in parts:
        spent = spend(part.costs, c, p, part.times)
        out.append(Timed(part.name, spent.forward + spent.backward, spent.bound))
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
