"""Evaluate a run or an export: scores, baselines and the report, from paths."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from comtip_shards import ShardSet

from comtip_fast.evaluation.evaluate import Evaluation, evaluate, write_metrics
from comtip_fast.evaluation.gene_table import write_genes
from comtip_fast.evaluation.report import write_report
from comtip_fast.evaluation.train_reference import training_shards
from comtip_fast.evaluation.trained import EPOCHS, TrainOptions
from comtip_fast.inference import Predictor
from comtip_fast.runtime.devices import pick_device
from comtip_fast.shards import ShardPaths


def evaluate_run(
    run: Path | str,
    shards: Path | str,
    out: Path | str | None = None,
    *,
    sections: Sequence[str] | None = None,
    train_shards: ShardPaths | None = None,
    gene_vectors: Path | str | None = None,
    genes: Sequence[str] | None = None,
    null_draws: int = 200,
    trained: Sequence[str] = (),
    epochs: int = EPOCHS,
    seed: int = 0,
    device: str = "auto",
) -> Evaluation:
    """Score a model on sections, with nulls and baselines.

    Parameters
    ----------
    run
        A run folder or an export.
    shards
        Shard set (folder or URL) with the sections to score; its tiles have the model's size.
    out
        Folder for ``metrics.json``, ``genes.csv`` and ``report.html``; ``None`` writes nothing.
    sections
        Section ids. Default: the sections of split ``test``, or all sections of a set without that split, except those that
        training used.
    train_shards
        One or several shard sets with the training sections, on which the 50 most variable genes are chosen and the baselines
        and other methods are trained. Default: the shard sets that the run's config names.
    gene_vectors
        File of gene vectors (``comtip genes vectors``), with which genes that were not trained are predicted.
    genes
        Symbols or Ensembl ids of the genes to score, so that models with different training genes are compared on the same
        genes. Default: the model's genes.
    null_draws
        Number of draws of the spatial null; 0 computes none.
    trained
        Methods to train on the training sections and to score: names in :data:`comtip_fast.evaluation.trained.METHODS`. With
        ``out``, their checkpoints are kept in ``out/trained``, and a call after an interruption resumes from them.
    epochs
        Largest number of passes over the training spots, per learning rate of a method.
    seed
        Seed of the null and of the trained methods.
    device
        ``auto``, ``cpu`` or ``cuda``.

    Returns
    -------
    Evaluation
        ``metrics`` (the content of ``metrics.json``), ``gene_table()`` (the content of ``genes.csv``) and the arrays behind them.

    Raises
    ------
    FileNotFoundError
        The export, the gene vectors, a shard set, or the file of weights that a method starts from does not exist.
    ValueError
        A section, gene, method or device is unknown; ``null_draws`` is negative; ``epochs`` is below 1; the export, the gene
        vectors or a shard set cannot be used; all sections were used in training; a section measured none of the genes; tiles
        have another size; the training sections of an evaluated cohort are missing; the run's config names the training shard
        set only by a URL; or a method cannot be trained or was stopped by a signal.
    NotADirectoryError, PermissionError
        ``out`` is a file, or cannot be written.

    Examples
    --------
    >>> import comtip_fast
    >>> scores = comtip_fast.evaluate("run", "set", "scores", null_draws=5, device="cpu")
    >>> sorted(scores.metrics["cohorts"])
    ['human_breast']
    """
    options = TrainOptions(tuple(trained), epochs, None if out is None else Path(out) / "trained", seed)
    options.check()
    if null_draws < 0:
        raise ValueError(f"`null_draws` {null_draws}: must be at least 0 (0: no spatial null)")
    if out is not None:
        _check_writable(Path(out))  # before the slow work
    predictor = Predictor.load(run, pick_device(device), gene_vectors)
    train = training_shards(Path(run), predictor.config.data.shards, train_shards)
    result = evaluate(
        predictor,
        ShardSet(shards),
        sections=sections,
        train_shards=train,
        genes=genes,
        seed=seed,
        n_null=null_draws,
        train=options,
    )
    if out is not None:
        _write_results(Path(run), result, Path(out))
    return result


def _write_results(run: Path, result: Evaluation, folder: Path) -> None:
    """Write ``metrics.json``, ``genes.csv`` and ``report.html``, with the loss curves if ``run`` is a run folder."""
    write_metrics(result.metrics, folder / "metrics.json")
    write_genes(result.gene_table(), folder / "genes.csv")
    write_report(run if (run / "metrics.jsonl").is_file() else None, result, folder / "report.html")


def _check_writable(folder: Path) -> None:
    """Create the folder; raise NotADirectoryError if it is a file, and PermissionError if it cannot be written."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"`out` {folder}: is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(
            f"`out` {folder}: the folder cannot be written; change its permissions, or give another folder"
        )
