"""PyTorch's FSDP2 (``fully_shard``) next to ZeRO 3 on CPU ranks: losses, bytes per step by collective, memory, lines of the adapter.

    PYTHONPATH=.:kernels:data_shards python bench/train/fsdp2.py

The CoMTIP model of ``bench/train/curves.py`` runs a few steps under one process, ZeRO 3 and FSDP2 with the trainer's own step, and a
made model of linear layers shows the memory. :class:`Fsdp2Engine` implements what the trainer needs of an engine for a run without
offloading, freezing and spikes; its lines are counted below.
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
from comtip_fast.training.engines import deepspeed, zero3_shards
from comtip_fast.training.engines.base import ParameterPart, PartSource, StepModule, Update, autocast_of
from comtip_fast.training.engines.factory import make_engine
from comtip_fast.training.grad_cache import forward_backward
from comtip_fast.training.optim import make_optimizer, set_rate
from comtip_fast.training.task import build_task
from testkit.distributed import run_distributed
from testkit.tiny import tiny_shards

STEPS = 6


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
    """Return the engine of a name."""
    return Fsdp2Engine(module, config, group) if name == "fsdp2" else make_engine(module, config, group)


def comtip(shards: str, name: str, group: Group) -> dict[str, Any]:
    """Run steps of CoMTIP and return losses and bytes sent in the last one."""
    settings = engine("zero3" if name == "zero3" else "single")
    more = [] if group.size > 1 else ["engine.kind=single"]
    config = load_config(None, [*TINY, f"data.shards={shards}", "vision.target=self", *settings, *more])
    task = build_task(config, torch.device("cpu"), group)
    run = build(name, task.module, config, group)
    losses, sent = [], Count(group.size)
    for step in range(1, STEPS + 1):
        batch = task.batch(task.batches(0)[step % len(task.batches(0))], step, 0)
        with sent if step == STEPS else nullcontext():
            run.module.train()
            run.start_step(1e-3)
            found, _ = forward_backward(run, task, batch, 1)
            losses.append(float(group.sum(found["loss"].double())))
            run.update(True)
    task.close()
    return {"losses": losses, "sent": sent.bytes}


def made(name: str, millions: float, group: Group) -> dict[str, Any]:
    """Run two steps of a made model and return memory in MB and bytes sent in the second."""
    config = load_config(None, [*engine(name if name == "zero3" else "single"), "train.device=cpu"])
    start: dict[str, float] = {}
    with measured(start):
        run = build(name, model_of(millions, 0), config, group)
    out: dict[str, float] = {"built": start["added"]}
    for step in (1, 2):
        with measured(out), Count(group.size) as sent:
            run.module.train()
            run.start_step(1e-3)
            with run.piece(True):
                loss = run.call(lambda m, x: m(x).square().mean(), torch.ones(2, WIDTH)) / group.size
                run.backward(loss)
            run.update(True)
        if step == 1:
            out["first"] = out["added"]
    return out | {"between": status("RssAnon"), "sent": sent.bytes}


def rank(what: str, name: str, shards: str, millions: float) -> None:
    """Measure one engine as one rank."""
    torch.set_num_threads(1)
    with init_distributed(300.0, "cpu") as group:
        row = comtip(shards, name, group) if what == "comtip" else made(name, millions, group)
        if group.rank == 0:
            print("ROW " + json.dumps(row), flush=True)


def launch(world: int, *arguments: str) -> dict[str, Any]:
    """Run this script as several ranks and return the row of rank 0."""
    text = run_distributed([__file__, *arguments], world, timeout_s=1800, environment={"MALLOC_ARENA_MAX": "2"})[0]
    found: dict[str, Any] = json.loads(next(line[4:] for line in text.splitlines() if line.startswith("ROW ")))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--millions", type=float, default=200, help="parameters of the made model in millions (default 200)"
    )
    parser.add_argument(
        "--rank", nargs=3, metavar=("WHAT", "ENGINE", "SHARDS"), help="measure as one rank (used internally)"
    )
    args = parser.parse_args()
    if args.rank:
        rank(*args.rank, args.millions)
        return
    with tempfile.TemporaryDirectory() as folder:
        shards = str(tiny_shards(Path(folder)))
        one = launch(1, "--rank", "comtip", "single", shards)
        rows = {}
        for name in ("zero3", "fsdp2"):
            found = launch(2, "--rank", "comtip", name, shards)
            off = max(abs(a - b) / abs(b) for a, b in zip(found["losses"], one["losses"], strict=True))
            big = launch(2, "--rank", "made", name, shards, "--millions", str(args.millions))
            rows[name] = {"loss": f"{off:.1e}"}
            rows[name] |= {f"CoMTIP, {k}, MB per step": f"{v / 1e6:.2f}" for k, v in sorted(found["sent"].items())}
            rows[name] |= {f"made model, {k}, MB per step": f"{v / 1e6:,.0f}" for k, v in sorted(big["sent"].items())}
            for key in ("built", "first", "added", "between", "seconds"):
                rows[name][f"made model, {key}"] = f"{big[key]:,.1f}"
    rows["zero3"]["lines of code"] = str(lines(deepspeed.DeepSpeedEngine, zero3_shards.Zero3Shards))
    rows["fsdp2"]["lines of code"] = str(lines(Fsdp2Engine))
    print("| | ZeRO 3 | FSDP2 |\n|---|---|---|")
    for key in dict.fromkeys(k for row in rows.values() for k in row):
        print(f"| {key} | {rows['zero3'].get(key, '0')} | {rows['fsdp2'].get(key, '0')} |")


if __name__ == "__main__":
    main()
