"""Processes that train together: found from the launcher's environment, and spoken to through one small class.

``torchrun`` and ``deepspeed`` set RANK, WORLD_SIZE and LOCAL_RANK; ``srun`` sets SLURM_PROCID, SLURM_STEP_NUM_TASKS and
SLURM_LOCALID. None of them: one process.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from comtip_fast.collectives import Group, SingleProcessGroup
from comtip_fast.training.distributed.failures import RestartError, disk_trouble, explain_failures, no_longer_than
from comtip_fast.training.protocol import TrainingError

T = TypeVar("T")
LEAVING_S = 30.0
_FIRST_PORT, _PORTS = 20000, 10000
# The names of newer releases of PyTorch, where it has them; the older ones are deprecated there.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True)
class DistributedEnv:
    """Where this process stands among those that were launched together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = ""
    """Host of rank 0."""
    port: int = 0
    launcher: str = "none"
    """``torchrun`` (or ``deepspeed``, which speaks the same), ``slurm`` or ``none``."""


def distributed_env(environ: Mapping[str, str] = os.environ) -> DistributedEnv:
    """Read the launcher's environment.

    Raises
    ------
    TrainingError
        It is there in part, or rank 0's host cannot be told.
    """
    if int(environ.get("WORLD_SIZE", "1")) > 1 or "RANK" in environ:
        missing = [k for k in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if k not in environ]
        if missing:
            raise TrainingError(f"the launcher set no {', '.join(missing)}; start with torchrun, deepspeed or srun")
        rank = int(environ["RANK"])
        local = int(environ.get("LOCAL_RANK", rank))
        return DistributedEnv(
            rank, int(environ["WORLD_SIZE"]), local, environ["MASTER_ADDR"], int(environ["MASTER_PORT"]), "torchrun"
        )
    # Inside a step of srun only: an allocation alone (salloc) sets SLURM_NTASKS for one process.
    size = int(environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if size > 1 and "SLURM_PROCID" in environ:
        address = environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", ""))
        port = int(environ.get("MASTER_PORT", _FIRST_PORT + int(environ.get("SLURM_JOB_ID", "0")) % _PORTS))
        return DistributedEnv(
            int(environ["SLURM_PROCID"]), size, int(environ.get("SLURM_LOCALID", "0")), address, port, "slurm"
        )
    return DistributedEnv()


def first_host(nodes: str) -> str:
    """Return the first host of SLURM's compressed list: ``gpu[03-05,9],cpu1`` gives ``gpu03``.

    Raises
    ------
    TrainingError
        The list is empty or of another form.
    """
    found = re.match(r"^([^,\[\]]+)(?:\[(\w+)[^\]]*\])?", nodes.strip())
    if not found:
        raise TrainingError(f"SLURM_STEP_NODELIST={nodes!r}: cannot tell rank 0's host; set MASTER_ADDR")
    return found.group(1) + (found.group(2) or "")


class ProcessGroup:
    """:class:`comtip_fast.collectives.Group` over ``torch.distributed``'s default group."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """All-gather; ragged rows travel padded to the longest share."""
        most = max(counts)
        mine = _padded(rows.contiguous(), most)
        out = mine.new_empty(self.size * most, *rows.shape[1:])
        _all_gather(out, mine)
        if min(counts) == most:
            return out
        return torch.cat([part[:n] for part, n in zip(out.split(most), counts, strict=True)])

    def scatter_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Reduce-scatter; ragged rows travel padded to the longest share."""
        most = max(counts)
        parts = rows.split(list(counts))
        full = rows if min(counts) == most else torch.cat([_padded(part, most) for part in parts])
        out = rows.new_empty(most, *rows.shape[1:])
        _reduce_scatter(out, full.contiguous())
        return out[: counts[self.rank]]

    def sum(self, values: Tensor) -> Tensor:
        """All-reduce a copy by sum."""
        out = values.clone()
        dist.all_reduce(out, dist.ReduceOp.SUM)
        return out

    def max(self, values: Tensor) -> Tensor:
        """All-reduce a copy by maximum."""
        out = values.clone()
        dist.all_reduce(out, dist.ReduceOp.MAX)
        return out

    def ring_shift(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> Callable[[], None]:
        """Start one step of a ring."""
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        ops = [dist.P2POp(dist.isend, t, after) for t in send if t.numel()]
        ops += [dist.P2POp(dist.irecv, t, before) for t in receive if t.numel()]
        works = dist.batch_isend_irecv(ops) if ops else []

        def wait() -> None:
            for work in works:
                work.wait()

        return wait


def _padded(rows: Tensor, length: int) -> Tensor:
    missing = length - rows.shape[0]
    return rows if missing == 0 else torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])


@contextmanager
def init_distributed(
    timeout_s: float = 600.0, device: str = "auto", place: DistributedEnv | None = None
) -> Iterator[Group]:
    """Join the processes that were launched with this one, for as long as the ``with`` block lasts.

    Parameters
    ----------
    timeout_s
        A collective that some rank does not reach within this time ends the run on every rank.
    device
        ``cpu`` keeps to gloo where there are GPUs.
    place
        Where this process stands; None reads the environment.
    """
    place = distributed_env() if place is None else place
    if place.size == 1:
        yield SingleProcessGroup()
        return
    gpu = device != "cpu" and torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(place.local_rank)
    os.environ.setdefault("MASTER_ADDR", place.address)
    os.environ.setdefault("MASTER_PORT", str(place.port))
    os.environ["LOCAL_RANK"] = str(place.local_rank)  # read by DeepSpeed
    with explain_failures(place.rank, place.size, lambda: "while joining the other ranks", timeout_s):
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=_store(place, timeout),
            rank=place.rank,
            world_size=place.size,
            timeout=timeout,
        )
    try:
        with explain_failures(place.rank, place.size, lambda: "before or after the steps", timeout_s):
            yield ProcessGroup()
    finally:
        with no_longer_than(LEAVING_S, "leaving the other ranks"):
            dist.destroy_process_group()


def _store(place: DistributedEnv, timeout: timedelta) -> dist.Store:
    """Return where ranks find one another.

    The store that torchrun's agent serves outlives its workers and keeps the addresses of dead ones, so every start has
    names of its own there. With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 every start has a store of its own instead: needed
    where an agent may be replaced, because agents then count restarts differently.
    """
    store = next(iter(dist.rendezvous("env://", place.rank, place.size, timeout=timeout)))[0]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    return dist.PrefixStore(f"start{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}of{place.size}", store)


def broadcast(value: T, group: Group) -> T:
    """Return rank 0's ``value`` on every rank; plain data only."""
    if group.size == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_rank_zero(work: Callable[[], T], group: Group) -> T:
    """Let rank 0 do ``work`` and return what it gave on every rank; what it raises is raised on every rank.

    The result must be plain data. Other ranks raise :class:`TrainingError`, or :class:`RestartError` where rank 0 did,
    with rank 0's message.
    """
    if group.size == 1:
        return work()
    result, error = None, None
    if group.rank == 0:
        try:
            result = work()
        except Exception as caught:
            error = caught
    mends = isinstance(error, RestartError) or (error is not None and disk_trouble(error) is not None)
    said = broadcast((result, None if error is None else str(error), mends), group)
    if error is not None:
        raise error
    if said[1] is not None:
        raise (RestartError if said[2] else TrainingError)(f"rank 0: {said[1]}")
    return said[0]  # type: ignore[return-value]
