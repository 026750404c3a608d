"""What a check says, and what a section's checks say together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from comtip_shards.errors import SourceError

OK, WARN, FAIL, NOT_APPLICABLE = "ok", "warn", "fail", "not applicable"
STATUSES = (FAIL, WARN, OK, NOT_APPLICABLE)
FORMAT, VERSION = "comtip-section-report", 1
MAX_LISTED_SPOTS = 1000
"""Ids of marked spots that a report lists; their number is always whole."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The answer of one check."""

    name: str
    status: str
    """``ok``, ``warn``, ``fail`` or ``not applicable``."""
    figure: float | None = None
    """What was measured, None where nothing could be."""
    threshold: float | None = None
    """The figure from which on the check warns."""
    said: str
    """The measurement in a sentence."""
    advice: str = ""
    """What to do, empty where all is well."""
    spots: Sequence[int] = ()
    """Rows of the spots that the finding is about."""

    @property
    def line(self) -> str:
        """One line for report.txt and the manifest's notes."""
        return f"check {self.name}: {self.status}: {self.said}{'; ' + self.advice if self.advice else ''}"


def graded(name: str, figure: float, warn: float, fail: float, said: str, advice: str, **more: Any) -> Finding:
    """Return a finding whose status follows from two thresholds; ``fail`` may lie above or below ``warn``."""
    sign = 1 if fail >= warn else -1
    status = FAIL if sign * figure >= sign * fail else WARN if sign * figure >= sign * warn else OK
    return Finding(
        name=name,
        status=status,
        figure=round(float(figure), 4),
        threshold=warn,
        said=said,
        advice="" if status == OK else advice,
        **more,
    )


def not_applicable(name: str, why: str) -> Finding:
    """Return the finding of a check that cannot be made."""
    return Finding(name=name, status=NOT_APPLICABLE, said=why)


@dataclass
class SectionReport:
    """All findings on one section."""

    section_id: str
    facts: dict[str, Any]
    """Where the section is from: dataset, donor, platform, um per px, ..."""
    findings: list[Finding]
    spot_ids: list[str] = field(default_factory=list)
    overlay: bytes = b""
    """JPEG of the spots over the picture, empty where the section could not be read."""

    @property
    def status(self) -> str:
        """The worst status of all checks."""
        return worst(f.status for f in self.findings)

    @property
    def lines(self) -> list[str]:
        """What is not well, one line each."""
        return [f.line for f in self.findings if f.status in (WARN, FAIL)]

    def summary(self) -> list[dict[str, Any]]:
        """Return what the manifest keeps of each check: all but the spots."""
        names = ("name", "status", "figure", "said", "advice")
        return [{n: getattr(f, n) for n in names} for f in self.findings]

    def to_json(self) -> str:
        """Return the text of ``report/<section_id>.json``."""
        findings = []
        for f in self.findings:
            entry = asdict(f) | {
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
    """Return the worst of some statuses; ``not applicable`` where there is none better or worse."""
    return min(statuses, key=STATUSES.index, default=NOT_APPLICABLE)


def explain(findings: Sequence[Finding], causes: Sequence[tuple[str, Sequence[str]]]) -> list[Finding]:
    """Silence findings that follow from another one, so that a report names the cause and not its consequences.

    Parameters
    ----------
    findings
        Of one section.
    causes
        (cause, what it explains), the deepest cause first.
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
                        said=f"cannot be judged until {cause} is mended (measured: {out[name].said})",
                    )
    return list(out.values())


def refuse_failed(sections: Iterable[tuple[str, Sequence[Mapping[str, Any]]]]) -> None:
    """Raise when any check of any section failed (one that warns is a question, not a refusal).

    Parameters
    ----------
    sections
        (section id, :meth:`SectionReport.summary`) each.

    Raises
    ------
    SourceError
        Naming every section, check and fix.
    """
    failed = [(i, f) for i, findings in sections for f in findings if f["status"] == FAIL]
    if failed:
        text = "\n".join(f"  {i}: {f['name']}: {f['said']}; {f['advice']}" for i, f in failed)
        raise SourceError(f"--strict: {len({i for i, _ in failed})} sections fail checks (see report/):\n{text}")
