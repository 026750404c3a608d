"""Simulated hosts with links that can be slowed down or cut: network namespaces whose frames pass through this process.

Every host is a network namespace with one TAP device. A thread of the test forwards frames as a switch does. Per link, it can
delay them, lose a share of them, limit their rate, or drop all of them, as with an unplugged cable, of which neither side is
notified. ``tc netem`` offers the same, but many kernels are built without it; TAP devices need only ``/dev/net/tun`` and root.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
DEVICE = "host0"
"""Name of the device inside every namespace."""
_MTU = 9000
_TICK_S = 0.05


@dataclass
class Link:
    """State of one host's link, applied to frames in both directions; it may be changed while the hosts run."""

    up: bool = True
    """Whether the link forwards frames."""
    delay_s: float = 0.0
    """Delay of every frame in s, in each direction."""
    loss: float = 0.0
    """Share of the frames that are lost, in each direction."""
    bytes_per_s: float = 0.0
    """Rate limit, 0 for none. At most half a second of frames is queued; further frames are lost."""
    _free_at: float = field(default=0.0, repr=False)

    def arrival(self, size: int, now: float, draw: random.Random) -> float | None:
        """Return the time at which a frame of ``size`` bytes, sent at ``now``, leaves this link; None if it is lost."""
        if not self.up or (self.loss and draw.random() < self.loss):
            return None
        if not self.bytes_per_s:
            return now + self.delay_s
        begin = max(now, self._free_at)
        if begin - now > 0.5:
            return None
        self._free_at = begin + size / self.bytes_per_s
        return self._free_at + self.delay_s


@dataclass(frozen=True)
class Host:
    """One simulated host."""

    name: str
    """Name of its network namespace."""
    address: str
    """Its IPv4 address."""
    link: Link
    """State of its link."""

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return the command line that runs ``arguments`` on this host."""
        return ["ip", "netns", "exec", self.name, *arguments]

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for a process on this host: the network device, because host names do not resolve."""
        return {"GLOO_SOCKET_IFNAME": DEVICE, "NCCL_SOCKET_IFNAME": DEVICE}


def missing() -> str | None:
    """Return why this machine cannot create such hosts, or None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not os.path.exists("/dev/net/tun"):  # noqa: PTH110
        return "/dev/net/tun does not exist"
    name = f"ct{os.getpid()}-try"
    try:
        done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "the command ip (iproute2) is not installed"
    if done.returncode:
        return f"ip netns add: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


@contextmanager
def network(n: int, seed: int = 0) -> Iterator[list[Host]]:
    """Yield ``n`` connected hosts; at the end, remove them and kill all their processes.

    Parameters
    ----------
    n
        Number of hosts, at most 200.
    seed
        Seed of the choice of lost frames.
    """
    hosts = [Host(f"ct{os.getpid()}-{i}", f"10.77.0.{i + 1}", Link()) for i in range(n)]
    taps: list[int] = []
    stop = threading.Event()
    switch = threading.Thread(target=_switch, args=(hosts, taps, stop, random.Random(seed)), daemon=True)
    try:
        for host in hosts:
            taps.append(_attach(host))
        switch.start()
        yield hosts
    finally:
        stop.set()
        if switch.is_alive():
            switch.join()
        for host in hosts:
            pids = subprocess.run(
                ["ip", "netns", "pids", host.name], capture_output=True, text=True, check=False
            ).stdout
            for pid in pids.split():
                subprocess.run(["kill", "-KILL", pid], capture_output=True, check=False)
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True, check=False)
        for tap in taps:
            os.close(tap)


def _attach(host: Host) -> int:
    """Create a host's namespace and device, and return the descriptor for its frames."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    device = host.name.replace("ct", "tap", 1)[:15]
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22s", device.encode(), _IFF_TAP | _IFF_NO_PI, b""))
    for line in (
        f"netns add {host.name}",
        # The descriptor stays attached when its device moves to another namespace.
        f"link set {device} netns {host.name} name {DEVICE}",
        f"-n {host.name} link set lo up",
        f"-n {host.name} link set {DEVICE} mtu {_MTU} up",
        f"-n {host.name} address add {host.address}/24 dev {DEVICE}",
    ):
        subprocess.run(["ip", *line.split()], check=True)
    return tap


def _switch(hosts: Sequence[Host], taps: Sequence[int], stop: threading.Event, draw: random.Random) -> None:
    """Forward frames until ``stop`` is set; each passes the link of its sender, then that of its receiver."""
    where: dict[bytes, int] = {}
    waiting: list[tuple[float, int, int, bytes]] = []
    number = 0
    while not stop.is_set():
        pause = min(_TICK_S, max(0.0, waiting[0][0] - time.monotonic())) if waiting else _TICK_S
        ready = select.select(taps, [], [], pause)[0]
        for source in (taps.index(tap) for tap in ready):
            for frame in _frames(taps[source]):
                where[frame[6:12]] = source
                to = where.get(frame[:6])
                sent = hosts[source].link.arrival(len(frame), time.monotonic(), draw)
                for target in [to] if to is not None else [i for i in range(len(taps)) if i != source]:
                    due = None if sent is None else hosts[target].link.arrival(len(frame), sent, draw)
                    if due is not None and target != source:
                        heapq.heappush(waiting, (due, number, target, frame))
                        number += 1
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, target, frame = heapq.heappop(waiting)
            try:
                os.write(taps[target], frame)
            except OSError:  # a full device loses frames, as a real one does
                continue


def _frames(tap: int) -> Iterator[bytes]:
    """Yield the frames that a device holds now, at most 64."""
    for _ in range(64):
        try:
            yield os.read(tap, 65536)
        except OSError:  # nothing more to read, or the device is down
            return
