"""Part ``nccl``: multi-GPU code on one GPU: NCCL with one rank, DDP, ZeRO, and the loss over emulated ranks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from comtip_kernels import infonce
from comtip_kernels.dispatch import prefer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bench.evidence.batches import tiny_config
from bench.evidence.cases import why_not
from bench.evidence.check import worst_row
from bench.evidence.rows import Row, Rows
from bench.evidence.runs import Result, different, train
from comtip_fast.collectives import Group, counts_of, share_of
from comtip_fast.config.schema import RunConfig
from comtip_fast.objectives import PairMetadata, global_infonce
from comtip_fast.training.distributed.process_group import ProcessGroup
from comtip_fast.training.engines import factory
from comtip_fast.training.engines.torch import TorchEngine
from testkit.ranks import Rank, Ranks

ENGINES = ("ddp", "zero1", "zero2", "zero3")
TOLERANCE = 1e-4
"""Maximum relative difference of a loss from that of a run without DDP or ZeRO, in fp32."""


class DDPOfOne(TorchEngine):
    """The engine for one process, with its step wrapped in DDP as for several."""

    def __init__(self, module: nn.Module, config: RunConfig, group: Group) -> None:
        super().__init__(module, config, group)
        self.name = "ddp"
        self._step = DistributedDataParallel(
            self._step, bucket_cap_mb=config.engine.bucket_mb, gradient_as_bucket_view=True
        )
        self._step.broadcast_buffers = False


def run(rows: Rows, dry: bool) -> None:
    """Check the collectives, short runs under every engine, and the loss over ranks."""
    device, backend = torch.device("cpu" if dry else "cuda"), "gloo" if dry else "nccl"
    if not dry:
        torch.cuda.set_device(0)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        hosts: Any = None if dry else dist.new_group(backend="gloo")
        group = ProcessGroup(hosts)
        collectives(rows, group, device, backend)
        engines(rows, group, device, backend, dry)
        for form in ("gather", "ring"):
            over_ranks(rows, form, device, dry)
        ring(rows, group, device, backend)
    finally:
        dist.destroy_process_group()


def collectives(rows: Rows, group: ProcessGroup, device: torch.device, backend: str) -> None:
    """Send whether each collective of the training loop returns the right values for one rank."""
    x = torch.arange(12.0, device=device).view(3, 4)
    calls = {
        "gather_rows": lambda: group.gather_rows(x, [3]),
        "scatter_rows": lambda: group.scatter_rows(x, [3]),
        "sum": lambda: group.sum(x),
        "max": lambda: group.max(x),
        "any": lambda: torch.tensor(group.any([False, True])).float(),
    }
    for name, call in calls.items():
        _collective(rows, name, backend, call, torch.tensor([0.0, 1.0]) if name == "any" else x)


def ring(rows: Rows, group: ProcessGroup, device: torch.device, backend: str) -> None:
    """Send whether a rank can send a block to itself; called last, because a backend that cannot may hang."""
    if backend == "gloo":
        rows.skip("ring_shift", "gloo does not send to its own rank", provider=backend)
        return
    x = torch.arange(12.0, device=device)

    def shift() -> Tensor:
        out = torch.zeros_like(x)
        group.ring_shift([x], [out])()
        return out

    _collective(rows, "ring_shift", backend, shift, x)


def _collective(rows: Rows, name: str, backend: str, call: Callable[[], Tensor], want: Tensor) -> None:
    try:
        right = torch.equal(call(), want)
    except Exception as error:
        rows.fail(name, error, provider=backend)
        return
    rows.add(Row(name, "as expected", str(right), provider=backend, status="ok" if right else "failed"))


def engines(rows: Rows, group: ProcessGroup, device: torch.device, backend: str, dry: bool) -> None:
    """Send the difference of each engine's losses from those of one process without DDP or ZeRO."""
    n, missing = (3 if dry else 8), why_not("deepspeed")
    with tempfile.TemporaryDirectory() as folder:
        want = train(tiny_config(device, f"train.steps={n}"), device, Path(folder) / "single")
        for name in ENGINES[:2] if dry else ENGINES:
            if name != "ddp" and missing:
                rows.skip(name, missing, provider=backend)
                continue
            stage = ("engine.kind=deepspeed", f"engine.zero_stage={name[-1]}") if name != "ddp" else ()
            config = tiny_config(device, f"train.steps={n}", *stage)
            wrapped = mock.patch.object(factory, "TorchEngine", DDPOfOne) if name == "ddp" else nullcontext()
            try:
                with wrapped:
                    got = train(config, device, Path(folder) / name, group=group)
            except Exception as error:
                rows.fail(name, error, provider=backend)
                continue
            _report(rows, name, want, got, backend)


