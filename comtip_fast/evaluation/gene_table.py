"""Scores per gene (``genes.csv``), and the list of genes to score (``--genes``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from comtip_shards import ShardSet
from comtip_shards.genes.identifiers import GeneResource
from comtip_shards.storage.atomic import write_atomic

from comtip_fast.evaluation.metrics import partial_pcc_per_gene
from comtip_fast.evaluation.seen import gene_seen
from comtip_fast.evaluation.train_reference import Inputs
from comtip_fast.inference import Predictor
from comtip_fast.inference.answers import UNSCORED
from comtip_fast.metrics import pcc_per_gene
from comtip_fast.runtime.csv_text import csv_text

COLUMNS = (
    "section",
    "cohort",
    "gene",
    "ensembl",
    "key",
    "pcc",
    "pcc_partial",
    "pcc_raw",
    "null_p",
    "null_p_bh",
    "detection",
    "seen",
    "most_variable",
    "validation_pcc",
    "validation_on",
)
"""Columns of ``genes.csv``, see docs/results.md; each trained method adds a column ``pcc_NAME``."""


@dataclass
class ScoredGenes:
    """Genes to score in a section; ``hvg``, ``panel`` and ``unseen`` are indices into ``keys``, int64."""

    keys: list[str]
    hvg: np.ndarray
    """The (up to) 50 most variable genes; with a gene list, its first 50 genes."""
    panel: np.ndarray
    """The trained genes; with a gene list, all its genes."""
    unseen: np.ndarray
    """The held-out genes by decreasing variance; with a gene list, its genes that no run trained, in the order of the list."""
    hvg_from: str
    """Data on which the genes ``hvg`` were chosen: ``training sections``, ``evaluated section`` or ``gene list``."""
    not_measured: list[str]
    """Listed genes that the section did not measure."""


@dataclass
class ScoringInputs:
    """Inputs of the scores of one section: expression, covariates, and what the baselines and the null need."""

    cohort: str
    genes: ScoredGenes
    measured: dict[str, np.ndarray]
    """{normalisation: measured log1p expression (N, G)}."""
    predicted: dict[str, np.ndarray]
    """{normalisation: predicted log1p expression (N, G)}."""
    from_levels: dict[str, tuple[np.ndarray, np.ndarray]]
    """{normalisation: (PCC of the G genes, partial PCC of the genes ``genes.hvg``)} of the prediction from level sentences
    alone, without the readout."""
    covariates: np.ndarray
    """Mean colour and log total counts of each spot, float64 (N, 4)."""
    ridge_inputs: Inputs
    moved: np.ndarray
    """From :func:`comtip_fast.evaluation.nulls.moved_spots`."""
    null: np.ndarray
    """(n_draws, G), PCC of every gene under the null, CP10K; NaN where undefined."""
    trained: dict[str, np.ndarray] = field(default_factory=dict)
    """Predictions of the trained methods, CP10K (N, G)."""
    unseen_references: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Scores of :func:`comtip_fast.evaluation.unseen.unseen_references`."""
    baselines: dict[str, np.ndarray] = field(default_factory=dict)
    """Predictions of baselines and trained methods for ``genes.hvg``, CP10K (N, HVG), filled in during scoring."""
    unseen_baselines: dict[str, np.ndarray] = field(default_factory=dict)
    """Predictions of the mean map and of ridge regression for the first 50 of ``genes.unseen``, CP10K (N, H), filled in too."""


def gene_table(predictor: Predictor, shards: ShardSet, number: int, v: ScoringInputs) -> pd.DataFrame:
    """Return one row per gene of a section, with the columns :data:`COLUMNS` and ``pcc_NAME`` for each trained method.

    p-values are adjusted over the genes of the section.
    """
    keys, measured, predicted = v.genes.keys, v.measured["cp10k"], v.predicted["cp10k"]
    facts = {g.key: g for g in shards.genes}
    pcc = pcc_per_gene(measured, predicted)
    p = null_p_values(pcc, v.null)
    scores = predictor.lineage.own.scores_with_origin()
    table = pd.DataFrame(
        {
            "section": shards.manifest.sections[number].section_id,
            "cohort": v.cohort,
            "gene": [facts[k].symbol for k in keys],
            "ensembl": [facts[k].ensembl for k in keys],
            "key": keys,
            "pcc": pcc,
            "pcc_partial": partial_pcc_per_gene(measured, predicted, v.covariates),
            "pcc_raw": pcc_per_gene(v.measured["raw"], v.predicted["raw"]),
            "null_p": p,
            "null_p_bh": benjamini_hochberg(p),
            "detection": (measured > 0).mean(0),
            "seen": [gene_seen(predictor, k) for k in keys],
            "most_variable": np.isin(np.arange(len(keys)), v.genes.hvg).astype(int),
            "validation_pcc": np.array([scores.get(k, UNSCORED)[0] for k in keys], np.float64),
            "validation_on": [scores.get(k, UNSCORED)[1] for k in keys],
        }
    )
    for name, values in v.trained.items():
        table[f"pcc_{name}"] = pcc_per_gene(measured, values)
    return table[[*COLUMNS, *(f"pcc_{name}" for name in v.trained)]]


