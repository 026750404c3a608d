"""Setup of the process group from the launcher's environment, and its collectives.

``torchrun`` and ``deepspeed`` set RANK, WORLD_SIZE and LOCAL_RANK; ``srun`` sets SLURM_PROCID, SLURM_STEP_NUM_TASKS and
SLURM_LOCALID. Without these variables the run is a single process.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from comtip_shards.storage.disk import disk_trouble
from torch import Tensor

from comtip_fast.collectives import Group, SingleProcessGroup
from comtip_fast.training.distributed.failures import RestartError, explain_failures, no_longer_than
from comtip_fast.training.protocol import TrainingError

T = TypeVar("T")
R = TypeVar("R")
Pause = Callable[[], AbstractContextManager[Any]]
"""Returns the context in which a rank waits for others."""
DESTROY_TIMEOUT_S = 30.0
"""Seconds after which a process that cannot destroy its process group exits."""
_FIRST_PORT, _PORTS = 20000, 10000
# Newer releases of PyTorch rename these functions and deprecate the old names.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True)
class DistributedEnv:
    """Rank of this process and address of rank 0, from the launcher's environment."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = ""
    """Host of rank 0."""
    port: int = 0
    launcher: str = "none"
    """``torchrun`` (also for ``deepspeed``, which sets the same variables), ``slurm`` or ``none``."""


def distributed_env(environ: Mapping[str, str] = os.environ) -> DistributedEnv:
    """Return rank and address from the launcher's environment; without a launcher, return the defaults of a single process.

    Raises
    ------
    TrainingError
        A variable of the launcher is missing or not a number, or the host of rank 0 cannot be determined.
    """
    if _number(environ, "WORLD_SIZE", 1) > 1 or "RANK" in environ:
        missing = [k for k in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if k not in environ]
        if missing:
            raise TrainingError(f"environment: {', '.join(missing)} not set; start with torchrun, deepspeed or srun")
        rank = _number(environ, "RANK")
        local = _number(environ, "LOCAL_RANK", rank)
        size, port = _number(environ, "WORLD_SIZE"), _number(environ, "MASTER_PORT")
        return DistributedEnv(rank, size, local, environ["MASTER_ADDR"], port, "torchrun")
    # SLURM_STEP_NUM_TASKS is set by srun only; salloc sets SLURM_NTASKS even for a single process.
    size = _number(environ, "SLURM_STEP_NUM_TASKS", 1)
    if size > 1 and "SLURM_PROCID" in environ:
        address = environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", ""))
        port = _number(environ, "MASTER_PORT", _FIRST_PORT + _number(environ, "SLURM_JOB_ID", 0) % _PORTS)
        rank, local = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_LOCALID", 0)
        return DistributedEnv(rank, size, local, address, port, "slurm")
    return DistributedEnv()


def _number(environ: Mapping[str, str], name: str, default: int = 0) -> int:
    """Return an integer of the environment, or ``default`` if it is not set; raise TrainingError for text that is no integer."""
    text = environ.get(name)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError:
        raise TrainingError(
            f"environment: {name}={text!r} is not an integer; start with torchrun, deepspeed or srun"
        ) from None


def first_host(nodes: str) -> str:
    """Return the first host of SLURM's compressed node list: ``gpu[03-05,9],cpu1`` gives ``gpu03``.

    Raises
    ------
    TrainingError
        The list is empty or cannot be parsed.
    """
    found = re.match(r"^([^,\[\]]+)(?:\[(\w+)[^\]]*\])?", nodes.strip())
    if not found:
        raise TrainingError(f"SLURM_STEP_NODELIST={nodes!r}: cannot determine the host of rank 0; set MASTER_ADDR")
    return found.group(1) + (found.group(2) or "")


