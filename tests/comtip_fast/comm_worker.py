"""Executed by every rank: one step of every engine with a slow backward pass on rank 1; prints the seconds spent waiting.

``comm_worker.py OVERRIDE,OVERRIDE,...``
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SLOW_S = 1.5  # far above what a busy machine adds to either rank


@contextmanager
def counted_reads() -> Iterator[list[int]]:
    """Collect the number of spots of each read of counts."""
    from comtip_fast.data.records import SpotReader

    reads: list[int] = []
    real = SpotReader.counts
    SpotReader.counts = lambda self, spots: reads.append(len(spots)) or real(self, spots)
    try:
        yield reads
    finally:
        SpotReader.counts = real


def seconds_of(overrides: list[str], ranks: object, kind: list[str]) -> tuple[str, float]:
    """Return the name of the engine and how long its second step waited for the other rank."""
    from comtip_fast.config.io import load_config
    from comtip_fast.training.distributed.comm_timer import ClockedGroup
    from comtip_fast.training.engines.factory import make_engine
    from comtip_fast.training.grad_cache import forward_backward
    from comtip_fast.training.task import build_task

    device = torch.device("cpu")
    config = load_config(None, [*overrides, *kind])
    group = ClockedGroup(ranks, device)
    with counted_reads() as reads:
        task = build_task(config, device, group)
    # Statistics of the training split are computed by one rank: not every rank reads the whole set before step 1.
    assert (sum(reads) > 0) == (group.rank == 0), f"rank {group.rank} read {sum(reads)} spots"
    engine = make_engine(task.module, config, group)
    order: list[str] = []
    slow = ""

    def gradient_of(name: str) -> None:
        order.append(name)
        if name == slow:
            time.sleep(SLOW_S)

    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient, name=name: gradient_of(name))
    waited = 0.0
    for step in (1, 2):
        # The collectives of the losses are finished when the last gradient is computed.
        slow = order[-1] if step == 2 and group.rank == 1 else ""
        batch = task.batch(task.batches(0)[0], step, 0)
        engine.module.train()
        engine.start_step(1e-4)
        group.sum(torch.zeros(1))  # both ranks start together
        group.clock.seconds()
        forward_backward(engine, task, batch, 1)
        waited = group.clock.seconds()
        engine.update(True)
    return engine.name, waited


def main() -> None:
    """Run all engines."""
    from comtip_fast.training.distributed.process_group import init_distributed

    torch.set_num_threads(1)
    overrides = sys.argv[1].split(",")
    kinds = [["engine.kind=ddp"]]
    kinds += [["engine.kind=deepspeed", f"engine.zero_stage={stage}", "engine.bucket_mb=0.05"] for stage in range(4)]
    with init_distributed(60.0, "cpu") as ranks:
        found = dict(seconds_of(overrides, ranks, kind) for kind in kinds)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
