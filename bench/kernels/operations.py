"""Whole operations and their kernels: operators, launches and bytes of forward and backward pass, as training calls them.

    PYTHONPATH=.:kernels:data_shards python bench/kernels/operations.py [--check]

``bench/traffic.csv`` counts the kernels with operands in bf16. Training calls them under bf16 autocast with tensors in fp32, and
PyTorch casts, normalises, sorts, builds masks and adds around them. Every operation runs here at the sizes of
``bench/traffic.csv`` on stand-ins for CUDA tensors (:mod:`testkit.rehearsal`), which counts each operand and result of every operator
and launch once. Nothing is measured, and no GPU is needed. ``--check`` fails if a count grew.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from comtip_kernels import (
    infonce,
    level_cross_entropy,
    one_query_attention,
    packed_attention_qkv,
    pair_scores,
    table_pool,
)
from comtip_kernels.ledger.sizes import Sized, sizes
from torch import Tensor

from comtip_fast.runtime import devices
from testkit.rehearsal.cuda_runtime import stand_in_cuda
from testkit.rehearsal.launches import recorded_launches
from testkit.rehearsal.record import Record
from testkit.rehearsal.stand_in import CUDA, StandInMode

TABLE = Path(__file__).parents[1] / "operations.csv"
COLUMNS = ("op", "part", "size", "operators", "launches", "kernel_mb", "operation_mb", "ratio")
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Operation:
    """One operation at one size of ``bench/traffic.csv``."""

    op: str
    size: str
    build: Callable[[], Call]
    """Allocates the inputs, and returns the forward pass."""


def leaf(*shape: int) -> Tensor:
    """Return an fp32 stand-in whose gradient is computed."""
    return torch.empty(shape, device=CUDA, requires_grad=True)


def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, device=CUDA, dtype=dtype)


def _infonce(B: int, M: int, D: int) -> Callable[[], Call]:
    def build() -> Call:
        image, text, scale = leaf(B, D), leaf(M, D), leaf()
        section, text_class = integers(M, dtype=torch.int32), integers(M)
        further, weight = integers(M - B, dtype=torch.bool), torch.empty(B, device=CUDA)
        return lambda: infonce(
            image,
            text,
            scale,
            negatives="same_group",
            group_rows=section[:B],
            group_columns=section,
            class_rows=text_class[:B],
            class_columns=text_class,
            weight_B=weight,
            excluded_further=further,
        )

    return build


def _table(op: str, B: int, G: int, Q: int, D: int) -> Callable[[], Call]:
    def build() -> Call:
        table, vector = leaf(G, Q, D), leaf(B, D)
        levels, mask = integers(B, G, dtype=torch.uint8), integers(B, G, dtype=torch.bool)
        if op == "table_pool":
            scores = leaf(G, Q)
            return lambda: table_pool(table, scores, levels, mask)
        if op == "pair_scores":
            return lambda: pair_scores(vector, table, levels)
        scale, prior = leaf(), leaf(G, Q)
        return lambda: level_cross_entropy(vector, table, levels, mask, scale, prior)

    return build


def _attention(S: int, H: int, E: int, longest: int) -> Callable[[], Call]:
    def build() -> Call:
        qkv = torch.empty(S, 3, H, E, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        first, length = integers(S, dtype=torch.int32), integers(S // 10)
        return lambda: packed_attention_qkv(qkv, length, longest=longest, first_S=first)

    return build


def _one_query(N: int, S: int, H: int, D: int, longest: int) -> Callable[[], Call]:
    def build() -> Call:
        query = torch.empty(N, H, D, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        x, length, first = leaf(S, D), integers(N), integers(N)
        return lambda: one_query_attention(query, x, length, scale=0.125, longest=longest, first_M=first)

    return build


def operations() -> Iterator[Operation]:
    """Yield every operation at the sizes of the ledger."""
    for B, M, size in (
        (32768, 32768, "B = M = 32k, D = 512"),
        (8192, 16384, "B = 8k, M = 16k, D = 512"),
        (1024, 2048, "B = 1k, M = 2k, D = 512"),
    ):
        yield Operation("infonce", size, _infonce(B, M, 512))
    tokens = 256_000 // 14 * sum(range(3, 17))
    yield Operation("packed_attention", "256k sentences of 3 to 16, 8 heads x 64", _attention(tokens, 8, 64, 16))
    size = "2,048 genes x 32 levels, 8 heads, D = 512"
    yield Operation("one_query_attention", size, _one_query(65_536, 851_552, 8, 512, 18))
    for B in (4096, 1024):
        for op in ("table_pool", "pair_scores", "level_cross_entropy"):
            yield Operation(op, f"B = {B // 1024}k, G = 2k, Q = 32, D = 512", _table(op, B, 2048, 32, 512))


def walked(build: Callable[[], Call]) -> Iterator[tuple[str, Record]]:
    """Yield ``forward`` and ``backward`` with what was recorded in each pass."""
    records = {"forward": Record(), "backward": Record()}
    inside = Record()
    with stand_in_cuda(inside) as mode, recorded_launches(mode):
        with inside.pause():
            call = build()
        with recording(mode, records["forward"]), devices.autocast("bf16", CUDA):
            out = call()
        with inside.pause():
            grad = torch.empty_like(out)
        with recording(mode, records["backward"]):
            out.backward(grad)
    yield from records.items()


@contextmanager
def recording(mode: StandInMode, record: Record) -> Iterator[None]:
    """Record into ``record`` inside the block."""
    before, mode.record = mode.record, record
    try:
        yield
    finally:
        mode.record = before


def count() -> list[dict[str, str]]:
    """Return the rows of the table."""
    kernels: dict[tuple[str, str, str], Sized] = {(s.op, s.part, s.size): s for s in sizes()}
    rows = []
    for one in operations():
        for part, record in walked(one.build):
            kernel = kernels[one.op, part, one.size].moved.once
            rows.append(
                {
                    "op": one.op,
                    "part": part,
                    "size": one.size,
                    "operators": str(sum(record.operators.values())),
                    "launches": str(len(record.launches)),
                    "kernel_mb": f"{kernel / 1e6:.1f}",
                    "operation_mb": f"{record.moved_bytes / 1e6:.1f}",
                    "ratio": f"{record.moved_bytes / kernel:.2f}",
                }
            )
    return rows


def read(path: Path = TABLE) -> list[dict[str, str]]:
    """Return the rows of the committed table."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def problems(rows: list[dict[str, str]], committed: list[dict[str, str]]) -> list[str]:
    """Return a message for each count above the committed one, and for each row that only the table or only the code has."""
    known = {(r["op"], r["part"], r["size"]): r for r in committed}
    out = []
    for row in rows:
        where = f"{row['op']} {row['part']}, {row['size']}"
        before = known.pop((row["op"], row["part"], row["size"]), None)
        if before is None:
            out.append(f"{where}: not in {TABLE.name}; run python bench/kernels/operations.py")
            continue
        for name in ("operators", "launches", "operation_mb"):
            if float(row[name]) > float(before[name]):
                out.append(f"{where}: {name} is {row[name]}, the table has {before[name]}")
    gone = [f"{op} {part}, {size}" for op, part, size in known]
    return out + [f"{where}: only in {TABLE.name}; run python bench/kernels/operations.py" for where in gone]


def markdown(rows: list[dict[str, str]]) -> str:
    """Return the table as Markdown, with forward and backward pass of an operation in one row."""
    lines = [
        "| operation | size | operators | kernels' MB | operation's MB | ratio |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for forward, backward in zip(rows[::2], rows[1::2], strict=True):
        kernel, whole = (float(forward[c]) + float(backward[c]) for c in ("kernel_mb", "operation_mb"))
        counts = f"{forward['operators']} + {backward['operators']}"
        lines.append(
            f"| `{forward['op']}` | {forward['size']} | {counts} | {kernel:,.0f} | {whole:,.0f} | {whole / kernel:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Count, and write the table or, with ``--check``, compare with it; return 1 if :func:`problems` finds any."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the table and do not write it")
    args = parser.parse_args()
    rows = count()
    if args.check:
        wrong = problems(rows, read())
        print("\n".join(wrong), file=sys.stderr)
        return 1 if wrong else 0
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        out.writeheader()
        out.writerows(rows)
    print(markdown(rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
