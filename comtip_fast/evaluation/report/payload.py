"""Data of the report's maps: quantised, compressed and encoded for the page's script, and reduced to keep the page small."""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from comtip_shards.sampling.rng import generator
from markupsafe import Markup
from PIL import Image

from comtip_fast.drawing import EXPRESSION_MAP, GROUPS, RESIDUAL_LIMIT, RESIDUAL_MAP, colour_table, plain
from comtip_fast.evaluation.evaluate import Evaluation, SectionData
from comtip_fast.metrics import finite_or_none

VALUES_BYTES = 9 << 19
"""Intended size of the tables of genes and the encoded values of all sections, 4.5 MiB, so that the page with all its images stays
below 8 MB."""
IMAGE_BYTES = 1 << 20
"""Intended size of the H&E images of all sections, encoded."""
IMAGE_PX, MIN_IMAGE_PX = 900, 160
LEVELS = (255, 63, 15)
"""Numbers of quantisation steps to try in this order, before spots are left out."""
SUB_PX = 32
"""Positions are stored in 1/32 px of the image."""


@dataclass
class SectionPayload:
    """Image and data from which the page draws one section."""

    image: str
    """The H&E image, cropped to the spots, as a data URI."""
    data: dict[str, Any]
    """Entry of the section in the page's JSON."""
    shown: int
    """Number of spots that are drawn."""


