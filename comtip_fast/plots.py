"""Figures of measured and predicted expression, from the AnnData of :meth:`comtip_fast.Model.compare`.

:func:`maps`, :func:`pcc_distribution`, :func:`calibration` and the ``draw_*`` functions return a
``matplotlib.figure.Figure`` that is not attached to a window; notebooks display it, and ``savefig`` writes it. The report of
``comtip evaluate`` uses the same functions.

Shapes: N spots, G genes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import anndata as ad
import matplotlib as mpl
import numpy as np
import pandas as pd
from comtip_shards.sources.anndata_parts.picture import library_names
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure

from comtip_fast.constants import LAYER_CP10K, LAYER_MEASURED_CP10K
from comtip_fast.metrics import pcc_per_gene

INK, GRID, ACCENT, GREY = "#22303c", "#d9dee3", "#0b6e8f", "#b8c0c8"
EXPRESSION_MAP, RESIDUAL_MAP = "viridis", "RdBu_r"
RESIDUAL_LIMIT = 3.0
"""Residuals are drawn from minus to plus this many standard deviations."""
MAX_LABEL = 80
LEVELS = 10
"""Largest number of groups of predictions in the calibration."""


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


def calibration_table(measured_NG: np.ndarray, predicted_NG: np.ndarray, levels: int = LEVELS) -> pd.DataFrame:
    """Return mean measured and predicted expression by level of the prediction.

    All pairs (spot, gene) are sorted by their predicted value and divided into ``levels`` groups of nearly equal size;
    equal predictions are not separated.

    Parameters
    ----------
    measured_NG, predicted_NG
        Expression (N, G).
    levels
        Largest number of groups.

    Returns
    -------
    DataFrame
        One row per group, ascending: ``level`` (from 1), ``n``, ``predicted`` and ``measured`` (means) and ``measured_sd``.

    Raises
    ------
    ValueError
        The shapes differ, or the arrays are empty.
    """
    measured, predicted = np.asarray(measured_NG, np.float64), np.asarray(predicted_NG, np.float64)
    if measured.shape != predicted.shape or not measured.size:
        raise ValueError(
            f"calibration: measured has shape {measured.shape}, predicted {predicted.shape}; pass two arrays of the same, non-empty shape"
        )
    m, p = measured.ravel(), predicted.ravel()
    edges = np.unique(np.quantile(p, np.linspace(0, 1, levels + 1)[1:-1]))
    group = np.unique(np.searchsorted(edges, p, side="right"), return_inverse=True)[1]
    n = np.bincount(group)
    mean_m, mean_p = np.bincount(group, m) / n, np.bincount(group, p) / n
    spread = np.sqrt(np.maximum(np.bincount(group, m**2) / n - mean_m**2, 0))
    return pd.DataFrame(
        {"level": np.arange(1, n.size + 1), "n": n, "predicted": mean_p, "measured": mean_m, "measured_sd": spread}
    )


def calibration_slope(measured_NG: np.ndarray, predicted_NG: np.ndarray) -> np.ndarray:
    """Return, for each gene, the slope of the regression of measured on predicted expression over N spots, float64 (G,).

    The slope is 1 if a difference between two predictions comes, on average, with an equal difference in measured expression, below
    1 if predictions vary too much, above 1 if they vary too little, and NaN where the prediction is constant.
    """
    m, p = np.asarray(measured_NG, np.float64), np.asarray(predicted_NG, np.float64)
    p = p - p.mean(0)
    power = (p**2).sum(0)
    defined = power > 1e-12 * np.maximum((np.asarray(predicted_NG, np.float64) ** 2).sum(0), 1e-300)
    slope: np.ndarray = np.where(defined, ((m - m.mean(0)) * p).sum(0) / np.where(defined, power, 1.0), np.nan)
    return slope


def residual_map(measured_N: np.ndarray, predicted_N: np.ndarray) -> np.ndarray:
    """Return the standardised measured map minus the standardised predicted map, float64 (N,); a constant map counts as 0."""

    def z(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x, np.float64) - np.mean(x)
        deviation = float(x.std())
        return x / deviation if deviation > 1e-12 else x * 0

    out: np.ndarray = z(measured_N) - z(predicted_N)
    return out


# -- drawing on arrays --------------------------------------------------------------------------------------


def draw_maps(
    image: np.ndarray,
    spots_N2: np.ndarray,
    spot_px: float,
    mpp: float,
    genes: Sequence[tuple[str, np.ndarray, np.ndarray, float]],
) -> Figure:
    """Draw one row per gene: image, measured, predicted and residual map.

    Parameters
    ----------
    image
        RGB (H, W, 3), uint8.
    spots_N2
        Spot centres (N, 2), x and y in px of the image.
    spot_px, mpp
        Diameter of a spot in px of the image, and um per px of the image.
    genes
        Tuples (label, measured (N,), predicted (N,), PCC).
    """
    pad = 3 * spot_px
    left, top = np.maximum(spots_N2.min(0) - pad, 0)
    right, bottom = np.minimum(spots_N2.max(0) + pad, image.shape[1::-1])
    width = 2.9
    height = width * (bottom - top) / (right - left)
    figure = Figure(figsize=(width * 4 + 1.4, (height + 0.36) * len(genes)), layout="constrained")
    axes = np.atleast_2d(figure.subplots(len(genes), 4))
    grey = image.astype(np.float32).mean(2, keepdims=True).repeat(3, 2) / 255 * 0.35 + 0.65
    for row, (label, measured, predicted, pcc) in zip(axes, genes, strict=True):
        low, high = np.percentile(np.concatenate([measured, predicted]), [1, 99])
        shared, limit = (low, max(high, low + 1e-6)), RESIDUAL_LIMIT
        score = f"PCC {pcc:.2f}" if np.isfinite(pcc) else "PCC undefined"
        panels: list[tuple[str, np.ndarray | None, tuple[float, float], str]] = [
            (f"{label}   {score}", None, shared, ""),
            ("measured", measured, shared, EXPRESSION_MAP),
            ("predicted", predicted, shared, EXPRESSION_MAP),
            ("residual, SD", residual_map(measured, predicted), (-limit, limit), RESIDUAL_MAP),
        ]
        for axis, (title, values, limits, colours) in zip(row, panels, strict=True):
            axis.imshow(image if values is None else grey, interpolation="bilinear")
            axis.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])
            weight = "bold" if values is None else "normal"
            axis.set_title(plain(title), fontsize=9, color=INK, loc="left", parse_math=False, fontweight=weight)
            for side in axis.spines.values():
                side.set_color(GRID)
            if values is None:
                _scale_bar(axis, mpp, (left, right, top, bottom))
                continue
            marks = _draw_spots(axis, spots_N2, 1.15 * spot_px, values, limits, colours)
            if title != "measured":
                bar = figure.colorbar(marks, ax=axis, fraction=0.05, pad=0.02)
                bar.ax.tick_params(labelsize=7)
                bar.outline.set_visible(False)
    return figure


def draw_histogram(pcc_G: np.ndarray, null_DG: np.ndarray, title: str) -> Figure:
    """Draw histograms of the PCC per gene, for the model (G,) and the null (draws, G); an undefined PCC counts as 0."""
    figure = Figure(figsize=(5.4, 2.5), layout="constrained")
    axis = figure.subplots()
    bins = np.linspace(-0.6, 1, 49)
    chance, values = np.nan_to_num(null_DG.ravel()), np.nan_to_num(pcc_G)
    for x, colour, alpha, label in (
        (chance, GREY, 0.9, "null, all genes and draws"),
        (values, ACCENT, 0.7, "CoMTIP"),
    ):
        if x.size:
            share = np.full(x.size, 100.0 / x.size)
            clipped = np.clip(x, bins[0], bins[-1])
            axis.hist(clipped, bins=bins.tolist(), weights=share, color=colour, alpha=alpha, label=label)
    mean = float(values.mean()) if values.size else 0.0
    axis.axvline(mean, color=INK, lw=1.5, label="CoMTIP, mean of all panel genes")
    axis.legend(fontsize=7.5, frameon=False)
    style_axis(axis, title, "PCC of one gene", "% of genes")
    return figure


def plain(text: str) -> str:
    """Return ``text`` for use in a figure: at most :data:`MAX_LABEL` characters, with ``?`` for unprintable characters.

    Texts from files can have any length and content. Also pass ``parse_math=False`` to matplotlib, which otherwise reads
    ``$`` as the start of a formula.
    """
    text = "".join(c if c.isprintable() else "?" for c in text[: MAX_LABEL + 1])
    return text if len(text) <= MAX_LABEL else text[: MAX_LABEL - 1] + "…"


def scale_length(width_um: float) -> int:
    """Return the length of a scale bar in um: the largest of 1, 2, 5, 10, ... up to a third of the image's width; at least 1."""
    steps = [n * 10**k for k in range(5) for n in (1, 2, 5)]
    return max((s for s in steps if s <= width_um / 3), default=1)


