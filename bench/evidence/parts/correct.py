"""Part ``correct``: comparison of every operation with fp64 on the GPU, in every precision (:mod:`bench.evidence.check`)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import torch
from comtip_kernels import infonce

from bench.evidence import block_cases, cases
from bench.evidence.cases import Case
from bench.evidence.check import PRECISIONS, Precision, compare, is_refusal, loss_bias
from bench.evidence.rows import CHANNEL, Row, Rows

LARGEST_BIAS = 2e-5
"""Maximum difference between the loss and the fp64 loss of the same vectors."""
PROCESSES = 6
SHARE = "COMTIP_EVIDENCE_SHARE"
"""Environment variable with the value ``i/n``: compare only the cases i, i + n, ..."""


def run(rows: Rows, dry: bool) -> None:
    """Compare every case in every precision; on a GPU in several processes, because most of the time is spent compiling."""
    if SHARE in os.environ or dry:
        run_share(rows, dry, *map(int, os.environ.get(SHARE, "0/1").split("/")))
        return
    open_files = [int(os.environ[CHANNEL])] if CHANNEL in os.environ else []
    processes = [
        subprocess.Popen(sys.orig_argv, env=os.environ | {SHARE: f"{i}/{PROCESSES}"}, pass_fds=open_files)
        for i in range(PROCESSES)
    ]
    failed = [i for i, process in enumerate(processes) if process.wait()]
    if failed:
        raise RuntimeError(f"processes {failed} of {PROCESSES} failed; see their output above")


def run_share(rows: Rows, dry: bool, index: int, of: int) -> None:
    """Compare every ``of``-th case from ``index`` on; an error in one becomes a row and does not end the part."""
    device = "cpu" if dry else "cuda"
    for build in list(builders(device, dry))[index::of]:
        try:
            built = build()
        except Exception as error:
            rows.fail(getattr(build, "func", build).__name__, error)
            continue
        for case in built if isinstance(built, list) else [built]:
            check_case(rows, case, PRECISIONS[::3] if dry else PRECISIONS)
        if not dry:
            torch.cuda.empty_cache()
    if index == of - 1:
        bias(rows, device, dry)


def builders(device: str, dry: bool) -> Iterator[partial[Case | list[Case]]]:
    """Yield functions that return the cases, with widths of several slices, and sizes that are not multiples of a tile."""
    if dry:
        yield partial(cases.infonce_case, device, 12, 20, 16)
        yield partial(cases.block_case, device, 12, 10, 16)
        yield partial(cases.embedding_case, device, 4, 3, 16, 6, 20)
        yield partial(cases.attention_case, device, 5, 1, 16, 6)
        yield partial(cases.one_query_case, device, 5, 2, 16, 6)
        yield partial(cases.table_cases, device, 6, 4, 3, 16)
        yield partial(block_cases.pointwise_cases, device, 6, 20)
        yield partial(block_cases.images_case, device, 2, 2, 16, (7, 4))
        return
    for D in (512, 300):
        yield partial(cases.infonce_case, device, 1000, 1900, D)
        yield partial(cases.block_case, device, 3000, 700, D)
        yield partial(cases.embedding_case, device, 300, 32, D, 18, 4099)
        yield partial(cases.table_cases, device, 500, 77, 32, D)
    yield partial(cases.infonce_case, device, 8192, 16384, 512)
    for longest in (10, 18, 24, 33, 48):
        yield partial(cases.attention_case, device, 3001, 8, 64, longest)
    for D, longest in ((512, 18), (300, 10), (1024, 64)):
        yield partial(cases.one_query_case, device, 3001, 8, D, longest)
    for N, d in ((3001, 512), (1003, 300), (40_000, 768), (500, 1024)):
        yield partial(block_cases.pointwise_cases, device, N, d)
    for E, tokens in ((64, (50, 26)), (40, (32, 9)), (64, (64,))):
        yield partial(block_cases.images_case, device, 301, 12, E, tokens)
    yield partial(cases.table_cases, device, 1024, 148, 10, 512)
    yield partial(cases.masked_cases, device)


def check_case(rows: Rows, case: Case, precisions: tuple[Precision, ...] = PRECISIONS) -> None:
    """Compare a case, and send one row per precision."""
    for precision in precisions:
        where = {"size": case.size, "dtype": precision.name, "provider": "ours"}
        try:
            found = compare(case, precision)
        except Exception as error:
            refused = is_refusal(error)
            (rows.skip if refused else rows.fail)(case.op, str(error) if refused else error, **where)
            continue
        note = found.problem() or f"tolerance {found.tolerance:g}; from NaN memory; two runs with equal bits"
        status = "ok" if found.ok else "failed"
        rows.add(Row(case.op, "largest error of a row", found.error, status=status, note=note, **where))


def bias(rows: Rows, device: str, dry: bool) -> None:
    """Send the difference between the loss and the fp64 loss of the same rounded vectors at scale 100."""
    ours = partial(infonce, impl="triton")
    for B, D in ((12, 16),) if dry else ((1024, 512), (4096, 512)):
        for cosine in (0.5,) if dry else (0.0, 0.5, 0.9, 1.0):
            where = {"size": f"B={B} D={D} cosine={cosine:g}", "dtype": "bf16", "provider": "ours"}
            try:
                found = loss_bias(device, B, D, cosine, ours)
            except Exception as error:
                rows.fail("infonce", error, **where)
                continue
            status, note = ("ok" if abs(found) <= LARGEST_BIAS else "failed"), f"scale 100; bound {LARGEST_BIAS:g}"
            rows.add(Row("infonce", "loss minus fp64 loss", found, status=status, note=note, **where))