def gpu_of(env: DistributedEnv, visible: int) -> int:
    """Return the number of the GPU that this process uses, among the ``visible`` ones.

    A process that sees a single GPU uses it: with ``srun --gpus-per-task=1``, SLURM hides the GPUs of the other tasks, and each
    task numbers its own GPU 0. If several processes see the same single GPU, NCCL refuses it by name.

    Raises
    ------
    TrainingError
        There are fewer GPUs than processes on this host.
    """
    if visible == 1:
        return 0
    if env.local_rank >= visible:
        raise TrainingError(
            f"rank {env.rank}: process {env.local_rank} of its host (processes are numbered from 0), but it sees {visible} GPUs "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}); start one process per GPU"
        )
    return env.local_rank


class ProcessGroup:
    """Implementation of :class:`comtip_fast.collectives.Group` on the default group of ``torch.distributed``.

    Parameters
    ----------
    hosts
        A gloo group of the same ranks, for values in host memory; None if the default group uses gloo.
    waits
        A gloo group of the same ranks for :func:`broadcast` and :func:`on_every_rank`; None uses the default group.
    wait_s
        Timeout of ``waits`` in seconds, for messages.
    """

    def __init__(
        self, hosts: dist.ProcessGroup | None = None, waits: dist.ProcessGroup | None = None, wait_s: float = 0.0
    ) -> None:
        self.rank, self.size, self._hosts = dist.get_rank(), dist.get_world_size(), hosts
        self.waits, self.wait_s = waits, wait_s

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """All-gather; for the transfer, shares of different lengths are padded to the longest one."""
        most = max(counts)
        mine = _padded(rows.contiguous(), most)
        out = mine.new_empty(self.size * most, *rows.shape[1:])
        _all_gather(out, mine)
        if min(counts) == most:
            return out
        return torch.cat([part[:n] for part, n in zip(out.split(most), counts, strict=True)])

    def scatter_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Reduce-scatter; for the transfer, shares of different lengths are padded to the longest one."""
        most = max(counts)
        parts = rows.split(list(counts))
        full = rows if min(counts) == most else torch.cat([_padded(part, most) for part in parts])
        out = rows.new_empty(most, *rows.shape[1:])
        _reduce_scatter(out, full.contiguous())
        return out[: counts[self.rank]]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over ranks; ``values`` is not changed."""
        out = values.clone()
        dist.all_reduce(out, dist.ReduceOp.SUM)
        return out

    def max(self, values: Tensor) -> Tensor:
        """Return the maximum over ranks; ``values`` is not changed."""
        out = values.clone()
        dist.all_reduce(out, dist.ReduceOp.MAX)
        return out

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Return, for each flag, whether any rank set it; flags are exchanged in host memory."""
        raised = torch.tensor(list(map(bool, flags)), dtype=torch.uint8)
        dist.all_reduce(raised, dist.ReduceOp.MAX, group=self._hosts)
        return [bool(value) for value in raised.tolist()]

    def ring_shift(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> Callable[[], None]:
        """Start sending to the next rank and receiving from the previous one; return a function that waits for both."""
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        ops = [dist.P2POp(dist.isend, t, after) for t in send if t.numel()]
        ops += [dist.P2POp(dist.irecv, t, before) for t in receive if t.numel()]
        works = dist.batch_isend_irecv(ops) if ops else []

        def wait() -> None:
            for work in works:
                work.wait()

        return wait


def _padded(rows: Tensor, length: int) -> Tensor:
    """Return ``rows``, padded with zeros to ``length`` rows."""
    missing = length - rows.shape[0]
    return rows if missing == 0 else torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])


@contextmanager
def init_distributed(
    timeout_s: float = 600.0,
    device: str = "auto",
    env: DistributedEnv | None = None,
    *,
    wait_timeout_s: float = 7200.0,
) -> Iterator[Group]:
    """Initialize the process group before the block and destroy it afterwards, if there are several processes.

    Parameters
    ----------
    timeout_s
        Timeout of collectives in seconds; if a rank does not reach a collective in time, the run ends on every rank.
    device
        ``cpu`` selects gloo even if there are GPUs; otherwise NCCL is used if PyTorch finds a GPU. With a GPU's number, as in
        ``cuda:1``, a single process has this GPU as its current one inside the block; several processes refuse it.
    env
        Rank of this process and address of rank 0; None reads the environment.
    wait_timeout_s
        Timeout in seconds of waits for work that is not a collective, such as a validation (``engine.wait_timeout_s``).

    Yields
    ------
    Group
        A :class:`ProcessGroup`, or a :class:`SingleProcessGroup` for a single process.

    Raises
    ------
    TrainingError
        A variable of the launcher is missing or not a number, the host of rank 0 cannot be determined, there are fewer GPUs
        than processes on this host, ``device`` is a single GPU of several processes, or, with several ranks, the block cannot write
        a path.
    RestartError
        With several ranks: a rank is lost or late, or a disk is full or fails in the block.
    """
    env = distributed_env() if env is None else env
    number = device.removeprefix("cuda:") if device.startswith("cuda:") else ""
    if env.size == 1:
        if number:
            os.environ["LOCAL_RANK"] = number  # as below
        # Events, streams and kernels of other packages use the current GPU, wherever the tensors are.
        with torch.cuda.device(device) if number else nullcontext():
            yield SingleProcessGroup()
        return
    if number:
        raise TrainingError(
            f"train.device={device}: {env.size} processes were started, which would all use this GPU; set train.device=cuda, so that "
            "each uses its own, and select GPUs with CUDA_VISIBLE_DEVICES"
        )
    gpu = device != "cpu" and torch.cuda.is_available()
    own = gpu_of(env, torch.cuda.device_count()) if gpu else env.local_rank
    if gpu:
        torch.cuda.set_device(own)
    os.environ.setdefault("MASTER_ADDR", env.address)
    os.environ.setdefault("MASTER_PORT", str(env.port))
    os.environ["LOCAL_RANK"] = str(own)  # DeepSpeed selects the GPU of this number
    with explain_failures(env.rank, env.size, lambda: "while initializing the process group", timeout_s):
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=_store(env, timeout),
            rank=env.rank,
            world_size=env.size,
            timeout=timeout,
        )
        # Stop requests are exchanged in host memory, so that no host waits for its GPU to read them.
        hosts: Any = dist.new_group(backend="gloo", timeout=timeout) if gpu else None
        # A validation or an export may take longer than the timeout of a step's collectives.
        waits: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=wait_timeout_s))
    try:
        with explain_failures(env.rank, env.size, lambda: "before or after the training steps", timeout_s):
            yield ProcessGroup(hosts if isinstance(hosts, dist.ProcessGroup) else None, waits, wait_timeout_s)
    finally:
        with no_longer_than(DESTROY_TIMEOUT_S, "destroying the process group"):
            dist.destroy_process_group()


def _store(env: DistributedEnv, timeout: timedelta) -> dist.Store:
    """Return the rendezvous store.

    The store of torchrun's agent outlives the workers and keeps the addresses of dead workers, so each restart uses its
    own key prefix. With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 each restart has its own store instead; this is needed if an
    agent may be replaced, because agents then count restarts differently.
    """
    store = next(iter(dist.rendezvous("env://", env.rank, env.size, timeout=timeout)))[0]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    return dist.PrefixStore(f"start{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}of{env.size}", store)


def broadcast(value: T, group: Group) -> T:
    """Return rank 0's ``value``, which must be picklable, on every rank; a collective call."""
    if group.size == 1:
        return value
    box: list[Any] = [value]
    with _waiting(group) as waits:
        dist.broadcast_object_list(box, src=0, group=waits)
    return box[0]


