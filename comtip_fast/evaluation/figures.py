"""Figures of :mod:`comtip_fast.drawing` as data URIs."""

from __future__ import annotations

import base64
import io

import numpy as np
from matplotlib.figure import Figure

from comtip_fast.drawing import draw_histogram, draw_maps, plain

__all__ = ["as_uri", "gene_histogram", "maps", "plain"]


def as_uri(figure: Figure, dpi: int = 110, kind: str = "png") -> str:
    """Return a figure as a data URI: ``png`` for lines and text, ``jpeg`` for tissue images (a fifth of the size)."""
    out = io.BytesIO()
    options = {"quality": 85} if kind == "jpeg" else {}
    figure.savefig(out, format=kind, dpi=dpi, bbox_inches="tight", facecolor="white", pil_kwargs=options)
    return f"data:image/{kind};base64," + base64.b64encode(out.getvalue()).decode("ascii")


def gene_histogram(pcc: np.ndarray, null: np.ndarray, title: str) -> str:
    """Return the figure of :func:`comtip_fast.drawing.draw_histogram` as the data URI of a PNG."""
    return as_uri(draw_histogram(pcc, null, title))


def maps(
    overview: np.ndarray,
    overview_mpp: float,
    section_mpp: float,
    xy: np.ndarray,
    spot_um: float,
    genes: list[tuple[str, np.ndarray, np.ndarray, float]],
) -> str:
    """Return the figure of :func:`comtip_fast.drawing.draw_maps` as the data URI of a JPEG; ``xy`` is in px of the source image."""
    spots = xy * section_mpp / overview_mpp
    return as_uri(draw_maps(overview, spots, spot_um / overview_mpp, overview_mpp, genes), dpi=100, kind="jpeg")
