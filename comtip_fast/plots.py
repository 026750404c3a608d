"""Figures and tables for notebooks, the same as those of the report of ``comtip evaluate``.

:func:`maps`, :func:`pcc_distribution`, :func:`calibration`, :func:`clusters` and :func:`ranked_genes` take the AnnData of
:meth:`comtip_fast.Model.compare`, :func:`scores` an evaluation. Figures are ``matplotlib.figure.Figure`` that are not attached to a
window; notebooks display them, and ``savefig`` writes them.

Shapes: N spots, G genes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from comtip_shards.sources.anndata_parts.picture import library_names
from matplotlib.figure import Figure

from comtip_fast.constants import LAYER_CP10K, LAYER_MEASURED_CP10K
from comtip_fast.drawing import (
    ACCENT,
    INK,
    calibration_table,
    draw_groups,
    draw_histogram,
    draw_maps,
    draw_scores,
    plain,
    style_axis,
)
from comtip_fast.evaluation.evaluate import Evaluation
from comtip_fast.evaluation.report import charts, summaries
from comtip_fast.evaluation.tasks.domains import is_labelled
from comtip_fast.metrics import pcc_per_gene

OF_SCORES = ("section", "predictor", "mean_pcc", "low", "high")


def maps(adata: ad.AnnData, genes: str | Sequence[str]) -> Figure:
    """Draw the H&E image and the measured, predicted and residual map of genes, one row per gene.

    Parameters
    ----------
    adata
        Result of :meth:`comtip_fast.Model.compare`, with positions and an image.
    genes
        Names in ``adata.var_names``.

    Returns
    -------
    Figure
        Measured and predicted maps of a gene share one colour scale, from the 1st to the 99th percentile of both.

    Raises
    ------
    ValueError
        ``genes`` is empty, a gene is not in ``adata`` or was not measured, or there is no measured layer, position or image.

    Examples
    --------
    >>> import comtip_fast
    >>> from comtip_fast import plots
    >>> joined = comtip_fast.load("run").compare("set:x1", ["ERBB2", "CD74"])
    >>> len(plots.maps(joined, "ERBB2").axes)
    6
    """
    names = [genes] if isinstance(genes, str) else list(genes)
    if not names:
        raise ValueError("`genes`: the list is empty; name at least one gene of adata.var_names")
    measured, predicted = _layers(adata, names)
    pcc = pcc_per_gene(measured, predicted)
    image, per_px, diameter, mpp = _picture(adata)
    rows = [(g, measured[:, i], predicted[:, i], float(pcc[i])) for i, g in enumerate(names)]
    return draw_maps(image, np.asarray(adata.obsm["spatial"], float) * per_px, diameter * per_px, mpp, rows)


def pcc_distribution(adata: ad.AnnData) -> Figure:
    """Draw a histogram of the PCC of the measured genes, and mark the mean and the best, median and worst gene.

    An undefined PCC counts as 0.

    Parameters
    ----------
    adata
        Result of :meth:`comtip_fast.Model.compare`.

    Raises
    ------
    ValueError
        There is no measured layer, or no gene was measured.

    Examples
    --------
    >>> import comtip_fast
    >>> from comtip_fast import plots
    >>> joined = comtip_fast.load("run").compare("set:x1", ["ERBB2", "CD74"])
    >>> plots.pcc_distribution(joined).axes[0].get_xlabel()
    'PCC of one gene'
    """
    names = _measured_genes(adata)
    pcc = pcc_per_gene(*_layers(adata, names))
    figure = draw_histogram(pcc, np.zeros((0, len(names))), f"{len(names)} genes, {adata.n_obs} spots")
    order = np.argsort(np.nan_to_num(pcc), kind="stable")
    axis = figure.axes[0]
    top = axis.get_ylim()[1]
    marked = {int(order[-1]): "best", int(order[len(order) // 2]): "median", int(order[0]): "worst"}
    for height, (i, what) in zip((0.55, 0.7, 0.85), marked.items(), strict=False):
        x = float(np.nan_to_num(pcc[i]))
        axis.plot([x, x], [0, height * top], color=INK, lw=0.8, ls=":")
        text = f"{what}: {plain(names[i])} {x:.2f}"
        axis.text(x, height * top, text, fontsize=7.5, color=INK, ha="center", parse_math=False)
    return figure


def calibration(adata: ad.AnnData) -> Figure:
    """Draw mean measured against mean predicted expression, by level of the prediction.

    Parameters
    ----------
    adata
        Result of :meth:`comtip_fast.Model.compare`.

    Returns
    -------
    Figure
        The points of :func:`calibration_table`; the dotted line is perfect calibration.

    Raises
    ------
    ValueError
        There is no measured layer, or no gene was measured.

    Examples
    --------
    >>> import comtip_fast
    >>> from comtip_fast import plots
    >>> joined = comtip_fast.load("run").compare("set:x1", ["ERBB2", "CD74"])
    >>> plots.calibration(joined).axes[0].get_xlabel()
    'mean predicted (log1p CP10K)'
    """
    table = calibration_table(*_layers(adata, _measured_genes(adata)))
    figure = Figure(figsize=(3.6, 3.2), layout="constrained")
    axis = figure.subplots()
    x, y = table["predicted"].to_numpy(), table["measured"].to_numpy()
    limit = [min(0.0, x.min(), y.min()), max(x.max(), y.max()) * 1.05 + 1e-6]
    axis.plot(limit, limit, color=INK, lw=1, ls=":", label="perfect calibration")
    spread = table["measured_sd"].to_numpy()
    axis.fill_between(x, y - spread, y + spread, color=ACCENT, alpha=0.15, lw=0, label="± 1 SD of measured")
    axis.plot(x, y, "-o", color=ACCENT, ms=4, label="measured")
    axis.legend(fontsize=7.5, frameon=False)
    style_axis(axis, "", "mean predicted (log1p CP10K)", "mean measured (log1p CP10K)")
    return figure


def clusters(adata: ad.AnnData, labels: str | Sequence[str], seed: int = 0) -> Figure:
    """Draw the labels of the spots next to clusters of their measured and predicted expression.

    Principal components of the standardised measured genes are clustered by k-means, with as many clusters as labels. A cluster has
    the colour of the label that it is matched to. The titles have the adjusted Rand index (ARI) with the labels: 0 is chance, 1
    identity.

    Parameters
    ----------
    adata
        Result of :meth:`comtip_fast.Model.compare`, with positions and an image.
    labels
        Column of ``adata.obs``, or one label per spot. Spots with an empty label, or one such as ``unknown``, are left out.
    seed
        Seed of the clustering.

    Raises
    ------
    ValueError
        There is no such column, the number of labels differs from that of the spots, fewer than 30 spots have a label, there are
        fewer than 2 or more than 20 labels, or there is no measured layer, measured gene, position or image.

    Examples
    --------
    >>> import comtip_fast
    >>> from comtip_fast import plots
    >>> joined = comtip_fast.load("run").compare("set:x1", ["ERBB2", "CD74"])
    >>> left = joined.obsm["spatial"][:, 0] < joined.obsm["spatial"][:, 0].mean()
    >>> len(plots.clusters(joined, ["left" if side else "right" for side in left]).axes)
    3
    """
    label = _labels(adata, labels)
    image, per_px, diameter, _ = _picture(adata)
    found = summaries.clusters_and_labels(label, *_layers(adata, _measured_genes(adata)), seed)
    if found is None:
        known = label[is_labelled(label)]
        raise ValueError(
            f"`labels`: {known.size} spots have one of {np.unique(known).size} labels; give at least {summaries.MIN_LABELLED} spots with "
            f"2 to {summaries.MAX_CLUSTERS} labels"
        )
    table, agreement = found
    names, code = np.unique(table["label"].to_numpy(str), return_inverse=True)
    panels = [("labels", code)]
    for name in ("measured", "predicted"):
        ari = round(agreement[name]["ari"], 2) + 0.0  # no -0.00
        panels.append((f"clusters of {name}, ARI {ari:.2f}", table[name].to_numpy() - 1))
    spots = np.asarray(adata.obsm["spatial"], float)[table["row"].to_numpy()] * per_px
    return draw_groups(image, spots, diameter * per_px, names.tolist(), panels)


def scores(result: Evaluation | pd.DataFrame) -> Figure:
    """Draw the mean PCC of the model, the baselines and the trained methods over the 50 most variable genes, with intervals.

    Parameters
    ----------
    result
        Result of :func:`comtip_fast.evaluate`, or the table ``intervals.csv`` that it writes.

    Returns
    -------
    Figure
        One panel per section, and another one for its unseen genes, if it has scores for them; then those of the mean over the sections
        of a cohort, if it has several. Lines are 95 % bootstrap intervals: over spatial blocks of a section, which needs at least 5 of
        them, or over the sections.

    Raises
    ------
    ValueError
        The table has no rows, or lacks a column of ``intervals.csv``.

    Examples
    --------
    >>> import pandas as pd
    >>> from comtip_fast import plots
    >>> plots.scores(pd.read_csv("scores/intervals.csv")).axes[0].get_title(loc="left")
    'x1'
    """
    table = result if isinstance(result, pd.DataFrame) else _intervals(result)
    missing = [name for name in OF_SCORES if name not in table.columns]
    if missing or not len(table):
        what = f"no column {missing[0]!r}" if missing else "no rows"
        raise ValueError(f"the table of scores has {what}; pass intervals.csv, or the result of comtip_fast.evaluate")
    panels = [
        (str(section), own[rows], names, genes)
        for section, own in table.groupby("section", sort=False)
        for rows, names, genes in (
            (~own.predictor.isin(charts.UNSEEN_NAMES), charts.NAMES, "50 most variable genes"),
            (own.predictor.isin(charts.UNSEEN_NAMES), charts.UNSEEN_NAMES, "unseen genes (up to 50)"),
        )
        if rows.any()
    ]
    heights = [len(own) for _, own, _, _ in panels]
    figure = Figure(figsize=(5.4, 0.34 * sum(heights) + 0.9 * len(heights)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(panels), 1, height_ratios=heights))
    for axis, (section, own, names, genes) in zip(axes, panels, strict=True):
        rows = own[["predictor", "mean_pcc", "low", "high"]].itertuples(index=False)
        draw_scores(section, [(names.get(name, name), *numbers) for name, *numbers in rows], axis, genes)
    return figure


def _intervals(result: Evaluation) -> pd.DataFrame:
    """Return the table ``intervals.csv`` of an evaluation; without rows if no section has a gene to show."""
    parts = summaries.all_intervals([(data.cohort, summaries.intervals(data)) for data in result.sections])
    return pd.concat(parts) if parts else pd.DataFrame(columns=list(OF_SCORES))


def ranked_genes(adata: ad.AnnData, n: int = summaries.RANKED) -> pd.DataFrame:
    """Return the best, median and worst predicted of the measured genes by PCC; an undefined PCC counts as 0.

    Parameters
    ----------
    adata
        Result of :meth:`comtip_fast.Model.compare`.
    n
        Number of genes of each kind.

    Returns
    -------
    DataFrame
        Indexed by gene, best first: ``rank`` (``Best``, ``Median`` or ``Worst``; ``All genes`` if there are at most 3 ``n``), ``pcc``
        (NaN where undefined), and the columns ``pcc_partial``, ``detection``, ``training`` and ``validation_pcc`` of ``adata.var``.

    Raises
    ------
    ValueError
        ``n`` is less than 1, there is no measured layer, or no gene was measured.

    Examples
    --------
    >>> import comtip_fast
    >>> from comtip_fast import plots
    >>> joined = comtip_fast.load("run").compare("set:x1")
    >>> plots.ranked_genes(joined, n=2)["rank"].tolist()
    ['Best', 'Best', 'Median', 'Median', 'Worst', 'Worst']
    """
    if n < 1:
        raise ValueError(f"n is {n}; give a number of genes of at least 1")
    names = _measured_genes(adata)
    pcc = pcc_per_gene(*_layers(adata, names))
    kinds = summaries.ranked_genes(pcc, n)
    order = np.concatenate([found for _, found in kinds])
    rank = [title for title, found in kinds for _ in found]
    table = pd.DataFrame({"rank": rank, "pcc": pcc[order]}, index=pd.Index([names[i] for i in order], name="gene"))
    columns = [c for c in ("pcc_partial", "detection", "training", "validation_pcc") if c in adata.var]
    return table.join(adata.var[columns])


def _labels(adata: ad.AnnData, labels: str | Sequence[str]) -> np.ndarray:
    """Return one label per spot, as strings (N,)."""
    if isinstance(labels, str):
        if labels not in adata.obs:
            raise ValueError(f"`labels` {labels!r}: no such column of adata.obs; choose one of {', '.join(adata.obs)}")
        return np.array(adata.obs[labels].astype(str))
    if len(labels) != adata.n_obs:
        raise ValueError(f"`labels`: {len(labels)} labels for {adata.n_obs} spots; give one label per spot")
    return np.array([str(v) for v in labels])


def _measured_genes(adata: ad.AnnData) -> list[str]:
    """Return the names of the genes that the section measured; raise ValueError if there are none."""
    _check_layers(adata)
    known = np.isfinite(np.asarray(adata.layers[LAYER_MEASURED_CP10K])).all(0)
    if not known.any():
        raise ValueError("the AnnData has no measured gene; pass genes that the section measured to Model.compare")
    return [str(g) for g in adata.var_names[known]]


def _check_layers(adata: ad.AnnData) -> None:
    """Raise ValueError if the layer of predicted or of measured expression is missing."""
    missing = [layer for layer in (LAYER_CP10K, LAYER_MEASURED_CP10K) if layer not in adata.layers]
    if missing:
        raise ValueError(f"the AnnData has no layer {missing[0]!r}; pass the result of Model.compare")


def _layers(adata: ad.AnnData, genes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return measured and predicted log1p CP10K of genes, float64 (N, G)."""
    _check_layers(adata)
    unknown = [g for g in genes if g not in adata.var_names]
    if unknown:
        raise ValueError(f"gene {unknown[0]!r} is not in the AnnData; choose genes from adata.var_names")
    columns = [adata.var_names.get_loc(g) for g in genes]
    measured = np.asarray(adata.layers[LAYER_MEASURED_CP10K], np.float64)[:, columns]
    if not np.isfinite(measured).all():
        bad = genes[int(np.flatnonzero(~np.isfinite(measured).all(0))[0])]
        raise ValueError(
            f"gene {bad!r} was not measured in this section; choose genes for which adata.var['measured'] is true"
        )
    return measured, np.asarray(adata.layers[LAYER_CP10K], np.float64)[:, columns]


