"""Shared input of the checks: a downsampled image, a tissue mask, and the fit of counts to the image.

The *fit* is the share of the variance of expression (total counts and the first principal components over spots) that is
explained by colour and texture of the image under the spots, adjusted for the number of features. It requires no training
and no knowledge of organ or genes, and drops to the fit of a shifted map if positions are wrong by more than a spot.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from scipy import ndimage, sparse
from scipy.spatial import cKDTree

from comtip_shards.qc.tissue import glass_density, over_channels, tissue_mask
from comtip_shards.sections.section import Section

PICTURE_MPP, MAX_PICTURE_PX = 4.0, 3000
"""um per px and maximum side length of the image on which positions are checked; larger images are downsampled further."""
PATCH_MPP, PATCH_PX, MAX_PATCHES = 2.0, 96, 48
"""um per px, width and number of the patches on which colour and sharpness are checked."""
CELL = 2
"""Width in px of the cells over which density is averaged; keeps the texture at a quarter of the cost."""
BLACK = 1.5
"""Maximum mean optical density of tissue; higher is a border, a masked background or a pen."""
ON_TISSUE_SHARE, MIN_ON_TISSUE = 0.2, 0.6
"""Minimum share of a spot's area for the spot to be on tissue; minimum share of spots for positions to be plausible."""
MAX_FLAT = 3
"""Maximum difference, in the sum of the channels, between a flat px and its eight neighbours; scanned tissue differs by more."""
SMOOTH_UM = 25.0
"""Smoothing width of the tissue mask, so that gaps between cells count as tissue."""
LATTICE_SHARE = 0.4
"""Minimum share of equal distances to the six nearest neighbours on a lattice: 0.67 on an infinite square lattice, 0.47 to
0.62 on the sections of ``samples/``, 0.25 for scattered spots."""
COMPONENTS, VARIABLE_GENES, MIN_DETECTED = 5, 300, 0.1
MIN_FIT_SPOTS, MAX_FIT_SPOTS = 60, 1500
"""Minimum number of spots for a significant fit (there are 8 features); maximum number, above which spots are subsampled."""
N_NULL, SEEN_SD = 24, 4.0
"""Number of shifted maps for the chance level of a fit; number of standard deviations above their mean that is significant."""
_DENSITY = (-np.log10((np.arange(256) + 1) / 256)).astype(np.float32)


