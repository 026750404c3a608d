"""Time of a step and the limit of each part: a roofline per operation, link rates per collective, and their overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from comtip_kernels.ledger.sizes import busy_share

from comtip_fast.plan.cost import Cost, Precision
from comtip_fast.plan.hardware import Cluster
from comtip_fast.plan.rank_share import StepPart
from comtip_fast.plan.traffic import Collective


@dataclass(frozen=True)
class PartTime:
    """One row of the time table."""

    name: str
    seconds: float
    bound: str
    """What limits the part: ``compute``, ``memory``, ``l2``, ``launches``, ``link``, ``host`` or ``loader``."""
    hidden: float = 0.0
    """Further seconds that overlap with computation."""


def rates(c: Cluster, p: Precision) -> tuple[float, float]:
    """Return the effective FLOP/s and memory bytes/s: measured ones as they are, others times the assumed efficiency.

    The rate of fp32 products is not measured.
    """
    device, efficiency = c.device, c.efficiency
    compute = device.bf16 if p.is_bf16 else device.fp32
    memory = device.memory_bytes_per_s
    return (
        compute * (1.0 if device.measured and p.is_bf16 else efficiency.compute),
        memory * (1.0 if device.measured else efficiency.memory),
    )


@dataclass
class ComputeTime:
    """Seconds of a list of operations."""

    forward: float = 0.0
    backward: float = 0.0
    by_bound: dict[str, float] = field(default_factory=dict)
    """{limit: seconds of the operations with this limit}."""

    @property
    def bound(self) -> str:
        """The roofline limit of the operations that take most of the time."""
        return max(self.by_bound, key=lambda k: self.by_bound[k]) if self.by_bound else "compute"


def compute_time(costs: Sequence[Cost], c: Cluster, p: Precision, times: int = 1) -> ComputeTime:
    """Return the time of operations; a pass of an operation takes the maximum of its compute, memory, L2 and launch time.

    The L2 cache limits kernels of ``comtip_kernels`` only; the efficiency of other products is that of ``c.efficiency.compute``.
    """
    flops, bandwidth = rates(c, p)
    out, launch = ComputeTime(), c.efficiency.launch_s
    for cost in costs:
        l2 = c.device.l2_bytes_per_s * (busy_share(cost.programs, c.device.multiprocessors) if cost.programs else 1.0)
        for f, m, loaded, least, backward in (
            (cost.flops, cost.moved + cost.again, cost.loaded, launch, False),
            (cost.back_flops, cost.back_moved + cost.back_again, cost.back_loaded, 2 * launch, True),
        ):
            if not (f or m or loaded):
                continue
            seconds, bound = max(
                (f / flops, "compute"), (m / bandwidth, "memory"), (loaded / l2, "l2"), (least, "launches")
            )
            seconds *= times
            out.by_bound[bound] = out.by_bound.get(bound, 0.0) + seconds
            if backward:
                out.backward += seconds
            else:
                out.forward += seconds
    return out


def time_parts(parts: Sequence[StepPart], c: Cluster, p: Precision) -> list[PartTime]:
    """Return the computation time of every part."""
    out = []
    for part in parts:
        time = compute_time(part.costs, c, p, part.times)
        out.append(PartTime(part.name, time.forward + time.backward, time.bound))
    return out


def time_collectives(traffic: Sequence[Collective], c: Cluster, overlap: dict[str, float]) -> list[PartTime]:
    """Return the exposed communication time of each part.

    ``overlap`` has the seconds of computation that collectives can overlap with; each second is used once.
    """
    remaining = dict(overlap)
    waited: dict[str, float] = {}
    hidden: dict[str, float] = {}
    for item in traffic:
        seconds = item.seconds(c)
        overlapped = min(seconds, remaining.get(item.hidden_by, 0.0))
        if item.hidden_by:
            remaining[item.hidden_by] = remaining.get(item.hidden_by, 0.0) - overlapped
        waited[item.part] = waited.get(item.part, 0.0) + seconds - overlapped
        hidden[item.part] = hidden.get(item.part, 0.0) + overlapped
    return [PartTime(f"wait: {part}", waited[part], "link", hidden[part]) for part in waited]


def optimizer_cost(elements: float) -> Cost:
    """Return the cost of AdamW and gradient clipping: ten reads or writes of each fp32 element."""
    return Cost("AdamW", moved=10 * 4 * elements)
