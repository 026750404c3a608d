"""PyTorch's FSDP2 (``fully_shard``) next to DDP and ZeRO 3 on two CPU ranks: losses, collectives, memory, lines of the adapter.

    PYTHONPATH=.:kernels:data_shards python bench/train/fsdp2.py

The CoMTIP model of ``bench/train/curves.py`` runs a few steps under every engine with the trainer's own step; losses are compared
with those of one process, and the collectives of the last step are counted. A synthetic model of linear layers shows the memory.
:class:`Fsdp2Engine` implements what the trainer needs of an engine for a run without offloading, freezing and spikes.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.scale.sharded_checkpoint import WIDTH, measured, model_of, status
from bench.train.curves import TINY, engine
from bench.train.traffic import Count
from comtip_fast.collectives import Group
from comtip_fast.config.io import load_config
from comtip_fast.config.schema import RunConfig
from comtip_fast.training.distributed.process_group import init_distributed
from comtip_fast.training.engines.base import ParameterPart, PartSource, StepModule, Update, autocast_of
from comtip_fast.training.engines.deepspeed import DeepSpeedEngine
from comtip_fast.training.engines.factory import make_engine
from comtip_fast.training.engines.torch import TorchEngine
from comtip_fast.training.engines.zero3_shards import Zero3Shards
from comtip_fast.training.grad_cache import forward_backward
from comtip_fast.training.optim import make_optimizer, set_rate
from comtip_fast.training.task import build_task
from testkit.distributed import run_distributed
from testkit.tiny import tiny_shards

STEPS = 6
ENGINES = ("ddp", "zero3", "fsdp2")
KINDS = {"_allgather_base": "all-gather", "_reduce_scatter_base": "reduce-scatter", "allreduce": "all-reduce"}


class Calls(Count):
    """Count calls and bytes of every ``c10d`` collective."""

    def __init__(self, world: int) -> None:
        super().__init__(world)
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("c10d::"):
            short = name[6:].rstrip("_")
            self.calls[short] = self.calls.get(short, 0) + 1
        return super().__torch_dispatch__(func, types, args, kwargs)


class Fsdp2Engine:
    """FSDP2: ``fully_shard`` on every block and on the whole; a prototype of an engine."""

    name, table_first = "fsdp2", False

    def __init__(self, module: nn.Module, config: RunConfig, group: Group) -> None:
        from torch.distributed.fsdp import fully_shard

        self.module, self.config, self.group, self.shards = module, config, group, self
        self.autocast = autocast_of(config, torch.device("cpu"))
        self._step = StepModule(module, self.autocast)
        blocks = getattr(module, "transformer_blocks", lambda: [m for m in module if isinstance(m, nn.Linear)])
        for block in blocks():
            fully_shard(block)
        fully_shard(self._step)
        self.optimizer = make_optimizer(module, config.optim)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """See :class:`comtip_fast.training.engines.base.Engine`."""
        return self._step(function, *args)

    def start_step(self, rate: float) -> None:
        """See :class:`comtip_fast.training.engines.base.Engine`."""
        set_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)

    def piece(self, last: bool) -> Any:
        """See :class:`comtip_fast.training.engines.base.Engine`."""
        self._step.set_requires_gradient_sync(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See :class:`comtip_fast.training.engines.base.Engine`."""
        (loss * self.group.size).backward()

    def update(self, finite: Tensor | bool, spikes: None = None) -> Update:
        """See :class:`comtip_fast.training.engines.base.Engine`."""
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.config.optim.clip or float("inf"))
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        good = norm.isfinite() & finite
        if bool(good):
            self.optimizer.step()
        return Update(norm, good)

    @contextmanager
    def gathered_for_read(self) -> Iterator[dict[str, Tensor]]:
        """See :class:`comtip_fast.training.engines.base.Engine`."""
        yield {
            name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in self.module.state_dict().items()
        }

    def parts(self) -> Iterator[ParameterPart]:
        """See :class:`comtip_fast.training.engines.base.Engine`."""
        for name, p in self.module.named_parameters():
            own, rows = p.to_local(), -(-p.shape[0] // self.group.size)
            start = min(self.group.rank * rows * (p.numel() // p.shape[0]), p.numel())
            state = {k: v.to_local().flatten() for k, v in self.optimizer.state[p].items() if k != "step"}
            yield ParameterPart(
                name, tuple(p.shape), start, {"weight": own.flatten(), **state}, float(self.optimizer.state[p]["step"])
            )

    def restore(self, source: PartSource) -> None:
        """See :class:`comtip_fast.training.engines.base.Engine`."""
        for part in self.parts():
            for key, target in part.tensors.items():
                value = source.read(part.name, key, part.start, part.start + target.numel())
                if value is not None:
                    target.copy_(value)
            self.optimizer.state[self.module.get_parameter(part.name)]["step"].fill_(source.step_of(part.name))

    def close(self) -> None:
        """See :class:`comtip_fast.training.engines.base.Engine`."""
        self.optimizer.state.clear()


def lines(*objects: Any) -> int:
    """Return the number of lines of code of objects, without blank lines, comments and docstrings."""
    import ast

    total = 0
    for item in objects:
        tree = ast.parse(
            inspect.cleandoc(inspect.getsource(item)) if not inspect.ismodule(item) else inspect.getsource(item)
        )
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if (
                isinstance(body, list)
                and body
                and isinstance(body[0], ast.Expr)
                and isinstance(body[0].value, ast.Constant)
            ):
                body[0] = ast.Pass()
        total += sum(line.strip() not in ("", "pass") for line in ast.unparse(tree).splitlines())
    return total


def build(name: str, module: nn.Module, config: RunConfig, group: Group) -> Any:
    """Return the engine of a name; the collectives of DDP are called from Python, where they can be counted."""
    if name == "fsdp2":
        return Fsdp2Engine(module, config, group)
    engine = make_engine(module, config, group)
    if isinstance(engine, TorchEngine) and group.size > 1:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        engine._step.register_comm_hook(None, allreduce_hook)
    return engine


def comtip(shards: str, name: str, group: Group) -> dict[str, Any]:
    """Run steps of CoMTIP and return losses, and the collectives of the last one."""
    settings = engine("zero3") if name == "zero3" else ["engine.kind=auto"]
    config = load_config(None, [*TINY, f"data.shards={shards}", "vision.target=self", *settings])
    task = build_task(config, torch.device("cpu"), group)
    run = build(name, task.module, config, group)
    losses, sent = [], Calls(group.size)
    batches = task.batches(0)
    for step in range(1, STEPS + 1):
        batch = task.batch(batches[step % len(batches)], step, 0)
        run.module.train()
        with sent if step == STEPS else nullcontext():
            run.start_step(1e-3)
            found, _ = forward_backward(run, task, batch, 1)
            run.update(True)
        losses.append(float(group.sum(found["loss"].double())))
    task.close()
    return {"losses": losses, "sent": sent.bytes, "calls": sent.calls}


def synthetic(name: str, millions: float, group: Group) -> dict[str, Any]:
    """Run two steps of a synthetic model and return memory in MB and the collectives of the second."""
    settings = engine("zero3") if name == "zero3" else ["engine.kind=auto"]
    config = load_config(None, [*settings, "engine.bucket_mb=25", "train.device=cpu"])
    found: dict[str, float] = {}
    before = status("RssAnon")
    with measured(found):
        run = build(name, model_of(millions, 0), config, group)
    out = {"built": found["anonymous"]}
    for _ in range(2):
        with measured(found), Calls(group.size) as sent:
            run.module.train()
            run.start_step(1e-3)
            with run.piece(True):
                loss = run.call(lambda m, x: m(x).square().mean(), torch.ones(2, WIDTH)) / group.size
                run.backward(loss)
            run.update(True)
        out["peak"] = max(out.get("peak", 0.0), found["anonymous"] + out.get("between", 0.0))
        out["between"] = status("RssAnon") - before
    # The highest memory of the second step: what lies between steps and what that step adds.
    return out | {"second": found["anonymous"] + out["between"], "sent": sent.bytes, "calls": sent.calls}


def rank(what: str, name: str, shards: str, millions: float) -> None:
    """Measure one engine as one rank."""
    torch.set_num_threads(1)
    with init_distributed(300.0, "cpu") as group:
        row = comtip(shards, name, group) if what == "comtip" else synthetic(name, millions, group)
        if group.rank == 0:
            print("ROW " + json.dumps(row), flush=True)


def launch(world: int, *arguments: str) -> dict[str, Any]:
    """Run this script as several ranks and return the row of rank 0."""
    text = run_distributed([__file__, *arguments], world, timeout_s=1800, environment={"MALLOC_ARENA_MAX": "2"})[0]
    found: dict[str, Any] = json.loads(next(line[4:] for line in text.splitlines() if line.startswith("ROW ")))
    return found


def traffic(row: dict[str, Any]) -> dict[str, str]:
    """Return the collectives of a row as cells of the table, by their kind."""
    cells = {}
    for kind in row["calls"]:
        shown = f"{row['calls'][kind]} calls, {row['sent'].get(kind, 0) / 1e6:,.2f} MB"
        cells[KINDS.get(kind, kind)] = shown
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, default=200, help="parameters of the synthetic model (default 200)")
    parser.add_argument("--rank", nargs=3, metavar=("WHAT", "ENGINE", "SHARDS"), help="measure as one rank (internal)")
    args = parser.parse_args()
    if args.rank:
        rank(*args.rank, args.millions)
        return
    rows: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        shards = str(tiny_shards(Path(folder)))
        one = launch(1, "--rank", "comtip", "single", shards)
        for name in ENGINES:
            found = launch(2, "--rank", "comtip", name, shards)
            off = max(abs(a - b) / abs(b) for a, b in zip(found["losses"], one["losses"], strict=True))
            row = {f"CoMTIP: losses of {STEPS} steps against one process": f"{off:.1e}"}
            row |= {f"CoMTIP: {kind} per step": text for kind, text in sorted(traffic(found).items())}
            print(name, row, file=sys.stderr, flush=True)
            big = launch(2, "--rank", "synthetic", name, shards, "--millions", str(args.millions))
            row |= {f"synthetic: {kind} per step": text for kind, text in sorted(traffic(big).items())}
            row |= {f"synthetic: memory {k}, MB": f"{big[k]:,.0f}" for k in ("built", "between", "peak")}
            rows[name] = row
    rows["ddp"]["lines of code"] = str(lines(TorchEngine))
    rows["zero3"]["lines of code"] = str(lines(DeepSpeedEngine, Zero3Shards))
    rows["fsdp2"]["lines of code"] = str(lines(Fsdp2Engine))
    print("| | DDP | ZeRO 3 | FSDP2 |\n|---|---|---|---|")
    for key in dict.fromkeys(k for row in rows.values() for k in row):
        print(f"| {key} | " + " | ".join(rows[name].get(key, "") for name in ENGINES) + " |")


if __name__ == "__main__":
    main()
