"""``comtip embed RUN SECTION --out x.h5ad``."""

from __future__ import annotations

import argparse

from comtip_fast.cli.options import SECTION_HELP, add_device, add_facts, add_format, add_out, fresh_h5ad, read_facts
from comtip_fast.constants import OBSM_EMBEDDING


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("run_dir", metavar="RUN", help="folder of a finished run, or an export")
    parser.add_argument("section", metavar="SECTION", help=SECTION_HELP)
    add_out(parser, f"the .h5ad to write, with vectors in obsm[{OBSM_EMBEDDING!r}]")
    add_facts(parser)
    add_format(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Embed the section and write the result."""
    from comtip_fast.api import load
    from comtip_fast.data.h5ad import write_h5ad

    out = fresh_h5ad(args)
    facts, pooling, counts = read_facts(args)
    model = load(args.run_dir, args.device)
    answer = model.embed(args.section, facts=facts, pooling=pooling, counts=counts, fmt=args.format)
    write_h5ad(answer, out)
    rows, dim = answer.obsm[OBSM_EMBEDDING].shape
    print(f"{out}: obsm[{OBSM_EMBEDDING!r}] {rows} x {dim}")
    return 0
