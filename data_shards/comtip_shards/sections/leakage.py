"""Prevent leakage between training and test data: shared donors, benchmark sections, duplicate sections.

Splits are by donor, not by section, because sections of one tumour are nearly identical. Three checks:

* :func:`guard_benchmark` keeps sections of public benchmarks, and of their donors, out of training;
* :func:`check_splits` refuses a donor that is in train (or val) and in test;
* :func:`check_duplicates` refuses duplicate sections in different splits, detected by counts and image.
"""

from __future__ import annotations

import base64
import csv
import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import sparse

from comtip_shards.errors import SourceError
from comtip_shards.sampling.rng import bits, key, uniform
from comtip_shards.sections.section import SectionMeta

BENCHMARK_FILE = Path(__file__).parent / "benchmark_ids.tsv"
LEARNING = ("train", "val")
"""Splits that influence the model; val controls early stopping, so it leaks too."""
UNKNOWN_DONORS = {"", "unknown", "na", "n/a", "none", "nan", "?"}
UNSTATED = "unstated:"
SKETCH = 128
"""Number of spot hashes in a section's sketch: the smallest ones, so that sketches of sections that share spots overlap."""
MIN_PRINT_COUNTS = 20
"""Minimum counts of a hashed spot; spots with fewer counts may be equal by chance."""
SHARED_SPOTS, PICTURE_BITS = 0.2, 12
"""Two sections are duplicates if at least this share of the smaller one's spots has equal counts, or if at most this many
of the 256 bits of their images differ. Serial sections share no spot, and in ``samples/`` their images differ in 26 bits
or more; a downsampled and compressed copy differs in at most 5 from its original."""


def enforce_split_policy(
    metas: Sequence[SectionMeta],
    *,
    allow: Collection[str] = (),
    benchmark_ids: Path | None = None,
    auto_split: Sequence[float] | None = None,
    seed: int = 0,
) -> tuple[list[SectionMeta], dict[str, str]]:
    """Determine donors and splits of a set before it is built.

    Parameters
    ----------
    metas
        All sections, with the splits stated by source and user.
    allow
        Ids of benchmark sections that may be used for training.
    benchmark_ids
        Additional list of benchmark sections, see :func:`load_benchmark`.
    auto_split, seed
        Shares of train, val and test for sections without a split, see :func:`propose_split`.

    Returns
    -------
    metas, notes
        Metadata with final donors and splits, and ``{section_id: note}`` for benchmark sections.

    Raises
    ------
    SourceError
        There is leakage, or ``auto_split`` cannot be satisfied.
    """
    guarded, notes = guard_benchmark(own_donors(metas), allow=allow, benchmark=load_benchmark(benchmark_ids))
    if auto_split is not None:
        guarded = propose_split(guarded, auto_split, seed)
    check_splits(guarded)
    return guarded, notes


@dataclass(frozen=True)
class BenchmarkSection:
    """A section scored by a public benchmark, or one of the same donor."""

    task: str
    id: str
    role: str
    """``scored`` or ``same donor``."""
    donor: str
    """Donor as named by the HEST reader: the truncated title of the study and the patient."""
    known_from: str


def load_benchmark(extra: Path | None = None) -> dict[str, BenchmarkSection]:
    """Return {lower-case id: section} of the list in the package and of ``extra``.

    Parameters
    ----------
    extra
        Tab-separated table with the column ``id`` and optionally ``task``, ``donor`` and ``role``; or one id per line.

    Raises
    ------
    SourceError
        The file cannot be read.
    """
    sections = {s.id.lower(): s for s in _read_list(BENCHMARK_FILE)}
    return sections | ({s.id.lower(): s for s in _read_list(extra)} if extra else {})


def _read_list(path: Path) -> list[BenchmarkSection]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read as a list of benchmark ids ({error})") from error
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