def broadcast_into(tensor: Tensor, group: Group) -> None:
    """Replace the values of a 1-D contiguous CPU tensor by those of rank 0; a collective call."""
    if group.size > 1:
        with _waiting(group) as waits:  # as bytes, because gloo does not send every type
            dist.broadcast(tensor.view(torch.uint8), src=0, group=waits)


def on_rank_zero(work: Callable[[], T], group: Group, pause: Pause = nullcontext) -> T:
    """Call ``work`` on rank 0 and return its result on every rank; a collective call.

    The result must be picklable. If ``work`` raises, rank 0 raises its error, and the other ranks raise :class:`RestartError` or
    :class:`TrainingError` with rank 0's message. ``work`` may last up to ``engine.wait_timeout_s``.

    Parameters
    ----------
    work
        Called without arguments.
    group
        Ranks of the run.
    pause
        Returns the context in which the other ranks wait, for example :meth:`Watchdog.paused`.
    """
    if group.size == 1:
        return work()
    own = _Outcome()
    if group.rank == 0:
        own = _Outcome.of(work)
        result = broadcast(own, group)
    else:
        with pause():
            result = broadcast(own, group)
    if own.error is not None:
        raise own.error
    return result.value_or_raise(0)


def on_every_rank(
    work: Callable[[], T], combine: Callable[[list[T]], R], group: Group, pause: Pause = nullcontext
) -> R:
    """Call ``work`` on every rank and return ``combine`` of the results, in rank order, on every rank; a collective call.

    Results must be picklable. If the call fails on a rank, that rank raises its own error, and the others raise
    :class:`RestartError` or :class:`TrainingError` with the message of that error.

    Parameters
    ----------
    work
        Called without arguments; may last up to ``engine.wait_timeout_s``.
    combine
        Called on rank 0 with the results of all ranks.
    group
        Ranks of the run.
    pause
        Returns the context in which every rank waits for the others and for ``combine``.
    """
    if group.size == 1:
        return combine([work()])
    own = _Outcome.of(work)
    outcomes: list[Any] | None = [None] * group.size if group.rank == 0 else None
    with pause():
        with _waiting(group) as waits:
            dist.gather_object(own, outcomes, dst=0, group=waits)
        joined = _Outcome()
        if outcomes is not None:
            failed = next((i for i, outcome in enumerate(outcomes) if outcome.message is not None), None)
            if failed is None:
                joined = _Outcome.of(lambda: combine([outcome.value for outcome in outcomes]))
            else:
                joined = replace(outcomes[failed], rank=failed)
        result = broadcast(joined, group)
    if own.error is not None:
        raise own.error
    if joined.error is not None:
        raise joined.error
    return result.value_or_raise(result.rank)


