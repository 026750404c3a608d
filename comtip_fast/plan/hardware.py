"""Hardware of a plan: peak rates, and the assumed efficiencies.

The rates of GPUs are those of :mod:`comtip_kernels.rates`, as in the kernels' ledger. The efficiencies
(:class:`Efficiency`) are assumptions: every plan prints them, and ``comtip plan`` has an option for each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from comtip_kernels.rates import DATASHEET, Rates, read_rates


@dataclass(frozen=True, kw_only=True)
class Link:
    """A connection between two devices."""

    name: str
    bytes_per_s: float
    """Bandwidth in one direction, per device."""
    latency_s: float
    """Latency of one hop; assumed."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU, or the CPU cores of one process."""

    name: str
    memory: float
    """Memory in bytes."""
    bf16: float
    """Peak FLOP/s of dense bf16 matrix products."""
    fp32: float
    """Peak FLOP/s of dense fp32 matrix products without TF32."""
    memory_bytes_per_s: float
    l2_bytes_per_s: float
    """Bytes/s from the L2 cache to the multiprocessors, which limit this project's kernels; infinite for a CPU."""
    multiprocessors: int
    measured: bool = False
    """Whether the rates of products, memory and L2 were measured, so that no efficiency is assumed for them."""
    link: str
    """Default link inside a node; a name in :data:`LINKS`."""
    fabric: str
    """Default link between nodes; a name in :data:`LINKS`."""


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Assumed fractions of the peak rates, launch time, and cost of loading a tile; not measurements."""

    compute: float = 0.5
    """Fraction of the peak FLOP/s in large matrix products."""
    memory: float = 0.8
    """Fraction of the memory bandwidth in memory-bound kernels."""
    link: float = 0.8
    """Fraction of the link bandwidth in collectives."""
    launch_s: float = 10e-6
    """Minimum seconds of an operation in the forward pass, for kernel launches; twice that in the backward pass."""
    cores: int = 12
    """CPU cores per device that load tiles."""
    tile_ms: float = 1.0
    """CPU milliseconds to read, check, decode and augment one tile of 224 px; for other widths, in proportion to the area."""


LINKS = {
    link.name: link
    for link in (
        Link(name="nvlink3", bytes_per_s=300e9, latency_s=5e-6),
        Link(name="nvlink4", bytes_per_s=450e9, latency_s=5e-6),
        Link(name="nvlink5", bytes_per_s=900e9, latency_s=5e-6),
        Link(name="pcie4", bytes_per_s=32e9, latency_s=10e-6),
        Link(name="pcie5", bytes_per_s=64e9, latency_s=10e-6),
        Link(name="ib-hdr", bytes_per_s=25e9, latency_s=10e-6),
        Link(name="ib-ndr", bytes_per_s=50e9, latency_s=10e-6),
        Link(name="eth-100", bytes_per_s=12.5e9, latency_s=30e-6),
        Link(name="memory", bytes_per_s=5e9, latency_s=20e-6),
    )
}
"""NVLink rates are half of the vendor's figures, which count both directions. InfiniBand and Ethernet: one adapter per
device. ``memory`` is gloo between processes of one machine; its figures are assumed."""

_MEMORY_AND_LINKS = {
    "a100-40": (40e9, "nvlink3", "ib-hdr"),
    "a100-80": (80e9, "nvlink3", "ib-hdr"),
    "h100": (80e9, "nvlink4", "ib-ndr"),
    "h200": (141e9, "nvlink4", "ib-ndr"),
    "b200": (180e9, "nvlink5", "ib-ndr"),
}
"""{GPU of ``comtip_kernels.rates``: bytes of memory, default link inside a node, default link between nodes}."""


def _gpu(rates: Rates) -> Device:
    memory, link, fabric = _MEMORY_AND_LINKS[rates.gpu]
    return Device(
        name=rates.gpu,
        memory=memory,
        bf16=rates.bf16,
        fp32=rates.fp32,
        memory_bytes_per_s=rates.memory,
        l2_bytes_per_s=rates.l2,
        multiprocessors=rates.multiprocessors,
        measured=rates.source != DATASHEET,
        link=link,
        fabric=fabric,
    )


DEVICES = {name: _gpu(rates) for name, rates in read_rates().items()} | {
    "cpu": Device(
        name="cpu",
        memory=16e9,
        bf16=192e9,
        fp32=192e9,
        memory_bytes_per_s=20e9,
        l2_bytes_per_s=math.inf,
        multiprocessors=1,
        link="memory",
        fabric="eth-100",
    )
}
"""SXM modules. ``cpu`` is assumed: two cores at 3 GHz with two 8-wide fused multiply-add units each."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """``nodes`` machines of ``per_node`` devices each."""

    device: Device
    per_node: int = 1
    nodes: int = 1
    link: Link
    fabric: Link
    efficiency: Efficiency = Efficiency()

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises
        ------
        ValueError
            There is no device or node, an efficiency is outside (0, 1], the launch time is negative or not finite, there is
            no core to load tiles, or the time per tile is not positive and finite.
        """
        if self.per_node < 1 or self.nodes < 1:
            raise ValueError(
                f"{self.per_node} devices per node, {self.nodes} nodes: not a cluster; give at least one "
                "device per node and one node"
            )
        for name in ("compute", "memory", "link"):
            share = getattr(self.efficiency, name)
            if not 0 < share <= 1:
                raise ValueError(f"efficiency {name}={share}: give a share of the peak rate, above 0 and at most 1")
        if self.efficiency.cores < 1:
            raise ValueError(f"efficiency cores={self.efficiency.cores}: give at least one core")
        if not 0 < self.efficiency.tile_ms < math.inf:
            raise ValueError(
                f"efficiency tile_ms={self.efficiency.tile_ms}: give a finite number of milliseconds above 0"
            )
        if not 0 <= self.efficiency.launch_s < math.inf:
            raise ValueError(
                f"efficiency launch_s={self.efficiency.launch_s}: give a finite number of seconds of at least 0"
            )

    @property
    def ranks(self) -> int:
        """Number of ranks W, one per device."""
        return self.per_node * self.nodes


def make_cluster(
    device: str,
    *,
    per_node: int = 1,
    nodes: int = 1,
    link: str | None = None,
    fabric: str | None = None,
    efficiency: Efficiency | None = None,
) -> Cluster:
    """Return the cluster of the named device and links; links default to those of the device.

    Raises
    ------
    ValueError
        A device or link is unknown, there is no device or node, or an efficiency is out of range (:class:`Cluster`).
    """
    if device not in DEVICES:
        raise ValueError(f"`device` {device!r}: unknown; choose one of {', '.join(DEVICES)}")
    spec = DEVICES[device]
    link, fabric = link or spec.link, fabric or spec.fabric
    for argument, name in (("link", link), ("fabric", fabric)):
        if name not in LINKS:
            raise ValueError(f"`{argument}` {name!r}: unknown; choose one of {', '.join(LINKS)}")
    return Cluster(
        device=spec,
        per_node=per_node,
        nodes=nodes,
        link=LINKS[link],
        fabric=LINKS[fabric],
        efficiency=efficiency or Efficiency(),
    )
