"""Measure what ``comtip plan`` predicts: bytes saved for the backward pass, and the FLOPs of a real step."""

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
from comtip_fast.plan.parts import step_parts
from comtip_fast.plan.plan import Plan, make_plan
from comtip_fast.plan.rank_share import RankShare, StepPart
from comtip_fast.plan.sizes import Inputs, Sizes, sizes_of
from comtip_fast.training.engines.factory import make_engine
from comtip_fast.training.grad_cache import forward_backward
from comtip_fast.training.task import build_task

CPU = torch.device("cpu")
aten = torch.ops.aten
# Operators without a formula in torch: fused attention on a CPU, and the in-place matrix product.
MORE_FORMULAS = {
    aten.addmm_: lambda out, a, b, *rest, **kw: addmm_flop(out, a, b),
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *a, **kw: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *a, **kw: sdpa_backward_flop_count(
        g, q, k, v
    ),
}


class SavedTensors:
    """Context manager that records the tensors autograd saves, each storage once, except those in ``exclude``."""

    def __init__(self, exclude: list[torch.Tensor]) -> None:
        self._excluded = {t.untyped_storage().data_ptr() for t in exclude}
        self._saved: dict[int, torch.Tensor] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def __enter__(self) -> "SavedTensors":
        self._hooks.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._hooks.__exit__(*raised)

    def _pack(self, t: torch.Tensor) -> torch.Tensor:
        self._saved.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    def clear(self) -> None:
        """Release the tensors; a graph without a backward pass would keep them alive through its hooks."""
        self._saved.clear()

    @property
    def bytes(self) -> int:
        saved = {k: t for k, t in self._saved.items() if k not in self._excluded}
        return sum(t.untyped_storage().nbytes() for t in saved.values())


@dataclass
class Measured:
    """One real step, and the plan of the same step."""

    forward_flops: int
    all_flops: int
    saved_bytes: int
    sizes: Sizes
    share: RankShare
    parts: list[StepPart]

    def predicted(self, field: str) -> float:
        return sum(p.sum(field) for p in self.parts)

    @property
    def predicted_saved(self) -> float:
        return sum(p.saved for p in self.parts)


def measure(overrides: list[str], *, bf16: bool = False) -> Measured:
    """Run one step of a task on the CPU."""
    config = load_config(None, [*overrides, "train.log_every=1000", "panel.min_genes=24"])
    task = build_task(config, CPU)
    task.module.train()
    batch = task.batch(task.batches(0)[0], 1, 0)
    exclude = [*task.model.parameters(), *task.model.buffers(), batch.levels, batch.measured, batch.panel]
    with (
        SavedTensors(exclude) as saved,
        FlopCounterMode(display=False, custom_mapping=MORE_FORMULAS) as counter,
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        losses, _ = task.losses(task.module, batch)
    forward, saved_bytes = counter.get_total_flops(), saved.bytes
    with counter:
        losses["loss"].backward()
    G, b = batch.panel.numel(), batch.section.numel()
    length = task.genes.length_G[batch.panel.long()].double()
    inputs = Inputs(tile_px=task.sizes.tile_px, trained_genes=task.sizes.n_identities, panel=G)
    # The formulas are tested with the panel's own sentences, not with the mean over all genes. On a CPU, short sentences
    # share an attention matrix, and a token attends to all of its tokens.
    sizes = sizes_of(config, inputs, task.model)
    batches = list(_shared(_runs(length.sort().values.long().repeat_interleave(sizes.Q))))
    attended = sum(n * (several * tokens) ** 2 for n, several, tokens in batches)
    sizes = replace(sizes, tokens=float(length.mean()), attended=attended / (float(length.sum()) * sizes.Q))
    share = RankShare(
        spots=b,
        images=b,
        columns=2 * b if sizes.mispairs and sizes.hard_columns else b,
        table_rows=G * sizes.Q,
        precision=AUTOCAST if bf16 else FP32,
        gpu=False,
        checkpointing=config.engine.activation_checkpointing,
    )
    return Measured(forward, forward + counter.get_total_flops(), saved_bytes, sizes, share, step_parts(sizes, share))


def measure_peak(overrides: list[str]) -> tuple[float, Plan]:
    """Return the peak memory of one step of one process in bytes, from the allocator's events, and the step's plan."""
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
    persistent = sum(t.nbytes for t in (*model, *state, *gradients, second.tiles, second.levels, second.measured))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(second)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    length = task.genes.length_G[second.panel.long()].double()
    inputs = Inputs(tile_px=task.sizes.tile_px, trained_genes=task.sizes.n_identities, panel=second.panel.numel())
    sizes = replace(
        sizes_of(config, inputs),
        B=second.section.numel(),
        tokens=float(length.mean()),
        attended=float((length**2).sum() / length.sum()),
    )
    return persistent + peak, make_plan(config, make_cluster("cpu"), inputs, sizes=sizes)