@dataclass
class _Outcome:
    """Result or error of a rank's work; only the message of an exception is sent, because exceptions may not be picklable."""

    value: Any = None
    message: str | None = None
    restartable: bool = False
    rank: int = 0
    error: Exception | None = None

    @classmethod
    def of(cls, work: Callable[[], Any]) -> _Outcome:
        """Call ``work`` and return its result or its error."""
        try:
            return cls(work())
        except Exception as error:
            restartable = isinstance(error, RestartError) or disk_trouble(error) is not None
            return cls(message=str(error), restartable=restartable, error=error)

    def value_or_raise(self, rank: int) -> Any:
        """Return the result; if the work failed, raise an error with its message and ``rank``, the rank that failed."""
        if self.message is not None:
            raise (RestartError if self.restartable else TrainingError)(f"rank {rank}: {self.message}")
        return self.value

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"error": None}


@contextmanager
def _waiting(group: Group) -> Iterator[dist.ProcessGroup | None]:
    """Yield the process group for waits; the error of a timeout names ``engine.wait_timeout_s``."""
    inner = getattr(group, "inner", group)  # of a ClockedGroup
    if not isinstance(inner, ProcessGroup) or inner.waits is None:
        yield None
        return
    wait_s, where = inner.wait_s, "waiting for other ranks"
    with explain_failures(group.rank, group.size, lambda: where, wait_s, key="engine.wait_timeout_s"):
        yield inner.waits
