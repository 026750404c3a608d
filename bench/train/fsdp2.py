"""PyTorch's FSDP2 (``fully_shard``) next to DDP and DeepSpeed's ZeRO on two CPU ranks, as bench/train/fsdp2.csv.

    PYTHONPATH=.:kernels:data_shards python bench/train/fsdp2.py                 measure, and write the csv
    PYTHONPATH=.:kernels:data_shards python bench/train/fsdp2.py --parity       losses and gradients over the cases of parity.py

CoMTIP with the widths of the demo takes five steps under every engine, each in fresh processes. *Sent* is what one rank sends in the
fourth step, by kind of collective, counted by ``traffic.Count``. *Held* are the bytes of all live tensors of the engine between steps;
*peak* adds the allocator's highest excess within the fifth step, activations included. *RSS* is the anonymous resident memory that
building added, *lines* the lines of code of the engine, without comments. :class:`Fsdp2Engine` has what a step, an export and sharded
checkpoints need; it lacks spikes, offloading, thawing parameters, timed collectives and whole checkpoints.
"""

from __future__ import annotations

import argparse
import ast
import csv
import gc
import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.train import parity
from bench.train.traffic import Count
from comtip_fast.collectives import Group, SingleProcessGroup
from comtip_fast.config.io import load_config
from comtip_fast.config.schema import RunConfig
from comtip_fast.training.distributed import deepspeed_internals
from comtip_fast.training.distributed.process_group import init_distributed
from comtip_fast.training.engines.base import ParameterPart, StepModule, Update, autocast_of
from comtip_fast.training.engines.deepspeed import DeepSpeedEngine
from comtip_fast.training.engines.factory import make_engine
from comtip_fast.training.engines.torch import TorchEngine
from comtip_fast.training.engines.zero3_shards import Zero3Shards
from comtip_fast.training.grad_cache import forward_backward
from comtip_fast.training.optim import make_optimizer, set_rate
from comtip_fast.training.protocol import PartSource
from comtip_fast.training.task import build_task
from testkit.distributed import run_distributed
from testkit.tiny import tiny_shards

CSV = Path(__file__).with_suffix(".csv")
WORLD, STEPS = 2, 5
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "fsdp2_keep")
"""``fsdp2_keep`` does not free gathered parameters between forward and backward pass."""
KINDS = ("all_reduce", "all_gather", "reduce_scatter")
DEMO = [
    "data.batch_size=32",
    "data.views=1",
    "data.workers=0",
    "genes.per_cohort=30",
    "genes.held_out_from=10",
    "genes.held_out_every=4",
    "panel.min_genes=24",
    "panel.max_genes=24",
    "levels.n_levels=10",
    "levels.min_positive=10",
    "vision.patch_px=8",
    "vision.width=128",
    "vision.depth=2",
    "vision.heads=4",
    "vision.target=ema",
    "text.width=128",
    "text.depth=2",
    "text.heads=4",
    "text.max_tokens=6",
    "train.log_every=1000",
    "train.threads=1",
    "train.device=cpu",
    "engine.bucket_mb=0.5",
    "engine.persist_elements=100",
]