@dataclass
class SectionContext:
    """Input of the checks; expensive values are computed on first use and cached."""

    section: Section
    picture_HW3: np.ndarray
    """uint8 RGB."""
    mpp: float
    """um per px of the downsampled image, from the section's stated scale."""
    scale: float
    """px of the downsampled image per px of the section's image."""
    patches_NPP3: np.ndarray
    """uint8 RGB patches around some spots and other points on tissue, at 2 um per px or the image's resolution if that is coarser."""
    patch_xy: np.ndarray
    """Centres of the patches, px of the downsampled image, float (n, 2)."""
    tile_um: float
    hires: dict[str, float] = field(default_factory=dict)
    """Scale factors from a scalefactors_json.json next to the image or in ``spatial/``, such as ``tissue_hires_scalef``."""
    memo: dict[Hashable, Any] = field(default_factory=dict)
    """Cache of values shared by several checks."""

    @cached_property
    def xy(self) -> np.ndarray:
        """Positions in px of the downsampled image, float64 (n, 2)."""
        return np.asarray(self.section.xy, np.float64) * self.scale

    @cached_property
    def totals(self) -> np.ndarray:
        """Counts per spot, int64."""
        return np.asarray(self.section.counts.sum(axis=1, dtype=np.int64)).ravel()

    @property
    def spot_um(self) -> float:
        """Diameter of a spot in um; if it is not stated, half the spacing, and 100 if the spacing is not stated either."""
        for value in (self.section.meta.spot_diameter_um, self.section.meta.spot_pitch_um / 2):
            if np.isfinite(value) and value > 0:
                return float(value)
        return 100.0

    @cached_property
    def pitch_px(self) -> float:
        """Distance between neighbouring spots in px of the downsampled image, NaN if they are not on a lattice."""
        return lattice_pitch(self.xy)

    @cached_property
    def _cells(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean optical density, and mean square of the density averaged over channels, in cells of 2 x 2 px; 0 in black areas.

        Returns
        -------
        density, square
            float32 (H // 2, W // 2, 3) and (H // 2, W // 2).
        """
        height, width = (n // CELL * CELL for n in self.picture_HW3.shape[:2])
        density = _DENSITY[self.picture_HW3[:height, :width]]
        corners = [density[i::CELL, j::CELL] for i in range(CELL) for j in range(CELL)]
        cells = sum(corners) / np.float32(len(corners))
        square = sum(np.square(over_channels(c)) for c in corners) / np.float32(len(corners))
        black = ndimage.uniform_filter(over_channels(cells), 3) > BLACK
        cells[black], square[black] = 0, 0
        return cells, square

    @cached_property
    def glass(self) -> np.ndarray | None:
        """Optical density of glass, float32 (H // 2, W // 2, 3); None if the image shows none."""
        density = self._cells[0]
        seen = over_channels(density) > 0
        return glass_density(density, seen) if seen.any() else None

    @cached_property
    def tissue(self) -> np.ndarray:
        """Tissue mask, bool per cell of 2 x 2 px."""
        return tissue_mask(self._cells[0], self.glass, SMOOTH_UM / (CELL * self.mpp))

    def balanced_patches(self) -> np.ndarray:
        """Return the patches scaled so that glass is white, to remove exposure and illumination; unchanged without glass."""
        if self.glass is None:
            return self.patches_NPP3
        last = np.array(self.glass.shape[:2]) - 1
        rows, columns = np.clip(self.patch_xy[:, ::-1] / CELL, 0, last).astype(int).T
        level = self.glass[rows, columns][:, None, None]
        bright = (self.patches_NPP3 + np.float32(1)) * 10 ** np.maximum(level, 0) - 1
        return np.clip(np.rint(bright), 0, 255).astype(np.uint8)

    @cached_property
    def flat(self) -> np.ndarray:
        """Mask of px that are almost as bright as all their neighbours (:data:`MAX_FLAT`), bool (H, W): background without texture."""
        gray = self.picture_HW3.sum(-1, dtype=np.int16)
        spread = ndimage.maximum_filter(gray, 3) - ndimage.minimum_filter(gray, 3)
        return np.asarray(spread <= MAX_FLAT)

    def background_share(self, xy: np.ndarray, width_um: float) -> np.ndarray:
        """Return the share of background, float (n,), in squares of ``width_um`` around positions.

        It is the larger of the share off tissue and the share of flat px, because the tissue mask closes gaps up
        to ``SMOOTH_UM`` wide, and gaps between the spots of a dense array may be that narrow.
        """
        size = max(1, round(width_um / self.mpp))
        flat = ndimage.uniform_filter(self.flat.astype(np.float32), size, mode="constant")
        return np.maximum(1 - self.tissue_share(xy, width_um), _sample(flat[None], xy)[:, 0])

    def gap_share(self, xy: np.ndarray, width_um: float) -> np.ndarray:
        """Return the share of flat px within the tissue mask, float (n,), in squares of ``width_um`` around positions."""
        size = max(1, round(width_um / self.mpp))
        rows, columns = (
            np.minimum(np.arange(n) // CELL, m - 1) for n, m in zip(self.flat.shape, self.tissue.shape, strict=True)
        )
        gaps = self.flat & self.tissue[np.ix_(rows, columns)]
        return _sample(ndimage.uniform_filter(gaps.astype(np.float32), size, mode="constant")[None], xy)[:, 0]

    def tissue_share(self, xy: np.ndarray, width_um: float) -> np.ndarray:
        """Return the share of tissue, float (n,), in squares of ``width_um`` around positions; 0 outside the image."""
        size = max(1, round(width_um / (CELL * self.mpp)))
        if ("share", size) not in self.memo:
            self.memo["share", size] = ndimage.uniform_filter(self.tissue.astype(np.float32), size, mode="constant")
        return _sample(self.memo["share", size][None], xy / CELL)[:, 0]

    def on_tissue(self, xy: np.ndarray) -> np.ndarray:
        """Return whether each spot at ``xy`` is on tissue, bool (n,)."""
        return self.tissue_share(xy, max(self.spot_um, 2 * CELL * self.mpp)) >= ON_TISSUE_SHARE

    @cached_property
    def _features(self) -> np.ndarray:
        """Colour and texture at the scale of a spot, float32 (4, H // 2, W // 2)."""
        sigma = self.spot_um / 3 / (CELL * self.mpp)
        density, square = self._cells
        blurred = [ndimage.gaussian_filter(density[..., c], sigma) for c in range(3)]
        texture = ndimage.gaussian_filter(square, sigma) - np.square(sum(blurred) / 3)
        return np.stack([*blurred, np.sqrt(np.maximum(texture, 0))])

    @cached_property
    def _expression(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the spots used for the fit, and their :func:`expression_components`; (n, 0) if there are too few spots."""
        enough = np.flatnonzero(self.totals >= max(20, 0.1 * np.median(self.totals)))
        if len(enough) > MAX_FIT_SPOTS:
            enough = enough[np.linspace(0, len(enough) - 1, MAX_FIT_SPOTS).astype(int)]
        if len(enough) < MIN_FIT_SPOTS:
            return enough, np.zeros((len(enough), 0))
        return enough, expression_components(self.section.counts[enough])

    @property
    def can_fit(self) -> bool:
        """Whether there are enough spots with counts to compute a fit."""
        return self._expression[1].shape[1] > 0

    def fit(self, xy: np.ndarray) -> float:
        """Return the fit of expression to the image with all spots at ``xy`` (n, 2), px of the downsampled image.

        It is 0 if fewer than ``MIN_ON_TISSUE`` of the spots are on tissue, because glass and frames correlate with any map by
        chance.
        """
        if self.on_tissue(xy[self._expression[0]]).mean() < MIN_ON_TISSUE:
            return 0.0
        return self._explained_at(xy)

    def _explained_at(self, xy: np.ndarray) -> float:
        rows, expression = self._expression
        values = _sample(self._features, xy[rows] / CELL)
        return explained(np.column_stack([values, values**2]), expression)

    @cached_property
    def as_given(self) -> float:
        """The fit of the positions as given."""
        return self.fit(self.xy)

    def chance(self, xy: np.ndarray) -> float:
        """Return the fit above which positions fit significantly better than chance.

        It is the mean fit of maps shifted within the bounding box of the spots, plus ``SEEN_SD`` standard deviations.
        """
        low, high = xy.min(0), xy.max(0)
        span = np.maximum(high - low, 1e-9)
        rng = np.random.default_rng(0)  # fixed seed: a report is a function of the section
        shifts = rng.uniform(0.2, 0.8, (N_NULL, 2)) * span
        null = [self._explained_at(low + (xy - low + s) % span) for s in shifts]
        return float(np.mean(null) + SEEN_SD * np.std(null))


def expression_components(counts: sparse.csr_matrix) -> np.ndarray:
    """Return log total counts and the first principal components of log1p CP10K, standardised, float64 (n, at most 6).

    Constant columns are left out.
    """
    totals = np.asarray(counts.sum(axis=1), np.float64).ravel()
    logged = sparse.csr_matrix(counts.multiply(1e4 / totals[:, None]))
    logged.data = np.log1p(logged.data)
    detected = np.diff(sparse.csc_matrix(counts).indptr) >= MIN_DETECTED * len(totals)
    logged = logged[:, detected]
    variance = np.asarray(logged.multiply(logged).mean(axis=0) - np.square(logged.mean(axis=0))).ravel()
    dense = logged[:, np.sort(np.argsort(-variance, kind="stable")[:VARIABLE_GENES])].toarray()
    left, size, _ = np.linalg.svd(dense - dense.mean(0), full_matrices=False)
    k = min(COMPONENTS, int((size > 1e-9).sum()))
    out = np.column_stack([np.log(totals), left[:, :k] * size[:k]])
    out = out[:, out.std(0) > 1e-9]
    return (out - out.mean(0)) / out.std(0)


def explained(features: np.ndarray, values: np.ndarray) -> float:
    """Return the adjusted R² of ``values`` (standardised) given ``features``, averaged over columns."""
    n, p = features.shape
    centred = features - features.mean(0)
    centred /= centred.std(0) + 1e-9
    basis, _ = np.linalg.qr(centred)
    share = np.square(basis.T @ values).sum(0) / np.square(values).sum(0)
    return float(np.mean(1 - (1 - share) * (n - 1) / (n - p - 1)))


def lattice_pitch(xy: np.ndarray) -> float:
    """Return the distance between neighbours on a square or hexagonal lattice, px; NaN if spots are not on one.

    It is the median of the most common distance (within 25 %) among the six nearest neighbours of all spots: on a square
    lattice four of them have one distance, on a hexagonal one six, for scattered spots hardly two. The mean distance of
    nearest neighbours would be too small if positions have noise.
    """
    if len(xy) < 4:
        return float("nan")
    distance, _ = cKDTree(xy).query(xy, k=min(7, len(xy)))
    logs = np.sort(np.log(distance[:, 1:][distance[:, 1:] > 0]))  # spots at the same position carry no information
    if not logs.size:
        return float("nan")
    stop = np.searchsorted(logs, logs + np.log(1.25), side="right")
    start = int(np.argmax(stop - np.arange(len(logs))))
    if stop[start] - start < LATTICE_SHARE * len(logs):
        return float("nan")
    return float(np.exp(np.median(logs[start : stop[start]])))


def _sample(maps_KHW: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Interpolate maps at positions (px from the edge), float (n, K); 0 outside."""
    coordinates = [xy[:, 1] - 0.5, xy[:, 0] - 0.5]
    return np.stack([ndimage.map_coordinates(m, coordinates, order=1, mode="constant") for m in maps_KHW], axis=1)
