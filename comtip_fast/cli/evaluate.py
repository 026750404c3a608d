"""``comtip evaluate RUN --shards DIR --out DIR``: score a model on held-out sections, with nulls and baselines."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from comtip_fast.cli.options import add_device, add_out, at_least, gene_list, names_in, out_folder, refuse_unused
from comtip_fast.constants import ENCODER_HELP
from comtip_fast.evaluation.tasks import TASKS
from comtip_fast.evaluation.trained import EPOCHS, METHODS

if TYPE_CHECKING:
    from comtip_fast.evaluation.evaluate import Evaluation
    from comtip_fast.evaluation.tasks.context import TaskOptions

OPTION_USERS = {
    "--encoder": ("probe", "domains", "pathways"),
    "--gene-sets": ("pathways", "genes"),
    "--labels": ("domains",),
    "--epochs": tuple(METHODS),
}
"""Tasks that use an option."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``comtip evaluate``."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="folder of a finished run, or an export")
    parser.add_argument("--shards", required=True, help="shard set (folder or URL) with the sections to score")
    add_out(parser, "folder for metrics.json, genes.csv and report.html")
    parser.add_argument(
        "--sections",
        help="comma-separated section ids (default: the sections of split test, or all sections of a set without that split; "
        "sections that training used are left out)",
    )
    parser.add_argument(
        "--genes",
        nargs="+",
        default=["all"],
        help="score only these genes, also in the tasks that score the 50 most variable genes: symbols, Ensembl ids or @FILE; all "
        "(default) scores the model's genes",
    )
    parser.add_argument(
        "--train-shards",
        action="append",
        help="shard set with the training sections, for the ridge baselines; repeat it for a run on several sets (default: "
        "the sets in the run's config)",
    )
    parser.add_argument(
        "--gene-vectors", type=Path, help="file of `comtip genes vectors`, to predict genes that were not trained"
    )
    parser.add_argument(
        "--null-draws", type=at_least(0), default=200, help="draws of the spatial null (default 200; 0: none)"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the nulls and baselines (default 0)")
    _add_tasks(parser)
    add_device(parser)


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    """Add the options of the downstream tasks."""
    group = parser.add_argument_group("downstream tasks, written to tasks.json and tasks.csv")
    group.add_argument(
        "--tasks",
        nargs="+",
        choices=("all", *TASKS),
        default=[],
        help="; ".join(f"{name}: {text}" for name, text in TASKS.items()) + "; all: every task whose inputs are given",
    )
    group.add_argument(
        "--encoder", dest="encoders", nargs="+", default=[], metavar="ENCODER", help=f"compare with: {ENCODER_HELP}"
    )
    group.add_argument("--gene-sets", type=Path, metavar="FILE", help="gene sets in GMT format, for pathways and genes")
    group.add_argument(
        "--labels",
        metavar="FILE",
        help="labels for domains: a .csv or .tsv with the columns section, spot and label, or FILE.h5ad:COLUMN (default: "
        "the labels in the shard set)",
    )
    group.add_argument(
        "--bootstrap",
        dest="n_bootstrap",
        type=at_least(0),
        help="number of bootstrap draws for the 95 %% intervals (default 200; 0: none)",
    )
    group.add_argument(
        "--epochs",
        type=at_least(1),
        help=f"largest number of passes over the training spots, per learning rate, for {', '.join(METHODS)} (default {EPOCHS})",
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate, write the files and print the summary table; with ``--tasks``, also run the downstream tasks."""
    from comtip_fast.evaluation.run import evaluate_run
    from comtip_fast.evaluation.summary import summary_table

    sections = None if args.sections is None else names_in("--sections", [args.sections])
    names = tasks_of(args.tasks, args.gene_sets)
    genes = gene_list(args.genes)
    out_folder(args)
    options = _task_options(args, names, genes)  # before the slow work
    result = evaluate_run(
        args.run_dir,
        args.shards,
        args.out,
        sections=sections,
        train_shards=args.train_shards,
        gene_vectors=args.gene_vectors,
        genes=genes,
        null_draws=args.null_draws,
        trained=[name for name in names if name in METHODS],
        epochs=EPOCHS if args.epochs is None else args.epochs,
        seed=args.seed,
        device=args.device,
    )
    print(summary_table(result.metrics))
    print(f"wrote {args.out / 'metrics.json'}, {args.out / 'genes.csv'} and {args.out / 'report.html'}")
    if options is not None:
        _run_tasks(args, names, result, options, sections)
    return 0


def tasks_of(given: list[str], gene_sets: Path | None) -> list[str]:
    """Return the tasks to run, each once; ``all`` is every task, without ``pathways`` if there are no gene sets."""
    if "all" in given:
        return [t for t in TASKS if t != "pathways" or gene_sets is not None]
    return list(dict.fromkeys(given))


def _task_options(args: argparse.Namespace, names: list[str], genes: list[str] | None) -> TaskOptions | None:
    """Open the files and encoders of the tasks, and return the options of the tasks; None without tasks.

    Raises
    ------
    ValueError
        An option is given without a task that uses it, or its value cannot be used.
    FileNotFoundError
        A file of the tasks does not exist.
    """
    given = {
        "--encoder": args.encoders,
        "--gene-sets": args.gene_sets,
        "--labels": args.labels,
        "--bootstrap": args.n_bootstrap,
        "--epochs": args.epochs,
    }
    if not names:
        refuse_unused(given, "used by downstream tasks only, which are selected with --tasks")
        return None
    for option, users in OPTION_USERS.items():
        if not set(users) & set(names):
            refuse_unused({option: given[option]}, f"used by --tasks {', '.join(users)}")
    from comtip_fast.evaluation.tasks.run import check_tasks, task_options
    from comtip_fast.inference import Predictor
    from comtip_fast.runtime.devices import pick_device

    n_bootstrap = 200 if args.n_bootstrap is None else args.n_bootstrap
    options = task_options(
        Predictor.load(args.run_dir, pick_device(args.device)),
        encoders=args.encoders,
        gene_sets=args.gene_sets,
        labels=args.labels,
        n_bootstrap=n_bootstrap,
        epochs=EPOCHS if args.epochs is None else args.epochs,
        seed=args.seed,
        genes=genes,
    )
    check_tasks(names, options)
    return options


def _run_tasks(
    args: argparse.Namespace, names: list[str], result: Evaluation, options: TaskOptions, sections: list[str] | None
) -> None:
    """Run the downstream tasks, write their rows to ``--out`` and print them."""
    from comtip_fast.evaluation.tasks.rows import table
    from comtip_fast.evaluation.tasks.run import run_tasks
    from comtip_fast.evaluation.train_reference import training_shards

    train = training_shards(args.run_dir, result.predictor.config.data.shards, args.train_shards)
    options = replace(options, trained={method.name: method for method in result.trained})
    rows = run_tasks(names, result.predictor, result.shards, train, options, sections=sections, out=args.out)
    print(table(rows))
    print(f"wrote {args.out / 'tasks.json'} and {args.out / 'tasks.csv'}")
