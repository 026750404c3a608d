"""Table of the rehearsal with one row per walk, and checks of the walks' kernel variants against the ledger."""

from __future__ import annotations

import csv
import json
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from comtip_kernels.ledger.aot import LedgerEntry, LedgerRow
from comtip_kernels.ledger.entries import LAUNCHES, launched
from comtip_kernels.ledger.toolchain import architectures

from testkit.rehearsal.costs import SENT_KINDS, by_kind
from testkit.rehearsal.graphs import Rows
from testkit.rehearsal.launches import Launch
from testkit.rehearsal.record import Record
from testkit.rehearsal.walk import Walk, train

WGMMA_OPERATIONS = ("infonce", "table")
"""Operations (the losses and the sentence table) whose products must run in bf16 on WGMMA in a training step or a validation."""
COLUMNS = (
    "config",
    "ranks",
    "walk",
    "operators",
    "launches",
    "variants",
    "waits",
    "data_shapes",
    "uploads",
    "uploads_mb",
    "pageable_mb",
    *(column for kind in SENT_KINDS for column in (kind, f"{kind}_mb")),
    "gflop",
    "gflop_own",
    "moved_gb",
    "saved_mb",
    "hgmma_share",
    "spills",
)


@dataclass
class Walked:
    """Summary of a walk, small enough to be sent between processes."""

    walk: Walk
    counts: dict[str, str]
    """{column of the table: value}."""
    variants: list[dict[str, Any]]
    """Every distinct kernel variant, as in ``launches.json``."""
    gflop: dict[str, float]
    """{signature of a variant: GFLOP of its tensor-core products}."""
    waits: list[tuple[str, str, int]]
    """(what, code line, number), the most frequent first."""
    uploads: list[tuple[str, int, bool, bool]]
    """(code line, bytes, pinned, blocking)."""
    graph_rules: Rows = field(default_factory=dict)
    """What the rules of CUDA graphs found, as rows of ``bench/graph_rules.csv``; only of walks that they judge."""
    seconds: float = 0.0
    """CPU seconds of the walk."""


def flops(launch: Launch) -> float:
    """Return the FLOPs of the tensor-core products of a launch; 0 for kernels without products."""
    shapes, constants, grid = [s for _, s, _ in launch.tensors], launch.entry.constants, launch.grid
    kernel = launch.entry.kernel.__name__
    if kernel in ("lse_tiles", "grad_tiles"):
        return grid[0] * 2.0 * constants["BM"] * constants["BN"] * shapes[0][1]
    if kernel == "level_gradient":
        return grid[0] * 2.0 * constants["BM"] * constants["NG"] * constants["QP"] * shapes[0][1]
    if kernel in ("attention_forward", "attention_grads"):
        products = 2 if kernel == "attention_forward" else 5
        return float(products * 2 * constants["BT"] ** 2 * constants["BE"] * grid[0])
    if kernel in ("one_query_forward", "one_query_grads"):
        products = 2 if kernel == "one_query_forward" else 5
        return float(products * 2 * constants["BH"] * constants["BT"] * shapes[0][-1] * grid[0])
    if kernel in ("sampled_dot", "weighted_sum", "weighted_sum_transpose"):
        (B, G), rows = shapes[3 if kernel == "sampled_dot" else 2], constants["QP"]
        width = shapes[0][-1]
        return 2.0 * B * G * rows * width
    return 0.0


def as_row(entry: LedgerEntry) -> dict[str, Any]:
    """Return a variant for ``launches.json``."""
    return {
        "op": entry.op,
        "name": entry.name,
        "kernel": entry.kernel.__name__,
        "types": dict(entry.types),
        "constants": dict(entry.constants),
        "aligned": sorted(entry.aligned),
        "num_warps": entry.num_warps,
        "num_stages": entry.num_stages,
        "signature": entry.signature,
    }


def summary(walk: Walk, record: Record) -> Walked:
    """Return the summary of a walk's record."""
    entries = {launch.signature: launch.entry for launch in record.launches}
    gflop: dict[str, float] = {}
    for launch in record.launches:
        gflop[launch.signature] = gflop.get(launch.signature, 0.0) + flops(launch) / 1e9
    counts = {
        "operators": record.operators.total(),
        "launches": len(record.launches),
        "variants": len(entries),
        "waits": record.waits.total(),
        "data_shapes": record.data_shapes.total(),
        "uploads": len(record.uploads),
        "uploads_mb": f"{sum(u.bytes for u in record.uploads) / 1e6:.1f}",
        "pageable_mb": f"{sum(u.bytes for u in record.uploads if not u.pinned) / 1e6:.1f}",
        **by_kind(record.collectives, record.sent),
        "gflop": f"{record.flops / 1e9 + sum(gflop.values()):.1f}",
        "gflop_own": f"{sum(gflop.values()):.1f}",
        "moved_gb": f"{record.moved_bytes / 1e9:.2f}",
        "saved_mb": f"{record.saved_bytes / 1e6:.1f}",
    }
    return Walked(
        walk,
        {k: str(v) for k, v in counts.items()},
        [as_row(e) for e in entries.values()],
        gflop,
        [(what, where, n) for (what, where), n in record.waits.most_common()],
        [(u.where, u.bytes, u.pinned, u.blocking) for u in record.uploads],
        {(walk.config, str(walk.ranks), walk.name, *one.key): one.count for one in record.graph_rules},
    )


