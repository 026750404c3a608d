"""``python -m testkit.rehearsal``: run the walks of every config, compile new kernel variants, and write the tables.

``--check`` compiles nothing and fails if a count is above the committed one, a kernel variant is not in the ledger or spills
registers, or a product is slow (:func:`slow_products`). A count below the committed one passes, with a message that states how
to commit it as the new limit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import triton
from comtip_kernels.ledger.__main__ import main as ledger_main
from comtip_kernels.ledger.__main__ import parsed, read
from comtip_kernels.ledger.entries import entries

from testkit.rehearsal.costs import SENT_KINDS
from testkit.rehearsal.graphs import Rows, changed_rules, read_rules, write_rules
from testkit.rehearsal.grid import walks
from testkit.rehearsal.record import ROOT
from testkit.rehearsal.table import (
    Walked,
    missing_rows,
    read_table,
    slow_products,
    table,
    walk_all,
    write_launches,
    write_table,
)

TABLE, LEDGER, GRAPH_RULES = (ROOT / "bench" / name for name in ("rehearsal.csv", "ledger.csv", "graph_rules.csv"))
NOT_ABOVE = (
    "operators",
    "launches",
    "variants",
    "waits",
    "data_shapes",
    "uploads",
    "uploads_mb",
    "pageable_mb",
    "spills",
    *(column for kind in SENT_KINDS for column in (kind, f"{kind}_mb")),
    "gflop",
    "gflop_own",
    "moved_gb",
    "saved_mb",
)
"""Columns that must not increase: what a GPU launches, computes, moves and stores, and what ranks send."""


def keys_of_ci() -> set[tuple[str, str, str]]:
    """Return the keys (config, ranks, walk) of the rows that the table must have."""
    return {(w.config, str(w.ranks), w.name) for w in walks()}


def key_of(row: dict[str, str]) -> tuple[str, str, str]:
    """Return the key of a row of the table."""
    return row["config"], row["ranks"], row["walk"]


def share_of(row: dict[str, str]) -> float:
    """Return the WGMMA share of a row; 0 for a walk that launches no product of this package."""
    return 0.0 if row["hgmma_share"] == "-" else float(row["hgmma_share"])


def worse(rows: list[dict[str, str]], before: list[dict[str, str]]) -> list[str]:
    """Return a message for each count above, or WGMMA share below, the committed one.

    Walks of CI without a committed row, and committed rows that CI does not walk, are reported, too.
    """
    required = keys_of_ci()
    known = {(r["config"], r["ranks"], r["walk"]): r for r in before}
    out = []
    for row in rows:
        where = f"{row['config']}, ranks {row['ranks']}, {row['walk']}"
        key = (row["config"], row["ranks"], row["walk"])
        old = known.get(key)
        if old is None:
            # Walks that only --all runs have no row; their variants, spills and waits are checked, but not their other counts.
            out += [f"{where}: not in {TABLE.name}; run python -m testkit.rehearsal"] if key in required else []
            continue
        out += [f"{where}: {n} is {row[n]}, the table has {old[n]}" for n in NOT_ABOVE if float(row[n]) > float(old[n])]
        if share_of(row) < share_of(old):
            out.append(f"{where}: hgmma_share is {row['hgmma_share']}, the table has {old['hgmma_share']}")
    out += [
        f"{config}, ranks {ranks}, {walk}: only in {TABLE.name}, CI does not walk it; run python -m testkit.rehearsal"
        for config, ranks, walk in sorted(known.keys() - required)
    ]
    return out


def better(rows: list[dict[str, str]], before: list[dict[str, str]]) -> list[str]:
    """Return a message for each count that is below the committed one."""
    known = {(r["config"], r["ranks"], r["walk"]): r for r in before}
    out = []
    for row in rows:
        old = known.get((row["config"], row["ranks"], row["walk"]), row)
        fewer = [n for n in NOT_ABOVE if float(row[n]) < float(old[n])]
        where = f"{row['config']}, ranks {row['ranks']}, {row['walk']}"
        out += [f"{where}: {n} is {row[n]}, the table has {old[n]}" for n in fewer]
    return out


def steps_that_wait(rows: list[dict[str, str]]) -> list[str]:
    """Return a message for each step that logs nothing and has a host wait, or an upload other than its pinned batch.

    The walks of ``--all`` have no committed counts, but these hold for every step.
    """
    wanted = {"waits": "0", "data_shapes": "0", "uploads": "1", "pageable_mb": "0.0"}
    steps = [row for row in rows if row["walk"].split()[0] == "step"]
    return [
        f"{row['config']}, ranks {row['ranks']}, {row['walk']}: {name} is {row[name]}, a step must have {value}"
        for row in steps
        for name, value in wanted.items()
        if row[name] != value
    ]


def graph_rules(walked: list[Walked]) -> tuple[Rows, Rows]:
    """Return what the rules of CUDA graphs found in walks of CI, and the committed rows of these walks."""
    required = keys_of_ci()
    walks_of = {(w.walk.config, str(w.walk.ranks), w.walk.name) for w in walked} & required
    found = {key: n for w in walked for key, n in w.graph_rules.items() if key[:3] in walks_of}
    return found, {key: n for key, n in read_rules(GRAPH_RULES).items() if key[:3] in walks_of}


def ledger_rows() -> tuple[dict, dict]:
    """Return the ledger's rows for the installed Triton, and {signature: (operation, name)} of all entries."""
    rows = [r for r in read(LEDGER) if r["triton"] == triton.__version__]
    by_name = {(r["op"], r["name"], int(r["arch"])): parsed(r) for r in rows}
    return by_name, {e.signature: (e.op, e.name) for e in entries()}