def style_axis(axis: Axes, title: str, x: str, y: str) -> None:
    """Set the title and axis labels, and apply the style of the report."""
    axis.set_title(plain(title), fontsize=9, color=INK, loc="left", parse_math=False)
    axis.set_xlabel(x, fontsize=8, color=INK)
    axis.set_ylabel(y, fontsize=8, color=INK)
    axis.tick_params(labelsize=7.5, colors=INK)
    axis.grid(color=GRID, lw=0.5)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def colour_table(name: str, n: int = 17) -> list[list[int]]:
    """Return ``n`` RGB colours, 0 to 255, of a matplotlib colour map, for drawing in a browser."""
    return [[round(255 * c) for c in rgba[:3]] for rgba in mpl.colormaps[name](np.linspace(0, 1, n)).tolist()]


def _draw_spots(
    axis: Axes, spots: np.ndarray, size: float, values: np.ndarray, limits: tuple[float, float], colours: str
) -> EllipseCollection:
    """Draw spots as circles of diameter ``size`` (px of the image), coloured by ``values``."""
    options: dict[str, Any] = {"units": "x", "offsets": spots, "offset_transform": axis.transData, "linewidths": 0}
    marks = EllipseCollection(size, size, 0, array=values, cmap=colours, clim=limits, **options)
    axis.add_collection(marks)
    return marks


def _scale_bar(axis: Axes, mpp: float, extent: tuple[float, float, float, float]) -> None:
    """Draw a scale bar with its length in um at the lower left of ``extent`` (left, right, top, bottom)."""
    left, right, top, bottom = extent
    um = scale_length((right - left) * mpp)
    length = um / mpp
    x, y = left + 0.05 * (right - left), bottom - 0.05 * (bottom - top)
    axis.plot([x, x + length], [y, y], color="white", lw=6, solid_capstyle="projecting", alpha=0.85)
    axis.plot([x, x + length], [y, y], color="black", lw=3, solid_capstyle="butt")
    box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1}
    above = y - 0.02 * (bottom - top)
    axis.text(x + length / 2, above, f"{um:,} µm", ha="center", va="bottom", fontsize=7.5, bbox=box)


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
