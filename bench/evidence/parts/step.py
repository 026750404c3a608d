"""Part ``step``: complete steps of configs/1gpu.yaml, and a check that the host does not wait for the GPU in them."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.evidence.batches import TINY, TINY_PX, GeneratedTask, clocked, config_of
from bench.evidence.parts.ceilings import matrix_products
from bench.evidence.rows import Row, Rows
from comtip_fast.collectives import SingleProcessGroup
from comtip_fast.config.schema import RunConfig
from comtip_fast.plan.hardware import make_cluster
from comtip_fast.plan.live import device_of, step_cost
from comtip_fast.plan.plan import make_plan
from comtip_fast.plan.sizes import Inputs, mean_panel
from comtip_fast.training.distributed.signals import Signals
from comtip_fast.training.engines.factory import make_engine
from comtip_fast.training.trainer import Trainer

WAIT = "synchronizing CUDA operation"
"""Text in the warnings of ``torch.cuda.set_sync_debug_mode``."""
UNLOGGED = "train.log_every=1000000"
"""Override with which no step after the first is logged; a logged step waits by design."""


def run(rows: Rows, dry: bool, *overrides: str, name: str = "step of 1gpu.yaml", panels: int = 2) -> None:
    """Measure steps with the largest panel and then with the mean panel, unless ``panels`` is 1."""
    device = torch.device("cpu" if dry else "cuda")
    config = config_of(device, *(TINY if dry else ()), UNLOGGED, *overrides)
    tile_px = TINY_PX if dry else 224
    largest = config.panel.max_genes
    tflop, product, _ = matrix_products(dry)
    with tempfile.TemporaryDirectory() as folder:
        sizes = (("largest panel", largest), ("mean panel", mean_panel(config.panel.min_genes, largest)))
        for label, G in sizes[:panels]:
            steps = Steps(config, device, tile_px, G, Path(folder))
            where = {"size": f"B={config.data.batch_size} G={G}, {label}", "dtype": "bf16", "provider": "ours"}
            for part in (measure_first, measure_waits, measure_speed, measure_memory, measure_profile):
                try:
                    part(rows, steps, name, where, tflop / product.seconds)
                except Exception as error:
                    rows.fail(f"{name}: {part.__name__}", error, **where)
            steps.close()
            if not dry:
                torch.cuda.empty_cache()


class Steps:
    """Trainer that is advanced step by step.

    Parameters
    ----------
    config
        Config of the run.
    device
        Device of the model.
    tile_px
        Width of a tile in px.
    genes
        Number of genes of every panel.
    folder
        Folder of the run; nothing is written to it.
    """

    def __init__(self, config: RunConfig, device: torch.device, tile_px: int, genes: int, folder: Path) -> None:
        self.config, self.device, self.genes, self.tile_px = config, device, genes, tile_px
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        group = clocked(SingleProcessGroup(), config, device)
        self.task = GeneratedTask(config, device, group, tile_px=tile_px, panels=(genes,), pool=2)
        self.trainer = Trainer(self.task, config, folder, group)
        self.trainer.engine = make_engine(self.task.module, config, group)
        self.task.loader.prepare()
        self._signals = Signals()

    def take(self, n: int = 1) -> None:
        """Take ``n`` steps without waiting for the device."""
        for _ in range(n):
            self.trainer._one_step(self._signals)

    def wait(self) -> None:
        """Wait for the device, and discard the metrics that a logged step would report."""
        if self.on_gpu:
            torch.cuda.synchronize()
        self.trainer._reporter.discard()

    def close(self) -> None:
        """Release the model and its memory."""
        del self.trainer, self.task
        gc.collect()


Measure = Callable[[Rows, Steps, str, dict[str, str], float], None]


def measure_first(rows: Rows, steps: Steps, name: str, where: dict[str, str], _ceiling: float) -> None:
    """Send the time of the first steps, which compile kernels."""
    for i in (1, 2, 3):
        began = time.perf_counter()
        steps.take()
        steps.wait()
        rows.add(Row(name, f"step {i}, with compilation", time.perf_counter() - began, "s", **where))
    finite = [bool(torch.isfinite(loss)) for loss in steps.task.seen]
    ok = len(finite) == 3 and all(finite)
    rows.add(Row(name, "steps with a finite loss", f"{sum(finite)} of 3", status="ok" if ok else "failed", **where))


def measure_waits(rows: Rows, steps: Steps, name: str, where: dict[str, str], _ceiling: float) -> None:
    """Send the number of waits of the host for the GPU in two unlogged steps, and a check that waits are detected."""
    if not steps.on_gpu:
        steps.take()
        rows.skip(name, "torch.cuda.set_sync_debug_mode needs a GPU", **where)
        return
    known = waits_in(lambda: torch.ones(1, device="cuda").item())
    rows.add(Row(name, "waits of a known read", str(len(known)), status="ok" if known else "failed", **where))
    steps.wait()
    found = waits_in(lambda: steps.take(2))
    steps.wait()
    status, note = (
        ("failed" if found else "ok"),
        "; ".join(sorted(set(found))) or "two steps, torch.cuda.set_sync_debug_mode",
    )
    rows.add(Row(name, "waits of the host in a step", str(len(found)), status=status, note=note, **where))


def waits_in(work: Callable[[], Any]) -> list[str]:
    """Return the code line of every wait of the host for the GPU in ``work``."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(w.filename).name}:{w.lineno}" for w in caught if WAIT in str(w.message)]


