"""Precomputed patches in an h5 file of HEST or a compatible tool, with ``img``, ``coords`` and ``barcode``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

from comtip_shards.errors import SourceError
from comtip_shards.sections.section import check_unique
from comtip_shards.slides.base import ArraySlide, Box, Slide
from comtip_shards.slides.tiles import shrunk_size
from comtip_shards.sources.files.opening import reading
from comtip_shards.sources.hdf5.opening import open_hdf5

HEST_MPP = 0.5
"""um per px of HEST's patches."""


@dataclass(frozen=True)
class Patches:
    """Content of a patch file, except the pixels."""

    path: Path
    row_of: dict[str, int]
    """{barcode: row}."""
    coords_N2: np.ndarray
    """float64 (N, 2), top-left corners in WSI px."""
    width_px: float
    """Patch width in WSI px."""
    width_um: float
    """Patch width in um."""
    has_pixels: bool
    """Whether the file has ``img``."""

    def check(self, spot_ids: Sequence[str], xy_N2: np.ndarray) -> list[str]:
        """Check the centres of patches against those of their spots, ``xy_N2`` in WSI px; returns notes.

        Raises
        ------
        SourceError
            There are no spots, or the centres differ: the files belong to different sections or scales.
        """
        if not len(spot_ids):
            raise SourceError(f"{self.path}: no patch has the barcode of a spot; use files of the same section")
        corners = self.coords_N2[[self.row_of[s] for s in spot_ids]]
        off = np.median(np.abs(corners + self.width_px / 2 - xy_N2).max(1))
        off_centre = np.median(np.abs(corners - xy_N2).max(1))
        # Corners are rounded to px, and HEST also rounds half the width.
        near = max(2.0, 0.03 * self.width_px)
        if off <= near:
            return []
        if off_centre <= near:
            return [f"{self.path.name}: coords are patch centres instead of top-left corners"]
        raise SourceError(
            f"{self.path}: the median distance of patches from their spots is {off:.0f} px; use the file of this section, or "
            "correct the scale (`mpp`)"
        )


def read_patches(path: Path, mpp: float) -> Patches:
    """Read barcodes and coordinates.

    Parameters
    ----------
    path
        Path of the h5 file.
    mpp
        um per px of the WSI; it is compared with the value in the file, if there is one.

    Raises
    ------
    SourceError
        The file cannot be read, its arrays do not match, barcodes are not unique, or it was extracted at another scale.
    """
    with reading(path, "patches"), _open(path) as file:
        for name in ("coords", "barcode"):
            if name not in file:
                raise SourceError(
                    f"{path}: missing {name!r}; the file has {', '.join(file)}; use patches/ID.h5 of HEST"
                )
        barcodes = [v.decode() if isinstance(v, bytes) else str(v) for v in file["barcode"][()].ravel()]
        coords = np.asarray(file["coords"][()], np.float64)
        pixels = file["img"].shape if "img" in file else None
        attrs: dict[str, Any] = {}
        for name in ("coords", "img"):
            attrs |= dict(file[name].attrs) if name in file else {}
    check_unique(barcodes, f"{path}: barcodes")
    if coords.shape != (len(barcodes), 2) or (pixels is not None and (len(pixels) != 4 or pixels[0] != len(barcodes))):
        raise SourceError(
            f"{path}: {len(barcodes)} barcodes, but coords of shape {coords.shape} and img of shape {pixels}; download it again"
        )
    source_mpp = _positive(attrs, "pixel_size", mpp, path)
    if abs(source_mpp / mpp - 1) > 0.02:
        raise SourceError(
            f"{path}: extracted at {source_mpp:g} um per px, but the section has {mpp:g}; use the patches of this section, or set "
            f"`mpp` to {source_mpp:g} if that is right"
        )
    side = int(pixels[1]) if pixels is not None else 224
    width_px = _positive(attrs, "patch_size_src", side * HEST_MPP / source_mpp, path)
    width_um = round(width_px * source_mpp, 2)
    return Patches(path, {b: i for i, b in enumerate(barcodes)}, coords, width_px, width_um, pixels is not None)


def _positive(attrs: dict[str, Any], name: str, default: float, path: Path) -> float:
    """Return an attribute, or ``default`` if it is missing; raises SourceError if it is not one positive number."""
    value = attrs.get(name, default)
    try:
        number = float(np.asarray(value).item())
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise SourceError(f"{path}: attribute {name} is {str(value)[:40]}, not one positive number; download it again")
    return number


def _open(path: Path) -> h5py.File:
    return open_hdf5(path, "an HDF5 file", "download it again")


