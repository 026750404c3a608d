"""Memory of a rank until its first step under ZeRO 3: the model built in pieces, and built whole as for other engines.

    PYTHONPATH=.:kernels:data_shards python bench/scale/zero3_build.py --worlds 2,4

CoMTIP with a small ViT of about 200 million parameters in fp32 on the tiny shard set. *Model* is the highest resident memory added
while the task and its model are built, *engine* that added until DeepSpeed is ready to train, both above the memory before the model
was built; *ready* is what remains. Weights, master weights and moments of a rank are 16 bytes per parameter and rank.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import tempfile
from pathlib import Path

import torch

from bench.scale.sharded_checkpoint import MB, measured, status
from comtip_fast.config.io import load_config
from comtip_fast.training import task as tasks
from comtip_fast.training.distributed.process_group import init_distributed
from comtip_fast.training.engines.factory import make_engine
from comtip_fast.training.engines.zero3_shards import Zero3Shards
from testkit.distributed import run_distributed
from testkit.tiny import tiny_shards

SETTINGS = [
    "engine.kind=deepspeed",
    "engine.zero_stage=3",
    "train.device=cpu",
    "vision.patch_px=16",
    "vision.heads=16",
    "text.width=32",
    "text.depth=1",
    "text.heads=2",
    "genes.per_cohort=30",
    "levels.min_positive=10",
]
WIDTH = 1024


def rank(how: str, shards: str, millions: float) -> None:
    """Measure as one rank and print the row."""
    import deepspeed  # noqa: F401 - its import is not part of the measurement

    torch.set_num_threads(1)
    depth = max(1, round(millions * 1e6 / (12 * WIDTH**2)))
    config = load_config(None, [*SETTINGS, f"data.shards={shards}", f"vision.width={WIDTH}", f"vision.depth={depth}"])
    if how == "whole":
        tasks.is_paged = lambda *_: False
    row: dict[str, float] = {}
    with init_distributed(600.0, "cpu") as group:
        gc.collect()
        before = status("VmRSS")
        found: dict[str, float] = {}
        with measured(found):
            task = tasks.build_task(config, torch.device("cpu"), group)
        row["parameters"] = sum(p.numel() for p in task.module.parameters()) * 4 / MB
        row["model"], built = found["added"], status("VmRSS") - before
        with measured(found):
            engine = make_engine(task.module, config, group)
        row["engine"], row["ready"] = found["added"] + built, status("VmRSS") - before
        assert isinstance(engine.shards, Zero3Shards)
        digest = hashlib.sha256()
        for part in engine.shards.parts():
            digest.update(part.tensors["weight"].numpy().tobytes())
        task.close()
    print("ROW " + json.dumps(row | {"digest": digest.hexdigest()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, default=200, help="parameters in millions (default 200)")
    parser.add_argument("--worlds", default="2,4", help="numbers of ranks, comma-separated")
    parser.add_argument("--rank", nargs=2, metavar=("HOW", "SHARDS"), help="measure as one rank (used internally)")
    args = parser.parse_args()
    if args.rank:
        rank(*args.rank, args.millions)
        return
    print("| built | ranks | rank | all weights MB | model MB | engine MB | ready MB |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        shards = str(tiny_shards(Path(folder)))
        for world in map(int, args.worlds.split(",")):
            digests = []
            for how in ("whole", "in pieces"):
                arguments = [__file__, "--rank", how, shards, "--millions", str(args.millions)]
                outputs = run_distributed(arguments, world, timeout_s=1800, environment={"MALLOC_ARENA_MAX": "2"})
                rows = [json.loads(next(x[4:] for x in t.splitlines() if x.startswith("ROW "))) for t in outputs]
                digests.append([row["digest"] for row in rows])
                for i, row in enumerate(rows):
                    numbers = [f"{row[k]:,.0f}" for k in ("parameters", "model", "engine", "ready")]
                    print("| " + " | ".join(map(str, [how, world, i, *numbers])) + " |", flush=True)
            assert digests[0] == digests[1], "the initial weights differ"


if __name__ == "__main__":
    main()