def walk_one(walk: Walk) -> Walked:
    """Run a walk in this process and return its summary."""
    from testkit.rehearsal.inference import infer

    warnings.filterwarnings(
        "ignore", "Accessing the data pointer of FakeTensor", UserWarning
    )  # raised by the copy of the EMA teacher
    began = time.process_time()
    out = summary(walk, train(walk, graph_rules=walk.judged) if walk.part.endswith("step") else infer(walk))
    out.seconds = time.process_time() - began
    return out


def walk_all(walks: Sequence[Walk], jobs: int) -> Iterator[Walked]:
    """Run walks in ``jobs`` processes and yield the summary of each when it is complete."""
    if jobs == 1:
        yield from map(walk_one, walks)
        return
    with get_context("spawn").Pool(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.imap_unordered(walk_one, walks)


def missing_rows(
    walked: Iterable[Walked], rows: dict[tuple[str, str, int], LedgerRow], names: dict[str, Any]
) -> list[str]:
    """Return a message for each kernel variant that the ledger lacks, or that spills on sm_80 or sm_90.

    Parameters
    ----------
    walked
        The walks.
    rows
        {(operation, name, architecture): ledger row} for the installed Triton.
    names
        {signature: (operation, name)} of every ledger entry.
    """
    out: dict[str, str] = {}
    for one in walked:
        where = f"{one.walk.config} ({one.walk.name})"
        for variant in one.variants:
            signature = variant["signature"]
            if signature not in names:
                out.setdefault(signature, f"{where}: not in the ledger: {signature}; run python -m testkit.rehearsal")
                continue
            for arch in architectures(triton.__version__):
                row = rows.get((*names[signature], arch))
                if row is None:
                    out[signature] = (
                        f"{where}: {'/'.join(names[signature])} has no row of sm_{arch}; "
                        "run python -m comtip_kernels.ledger"
                    )
                elif arch in (80, 90) and (row.stack or row.spills):
                    out[signature] = (
                        f"{where}: {'/'.join(names[signature])} spills on sm_{arch}; choose smaller tiles or more warps"
                    )
    return sorted(out.values())


def slow_products(
    walked: Iterable[Walked], rows: dict[tuple[str, str, int], LedgerRow], names: dict[str, Any]
) -> list[str]:
    """Return a message for each variant of a step or validation with products in fp32, without WGMMA on sm_90, or with unaligned rows.

    Rows whose stride is no multiple of 16 elements are loaded element by element.
    Packed attention is not included: its tiles of 32 tokens are too small for WGMMA, and it is memory-bound
    (kernels/README.md). Parameters are those of :func:`missing_rows`.
    """
    out: dict[str, str] = {}
    for one in walked:
        if not one.walk.part.endswith("step") and one.walk.part != "validation":
            continue
        for variant in (v for v in one.variants if v["op"] in WGMMA_OPERATIONS):
            signature, types = variant["signature"], variant["types"]
            where = f"{one.walk.config} ({one.walk.name}): {variant['op']}/{variant['kernel']}"
            operands = {types[name] for name in ("q_ptr", "k_ptr", "vector_ptr", "table_ptr") if name in types}
            if operands != {"*bf16"}:
                out[signature] = (
                    f"{where} multiplies {', '.join(sorted(operands))}, not bf16; cast the operands: {signature}"
                )
                continue
            strides = {name for name in types if "_stride_" in name and not name.endswith("_dim")}
            if unaligned := sorted(strides - set(variant["aligned"])):
                out[signature] = (
                    f"{where}: not a multiple of 16: {', '.join(unaligned)}; make the operand contiguous: {signature}"
                )
                continue
            row = rows.get((*names[signature], 90)) if signature in names else None
            if row is not None and row.mma != "HGMMA":
                out[signature] = f"{where} runs as {row.mma} on sm_90, not as HGMMA: {signature}"
    return sorted(out.values())


def table(
    walked: Iterable[Walked], rows: dict[tuple[str, str, int], LedgerRow], names: dict[str, Any]
) -> list[dict[str, str]]:
    """Return the rows of the table: the counts of each walk, and the WGMMA share and spills of its variants from the ledger."""
    out = []
    for one in walked:
        on_hgmma, spills = 0.0, 0
        for variant in one.variants:
            key = names.get(variant["signature"])
            found = [None if key is None else rows.get((*key, arch)) for arch in (80, 90)]
            spills += sum(1 for row in found if row is not None and (row.spills or row.stack))
            if found[1] is not None and found[1].mma == "HGMMA":
                on_hgmma += one.gflop[variant["signature"]]
        total = sum(one.gflop.values())
        share = f"{on_hgmma / total:.3f}" if total else "-"
        row = {"config": one.walk.config, "ranks": str(one.walk.ranks), "walk": one.walk.name} | one.counts
        out.append(row | {"hgmma_share": share, "spills": str(spills)})
    return out


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table file, empty if it does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write the rows of the table to a csv file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        out.writeheader()
        out.writerows(rows)


def write_launches(walked: Iterable[Walked], *, keep: bool) -> None:
    """Write ``launches.json``: the kernel variants that the ledger does not list by hand; ``keep`` keeps those in the file."""
    known = (
        {row["signature"]: row for row in json.loads(LAUNCHES.read_text(encoding="utf-8"))}
        if keep and LAUNCHES.is_file()
        else {}
    )
    for one in walked:
        known |= {v["signature"]: v for v in one.variants}
    largest = {e.signature for e in _hand_written()}
    rows = sorted((v for s, v in known.items() if s not in largest), key=lambda v: (v["op"], v["name"]))
    LAUNCHES.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _hand_written() -> list[LedgerEntry]:
    from comtip_kernels.ledger.entries import entries

    return entries()[: len(entries()) - len(launched())]
