"""What the plan knows of machines: peaks of datasheets, and what share of them it counts on.

Peaks are the vendors' figures for dense products and for bytes per second; the shares (:class:`Efficiency`) are
assumptions, printed with every plan and each an option of the command line.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Link:
    """A way between two devices."""

    name: str
    bytes_per_s: float
    """One direction, per device."""
    latency_s: float
    """Of one hop; assumed."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU, or the CPU cores of one process."""

    name: str
    memory: float
    """Bytes."""
    bf16: float
    """FLOP/s of dense products, bf16 operands."""
    fp32: float
    """FLOP/s of dense products, fp32 operands, no TF32."""
    memory_bytes_per_s: float
    link: str
    """The usual link inside a node; a name of :data:`LINKS`."""
    fabric: str
    """The usual link between nodes."""


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of a peak that the plan counts on; assumptions, not measurements."""

    compute: float = 0.5
    """Of a device's peak, in large matrix products."""
    memory: float = 0.8
    """Of a device's memory bandwidth, in kernels that only move data."""
    link: float = 0.8
    """Of a link's bandwidth, in collectives."""
    launch_s: float = 10e-6
    """Seconds that one operation takes at least, forward, and twice that backward: its kernels have to be launched."""


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
"""NVLink: half of the vendor's figure, which counts both directions. InfiniBand and Ethernet: one adapter per device.
``memory`` is gloo between processes of one machine; its figures are assumed."""

DEVICES = {
    device.name: device
    for device in (
        Device(
            name="a100-40",
            memory=40e9,
            bf16=312e12,
            fp32=19.5e12,
            memory_bytes_per_s=1.555e12,
            link="nvlink3",
            fabric="ib-hdr",
        ),
        Device(
            name="a100-80",
            memory=80e9,
            bf16=312e12,
            fp32=19.5e12,
            memory_bytes_per_s=2.039e12,
            link="nvlink3",
            fabric="ib-hdr",
        ),
        Device(
            name="h100",
            memory=80e9,
            bf16=989e12,
            fp32=67e12,
            memory_bytes_per_s=3.35e12,
            link="nvlink4",
            fabric="ib-ndr",
        ),
        Device(
            name="h200",
            memory=141e9,
            bf16=989e12,
            fp32=67e12,
            memory_bytes_per_s=4.8e12,
            link="nvlink4",
            fabric="ib-ndr",
        ),
        Device(
            name="b200",
            memory=180e9,
            bf16=2250e12,
            fp32=75e12,
            memory_bytes_per_s=8e12,
            link="nvlink5",
            fabric="ib-ndr",
        ),
        Device(
            name="cpu", memory=16e9, bf16=192e9, fp32=192e9, memory_bytes_per_s=20e9, link="memory", fabric="eth-100"
        ),
    )
}
"""SXM modules. ``cpu`` stands for two cores at 3 GHz with two 8-wide fused multiply-adds each; it is assumed."""


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
        """Refuse what cannot be.

        Raises
        ------
        ValueError
            No device, no node, or a share outside (0, 1].
        """
        if self.per_node < 1 or self.nodes < 1:
            raise ValueError(
                f"a cluster needs at least one device and one node (given: {self.per_node} x {self.nodes})"
            )
        for name in ("compute", "memory", "link"):
            share = getattr(self.efficiency, name)
            if not 0 < share <= 1:
                raise ValueError(f"efficiency {name} is a share above 0 and up to 1 (given: {share})")
        if self.efficiency.launch_s < 0:
            raise ValueError(f"a launch takes no negative time (given: {self.efficiency.launch_s})")

    @property
    def ranks(self) -> int:
        """W, one rank per device."""
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
    """SectionContext devices and links up by name.

    Raises
    ------
    ValueError
        An unknown name; says which there are.
    """
    if device not in DEVICES:
        raise ValueError(f"--gpu {device!r}: choose one of {', '.join(DEVICES)}")
    found = DEVICES[device]
    wanted = link or found.link, fabric or found.fabric
    for name in wanted:
        if name not in LINKS:
            raise ValueError(f"link {name!r}: choose one of {', '.join(LINKS)}")
    return Cluster(
        device=found,
        per_node=per_node,
        nodes=nodes,
        link=LINKS[wanted[0]],
        fabric=LINKS[wanted[1]],
        efficiency=efficiency or Efficiency(),
    )
