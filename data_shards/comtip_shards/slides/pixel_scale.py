"""Scale of an image, um per px, from its metadata: OME-XML, ImageJ, Aperio, and resolution tags."""

from __future__ import annotations

import logging
import math
import re
from typing import Any

from comtip_shards.errors import SourceError

log = logging.getLogger(__name__)

UNITS_UM = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "Å": 1e-4}
"""{unit of OME-XML: um}; other units, such as ``pixel``, state no scale."""
IMAGEJ_UNITS_UM = UNITS_UM | {
    "micron": 1.0,
    "microns": 1.0,
    "micrometer": 1.0,
    "\\u00B5m": 1.0,
    "inch": 25_400.0,
    "inches": 25_400.0,
}
PLAUSIBLE_MPP = (0.05, 20.0)
"""Range of um per px in which a scale is accepted. It excludes 72 and 96 dpi, which are defaults of programs."""
SQUARE = 1.05
"""Maximum ratio of the scales along x and y for pixels that count as square."""
DISAGREE, TENFOLD = 1.2, 5.0
"""If the stated scale of an image and its own differ by at least the first factor, a warning is logged; from the second on, the
stated one is refused. Images that were resized without a new tag are between the two factors; a wrong unit, a wrong magnification
(10x, 40x) and px of another image are above the second."""
MAX_SIDE_UM = 150_000.0
"""Maximum longer side of an image in um: the largest slides, of whole organs, have 102 x 127 mm."""
INCH, CENTIMETER, MILLIMETER, MICROMETER = 2, 3, 4, 5
"""Values of the TIFF tag ResolutionUnit; INCH is the default, and tifffile writes the last two."""
_UM_PER_UNIT = {INCH: 25_400.0, CENTIMETER: 10_000.0, MILLIMETER: 1_000.0, MICROMETER: 1.0}


def plausible_mpp(mpp: float | None) -> float | None:
    """Return um per px rounded to 6 decimals, None if it is outside :data:`PLAUSIBLE_MPP`."""
    if mpp is None or not math.isfinite(mpp) or not PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1]:
        return None
    return round(mpp, 6)


def square_mpp(x: float | None, y: float | None) -> float | None:
    """Return ``x``, um per px along x; None if it is None or not plausible, or differs from ``y``, along y, by 5 % or more."""
    if x and y and not 1 / SQUARE < x / y < SQUARE:
        return None
    return plausible_mpp(x)


def check_stated_mpp(mpp: float, own: float | None, what: str, where: str, *, trusted: bool) -> None:
    """Compare the scale that the caller states with the scale that a file states.

    Parameters
    ----------
    mpp, own
        um per px that the caller states, and that the file states; ``own`` is None if the file states none.
    what, where
        For messages: what states ``own``, and the source.
    trusted
        Whether the caller states that the file is wrong (``trust_mpp``).

    Raises
    ------
    SourceError
        The two differ by a factor of :data:`TENFOLD` or more, and ``trusted`` is False. In other cases, a warning is logged from
        a factor of :data:`DISAGREE` on.
    """
    if own is None or 1 / DISAGREE < mpp / own < DISAGREE:
        return
    if trusted or 1 / TENFOLD < mpp / own < TENFOLD:
        check = "" if trusted else "; check `mpp`"
        log.warning("%s: `mpp` %g is used, but %s states %g um per px%s", where, mpp, what, own, check)
        return
    raise SourceError(
        f"{where}: `mpp` {mpp:g} is {mpp / own:.3g} times the {own:g} um per px that {what} states; correct `mpp` or leave it "
        "out, or set `trust_mpp=yes` if the file is wrong"
    )


