"""Figures of the report, as data URIs."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure

matplotlib.use("Agg")
INK, GRID = "#22303c", "#d9dee3"
MAX_LABEL = 80
LOSSES = (
    ("nce", "InfoNCE: image and genes"),
    ("mfm", "MFM: features of hidden patches"),
    ("pair", "Pair: true or mispaired value"),
    ("level", "Level: expression level of a gene"),
)
NAMES = {
    "zero_shot": "CoMTIP, zero-shot",
    "control_null": "null: map rotated and shifted",
    "ridge_colour": "ridge on mean colour",
    "ridge_features": "ridge on image features",
}
COLOURS = {"zero_shot": "#0b6e8f", "control_null": "#b8c0c8", "ridge_colour": "#d98c4a", "ridge_features": "#7a9e3f"}


def plain(text: str) -> str:
    """Return a text from a file for a figure: at most :data:`MAX_LABEL` characters, all printable.

    Use it with ``parse_math=False``: matplotlib reads ``$`` as the start of a formula, and lays out a text of any length.
    """
    text = "".join(c if c.isprintable() else "?" for c in text[: MAX_LABEL + 1])
    return text if len(text) <= MAX_LABEL else text[: MAX_LABEL - 1] + "…"


def as_uri(figure: Figure, dpi: int = 110, kind: str = "png") -> str:
    """Return a figure as a data URI: ``png`` for lines and text, ``jpeg`` for tissue images (a fifth of the size)."""
    out = io.BytesIO()
    options = {"quality": 85} if kind == "jpeg" else {}
    figure.savefig(out, format=kind, dpi=dpi, bbox_inches="tight", facecolor="white", pil_kwargs=options)
    return f"data:image/{kind};base64," + base64.b64encode(out.getvalue()).decode("ascii")


def loss_curves(path: Path) -> str | None:
    """Plot losses and validation score from ``metrics.jsonl``; return None if it has no training rows."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    train, valid = [r for r in rows if r["kind"] == "train"], [r for r in rows if r["kind"] == "valid"]
    shown = [(k, t) for k, t in LOSSES if any(r.get(k) is not None for r in train)]
    if not train:
        return None
    count = len(shown) + bool(valid)
    columns = min(3, count)
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(3.9 * columns, 2.6 * lines), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(lines, columns)).ravel())
    for axis, (key, title) in zip(axes, shown, strict=False):
        points = [(r["step"], r[key]) for r in train if r.get(key) is not None]
        x, y = np.array(points).T
        axis.plot(x, y, color="#9db4c0", lw=0.8)
        axis.plot(x, _smooth(y), color="#0b6e8f", lw=1.8)
        _style(axis, title, "step", "loss")
    if valid:
        axis = axes[len(shown)]
        scores = [(r["step"], r.get("per_cohort", r.get("per_task", {}))) for r in valid]  # per_task: up to version 0.1
        cohorts = sorted({name for _, found in scores for name in found})
        for cohort, colour in zip(cohorts, ("#d9534f", "#3b7dd8", "#7a9e3f", "#8a5fb0"), strict=False):
            points = [(step, found[cohort]) for step, found in scores if found.get(cohort) is not None]
            label = plain(cohort.replace("_", " "))
            axis.plot(*zip(*points, strict=True), "-o", ms=2.5, lw=1.3, color=colour, label=label)
        best = [r["step"] for r in valid if r.get("best")]
        if best:
            axis.axvline(best[-1], color=INK, lw=1, ls=":", label="best")
        if axis.get_legend_handles_labels()[0]:  # without validation sections there is none
            axis.legend(fontsize=7, frameon=False)
        _style(axis, "Validation sections (early stopping)", "step", "mean PCC")
    for axis in axes[count:]:
        axis.set_visible(False)
    return as_uri(figure)


def score_bars(entry: dict[str, Any], norm: str) -> str:
    """Plot one cohort's mean PCC and partial PCC over the 50 genes, with null and baselines."""
    names = [n for n in NAMES if entry[n].get(norm)]
    figure = Figure(figsize=(5.4, 2.5), layout="constrained")
    axis = figure.subplots()
    y = np.arange(len(names))[::-1]
    for offset, key, alpha in ((0.19, "mean_pcc_50_hvg", 1.0), (-0.19, "partial_pcc_50_hvg", 0.45)):
        values = [entry[n][norm][key] or 0.0 for n in names]
        axis.barh(y + offset, values, 0.36, color=[COLOURS[n] for n in names], alpha=alpha)
        for position, value in zip(y + offset, values, strict=True):
            axis.text(max(value, 0) + 0.005, position, f"{value:.2f}", va="center", fontsize=7.5, color=INK)
    axis.set_yticks(y, [NAMES[n] for n in names], fontsize=8.5)
    axis.set_xlim(min(0, axis.get_xlim()[0]), axis.get_xlim()[1] * 1.12)
    _style(axis, "", "mean PCC, 50 most variable genes (pale: partial, given colour and depth)", "")
    return as_uri(figure)


