"""Ready-made patches in an h5 file (HEST, and tools that write alike): ``img``, ``coords``, ``barcode``."""

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
from comtip_shards.sources.hdf5 import open_hdf5

HEST_MPP = 0.5
"""um per px of HEST's patches."""


@dataclass(frozen=True)
class Patches:
    """What a file of patches holds, without the pixels."""

    path: Path
    row_of: dict[str, int]
    """Row of each barcode."""
    coords_N2: np.ndarray
    """float64 (N, 2), top-left corners in px of the WSI."""
    width_px: float
    """Width of a patch in px of the WSI."""
    width_um: float
    has_pixels: bool

    def check(self, spot_ids: Sequence[str], xy_N2: np.ndarray) -> list[str]:
        """Compare the patches' centres with the spots', joined by barcode; returns notes.

        Raises
        ------
        SourceError
            They do not lie on one another: the two files are not of one section, or not of one scale.
        """
        if not len(spot_ids):
            raise SourceError(f"{self.path}: no patch has the barcode of a spot; are the two files of one section?")
        corners = self.coords_N2[[self.row_of[s] for s in spot_ids]]
        off = np.median(np.abs(corners + self.width_px / 2 - xy_N2).max(1))
        off_centre = np.median(np.abs(corners - xy_N2).max(1))
        # A corner is a whole px, and HEST rounded once more when it halved the width.
        near = max(2.0, 0.03 * self.width_px)
        if off <= near:
            return []
        if off_centre <= near:
            return [f"{self.path.name}: coords are the patches' centres, not their top-left corners"]
        raise SourceError(
            f"{self.path}: half of the patches lie more than {off:.0f} px off their spots; the file is not of this section, or "
            "of another scale (give --mpp)"
        )


def read_patches(path: Path, mpp: float) -> Patches:
    """Read barcodes and corners.

    Parameters
    ----------
    path
        The h5 file.
    mpp
        um per px of the WSI, where the file does not say it.
    """
    with _open(path) as file:
        for name in ("coords", "barcode"):
            if name not in file:
                raise SourceError(f"{path}: lacks {name!r}; it has {', '.join(file)}; give HEST's patches/ID.h5")
        barcodes = [v.decode() if isinstance(v, bytes) else str(v) for v in file["barcode"][()].ravel()]
        coords = np.asarray(file["coords"][()], np.float64)
        pixels = file["img"].shape if "img" in file else None
        attrs: dict[str, Any] = {}
        for name in ("coords", "img"):
            attrs |= dict(file[name].attrs) if name in file else {}
    check_unique(barcodes, f"{path}: barcodes")
    if coords.shape != (len(barcodes), 2) or (pixels is not None and (len(pixels) != 4 or pixels[0] != len(barcodes))):
        raise SourceError(
            f"{path}: {len(barcodes)} barcodes, coords of shape {coords.shape}, img of shape {pixels}; download it again"
        )
    source_mpp = float(attrs.get("pixel_size", mpp))
    if abs(source_mpp / mpp - 1) > 0.02:
        raise SourceError(
            f"{path}: cut at {source_mpp:g} um per px, but the section has {mpp:g}; give --mpp {source_mpp:g}"
        )
    side = int(pixels[1]) if pixels is not None else 224
    width_px = float(attrs.get("patch_size_src", side * HEST_MPP / source_mpp))
    width_um = round(width_px * source_mpp, 2)
    return Patches(path, {b: i for i, b in enumerate(barcodes)}, coords, width_px, width_um, pixels is not None)


def _open(path: Path) -> h5py.File:
    return open_hdf5(path, "an HDF5 file", "is it whole?")


class PatchSlide(Slide):
    """Patches in place of a WSI: tiles at the spots' centres only, and a small picture for the overview."""

    def __init__(
        self, patches: Patches, spot_ids: Sequence[str], xy_N2: np.ndarray, small: ArraySlide, size: tuple[int, int]
    ) -> None:
        if not patches.has_pixels:
            raise SourceError(f"{patches.path}: holds coords but no img, so there are no pixels; download wsis/ID.tif")
        self.path, self.size, self.notes, self.reader = patches.path, size, [], "h5py"
        self.tile_limit_um = patches.width_um
        self._patches, self._small = patches, small
        self._row_at = {(float(x), float(y)): patches.row_of[s] for s, (x, y) in zip(spot_ids, xy_N2, strict=True)}
        self._file = _open(patches.path)

    @property
    def whole_size(self) -> tuple[int, int]:
        """(width, height) of the small picture."""
        return self._small.size

    def scaled(self, box: Box, size: tuple[int, int]) -> np.ndarray:
        """Read a window of the small picture; between patches there are no finer pixels."""
        if size[0] > self._small.size[0] + 1 or size[1] > self._small.size[1] + 1:
            raise SourceError(
                f"{self.path}: patches have no pixels between them, and the small picture has only {self._small.size[0]} x "
                f"{self._small.size[1]} px; download wsis/ID.tif"
            )
        return self._small.scaled(box, size)

    def overview(self, max_px: int) -> tuple[np.ndarray, float]:
        """Return the small picture with its longer side at most ``max_px``, and px of the WSI per px of that."""
        small, _ = self._small.overview(max_px)
        return small, self.size[0] / small.shape[1]

    def iter_tiles(
        self, xy_N2: np.ndarray, mpp: float, tile_um: float, tile_px: int, min_mpp: float
    ) -> Iterator[np.ndarray]:
        """Yield the middle of the patches at some spots' centres."""
        width = self.tile_limit_um
        if tile_um > width * 1.005:
            raise SourceError(
                f"{self.path}: patches are {width:g} um wide, tiles of {tile_um:g} um cannot be cut from them; build with "
                f"--tile-um {math.floor(width)}, or download wsis/ID.tif"
            )
        for x, y in np.asarray(xy_N2, np.float64):
            row = self._row_at.get((float(x), float(y)))
            if row is None:
                raise SourceError(f"{self.path}: no patch is centred on ({x:g}, {y:g})")
            yield self._cut(self._pixels(row), min(tile_um / width, 1.0), width, tile_px, min_mpp)

    def _pixels(self, row: int) -> np.ndarray:
        try:
            pixels = np.asarray(self._file["img"][row])
        except OSError as error:
            raise SourceError(f"{self.path}: patch {row} cannot be read ({error}); is the file whole?") from error
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise SourceError(f"{self.path}: patches of {pixels.dtype} {pixels.shape}, expected uint8 (H, W, 3)")
        return pixels

    @staticmethod
    def _cut(pixels_HW3: np.ndarray, part: float, width_um: float, tile_px: int, min_mpp: float) -> np.ndarray:
        """Blur a patch as a WSI is blurred, and resample its middle."""
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
