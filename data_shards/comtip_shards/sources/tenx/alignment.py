"""Alignment of an H&E image to the DAPI image of a Xenium run, as exported by Xenium Explorer.

The file holds either a 3 x 3 matrix without a header, which maps H&E px to DAPI px, or pairs of manually selected
keypoints, to which an affine matrix is fitted by least squares.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from comtip_shards.errors import SourceError
from comtip_shards.sources.files.opening import existing, reading
from comtip_shards.sources.files.packaging import unpacked
from comtip_shards.sources.files.tables import encoding_of

POINTS = ("fixedx", "fixedy", "alignmentx", "alignmenty")
MAX_RESIDUAL_UM = 20.0
"""Maximum root mean square error of a keypoint fit, about two cells."""
MAX_STRETCH = 1.1
"""Maximum ratio of the scales of the two axes; both images show the same slide."""


@dataclass(frozen=True)
class Alignment:
    """Affine map from H&E px to DAPI px."""

    path: Path
    matrix_33: np.ndarray
    """float64 (3, 3), applied to columns (x, y, 1)."""
    notes: list[str]
    """Remarks on the file or the fit, for the manifest."""

    def scale(self) -> float:
        """Return DAPI px per H&E px."""
        return float(np.sqrt(abs(np.linalg.det(self.matrix_33[:2, :2]))))

    def to_image(self, dapi_xy_N2: np.ndarray) -> np.ndarray:
        """Map positions, float (N, 2), from DAPI px to H&E px."""
        inverse = np.linalg.inv(self.matrix_33)
        return dapi_xy_N2 @ inverse[:2, :2].T + inverse[:2, 2]


MAX_BYTES = 1 << 20
"""Largest size of an alignment file."""


def read_alignment(path: Path, pixel_size: float) -> Alignment:
    """Read an alignment matrix or keypoints.

    Parameters
    ----------
    path
        Path of the csv file.
    pixel_size
        um per px of the DAPI image.

    Raises
    ------
    SourceError
        The file is missing, too large or of another layout, the matrix is not affine or distorts the image, or there are too few
        keypoints or their fit has a large error.
    """
    with reading(existing(path, "alignment of the H&E image"), "a matrix of 3 x 3 numbers or keypoints with a header"):
        plain = unpacked(path)
        if plain.stat().st_size > MAX_BYTES:
            raise SourceError(
                f"{path}: {plain.stat().st_size:,} bytes, too large for an alignment of the H&E image, which has 3 x 3 numbers or a few "
                f"keypoints (at most {MAX_BYTES:,} bytes); export it again from Xenium Explorer"
            )
        encoding = encoding_of(plain)
        with plain.open(encoding=encoding) as file:
            first = file.readline()
        sep = next((s for s in "\t;" if s in first), ",")  # spreadsheets write the separator of their language
        header = [n.strip().strip('"').lower() for n in first.split(sep)]
        named = any(n.isalpha() for n in header)
        decimal = "," if sep == ";" and "." not in plain.read_text(encoding=encoding) else "."
        table = pd.read_csv(
            plain, header=0 if named else None, sep=sep, decimal=decimal, comment="#", encoding=encoding
        )
        table.columns = pd.Index([str(c).strip().lower() for c in table.columns])
        if named:
            if not set(POINTS) <= set(table.columns):
                raise SourceError(
                    f"{path}: the columns are {', '.join(header)}, expected fixedX, fixedY, alignmentX, alignmentY; export the "
                    "keypoints again from Xenium Explorer"
                )
            points = table[list(POINTS)].to_numpy(np.float64)
            matrix, notes = _fit(points[:, 2:], points[:, :2], pixel_size, path)
        else:
            matrix, notes = table.to_numpy(np.float64), [f"alignment: matrix in {path.name}"]
    return Alignment(path, _checked(matrix, path), notes)


def _fit(moving_N2: np.ndarray, fixed_N2: np.ndarray, pixel_size: float, path: Path) -> tuple[np.ndarray, list[str]]:
    """Fit the affine map from ``moving`` to ``fixed`` by least squares; returns (float64 (3, 3), notes)."""
    design = np.column_stack([moving_N2, np.ones(len(moving_N2))])
    if not np.isfinite(design).all() or not np.isfinite(fixed_N2).all():
        raise SourceError(f"{path}: a keypoint has a missing coordinate; select it again in Xenium Explorer")
    centred = design - [*moving_N2.mean(axis=0), 0] if len(design) else design
    spread = np.linalg.svd(centred[:, :2], compute_uv=False) if len(design) >= 3 else np.zeros(2)
    if len(design) < 3 or spread[1] < 0.01 * spread[0]:
        problem = "too few" if len(design) < 3 else "which are on one line"
        raise SourceError(
            f"{path}: {len(design)} keypoints, {problem}; select at least three that are not on one line, better ten"
        )
    fit, *_ = np.linalg.lstsq(design, fixed_N2, rcond=None)
    error = np.linalg.norm(design @ fit - fixed_N2, axis=1) * pixel_size
    rms = float(np.sqrt((error**2).mean()))
    if rms > MAX_RESIDUAL_UM:
        worst = int(error.argmax())
        raise SourceError(
            f"{path}: the keypoint fit has a root mean square error of {rms:.4g} um (maximum {MAX_RESIDUAL_UM:g}); the "
            f"largest is {error[worst]:.1f} um at keypoint {worst + 1}; select it again in Xenium Explorer or remove it"
        )
    note = f"alignment: {len(design)} keypoints, root mean square error {rms:.2f} um, maximum {error.max():.2f} um"
    if len(design) == 3:
        note = "alignment: 3 keypoints, which every affine map fits exactly; the error is unknown, select more"
    return np.vstack([fit.T, [0.0, 0.0, 1.0]]), [note]


def _checked(matrix: np.ndarray, path: Path) -> np.ndarray:
    if matrix.shape != (3, 3):
        shape = " x ".join(map(str, matrix.shape))
        raise SourceError(
            f"{path}: the matrix is {shape}, expected 3 x 3 numbers without a header; export it again from Xenium Explorer"
        )
    if not np.isfinite(matrix).all():
        raise SourceError(f"{path}: the matrix has values that are not finite; export it again from Xenium Explorer")
    if not np.allclose(matrix[2], [0, 0, 1], atol=1e-9):
        raise SourceError(
            f"{path}: the matrix is not affine: its last row is {matrix[2].tolist()} instead of 0, 0, 1; export it again from "
            "Xenium Explorer"
        )
    large, small = np.linalg.svd(matrix[:2, :2], compute_uv=False)
    if not 1e-2 < small <= large < 1e2 or large > MAX_STRETCH * small:
        raise SourceError(
            f"{path}: the scales of the two axes are {large:.4g} and {small:.4g}, expected 0.01 to 100 and a ratio of at most "
            f"{MAX_STRETCH:g}, because both images show the same slide; export it again from Xenium Explorer"
        )
    return matrix
