"""Annotation of a prediction: the requested genes, the species, and the provenance of the model."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from comtip_shards import SourceError
from comtip_shards.genes.identifiers import GeneResource
from comtip_shards.sections.facts import SectionFacts, stated
from comtip_shards.sections.section import cohort_of

from comtip_fast._version import __version__
from comtip_fast.inference.levels import GeneQuery
from comtip_fast.inference.predictor import Predictor

log = logging.getLogger("comtip_fast")
UNSCORED = (float("nan"), "")
"""Score of a gene that no run scored, and what it was scored on."""


def species_of(model: Predictor, known: str, what: str) -> str:
    """Return the stated species of a section or, if none is stated, the only species that the model was trained on.

    Parameters
    ----------
    model
        The model.
    known
        The stated species; empty if none is stated.
    what
        Subject of messages, e.g. ``section x1``.

    Raises
    ------
    SourceError
        The species is not stated, and the model was not trained on exactly one.
    """
    if known:
        return known
    trained = sorted({key.split(":")[0] for key in model.trained_genes})
    if len(trained) == 1:
        log.warning(
            "%s: the species is not stated; %s is assumed, the only species that the model was trained on; set `species` if this "
            "is wrong",
            what,
            trained[0],
        )
        return trained[0]
    raise SourceError(
        f"{what}: the species is not stated, and the model was trained on {' and '.join(trained)}; set `species`"
    )


def cohorts_of(model: Predictor, species: str, tissue: str, what: str) -> list[str]:
    """Return the cohorts whose heads of the readout predict a section, as in an evaluation.

    This is the section's own cohort. If it has no head, or the tissue is unknown, these are all cohorts of the species; the
    prediction is then the mean over their heads, and a warning is logged if there are several.

    Parameters
    ----------
    model
        The model.
    species
        ``human`` or ``mouse``.
    tissue
        The stated tissue; empty if it is unknown.
    what
        Subject of messages, e.g. ``section x1``.

    Returns
    -------
    list of str
        Names of cohorts, e.g. ``human_breast``; empty for a model without a readout, or without a head of the species.
    """
    heads = [] if model.bundle.readout is None else model.bundle.readout.heads
    found = [head.cohort for head in heads if any(key.startswith(f"{species}:") for key in head.keys)]
    own = cohort_of(species, tissue) if tissue else ""
    if own in found:
        return [own]
    if len(found) > 1:
        reason, fix = (
            (f"the model has no readout for {own}", "adapt the model to a section of this tissue to give it one")
            if own
            else ("the tissue is not stated", "set `tissue` to use one of them")
        )
        log.warning("%s: %s, so the prediction is the mean over those for %s; %s", what, reason, ", ".join(found), fix)
    return found


def single(cohorts: Sequence[str]) -> str | None:
    """Return the cohort of :func:`cohorts_of` if there is exactly one; otherwise None, which selects the mean over heads."""
    return cohorts[0] if len(cohorts) == 1 else None


def provenance(model: Predictor, species: str, facts: SectionFacts, cohorts: Sequence[str] = ()) -> dict[str, str]:
    """Return the entries of ``uns["comtip"]``.

    These are version, model, species, stated facts, lineage, licences, gene vectors, and the cohorts whose readout predicted the
    section (:func:`cohorts_of`).
    """
    lineage, vectors = model.lineage, model.vectors
    out = {"version": __version__, "model": model.config.name, "species": species, **stated(facts)}
    if cohorts:
        out["readout"] = "; ".join(cohorts)
    runs = " > ".join(lineage.labels())
    out["lineage"] = runs if lineage.parents_known else f"unknown > {runs}"
    out["training_licences"] = "; ".join(lineage.licences())
    if vectors is not None:
        out |= {"gene_vectors": vectors.sha256, "gene_vectors_licence": str(vectors.header.get("licence") or "")}
    return out


class _Asked(NamedTuple):
    """A gene to predict, and how its identifier was resolved."""

    gene: str
    key: str
    symbol: str
    ensembl: str
    name: str
    found_by: str


def gene_queries(model: Predictor, genes: Sequence[str] | None, species: str) -> tuple[pd.DataFrame, list[GeneQuery]]:
    """Resolve the genes to predict.

    Parameters
    ----------
    model
        The model.
    genes
        Symbols, Ensembl ids, previous symbols or aliases; None predicts all trained genes of the species.
    species
        ``human`` or ``mouse``.

    Returns
    -------
    var, queries
        ``var`` of the prediction, and the genes for :meth:`Predictor.predict`.

    Raises
    ------
    ValueError
        The list is empty, a gene is named more than once, or ``genes`` is None and the model has no trained gene of the species.
    """
    known = {g.key: g for g in model.bundle.genes}
    if genes is None:
        rows = [known[k] for k in model.trained_genes if not species or k.startswith(f"{species}:")]
        asked = [_Asked(g.symbol, g.key, g.symbol, g.ensembl, g.name, "model") for g in rows]
        if not asked:
            raise ValueError(f"the model has no trained genes of species {species}; name genes to predict with `genes`")
    else:
        asked = [_resolve(g, species) for g in genes]
    if not asked:
        raise ValueError(
            "`genes`: the list is empty; name genes to predict, or leave out `genes` to predict all trained genes"
        )
    scores = model.lineage.own.scores_with_origin()
    var = pd.DataFrame(
        {
            "key": [a.key for a in asked],
            "symbol": [a.symbol for a in asked],
            "ensembl": [a.ensembl for a in asked],
            "name": [a.name for a in asked],
            "found_by": [a.found_by for a in asked],
            "training": [model.training_of(a.key) for a in asked],
            "validation_pcc": np.array([scores.get(a.key, UNSCORED)[0] for a in asked], np.float64),
            "validation_on": [scores.get(a.key, UNSCORED)[1] for a in asked],
        },
        index=pd.Index(_distinct([a.gene for a in asked]), dtype=object),
    )
    return var, [GeneQuery(a.symbol, a.name, a.key) for a in asked]


def _resolve(gene: str, species: str) -> _Asked:
    """Resolve one identifier; a gene that is not in the table keeps its symbol, with a warning."""
    species = species or ("mouse" if gene.upper().startswith("ENSMUSG") else "human")
    hit = GeneResource.load().resolve(gene, species)
    if hit.how == "unmapped":
        log.warning(
            "gene %r: not in the table of %s genes, so the prediction uses the symbol alone; check the spelling",
            gene,
            species,
        )
    return _Asked(gene, hit.key, hit.symbol or gene, hit.ensembl, hit.name, hit.how)


def _distinct(names: list[str]) -> list[str]:
    """Return the names; raise ValueError if a name occurs twice."""
    duplicates = sorted(name for name, n in Counter(names).items() if n > 1)
    if duplicates:
        raise ValueError(f"duplicate genes: {', '.join(duplicates[:5])}; name each gene once")
    return [str(name) for name in names]
