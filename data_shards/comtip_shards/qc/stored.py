"""Read report pages from a shard set; pages are parsed and rendered again, never copied.

The pages are not covered by a hash and are opened in browsers. Therefore the JSON is validated, the image is decoded, and
the HTML is rendered from this package's template. Pages written by this version are reproduced byte-identically.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from comtip_shards.names import inside
from comtip_shards.qc.page import EXTENSIONS, OVERLAY_PX, Pages, section_page
from comtip_shards.qc.result import FORMAT, MAX_LISTED_SPOTS, STATUSES, VERSION, Finding, SectionReport
from comtip_shards.storage.regular_file import read_regular

MAX_BYTES = 16 * 2**20
"""Maximum size of a page in bytes; the pages of a section with 50,000 spots have about 2 MB."""
MAX_FINDINGS = 100
_PICTURE = re.compile(r'src="data:image/jpeg;base64,([A-Za-z0-9+/=]+)"')


_strict = with_config(ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))


@_strict
@dataclass(frozen=True)
class _Entry:
    name: str
    status: str
    figure: int | float | None
    threshold: int | float | None
    said: str
    advice: str
    spots: list[str]
    n_spots: int


@_strict
@dataclass(frozen=True)
class _Report:
    format: str
    version: int
    section_id: str
    status: str
    facts: dict[str, str | int | float | list[str] | dict[str, int] | None]
    findings: list[_Entry]


_ADAPTER = TypeAdapter(_Report)


def stored_pages(folder: Path, section_id: str) -> tuple[Pages, str]:
    """Return the rendered pages of one section, or why they cannot be used.

    Parameters
    ----------
    folder
        ``report/`` of a shard set.
    section_id
        A validated section id.

    Returns
    -------
    ``({"json": text, "html": text}, "")``, or ``({}, problem)``; the problem is empty if there are no pages.
    """
    paths = {e: inside(folder, f"{section_id}.{e}") for e in EXTENSIONS}
    if not any(p.exists() or p.is_symlink() for p in paths.values()):
        return {}, ""
    try:
        if folder.is_symlink():
            raise ValueError(f"{folder} is a symbolic link")
        texts = {e: read_regular(p, MAX_BYTES, follow=False).decode("utf-8") for e, p in paths.items()}
        read = _parse(texts["json"], section_id)
        report = _report(read, _picture(texts["html"]))
        text = json.dumps(asdict(read), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        return {"json": text, "html": section_page(report)}, ""
    except (OSError, ValueError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        return {}, text


def _parse(text: str, section_id: str) -> _Report:
    try:
        read = _ADAPTER.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if (read.format, read.version, read.section_id) != (FORMAT, VERSION, section_id):
        raise ValueError("the JSON is the report of another section or version")
    if not {read.status, *(f.status for f in read.findings)} <= set(STATUSES) or len(read.findings) > MAX_FINDINGS:
        raise ValueError(f"the JSON has an unknown status or more than {MAX_FINDINGS} findings")
    if any(len(f.spots) != min(f.n_spots, MAX_LISTED_SPOTS) for f in read.findings):
        raise ValueError("a finding in the JSON lists fewer or more spots than it states")
    return read


def _report(read: _Report, overlay: bytes) -> SectionReport:
    findings = [
        Finding(
            name=f.name,
            status=f.status,
            figure=f.figure,
            threshold=f.threshold,
            message=f.said,
            advice=f.advice,
            spots=range(f.n_spots),  # the page shows only their number
        )
        for f in read.findings
    ]
    return SectionReport(read.section_id, read.facts, findings, overlay=overlay)


def _picture(html: str) -> bytes:
    """Return the validated JPEG of a page, empty if the page has none."""
    found = _PICTURE.search(html)
    if found is None:
        return b""
    try:
        overlay = base64.b64decode(found[1], validate=True)
        with Image.open(io.BytesIO(overlay), formats=["JPEG"]) as image:
            if max(image.size) > OVERLAY_PX:
                raise ValueError(
                    f"the image in the HTML has {image.width} x {image.height} px, more than {OVERLAY_PX} px on a side"
                )
            image.load()
    except (binascii.Error, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image in the HTML cannot be decoded ({error})") from error
    return overlay
