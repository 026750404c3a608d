"""Figures and tables on arrays, which the report and :mod:`comtip_fast.plots` share.

The ``draw_*`` functions return a ``matplotlib.figure.Figure`` that is not attached to a window. Shapes: N spots, G genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from comtip_shards.slides.pixel_scale import scale_length
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

INK, GRID, ACCENT, GREY = "#22303c", "#d9dee3", "#0b6e8f", "#b8c0c8"
GROUPS = (
    "#3b7dd8",
    "#e0803a",
    "#5aa845",
    "#c94f9b",
    "#8a5fb0",
    "#17a2a2",
    "#d9b51c",
    "#d9534f",
    "#7a6a58",
    "#6c8ea4",
)
"""Colours of labels and clusters, those of the report's page."""
EXPRESSION_MAP, RESIDUAL_MAP = "viridis", "RdBu_r"
RESIDUAL_LIMIT = 3.0
"""Residuals are drawn from minus to plus this many standard deviations."""
MAX_LABEL = 80
LEVELS = 10
"""Largest number of groups of predictions in the calibration."""


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
    window = _window(image, spots_N2, spot_px)
    figure = Figure(figsize=_size(window, 4, len(genes)), layout="constrained")
    axes = np.atleast_2d(figure.subplots(len(genes), 4))
    grey = _pale(image)
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
            _draw_image(axis, image if values is None else grey, window, title, bold=values is None)
            if values is None:
                scale_bar(axis, mpp, window)
                continue
            marks = _draw_spots(axis, spots_N2, 1.15 * spot_px, "", array=values, cmap=colours, clim=limits)
            if title != "measured":
                bar = figure.colorbar(marks, ax=axis, fraction=0.05, pad=0.02)
                bar.ax.tick_params(labelsize=7)
                bar.outline.set_visible(False)
    return figure


def draw_groups(
    image: np.ndarray,
    spots_N2: np.ndarray,
    spot_px: float,
    names: Sequence[str],
    panels: Sequence[tuple[str, np.ndarray]],
) -> Figure:
    """Draw maps of groups of spots next to each other, in the colours :data:`GROUPS`, and a legend of the groups.

    Parameters
    ----------
    image, spots_N2, spot_px
        As for :func:`draw_maps`.
    names
        Names of the groups.
    panels
        Tuples (title, index in ``names`` of the group of each spot (N,)); spots with a negative index are not drawn.
    """
    window = _window(image, spots_N2, spot_px)
    figure = Figure(figsize=_size(window, len(panels), 1), layout="constrained")
    colours = [GROUPS[i % len(GROUPS)] for i in range(len(names))]
    for axis, (title, group) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        _draw_image(axis, _pale(image), window, title)
        for i, colour in enumerate(colours):
            _draw_spots(axis, spots_N2[group == i], 1.15 * spot_px, colour)
    marks = [Patch(color=colour) for colour in colours]
    legend = figure.legend(marks, [plain(n) for n in names], loc="outside right upper", fontsize=7.5, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def draw_scores(
    title: str,
    scores: Sequence[tuple[str, float, float, float]],
    axis: Axes,
    genes: str = "50 most variable genes",
) -> None:
    """Draw points with intervals, the first at the top; ``scores`` has tuples (label, value, low, high), NaN for no interval.

    ``genes`` names the genes of the means.
    """
    for y, (_, value, low, high) in enumerate(scores):
        if np.isfinite([low, high]).all():
            axis.plot([low, high], [y, y], color=ACCENT, lw=2, alpha=0.5, solid_capstyle="butt")
        axis.plot([value], [y], "o", color=ACCENT if y == 0 else INK, ms=5)
        axis.annotate(
            f"{value:.2f}", (value, y), (0, 5), textcoords="offset points", ha="center", fontsize=7.5, color=INK
        )
    axis.axvline(0, color=INK, lw=0.8)
    style_axis(axis, title, f"mean PCC, {genes}", "")
    axis.set_yticks(range(len(scores)), [plain(s[0]) for s in scores], parse_math=False)
    axis.set_ylim(len(scores) - 0.4, -0.6)


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


def _window(image: np.ndarray, spots_N2: np.ndarray, spot_px: float) -> tuple[float, float, float, float]:
    """Return the part of the image with spots, and a margin: left, right, top, bottom, in px."""
    left, top = np.maximum(spots_N2.min(0) - 3 * spot_px, 0)
    right, bottom = np.minimum(spots_N2.max(0) + 3 * spot_px, image.shape[1::-1])
    return float(left), float(right), float(top), float(bottom)


def _size(window: tuple[float, float, float, float], columns: int, rows: int) -> tuple[float, float]:
    """Return the width and height in inches of a figure with panels of ``window``, and bars or a legend."""
    left, right, top, bottom = window
    width = 2.9
    return width * columns + 1.4, (width * (bottom - top) / (right - left) + 0.36) * rows


def _pale(image: np.ndarray) -> np.ndarray:
    """Return the image in pale grey, float32 RGB in 0 to 1."""
    pale: np.ndarray = image.astype(np.float32).mean(2, keepdims=True).repeat(3, 2) / 255 * 0.35 + 0.65
    return pale


def _draw_image(
    axis: Axes, image: np.ndarray, window: tuple[float, float, float, float], title: str, *, bold: bool = False
) -> None:
    left, right, top, bottom = window
    axis.imshow(image, interpolation="bilinear")
    axis.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])
    weight = "bold" if bold else "normal"
    axis.set_title(plain(title), fontsize=9, color=INK, loc="left", parse_math=False, fontweight=weight)
    for side in axis.spines.values():
        side.set_color(GRID)


def _draw_spots(axis: Axes, spots: np.ndarray, size: float, colour: str, **values: Any) -> EllipseCollection:
    """Draw spots as circles of diameter ``size`` (px of the image), of one ``colour`` or coloured by ``values``."""
    options: dict[str, Any] = {"units": "x", "offsets": spots, "offset_transform": axis.transData, "linewidths": 0}
    marks = EllipseCollection(size, size, 0, **options, **(values or {"facecolors": colour}))
    axis.add_collection(marks)
    return marks


def scale_bar(axis: Axes, mpp: float, extent: tuple[float, float, float, float]) -> None:
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
