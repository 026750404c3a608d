"""Self-contained report pages: one per section, with an image of its spots, and a table of all sections."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from PIL import Image, ImageDraw, ImageFont

from comtip_shards.errors import SourceError
from comtip_shards.names import inside
from comtip_shards.qc.context import SectionContext
from comtip_shards.qc.result import FAIL, WARN, Finding, SectionReport, worst
from comtip_shards.slides.pixel_scale import scale_length
from comtip_shards.storage.atomic import atomic_folder

Extension = Literal["json", "html"]
EXTENSIONS: tuple[Extension, ...] = get_args(Extension)
Pages = Mapping[Extension, str]
"""Contents of the report pages of a section; empty if it has none."""
OVERLAY_PX = 1000
RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Colours from few counts to many, safe for colour blindness."""
RAMP_QUANTILES = (0.02, 0.98)
"""Quantiles of the total counts at the ends of the ramp."""
MARK = (220, 30, 30)
COUNTS_PER_SPOT = "counts_per_spot"
"""Name in :attr:`SectionReport.facts` of :func:`counts_per_spot`."""
_ENDS = ("at the 2nd percentile", "at the 98th")
_SUPER = 2
"""Supersampling factor, for smooth discs."""


def overlay(context: SectionContext, findings: Sequence[Finding]) -> bytes:
    """Return a JPEG of the image with spots coloured by log total counts, and a scale bar.

    Spots of checks that warn or fail have a red ring.
    """
    height, width = context.picture_HW3.shape[:2]
    scale = _SUPER * min(1.0, OVERLAY_PX / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    canvas = Image.fromarray(context.picture_HW3).resize(size, Image.Resampling.LANCZOS).convert("RGB")
    draw = ImageDraw.Draw(canvas)
    radius = context.spot_um / 2 / context.mpp * scale
    radius = float(np.clip(radius, 2.0 * _SUPER, 12.0 * _SUPER)) * 0.8
    marked = {i for f in findings if f.status in (WARN, FAIL) for i in f.spots}
    colours = ramp(np.log1p(context.totals))
    for i, (x, y) in enumerate(context.xy * scale):
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(box, fill=tuple(int(c) for c in colours[i]))
        if i in marked:
            ring = (box[0] - 3, box[1] - 3, box[2] + 3, box[3] + 3)
            draw.ellipse(ring, outline=MARK, width=2 * _SUPER)
    _scale_bar(draw, size, context.mpp / scale)
    out = io.BytesIO()
    canvas.resize((max(1, size[0] // _SUPER), max(1, size[1] // _SUPER)), Image.Resampling.BOX).save(
        out, "JPEG", quality=82
    )
    return out.getvalue()


def _scale_bar(draw: ImageDraw.ImageDraw, size: tuple[int, int], mpp: float) -> None:
    """Draw a black scale bar with its length, on white, at the lower left of an image of ``size`` (width, height), ``mpp`` um per px."""
    um = scale_length(size[0] * mpp)
    length, x, y = um / mpp, 0.03 * size[0], 0.97 * size[1]
    font, height, pad = ImageFont.load_default(16 * _SUPER), 4 * _SUPER, 5 * _SUPER
    text = f"{um:,} um"
    box = draw.textbbox((x, y - height - pad), text, font=font, anchor="ls")
    draw.rectangle((x - pad, box[1] - pad, max(x + length, box[2]) + pad, y + pad), fill=(255, 255, 255))
    draw.text((x, y - height - pad), text, fill=(0, 0, 0), font=font, anchor="ls")
    draw.rectangle((x, y - height, x + length, y), fill=(0, 0, 0))


def ramp(values: np.ndarray) -> np.ndarray:
    """Map values, (n,), to colours, uint8 (n, 3): :data:`RAMP` spans their 2nd to 98th percentile."""
    low, high = np.quantile(values, RAMP_QUANTILES)
    level = np.clip((values - low) / max(high - low, 1e-9), 0, 1) * (len(RAMP) - 1)
    anchors = np.array(RAMP, np.float64)
    return (
        np.stack([np.interp(level, np.arange(len(RAMP)), anchors[:, c]) for c in range(3)], 1).round().astype(np.uint8)
    )


def section_page(report: SectionReport) -> str:
    """Return the HTML of one section."""
    picture = base64.b64encode(report.overlay).decode("ascii") if report.overlay else ""
    css = ", ".join(f"rgb{c}" for c in RAMP)
    marked = sum(1 for f in report.findings if f.status in (WARN, FAIL) and f.spots)
    ends = report.facts.get(COUNTS_PER_SPOT)  # of any type in the stored report of a set to merge, absent in older ones
    low, high = "few", "many"
    if isinstance(ends, dict) and set(ends) == set(_ENDS):
        low, high = (ends[k] for k in _ENDS)
    return _template("section.html.j2").render(
        report=report, picture=picture, ramp=css, marked=marked, low=low, high=high
    )


def counts_per_spot(totals: np.ndarray) -> dict[str, int]:
    """Return the total counts at the ends of the colours, from the totals (n,) of all spots: {name in a report: counts}."""
    ends = np.expm1(np.quantile(np.log1p(totals), RAMP_QUANTILES))
    return {name: round(float(value)) for name, value in zip(_ENDS, ends, strict=True)}


def index_page(sections: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], without_page: Collection[str] = ()) -> str:
    """Return the HTML table of all sections.

    Parameters
    ----------
    sections
        (section id, :meth:`SectionReport.summary`) of each section.
    without_page
        Ids of sections that have no page to link to.
    """
    names = list(dict.fromkeys(f["name"] for _, findings in sections for f in findings))
    rows = [
        {
            "section_id": section,
            "page": section not in without_page,
            "status": worst(f["status"] for f in findings),
            "cells": {f["name"]: f for f in findings},
        }
        for section, findings in sections
    ]
    return _template("index.html.j2").render(rows=rows, names=names)


def pages(report: SectionReport) -> Pages:
    """Return the contents of ``<section_id>.json`` and ``.html``, by extension."""
    return {"json": report.to_json(), "html": section_page(report)}


def write_pages(sections: Iterable[tuple[str, Pages, Sequence[Mapping[str, Any]]]], folder: Path) -> None:
    """Replace a folder of reports: one page per section, and ``index.html``.

    Parameters
    ----------
    sections
        (section id, :func:`pages`, :meth:`SectionReport.summary`) of each section.
    folder
        Folder to write; an existing one is replaced.

    Raises
    ------
    SourceError
        The folder is a symbolic link.
    """
    if folder.is_symlink():
        raise SourceError(
            f"{folder}: is a symbolic link, which is not replaced by a folder of reports; delete the link, or give a new folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    summaries, without_page = [], set()
    with atomic_folder(folder) as tmp_path:
        tmp_path.mkdir()
        for section, texts, summary in sections:  # one at a time, because pages contain images
            for extension, text in texts.items():
                inside(tmp_path, f"{section}.{extension}").write_text(text, encoding="utf-8")
            summaries.append((section, summary))
            if "html" not in texts:
                without_page.add(section)
        (tmp_path / "index.html").write_text(index_page(summaries, without_page), encoding="utf-8")


def _template(name: str) -> Template:
    env = Environment(
        loader=PackageLoader("comtip_shards.qc", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return env.get_template(name)
