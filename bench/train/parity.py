"""Losses and gradients of one step over W ranks, compared with one process, for every engine and loss form.

    python bench/train/parity.py                 all cases, W = 1, 2, 4, as a Markdown table
    python bench/train/parity.py --quick         the subset that `make test` runs

Each world size is launched once and runs all of its cases. A case is one global batch of a tiny model, split unevenly over
the ranks, with mispaired columns and spots that share a text; the reference is one process with the whole batch. Deviation
is the largest relative L2 error over parameters, ||g - g_ref|| / ||g_ref||.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from comtip_fast.collectives import Group, SingleProcessGroup
from comtip_fast.config.io import load_config
from comtip_fast.training.distributed.process_group import broadcast, distributed_env, init_distributed
from comtip_fast.training.engines.base import Engine
from comtip_fast.training.engines.factory import make_engine
from comtip_fast.training.grad_cache import forward_backward
from comtip_fast.training.task import CoMTIPTask, build_task
from testkit.distributed import run_distributed
from testkit.tiny import tiny_shards

TINY = [
    "data.batch_size=22",
    "data.views=1",
    "genes.per_cohort=30",
    "genes.held_out_from=10",
    "genes.held_out_every=4",
    "panel.min_genes=7",
    "panel.max_genes=24",
    "levels.n_levels=5",
    "levels.min_positive=10",
    "vision.patch_px=16",
    "vision.width=32",
    "vision.depth=2",
    "vision.heads=2",
    "text.width=32",
    "text.depth=2",
    "text.heads=2",
    "text.max_tokens=6",
    "align.dim=32",
    "train.log_every=1",
    "optim.clip=0",
    "train.threads=1",
]
LIMIT = {"fp64": 1e-12, "fp32": 1e-5}


@dataclass(frozen=True)
class Case:
    """One configuration of the step."""

    engine: str = "ddp"
    dtype: str = "fp32"
    form: str = "gather"
    shard_table: bool = True
    micro_batches: int = 1
    recompute: bool = False
    more: tuple[str, ...] = ()

    def overrides(self) -> list[str]:
        """Return the config overrides of this case."""
        kind = "deepspeed" if self.engine.startswith("zero") else "auto"
        return [
            f"engine.kind={kind}",
            f"engine.zero_stage={self.engine[-1] if kind == 'deepspeed' else 1}",
            f"engine.loss_form={self.form}",
            f"engine.shard_table={str(self.shard_table).lower()}",
            f"engine.micro_batches={self.micro_batches}",
            f"engine.activation_checkpointing={str(self.recompute).lower()}",
            "engine.persist_elements=100",
            "engine.bucket_mb=0.05",
            *self.more,
        ]


def cases(quick: bool, world: int = 2) -> list[Case]:
    """Return all cases, or with ``quick`` fewer, which have both loss forms and every switch; two cases for more than two ranks."""
    if quick and world > 2:
        return [Case("ddp", "fp64"), Case("ddp", "fp64", "ring", True, 2, more=("data.batch_size=5",))]
    if quick:
        return [
            Case("ddp", "fp64"),
            Case("ddp", "fp64", "ring", False, 3, True),
            Case("ddp", "fp32", "ring"),
            Case("ddp", "fp64", more=("panel.max_genes=1", "panel.min_genes=1")),
            Case("ddp", "fp64", more=("loss.paat.context=text", "align.negatives=all", "vision.target=ema")),
            Case("zero1", "fp32", "ring", True, 2),
            Case("zero2", "fp32"),
            Case("zero3", "fp32"),
            Case("zero3", "fp32", "gather", True, 3),
            Case("zero3", "fp32", "gather", True, 1, True),
        ]
    switches = list(itertools.product(("gather", "ring"), (True, False), (1, 3), (False, True)))
    return [
        *(Case("ddp", dtype, *s) for dtype in ("fp64", "fp32") for s in switches),
        *(Case(f"zero{stage}", "fp32", *s) for stage in range(4) for s in switches),
        *(
            Case("ddp", "fp64", more=more)
            for more in (
                ("panel.max_genes=1", "panel.min_genes=1"),
                ("loss.paat.context=text",),
                ("align.negatives=all",),
                ("align.negatives=other_group",),
                ("vision.target=ema",),
                ("loss.paat.mode=spots",),
                ("loss.paat.hard_columns=false",),
                ("loss.mfm=0",),
                ("loss.nce=0",),
                ("data.batch_size=5",),
            )
        ),
    ]


def make_task(shards: str, case: Case, group: Group) -> CoMTIPTask:
    """Return the task of a case, with perturbed weights."""
    task = build_task(
        load_config(None, [*TINY, f"data.shards={shards}", *case.overrides()]), torch.device("cpu"), group
    )
    # At initialisation all image vectors are nearly equal and gradients are small differences of large numbers: in fp32 one
    # process alone deviates by 5e-6 from its own fp64 result. With perturbed weights it is 2e-6.
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in task.model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=noise))
    if case.dtype == "fp64":
        task.model.double()
        task.step.log_prior = task.step.log_prior.double()
    return task


def one_step(task: CoMTIPTask, group: Group, engine: Engine) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the global losses and the gradient of every parameter at step 1."""
    engine.module.train()
    engine.start_step(1e-3)
    batch = task.batch(task.batches(0)[0], 1, 0)
    shares, _ = forward_backward(engine, task, batch, task.config.engine.micro_batches)
    losses = {k: float(group.sum(v.double())) for k, v in shares.items()}
    return losses, dict(gradients(engine).items())


