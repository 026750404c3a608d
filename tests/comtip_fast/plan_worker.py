"""Worker of one rank: runs steps of several engines and prints live bytes and bytes sent, one JSON line per case.

``plan_worker.py SHARDS NAME=OVERRIDE;OVERRIDE ...``. Collectives are counted by wrapping torch.distributed; DDP's own are
counted through a communication hook.
"""

import gc
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SENT: Counter[str] = Counter()
COUNTING = [False]


def count(kind: str, size: int) -> None:
    """Add the bytes that a rank sends for a tensor of ``size`` bytes with the bandwidth-optimal algorithm."""
    if COUNTING[0]:
        W = dist.get_world_size()
        SENT[kind] += (2 if kind == "all_reduce" else 1) * size * (W - 1) / W


def patch() -> None:
    """Wrap torch.distributed to count collectives; call it before DeepSpeed is imported, which stores the functions."""

    def wrap(name: str, kind: str, which: int) -> None:
        real = getattr(dist, name, None)
        if real is None:
            return

        def counted(*args: Any, **more: Any) -> Any:
            tensors = [a for a in (*args, *more.values()) if isinstance(a, torch.Tensor)]
            count(kind, tensors[which].nbytes)
            # PyTorch's newer functions may call the older ones.
            before, COUNTING[0] = COUNTING[0], False
            try:
                return real(*args, **more)
            finally:
                COUNTING[0] = before

        setattr(dist, name, counted)

    wrap("all_reduce", "all_reduce", 0)
    for name in ("all_gather_into_tensor", "all_gather_single"):
        wrap(name, "all_gather", 0)
    for name in ("reduce_scatter_tensor", "reduce_scatter_single"):
        wrap(name, "reduce_scatter", 1)
    real = dist.batch_isend_irecv

    def sent(ops: list[Any]) -> Any:
        if COUNTING[0]:
            SENT["ring"] += sum(op.tensor.nbytes for op in ops if op.op is dist.isend)
        return real(ops)

    dist.batch_isend_irecv = sent


def live() -> int:
    """Return the bytes of all tensors that Python can reach, gradients included, each storage once."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.device.type == "cpu"]
    # A gradient has no Python object until it is accessed.
    tensors += [t.grad for t in tensors if isinstance(t, torch.nn.Parameter) and t.grad is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def one_case(shards: str, name: str, overrides: list[str], group: Any) -> dict[str, Any]:
    """Run three steps and measure the third."""
    from comtip_fast.config.io import load_config
    from comtip_fast.training.engines.factory import make_engine
    from comtip_fast.training.engines.torch import TorchEngine
    from comtip_fast.training.grad_cache import forward_backward
    from comtip_fast.training.task import build_task
    from comtip_fast.training.update.ema import WeightAverage
    from tests.comtip_fast.plan_measure import SavedTensors

    config = load_config(None, [*overrides, f"data.shards={shards}"])
    task = build_task(config, torch.device("cpu"), group)
    batches = [task.batch(task.batches(0)[0], step, 0) for step in (1, 2, 3)]
    model = [*task.model.parameters(), *task.model.buffers()]
    before = live() - sum(t.nbytes for t in model)
    engine = make_engine(task.module, config, group)
    if isinstance(engine, TorchEngine) and group.size > 1:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        # DDP calls its collectives from C++; a hook calls them from Python, where they are counted.
        engine._step.register_comm_hook(None, allreduce_hook)
    average = WeightAverage(config.optim.ema)
    average.attach(engine.own_weights())
    SENT.clear()
    out: dict[str, Any] = {
        "name": name,
        "trained": int(task.sizes.n_identities),
        "genes": int(batches[2].panel.numel()),
        "spots": int(batches[2].section.numel()),
    }
    out["length"] = [int(n) for n in task.genes.length_G[batches[2].panel.long()]]
    for step, batch in enumerate(batches, start=1):
        engine.module.train()
        engine.start_step(1e-4)
        COUNTING[0] = step == 3
        exclude = [*engine.module.parameters(), *engine.module.buffers(), batch.levels, batch.measured, batch.panel]
        with SavedTensors(exclude) as saved:
            forward_backward(engine, task, batch, config.engine.micro_batches)
        if step == 3:
            out["saved"] = saved.bytes
        saved.clear()
        del exclude
        if step == 3:
            out["after_backward"] = live() - before
        engine.update(True)
        average.update(step)
    COUNTING[0] = False
    out["after_step"] = live() - before
    out["sent"] = dict(SENT)
    return out


def main() -> None:
    """Run the cases of the command line."""
    patch()
    from comtip_fast.training.distributed.process_group import distributed_env, init_distributed

    shards, *cases = sys.argv[1:]
    with init_distributed(120.0, "cpu", distributed_env()) as group:
        if any("deepspeed" in case for case in cases):
            import deepspeed  # noqa: F401
        # Objects that exist before the steps are excluded from every count, which makes counting fast.
        gc.collect()
        gc.freeze()
        for case in cases:
            name, _, overrides = case.partition("=")
            print("CASE " + json.dumps(one_case(shards, name, overrides.split(";"), group)), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
