"""All measurements of scale, one after the other: makes the synthetic sets and prints every table, in one or several checkouts.

    PYTHONPATH=.:kernels:data_shards python bench/scale/every.py --list
    PYTHONPATH=.:kernels:data_shards python bench/scale/every.py --work SETS [--only order genes] [--checkouts ../before .]

Each part is a command that can be run alone; it is printed before its table. The sets are built once, with the first checkout, and used
by all: 1.5 M spots take 8.7 GB in ``--work``, 5 M spots 1 GB more. With two checkouts, a part runs in one and then in the other, so
that both meet the same machine. A part that fails does not end the others; the exit code is then 1. On a machine that does other work,
compare CPU seconds, memory and counts, and not seconds. ``collectives`` also writes ``bench/train/fsdp2.csv`` of the checkout.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CODE = ("", "kernels", "data_shards")
"""Folders of a checkout that Python imports from."""


@dataclass(frozen=True)
class Part:
    """A measurement."""

    name: str
    shows: str
    commands: tuple[str, ...]
    """Arguments of Python; ``{work}`` is replaced by the folder of the sets."""
    sets: tuple[str, ...] = ()
    """Names of the sets that it reads."""


_BUILD = "bench/scale/start.py build --out {work}/"
SETS = {
    "m1": f"{_BUILD}m1 --spots 1500000 --sections 1100 --genes 20000",
    "small": f"{_BUILD}small --spots 3000 --sections 20 --genes 20000",
    "base": f"{_BUILD}base --spots 100000 --sections 70 --genes 20000",
    "m5": "bench/scale/repeat.py {work}/base --times 50 --out {work}/m5",
    "tiles": f"{_BUILD}tiles --spots 4000 --sections 20 --genes 20000 --px 224 --grain 15",
}
"""Command that writes each set, in an order in which no set needs a later one."""
_COMTIP = "-c 'import sys; from comtip_fast.cli import main; sys.exit(main())'"
_PLAN = f"{_COMTIP} plan --config configs/multinode_h100.yaml --gpu h100 --gpus 8 --nodes 8"
PARTS = (
    Part(
        "start",
        "seconds, bytes read and peak memory up to the first batch, 1.5 M and 5 M spots",
        ("bench/scale/start.py measure {work}/m1", "bench/scale/start.py measure {work}/m5"),
        ("m1", "base", "m5"),
    ),
    Part(
        "first-step",
        "seconds and peak memory up to the first step on two ranks, 1.5 M spots",
        ("bench/scale/start.py first-step {work}/m1 {work}/small",),
        ("m1", "small"),
    ),
    Part("order", "seconds and memory of an epoch's order, 1.5 M to 100 M spots", ("bench/scale/order.py",)),
    Part("fetch", "tars of a rank-step, bytes fetched by a node, 1.5 M to 20 M spots", ("bench/scale/fetch.py",)),
    Part("genes", "genes that pass against sections, 1 to 1,000", ("bench/scale/genes.py",)),
    Part("validation", "seconds and memory of a validation", ("bench/scale/validation.py --set vision.stem=pixels",)),
    Part("checkpoint", "memory of saving and resuming", ("bench/scale/sharded_checkpoint.py --millions 50",)),
    Part("feeding", "a busy step next to a loader, tiles/s", ("bench/loader/feeding.py {work}/tiles",), ("tiles",)),
    Part("collectives", "bytes of a step by kind of collective, by engine", ("bench/train/fsdp2.py",)),
    Part("plan", "what `comtip plan` predicts for the multi-node config", (_PLAN,)),
)


def built(name: str, work: Path, checkout: Path) -> None:
    """Write a set unless it is complete."""
    if (work / name / "manifest.json").is_file():
        return
    work.mkdir(parents=True, exist_ok=True)
    if run(SETS[name], work, checkout):
        raise RuntimeError(f"{work / name}: this set could not be built; see the output above")


def run(command: str, work: Path, checkout: Path) -> int:
    """Print a command and run it in a checkout; return its exit code."""
    print(f"\n$ python {command.format(work=work)}    # in {checkout}", flush=True)
    words = [word.format(work=work) for word in shlex.split(command)]
    path = os.pathsep.join(str(checkout / folder) for folder in CODE)
    return subprocess.run(
        [sys.executable, *words], check=False, cwd=checkout, env=os.environ | {"PYTHONPATH": path}
    ).returncode


def measure(parts: Sequence[Part], work: Path, checkouts: Sequence[Path]) -> list[str]:
    """Run parts in every checkout, and return the names of those that failed."""
    failed = []
    for part in parts:
        print(f"\n## {part.name}: {part.shows}", flush=True)
        try:
            for name in SETS:
                if name in part.sets:
                    built(name, work, checkouts[0])
        except RuntimeError as error:
            print(error, file=sys.stderr)
            failed.append(part.name)
            continue
        codes = [run(command, work, checkout) for command in part.commands for checkout in checkouts]
        if any(codes):
            failed.append(part.name)
    return failed


def main() -> None:
    """Run the selected parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the parts and their commands")
    parser.add_argument("--work", type=Path, default=Path("sets"), help="folder of the synthetic sets (default sets)")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="parts to run (default all)")
    parser.add_argument("--checkouts", nargs="+", type=Path, default=[Path()], help="checkouts to run in (default .)")
    args = parser.parse_args()
    parts = [part for part in PARTS if not args.only or part.name in args.only]
    if args.list:
        for part in parts:
            print(f"{part.name}: {part.shows}", *(f"    python {c}" for c in part.commands), sep="\n")
        return
    failed = measure(parts, args.work.resolve(), [checkout.resolve() for checkout in args.checkouts])
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