def gradients(engine: Engine) -> dict[str, Tensor]:
    """Return the whole gradient of every trained parameter, by name."""
    named = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
    if engine.name in ("zero1", "zero2", "zero3"):
        from deepspeed.utils import safe_get_full_grad

        return {n: safe_get_full_grad(p).detach().clone() for n, p in named}
    found = {n: p.grad.detach() for n, p in named if p.grad is not None}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g.clone() for n, g in found.items()}


def deviation(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest relative L2 error over tensors, absolute where the reference is 0, and the name of this tensor.

    The error is infinite if the names differ.
    """
    worst, where = 0.0, ""
    if found.keys() != wanted.keys():
        return float("inf"), str(found.keys() ^ wanted.keys())
    for name, reference in wanted.items():
        size = float(reference.norm())
        off = float((found[name].to(reference.dtype).view_as(reference) - reference).norm()) / (size or 1.0)
        if off > worst or off != off:
            worst, where = off, name
    return worst, where


def rank(shards: str, out: str, listed: list[Case]) -> None:
    """Run all cases as one rank; rank 0 writes the rows."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    rows = []
    references: dict[tuple[object, ...], tuple[dict[str, float], dict[str, Tensor]]] = {}
    with init_distributed(120, "cpu") as group:
        for case in listed:
            key = (case.dtype, case.more)
            if group.rank == 0 and key not in references:
                single = make_task(shards, Case("single", case.dtype, more=case.more), SingleProcessGroup())
                references[key] = one_step(
                    single, SingleProcessGroup(), make_engine(single.module, single.config, SingleProcessGroup())
                )
            task = make_task(shards, case, group)
            engine = make_engine(task.module, task.config, group)
            losses, found = one_step(task, group, engine)
            broadcast(None, group)
            if group.rank == 0:
                wanted_losses, wanted = references[key]
                off = max(abs(losses[k] - v) / max(1e-30, abs(v)) for k, v in wanted_losses.items())
                worst, where = deviation(found, wanted)
                rows.append(
                    asdict(case)
                    | {
                        "W": group.size,
                        "name": engine.name,
                        "loss": off,
                        "gradient": worst,
                        "where": where,
                        "ok": max(off, worst) <= LIMIT[case.dtype],
                    }
                )
    if rows:
        Path(out).write_text(json.dumps(rows))


def run(shards: str, worlds: list[int], quick: bool, engine: str = "") -> list[dict[str, object]]:
    """Launch each world size once and return the rows."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for world in worlds:
            out = Path(folder) / f"{world}.json"
            arguments = [__file__, "--rank", shards, str(out), "--engine", engine, *(["--quick"] if quick else [])]
            run_distributed(arguments, world, timeout_s=1800, fork=True)
            rows += json.loads(out.read_text())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="run the subset of `make test`")
    parser.add_argument("--worlds", default="1,2,4", help="numbers of ranks, comma-separated (default 1,2,4)")
    parser.add_argument("--engine", default="", help="run only this engine: ddp, zero0, zero1, zero2 or zero3")
    parser.add_argument("--rank", nargs=2, metavar=("SHARDS", "OUT"), help="run as one rank (used internally)")
    args = parser.parse_args()
    if args.rank:
        found = cases(args.quick, distributed_env().size)
        rank(*args.rank, [c for c in found if args.engine in c.engine])
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = run(str(tiny_shards(Path(folder))), [int(w) for w in args.worlds.split(",")], args.quick, args.engine)
    print(
        "| W | engine | dtype | form | table sharded | micro-batches | recompute | settings | loss | worst gradient |"
    )
    print("| - | - | - | - | - | - | - | - | - | - |")
    for r in rows:
        cells = (
            r["W"],
            r["name"],
            r["dtype"],
            r["form"],
            r["shard_table"],
            r["micro_batches"],
            r["recompute"],
            " ".join(r["more"]),
        )
        print(
            "|",
            " | ".join(map(str, cells)),
            f"| {r['loss']:.1e} | {r['gradient']:.1e}{'' if r['ok'] else ' ABOVE LIMIT'} |",
        )
    bad = sum(not r["ok"] for r in rows)
    print(f"\n{len(rows)} cases, {bad} above the limit")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