def benchmark_of(meta: SectionMeta, benchmark: Mapping[str, BenchmarkSection]) -> BenchmarkSection | None:
    """Return the benchmark section with the id of ``meta``, if any.

    A benchmark id matches the complete section id, or a word of it if section id or dataset mention HEST
    (``hest_TENX95``); without HEST, ``patient-INT1`` may belong to another study.
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
        Metadata in which protected sections without a split are ``test``; ``{section_id: reason}`` for each protected one.

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
        hint = f"; did you mean {near[0]}?" if near else ""
        raise SourceError(f"--allow-benchmark {unknown[0]}: no section of that id is kept out of training{hint}")
    barred = [m for m in metas if m.section_id in why and m.section_id not in allow and m.split in LEARNING]
    if barred:
        text = "\n".join(f"  {m.section_id} (split {m.split}): {why[m.section_id]}" for m in barred)
        raise SourceError(
            f"{len(barred)} training sections are scored by a benchmark, or their donor is:\n{text}\n"
            "leave them out (--samples), move them to test (--split ID=test), or allow them explicitly (--allow-benchmark ID)"
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
            why[meta.section_id] = f"its donor {meta.donor} is that of {donors[meta.donor]}, which a benchmark scores"
        elif _folded(meta.donor) in names:
            why[meta.section_id] = f"its donor {meta.donor} is that of benchmark section {names[_folded(meta.donor)]}"
    return why


def _folded(donor: str) -> str:
    """Return a donor without case and spaces, which differ between versions of a table."""
    return "".join(donor.split()).lower()


def is_stated(donor: str) -> bool:
    """Return whether a donor is known, rather than a placeholder for one section."""
    return donor.strip().lower() not in UNKNOWN_DONORS and not donor.startswith(UNSTATED)


def own_donors(metas: Sequence[SectionMeta]) -> list[SectionMeta]:
    """Give each section without a donor a placeholder donor of its own, instead of a shared "unknown"."""
    return [m if is_stated(m.donor) else replace(m, donor=f"{UNSTATED}{m.section_id}") for m in metas]


def check_splits(metas: Sequence[SectionMeta]) -> None:
    """Check that no donor is in train (or val) and in test. Train and val may share donors, which is reported.

    Raises
    ------
    SourceError
        A donor is in both; names the donor and the sections.
    """
    for meta in metas:
        if meta.split != "test":
            continue
        shared = [m.section_id for m in metas if m.donor == meta.donor and m.split in LEARNING]
        if shared:
            raise SourceError(
                f"donor {meta.donor} is in the test section {meta.section_id} and in {', '.join(shared)}; "
                "split by donor, with --split SECTION=train|val|test"
            )


def propose_split(metas: Sequence[SectionMeta], shares: Sequence[float], seed: int) -> list[SectionMeta]:
    """Assign splits by donor from hash(seed, donor), independently of which other donors there are.

    Parameters
    ----------
    metas
        Metadata with donors (:func:`own_donors`). A stated split is kept, and applies to all sections of the donor.
    shares
        Shares of train, val and test, summing to 1.
    seed
        Seed of the hash.

    Raises
    ------
    SourceError
        Invalid shares, or an empty split, which can happen with few donors.
    """
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise SourceError(
            f"--auto-split {','.join(f'{s:g}' for s in shares)}: invalid shares; give shares of train, val and test that "
            "sum to 1"
        )
    out = _drawn(metas, shares, seed)
    empty = _empty(out, shares)
    if empty:
        works = next((s for s in range(1000) if not _empty(_drawn(metas, shares, s), shares)), None)
        fix = (
            f"--seed {works} fills all splits"
            if works is not None
            else "there are too few donors; state --split SECTION=SPLIT"
        )
        raise SourceError(f"--auto-split with seed {seed} leaves {' and '.join(empty)} empty; {fix}")
    return out


def _drawn(metas: Sequence[SectionMeta], shares: Sequence[float], seed: int) -> list[SectionMeta]:
    stated = {m.donor: m.split for m in reversed(metas) if m.split}
    bounds = np.cumsum(shares)[:2]

    def split(meta: SectionMeta) -> str:
        draw = float(uniform(seed, "auto-split", meta.donor, index=0))
        return stated.get(meta.donor) or ("train", "val", "test")[int(np.searchsorted(bounds, draw, side="right"))]

    return [m if m.split else replace(m, split=split(m)) for m in metas]


def _empty(metas: Sequence[SectionMeta], shares: Sequence[float]) -> list[str]:
    have = {m.split for m in metas}
    return [
        name for name, share in zip(("train", "val", "test"), shares, strict=True) if share > 0 and name not in have
    ]


# -- duplicate sections -----------------------------------------------------------------------------------------


def section_fingerprint(counts: sparse.csr_matrix, keys: Sequence[str], picture_HW3: np.ndarray) -> dict[str, str]:
    """Return a fingerprint that identifies a section under another id, as text for the manifest.

    Parameters
    ----------
    counts
        Raw counts (spots, genes) by gene key; the fingerprint does not depend on gene names or row order of the source.
    keys
        Gene keys of the columns.
    picture_HW3
        uint8 RGB image of the complete section, any size.
    """
    smallest = np.sort(spot_hashes(counts, keys))[:SKETCH]
    return {"spots": _text(smallest.astype("<u8").tobytes()), "picture": _text(picture_bits(picture_HW3).tobytes())}


def spot_hashes(counts: sparse.csr_matrix, keys: Sequence[str]) -> np.ndarray:
    """Return the distinct hashes, uint64, of the expression of spots with enough counts."""
    counts = sparse.csr_matrix(counts)
    genes = np.array([key(0, "gene", k) for k in keys], np.uint64)
    # A sum is independent of the order of genes; hashing genes and counts avoids collisions between spots.
    entries = bits(0, "entry", index=genes[counts.indices] ^ bits(0, "count", index=counts.data))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(entries, dtype=np.uint64)])  # wraps modulo 2**64
    enough = np.asarray(counts.sum(axis=1)).ravel() >= MIN_PRINT_COUNTS
    return np.unique((sums[counts.indptr[1:]] - sums[counts.indptr[:-1]])[enough])


def picture_bits(picture_HW3: np.ndarray) -> np.ndarray:
    """Return 256 bits packed in 32 bytes: whether each cell of a 16 x 16 grid is brighter than its left neighbour."""
    small = np.asarray(Image.fromarray(picture_HW3).convert("L").resize((17, 16), Image.Resampling.BOX), np.int16)
    return np.packbits(small[:, 1:] - small[:, :-1] > 2)


def check_duplicates(sections: Sequence[tuple[SectionMeta, Mapping[str, Any]]]) -> dict[str, str]:
    """Refuse duplicate sections in different splits; report duplicates in the same split.

    Parameters
    ----------
    sections
        (metadata, :func:`section_fingerprint`) of all sections of a set.

    Returns
    -------
    ``{section_id: note}``.

    Raises
    ------
    SourceError
        There are duplicates; names both sections and what they share.
    """
    notes: dict[str, str] = {}
    for i, j, shared in _alike([p for _, p in sections]) if len(sections) > 1 else ():
        (a, _), (b, _) = sections[i], sections[j]
        if a.split and b.split and a.split != b.split:
            raise SourceError(
                f"{a.section_id} (split {a.split}) and {b.section_id} (split {b.split}) are duplicates of one section: "
                f"{shared}; leave one out (--samples), or give both the same donor and split"
            )
        notes[b.section_id] = f"possibly a duplicate of section {a.section_id}: {shared}"
    return notes


def duplicate_pairs(prints: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Return the pairs i < j of :func:`section_fingerprint` results that are duplicates of one section."""
    return [(i, j) for i, j, _ in _alike(prints)] if len(prints) > 1 else []