def show(one: Walked) -> None:
    """Print the counts of a walk, and its findings on CUDA graphs, waits and uploads with their code lines."""
    print(f"\n{one.walk.config}, ranks {one.walk.ranks}, {one.walk.name}, {one.seconds:.0f} s: {one.counts}")
    for key, n in one.graph_rules.items():
        print(f"  graphs {n:>4} x {key[3]}: {key[5]}: {key[4]}")
    for what, where, n in one.waits:
        print(f"  wait   {n:>4} x {what}: {where}")
    for where, size, pinned, blocking in one.uploads:
        kind = f"{'pinned' if pinned else 'pageable'}{', blocking' if blocking else ''}"
        print(f"  upload {size:>12,} B {kind}: {where}", flush=True)


def main() -> int:
    """Run the chosen walks, print them, and write or check the tables; return 1 if there is a problem."""
    parser = argparse.ArgumentParser(prog="python -m testkit.rehearsal", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="compare with the committed table and ledger; write nothing"
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="run every combination of engine, loss form, micro-batches and checkpointing, and inference, of every config",
    )
    parser.add_argument("--only", default="", help="run only the walks of this config; nothing is written")
    parser.add_argument(
        "--part", action="append", default=[], help="run only the walks of this part (repeatable); other rows are kept"
    )
    parser.add_argument("--jobs", type=int, default=2, help="number of processes (default 2)")
    args = parser.parse_args()
    chosen = [w for w in walks(args.all) if args.only in ("", w.config) and (not args.part or w.part in args.part)]
    walked = []
    for one in walk_all(chosen, args.jobs):
        show(one)
        walked.append(one)
    if not args.check and not args.only:
        write_launches(walked, keep=bool(args.part) or not args.all)  # only all walks show that a variant is not used
        sys.argv = [
            "ledger",
            "--table",
            str(LEDGER),
            "--sizes",
            str(ROOT / "bench/traffic.csv"),
            "--jobs",
            str(args.jobs),
        ]
        ledger_main()  # it prints its own problems; spills are also reported as problems of a walk
    rows, names = ledger_rows()
    out = table(walked, rows, names)
    problems = [*missing_rows(walked, rows, names), *slow_products(walked, rows, names), *steps_that_wait(out)]
    lower: list[str] = []
    if args.check:
        problems += worse(out, read_table(TABLE))
        lower = better(out, read_table(TABLE))
        above, below = changed_rules(*graph_rules(walked))
        problems, lower = problems + above, lower + below
    elif not args.only:
        found, known_rules = graph_rules(walked)
        others = {key: n for key, n in read_rules(GRAPH_RULES).items() if args.part and key not in known_rules}
        write_rules(GRAPH_RULES, others | found)
        known = {key_of(r): r for r in read_table(TABLE)} if args.part else {}
        known |= {key_of(r): r for r in out}
        kept = [r for key, r in known.items() if key in keys_of_ci()]
        write_table(Path(TABLE), sorted(kept, key=lambda r: (r["config"], int(r["ranks"]), r["walk"])))
    for row in out:
        print(row)
    for line in lower:
        print(f"BETTER {line}")
    if lower and not problems:
        print(f"run python -m testkit.rehearsal to write the better counts to {TABLE.relative_to(ROOT)}, and commit it")
    for problem in problems:
        print(f"WRONG  {problem}", file=sys.stderr)
    if problems and args.check:
        print("Correct the code. To accept higher counts, run python -m testkit.rehearsal", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
