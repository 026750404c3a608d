"""Helpers for 10x Genomics folders: search for matrices, scale factors, and selection of the image."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from comtip_shards.errors import SourceError
from comtip_shards.slides.appearance import looks_like_he
from comtip_shards.slides.open import image_size, open_slide
from comtip_shards.sources.base import stated_file
from comtip_shards.sources.files.opening import existing, reading
from comtip_shards.sources.files.packaging import (
    by_prefix,
    contents,
    find,
    prefix_of,
    read_packed,
    unpacked,
    unpacked_tar,
)
from comtip_shards.sources.tenx.matrix import TenxMatrix

JUDGED_PX = 30_000_000
"""Maximum number of pixels of an image that :func:`appearance_note` checks; larger images are checked in the section report."""
OVERVIEW_PX = 600
"""Longer side in px of the overview on which the appearance is checked."""
PICTURES = ("hires", "lowres")
"""Downscaled images that Space Ranger writes."""
TAR = r"\.(?:tar|tgz)"
"""Suffix of an archive; ``.gz`` may follow."""
_PICTURE_SUFFIX = r"\.(?:png|jpe?g|tiff?)"
_MICROSCOPE = ("microscope_image/*", "*tissue_image.*", "*_image.tif*", "*_image.btf*", "*_image.jpg*")
_NOT_MICROSCOPE = re.compile(r"cytassist|detected_tissue|aligned_|tissue_(?:hires|lowres)", re.IGNORECASE)
_IMAGES = {".tif", ".tiff", ".btf", ".jpg", ".jpeg", ".png", ".svs", ".ndpi"}
_MEX = {"features": r"(?:features|genes)\.tsv", "barcodes": r"barcodes\.tsv"}


# -- file search --------------------------------------------------------------------------------------------


def only(found: Sequence[Path], what: str) -> Path | None:
    """Return the only match, or None if there is none; raises SourceError, which calls it ``what``, if there are several."""
    if len(found) > 1:
        folder = Path(os.path.commonpath([p.parent for p in found]))
        names = ", ".join(str(p.relative_to(folder)) for p in found[:4])
        raise SourceError(f"{folder}: more than one {what}: {names}; keep one, or use one folder per section")
    return found[0] if found else None


def find_matrices(folder: Path, stem: str) -> dict[str, TenxMatrix]:
    """Return {prefix: matrix} of the matrices ``STEM.h5``, ``STEM/`` (MEX) and ``STEM.tar.gz`` in a folder.

    If a prefix has several forms, the h5 file takes precedence, then the folder.

    Raises
    ------
    SourceError
        A MEX folder or archive is incomplete, or holds several matrices.
    """
    out: dict[str, TenxMatrix] = {}
    for prefix, files in by_prefix(folder, re.escape(stem) + r"\.h5").items():
        out[prefix] = TenxMatrix(files[0], (files[0],))
    for entry in contents(folder):
        own = prefix_of(entry.name, re.escape(stem)) if entry.is_dir() else None
        if own is None or own in out:
            continue
        # Cell Ranger 1 and 2 add a folder named after the genome.
        matrix = only(find(entry, "**/*matrix.mtx*"), "matrix.mtx")
        if matrix is not None:
            out[own] = _mex(matrix)
    for prefix, files in by_prefix(folder, re.escape(stem) + TAR).items():
        if prefix not in out:
            matrix = only(find(unpacked_tar(files[0]), "**/*matrix.mtx*"), "matrix.mtx")
            if matrix is None:
                raise SourceError(f"{files[0]}: no matrix.mtx in the archive; unpack it and check its content")
            out[prefix] = _mex(matrix)
    return out


def find_flat_mex(folder: Path) -> dict[str, TenxMatrix]:
    """Return {prefix: matrix} of MEX matrices whose files are in the folder itself (``GSM1_A_matrix.mtx.gz``).

    Raises
    ------
    SourceError
        The features or barcodes of a matrix are missing.
    """
    return {prefix: _mex(files[0]) for prefix, files in by_prefix(folder, r"matrix\.mtx").items()}


def find_matrix(folder: Path, stem: str) -> TenxMatrix | None:
    """Return the matrix without a prefix, or else the only matrix, or None if there is none.

    Raises SourceError if there are several and each has a prefix.
    """
    found = find_matrices(folder, stem)
    if "" in found:
        return found[""]
    path = only([m.path for m in found.values()], stem)
    return None if path is None else next(iter(found.values()))


def find_matrix_of(folder: Path) -> TenxMatrix | None:
    """Return the matrix that a folder is given for, or None if it has none.

    The folder is that of the MEX files, the one above it that Cell Ranger 1 and 2 write (``GENOME/matrix.mtx``), or an output folder
    with ``filtered_feature_bc_matrix``.

    Raises
    ------
    SourceError
        There are several matrices, or the features or barcodes of a matrix are missing.
    """
    flat = find_flat_mex(folder)
    if flat:
        path = only([m.path for m in flat.values()], "matrix.mtx")
        return next(m for m in flat.values() if m.path == path)
    filtered = find_matrix(folder, "filtered_feature_bc_matrix")
    if filtered is not None:
        return filtered
    matrix = only(find(folder, "*/*matrix.mtx*"), "matrix.mtx")
    return None if matrix is None else _mex(matrix)


def _mex(matrix: Path) -> TenxMatrix:
    prefix = re.split(r"matrix\.mtx", matrix.name, flags=re.IGNORECASE)[0]
    files = [matrix]
    for what, role in _MEX.items():
        groups = by_prefix(matrix.parent, role)
        own = groups.get(prefix, [])
        if not own and what == "features" and len(groups) == 1:
            own = next(iter(groups.values()))  # GEO series may share one file of features
        if not own:
            raise SourceError(
                f"{matrix.parent}: {prefix}{what}.tsv.gz does not exist; copy it from the original output folder"
            )
        files.append(own[0])
    return TenxMatrix(matrix, tuple(files))


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object from a file, which may be gzip; raises SourceError if it is missing or invalid."""
    existing(path, what)
    try:
        with reading(path, "text"):
            text = read_packed(path).decode("utf-8-sig")
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(
            f"{path}: not valid JSON ({error}); copy the file from the original output folder again"
        ) from error
    if not isinstance(data, dict):
        raise SourceError(f"{path}: expected a JSON object; copy the file from the original output folder again")
    return data