def measure_speed(rows: Rows, steps: Steps, name: str, where: dict[str, str], ceiling: float) -> None:
    """Send the time of a step, spots/s, and the FLOP rate relative to ``ceiling`` (TFLOP/s of a large matrix product)."""
    n, rounds = (1, 1) if not steps.on_gpu else (4, 5)
    seconds = []
    for _ in range(rounds):
        steps.wait()
        began = time.perf_counter()
        steps.take(n)
        launched = time.perf_counter() - began
        steps.wait()
        seconds.append((time.perf_counter() - began) / n)
    middle, low, high = statistics.median(seconds), min(seconds), max(seconds)
    note = f"{rounds} times {n} steps; low and high are the extremes; with the upload of the batch"
    rows.add(Row(name, "step", 1e3 * middle, "ms", low=1e3 * low, high=1e3 * high, note=note, **where))
    rows.add(Row(name, "host time of a step", 1e3 * launched / n, "ms", note="until its work is queued", **where))
    B = steps.config.data.batch_size
    rows.add(Row(name, "speed", B / middle, "spots/s", low=B / high, high=B / low, **where))
    cost = step_cost(
        steps.config,
        steps.task.model,
        tile_px=steps.tile_px,
        trained_genes=steps.task.sizes.n_identities,
        ranks=1,
    )
    if cost is None:
        rows.skip(name, "the plan has no costs for the blocks of this encoder", **where)
        return
    tflop = cost.flops(B, steps.genes) * 1e-12
    note = f"{tflop:.4g} TFLOP by the plan's count, over the measured bf16 matrix product"
    rows.add(Row(name, "utilisation", 100 * tflop / middle / ceiling, "%", note=note, **where))


def measure_memory(rows: Rows, steps: Steps, name: str, where: dict[str, str], _ceiling: float) -> None:
    """Send the peak memory of tensors, including the construction of the model, and the predictions of ``comtip plan``."""
    device = device_of(torch.cuda.get_device_name()) if steps.on_gpu else None
    inputs = Inputs(tile_px=steps.tile_px, trained_genes=steps.task.sizes.n_identities)
    plan = make_plan(steps.config, make_cluster(device.name if device else "h100"), inputs)
    if steps.genes != plan.sizes.G:
        plan = make_plan(steps.config, plan.cluster, inputs, engine=plan.engine, sizes=plan.sizes.at_panel(steps.genes))
    peak = torch.cuda.max_memory_allocated() * 1e-9 if steps.on_gpu else 0.0
    rows.add(Row(name, "peak memory of tensors", peak, "GB", **where))
    predicted = {**where, "provider": f"comtip plan, {plan.cluster.device.name}"}
    rows.add(Row(name, "peak memory of tensors", plan.device_bytes * 1e-9, "GB", **predicted))
    rows.add(Row(name, "step", 1e3 * plan.step_seconds, "ms", note="predicted", **predicted))


def measure_profile(rows: Rows, steps: Steps, name: str, where: dict[str, str], _ceiling: float) -> None:
    """Send the time per step of the 20 kernels with the largest share, and of all kernels, profiled over two steps."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if steps.on_gpu else [])]
    steps.wait()
    with profile(activities=activities) as recorded:
        steps.take(2)
        steps.wait()
    field = "self_device_time_total" if steps.on_gpu else "self_cpu_time_total"
    kernels = [e for e in recorded.key_averages() if _is_kernel(e, steps.on_gpu) and getattr(e, field) > 0]
    total = sum(getattr(e, field) for e in kernels)
    if not total:
        rows.fail(name, "the profiler recorded no kernel", **where)
        return
    for event in sorted(kernels, key=lambda e: -getattr(e, field))[:20]:
        ms, share = getattr(event, field) / 2e3, 100 * getattr(event, field) / total
        note = f"{event.count // 2} launches, {share:.1f} % of the time in kernels" if steps.on_gpu else ""
        rows.add(Row(f"{name}: {event.key[:120]}", "time in one step", ms, "ms", note=note, **where))
    rows.add(Row(f"{name}: all kernels", "time in one step", total / 2e3, "ms", **where))


def _is_kernel(event: Any, on_gpu: bool) -> bool:
    """Return whether an event is a kernel, and not an annotation (``Optimizer.step``) that spans several kernels."""
    if not on_gpu:
        return True
    return str(event.device_type).endswith("CUDA") and not getattr(event, "is_user_annotation", False)
