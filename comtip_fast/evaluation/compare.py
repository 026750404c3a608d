"""Add measured expression to an AnnData of predicted expression, with scores per gene in ``var``."""

from __future__ import annotations

import anndata as ad
import numpy as np

from comtip_fast.constants import LAYER_CP10K, LAYER_MEASURED_CP10K, LAYER_MEASURED_RAW, LAYER_RAW
from comtip_fast.data.expression.levels import log1p_cp10k
from comtip_fast.data.measured import MeasuredCounts
from comtip_fast.data.tile_sources import TileSource
from comtip_fast.evaluation.metrics import partial_pcc_per_gene
from comtip_fast.evaluation.train_reference import mean_colours
from comtip_fast.metrics import pcc_per_gene


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