def _report(rows: Rows, name: str, want: Result, got: Result, backend: str) -> None:
    error = max(abs(got.losses[s] / want.losses[s] - 1) for s in want.losses)
    where = {"size": f"{len(want.losses)} steps", "dtype": "fp32", "provider": backend}
    status = "ok" if error <= TOLERANCE and got.engine == name else "failed"
    note = f"engine {got.engine}; bound {TOLERANCE:g}; {len(different(want.weights, got.weights))} of {len(want.weights)} weights differ in bits"
    rows.add(Row(name, "relative difference of losses from one process", error, status=status, note=note, **where))


def over_ranks(rows: Rows, form: str, device: torch.device, dry: bool) -> None:
    """Compare the loss over two ranks, which are threads of this process, with the operation of one rank."""
    B, extra, D, world = (10, 4, 16, 2) if dry else (1000, 700, 512, 2)
    where = {"size": f"B={B} columns={B + extra} D={D}, {world} emulated ranks", "dtype": "fp32", "provider": form}
    g = torch.Generator().manual_seed(world)
    x, y, more = (torch.randn(n, D, generator=g).to(device) for n in (B, B, extra))
    text, section = ((torch.randint(n, (B + extra,), generator=g)).to(device) for n in (B // 2, 2))
    weight = torch.rand(B, generator=g).add(0.1).to(device)
    texts, counts = torch.cat([y, more]), counts_of(B, world)
    index = torch.arange(B + extra, device=device)
    columns = [
        torch.cat([index[:B][share_of(B, r, world)], index[B:][share_of(extra, r, world)]]) for r in range(world)
    ]

    def work(rank: Rank) -> list[Tensor]:
        own, mine = share_of(B, rank.rank, world), columns[rank.rank]
        scale = torch.tensor(20.0, device=device)
        leaves = [t.clone().requires_grad_() for t in (x[own], texts[mine], scale)]
        pairs = PairMetadata(text[mine], section[mine], weight[own], "same_group")
        # In this thread, because the ranks would share autograd's thread of the device and wait for each other.
        with torch.autograd.set_multithreading_enabled(False):
            loss = global_infonce(leaves[0], leaves[1], leaves[2], pairs, rank, counts, form)
            loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[misc]

    try:
        with prefer("triton"):
            found = Ranks(world).run(work)
    except Exception as error:
        rows.fail("loss over ranks", error, **where)
        return
    want = _of_one_rank([x, texts, torch.tensor(20.0, device=device)], text, section, weight)
    dy = torch.zeros_like(texts)
    for mine, (_, _, part, _) in zip(columns, found, strict=True):
        dy[mine] = part
    got = [sum(f[0] for f in found), torch.cat([f[1] for f in found]), dy, sum(f[3] for f in found)]
    worst = max(worst_row(torch.as_tensor(a), b) for a, b in zip(got, want, strict=True))
    status = "ok" if worst <= TOLERANCE else "failed"
    note = f"bound {TOLERANCE:g}"
    rows.add(Row("loss over ranks", "largest error of a row", worst, status=status, note=note, **where))


def _of_one_rank(inputs: list[Tensor], text: Tensor, section: Tensor, weight: Tensor) -> list[Tensor]:
    B = weight.shape[0]
    leaves = [t.clone().double().requires_grad_() for t in inputs]
    ids = {"group_rows": section[:B], "group_columns": section, "class_rows": text[:B], "class_columns": text}
    loss = infonce(*leaves, negatives="same_group", weight_B=weight.double(), impl="reference", **ids)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[misc]
