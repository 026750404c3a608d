"""Schema of ``ManifestSection.source``: spots dropped, notes, results of the checks, and fingerprint of the content."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, with_config

strict = with_config(ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
MAX_TEXT = 1 << 16
"""Maximum length of a text in characters."""
Text = Annotated[str, Field(max_length=MAX_TEXT)]


@strict
@dataclass(frozen=True)
class _Check:
    """One check of a section, as returned by :meth:`comtip_shards.qc.result.SectionReport.summary`."""

    name: Annotated[str, Field(max_length=100)]
    status: Literal["ok", "warn", "fail", "not applicable"]
    figure: int | float | None
    said: Text
    advice: Text


@strict
@dataclass(frozen=True)
class _Print:
    """Return value of :func:`comtip_shards.sections.duplicates.section_fingerprint`."""

    spots: Annotated[str, Field(max_length=1 << 12)]
    picture: Annotated[str, Field(max_length=1 << 8)]


@with_config(ConfigDict(strict=True, extra="ignore", allow_inf_nan=False))
@dataclass(frozen=True)
class _Source:
    """Required keys of ``ManifestSection.source``; further keys are allowed."""

    dropped_spots: dict[Text, int]
    genes: Text
    notes: Annotated[list[Text], Field(max_length=1000)]
    beside: Annotated[list[Text], Field(max_length=1000)]
    checks: Annotated[list[_Check], Field(max_length=100)]
    print: _Print


_SOURCE = TypeAdapter(_Source)


def check_source(source: dict[str, Any]) -> dict[str, Any]:
    """Return ``ManifestSection.source`` after validating it.

    Raises
    ------
    ValueError
        ``source`` is not what a build writes; pydantic, which calls this validator, reports it as a ValidationError.
    """
    # Validated as JSON, because strict validation does not accept a dict for a dataclass.
    found = _SOURCE.validate_json(json.dumps(source)).print
    for name, text, unit, most in (("spots", found.spots, 8, 1024), ("picture", found.picture, 32, 32)):
        size = len(base64.b64decode(text, validate=True))
        if size % unit or not (name == "spots" or size) or size > most:
            wanted = f"{most}" if unit == most else f"a multiple of {unit} and at most {most}"
            raise ValueError(f"print.{name} (fingerprint of the section) has {size} bytes, expected {wanted}")
    return source