def _slide_of(path: Path) -> str:
    """Return the path of the whole-slide image for a patch file, as HEST names it."""
    return f"wsis/{path.stem}.tif"


class PatchSlide(Slide):
    """Slide backed by patches: tiles only at spot centres, and a small image for everything else.

    Parameters
    ----------
    patches
        The patch file.
    spot_ids, xy_N2
        Spots with a patch, and their centres in WSI px.
    small
        Image of the complete section.
    size
        (width, height) of the WSI in px.

    Raises
    ------
    SourceError
        The patch file has no pixels, or cannot be opened.
    """

    def __init__(
        self, patches: Patches, spot_ids: Sequence[str], xy_N2: np.ndarray, small: ArraySlide, size: tuple[int, int]
    ) -> None:
        if not patches.has_pixels:
            raise SourceError(
                f"{patches.path}: has coords but no img, so no pixels; download {_slide_of(patches.path)}"
            )
        self.path, self.size, self.notes, self.reader = patches.path, size, [], "h5py"
        self.tile_limit_um = patches.width_um
        self._patches, self._small = patches, small
        self._row_at = {(float(x), float(y)): patches.row_of[s] for s, (x, y) in zip(spot_ids, xy_N2, strict=True)}
        self._file = _open(patches.path)

    @property
    def whole_size(self) -> tuple[int, int]:
        """(width, height) of the overview image."""
        return self._small.size

    def scaled(self, box: Box, size: tuple[int, int]) -> np.ndarray:
        """Read a window of the overview image; raises SourceError for a finer scale, because patches do not cover the section."""
        if size[0] > self._small.size[0] + 1 or size[1] > self._small.size[1] + 1:
            raise SourceError(
                f"{self.path}: patches have no pixels between them, and the overview image has only {self._small.size[0]} x "
                f"{self._small.size[1]} px; download {_slide_of(self.path)}"
            )
        return self._small.scaled(box, size)

    def overview(self, max_px: int) -> tuple[np.ndarray, float]:
        """Return the overview image with its longer side at most ``max_px``, and WSI px per px of the returned image."""
        small, _ = self._small.overview(max_px)
        return small, self.size[0] / small.shape[1]

    def iter_tiles(
        self, xy_N2: np.ndarray, mpp: float, tile_um: float, tile_px: int, min_mpp: float
    ) -> Iterator[np.ndarray]:
        """Yield the central part of the patch at each spot centre, uint8 (S, S, 3).

        Raises
        ------
        SourceError
            A tile is wider than a patch, there is no patch at a position, or a patch cannot be read.
        """
        width = self.tile_limit_um
        if tile_um > width * 1.005:
            raise SourceError(
                f"{self.path}: patches are {width:g} um wide, too small for tiles of {tile_um:g} um; download "
                f"{_slide_of(self.path)}, or build with a `tile_um` of at most {math.floor(width)}"
            )
        for x, y in np.asarray(xy_N2, np.float64):
            row = self._row_at.get((float(x), float(y)))
            if row is None:
                raise SourceError(f"{self.path}: no patch at ({x:g}, {y:g}); download {_slide_of(self.path)}")
            yield self._cut(self._pixels(row), min(tile_um / width, 1.0), width, tile_px, min_mpp)

    def _pixels(self, row: int) -> np.ndarray:
        try:
            pixels = np.asarray(self._file["img"][row])
        except OSError as error:
            raise SourceError(f"{self.path}: patch {row} cannot be read ({error}); download the file again") from error
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise SourceError(
                f"{self.path}: patches are {pixels.dtype} {pixels.shape}, expected uint8 (H, W, 3); download it again"
            )
        return pixels

    @staticmethod
    def _cut(pixels_HW3: np.ndarray, part: float, width_um: float, tile_px: int, min_mpp: float) -> np.ndarray:
        """Return the central share ``part`` of a patch as a tile, downsampled to ``min_mpp`` first, as a WSI is."""
        side = pixels_HW3.shape[1]
        size, _, _ = shrunk_size((side, pixels_HW3.shape[0]), width_um / side, min_mpp)
        image = Image.fromarray(pixels_HW3)
        if size != image.size:
            image = image.resize(size, Image.Resampling.LANCZOS)
        x, y = (1 - part) / 2 * size[0], (1 - part) / 2 * size[1]
        box = (x, y, size[0] - x, size[1] - y)
        return np.asarray(image.resize((tile_px, tile_px), Image.Resampling.BICUBIC, box=box))

    def close(self) -> None:
        """Close the file."""
        self._file.close()
