"""Downstream tasks of ``comtip evaluate --tasks``: scores with intervals, chance levels, controls and baselines."""

from __future__ import annotations

from comtip_fast.evaluation.trained import METHODS

TASKS = {
    "probe": "linear probe: ridge from image features to expression, next to the zero-shot prediction",
    "retrieval": "image-to-gene and gene-to-image retrieval, within and across sections",
    "domains": "clusters of image features against labels of spots",
    "pairs": "discrimination of true from mispaired genes and values, given the image",
    "genes": "gene families, gene sets and orthologues in the space of gene sentences",
    "pathways": "measured and predicted scores of gene sets",
    **METHODS,
}
"""{task: description}."""
