"""Result of one check, and report of all checks of a section."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from comtip_shards.errors import SourceError

OK, WARN, FAIL, NOT_APPLICABLE = "ok", "warn", "fail", "not applicable"
STATUSES = (FAIL, WARN, OK, NOT_APPLICABLE)
FORMAT, VERSION = "comtip-section-report", 1
WARN_BELOW = frozenset({"equal_totals", "stain", "blur", "on_tissue"})
"""Checks that warn if the figure is small; the others warn if it is large."""
MAX_LISTED_SPOTS = 1000
"""Maximum number of spot ids in a report; their total number is always reported."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Result of one check."""

    name: str
    status: str
    """``ok``, ``warn``, ``fail`` or ``not applicable``."""
    figure: float | None = None
    """The measured value, None if nothing could be measured."""
    threshold: float | None = None
    """The value at which the check warns, or fails if it never warns; None if nothing was measured."""
    message: str
    """The measurement in a sentence; the key in files is ``said``."""
    advice: str = ""
    """What to do, empty if the check passed or is not applicable."""
    spots: Sequence[int] = ()
    """Rows of the affected spots."""

    @property
    def limit(self) -> str:
        """The threshold with the side on which the check warns, e.g. ``below 0.4``; empty if nothing was measured."""
        side = "below" if self.name in WARN_BELOW else "from"
        return "" if self.threshold is None else f"{side} {self.threshold:g}"

    @property
    def line(self) -> str:
        """The finding in one line, for report.txt and the manifest's notes."""
        return f"check {self.name}: {self.status}: {self.message}{'; ' + self.advice if self.advice else ''}"


def graded(name: str, figure: float, warn: float, fail: float, message: str, advice: str, **more: Any) -> Finding:
    """Return a finding with a status derived from two thresholds; ``fail`` may be above or below ``warn``."""
    sign = 1 if fail >= warn else -1
    status = FAIL if sign * figure >= sign * fail else WARN if sign * figure >= sign * warn else OK
    return Finding(
        name=name,
        status=status,
        figure=round(float(figure), 4),
        threshold=warn,
        message=message,
        advice="" if status == OK else advice,
        **more,
    )


def not_applicable(name: str, why: str) -> Finding:
    """Return the finding of a check that cannot be performed, with the reason ``why``."""
    return Finding(name=name, status=NOT_APPLICABLE, message=why)


@dataclass
class SectionReport:
    """All findings for one section."""

    section_id: str
    facts: dict[str, Any]
    """Provenance of the section: dataset, donor, platform, um per px, ..."""
    findings: list[Finding]
    spot_ids: list[str] = field(default_factory=list)
    """Ids of all spots, to which :attr:`Finding.spots` refers; empty if the section could not be read."""
    overlay: bytes = b""
    """JPEG of the image with its spots, empty if the section could not be read."""

    @property
    def status(self) -> str:
        """The worst status of all checks."""
        return worst(f.status for f in self.findings)

    @property
    def lines(self) -> list[str]:
        """Findings that warn or fail, one line each."""
        return [f.line for f in self.findings if f.status in (WARN, FAIL)]

    def summary(self) -> list[dict[str, Any]]:
        """Return the entries of the manifest for each check: everything except threshold and spots."""
        fields = {"name": "name", "status": "status", "figure": "figure", "said": "message", "advice": "advice"}
        return [{key: getattr(f, name) for key, name in fields.items()} for f in self.findings]

    def to_json(self) -> str:
        """Return the content of ``report/<section_id>.json``."""
        findings = []
        for f in self.findings:
            entry = {"said" if k == "message" else k: v for k, v in asdict(f).items()} | {
                "spots": [self.spot_ids[i] for i in f.spots[:MAX_LISTED_SPOTS]],
                "n_spots": len(f.spots),
            }
            findings.append(entry)
        data = {
            "format": FORMAT,
            "version": VERSION,
            "section_id": self.section_id,
            "status": self.status,
            "facts": self.facts,
            "findings": findings,
        }
        return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def worst(statuses: Iterable[str]) -> str:
    """Return the worst of some statuses; ``not applicable`` if there are none."""
    return min(statuses, key=STATUSES.index, default=NOT_APPLICABLE)


def explain(findings: Sequence[Finding], causes: Sequence[tuple[str, Sequence[str]]]) -> list[Finding]:
    """Set findings that follow from another one to ``not applicable``, so that a report names only the cause.

    Parameters
    ----------
    findings
        Findings of one section.
    causes
        (cause, names of the findings it explains), the root cause first.
    """
    out = {f.name: f for f in findings}
    for cause, explained in causes:
        if cause in out and out[cause].status in (WARN, FAIL):
            for name in explained:
                if name in out and out[name].status != NOT_APPLICABLE:
                    out[name] = replace(
                        out[name],
                        status=NOT_APPLICABLE,
                        advice="",
                        spots=(),
                        message=f"cannot be assessed until {cause} is fixed (measured: {out[name].message})",
                    )
    return list(out.values())


def refuse_failed(sections: Iterable[tuple[str, Sequence[Mapping[str, Any]]]]) -> None:
    """Raise if any check of any section failed; warnings are accepted.

    Parameters
    ----------
    sections
        (section id, :meth:`SectionReport.summary`) of each section.

    Raises
    ------
    SourceError
        A check failed; the message names each failed check, its section and the fix.
    """
    failed = [(i, f) for i, findings in sections for f in findings if f["status"] == FAIL]
    if failed:
        text = "\n".join(f"  {i}: {f['name']}: {f['said']}; {f['advice']}" for i, f in failed)
        raise SourceError(
            f"`strict`: sections that fail checks: {len({i for i, _ in failed})}; fix them as follows, or leave `strict` out\n{text}"
        )
