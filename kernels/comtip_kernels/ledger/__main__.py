"""``python -m comtip_kernels.ledger``: compile every kernel and write the tables; ``--check`` fails if a row got worse."""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, fields
from pathlib import Path

from comtip_kernels.ledger.aot import INSTRUCTION_CLASSES, SHARED_LIMIT_KIB, LedgerRow
from comtip_kernels.ledger.sizes import ROOFS, sizes
from comtip_kernels.ledger.toolchain import architectures, run_ledger

COLUMNS = ["triton", *(f.name for f in fields(LedgerRow))]
SLACK = 8
"""Tolerated increase of registers, which change by a few with every version of the compiler."""
CLASS_SLACK = 0.02
"""Tolerated increase of ordinary instructions by class, which the order of the code changes a little. Four more exponentials, a loop
that is unrolled twice or a second load change them by more, or change a count without slack."""


def problems(row: LedgerRow, before: dict[str, str] | None) -> list[str]:
    """Return a message for each limit that the row exceeds and for each value that got worse since the committed row ``before``."""
    where = f"{row.op}/{row.name} sm_{row.arch}"
    out = []
    if row.arch in (80, 90) and (row.stack or row.spills):
        out.append(f"{where}: spills ({row.stack} bytes of stack, {row.spills} local loads and stores)")
    if row.shared_kib > SHARED_LIMIT_KIB[row.arch]:
        out.append(f"{where}: {row.shared_kib} KiB of shared memory, the limit is {SHARED_LIMIT_KIB[row.arch]} KiB")
    if before is None:
        return out
    if row.registers > int(before["registers"]) + SLACK:
        out.append(f"{where}: {row.registers} registers, the table has {before['registers']}")
    more_is_worse = {
        "spills": "spills",
        "stack": "bytes of stack",
        "shared_kib": "KiB of shared memory",
        "mma_count": "tensor-core instructions",
        "special": "special-function instructions",
    }
    for name, text in more_is_worse.items():
        if getattr(row, name) > int(
            before.get(name) or getattr(row, name)
        ):  # tables written before this column existed
            out.append(f"{where}: {getattr(row, name)} {text}, the table has {before[name]}")
    for name in INSTRUCTION_CLASSES:
        limit = int(before.get(name) or getattr(row, name))
        if getattr(row, name) > limit * (1 + CLASS_SLACK):
            out.append(f"{where}: {getattr(row, name)} instructions of class {name}, the table has {limit}")
    less_is_worse = {
        "loads_128": "128-bit loads",
        "async_copies": "asynchronous copies",
        "resident": "programs per multiprocessor",
    }
    for name, text in less_is_worse.items():
        if getattr(row, name) < int(before.get(name) or 0):
            out.append(f"{where}: {getattr(row, name)} {text}, the table has {before[name]}")
    for name, text in (("mma", "tensor-core instruction"), ("mma_shape", "shape of tensor-core instructions")):
        if getattr(row, name) != (before.get(name) or getattr(row, name)):
            out.append(f"{where}: {text} {getattr(row, name)}, the table has {before[name]}")
    return out


