"""Add measured expression to an AnnData of predicted expression, with scores per gene in ``var``."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import anndata as ad
import numpy as np

from comtip_fast.constants import LAYER_CP10K, LAYER_MEASURED_CP10K, LAYER_MEASURED_RAW, LAYER_RAW, UNS
from comtip_fast.data.expression.levels import log1p_cp10k
from comtip_fast.data.measured import MeasuredCounts
from comtip_fast.data.tile_sources import TileSource
from comtip_fast.evaluation.metrics import partial_pcc_per_gene
from comtip_fast.evaluation.train_reference import mean_colours
from comtip_fast.metrics import pcc_per_gene

log = logging.getLogger("comtip_fast")


def joined_with_measured(answer: ad.AnnData, measured: MeasuredCounts, tiles: TileSource) -> None:
    """Add measured layers and scores per gene to predicted expression, in place.

    The layers are ``measured_log1p_cp10k`` and ``measured_log1p_raw``; the columns of ``var`` are ``measured``,
    ``detection``, ``pcc``, ``pcc_partial`` and ``pcc_raw``. For genes that the section did not measure, ``measured`` is False
    and the layers and other columns are NaN; an undefined correlation is NaN too.

    Parameters
    ----------
    answer
        Result of :meth:`comtip_fast.api.Model.predict`; ``var["key"]`` has gene keys.
    measured
        Counts of the same spots, in the same order.
    tiles
        Tiles of the spots, read in chunks; their mean colour is regressed out in ``pcc_partial``.

    Raises
    ------
    ValueError
        The section measured none of the genes.
    """
    columns, found = measured.select(answer.var["key"].tolist())
    if not found.size:
        raise ValueError(
            f"the section measured none of the {answer.n_vars} genes to compare; pass `genes` that it measured, or call "
            "Model.predict, which compares nothing"
        )
    counts = measured.counts
    values = {
        LAYER_MEASURED_CP10K: log1p_cp10k(counts)[:, columns].toarray(),
        LAYER_MEASURED_RAW: np.log1p(counts[:, columns].toarray().astype(np.float64)),
    }
    for layer, part in values.items():
        answer.layers[layer] = np.full(answer.shape, np.nan, np.float32)
        answer.layers[layer][:, found] = part
    covariates = np.column_stack([mean_colours(tiles), np.log1p(np.asarray(counts.sum(axis=1)).ravel())])
    cp10k, predicted = values[LAYER_MEASURED_CP10K], np.asarray(answer.layers[LAYER_CP10K])[:, found]
    scores = {
        "detection": (cp10k > 0).mean(0),
        "pcc": pcc_per_gene(cp10k, predicted),
        "pcc_partial": partial_pcc_per_gene(cp10k, predicted, covariates),
        "pcc_raw": pcc_per_gene(values[LAYER_MEASURED_RAW], np.asarray(answer.layers[LAYER_RAW])[:, found]),
    }
    answer.var["measured"] = np.isin(np.arange(answer.n_vars), found)
    for name, part in scores.items():
        column = np.full(answer.n_vars, np.nan)
        column[found] = part
        answer.var[name] = column


def record_seen(answer: ad.AnnData, section_id: str, seen: Mapping[str, list[str] | None]) -> None:
    """Record in ``uns["comtip"]`` which runs learnt from a compared section or from its donor, and warn if any did.

    Parameters
    ----------
    answer
        Result of :meth:`comtip_fast.api.Model.predict`.
    section_id
        Name of the section in the warning.
    seen
        ``section_seen_by`` and ``donor_seen_by``: labels of runs; None if they are unknown.
    """
    answer.uns[UNS] |= {name: "unknown" if runs is None else "; ".join(runs) or "none" for name, runs in seen.items()}
    for what, runs in (("it", seen["section_seen_by"]), ("another section of its donor", seen["donor_seen_by"])):
        if runs:
            log.warning(
                "section %s: the model has learnt from %s (%s), so the scores of the comparison are not scores on new data; compare on "
                "a section of a donor that no run used",
                section_id,
                what,
                ", ".join(runs),
            )
            return
