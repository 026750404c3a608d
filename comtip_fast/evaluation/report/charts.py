"""Charts of the report as inline SVG; the page's style sheet colours them, also in its dark theme."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup, escape

from comtip_fast.drawing import plain

LOSSES = (
    ("nce", "InfoNCE: image and genes"),
    ("mfm", "MFM: features of hidden patches"),
    ("pair", "Pair: true or mispaired value"),
    ("level", "Level: expression level of a gene"),
)
NAMES = {
    "zero_shot": "CoMTIP, zero-shot",
    "ridge_features": "ridge, encoder features",
    "ridge_frozen": "ridge, frozen features",
    "ridge_colour": "ridge, mean colour",
    "finetune": "CoMTIP, fine-tuned",
    "supervised": "regression",
    "bleep": "BLEEP-like",
    "control_null": "null: moved maps",
}
UNSEEN_NAMES = {
    "zero_shot_unseen_genes": "CoMTIP, zero-shot",
    "unseen_mean_map": "mean map of trained genes",
    "unseen_ridge": "ridge, trained on them",
}
"""Labels of the predictors whose scores are means over unseen genes."""
CLASSES = {
    "zero_shot": "c1",
    "ridge_features": "c3",
    "ridge_frozen": "c4",
    "ridge_colour": "c2",
    "finetune": "c1",
    "supervised": "c3",
    "bleep": "c4",
    "control_null": "c0",
}


class Chart:
    """A chart with linear axes; sizes and ``margins`` (top, right, bottom, left) are in px of the viewBox."""

    def __init__(
        self,
        size: tuple[int, int],
        x: tuple[float, float],
        y: tuple[float, float],
        margins: tuple[int, int, int, int] = (10, 10, 36, 46),
    ) -> None:
        self.width, self.height = size
        self.top, self.right, self.bottom, self.left = margins
        self.x_limits, self.y_limits = x, y
        self.parts: list[str] = []

    def x(self, value: float) -> float:
        """Return the horizontal position of a value, in px from the left."""
        low, high = self.x_limits
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        """Return the vertical position of a value, in px from the top."""
        low, high = self.y_limits
        return self.height - self.bottom - (value - low) / (high - low) * (self.height - self.top - self.bottom)

    def line(self, x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, style: str) -> None:
        """Add a line through points; ``style`` names CSS classes."""
        points = " ".join(f"{self.x(a):.1f},{self.y(b):.1f}" for a, b in zip(x, y, strict=True))
        self.parts.append(f'<polyline class="{style}" points="{points}"/>')

    def rect(self, x0: float, x1: float, y0: float, y1: float, style: str, title: str = "") -> None:
        """Add a rectangle from (x0, y0) to (x1, y1), in values of the axes; ``title`` is its tooltip."""
        left, top = self.x(min(x0, x1)), self.y(max(y0, y1))
        size = f'width="{abs(self.x(x1) - self.x(x0)):.1f}" height="{abs(self.y(y1) - self.y(y0)):.1f}"'
        hint = f"<title>{escape(title)}</title>" if title else ""
        self.parts.append(f'<rect class="{style}" x="{left:.1f}" y="{top:.1f}" {size}>{hint}</rect>')

    def dot(self, x: float, y: float, style: str, title: str = "") -> None:
        """Add a point at values of the axes; ``title`` is its tooltip."""
        hint = f"<title>{escape(title)}</title>" if title else ""
        self.parts.append(f'<circle class="{style}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3.2">{hint}</circle>')

    def text(self, left: float, top: float, text: str, style: str = "") -> None:
        """Add a text at a position in px."""
        self.parts.append(f'<text class="{style}" x="{left:.1f}" y="{top:.1f}">{escape(plain(text))}</text>')

    def axes(self, x_label: str, y_label: str, *, y_ticks: bool = True) -> None:
        """Add grid lines, tick labels and axis labels."""
        bottom = self.height - self.bottom
        for tick in ticks(*self.x_limits):
            self.line([tick, tick], self.y_limits, "grid")
            self.text(self.x(tick), bottom + 14, f"{tick:g}", "mid")
        for tick in ticks(*self.y_limits) if y_ticks else []:
            self.line(self.x_limits, [tick, tick], "grid")
            self.text(self.left - 5, self.y(tick) + 3.5, f"{tick:g}", "end")
        self.text((self.left + self.width - self.right) / 2, self.height - 5, x_label, "mid label")
        middle = (self.top + bottom) / 2
        self.parts.append(
            f'<text class="mid label" transform="translate(12 {middle:.0f}) rotate(-90)">{escape(y_label)}</text>'
        )

    def svg(self, label: str) -> Markup:
        """Return the chart; ``label`` describes it to screen readers."""
        head = f'<svg class="chart" role="img" aria-label="{escape(label)}" viewBox="0 0 {self.width} {self.height}">'
        return Markup(head + "".join(self.parts) + "</svg>")


def ticks(low: float, high: float, n: int = 5) -> list[float]:
    """Return about ``n`` round values between two limits."""
    raw = max(high - low, 1e-12) / n
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw * 0.999)
    return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def score_bars(entry: dict[str, Any], intervals: pd.DataFrame, title: str) -> Markup:
    """Draw a cohort's mean PCC and mean partial PCC (pale) over the 50 genes, for each predictor of :data:`NAMES` with scores.

    Whiskers are 95 % intervals of the mean PCC, from the columns ``predictor``, ``low`` and ``high`` of ``intervals``, which may
    be empty.
    """
    names = [n for n in NAMES if entry.get(n, {}).get("cp10k")]
    columns = (intervals[name].tolist() for name in ("predictor", "low", "high"))
    spans = {name: (float(low), float(high)) for name, low, high in zip(*columns, strict=True)}
    values = [entry[n]["cp10k"][k] or 0.0 for n in names for k in ("mean_pcc_50_hvg", "partial_pcc_50_hvg")]
    ends = [v for span in spans.values() for v in span if math.isfinite(v)]
    low, high = min([0.0, *values, *ends]), max([0.1, *values, *ends])
    chart = Chart((400, 34 * len(names) + 44), (low, high * 1.18), (0, len(names)), (6, 8, 36, 148))
    chart.axes("mean PCC, 50 genes (pale: partial PCC)", "", y_ticks=False)
    for i, name in enumerate(names):
        y = len(names) - 1 - i
        score = entry[name]["cp10k"]
        first, partial = score["mean_pcc_50_hvg"] or 0.0, score["partial_pcc_50_hvg"] or 0.0
        chart.rect(0, first, y + 0.5, y + 0.88, CLASSES[name], f"{NAMES[name]}: {first:.3f}")
        chart.rect(0, partial, y + 0.12, y + 0.46, CLASSES[name] + " pale", f"{NAMES[name]}, partial: {partial:.3f}")
        edge = first
        if name in spans and all(map(math.isfinite, spans[name])):
            chart.line(spans[name], [y + 0.69, y + 0.69], "whisker")
            edge = max(first, spans[name][1])
        chart.text(chart.x(max(edge, 0)) + 4, chart.y(y + 0.6), f"{first:.2f}", "")
        chart.text(chart.x(max(partial, 0)) + 4, chart.y(y + 0.2), f"{partial:.2f}", "")
        chart.text(chart.left - 6, chart.y(y + 0.5) + 4, NAMES[name], "end strong" if name == "zero_shot" else "end")
    return chart.svg(f"Bars: mean correlation of CoMTIP, null and ridge baselines for {title}")


def gene_histogram(pcc_G: np.ndarray, null_DG: np.ndarray, title: str) -> Markup:
    """Draw histograms of the PCC per gene for the model (G,) and the null (draws, G); undefined correlations count as 0."""
    edges = np.linspace(-0.6, 1, 41)
    shares = {}
    for name, x in (("c0", np.nan_to_num(null_DG.ravel())), ("c1", np.nan_to_num(pcc_G))):
        counts = np.histogram(np.clip(x, edges[0], edges[-1]), edges)[0]
        shares[name] = 100 * counts / max(x.size, 1)
    top = max(1.0, *(float(s.max()) for s in shares.values()))
    chart = Chart((400, 200), (-0.6, 1.0), (0, top * 1.08))
    chart.axes("PCC of one gene", "% of genes")
    for name, share in shares.items():
        for i in np.flatnonzero(share):
            chart.rect(edges[i], edges[i + 1], 0, share[i], f"{name} soft", f"{edges[i]:.2f}: {share[i]:.1f} %")
    mean = float(np.nan_to_num(pcc_G).mean()) if pcc_G.size else 0.0
    chart.line([mean, mean], [0, top * 1.08], "ink")
    for row, (style, text) in enumerate((("c1", "CoMTIP"), ("c0", "null, all draws"), ("ink", f"mean {mean:.2f}"))):
        chart.parts.append(f'<rect class="{style}" x="292" y="{16 + 16 * row}" width="10" height="10"/>')
        chart.text(307, 25 + 16 * row, text)
    return chart.svg(f"Histogram of the correlation of each panel gene in {title}")


def calibration_chart(table: pd.DataFrame, title: str) -> Markup:
    """Draw the points of :func:`comtip_fast.drawing.calibration_table` with a band of one standard deviation of measured values.

    The dashed line is perfect calibration.
    """
    x, y, sd = (table[c].to_numpy() for c in ("predicted", "measured", "measured_sd"))
    low, high = min(0.0, float(x.min())), float(max(x.max(), y.max())) * 1.06 + 1e-6
    chart = Chart((400, 250), (low, high), (low, high))
    chart.axes("mean predicted, log1p CP10K", "mean measured")
    ends = [(a, float(np.clip(b, low, high))) for a, b in [*zip(x, y + sd, strict=True), *zip(x, y - sd, strict=True)]]
    band = [*ends[: len(x)], *ends[len(x) :][::-1]]
    points = " ".join(f"{chart.x(a):.1f},{chart.y(b):.1f}" for a, b in band)
    chart.parts.append(f'<polygon class="c1 band" points="{points}"/>')
    chart.line([low, high], [low, high], "ink dash")
    chart.line(x, y, "l1")
    for row in table.itertuples():
        hint = f"level {row.level}: predicted {row.predicted:.2f}, measured {row.measured:.2f}, {row.n} values"
        chart.dot(row.predicted, row.measured, "c1", hint)  # type: ignore[arg-type]
    return chart.svg(f"Calibration: mean measured against mean predicted expression by level, {title}")


def loss_curves(path: Path) -> list[tuple[str, Markup]]:
    """Return (title, chart) for each loss and for the validation scores in ``metrics.jsonl``; empty without training rows."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # a run that was killed may have left part of a line
            rows.append(json.loads(line))
    train, valid = [r for r in rows if r["kind"] == "train"], [r for r in rows if r["kind"] == "valid"]
    out = []
    for key, title in LOSSES:
        points = [(r["step"], r[key]) for r in train if r.get(key) is not None]
        if points:
            x, y = np.array(points, float).T
            chart = _steps_chart(x, y)
            chart.line(x, y, "l0")
            chart.line(x, _smooth(y), "l1")
            out.append((title, chart.svg(f"Training loss, {title}")))
    if train and valid:
        out.append(("Validation sections (early stopping)", _validation(valid)))
    return out