def check_side(size: tuple[int, int], mpp: float, where: str, *, trusted: bool) -> None:
    """Check that an image of ``size``, (width, height) in px, can show a slide at ``mpp`` um per px.

    Raises
    ------
    SourceError
        Its longer side would be above :data:`MAX_SIDE_UM`, and the scale is not ``trusted``.
    """
    side = max(size) * mpp
    if side > MAX_SIDE_UM and not trusted:
        raise SourceError(
            f"{where}: at {mpp:g} um per px the image is {side / 1000:.4g} mm wide or high, more than any slide "
            f"({MAX_SIDE_UM / 1000:g} mm); correct `mpp`, or set `trust_mpp=yes` if it is right"
        )


def ome_mpp(xml: str, size: tuple[int, int] | None = None) -> float | None:
    """Return um per px from OME-XML; None if it is absent, implausible or in an unknown unit, or if no element is selected.

    Parameters
    ----------
    xml
        The OME-XML.
    size
        (width, height) of the image, which selects one of several ``Pixels`` elements; None selects the first.
    """
    found = [
        dict(re.findall(r"(\w+)\s*=\s*[\"']([^\"']*)[\"']", text))
        for text in re.findall(r"<(?:\w+:)?Pixels\b([^>]*)>", xml)
    ]
    if not found:
        return None
    wanted = None if size is None else (str(size[0]), str(size[1]))
    same = [a for a in found if (a.get("SizeX"), a.get("SizeY")) == wanted]
    if len(found) > 1 and wanted is not None and not same:
        return None
    attributes = (same or found)[0]
    return square_mpp(_ome_length(attributes, "PhysicalSizeX"), _ome_length(attributes, "PhysicalSizeY"))


def _ome_length(attributes: dict[str, str], name: str) -> float | None:
    unit = attributes.get(f"{name}Unit", "µm").replace("&#181;", "µ").replace("&#xB5;", "µ")
    try:
        return float(attributes[name]) * UNITS_UM[unit]
    except (KeyError, ValueError):
        return None


def tiff_mpp(description: str, size: tuple[int, int], resolution: tuple[Any, Any], unit: Any) -> float | None:
    """Return um per px of a TIFF by OME-XML, ImageJ or Aperio metadata, or else by its resolution tags; None if unknown.

    Resolution tags are not used for Aperio files, which state ``MPP`` in their description.

    Parameters
    ----------
    description
        ImageDescription of the first page.
    size
        (width, height) of the page that is the image.
    resolution
        XResolution and YResolution of this page, as numbers or (numerator, denominator); None where absent.
    unit
        ResolutionUnit of this page; None where absent.
    """
    if "<OME" in description or ":OME" in description:
        mpp = ome_mpp(description, size)
        if mpp is not None:
            return mpp
    x, y = (_px_per_unit(v) for v in resolution)
    if description.startswith("ImageJ="):
        stated = re.search(r"^unit=(.*)$", description, re.MULTILINE)
        um = IMAGEJ_UNITS_UM.get(stated[1].strip()) if stated else None
        if um is not None and x:
            return square_mpp(um / x, um / y if y else None)
    if description.startswith("Aperio"):
        stated = re.search(r"\bMPP\s*=\s*([\d.,]+)", description)
        try:
            return plausible_mpp(float(stated[1].replace(",", "."))) if stated else None
        except ValueError:
            return None
    um = _UM_PER_UNIT.get(INCH if unit is None else unit)
    return square_mpp(um / x, um / y if y else None) if um is not None and x else None


def _px_per_unit(value: Any) -> float | None:
    """Return a resolution as a number, None if it is absent, not positive or damaged."""
    try:
        number = value[0] / value[1] if isinstance(value, (tuple, list)) else float(value)
    except (TypeError, ValueError, ZeroDivisionError, IndexError, OverflowError):
        return None
    return number if math.isfinite(number) and number > 0 else None


def scale_length(width_um: float) -> int:
    """Return the length of a scale bar in um: the largest of 1, 2, 5, 10, ... up to a third of the image's width; at least 1."""
    steps = [n * 10**k for k in range(5) for n in (1, 2, 5)]
    return max((s for s in steps if s <= width_um / 3), default=1)
