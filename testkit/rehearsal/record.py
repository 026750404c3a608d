"""Record of a walk: operators, launches, host waits and uploads."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OURS = tuple(str(ROOT / part) for part in ("comtip_fast", "kernels", "data_shards"))


class RehearsalError(RuntimeError):
    """The code would fail on a GPU, or needs something that the rehearsal cannot simulate."""


def code_line() -> str:
    """Return ``file:line function`` of the innermost frame in :data:`OURS`, or else outside the rehearsal and PyTorch."""
    frame: Any = sys._getframe(1)
    outside = None
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(OURS):
            return f"{Path(name).relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
        if outside is None and "/testkit/rehearsal/" not in name and "/torch/" not in name:
            outside = f"{Path(name).name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return outside or "unknown"


@dataclass(frozen=True)
class Upload:
    """One copy from the host to the device."""

    where: str
    """Code line, see :func:`code_line`."""
    bytes: int
    pinned: bool
    """Whether the host memory is pinned."""
    blocking: bool
    """Whether the host waits for the copy."""


@dataclass
class Record:
    """Everything that one walk recorded."""

    operators: Counter[str] = field(default_factory=Counter)
    """ATen operators that compute or move data on the device; views and allocations are not counted."""
    launches: list[Any] = field(default_factory=list)
    """Launches of the project's own Triton kernels (:class:`testkit.rehearsal.launches.Launch`)."""
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(what, code line) of every wait of the host for the device."""
    uploads: list[Upload] = field(default_factory=list)
    collectives: Counter[str] = field(default_factory=Counter)
    """Number of collectives, by operator."""
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes that this rank passes to its collectives, by operator."""
    flops: int = 0
    """FLOPs of the operators, without those of the project's own kernels."""
    moved_bytes: int = 0
    """Bytes that operators and launches read and write, every operand and result once."""
    saved_bytes: int = 0
    """Maximum bytes saved for the backward pass at any time (:func:`testkit.rehearsal.costs.count_saved`)."""
    data_shapes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(operator, code line) of every operator whose output shape depends on data; each is also counted as a wait."""
    paused: bool = False
    """Whether recording is paused, see :meth:`pause`."""
    observer: Any = None
    """Sees every launch and upload with its operands (:class:`testkit.rehearsal.graphs.Tape`), also in a pause; None sees none."""
    graph_rules: list[Any] = field(default_factory=list)
    """What the rules of CUDA graphs found (:class:`testkit.rehearsal.graphs.Finding`), for walks that ask for it."""

    def wait(self, what: str) -> None:
        """Count a wait of the host, described by ``what``, at the current code line."""
        if not self.paused:
            self.waits[what, code_line()] += 1

    def data_shape(self, operator: str) -> None:
        """Count an operator whose output shape depends on data, and the wait of the host for the shape."""
        if not self.paused:
            self.data_shapes[operator, code_line()] += 1
            self.wait(f"shape of {operator}")

    def upload(self, size: int, *, pinned: bool, blocking: bool) -> None:
        """Count a copy of ``size`` bytes from the host to the device; a blocking one is also counted as a wait."""
        if self.paused:
            return
        self.uploads.append(Upload(code_line(), size, pinned, blocking))
        if blocking:
            self.wait("copy to the device")

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Pause the recording inside the block, for the set-up of a walk."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before
