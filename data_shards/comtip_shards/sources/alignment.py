"""How an H&E image lies on the DAPI image of a Xenium run: the two files that Xenium Explorer writes.

Either a 3 x 3 matrix without a header, which takes px of the H&E to px of the DAPI image, or pairs of points that a
person marked on both, to which the matrix is fitted by least squares.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from comtip_shards.errors import SourceError
from comtip_shards.sources.base import existing, reading

POINTS = ("fixedx", "fixedy", "alignmentx", "alignmenty")
MAX_RESIDUAL_UM = 20.0
"""Root mean square distance between marked points above which a fit is refused: about two cells."""
MAX_STRETCH = 1.1
"""Ratio of the two axes' scales above which a matrix is refused: both images show the same glass."""


@dataclass(frozen=True)
class Alignment:
    """An affine map from px of the H&E to px of the DAPI image."""

    path: Path
    matrix_33: np.ndarray
    notes: list[str]

    def scale(self) -> float:
        """Return DAPI px per H&E px."""
        return float(np.sqrt(abs(np.linalg.det(self.matrix_33[:2, :2]))))

    def to_image(self, dapi_xy_N2: np.ndarray) -> np.ndarray:
        """Take positions in px of the DAPI image to px of the H&E."""
        inverse = np.linalg.inv(self.matrix_33)
        return dapi_xy_N2 @ inverse[:2, :2].T + inverse[:2, 2]


def read_alignment(path: Path, pixel_size: float) -> Alignment:
    """Read either file.

    Parameters
    ----------
    path
        The csv.
    pixel_size
        um per px of the DAPI image, for distances in um.

    Raises
    ------
    SourceError
        Neither of the two, no affine map, or a fit that leaves marked points too far apart.
    """
    with reading(existing(path, "alignment of the H&E image"), "a matrix of 3 x 3 numbers or keypoints with a header"):
        with path.open(encoding="utf-8-sig") as file:
            header = [n.strip().strip('"').lower() for n in file.readline().split(",")]
        named = any(n.isalpha() for n in header)
        table = pd.read_csv(path, header=0 if named else None, comment="#", encoding="utf-8-sig")
        table.columns = pd.Index([str(c).strip().lower() for c in table.columns])
        if named:
            if not set(POINTS) <= set(table.columns):
                raise SourceError(
                    f"{path}: has the columns {', '.join(header)}, expected fixedX, fixedY, alignmentX, alignmentY"
                )
            points = table[list(POINTS)].to_numpy(np.float64)
            matrix, notes = _fit(points[:, 2:], points[:, :2], pixel_size, path)
        else:
            matrix, notes = table.to_numpy(np.float64), [f"alignment by the matrix in {path.name}"]
    return Alignment(path, _checked(matrix, path), notes)


def _fit(moving_N2: np.ndarray, fixed_N2: np.ndarray, pixel_size: float, path: Path) -> tuple[np.ndarray, list[str]]:
    """Return the affine map from ``moving`` to ``fixed`` by least squares, and what is to be said of it."""
    design = np.column_stack([moving_N2, np.ones(len(moving_N2))])
    if not np.isfinite(design).all() or not np.isfinite(fixed_N2).all():
        raise SourceError(f"{path}: a keypoint has no position")
    middle = design - [*moving_N2.mean(axis=0), 0] if len(design) else design
    spread = np.linalg.svd(middle[:, :2], compute_uv=False) if len(design) >= 3 else np.zeros(2)
    if len(design) < 3 or spread[1] < 0.01 * spread[0]:
        raise SourceError(f"{path}: {len(design)} keypoints, or all on a line; mark at least three apart, better ten")
    fit, *_ = np.linalg.lstsq(design, fixed_N2, rcond=None)
    apart = np.linalg.norm(design @ fit - fixed_N2, axis=1) * pixel_size
    rms = float(np.sqrt((apart**2).mean()))
    if rms > MAX_RESIDUAL_UM:
        worst = int(apart.argmax())
        raise SourceError(
            f"{path}: the fit leaves keypoints {rms:.1f} um apart (root mean square; at most {MAX_RESIDUAL_UM:g}), the "
            f"worst is number {worst + 1} with {apart[worst]:.1f} um; mark it again in Xenium Explorer, or leave it out"
        )
    note = f"alignment by {len(design)} keypoints, which it leaves {rms:.2f} um apart (root mean square), at most {apart.max():.2f}"
    if len(design) == 3:
        note = "alignment by 3 keypoints, which any map fits: how good it is cannot be told; mark more"
    return np.vstack([fit.T, [0.0, 0.0, 1.0]]), [note]


def _checked(matrix: np.ndarray, path: Path) -> np.ndarray:
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        raise SourceError(f"{path}: {' x '.join(map(str, matrix.shape))} numbers, expected a matrix of 3 x 3")
    if not np.allclose(matrix[2], [0, 0, 1], atol=1e-9):
        raise SourceError(f"{path}: the last row is {matrix[2].tolist()}, not 0, 0, 1; this is no affine map")
    large, small = np.linalg.svd(matrix[:2, :2], compute_uv=False)
    if not 1e-2 < small <= large < 1e2 or large > MAX_STRETCH * small:
        raise SourceError(
            f"{path}: scales the two axes by {large:.3g} and {small:.3g}; both images show the same glass, so this is no "
            "map between them; export it again from Xenium Explorer"
        )
    return matrix
