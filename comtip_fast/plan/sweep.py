"""The same config on 1 to 1,024 devices, in every design, and where each stops to scale.

Two ways to grow. *Strong*: the global batch stays, so the run gives the same answer, sooner. *Weak*: spots per device stay, so
the batch, and with it the number of negatives, grows with the devices. Speeds are of the mean panel, memory of the largest.
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

WORTH = 1.5
"""A design scales as long as twice the devices give at least so many times the spots per second."""
PER_NODE = 8

Growth = Literal["strong", "weak"]


@dataclass(frozen=True)
class Design:
    """One way to spread a step."""

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
    """One design on so many devices."""

    growth: Growth
    design: Design
    devices: int
    usual: Plan
    """The step with the mean panel."""
    largest: Plan
    """The step with the largest panel."""


@dataclass(frozen=True)
class Sweep:
    """Every design on every number of devices."""

    name: str
    cluster: Cluster
    per_device: int
    batch: int
    points: tuple[Point, ...]

    def line(self, growth: Growth, design: Design) -> list[Point]:
        """Return one design's points by devices."""
        return [p for p in self.points if p.growth == growth and p.design == design]


def sweep(config: RunConfig, home: Cluster, inputs: Inputs, *, most: int = 1024) -> Sweep:
    """Plan every design on 1, 2, 4 ... ``most`` devices like those of ``home``, eight to a node.

    Parameters
    ----------
    config
        The run; its batch on ``home`` sets the spots per device of weak growth.
    home
        Where the config is meant to run.
    inputs
        Facts of the data.
    most
        The most devices.

    Raises
    ------
    ValueError
        ``most`` is below 1, or ``home`` has more devices than the batch has spots.
    """
    if most < 1:
        raise ValueError(f"--most {most}: at least 1 device")
    per_device = config.data.batch_size // home.ranks
    if per_device < 1:
        raise ValueError(f"data.batch_size={config.data.batch_size}: fewer spots than the {home.ranks} devices")
    sizes = sizes_of(config, inputs)
    usual = sizes.at_panel(mean_panel(min(config.panel.min_genes, sizes.G), sizes.G))
    points = []
    for growth, design, devices, B in _cases(config.data.batch_size, per_device, most):
        cluster = replace(home, per_node=min(devices, PER_NODE), nodes=-(-devices // PER_NODE))
        e = _engine(config, design, cluster)
        one, two = (make_plan(config, cluster, inputs, engine=e, sizes=replace(s, B=B)) for s in (usual, sizes))
        points.append(Point(growth, design, devices, one, two))
    return Sweep(config.name, home, per_device, config.data.batch_size, tuple(points))


def _cases(batch: int, per_device: int, most: int) -> Iterator[tuple[Growth, Design, int, int]]:
    for design in DESIGNS:
        devices = 1
        while devices <= most:
            yield "weak", design, devices, per_device * devices
            if devices <= batch:
                yield "strong", design, devices, batch
            devices *= 2


def _engine(config: RunConfig, d: Design, c: Cluster) -> EngineSpec:
    own = engine_of(config, c.ranks, c.device.name != "cpu")
    return replace(own, kind=d.kind, zero_stage=d.zero_stage, loss_form=d.loss_form, shard_table=d.shard_table)


def stops_at(line: Sequence[Point]) -> int:
    """Return the most devices whose last doubling was still worth it."""
    last = line[0].devices
    for before, after in pairwise(line):
        if after.usual.spots_per_s < WORTH * before.usual.spots_per_s:
            break
        last = after.devices
    return last


def fits_from(line: Sequence[Point]) -> int | None:
    """Return the fewest devices from which the largest step fits; None if it does nowhere."""
    return next((p.devices for p in line if p.largest.fits), None)


def holds_back(point: Point) -> str:
    """Name the part that takes most of the step."""
    return max(point.usual.times, key=lambda t: t.seconds).name


def as_rows(found: Sweep) -> list[dict[str, Any]]:
    """Return every point as plain data."""
    return [
        {
            "predicted": True,
            "growth": p.growth,
            "design": p.design.name,
            "devices": p.devices,
            "B": p.usual.sizes.B,
            "step_seconds": p.usual.step_seconds,
            "spots_per_s": p.usual.spots_per_s,
            "device_bytes": p.largest.device_bytes,
            "fits": p.largest.fits,
            "takes_most": holds_back(p),
        }
        for p in found.points
    ]


def table(found: Sweep) -> str:
    """Return where each design stops, as a Markdown table."""
    c = found.cluster
    lines = [
        f"{found.name} on {c.device.name}, {PER_NODE} per node, {c.link.name} inside, {c.fabric.name} between nodes; all PREDICTED. "
        f"Scaling stops where twice the devices give less than {WORTH:g} times the spots/s.",
        "",
        "| design | growth | scales to | spots/s there | takes most of the step there | fits from | memory there |",
        "|---|---|---|---|---|---|---|",
    ]
    for growth, text in (("strong", f"B = {found.batch:,}"), ("weak", f"{found.per_device:,} spots per device")):
        for design in DESIGNS:
            line = found.line(growth, design)  # type: ignore[arg-type]
            last = stops_at(line)
            at = next(p for p in line if p.devices == last)
            enough = fits_from(line)
            lines.append(
                f"| {design.name} | {text} | {last:,} | {at.usual.spots_per_s:,.0f} | {holds_back(at)} "
                f"| {'nowhere' if enough is None else enough} | {size(at.largest.device_bytes)} |"
            )
    return "\n".join(lines)