def _alike(prints: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, int, str]]:
    """Yield (i, j, what they share) with i < j; only candidate pairs are compared, which scales to thousands of sections."""
    sketches = [np.frombuffer(base64.b64decode(p["spots"]), "<u8") for p in prints]
    holders: dict[int, list[int]] = {}
    for i, sketch in enumerate(sketches):
        for value in sketch.tolist():
            holders.setdefault(value, []).append(i)
    common = Counter(pair for held in holders.values() for pair in combinations(held, 2))
    raw = [np.frombuffer(base64.b64decode(p["picture"]), np.uint8) for p in prints]
    bits = np.unpackbits(np.array(raw, np.uint8).reshape(len(prints), -1), axis=1).astype(np.float32)
    distance = bits @ (1 - bits).T
    distance += distance.T
    # A blank image has hardly any bit set, and would match any other blank one.
    plain = bits.sum(1) <= 2 * PICTURE_BITS
    distance[plain] = distance[:, plain] = np.inf
    near = zip(*np.nonzero(np.triu(distance <= PICTURE_BITS, 1)), strict=True)
    for i, j in sorted({*common, *((int(i), int(j)) for i, j in near)}):
        shared = _shared_spots(sketches[i], sketches[j])
        if shared:
            yield i, j, shared
        elif distance[i, j] <= PICTURE_BITS:
            yield i, j, f"their images differ in {distance[i, j]:.0f} of 256 bits"


def _shared_spots(a: np.ndarray, b: np.ndarray) -> str:
    """Describe how many spots two sketches share, "" if they are few."""
    # Only hashes up to the largest one of a full sketch are comparable: above it, the sketch is cut off.
    limit = min((s[-1] for s in (a, b) if len(s) == SKETCH), default=np.uint64(2**64 - 1))
    a, b = a[a <= limit], b[b <= limit]
    common, least = len(np.intersect1d(a, b)), min(len(a), len(b))
    if common < 2 or common < SHARED_SPOTS * least:
        return ""
    return f"{common} of {least} compared spots have identical counts"


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