def section_payload(
    result: Evaluation, data: SectionData, labels: pd.DataFrame | None, n_sections: int, seed: int = 0
) -> SectionPayload:
    """Return the image of a section and the maps of all its scored genes.

    Parameters
    ----------
    result, data
        The evaluation, and one of its sections.
    labels
        Table of :func:`comtip_fast.evaluation.report.summaries.clusters`; None if the section has no labels.
    n_sections
        Number of sections on the page, which share :data:`VALUES_BYTES`.
    seed
        Seed of the choice of spots, if not all can be drawn.
    """
    number = result.shards.section_number(data.section_id)
    meta = result.shards.manifest.sections[number]
    overview, mpp = result.shards.overview(number)
    diameter = meta.spot_diameter_um / mpp
    spots = data.xy * meta.mpp / mpp
    image, offset, scale = _crop(overview, spots, 3 * diameter, IMAGE_BYTES // n_sections)
    genes, seen = _genes(data)
    rows, values = _values(data, VALUES_BYTES // n_sections - len(json.dumps(genes, separators=(",", ":"))), seed)
    xy = np.clip((spots[rows] - offset) * scale * SUB_PX, 0, 65535).round().astype("<u2")
    entry = {
        "id": plain(data.section_id),
        "n": int(rows.size),
        "xy": _base64(xy.tobytes()),
        "px": SUB_PX,
        "radius": diameter * scale * 0.56 * float(np.sqrt(data.xy.shape[0] / rows.size)),
        "um": mpp / scale,
        "values": _base64(values),
        "genes": genes,
        "seen": seen,
        "labels": None if labels is None else _labels(labels, rows, len(data.xy)),
    }
    return SectionPayload(_as_jpeg(image), entry, int(rows.size))


def page_json(payloads: list[SectionPayload]) -> Markup:
    """Return the page's data as JSON, escaped so that no value can end the script element that contains it."""
    found = {
        "sections": [p.data for p in payloads],
        "expression": colour_table(EXPRESSION_MAP),
        "residual": colour_table(RESIDUAL_MAP),
        "limit": RESIDUAL_LIMIT,
        "groups": GROUPS,
    }
    text = json.dumps(finite_or_none(found), separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _ranges(data: SectionData) -> np.ndarray:
    """Return the lowest and highest value of each gene in both maps, (2, G); they differ."""
    measured, predicted = data.measured["cp10k"], data.predicted["cp10k"]
    low = np.minimum(measured.min(0), predicted.min(0))
    return np.stack([low, np.maximum(np.maximum(measured.max(0), predicted.max(0)), low + 1e-6)])


def _values(data: SectionData, budget: int, seed: int) -> tuple[np.ndarray, bytes]:
    """Return the rows of the drawn spots, and the compressed uint8 values: shares of :func:`_ranges`.

    Of :func:`_candidates`, the first whose encoded values fit ``budget`` bytes is used, or the last if none fits.
    """
    low, high = _ranges(data)
    for rows, levels in _candidates(len(data.xy), data.section_id, seed):
        steps = np.empty((2, low.size, rows.size), np.uint8)
        for out, values in zip(steps, (data.measured["cp10k"], data.predicted["cp10k"]), strict=True):
            for gene in range(low.size):
                share = (values[rows, gene] - low[gene]) / (high[gene] - low[gene])
                out[gene] = np.rint(np.rint(share * levels) * (255 / levels))
        packed = zlib.compress(steps.tobytes(), 9)
        if len(packed) * 4 / 3 <= budget:
            break
    return rows, packed


def _candidates(n: int, section: str, seed: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (rows, quantisation steps), from all spots in 255 steps to few spots in 15."""
    for levels in LEVELS:
        yield np.arange(n), levels
    order = generator(seed, "report spots", section).permutation(n)
    keep = n // 2
    while keep >= 50:
        yield np.sort(order[:keep]), LEVELS[-1]
        keep //= 2


def _genes(data: SectionData) -> tuple[list[list[Any]], list[str]]:
    """Return a row per gene, and the texts that rows refer to.

    A row has symbol, scores, the index of the text that says how the gene was seen in training, and the full and the drawn range of the
    gene's values.
    """
    table, ranges = data.gene_table, _ranges(data)
    both = np.concatenate([data.measured["cp10k"], data.predicted["cp10k"]])
    low, high = np.percentile(both, [1, 99], axis=0) if both.size else (ranges[0], ranges[1])
    columns = ("pcc", "pcc_partial", "null_p", "detection")
    seen, code = np.unique(table["seen"].astype(str).to_numpy(str), return_inverse=True)
    out: list[list[Any]] = []
    for i, row in enumerate(table.to_dict("records")):
        drawn = (float(low[i]), float(max(high[i], low[i] + 1e-6)))
        numbers = [float(f"{v:.4g}") for v in (*ranges[:, i].tolist(), *drawn)]
        out.append([plain(str(row["gene"])), *(_rounded(row[c]) for c in columns), int(code[i]), *numbers])
    return out, [plain(text) for text in seen.tolist()]


def _rounded(value: float) -> float | None:
    return None if not np.isfinite(value) else round(float(value), 4)


def _labels(labels: pd.DataFrame, rows: np.ndarray, n: int) -> dict[str, Any]:
    """Return the label names and, for the drawn spots, encoded codes of label and matched clusters; code 255 means no label."""
    names, code = np.unique(labels["label"].to_numpy(str), return_inverse=True)
    out: dict[str, Any] = {"names": [plain(name) for name in names.tolist()]}
    columns = (("label", code), ("measured", labels["measured"] - 1), ("predicted", labels["predicted"] - 1))
    for column, values in columns:
        full = np.full(n, 255, np.uint8)
        full[labels["row"].to_numpy()] = np.asarray(values, np.uint8)
        out[column] = _base64(full[rows].tobytes())
    return out


def _crop(overview: np.ndarray, spots: np.ndarray, pad: float, budget: int) -> tuple[Image.Image, np.ndarray, float]:
    """Return the image around the spots, its offset in the overview in px, and its scale relative to the overview.

    The image is reduced until it fits ``budget`` bytes or its longer side is at most :data:`MIN_IMAGE_PX`.
    """
    low = np.maximum(np.floor(spots.min(0) - pad), 0)
    high = np.minimum(np.ceil(spots.max(0) + pad), overview.shape[1::-1])
    box = (int(low[0]), int(low[1]), max(int(high[0]), int(low[0]) + 1), max(int(high[1]), int(low[1]) + 1))
    image = Image.fromarray(overview).crop(box)
    side = max(image.size)
    limit = IMAGE_PX
    while True:
        scale = min(1.0, limit / side)
        small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        if limit <= MIN_IMAGE_PX or len(_as_jpeg(small)) <= budget:
            return small, low, scale
        limit = int(limit * 0.75)


def _as_jpeg(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=82)
    return "data:image/jpeg;base64," + _base64(out.getvalue())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