class Fsdp2Engine:
    """FSDP2: ``fully_shard`` on every block and on the rest; a prototype of an engine."""

    name, table_first, rebuilds = "fsdp2", False, False

    def __init__(self, module: nn.Module, config: RunConfig, group: Group, *, keep: bool = False) -> None:
        self.module, self.config, self.group, self.shards = module, config, group, self
        self.autocast = autocast_of(config, torch.device("cpu"))
        self._step = StepModule(module, self.autocast)
        mesh = init_device_mesh("cpu", (group.size,))
        teacher = getattr(module, "teacher", None)
        for block in [*module.transformer_blocks(), *(teacher.blocks if teacher is not None else ())]:
            fully_shard(block, mesh=mesh, reshard_after_forward=not keep)
        fully_shard(self._step, mesh=mesh, reshard_after_forward=False)
        self.optimizer = make_optimizer(module, config.optim)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """See :class:`comtip_fast.training.engines.base.Engine`."""
        return self._step(function, *args)

    def start_step(self, rate: float) -> None:
        """See :class:`comtip_fast.training.engines.base.Engine`."""
        set_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)

    def piece(self, last: bool) -> AbstractContextManager[Any]:
        """See :class:`comtip_fast.training.engines.base.Engine`."""
        self._step.set_requires_gradient_sync(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See :class:`comtip_fast.training.engines.base.Engine`; FSDP2 averages gradients over ranks."""
        (loss * self.group.size).backward()

    def update(self, finite: Tensor | bool, spikes: None = None) -> Update:
        """See :class:`comtip_fast.training.engines.base.Engine`."""
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.config.optim.clip or float("inf")).full_tensor()
        good = norm.isfinite() & finite
        if bool(good):
            self.optimizer.step()
        return Update(norm, good)

    def elementwise(self) -> AbstractContextManager[Any]:
        """See :class:`comtip_fast.training.engines.base.Engine`; operations on two DTensors act on the parts of this rank."""
        return nullcontext()

    @contextmanager
    def gathered_for_read(self) -> Iterator[None]:
        """See :class:`comtip_fast.training.engines.base.Engine`; for the root and every block."""
        sharded = [m for m in self._step.modules() if hasattr(m, "unshard")]
        for each in sharded:
            each.unshard()
        yield
        for each in sharded:
            each.reshard()

    def parts(self) -> Iterator[ParameterPart]:
        """See :class:`comtip_fast.training.engines.base.Shards`; FSDP2 divides rows, the first dimension of a parameter."""
        for name, p in self.module.named_parameters():
            rows = -(-p.shape[0] // self.group.size)
            start = min(self.group.rank * rows * (p.numel() // p.shape[0]), p.numel())
            state = self.optimizer.state.get(p, {})
            moments = {key: v.to_local().flatten() for key, v in state.items() if key != "step"}
            own = {"weight": p.detach().to_local().flatten(), **moments}
            yield ParameterPart(name, tuple(p.shape), start, own, float(state["step"]) if state else None)

    @torch.no_grad()
    def restore(self, source: PartSource) -> None:
        """Replace weights and optimizer state by those of ``source``; called after a step, so that the moments exist."""
        for part in self.parts():
            for key, target in part.tensors.items():
                value = source.read(part.name, key, part.start, part.start + target.numel())
                if value is not None:
                    target.copy_(value)
            if part.step is not None:
                state = self.optimizer.state[self.module.get_parameter(part.name)]
                state["step"].fill_(source.step_of(part.name))

    def close(self) -> None:
        """See :class:`comtip_fast.training.engines.base.Engine`."""
        self.optimizer.state.clear()


def lines(*objects: Any) -> int:
    """Return the number of lines of code of modules, classes and functions, without blank lines, comments and docstrings."""
    total = 0
    for each in objects:
        tree = ast.parse(inspect.getsource(each))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            first = body[0] if isinstance(body, list) and body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                body[:1] = []
        total += len([line for line in ast.unparse(tree).splitlines() if line.strip()])
    return total


def lines_of(name: str) -> int:
    """Return the lines of code that an engine needs of this project; ZeRO 1 to 3 share theirs."""
    if name == "ddp":
        return lines(TorchEngine)
    return lines(Fsdp2Engine) if name.startswith("fsdp2") else lines(DeepSpeedEngine, Zero3Shards, deepspeed_internals)


def config_of(name: str, shards: str) -> RunConfig:
    """Return the config of an engine."""
    kind = ["engine.kind=deepspeed", f"engine.zero_stage={name[-1]}"] if name.startswith("zero") else []
    return load_config(None, [*DEMO, *kind, f"data.shards={shards}"])


def build(name: str, module: nn.Module, config: RunConfig, group: Group) -> Any:
    """Return the engine of a name; the collectives of DDP are called from Python, where they can be counted."""
    if name.startswith("fsdp2"):
        return Fsdp2Engine(module, config, group, keep=name.endswith("keep"))
    engine = make_engine(module, config, group)
    if isinstance(engine, TorchEngine) and group.size > 1:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        engine._step.register_comm_hook(None, allreduce_hook)
    return engine


def live() -> int:
    """Return the bytes of all tensors that Python can reach, each storage once; of a DTensor, its local part."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.device.type == "cpu"]
    tensors += [t.grad for t in tensors if isinstance(t, nn.Parameter) and t.grad is not None]
    local = [t._local_tensor if isinstance(t, DTensor) else t for t in tensors]
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in local}
    return sum({s.data_ptr(): s.nbytes() for s in storages.values() if s.data_ptr()}.values())


def anonymous_mb() -> float:
    """Return the anonymous resident memory of this process in MB."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon")) * 1024 / 1e6


def peak_of(step: Callable[[], None]) -> int:
    """Return the highest number of bytes that are allocated during ``step`` beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        highest = max(highest, current)
    return highest


