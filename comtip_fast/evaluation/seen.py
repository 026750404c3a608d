"""Sections, donors and genes that a model has seen, in its own run or in a run that it started from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from comtip_shards import ShardSet
from comtip_shards.sections.duplicates import spot_hashes

from comtip_fast.export import vectors_record
from comtip_fast.inference import Predictor
from comtip_fast.inference.answers import cohorts_of
from comtip_fast.lineage import LEARNING, LineageSection, names_of_uses

log = logging.getLogger("comtip_fast")
GENE_SEEN = {
    "trained": "trained with image",
    "trained by a parent": "trained with image by a parent",
    "orthologue trained": "orthologue trained with image",
    "held out": "held out",
    "never seen": "name only",
}
"""{result of :meth:`comtip_fast.inference.Predictor.training_of`: value in the column ``seen`` of ``genes.csv``}."""
VECTOR_SEEN = "name and gene vector"
"""Value in the column ``seen`` for a gene with a gene vector that no run trained or held out."""


def choose_sections(predictor: Predictor, shards: ShardSet, section_ids: Sequence[str] | None) -> list[int]:
    """Return the numbers of the sections to score.

    These are the sections ``section_ids``. If ``section_ids`` is None, they are the sections of split ``test``, or all sections
    of a set without that split, except those that influenced the weights of the model or of a parent. A warning names the
    sections of split ``test`` that are left out.

    Raises
    ------
    ValueError
        A section is unknown, or training used all candidates.
    """
    if section_ids is not None:
        return [shards.section_number(s) for s in section_ids]
    sections = shards.manifest.sections
    used = [names_of_uses(uses, LEARNING) for uses in predictor.lineage.uses([LineageSection.of(s) for s in sections])]
    candidates = [i for i, s in enumerate(sections) if s.split == "test"] or list(range(len(sections)))
    rest = [i for i in candidates if not used[i]]
    left_out = [
        f"{sections[i].section_id} (by {', '.join(used[i])})"
        for i in candidates
        if used[i] and (sections[i].split == "test" or not rest)
    ]
    if not rest:
        raise ValueError(
            f"{shards.name}: no section is left to score, because training used {'; '.join(left_out)}; name sections with "
            "`sections` to score them anyway, labelled as seen in training"
        )
    if left_out:
        log.warning(
            "not scored, because training used them: %s; name them with `sections` to score them, labelled as seen in training",
            "; ".join(left_out),
        )
    return rest


def section_facts(predictor: Predictor, shards: ShardSet, number: int) -> dict[str, Any]:
    """Return the entries of ``metrics.json`` that state which heads predict a section, and which runs used it, its donor and its platform.

    ``donor_seen_in_training`` and ``platform_seen_in_training`` are None if it is unknown, see
    :meth:`comtip_fast.lineage.Lineage.runs_that_trained_on`.
    """
    meta = shards.manifest.sections[number]
    lineage = predictor.lineage
    (uses,) = lineage.uses([LineageSection.of(meta)])
    trained, stopped = names_of_uses(uses, ("train",)), names_of_uses(uses, ("val",))
    of_donor = lineage.runs_that_trained_on(meta.donor)
    donor = list(dict.fromkeys([*(of_donor or []), *trained]))
    platform = lineage.runs_that_trained_on_platform(meta.platform)
    return {
        "readout_heads": cohorts_of(predictor, meta.species, meta.tissue, f"section {meta.section_id}"),
        "platform": meta.platform,
        "platform_seen_in_training": None if platform is None else bool(platform),
        "platform_seen_by": platform or [],
        "in_gene_vectors": in_gene_vectors(predictor, shards, number),
        "donor": meta.donor,
        "donor_seen_in_training": None if of_donor is None and not donor else bool(donor),
        "donor_seen_by": donor,
        "section_seen_in_training": bool(trained),
        "section_seen_by": trained,
        "section_stopped_training": bool(stopped) and not trained,
        "section_stopped_by": stopped,
    }


def in_gene_vectors(predictor: Predictor, shards: ShardSet, number: int) -> bool | None:
    """Return whether the sources of the gene vectors of the model, or of those that were given, contain a section.

    The result is None if it is unknown, because a file has no hashes of cells. A warning is logged if they contain the section.
    """
    files = [v for v in (predictor.bundle.vectors, predictor.given_vectors) if v is not None]
    if not files:
        return False
    hashes = spot_hashes(shards.counts(shards.select(sections=[number])), [g.key for g in shards.genes])
    found = any_known([v.shares_cells(hashes) for v in files])
    if found:
        log.warning(
            "section %s: its spots are among the sources of the gene vectors, so the scores of genes that were not trained are not "
            "scores on new data; compute the vectors without this section and its donor",
            shards.manifest.sections[number].section_id,
        )
    return found


def readout_facts(predictor: Predictor) -> dict[str, Any] | None:
    """Return kind and weight of every head of the readout (:meth:`Readout.describe`); None for a model without one."""
    return None if predictor.bundle.readout is None else predictor.bundle.readout.describe()


def any_known(values: Sequence[bool | None]) -> bool | None:
    """Return whether any value is true; None if none is, but one is unknown."""
    return True if any(values) else None if None in values else False


def gene_seen(predictor: Predictor, key: str) -> str:
    """Return how the runs of the lineage used a gene, as the value of the column ``seen`` of ``genes.csv``.

    The result is :data:`VECTOR_SEEN` if no run trained or held out the gene, but there is a gene vector for it. Otherwise it is the
    value of :data:`GENE_SEEN` for the result of :meth:`comtip_fast.inference.Predictor.training_of`.
    """
    training = predictor.training_of(key)
    if training == "never seen" and predictor.has_vector(key):
        return VECTOR_SEEN
    return GENE_SEEN[training]


def lineage_facts(predictor: Predictor) -> dict[str, Any]:
    """Return the entry ``lineage`` of ``metrics.json``: all runs, whether the parents are known, gene vectors and licences.

    ``gene_vectors_given`` describes the gene vectors that were given to predict genes that were not trained; it is None without them.
    """
    lineage = predictor.lineage
    given = None if predictor.given_vectors is None else vectors_record(predictor.given_vectors)
    return {
        "runs": [
            {
                "run": label,
                "weights": run.weights,
                "shards": run.shards,
                "train": [s.section_id for s in run.sections if s.split == "train"],
                "val": [s.section_id for s in run.sections if s.split == "val"],
                "trained_genes": len(run.trained_genes),
                "gene_vectors": None if run.vectors is None else run.vectors.sha256,
                "validation": run.validation,
            }
            for label, run in zip(lineage.labels(), lineage.runs, strict=True)
        ],
        "parents_known": lineage.parents_known,
        "gene_vectors_given": None if given is None else {**asdict(given), "sources": list(given.sources)},
        "licences": sorted({*lineage.licences(), *([given.licence] if given is not None and given.licence else [])}),
    }