def _validation(rows: list[dict[str, Any]]) -> Markup:
    """Draw the validation score of every cohort against the step; the dashed line is the best step, if there is one."""
    scores = [(r["step"], r.get("per_cohort", r.get("per_task", {}))) for r in rows]  # per_task: up to version 0.1
    cohorts = sorted({name for _, found in scores for name in found})
    every = [v for _, found in scores for v in found.values() if v is not None] or [0.0]
    chart = _steps_chart(np.array([s for s, _ in scores], float), np.array(every), "mean PCC")
    best = [r["step"] for r in rows if r.get("best")]
    if best:
        chart.line([best[-1]] * 2, chart.y_limits, "ink dash")
    for i, cohort in enumerate(cohorts):
        points = [(step, found[cohort]) for step, found in scores if found.get(cohort) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            chart.line(steps, values, f"l{1 + i % 4}")
        chart.text(chart.width - 12, 18 + 14 * i, cohort.replace("_", " "), f"end t{1 + i % 4}")
    return chart.svg("Validation score against the training step")


def _steps_chart(x: np.ndarray, y: np.ndarray, label: str = "loss") -> Chart:
    """Return an empty chart over training steps that fits the values ``y``."""
    low, high = float(y.min()), float(y.max())
    pad = 0.06 * (high - low) or 0.1
    chart = Chart((330, 190), (0.0, float(max(x.max(), 1))), (low - pad, high + pad))
    chart.axes("step", label)
    return chart


def _smooth(y: np.ndarray, share: float = 0.08) -> np.ndarray:
    """Return a centred running mean over ``share`` of the points; the window is shorter at the ends."""
    half = max(1, int(len(y) * share / 2))
    total = np.concatenate([[0.0], np.cumsum(y)])
    lo, hi = np.maximum(np.arange(len(y)) - half, 0), np.minimum(np.arange(len(y)) + half + 1, len(y))
    mean: np.ndarray = (total[hi] - total[lo]) / (hi - lo)
    return mean
