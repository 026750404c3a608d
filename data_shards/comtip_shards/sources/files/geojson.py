"""Streaming reader for cell polygons in GeoJSON files, which may exceed memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from comtip_shards.errors import SourceError
from comtip_shards.sources.files.opening import existing, reading

_CHUNK = 1 << 20
_LONGEST = 1 << 26
_START = re.compile(r'"features"\s*:\s*\[')
_BETWEEN = re.compile(r"[\s,]*")


def iter_features(path: Path) -> Iterator[dict[str, Any]]:
    """Iterate over the features of a FeatureCollection.

    Raises
    ------
    SourceError
        The file is missing, not a FeatureCollection, truncated or damaged, or an item is not a feature.
    """
    decoder = json.JSONDecoder()
    with reading(path, "GeoJSON"), existing(path, "file of polygons").open(encoding="utf-8") as file:
        text = ""
        while (start := _START.search(text)) is None:
            more = file.read(_CHUNK)
            if not more or len(text) > _LONGEST:
                raise SourceError(
                    f"{path}: no list of features; export the polygons again as a GeoJSON FeatureCollection"
                )
            text += more
        at = start.end()
        while True:
            at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]  # the pattern also matches the empty string
            if text[at : at + 1] == "]":
                return
            try:
                feature, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                more = file.read(_CHUNK)
                if not more or len(text) - at > _LONGEST:
                    rest = text[at : at + 40]
                    what = (
                        f"truncated or damaged in the feature that begins with {rest!r}"
                        if rest.strip()
                        else "truncated, because its list of features has no end"
                    )
                    raise SourceError(f"{path}: {what}; download or export it again") from error
                text, at = text[at:] + more, 0
                continue
            parts = (
                [feature, *(feature.get(n) or {} for n in ("geometry", "properties"))]
                if isinstance(feature, dict)
                else [None]
            )
            if not all(isinstance(part, dict) for part in parts):
                raise SourceError(
                    f"{path}: {str(feature)[:60]} is not a feature with geometry and properties; export the polygons again"
                )
            yield feature


def centroid(feature: dict[str, Any], path: Path) -> tuple[float, float]:
    """Return the centroid (x, y) of a feature's polygon, or of its largest polygon; raises SourceError for other geometries."""
    geometry: dict[str, Any] = feature.get("geometry") or {}
    kind, coordinates = geometry.get("type"), geometry.get("coordinates") or []
    try:
        if kind == "Polygon":
            rings = [np.asarray(coordinates[0], np.float64)]
        elif kind == "MultiPolygon":
            rings = [np.asarray(part[0], np.float64) for part in coordinates]
        else:
            raise ValueError(f"the type is {kind!r}")
        areas, centres = zip(*(_ring(ring) for ring in rings), strict=True)
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise SourceError(
            f"{path}: feature {feature.get('properties')} is not a polygon ({error}); export the polygons again"
        ) from error
    return centres[int(np.argmax(areas))]


def _ring(ring: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Return (area, centroid) of a closed ring, float (n, 2); raises ValueError if it is not finite.

    If the area is 0, the centroid is the mean of the vertices.
    """
    if ring.ndim != 2 or ring.shape[1] < 2 or not np.isfinite(ring).all():
        raise ValueError("coordinates are not finite x, y pairs")
    # Relative to the first vertex, to avoid cancellation for large coordinates.
    first = ring[0, :2]
    x, y = (ring[:, :2] - first).T
    cross = x[:-1] * y[1:] - x[1:] * y[:-1]
    area = cross.sum() / 2
    if area == 0:
        return 0.0, tuple(ring[:, :2].mean(axis=0).tolist())
    centre = (
        ((x[:-1] + x[1:]) * cross).sum() / (6 * area) + first[0],
        ((y[:-1] + y[1:]) * cross).sum() / (6 * area) + first[1],
    )
    return abs(float(area)), (float(centre[0]), float(centre[1]))
