"""Script of one rank: complete training runs with fewer spots per batch than ranks. Rank 0 prints the logged rows.

``few_spots_worker.py SHARDS FOLDER ENGINE``, with ``ddp`` or ``zero``.
"""

import json
import logging
import sys
from pathlib import Path

import torch

COMMON = [
    "data.views=1",
    "data.sections_per_batch=null",
    "genes.per_cohort=30",
    "genes.held_out_from=10",
    "genes.held_out_every=4",
    "panel.max_genes=24",
    "levels.n_levels=5",
    "levels.min_positive=10",
    "vision.patch_px=16",
    "vision.width=32",
    "vision.depth=1",
    "vision.heads=2",
    "text.width=32",
    "text.depth=1",
    "text.heads=2",
    "text.max_tokens=6",
    "align.dim=32",
    "optim.warmup_steps=2",
    "train.steps=3",
    "train.validate_every=3",
    "train.checkpoint_every=10",
    "train.log_every=1",
    "train.patience=0",
    "train.threads=1",
    "train.device=cpu",
]
DEEPSPEED = ["engine.kind=deepspeed", "engine.persist_elements=100", "engine.bucket_mb=0.05"]
# 98 training spots: the third batch of 48 has two, and every batch of 2 is smaller than three ranks.
DDP = {
    **{
        f"{form}-{pieces}": [f"engine.loss_form={form}", f"engine.micro_batches={pieces}", "data.batch_size=48"]
        for form in ("gather", "ring")
        for pieces in (1, 4)
    },
    "pairs-of-spots": ["data.batch_size=2", "loss.paat.mode=spots", "loss.paat.hard_columns=true"],
}
ZERO = {
    "zero2": [*DEEPSPEED, "engine.zero_stage=2", "data.batch_size=48"],
    "zero3": [*DEEPSPEED, "engine.zero_stage=3", "data.batch_size=48", "engine.micro_batches=4"],
}
RUNS = {"ddp": DDP, "zero": ZERO}


def main() -> None:
    """Execute the runs."""
    from comtip_fast.config.io import load_config
    from comtip_fast.training.distributed.process_group import init_distributed
    from comtip_fast.training.task import build_task
    from comtip_fast.training.trainer import Trainer

    torch.set_num_threads(1)
    logging.getLogger("comtip_fast").setLevel(logging.ERROR)
    shards, folder = sys.argv[1], Path(sys.argv[2])
    with init_distributed(60, "cpu") as group:
        for name, settings in RUNS[sys.argv[3]].items():
            config = load_config(None, [*COMMON, f"data.shards={shards}", *settings])
            Trainer(build_task(config, torch.device("cpu"), group), config, folder / name, group).fit()
            if group.rank == 0:
                rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
                print(json.dumps({"run": name, "rows": rows}), flush=True)


if __name__ == "__main__":
    main()
