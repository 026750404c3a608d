"""Part ``timings``: times of forward and backward of every operation and of other implementations, in the dtypes of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from bench.evidence import block_cases, cases
from bench.evidence.cases import Case, Loss
from bench.evidence.parts.ceilings import matrix_products
from bench.evidence.rows import Row, Rows
from bench.evidence.timing import time_passes, time_products

EAGER = {"packed_attention": "sdpa, padded", "image_attention": "sdpa"}
"""Names of PyTorch's attention; that of other operations in PyTorch is ``eager``."""


def run(rows: Rows, dry: bool) -> None:
    """Time every case; an error in one implementation affects only its own rows."""
    device = "cpu" if dry else "cuda"
    tflop, time, _ = matrix_products(dry)
    ceiling = tflop / time.seconds
    for build in builders(device, dry):
        try:
            built = build()
        except Exception as error:
            rows.fail(getattr(build, "func", build).__name__, error)
            continue
        for case in built if isinstance(built, list) else [built]:
            time_case(rows, case, device, ceiling)


def builders(device: str, dry: bool) -> Iterator[partial[Case | list[Case]]]:
    """Yield functions that return the cases, first with the sizes of a step of configs/1gpu.yaml, then with large ones."""
    if dry:
        yield partial(cases.infonce_case, device, 20, 40, 16)
        yield partial(cases.infonce_case, device, 20, 20, 16)
        yield partial(cases.block_case, device, 20, 12, 16)
        yield partial(cases.embedding_case, device, 4, 3, 16, 6, 20)
        yield partial(cases.attention_case, device, 8, 2, 16, 16, ("flash", "varlen"))
        yield partial(cases.one_query_case, device, 8, 2, 16, 12)
        yield partial(cases.table_cases, device, 8, 5, 3, 16)
        yield partial(block_cases.pointwise_cases, device, 6, 16)
        yield partial(block_cases.images_case, device, 2, 2, 16, (7, 4))
        return
    yield partial(cases.infonce_case, device, 1024, 2048, 512)
    yield partial(cases.infonce_case, device, 1024, 1024, 512)
    yield partial(cases.table_cases, device, 1024, 1024, 32, 512)
    yield partial(cases.embedding_case, device, 1024, 32, 512, 18, 4099)
    for longest in (18, 10, 48):
        yield partial(cases.attention_case, device, 2_432_000 // (3 + longest), 8, 64, longest, ("flash", "varlen"))
    yield partial(cases.one_query_case, device, 1024 * 32, 8, 512, 18)
    yield partial(block_cases.pointwise_cases, device, 1024 * 76, 768)
    yield partial(block_cases.pointwise_cases, device, 403_456, 512)
    yield partial(block_cases.images_case, device, 1024, 12, 64, (50, 26))
    yield partial(cases.table_cases, device, 1024, 148, 32, 512)
    yield partial(cases.infonce_case, device, 8192, 16384, 512)
    yield partial(cases.infonce_case, device, 8192, 8192, 512)
    yield partial(cases.infonce_case, device, 32768, 32768, 512)
    yield partial(cases.block_case, device, 65536, 2048, 512)


def time_case(rows: Rows, case: Case, device: str, ceiling: float) -> None:
    """Send the times of our implementation, of eager PyTorch, of other implementations, and of the matrix products alone."""
    providers: dict[str, Loss] = {"ours": case.ours}
    providers |= {EAGER.get(case.op, "eager"): case.reference, **case.peers}
    dtype = torch.float32 if case.fp32_inputs else torch.bfloat16
    named = "fp32 under bf16 autocast" if case.fp32_inputs else "bf16"
    inputs = case.cast(dtype)
    for name, loss in providers.items():
        where = {"size": case.size, "dtype": named, "provider": name}
        _guarded(rows, case, where, partial(_passes, rows, case, loss, inputs, device, ceiling, where))
    for name, reason in case.missing.items():
        rows.skip(case.op, reason, size=case.size, dtype=named, provider=name)
    if case.products[0]:
        where = {"size": case.size, "dtype": "bf16", "provider": "cuBLAS, the products alone"}
        _guarded(rows, case, where, partial(_products, rows, case, device, where))


def _guarded(rows: Rows, case: Case, where: dict[str, str], work: Callable[[], None]) -> None:
    """Run ``work``, send an error as a row, and release memory for the next implementation."""
    try:
        work()
    except Exception as error:  # out of memory, or a size that the implementation does not support
        rows.fail(case.op, error, **where)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _passes(
    rows: Rows, case: Case, loss: Loss, inputs: list[Any], device: str, ceiling: float, where: dict[str, str]
) -> None:
    with torch.autocast(device, dtype=torch.bfloat16) if case.fp32_inputs else nullcontext():
        passes = time_passes(loss, inputs, device)
    for metric, time in (("forward", passes.forward), ("backward", passes.backward)):
        note = f"{time.calls} calls, cold L2"
        rows.add(Row(case.op, metric, time.median, "ms", low=time.low, high=time.high, note=note, **where))
    rows.add(Row(case.op, "peak memory", passes.peak_mib, "MiB", **where))
    if case.flops:
        rate = case.flops * 1e-12 / (passes.forward.seconds + passes.backward.seconds)
        note = "FLOPs of the definition over the bf16 matrix product of this GPU"
        rows.add(Row(case.op, "share of the matrix product's rate", 100 * rate / ceiling, "%", note=note, **where))


def _products(rows: Rows, case: Case, device: str, where: dict[str, str]) -> None:
    for metric, products in zip(("forward", "backward"), case.products, strict=True):
        time = time_products(products, device)
        rows.add(Row(case.op, metric, time.median, "ms", low=time.low, high=time.high, **where))