def scale_factors(path: Path) -> dict[str, float]:
    """Return the finite numbers in ``scalefactors_json.json``, by name: NaN, which Python's json writes, counts as missing.

    Raises SourceError if the file is missing or not a JSON object.
    """
    out: dict[str, float] = {}
    for key, value in read_json(path, "scale factors of the images").items():
        single = value[0] if isinstance(value, list) and len(value) == 1 else value  # R's jsonlite writes [0.17]
        with suppress(TypeError, ValueError, OverflowError):
            out[str(key)] = float(single)
    return {key: value for key, value in out.items() if math.isfinite(value)}


# -- images -------------------------------------------------------------------------------------------------


def find_pictures(folder: Path, prefix: str | None = None) -> dict[str, Path]:
    """Return the downscaled images of a folder, ``{"hires": ..., "lowres": ...}``.

    Parameters
    ----------
    folder
        Usually ``spatial/``.
    prefix
        Prefix of the file names; None accepts any, and a name without prefix takes precedence.

    Raises
    ------
    SourceError
        ``prefix`` is None, and several images of one kind have a prefix.
    """
    out = {}
    for which in PICTURES:
        groups = by_prefix(folder, f"tissue_{which}_image{_PICTURE_SUFFIX}")
        if prefix is None:
            found = groups.get("") or only([p for files in groups.values() for p in files], f"tissue_{which}_image")
            found = found[0] if isinstance(found, list) else found
        else:
            found = groups[prefix][0] if prefix in groups else None
        if found is not None:
            out[which] = found
    return out


