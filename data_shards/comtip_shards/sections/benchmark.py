"""Keep sections of public benchmarks, and other sections of their donors, out of training."""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from comtip_shards.errors import SourceError
from comtip_shards.sections.section import SectionMeta
from comtip_shards.sections.splits import LEARNING, is_stated
from comtip_shards.storage.regular_file import read_regular

BENCHMARK_FILE = Path(__file__).parent / "benchmark_ids.tsv"
MAX_BYTES = 64 << 20
"""Largest size of a list of benchmark ids."""


@dataclass(frozen=True)
class BenchmarkSection:
    """A section scored by a public benchmark, or one of the same donor."""

    task: str
    """Name of the benchmark task."""
    id: str
    """Section id in the benchmark."""
    role: str
    """``scored`` or ``same donor``."""
    donor: str
    """Donor as named by the HEST reader: the truncated title of the study and the patient."""
    known_from: str
    """Origin of this entry, for messages."""


class NamedSection(Protocol):
    """A section with an id and the name of its dataset."""

    @property
    def section_id(self) -> str:
        """Id of the section."""

    @property
    def dataset(self) -> str:
        """Name of the dataset."""


def load_benchmark(extra: Path | None = None) -> dict[str, BenchmarkSection]:
    """Return {lower-case id: section} of the list in the package and of ``extra``.

    Parameters
    ----------
    extra
        Tab-separated table with the column ``id`` and optionally ``task``, ``donor``, ``role`` and ``known_from``; or one id
        per line.

    Raises
    ------
    SourceError
        The file cannot be read, is empty, or is a table without the column ``id``.
    """
    sections = {s.id.lower(): s for s in _read_list(BENCHMARK_FILE)}
    return sections | ({s.id.lower(): s for s in _read_list(extra)} if extra else {})


def _read_list(path: Path) -> list[BenchmarkSection]:
    try:
        text = read_regular(path, MAX_BYTES).decode("utf-8-sig")
        lines = [line for line in text.splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        fix = "save it as UTF-8 text" if isinstance(error, UnicodeDecodeError) else "give a text file that you may read"
        raise SourceError(f"{path}: cannot be read as a list of benchmark ids ({error}); {fix}") from error
    if not lines:
        raise SourceError(f"{path}: no benchmark id; write one per line, or a table with the column id")
    if "id" not in lines[0].split("\t"):
        if "\t" in lines[0]:
            raise SourceError(
                f"{path}: the table has no column id, only {', '.join(lines[0].split(chr(9)))}; add the column"
            )
        lines = ["id", *lines]
    rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, restval="")
    return [
        BenchmarkSection(
            r.get("task") or path.stem,
            r["id"].strip(),
            r.get("role") or "scored",
            r.get("donor") or "",
            r.get("known_from") or path.name,
        )
        for r in rows
    ]


def benchmark_of(meta: NamedSection, benchmark: Mapping[str, BenchmarkSection]) -> BenchmarkSection | None:
    """Return the benchmark section with the id of ``meta``, if any.

    A benchmark id matches the complete section id, regardless of case. It also matches a word of the section id
    (``hest_TENX95``), but only if the section id or the dataset mentions HEST: otherwise ``patient-INT1`` may belong to another
    study.
    """
    whole = benchmark.get(meta.section_id.lower())
    if whole is not None or "hest" not in f"{meta.section_id} {meta.dataset}".lower():
        return whole
    words = re.split(r"[^A-Za-z0-9]+", meta.section_id.lower())
    return next((benchmark[w] for w in words if w in benchmark), None)


def guard_benchmark(
    metas: Sequence[SectionMeta],
    *,
    allow: Collection[str] = (),
    benchmark: Mapping[str, BenchmarkSection] | None = None,
) -> tuple[list[SectionMeta], dict[str, str]]:
    """Keep benchmark sections, and others of their donors, out of training.

    Parameters
    ----------
    metas
        All sections of a set, with the splits stated by source and user.
    allow
        Ids of protected sections that may be used for training.
    benchmark
        Protected sections, by default :func:`load_benchmark`.

    Returns
    -------
    metas, notes
        Metadata in which protected sections that ``allow`` does not name are ``test``; ``{section_id: reason}`` for every
        protected section.

    Raises
    ------
    SourceError
        A protected section is in train or val, or ``allow`` names a section that is not protected.
    """
    known = load_benchmark() if benchmark is None else benchmark
    why = _protected(metas, known)
    unknown = sorted(set(allow) - set(why))
    if unknown:
        near = difflib.get_close_matches(unknown[0], sorted(why), n=1)
        hint = f"; did you mean {near[0]}?" if near else "; leave it out"
        raise SourceError(f"`allow_benchmark` {unknown[0]}: no section of that id is kept out of training{hint}")
    barred = [m for m in metas if m.section_id in why and m.section_id not in allow and m.split in LEARNING]
    if barred:
        text = "\n".join(f"  {m.section_id} (split {m.split}): {why[m.section_id]}" for m in barred)
        raise SourceError(
            "sections with split train or val that a benchmark scores, or whose donor has a section that it scores "
            f"({len(barred)}):\n{text}\n"
            "leave them out (`samples`, or their rows in a table of sources), move them to split test (`splits`), or allow them "
            "explicitly (`allow_benchmark`)"
        )
    out = [replace(m, split="test") if m.section_id in why and m.section_id not in allow else m for m in metas]
    notes = {i: f"{text}; {'allowed by name' if i in allow else 'kept out of training'}" for i, text in why.items()}
    return out, notes


def _protected(metas: Sequence[SectionMeta], benchmark: Mapping[str, BenchmarkSection]) -> dict[str, str]:
    why: dict[str, str] = {}
    donors: dict[str, str] = {}
    for meta in metas:
        found = benchmark_of(meta, benchmark)
        if found is None:
            continue
        what = "a section of" if found.role == "scored" else "of a donor of"
        why[meta.section_id] = f"{found.id} is {what} benchmark task {found.task} ({found.known_from})"
        if is_stated(meta.donor):
            donors.setdefault(meta.donor, meta.section_id)
    names = {_folded(s.donor): s.id for s in benchmark.values() if s.donor}
    for meta in metas:
        if meta.section_id in why:
            continue
        if meta.donor in donors:
            why[meta.section_id] = (
                f"its donor {meta.donor} is also that of {donors[meta.donor]}, which is on the list of benchmark sections"
            )
        elif _folded(meta.donor) in names:
            why[meta.section_id] = f"its donor {meta.donor} is that of benchmark section {names[_folded(meta.donor)]}"
    return why


def _folded(donor: str) -> str:
    """Return a donor without case and spaces, which differ between versions of a table."""
    return "".join(donor.split()).lower()
