"""``comtip predict RUN SECTION --genes ... --out x.h5ad``."""

from __future__ import annotations

import argparse

from comtip_fast.cli.options import SECTION_HELP, add_device, add_facts, add_out, fresh_h5ad, gene_list, read_facts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("run_dir", metavar="RUN", help="folder of a finished run, or an export")
    parser.add_argument("section", metavar="SECTION", help=SECTION_HELP)
    parser.add_argument(
        "--genes", nargs="+", default=["all"], help="symbols or Ensembl ids, @FILE, or all trained genes (default all)"
    )
    parser.add_argument("--gene-vectors", help="file of `comtip genes vectors`, to predict genes that were not trained")
    add_out(parser, "the .h5ad to write")
    add_facts(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Predict expression and write the result."""
    from comtip_fast.api import load
    from comtip_fast.data.h5ad import write_h5ad

    out = fresh_h5ad(args)
    facts, pooling, counts = read_facts(args)
    model = load(args.run_dir, args.device, args.gene_vectors)
    answer = model.predict(args.section, gene_list(args.genes), facts=facts, pooling=pooling, counts=counts)
    write_h5ad(answer, out)
    seen = answer.var["training"].value_counts().to_dict()
    origins = ", ".join(f"{n} {k}" for k, n in seen.items())
    print(f"{out}: {answer.n_obs} spots x {answer.n_vars} genes ({origins})")
    return 0