def choose_image(
    root: Path,
    pictures: Mapping[str, Path],
    factors: Mapping[str, float],
    stated: str | None,
    section_id: str,
    prefix: str = "",
) -> tuple[Path, float, list[str]]:
    """Return (image, its px per full-resolution px, notes).

    Positions are px of the image that Space Ranger was given. The downscaled images in ``spatial/`` are used only if
    ``stated`` is ``hires`` or ``lowres``; otherwise ``stated`` is a path or None.

    Parameters
    ----------
    root
        Space Ranger output folder, searched for a microscope image if none is stated.
    pictures
        Downscaled images, see :func:`find_pictures`.
    factors
        Scale factors; empty if the file is missing.
    stated
        The value of the option ``image``.
    section_id
        The section, which replaces ``{id}`` in ``stated``.
    prefix
        Prefix of file names if the folder contains several sections.

    Raises
    ------
    SourceError
        There is no image or no scale factor, there are several images, or the size contradicts the scale factors.
    """
    word = picture_word(stated)
    if word is not None:
        return _picture(root, pictures, factors, word)
    own = stated_file(stated, section_id)
    image = _microscope_image(root, prefix) if own is None else existing(own, "full-resolution image (`image`)")
    if image is None:
        also = (
            f"To use the downscaled {' or '.join(p.name for p in pictures.values())} instead, set `image` to "
            f"{' or '.join(pictures)}"
            if pictures
            else "There is no tissue_hires_image.png to use instead"
        )
        raise SourceError(
            f"{root}: no full-resolution image; set `image` to the microscope image that "
            f"was the input of Space Ranger. {also}"
        )
    check_full_resolution(image, pictures, factors)
    return image, 1.0, [] if stated else [f"full-resolution image: {image.name}"]


def picture_word(stated: str | None) -> str | None:
    """Return ``hires`` or ``lowres`` if the option ``image`` is this word (case is ignored); None if it is a path or not stated."""
    word = (stated or "").strip().lower()
    return word if word in PICTURES and (stated == word or not Path(stated or "").exists()) else None


def _picture(
    root: Path, pictures: Mapping[str, Path], factors: Mapping[str, float], which: str
) -> tuple[Path, float, list[str]]:
    picture, key = pictures.get(which), f"tissue_{which}_scalef"
    if picture is None:
        have = ", ".join(p.name for p in pictures.values()) or "no image"
        raise SourceError(
            f"{root}: tissue_{which}_image.png: no such file (the folder has {have}); set `image` to the microscope image"
        )
    existing(picture, f"{which} image")
    if not factors:
        raise SourceError(
            f"{root}: scalefactors_json.json is missing or empty, so {picture.name} has no scale; copy it from the Space Ranger "
            "output, or set `image` to the microscope image"
        )
    if not factors.get(key, 0) > 0:
        raise SourceError(
            f"{root}: {key} in scalefactors_json.json is missing or not a positive number, so {picture.name} has no scale; set "
            "`image` to the microscope image"
        )
    scale = factors[key]
    return picture, scale, [f"tiles from {picture.name}, scale {scale:.4f} of full resolution (`image={which}`)"]


def _microscope_image(root: Path, prefix: str) -> Path | None:
    for pattern in _MICROSCOPE:
        found = [
            p
            for p in find(root, pattern)
            if Path(p.name.lower().removesuffix(".gz")).suffix in _IMAGES
            and not _NOT_MICROSCOPE.search(p.name)
            and (p.name.startswith(prefix) or p.parent != root)
        ]
        if found:
            return only(found, "image (select one with `image`)")
    return None


def check_full_resolution(image: Path, pictures: Mapping[str, Path], factors: Mapping[str, float]) -> None:
    """Raise :class:`SourceError` if the size of ``image`` contradicts the downscaled images and their scale factors."""
    width, height = image_size(unpacked(image))
    for which, picture in pictures.items():
        scale = factors.get(f"tissue_{which}_scalef", 0.0)
        if not scale > 0:
            continue
        small = image_size(unpacked(existing(picture, f"{which} image")))
        want = (small[0] / scale, small[1] / scale)
        if all(abs(a - b) <= 0.01 * b + 1 / scale for a, b in zip((width, height), want, strict=True)):
            continue
        same = all(abs(a - b) <= 2 for a, b in zip((width, height), small, strict=True))
        raise SourceError(
            f"{image}: {width} x {height} px, but the positions belong to an image of about {want[0]:.0f} x {want[1]:.0f} "
            f"px (from {picture.name} and its scale factor); "
            + (f"this is the {which} image: set `image` to {which}" if same else "set `image` to that image")
        )


def appearance_note(image: Path) -> list[str]:
    """Return a note if an image does not look like H&E; images with more than ``JUDGED_PX`` pixels are skipped."""
    width, height = image_size(image)
    if width * height > JUDGED_PX:
        return []
    with open_slide(image) as slide:
        looks, reason = looks_like_he(slide.overview(OVERVIEW_PX)[0])
    return [] if looks else [f"{image.name} does not look like H&E: {reason}"]


def section_name(path: Path) -> str:
    """Return the default section id of an output folder: its name, or that of its parent if it is named ``outs``."""
    path = path.resolve()
    return path.parent.name if path.name == "outs" else path.name
