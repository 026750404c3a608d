"""Timing of forward and backward passes with CUDA events and a cold L2 cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.evidence.cases import Loss

WARM_UP = 3
"""Number of calls before the timed ones, for compilation, autotuning and the allocator."""


@dataclass(frozen=True)
class Time:
    """Time of one call in ms, over several calls."""

    median: float
    low: float
    """20 % quantile."""
    high: float
    """80 % quantile."""
    calls: int = 1
    """Number of timed calls."""

    @property
    def seconds(self) -> float:
        """The median in seconds."""
        return self.median * 1e-3


@dataclass(frozen=True)
class Passes:
    """Times and memory of the forward and backward pass of an operation."""

    forward: Time
    backward: Time
    peak_mib: float
    """Peak memory during one forward and backward pass in MiB, without the inputs; 0 on a CPU."""


def time_call(call: Callable[[], object], device: str, *, budget_ms: float = 300.0, cold: bool = True) -> Time:
    """Time a call on a GPU. On a CPU, it is called once, only to show that it runs.

    Parameters
    ----------
    call
        Launches the work; it must not wait for the device.
    device
        ``cuda`` or ``cpu``.
    budget_ms
        Approximate time of all timed calls together, in ms.
    cold
        Whether to write a buffer larger than the L2 cache before each call, so that the call reads its inputs from memory.
    """
    if device == "cpu":
        began = time.perf_counter()
        call()
        ms = (time.perf_counter() - began) * 1e3
        return Time(ms, ms, ms)
    for _ in range(WARM_UP):
        call()
    flush = _flush_buffer() if cold else None
    calls = int(min(200, max(5, budget_ms / max(0.01, _estimate_ms(call)))))
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for begin, end in pairs:
        if flush is not None:
            flush.zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    all_ms = torch.tensor([begin.elapsed_time(end) for begin, end in pairs], dtype=torch.float64)
    low, median, high = all_ms.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Time(median, low, high, calls)


def _flush_buffer() -> Tensor:
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.empty(max(2**26, 4 * size), dtype=torch.uint8, device="cuda")


def _estimate_ms(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(2):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 2


def results(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the results of an operation, of which most have one."""
    return (out,) if isinstance(out, Tensor) else out


def time_passes(loss: Loss, inputs: list[Tensor], device: str, *, budget_ms: float = 300.0) -> Passes:
    """Time the forward pass, with recording of the graph, and the backward pass, each within ``budget_ms``."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    forward = time_call(lambda: loss(*leaves), device, budget_ms=budget_ms)
    return Passes(forward, _time_backward(loss, leaves, device, budget_ms), _peak_mib(loss, leaves, device))


def _time_backward(loss: Loss, leaves: list[Tensor], device: str, budget_ms: float) -> Time:
    out = results(loss(*leaves))
    upstream = [torch.ones_like(t) for t in out]

    def backward() -> None:
        torch.autograd.grad(out, leaves, upstream, retain_graph=True, allow_unused=True)

    return time_call(backward, device, budget_ms=budget_ms)


def _peak_mib(loss: Loss, leaves: list[Tensor], device: str) -> float:
    if device == "cpu":
        return 0.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = results(loss(*leaves))
    torch.autograd.grad(out, leaves, [torch.ones_like(t) for t in out], allow_unused=True)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def time_products(products: tuple[tuple[int, int, int], ...], device: str, *, budget_ms: float = 200.0) -> Time:
    """Time bf16 matrix products of cuBLAS, one after the other; each product (m, k, n) is (m, k) times (k, n)."""
    g = torch.Generator(device).manual_seed(0)

    def matrix(n: int, m: int) -> Tensor:
        return torch.randn(n, m, generator=g, device=device, dtype=torch.bfloat16)

    pairs = [(matrix(m, k), matrix(k, n)) for m, k, n in products]
    return time_call(lambda: [a @ b for a, b in pairs], device, budget_ms=budget_ms)
