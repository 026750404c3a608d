"""Memory and seconds of a rank while a checkpoint is saved and loaded under ZeRO 3, in parts and whole, on CPU ranks.

    PYTHONPATH=.:kernels:data_shards python bench/scale/sharded_checkpoint.py --millions 200

A synthetic model of linear layers in fp32 is trained for one step on two ranks and saved, then loaded on 1, 2 and 3 ranks. The shard of a
rank is its part of weights and moments, 12 bytes per parameter and rank. *Added* is the highest resident memory during the operation
minus that before it, from ``VmHWM``, which includes the pages of files that are read; *anonymous* leaves these out, and is sampled.
``resume`` begins with the imports alone: it builds the model and the engine and restores them, as the trainer does, from whole files
(``resume:ENGINE``) or from parts (``resume-parts``). *Shard* is then what stays in the end: weights, moments and buffers of the engine.
*Before* is the resident memory at the start of the operation. With two ranks and 200 million parameters, the machine needs 9 GB of
memory and 5 GB of disk.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.scale.memory import MB, measured, status
from comtip_fast.collectives import Group
from comtip_fast.config.io import load_config
from comtip_fast.config.schema import RunConfig
from comtip_fast.training.checkpoint import store as checkpoints
from comtip_fast.training.checkpoint.async_writer import Writer, copied
from comtip_fast.training.checkpoint.content import Checkpoint
from comtip_fast.training.checkpoint.parts.reader import ShardReader
from comtip_fast.training.checkpoint.reading import shared_reader
from comtip_fast.training.checkpoint.schema import load_weights
from comtip_fast.training.checkpoint.shard_saver import ShardSaver
from comtip_fast.training.checkpoint.shard_verify import damage_of_parts
from comtip_fast.training.distributed.process_group import init_distributed
from comtip_fast.training.engines.base import Engine
from comtip_fast.training.engines.factory import make_engine
from testkit.distributed import run_distributed

WIDTH, STATE = 4096, {"step": 1}
ENGINES = {
    "ddp": ("engine.kind=ddp",),
    **{f"zero{stage}": ("engine.kind=deepspeed", f"engine.zero_stage={stage}") for stage in (1, 2, 3)},
}


def model_of(millions: float, seed: int) -> nn.Module:
    """Return linear layers of about this number of parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(max(1, round(millions * 1e6 / WIDTH**2)))))


def trained(module: nn.Module, config: RunConfig, group: Group) -> Engine:
    """Return an engine after one step, so that the memory of training is in use."""
    engine = make_engine(module, config, group)
    engine.module.train()
    engine.start_step(1e-3)
    with engine.piece(last=True):
        loss = engine.call(lambda m, x: m(x).square().mean(), torch.ones(2, WIDTH)) / group.size
        engine.backward(loss)
    engine.update(True)
    return engine


def digest(engine: Engine) -> str:
    """Return a hash of this rank's part of weights and moments."""
    assert engine.shards is not None
    out = hashlib.sha256()
    for part in engine.shards.parts():
        for tensor in part.tensors.values():
            out.update(tensor.numpy().tobytes())
    return out.hexdigest()


def save(engine: Engine, group: Group, folder: Path, row: dict[str, float]) -> None:
    """Save in parts, in the background; ``blocked`` are the seconds until training could continue."""
    saver = ShardSaver(folder, group, Writer(), background=True, pause=no_pause)
    began = time.perf_counter()
    with measured(row):
        saver.start(1, engine, STATE, lambda: None)
        row["blocked"] = time.perf_counter() - began
        saver.complete()
        saver.writer.drain()


def save_whole(engine: Engine, module: nn.Module, group: Group, folder: Path, row: dict[str, float]) -> None:
    """Save whole tensors, in the background, as ``train.checkpoint=whole`` does."""
    writer = Writer()
    began = time.perf_counter()
    with measured(row):
        optim: dict[str, Tensor] = engine.optimizer_state()
        with engine.gathered_for_read():
            if group.rank == 0:
                snapshot = copied(Checkpoint(module.state_dict(), optim, STATE))
                writer.submit(lambda: checkpoints.save(folder, 2, snapshot) and None)
        row["blocked"] = time.perf_counter() - began
        writer.drain()


