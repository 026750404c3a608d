"""Detection rate of the section checks for each section fault, and their false alarm rate.

    PYTHONPATH=.:kernels:data_shards python bench/shards/calibrate_checks.py data_shards/samples --out checks.md

Every section of the source is checked unmodified, then with every fault of :mod:`testkit.section_faults`. A fault
counts as found when the check designed for it warns or fails; alarms of other checks are listed in the last column.
With ``--variants``, the same for sections changed by :mod:`testkit.section_variants`: every section is checked in every
variant, and every fault is put into one section of each variant, the sections in turn.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
from comtip_shards.qc import check_section
from comtip_shards.qc.result import FAIL, WARN, SectionReport
from comtip_shards.sections.section import Section
from comtip_shards.sources import open_source
from tqdm import tqdm

from testkit.section_faults import BLURS_UM, SECTION_FAULTS
from testkit.section_variants import SECTION_VARIANTS

T = TypeVar("T")


def chosen(table: Mapping[str, T], only: list[str]) -> dict[str, T]:
    """Return the entries whose names contain one of the texts; all without texts."""
    return {name: value for name, value in table.items() if not only or any(text in name for text in only)}


def alarms(report: SectionReport) -> set[str]:
    """Return the names of the checks that warn or fail."""
    return {f.name for f in report.findings if f.status in (WARN, FAIL)}


def calibrate(sections: list[Section], folder: Path, only: list[str]) -> list[str]:
    """Return the lines of the table of faults."""
    lines = ["| fault | check | found | no other alarm | other alarms |", "|---|---|---|---|---|"]
    sound = Counter(name for s in sections for name in alarms(check_section(s)))
    n = len(sections)
    lines.append(f"| none | | | | {_counted(sound, n)} |")
    for fault, (check, corrupt) in tqdm(chosen(SECTION_FAULTS, only).items(), desc="faults"):
        found, alone, others = 0, 0, Counter[str]()
        for section in sections:
            raised = alarms(check_section(corrupt(section, folder)))
            found += check in raised
            alone += raised == {check}
            others.update(raised - {check})
        lines.append(f"| {fault} | `{check}` | {found} / {n} | {alone} / {n} | {_counted(others, n)} |")
    return lines


def calibrate_variants(sections: list[Section], folder: Path, only: list[str]) -> list[str]:
    """Return the lines of the table of variants."""
    lines = ["| variant | false alarms | other stain reported | faults found | not found |", "|---|---|---|---|---|"]
    rows = chosen(SECTION_VARIANTS, only)
    for variant, (expected, apply) in tqdm(rows.items(), desc="variants"):
        number = list(SECTION_VARIANTS).index(variant)
        changed = [apply(section, folder) for section in sections]
        raised = [alarms(check_section(section)) for section in changed]
        wrong = Counter(name for found in raised for name in found - expected)
        stains = f"{sum(expected <= found for found in raised)} / {len(raised)}" if expected else ""
        found, tried, missed = 0, 0, []
        for turn, (fault, (check, corrupt)) in enumerate(SECTION_FAULTS.items() if not expected else ()):
            section = changed[(number + turn) % len(changed)]
            corrupted = corrupt(section, folder)
            if check == "on_tissue" and (corrupted.xy == section.xy).all():
                continue  # tissue fills the frame: there is no background to move spots to
            if BLURS_UM.get(fault, np.inf) < section.meta.mpp / 2:
                continue  # narrower than a px
            tried += 1
            is_found = check in alarms(check_section(corrupted))
            found += is_found
            missed += [] if is_found else [f"{fault} ({section.meta.section_id})"]
        faults = f"{found} / {tried}" if tried else ""
        lines.append(f"| {variant} | {_counted(wrong, len(raised))} | {stains} | {faults} | {', '.join(missed)} |")
    return lines


def _counted(names: Counter[str], n: int) -> str:
    return ", ".join(f"`{name}` {k} / {n}" for name, k in names.most_common()) or f"0 / {n}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of the sections")
    parser.add_argument("--samples", help="section ids, comma-separated (default: all)")
    parser.add_argument("--variants", action="store_true", help="print the table of variants instead of that of faults")
    parser.add_argument("--only", default="", help="only rows whose names contain one of these texts, comma-separated")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    samples = args.samples.split(",") if args.samples else None
    sections = [s.read() for s in open_source(args.source, samples=samples)]
    with tempfile.TemporaryDirectory() as folder:
        measure = calibrate_variants if args.variants else calibrate
        text = "\n".join(measure(sections, Path(folder), [text for text in args.only.split(",") if text])) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
