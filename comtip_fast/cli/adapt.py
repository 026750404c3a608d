"""``comtip adapt RUN SECTION --out DIR``: adapt a model to a section, and compare it with the unadapted model on other spots."""

from __future__ import annotations

import argparse
from pathlib import Path

from comtip_fast.cli.options import (
    SECTION_HELP,
    add_device,
    add_facts,
    add_format,
    add_out,
    at_least,
    out_folder,
    read_facts,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``comtip adapt``."""
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="folder of a finished run, or an export")
    parser.add_argument("section", metavar="SECTION", help=f"section with counts: {SECTION_HELP}")
    add_out(parser, "folder to write: export/, adaptation.json, adaptation.csv and spots.csv")
    parser.add_argument(
        "--fraction", type=float, default=1.0, help="share of the spots to adapt to, chosen in blocks (default 1: all)"
    )
    parser.add_argument(
        "--splits",
        type=at_least(1),
        default=5,
        help="number of random choices of blocks for the comparison (default 5)",
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the blocks (default 0)")
    add_facts(parser)
    add_format(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Adapt, write the files and print the comparison."""
    from comtip_fast.api import adapt

    facts, pooling, counts = read_facts(args)
    result = adapt(
        args.run_dir,
        args.section,
        out_folder(args),
        fraction=args.fraction,
        splits=args.splits,
        facts=facts,
        pooling=pooling,
        counts=counts,
        fmt=args.fmt,
        seed=args.seed,
        device=args.device,
    )
    first = result.table.iloc[0]
    print(
        f"mean PCC on the test spots of {args.splits} splits (in the first, {first.fit_spots} spots are fitted and {first.test_spots} tested)"
    )
    print(result.summary().to_string(index=False, float_format="{:.3f}".format))
    print(
        f"{args.out / 'export'}: adapted to {result.facts['adapted_spots']} spots of {result.facts['section']['section_id']}"
    )
    return 0