def gene_histogram(pcc: np.ndarray, null: np.ndarray, title: str) -> str:
    """Plot histograms of the PCC of all panel genes, for the model and for the null.

    ``pcc`` is (G,) and ``null`` (n_draws, G); undefined correlations count as 0, as in the tables.
    """
    figure = Figure(figsize=(5.4, 2.5), layout="constrained")
    axis = figure.subplots()
    bins = np.linspace(-0.6, 1, 49)
    chance, values = np.nan_to_num(null.ravel()), np.nan_to_num(pcc)
    for x, colour, alpha, label in (
        (chance, "#b8c0c8", 0.9, "null, all genes and draws"),
        (values, "#0b6e8f", 0.7, "CoMTIP"),
    ):
        if x.size:
            share = np.full(x.size, 100.0 / x.size)
            axis.hist(
                np.clip(x, bins[0], bins[-1]), bins=bins.tolist(), weights=share, color=colour, alpha=alpha, label=label
            )
    axis.axvline(
        float(values.mean()) if values.size else 0.0, color=INK, lw=1.5, label="CoMTIP, mean of all panel genes"
    )
    axis.legend(fontsize=7.5, frameon=False)
    _style(axis, title, "PCC of one gene", "% of genes")
    return as_uri(figure)


def maps(
    overview: np.ndarray,
    overview_mpp: float,
    section_mpp: float,
    xy: np.ndarray,
    spot_um: float,
    genes: list[tuple[str, np.ndarray, np.ndarray, float]],
) -> str:
    """Plot one row per gene: the H&E image, the measured map and the predicted map, with one colour scale per gene.

    ``genes`` has tuples (label, measured (N,), predicted (N,), pcc); ``xy`` is in pixels of the source image.
    """
    spots = xy * section_mpp / overview_mpp
    pad = 3 * spot_um / overview_mpp
    left, top = np.maximum(spots.min(0) - pad, 0)
    right, bottom = np.minimum(spots.max(0) + pad, overview.shape[1::-1])
    aspect = (bottom - top) / (right - left)
    width = 3.1
    figure = Figure(figsize=(width * 3 + 0.7, (width * aspect + 0.32) * len(genes)), layout="constrained")
    axes = np.atleast_2d(figure.subplots(len(genes), 3))
    grey = overview.astype(np.float32).mean(2, keepdims=True).repeat(3, 2) / 255 * 0.35 + 0.65
    size = 1.15 * spot_um / overview_mpp
    for row, (label, measured, predicted, pcc) in zip(axes, genes, strict=True):
        low, high = np.percentile(np.concatenate([measured, predicted]), [1, 99])
        high = max(high, low + 1e-6)
        for axis, values, title in (
            (row[0], None, f"{label}   PCC {pcc:.2f}" if np.isfinite(pcc) else f"{label}   PCC undefined"),
            (row[1], measured, "measured"),
            (row[2], predicted, "predicted"),
        ):
            axis.imshow(overview if values is None else grey, interpolation="bilinear")
            if values is not None:
                marks = _draw_spots(axis, spots, size, values, (low, high))
            axis.set_xlim(left, right)
            axis.set_ylim(bottom, top)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(
                plain(title),
                fontsize=9,
                color=INK,
                loc="left",
                parse_math=False,
                fontweight="bold" if values is None else "normal",
            )
            for side in axis.spines.values():
                side.set_color(GRID)
        bar = figure.colorbar(marks, ax=row[2], fraction=0.05, pad=0.02)
        bar.ax.tick_params(labelsize=7)
        bar.outline.set_visible(False)
        _scale_bar(row[0], overview_mpp, left, right, top, bottom)
    return as_uri(figure, dpi=100, kind="jpeg")


def _draw_spots(
    axis: Axes, spots: np.ndarray, size: float, values: np.ndarray, limits: tuple[float, float]
) -> EllipseCollection:
    marks = EllipseCollection(
        size,
        size,
        0,
        units="x",
        offsets=spots,
        offset_transform=axis.transData,
        array=values,
        cmap="viridis",
        clim=limits,
        linewidths=0,
    )
    axis.add_collection(marks)
    return marks


def _scale_bar(axis: Axes, mpp: float, left: float, right: float, top: float, bottom: float) -> None:
    um = scale_length((right - left) * mpp)
    length = um / mpp
    x, y = left + 0.05 * (right - left), bottom - 0.05 * (bottom - top)
    axis.plot([x, x + length], [y, y], color="white", lw=6, solid_capstyle="projecting", alpha=0.85)
    axis.plot([x, x + length], [y, y], color="black", lw=3, solid_capstyle="butt")
    axis.text(
        x + length / 2,
        y - 0.02 * (bottom - top),
        f"{um:,} µm",
        ha="center",
        va="bottom",
        fontsize=7.5,
        bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1},
    )


def scale_length(width_um: float) -> int:
    """Return a round length in um, at most a third of the image's width."""
    steps = [n * 10**k for k in range(5) for n in (1, 2, 5)]
    return max((s for s in steps if s <= width_um / 3), default=1)


def _smooth(y: np.ndarray, share: float = 0.08) -> np.ndarray:
    """Return a centred running mean; the window is shorter at the ends."""
    half = max(1, int(len(y) * share / 2))
    total = np.concatenate([[0.0], np.cumsum(y)])
    lo, hi = np.maximum(np.arange(len(y)) - half, 0), np.minimum(np.arange(len(y)) + half + 1, len(y))
    return (total[hi] - total[lo]) / (hi - lo)


def _style(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(plain(title), fontsize=9, color=INK, loc="left", parse_math=False)
    axis.set_xlabel(x, fontsize=8, color=INK)
    axis.set_ylabel(y, fontsize=8, color=INK)
    axis.tick_params(labelsize=7.5, colors=INK)
    axis.grid(color=GRID, lw=0.5)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
