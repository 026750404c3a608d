"""Measure what ``comtip plan`` predicts: tensors kept for the backward pass, and the FLOPs of a real step."""

from dataclasses import dataclass, replace

import torch
from comtip_kernels.packed_attention.cpu import _runs, _shared
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, sdpa_backward_flop_count, sdpa_flop_count

from comtip_fast.collectives import SingleProcessGroup
from comtip_fast.config.io import load_config
from comtip_fast.data.batch import Batch
from comtip_fast.plan.cost import AUTOCAST, FP32
from comtip_fast.plan.hardware import make_cluster
from comtip_fast.plan.parts import StepPart, Work, step_parts
from comtip_fast.plan.plan import Plan, make_plan
from comtip_fast.plan.sizes import Inputs, Sizes, sizes_of
from comtip_fast.training.engines.factory import make_engine
from comtip_fast.training.grad_cache import forward_backward
from comtip_fast.training.task import build_task

CPU = torch.device("cpu")
aten = torch.ops.aten
# Operators without a formula in torch: fused attention on a CPU, and in-place matrix products.
MORE_FORMULAS = {
    aten.addmm_: lambda out, a, b, *rest, **kw: addmm_flop(out, a, b),
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *a, **kw: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *a, **kw: sdpa_backward_flop_count(
        g, q, k, v
    ),
}


class Kept:
    """Context manager that records every tensor autograd saves, each storage once."""

    def __init__(self, besides: list[torch.Tensor]) -> None:
        self._known = {t.untyped_storage().data_ptr() for t in besides}
        self._found: dict[int, torch.Tensor] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def __enter__(self) -> "Kept":
        self._hooks.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._hooks.__exit__(*raised)

    def _pack(self, t: torch.Tensor) -> torch.Tensor:
        self._found.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    def forget(self) -> None:
        """Release the tensors; a graph without a backward pass would keep them alive through its hooks."""
        self._found.clear()

    @property
    def bytes(self) -> int:
        found = {k: t for k, t in self._found.items() if k not in self._known}
        return sum(t.untyped_storage().nbytes() for t in found.values())


@dataclass
class Measured:
    """A measured step and the plan of the same step."""

    forward_flops: int
    all_flops: int
    kept_bytes: int
    sizes: Sizes
    work: Work
    parts: list[StepPart]

    def predicted(self, field: str) -> float:
        return sum(p.sum(field) for p in self.parts)

    @property
    def predicted_kept(self) -> float:
        return sum(p.kept for p in self.parts)


def measure(overrides: list[str], *, bf16: bool = False) -> Measured:
    """Run one step of a task on the CPU."""
    config = load_config(None, [*overrides, "train.log_every=1000", "panel.min_genes=24"])
    task = build_task(config, CPU)
    task.module.train()
    batch = task.batch(task.batches(0)[0], 1, 0)
    besides = [*task.model.parameters(), *task.model.buffers(), batch.levels, batch.measured, batch.panel]
    with (
        Kept(besides) as kept,
        FlopCounterMode(display=False, custom_mapping=MORE_FORMULAS) as counter,
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        losses, _ = task.losses(task.module, batch)
    forward, kept_bytes = counter.get_total_flops(), kept.bytes
    with counter:
        losses["loss"].backward()
    G, b = batch.panel.numel(), batch.section.numel()
    length = task.genes.length_G[batch.panel.long()].double()
    known = Inputs(tile_px=task.sizes.tile_px, trained_genes=task.sizes.n_identities, panel=G)
    # Use the sentences of this panel instead of the mean over all genes, to test the formulas alone. On a CPU short sentences
    # share a matrix, and a token attends to all of its tokens.
    sizes = sizes_of(config, known, task.model)
    batches = list(_shared(_runs(length.sort().values.long().repeat_interleave(sizes.Q))))
    met = sum(n * (several * tokens) ** 2 for n, several, tokens in batches)
    sizes = replace(sizes, tokens=float(length.mean()), reach=met / (float(length.sum()) * sizes.Q))
    work = Work(
        spots=b,
        images=b,
        columns=2 * b if sizes.mispairs and sizes.hard_columns else b,
        table_rows=G * sizes.Q,
        precision=AUTOCAST if bf16 else FP32,
        gpu=False,
        checkpointing=config.engine.activation_checkpointing,
    )
    return Measured(forward, forward + counter.get_total_flops(), kept_bytes, sizes, work, step_parts(sizes, work))


def measure_peak(overrides: list[str]) -> tuple[float, Plan]:
    """Return the peak bytes of tensors and allocator during one step of one process, and the plan of the step."""
    config = load_config(None, [*overrides, "train.log_every=1000", "panel.min_genes=24"])
    task = build_task(config, CPU)
    first, second = (task.batch(task.batches(0)[0], step, 0) for step in (1, 2))
    engine = make_engine(task.module, config, SingleProcessGroup())

    def step(batch: Batch) -> None:
        engine.module.train()
        engine.start_step(1e-4)
        forward_backward(engine, task, batch, config.engine.micro_batches)
        engine.update(True)

    step(first)
    model = [*task.model.parameters(), *task.model.buffers()]
    state = [v for entries in engine.optimizer.state.values() for v in entries.values()]
    gradients = [p.grad for p in task.model.parameters() if p.grad is not None]
    held = sum(t.nbytes for t in (*model, *state, *gradients, second.tiles, second.levels, second.measured))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(second)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    length = task.genes.length_G[second.panel.long()].double()
    known = Inputs(tile_px=task.sizes.tile_px, trained_genes=task.sizes.n_identities, panel=second.panel.numel())
    sizes = replace(
        sizes_of(config, known),
        B=second.section.numel(),
        tokens=float(length.mean()),
        reach=float((length**2).sum() / length.sum()),
    )
    return held + most, make_plan(config, make_cluster("cpu"), known, sizes=sizes)
