"""Run downstream tasks on a model and write their rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from comtip_shards import ShardSet

from comtip_fast.evaluation.encoders import open_encoder
from comtip_fast.evaluation.feature_files import FeatureFiles
from comtip_fast.evaluation.seen import choose_sections, lineage_facts, readout_facts
from comtip_fast.evaluation.tasks import TASKS
from comtip_fast.evaluation.tasks.context import COLOUR, ENCODER, VECTOR, Encoders, TaskContext, TaskOptions
from comtip_fast.evaluation.tasks.expression import pathway_rows, probe_rows, trained_rows
from comtip_fast.evaluation.tasks.gene_sets import read_gmt
from comtip_fast.evaluation.tasks.labels import LabelFile
from comtip_fast.evaluation.tasks.rows import TaskRow, write_rows
from comtip_fast.evaluation.tasks.space import domain_rows, gene_rows, pair_rows, retrieval_rows
from comtip_fast.evaluation.train_reference import check_tiles, training_shards
from comtip_fast.evaluation.trained import EPOCHS, METHODS, TrainOptions
from comtip_fast.inference import Predictor
from comtip_fast.runtime.devices import pick_device
from comtip_fast.shards import ShardPaths

log = logging.getLogger("comtip_fast")
SCORERS: dict[str, Callable[[TaskContext], list[TaskRow]]] = {
    "probe": probe_rows,
    "retrieval": retrieval_rows,
    "domains": domain_rows,
    "pairs": pair_rows,
    "genes": gene_rows,
    "pathways": pathway_rows,
    **{name: partial(trained_rows, name=name) for name in METHODS},
}


def task_options(
    predictor: Predictor,
    *,
    encoders: Sequence[str] = (),
    gene_sets: Path | None = None,
    labels: str | None = None,
    n_bootstrap: int = 200,
    epochs: int = EPOCHS,
    folder: Path | None = None,
    seed: int = 0,
    genes: Sequence[str] | None = None,
) -> TaskOptions:
    """Open encoders, gene sets and labels, so that errors in them are raised before the evaluation; see :func:`evaluate_tasks`.

    Raises
    ------
    ValueError, FileNotFoundError, PermissionError
        A file or an encoder cannot be used, an encoder reads other tiles than the model, or the name of an encoder is used already.
    """
    opened: Encoders = {}
    for spec in encoders:
        encoder = open_encoder(spec, predictor.device, predictor.config.train.precision, seed)
        label = f"embeddings:{encoder.path.name}" if isinstance(encoder, FeatureFiles) else encoder.label
        if label in opened or label in (ENCODER, VECTOR, COLOUR):
            raise ValueError(f"`encoders` {spec}: {_clash(spec, label, encoders)}")
        geometry = None if isinstance(encoder, FeatureFiles) else encoder.geometry
        own = (predictor.tile_px, predictor.tile_um, predictor.min_mpp)
        if geometry is not None and (geometry.px, geometry.um, geometry.min_mpp) != own:
            raise ValueError(
                f"`encoders` {spec}: reads tiles of {geometry.um:.12g} um in {geometry.px} px with min_mpp "
                f"{geometry.min_mpp:.12g}, but the model reads {own[1]:.12g} um in {own[0]} px with min_mpp {own[2]:.12g}; "
                "leave it out, because only encoders that read the same tiles can be compared"
            )
        opened[label] = encoder
    return TaskOptions(
        encoders=opened,
        gene_sets={} if gene_sets is None else read_gmt(gene_sets),
        genes=None if genes is None else tuple(genes),
        labels=None if labels is None else LabelFile(labels),
        n_bootstrap=n_bootstrap,
        train=TrainOptions(epochs=epochs, folder=folder, seed=seed),
        seed=seed,
    )


def _clash(spec: str, label: str, encoders: Sequence[str]) -> str:
    """Return why an encoder cannot have its label in the tables of results, and what to do."""
    if spec == COLOUR:
        return f"{label} is scored already; leave it out"
    if list(encoders).count(spec) > 1:
        return "is named more than once; name it once"
    if label in (ENCODER, VECTOR, COLOUR):
        return f"an encoder of the task is called {label!r} too; rename the folder or file"
    return f"another encoder is called {label!r} too; leave one of them out, and score it in another call"


def run_tasks(
    tasks: Sequence[str],
    predictor: Predictor,
    shards: ShardSet,
    train_shards: ShardSet,
    options: TaskOptions,
    *,
    sections: Sequence[str] | None = None,
    out: Path | None = None,
) -> list[TaskRow]:
    """Score a model on downstream tasks.

    Parameters
    ----------
    tasks
        Names in :data:`comtip_fast.evaluation.tasks.TASKS`.
    predictor
        The trained model.
    shards, train_shards
        Shard sets with the sections to score, and with the training sections.
    options
        From :func:`task_options`.
    sections
        As in :func:`comtip_fast.evaluation.evaluate.evaluate`.
    out
        Folder for ``tasks.json`` and ``tasks.csv``; None writes nothing.

    Raises
    ------
    ValueError
        A task is unknown or lacks its gene sets, tiles have another size, a section is unknown, has ambiguous labels or lacks
        embeddings of a spot, a listed gene is unknown or listed twice, a section measured none of the listed genes, all sections were
        used in training, ``train_shards`` lacks the training sections of a scored cohort, or a method cannot be trained.
    FileNotFoundError
        A section has no embeddings, or the file of weights that a method starts from does not exist.
    """
    check_tasks(tasks, options)
    check_tiles(predictor, shards, train_shards)
    numbers = choose_sections(predictor, shards, sections)
    context = TaskContext(predictor, shards, numbers, train_shards, options)
    context.reference.check(shards.cohort_of_section(n) for n in numbers)
    rows: list[TaskRow] = []
    for task in tasks:
        log.info("task %s: %s", task, TASKS[task])
        rows += SCORERS[task](context)
    if out is not None:
        facts = {
            "run": predictor.config.name,
            "seed": options.seed,
            "bootstrap": options.n_bootstrap,
            "max_spots": options.max_spots,
            "sections": [shards.manifest.sections[n].section_id for n in numbers],
            "encoders": {
                k: {"kind": "embeddings"} if isinstance(e, FeatureFiles) else e.facts
                for k, e in options.encoders.items()
            },
            "trained_methods": {name: context.trained(name).facts for name in tasks if name in METHODS},
            "gene_list": None if options.genes is None else list(options.genes),
            "lineage": lineage_facts(predictor),
            "readout": readout_facts(predictor),
        }
        write_rows(rows, facts, out)
    return rows


def evaluate_tasks(
    run: Path | str,
    shards: Path | str,
    tasks: Sequence[str] = tuple(TASKS),
    out: Path | str | None = None,
    *,
    sections: Sequence[str] | None = None,
    train_shards: ShardPaths | None = None,
    gene_vectors: Path | str | None = None,
    genes: Sequence[str] | None = None,
    encoders: Sequence[str] = (),
    gene_sets: Path | str | None = None,
    labels: str | None = None,
    n_bootstrap: int = 200,
    epochs: int = EPOCHS,
    seed: int = 0,
    device: str = "auto",
) -> list[TaskRow]:
    """Score a run or an export on downstream tasks, from paths.

    Parameters
    ----------
    run, shards, sections, train_shards, gene_vectors, seed, device
        As in :func:`comtip_fast.evaluate`.
    tasks
        Names in :data:`comtip_fast.evaluation.tasks.TASKS`.
    out
        Existing folder for ``tasks.json`` and ``tasks.csv``; None writes nothing.
    genes
        Symbols or Ensembl ids. The first 50 that a section measured replace the 50 most variable genes in ``probe``, ``domains`` and the
        trained methods; those that no run trained replace the held-out genes of ``probe``. Other tasks do not use the list.
    encoders
        Further encoders to compare with, see :data:`comtip_fast.constants.ENCODER_HELP`.
    gene_sets
        GMT file, for ``pathways`` and ``genes``.
    labels
        Labels for ``domains``, see :class:`comtip_fast.evaluation.tasks.labels.LabelFile`; None uses the labels of the
        shard set.
    n_bootstrap
        Number of bootstrap draws for the intervals.
    epochs
        Largest number of passes over the training spots per learning rate, for the methods that are trained.

    Returns
    -------
    list
        The rows of ``tasks.csv``.

    Raises
    ------
    FileNotFoundError, PermissionError, ValueError
        The run, a shard set, a file, a name, an encoder or the device cannot be used, or :func:`run_tasks` raises an error.

    Examples
    --------
    >>> import comtip_fast
    >>> rows = comtip_fast.evaluate_tasks("run", "set", ["retrieval"], n_bootstrap=10, device="cpu")
    >>> rows[0].task, rows[0].metric, rows[0].n
    ('retrieval', 'image_to_gene_r1', 49)
    """
    predictor = Predictor.load(run, pick_device(device), gene_vectors)
    options = task_options(
        predictor,
        encoders=encoders,
        gene_sets=None if gene_sets is None else Path(gene_sets),
        labels=labels,
        n_bootstrap=n_bootstrap,
        epochs=epochs,
        folder=None if out is None else Path(out) / "trained",
        seed=seed,
        genes=genes,
    )
    train = training_shards(Path(run), predictor.config.data.shards, train_shards)
    folder = None if out is None else Path(out)
    return run_tasks(tasks, predictor, ShardSet(shards), train, options, sections=sections, out=folder)


def check_tasks(tasks: Sequence[str], options: TaskOptions) -> None:
    """Check the names of the tasks, the gene sets that they need, and the training options.

    Raises
    ------
    ValueError
        A task is unknown or lacks its gene sets, or the training options are wrong.
    """
    unknown = [t for t in tasks if t not in TASKS]
    if unknown:
        raise ValueError(f"`tasks` {', '.join(unknown)}: no such task; choose from {', '.join(TASKS)}")
    options.train.check()
    if "pathways" in tasks and not options.gene_sets:
        raise ValueError(
            "`tasks` pathways: needs gene sets, but none are given; give a GMT file with `gene_sets`, or leave pathways out"
        )