def measure(name: str, shards: str, group: Group) -> dict[str, Any]:
    """Take the steps of one engine and return its row."""
    # Objects that exist before are excluded from every count, which makes counting fast.
    gc.collect()
    gc.freeze()
    before, config = anonymous_mb(), config_of(name, shards)
    task = build_task(config, torch.device("cpu"), group)
    batches = [task.batch(task.batches(0)[0], step, 0) for step in range(1, STEPS + 1)]
    other = live() - sum(t.nbytes for t in (*task.module.parameters(), *task.module.buffers()))
    engine = build(name, task.module, config, group)
    ready, losses = anonymous_mb() - before, []
    counted = Count(group.size)

    def step(number: int) -> None:
        engine.module.train()
        engine.start_step(1e-3)
        found, _ = forward_backward(engine, task, batches[number - 1], 1)
        engine.update(True)
        with engine.elementwise():
            task.after_step(engine.module, number)
        losses.append(found["loss"])

    for number in (1, 2, 3):
        step(number)
    with counted:
        step(4)
    held = live() - other
    peak = held + peak_of(lambda: step(5))
    losses = [float(group.sum(loss.double())) for loss in losses]
    return {"engine": name, "losses": losses, "sent": counted.by_kind(), "held": held, "peak": peak, "ready": ready}


def rank(name: str, shards: str) -> None:
    """Measure one engine as one rank."""
    torch.set_num_threads(1)
    with init_distributed(300.0, "cpu") as group:
        row = measure(name, shards, group)
        print("ROW " + json.dumps(row), flush=True)


def run(shards: str, names: Sequence[str] = ENGINES) -> list[dict[str, Any]]:
    """Measure engines, each in forked processes of its own, and return their rows.

    Memory is that of the rank with more; ``loss_off`` is the largest relative difference of a loss from that of DDP.
    """
    rows = []
    for name in names:
        outputs = run_distributed([__file__, "--rank", name, shards], WORLD, timeout_s=600, fork=True)
        found = [
            json.loads(next(line[4:] for line in text.splitlines() if line.startswith("ROW "))) for text in outputs
        ]
        rows.append(found[0] | {key: max(each[key] for each in found) for key in ("held", "peak", "ready")})
    wanted = next((row["losses"] for row in rows if row["engine"] == "ddp"), None)
    for row in rows:
        pairs = zip(row["losses"], wanted or row["losses"], strict=True)
        row["loss_off"] = max(abs(a - b) / abs(b) for a, b in pairs)
    return rows


def cells(row: dict[str, Any]) -> dict[str, str]:
    """Return a row of the csv; memory and traffic in MB."""
    sent = {f"{kind}_mb": f"{row['sent'].get(kind, 0) / 1e6:.2f}" for kind in KINDS}
    return {
        "engine": row["engine"],
        **sent,
        "sent_mb": f"{sum(row['sent'].values()) / 1e6:.2f}",
        "held_mb": f"{row['held'] / 1e6:.2f}",
        "peak_mb": f"{row['peak'] / 1e6:.1f}",
        "ready_rss_mb": f"{row['ready']:.0f}",
        "lines": str(lines_of(row["engine"])),
        "loss_off_ddp": f"{row['loss_off']:.1e}",
    }


def parity_rank(shards: str) -> None:
    """Compare losses and gradients of FSDP2 in fp64 with those of one process, for every case of ``parity.py`` with DDP."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    alone = SingleProcessGroup()
    cases = [c for c in parity.cases(False) if (c.engine, c.dtype, c.more) == ("ddp", "fp64", ())]
    with init_distributed(300.0, "cpu") as group:
        task = parity.make_task(shards, parity.Case("single", "fp64"), alone)
        wanted_losses, wanted = parity.one_step(task, alone, make_engine(task.module, task.config, alone))
        for case in cases:
            task = parity.make_task(shards, replace(case, engine="fsdp2"), group)
            engine: Any = Fsdp2Engine(task.module, task.config, group)
            losses, found = parity.one_step(task, group, engine)
            off = max(abs(losses[k] - v) / max(1e-30, abs(v)) for k, v in wanted_losses.items())
            worst, where = parity.deviation(found, wanted)
            if group.rank == 0:
                options = f"{case.form} {case.shard_table} {case.micro_batches} {case.recompute}"
                print(f"{options}: loss {off:.1e}, gradient {worst:.1e} {where}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", default=",".join(ENGINES), help="engines, comma-separated (default: all)")
    parser.add_argument("--parity", action="store_true", help="compare gradients over the cases of parity.py instead")
    parser.add_argument("--rank", nargs=2, metavar=("ENGINE", "SHARDS"), help="measure as one rank (used internally)")
    args = parser.parse_args()
    if args.rank:
        (parity_rank(args.rank[1]) if args.parity else rank(*args.rank))
        return
    names = args.engines.split(",")
    with tempfile.TemporaryDirectory() as folder:
        shards = str(tiny_shards(Path(folder)))
        if args.parity:
            arguments = [__file__, "--parity", "--rank", "fsdp2", shards]
            print(run_distributed(arguments, WORLD, timeout_s=600, fork=True)[0])
            return
        rows = [cells(row) for row in run(shards, names)]
    with CSV.open("w", newline="") if names == list(ENGINES) else nullcontext(sys.stdout) as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