def _picture(adata: ad.AnnData) -> tuple[np.ndarray, float, float, float]:
    """Return the image, the factor from positions to image px, the spot diameter in the unit of positions, and um per image px.

    Without the scale factor ``microns_per_pixel``, the unit of positions counts as 1 um.
    """
    if "spatial" not in adata.obsm:
        raise ValueError(
            "the AnnData has no positions (obsm['spatial']); pass the result of Model.compare for a section with positions"
        )
    spatial = adata.uns.get("spatial", {})
    library: Mapping[str, Any] = next((spatial[name] for name in library_names(spatial)), {})
    image, factors = library.get("images", {}).get("hires"), library.get("scalefactors", {})
    lacking = [name for name in ("tissue_hires_scalef", "spot_diameter_fullres") if name not in factors]
    if image is None or lacking:
        what = "no hires image" if image is None else f"no scale factor {lacking[0]}"
        raise ValueError(
            f"the AnnData has {what} in uns['spatial']; pass the result for a section with a hires image and its scale"
        )
    per_px = float(factors["tissue_hires_scalef"])
    mpp = float(factors.get("microns_per_pixel", 1.0)) / per_px
    pixels = np.asarray(image)[..., :3]
    pixels = pixels if pixels.dtype == np.uint8 else np.clip(np.asarray(pixels, float) * 255, 0, 255).astype(np.uint8)
    return pixels, per_px, float(factors["spot_diameter_fullres"]), mpp