def read(path: Path) -> list[dict[str, str]]:
    """Return the committed rows; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Iterable[LedgerRow], version: str, kept: list[dict[str, str]]) -> None:
    """Write the rows of the Triton release ``version``, and the rows of other releases in ``kept``."""
    others = [r for r in kept if r["triton"] != version]
    ours = [{"triton": version} | {k: str(v) for k, v in asdict(r).items()} for r in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        out.writeheader()
        out.writerows(sorted([*others, *ours], key=lambda r: (r["triton"], r["op"], r["name"], int(r["arch"]))))


def merged(rows: Iterable[LedgerRow], known: dict[tuple[str, str, int], dict[str, str]]) -> list[LedgerRow]:
    """Return the rows compiled so far and the committed rows of all other entries, so that an interrupted run keeps both."""
    new = {(r.op, r.name, r.arch): r for r in rows}
    return [*new.values(), *(parsed(row) for key, row in known.items() if key not in new)]


def compiled(known: dict[tuple[str, str, int], dict[str, str]], jobs: int) -> Iterator[LedgerRow]:
    """Yield the row of every entry and every architecture of the installed Triton, compiled in ``jobs`` processes.

    Parameters
    ----------
    known
        Committed rows. One that has all columns and the current source hash is yielded as it is, without compiling.
    jobs
        Number of processes.

    Raises
    ------
    RuntimeError
        If the compiler ends a process; also as :func:`comtip_kernels.ledger.aot.compile_entry`.
    """
    import triton

    from comtip_kernels.ledger.entries import entries

    with ProcessPoolExecutor(jobs) as pool:
        waiting: list[tuple[str, Future[LedgerRow] | LedgerRow]] = []
        for index, entry in enumerate(entries()):
            for arch in architectures(triton.__version__):
                where = f"{entry.op}/{entry.name} sm_{arch}"
                before = known.get((entry.op, entry.name, arch), {})
                if before.keys() >= set(COLUMNS) and before["source"] == entry.source(arch):
                    waiting.append((where, parsed(before)))
                else:
                    waiting.append((where, pool.submit(_compile, index, arch)))
        for where, item in waiting:
            try:
                yield item.result() if isinstance(item, Future) else item
            except BrokenProcessPool as err:
                raise RuntimeError(
                    f"{where}: Triton {triton.__version__} ended the process while it compiled this entry or, with --jobs above 1, one of "
                    "the next; the compiler's own message is above; rewrite the kernel, or exclude the architecture in ledger/toolchain.py"
                ) from err


def _compile(index: int, arch: int) -> LedgerRow:
    from comtip_kernels.ledger.aot import compile_entry
    from comtip_kernels.ledger.entries import entries

    return compile_entry(entries()[index], arch)


def parsed(row: dict[str, str]) -> LedgerRow:
    """Return a committed row as a :class:`LedgerRow`; a column that it lacks is empty."""
    values = {f.name: row.get(f.name) or "" for f in fields(LedgerRow)}
    return LedgerRow(**{k: int(v) if v.isdecimal() and k != "source" else v for k, v in values.items()})  # type: ignore[arg-type]


def dropped(rows: Iterable[LedgerRow], known: dict[tuple[str, str, int], dict[str, str]]) -> list[str]:
    """Return a message for each committed row of the installed Triton whose entry was not compiled: nothing compares its kernel."""
    compiled_now = {(r.op, r.name, r.arch) for r in rows}
    return [
        f"{op}/{name} sm_{arch}: in the table, but no entry of the ledger any more; run python -m comtip_kernels.ledger"
        for op, name, arch in sorted(known.keys() - compiled_now)
    ]


def sized_problems(path: Path) -> list[str]:
    """Return a message for each number of bytes or FLOPs and each predicted time above the one in the table ``path``.

    Times depend on the number of programs, too: with fewer, multiprocessors are idle. Sizes that only the table or only the code has
    are also reported.
    """
    known = {(r["op"], r["part"], r["size"]): r for r in read(path)}
    out = []
    for row in (s.row() for s in sizes()):
        where = f"{row['op']} {row['part']}, {row['size']}"
        before = known.pop((row["op"], row["part"], row["size"]), None)
        if before is None:
            out.append(f"{where}: not in {path}; run python -m comtip_kernels.ledger")
            continue
        for name in ("memory_mb", "loaded_mb", "gflop", *(f"predicted_us_{gpu}" for gpu in ROOFS)):
            if float(row[name]) > float(before[name]):
                out.append(f"{where}: {name} is {row[name]}, the table has {before[name]}")
    out += [f"{op} {part}, {size}: only in {path}; run python -m comtip_kernels.ledger" for op, part, size in known]
    return out


def write_sizes(path: Path) -> None:
    """Write the traffic and the predicted times of every named size."""
    rows = [s.row() for s in sizes()]
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        out.writeheader()
        out.writerows(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile and print the ledger, then write the tables, or with ``--check`` only compare them.

    Returns 1 if a row exceeds a limit or is worse than the committed one (even if it is then written), or if ``--check`` finds a
    named size that is worse; otherwise 0. If ``--triton`` names another release, returns the exit status of its run.
    """
    other = argparse.ArgumentParser(add_help=False)
    other.add_argument("--triton", help="compile with this release, e.g. 3.6, which pip installs in a cache folder")
    parser = argparse.ArgumentParser(prog="python -m comtip_kernels.ledger", description=__doc__, parents=[other])
    parser.add_argument(
        "--table", type=Path, default=Path("bench/ledger.csv"), help="ledger (default bench/ledger.csv)"
    )
    parser.add_argument(
        "--sizes", type=Path, default=Path("bench/traffic.csv"), help="traffic table (default bench/traffic.csv)"
    )
    parser.add_argument("--check", action="store_true", help="compare with the tables and do not write them")
    parser.add_argument("--all", action="store_true", help="also compile entries whose source hash is unchanged")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    args = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set and interpreted kernels cannot be compiled; unset it")
    import triton

    if args.triton and not f"{triton.__version__}.".startswith(f"{args.triton}."):
        return run_ledger(args.triton, other.parse_known_args(arguments)[1])

    kept = read(args.table)
    known = {(r["op"], r["name"], int(r["arch"])): r for r in kept if r["triton"] == triton.__version__}
    rows: list[LedgerRow] = []
    wrong = []
    for row in compiled({} if args.all else known, args.jobs):
        rows.append(row)
        if not args.check and row.source != known.get((row.op, row.name, row.arch), {}).get("source"):
            write(args.table, merged(rows, known), triton.__version__, kept)  # hours of compiling survive a stop
        wrong += problems(row, known.get((row.op, row.name, row.arch)))
        resources = f"{row.registers:>3} regs {row.stack:>4} B stack {row.shared_kib:>4} KiB"
        counts = f"{row.mma_count:>3} {row.mma:<7}{row.loads_128:>3} x 128 bit {row.async_copies:>3} async"
        print(f"{row.op:<10}{row.name:<32}sm_{row.arch:<4} {resources} {counts}", flush=True)
    wrong += dropped(rows, known) if args.check else []
    if args.check and not known:
        print(f"{args.table} has no rows of Triton {triton.__version__}; only spills and limits are checked")
    for sized in sizes():
        of = sized.row()
        print(
            f"{of['op']:<24}{of['part']:<9}{of['size']:<42}{of['memory_mb']:>9} MB, {of['memory_ratio']} x floor, {of['gflop']:>8} GFLOP"
        )
    wrong += sized_problems(args.sizes) if args.check else []
    for problem in wrong:
        print(f"WORSE  {problem}", file=sys.stderr)
    if wrong and args.check:
        print("Correct the kernels. To accept worse counts, run python -m comtip_kernels.ledger", file=sys.stderr)
    if not args.check:
        write(args.table, rows, triton.__version__, kept)
        write_sizes(args.sizes)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
