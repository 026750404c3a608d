"""What a model has seen: sections, donors and genes, over its own run and all runs that it started from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from comtip_shards import ShardSet

from comtip_fast.inference import Predictor
from comtip_fast.lineage import LEARNING, LineageSection, names_of_uses

log = logging.getLogger("comtip_fast")
GENE_SEEN = {
    "trained": "trained with image",
    "trained by a parent": "trained with image by a parent",
    "held out": "held out",
    "never seen": "name only",
}
"""Column ``seen`` of ``genes.csv``, by :meth:`comtip_fast.inference.Predictor.training_of`."""
VECTOR_SEEN = "name and gene vector"
"""Column ``seen`` of a gene that no run trained or held out, but for which there is a gene vector."""


def choose_sections(predictor: Predictor, shards: ShardSet, section_ids: Sequence[str] | None) -> list[int]:
    """Return section numbers: the given ones, otherwise split ``test``, otherwise all that training did not use.

    Without ``section_ids``, sections that influenced the weights of the model or of a parent are left out with a warning.

    Raises
    ------
    ValueError
        A section is unknown, or training used all sections.
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
            f"{shards.path}: training used every section: {'; '.join(left_out)}; name those to score with --sections, and "
            "their scores are labelled as seen in training"
        )
    if left_out:
        log.warning(
            "not scored, because training used them: %s; name them with --sections to score them as seen in training",
            "; ".join(left_out),
        )
    return rest


def section_facts(predictor: Predictor, shards: ShardSet, number: int) -> dict[str, Any]:
    """Return what ``metrics.json`` records of how a section and its donor were used, with the labels of the runs."""
    meta = shards.manifest.sections[number]
    lineage = predictor.lineage
    (uses,) = lineage.uses([LineageSection.of(meta)])
    trained, stopped = names_of_uses(uses, ("train",)), names_of_uses(uses, ("val",))
    donor = list(dict.fromkeys([*lineage.runs_that_trained_on(meta.donor), *trained]))
    return {
        "donor": meta.donor,
        "donor_seen_in_training": bool(donor),
        "donor_seen_by": donor,
        "section_seen_in_training": bool(trained),
        "section_seen_by": trained,
        "section_stopped_training": bool(stopped) and not trained,
        "section_stopped_by": stopped,
    }


def gene_seen(predictor: Predictor, key: str) -> str:
    """Return how a gene was seen in training, see :data:`GENE_SEEN`."""
    training = predictor.training_of(key)
    if training == "never seen" and predictor.has_vector(key):
        return VECTOR_SEEN
    return GENE_SEEN[training]


def lineage_facts(predictor: Predictor) -> dict[str, Any]:
    """Return what ``metrics.json`` records of the runs behind the model."""
    lineage = predictor.lineage
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
        "licences": lineage.licences(),
    }
