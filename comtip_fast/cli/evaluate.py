"""``comtip evaluate RUN --shards DIR --out DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path

from comtip_fast.cli.options import add_device, add_out, gene_list


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="folder of a finished run, or an export")
    parser.add_argument("--shards", required=True, help="shard set (folder or URL) with the sections to score")
    add_out(parser, "folder for metrics.json, genes.csv and report.html")
    parser.add_argument(
        "--sections",
        help="comma-separated section ids (default: split test; if it is empty, all sections not used for training)",
    )
    parser.add_argument(
        "--genes",
        nargs="+",
        default=["all"],
        help="score only these genes: symbols or Ensembl ids, or @FILE (default: the model's genes)",
    )
    parser.add_argument(
        "--train-shards",
        help="shard set with the training sections, for the ridge baselines (default: the folder in the run's config)",
    )
    parser.add_argument(
        "--gene-vectors", type=Path, help="file of `comtip genes vectors`, to predict genes that were not trained"
    )
    parser.add_argument("--null-draws", type=int, default=200, help="draws of the spatial null (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the nulls and baselines (default 0)")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate, write the files and print the summary table."""
    from comtip_fast.evaluation.evaluate import summary_table
    from comtip_fast.evaluation.run import evaluate_run

    sections = [s.strip() for s in args.sections.split(",") if s.strip()] if args.sections else None
    if sections == []:
        raise ValueError(f"--sections {args.sections!r} names no section; give section ids such as A1,B1")
    result = evaluate_run(
        args.run_dir,
        args.shards,
        args.out,
        sections=sections,
        train_shards=args.train_shards,
        gene_vectors=args.gene_vectors,
        genes=gene_list(args.genes),
        null_draws=args.null_draws,
        seed=args.seed,
        device=args.device,
    )
    print(summary_table(result.metrics))
    print(f"wrote {args.out / 'metrics.json'}, {args.out / 'genes.csv'} and {args.out / 'report.html'}")
    return 0