def resume(folder: Path, millions: float, config: RunConfig, group: Group, row: dict[str, float], parts: bool) -> None:
    """Resume from whole files or from parts as the trainer does; ``shard`` is what stays afterwards."""
    torch.ones(WIDTH).sum()
    with measured(row):
        module = model_of(millions, seed=1)
        if parts:
            assert damage_of_parts(folder, group, no_pause) == {1: ""}
            with ShardReader(checkpoints.folder_of(folder, 1)) as reader:
                reader.check_fits(module)
                reader.load_untrained(module)
                engine = make_engine(module, config, group)
                assert engine.shards is not None
                engine.shards.restore_weights(reader)
                engine.restore(reader)
        else:
            where = checkpoints.folder_of(folder, 2)
            if group.rank == 0:
                checkpoints.verify(where)
            with shared_reader(checkpoints.open_reader, where, group) as shared:
                load_weights(module, shared)
                engine = make_engine(module, config, group)
                engine.restore(shared)
        gc.collect()
        row["shard"] = status("VmRSS") - row["before"]


@contextmanager
def no_pause() -> Iterator[None]:
    """Do nothing while other ranks are waited for."""
    yield


def rank(what: str, folder: Path, millions: float) -> None:
    """Measure as one rank and print its row: ``save``, ``whole``, ``load``, ``resume-parts``, or ``resume:`` and an engine.

    After ``save``, the digest of the rank's part is written to ``folder``.
    """
    torch.set_num_threads(1)
    what, _, kind = what.partition(":")
    engine_keys = ENGINES[kind or "zero3"]
    config = load_config(None, [*engine_keys, "optim.clip=1.0", "train.device=cpu"])
    row: dict[str, float] = {}
    with init_distributed(600.0, "cpu") as group:
        if what.startswith("resume"):
            if "zero" in (kind or "zero3"):
                import deepspeed  # noqa: F401 (belongs to the imports)
            resume(folder, millions, config, group, row, parts=what == "resume-parts")
            print("ROW " + json.dumps(row), flush=True)
            return
        module = model_of(millions, seed=what == "load")
        row["shard"] = sum(p.numel() for p in module.parameters()) * 12 / group.size / MB
        engine = trained(module, config, group)
        if what == "save":
            save(engine, group, folder, row)
            (folder / f"digest{group.rank}").write_text(digest(engine), encoding="ascii")
        elif what == "whole":
            save_whole(engine, module, group, folder, row)
        else:
            with measured(row):
                assert damage_of_parts(folder, group, no_pause) == {1: ""}
                with ShardReader(checkpoints.folder_of(folder, 1)) as reader:
                    assert engine.shards is not None
                    engine.shards.restore_weights(reader)
                    engine.restore(reader)
            if group.size == 2:
                row["equal"] = digest(engine) == (folder / f"digest{group.rank}").read_text(encoding="ascii")
    print("ROW " + json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, default=200, help="parameters in millions (default 200)")
    parser.add_argument(
        "--files",
        choices=("parts", "whole", "both"),
        default="both",
        help="kind of checkpoints to measure (default both)",
    )
    parser.add_argument("--work", type=Path, help="folder for the checkpoints (default: a temporary one)")
    parser.add_argument("--rank", nargs=2, metavar=("WHAT", "FOLDER"), help="measure as one rank (used internally)")
    args = parser.parse_args()
    if args.rank:
        rank(args.rank[0], Path(args.rank[1]), args.millions)
        return
    print(
        "| operation | ranks | rank | before MB | shard MB | added MB | anonymous MB | added / shard | s | blocked s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        parts = [("save", 2), *((what, ranks) for what in ("load", "resume-parts") for ranks in (1, 2, 3))]
        whole = [("whole", 2), *((f"resume:{kind}", 2) for kind in ENGINES)]
        for what, world in {"parts": parts, "whole": whole, "both": parts + whole}[args.files]:
            arguments = [__file__, "--rank", what, folder, "--millions", str(args.millions)]
            outputs = run_distributed(arguments, world, timeout_s=1800, environment={"MALLOC_ARENA_MAX": "2"})
            for i, text in enumerate(outputs):
                row = json.loads(next(line[4:] for line in text.splitlines() if line.startswith("ROW ")))
                if not row.get("equal", True):
                    sys.exit(f"rank {i}: the loaded part differs from the saved one")
                numbers = [f"{row[k]:,.0f}" for k in ("before", "shard", "added", "anonymous")]
                ratio, blocked = (
                    f"{row['added'] / row['shard']:.2f}",
                    f"{row['blocked']:.2f}" if "blocked" in row else "",
                )
                cells = [what, world, i, *numbers, ratio, f"{row['seconds']:.1f}", blocked]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
