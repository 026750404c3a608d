"""Plan one config on 1 to 1,024 devices in every design, and find where each stops scaling.

*Strong* scaling keeps the global batch, and so the result of the run. *Weak* scaling keeps the spots per device, so the
batch and the number of negatives grow with the number of devices. Speeds are for the mean panel, memory is for the largest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from comtip_fast.config.schema import RunConfig
from comtip_fast.plan.engine import EngineSpec, engine_of
from comtip_fast.plan.hardware import Cluster
from comtip_fast.plan.plan import Plan, make_plan
from comtip_fast.plan.report import size
from comtip_fast.plan.sizes import Inputs, mean_panel, sizes_of

MIN_SPEEDUP = 1.5
"""A design scales as long as doubling the devices multiplies spots per second by at least this factor."""
PER_NODE = 8

Growth = Literal["strong", "weak"]


@dataclass(frozen=True)
class Design:
    """A parallelisation of a step."""

    name: str
    kind: Literal["ddp", "deepspeed"]
    zero_stage: int
    loss_form: Literal["gather", "ring"]
    shard_table: bool


DESIGNS = (
    Design("whole table, gather", "ddp", 0, "gather", False),
    Design("whole table, ring", "ddp", 0, "ring", False),
    Design("sharded table, gather", "ddp", 0, "gather", True),
    Design("sharded table, ring", "ddp", 0, "ring", True),
    Design("sharded table, gather, ZeRO 1", "deepspeed", 1, "gather", True),
    Design("sharded table, gather, ZeRO 2", "deepspeed", 2, "gather", True),
    Design("sharded table, gather, ZeRO 3", "deepspeed", 3, "gather", True),
)


@dataclass(frozen=True)
class Point:
    """The plan of one design on a number of devices."""

    growth: Growth
    design: Design
    devices: int
    mean: Plan
    """Plan of a step with the mean panel."""
    largest: Plan
    """Plan of a step with the largest panel."""


@dataclass(frozen=True)
class Sweep:
    """The plans of all designs on all numbers of devices."""

    name: str
    cluster: Cluster
    per_device: int
    """Spots per device under weak scaling."""
    batch: int
    """Spots of the global batch under strong scaling."""
    points: tuple[Point, ...]

    def line(self, growth: Growth, design: Design) -> list[Point]:
        """Return the points of one design, by number of devices."""
        return [p for p in self.points if p.growth == growth and p.design == design]


def sweep(config: RunConfig, base: Cluster, inputs: Inputs, *, most: int = 1024) -> Sweep:
    """Plan every design on 1, 2, 4, ... up to ``most`` devices of the same kind as in ``base``, eight per node.

    Parameters
    ----------
    config
        The run; its batch on ``base`` sets the spots per device of weak scaling.
    base
        The cluster that the config is written for.
    inputs
        Properties of the data.
    most
        Largest number of devices.

    Raises
    ------
    ValueError
        ``most`` is below 1, ``base`` has more devices than the batch has spots, or no costs are known for the blocks of the
        image encoder.
    """
    if most < 1:
        raise ValueError(f"`most` {most}: give a number of devices of at least 1")
    per_device = config.data.batch_size // base.ranks
    if per_device < 1:
        raise ValueError(
            f"data.batch_size={config.data.batch_size}: too small for {base.ranks} devices, which need at least one "
            "spot each; raise it or plan for fewer devices"
        )
    sizes = sizes_of(config, inputs)
    at_mean = sizes.at_panel(mean_panel(min(config.panel.min_genes, sizes.G), sizes.G))
    points = []
    for growth, design, devices, B in _cases(config.data.batch_size, per_device, most):
        cluster = replace(base, per_node=min(devices, PER_NODE), nodes=-(-devices // PER_NODE))
        e = _engine(config, design, cluster)
        mean, largest = (make_plan(config, cluster, inputs, engine=e, sizes=replace(s, B=B)) for s in (at_mean, sizes))
        points.append(Point(growth, design, devices, mean, largest))
    return Sweep(config.name, base, per_device, config.data.batch_size, tuple(points))


def _cases(batch: int, per_device: int, most: int) -> Iterator[tuple[Growth, Design, int, int]]:
    """Yield growth, design, devices and batch of every point; strong scaling ends at one spot per device."""
    for design in DESIGNS:
        devices = 1
        while devices <= most:
            yield "weak", design, devices, per_device * devices
            if devices <= batch:
                yield "strong", design, devices, batch
            devices *= 2


def _engine(config: RunConfig, d: Design, c: Cluster) -> EngineSpec:
    """Return the config's engine with the kind, ZeRO stage, loss form and table of a design."""
    anywhere = replace(config, engine=replace(config.engine, kind="auto"))
    configured = engine_of(anywhere, c.ranks, c.device.name != "cpu")
    return replace(configured, kind=d.kind, zero_stage=d.zero_stage, loss_form=d.loss_form, shard_table=d.shard_table)


def scales_to(line: Sequence[Point]) -> int:
    """Return the largest number of devices up to which every doubling reached ``MIN_SPEEDUP``."""
    last = line[0].devices
    for before, after in pairwise(line):
        if after.mean.spots_per_s < MIN_SPEEDUP * before.mean.spots_per_s:
            break
        last = after.devices
    return last


def fits_from(line: Sequence[Point]) -> int | None:
    """Return the smallest number of devices on which the largest step fits into memory; None if it fits on none."""
    return next((p.devices for p in line if p.largest.fits), None)


def bottleneck(point: Point) -> str:
    """Return the name of the part that takes most of a step with the mean panel."""
    return max(point.mean.times, key=lambda t: t.seconds).name


def as_rows(result: Sweep) -> list[dict[str, Any]]:
    """Return one dict per point, in bytes and seconds, for JSON."""
    return [
        {
            "predicted": True,
            "growth": p.growth,
            "design": p.design.name,
            "devices": p.devices,
            "B": p.mean.sizes.B,
            "step_seconds": p.mean.step_seconds,
            "spots_per_s": p.mean.spots_per_s,
            "device_bytes": p.largest.device_bytes,
            "fits": p.largest.fits,
            "takes_most": bottleneck(p),
        }
        for p in result.points
    ]


def table(result: Sweep) -> str:
    """Return a Markdown table: where each design stops scaling, its speed, bottleneck and memory there, and where it fits."""
    c = result.cluster
    lines = [
        (
            f"{result.name} on {c.device.name}, {PER_NODE} per node, {c.link.name} inside, {c.fabric.name} between nodes; all "
            f"PREDICTED. Scaling stops where twice the devices give less than {MIN_SPEEDUP:g} times the spots/s."
        ),
        "",
        "| design | growth | scales to | spots/s there | takes most of the step there | fits from | memory there |",
        "|---|---|---|---|---|---|---|",
    ]
    for growth, text in (("strong", f"B = {result.batch:,}"), ("weak", f"{result.per_device:,} spots per device")):
        for design in DESIGNS:
            line = result.line(growth, design)  # type: ignore[arg-type]
            last = scales_to(line)
            at = next(p for p in line if p.devices == last)
            enough = fits_from(line)
            lines.append(
                f"| {design.name} | {text} | {last:,} | {at.mean.spots_per_s:,.0f} | {bottleneck(at)} "
                f"| {'nowhere' if enough is None else enough} | {size(at.largest.device_bytes)} |"
            )
    return "\n".join(lines)