def null_p_values(pcc_G: np.ndarray, null_DG: np.ndarray) -> np.ndarray:
    """Return one-sided p-values of correlations under the spatial null.

    Parameters
    ----------
    pcc_G
        Correlation per gene; NaN where undefined.
    null_DG
        Correlation per draw and gene; a draw that is undefined for a gene is ignored.

    Returns
    -------
    ndarray
        float64 (G,), ``(1 + draws at or above the correlation) / (1 + draws)``; NaN where the correlation is undefined or
        there are no draws.
    """
    defined_DG = np.isfinite(null_DG)
    draws = defined_DG.sum(0)
    above = (np.where(defined_DG, null_DG, -np.inf) >= pcc_G).sum(0)
    return np.where(np.isfinite(pcc_G) & (draws > 0), (1 + above) / (1 + draws), np.nan)


def benjamini_hochberg(p_G: np.ndarray) -> np.ndarray:
    """Return p-values adjusted for the false discovery rate by Benjamini and Hochberg (1995); NaNs are not counted."""
    out = np.full(p_G.shape, np.nan)
    known = np.flatnonzero(np.isfinite(p_G))
    order = known[np.argsort(p_G[known], kind="stable")]
    scaled = p_G[order] * order.size / np.arange(1, order.size + 1)
    # The adjusted value of a gene is the smallest scaled value at or above its rank.
    out[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return out


def write_genes(table: pd.DataFrame, path: Path) -> None:
    """Write ``genes.csv`` with six significant digits; undefined values are left empty."""
    write_atomic(path, csv_text(table))


def resolve_list(genes: Sequence[str], shards: ShardSet, number: int) -> tuple[list[str], list[str]]:
    """Return (keys of the listed genes that a section measured, identifiers of the others), in the order of the list.

    Parameters
    ----------
    genes
        Symbols, Ensembl ids or previous symbols.
    shards, number
        The shard set and the number of the section.

    Raises
    ------
    ValueError
        The list is empty, an identifier is unknown in the section's species, two identifiers name the same gene, or the section
        measured none of the genes.
    """
    section = shards.manifest.sections[number]
    where = f"`genes`, section {section.section_id}"
    if not genes:
        raise ValueError("`genes`: the list is empty; name genes to score, or omit it")
    hits = {g: GeneResource.load().resolve(g, section.species) for g in genes}
    if len(hits) < len(genes):
        twice = [g for i, g in enumerate(genes) if g in genes[:i]]
        raise ValueError(f"{where}: {twice[0]} is listed more than once; name each gene once")
    present = {g.key for g in shards.genes}
    unknown = [g for g, hit in hits.items() if hit.how == "unmapped" and hit.key not in present]
    if unknown:
        raise ValueError(
            f"{where}: {len(unknown)} of {len(genes)} are not {section.species} genes ({', '.join(unknown[:5])}); give "
            "symbols or Ensembl ids of that species, or name sections of one species with `sections`"
        )
    first: dict[str, str] = {}
    for gene, hit in hits.items():
        if hit.key in first:
            raise ValueError(f"{where}: {first[hit.key]} and {gene} are the same gene ({hit.key}); name it once")
        first[hit.key] = gene
    measured = {g.key for g, m in zip(shards.genes, shards.measured(number), strict=True) if m}
    found = [key for key in first if key in measured]
    if not found:
        raise ValueError(
            f"{where}: the section measured none of the {len(genes)} genes; give genes that it measured, or other "
            "sections with `sections`"
        )
    return found, [gene for key, gene in first.items() if key not in measured]
