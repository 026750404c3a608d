"""``comtip evaluate RUN --shards DIR --out DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path

from comtip_fast.cli.options import add_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="a run folder or an export")
    parser.add_argument("--shards", required=True, help="shard set (folder or URL) with the sections to score")
    add_out(parser, "folder for metrics.json and report.html")
    parser.add_argument("--sections", help="section ids with commas (default: split test, else all not trained on)")
    parser.add_argument("--train-shards",
                        help="shard set with the training sections, for the ridge baselines (default: the run's own)")  # fmt: skip
    parser.add_argument("--null-draws", type=int, default=200, help="draws of the spatial null (default 200)")
    parser.add_argument("--seed", type=int, default=0)


def _own_shards(run_dir: Path, stated: str) -> str:
    """Return where the run's shards are: as its config says, or inside a run folder that was moved."""
    from comtip_shards.storage.remote import is_url

    inside = run_dir / Path(stated).name
    here = is_url(stated) or (Path(stated) / "manifest.json").is_file()
    return stated if here or not (inside / "manifest.json").is_file() else str(inside)


def run(args: argparse.Namespace) -> int:
    """Score, write both files and print the table."""
    from comtip_shards import ShardSet
    from comtip_shards.storage.remote import is_url

    from comtip_fast.evaluation.evaluate import evaluate, summary_table, write_metrics
    from comtip_fast.evaluation.report import write_report
    from comtip_fast.inference import Predictor

    predictor = Predictor.load(args.run_dir)
    shards = ShardSet(args.shards)
    train = args.train_shards or _own_shards(args.run_dir, predictor.config.data.shards)
    if not is_url(train) and not (Path(train) / "manifest.json").is_file():
        raise FileNotFoundError(
            f"{train} holds no shard set: the ridge baselines train on the model's own training sections; "
            "give them with --train-shards"
        )
    sections = [s.strip() for s in args.sections.split(",") if s.strip()] if args.sections else None
    result = evaluate(
        predictor,
        shards,
        sections=sections,
        train_shards=ShardSet(train),
        seed=args.seed,
        n_null=args.null_draws,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    write_metrics(result.metrics, args.out / "metrics.json")
    log_dir = args.run_dir if (args.run_dir / "metrics.jsonl").is_file() else None
    write_report(log_dir, result, args.out / "report.html")
    print(summary_table(result.metrics))
    print(f"wrote {args.out / 'metrics.json'} and {args.out / 'report.html'}")
    return 0
