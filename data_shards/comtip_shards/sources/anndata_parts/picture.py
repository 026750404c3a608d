"""Images in ``uns["spatial"]`` of an AnnData: the libraries, the finest image of each, and its scale."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from comtip_shards.errors import SourceError
from comtip_shards.slides.base import ArraySlide, whole_limit
from comtip_shards.slides.colour import peak_of, to_rgb8

MICRONS_PER_PIXEL = "microns_per_pixel"
"""Key of the scale in ``uns["spatial"][...]["scalefactors"]``, as in Visium HD."""
DIAMETER = "spot_diameter_fullres"
"""Key of the diameter of spots, in px of the positions."""
PICTURES = ("fullres", "hires", "lowres", "downscaled_fullres")
"""Images of ``uns["spatial"][...]["images"]`` in order of preference; the last is used by HEST."""


@dataclass(frozen=True)
class Picture:
    """The selected image of a library and its scale."""

    name: str
    """Its name in ``images``, one of :data:`PICTURES`."""
    factor: float
    """px of the image per px of ``obsm["spatial"]``."""


def library_names(spatial: Any) -> list[str]:
    """Return the libraries of ``uns["spatial"]``: entries with images or scale factors (CELLxGENE adds ``is_single``)."""
    if not hasattr(spatial, "keys"):
        return []
    return [
        str(name)
        for name in spatial
        if hasattr(spatial[name], "keys") and any(part in spatial[name] for part in ("images", "scalefactors"))
    ]


def library_picture(library: Any, where: str, fix: str = "") -> Picture:
    """Return the first of :data:`PICTURES` in one entry of ``uns["spatial"]`` (a mapping or an open group).

    Messages start with ``where`` (the file and the entry) and end with ``fix``; the default ``fix`` names options of the
    section readers.

    Raises
    ------
    SourceError
        The entry has no image, or no valid scale factor for it.
    """
    stored = library.get("images", {})
    images = stored if hasattr(stored, "keys") else {}
    name = next((n for n in PICTURES if n in images), None)
    if name is None:
        raise SourceError(f"{where}: no image ({', '.join(PICTURES)}); {fix or 'set `image`'}")
    scale = scale_factor(library, f"tissue_{name}_scalef", where, fix)
    if scale is None and name == "fullres":
        scale = 1.0
    if scale is None:
        raise SourceError(
            f"{where}: tissue_{name}_scalef is missing in the scale factors, so the image has no scale; "
            f"{fix or 'add it, or set `image`'}"
        )
    return Picture(name, scale)


def scale_factor(library: Any, key: str, where: str, fix: str = "") -> float | None:
    """Return a scale factor of one entry of ``uns["spatial"]``, None if it does not exist.

    R writes scalars as lists with one value, and some tools write text.

    Parameters
    ----------
    library, key
        The entry (a mapping or an open group), and the name of the factor.
    where, fix
        Start and end of the error message; the default ``fix`` names options of the section readers.

    Raises
    ------
    SourceError
        It is not one positive number; the message starts with ``where``.
    """
    factors = library.get("scalefactors", {})
    if not hasattr(factors, "keys") or key not in factors:
        return None
    stored, number = factors[key], float("nan")
    shape = getattr(stored, "shape", None if hasattr(stored, "keys") else np.shape(stored))  # None: empty in HDF5
    single = shape is not None and int(np.prod(shape)) == 1
    value = stored[()] if single and hasattr(stored, "shape") else stored
    shown = "not a single value"
    if single:
        value = np.asarray(value).reshape(-1)[0]
        shown = " ".join(str(value.decode("utf-8", "replace") if isinstance(value, bytes) else value).split())[:80]
        with suppress(TypeError, ValueError):
            number = float(value)
            shown = f"{number:g}"
    if not (np.isfinite(number) and number > 0):
        fixes = {MICRONS_PER_PIXEL: "set `mpp`", DIAMETER: "correct or remove it"}
        raise SourceError(
            f"{where}: {key} is {shown}, expected a positive number; {fix or fixes.get(key, 'correct it, or set `image`')}"
        )
    return number


def library_slide(library: Any, picture: Picture, path: Path, fix: str = "") -> ArraySlide:
    """Read the image that :func:`library_picture` selected into memory, as RGB of 8 bits.

    ``fix`` ends messages; its default names options of the section readers.

    Raises
    ------
    SourceError
        The image is not RGB or RGBA, is too large for memory, or has no known bit depth.
    """
    stored = library["images"][picture.name]
    shape = tuple(int(n) for n in getattr(stored, "shape", None) or ())
    if len(shape) != 3 or shape[2] not in (3, 4):
        raise SourceError(
            f"{path}: the {picture.name} image has the shape {shape}, expected (height, width, 3); {fix or 'set `image` to an RGB image'}"
        )
    # uint8 values are not copied; wider types need several times their bytes during conversion.
    n_bytes, limit = int(np.prod(shape)) * np.dtype(getattr(stored, "dtype", np.uint8)).itemsize, 3 * whole_limit()
    if n_bytes > limit:
        raise SourceError(
            f"{path}: the {picture.name} image has {shape[1]} x {shape[0]} px in {n_bytes:,} bytes, too many for memory (at "
            f"most {limit:,}); {fix or 'set `image` to a tiled TIFF'}"
        )
    pixels = np.asarray(stored[()] if hasattr(stored, "shape") and not isinstance(stored, np.ndarray) else stored)
    return ArraySlide(
        to_rgb8(pixels, peak_of(pixels, f"{path}: the {picture.name} image"), alpha=pixels.shape[2] == 4), path
    )
