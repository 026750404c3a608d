"""Keep what a model is scored on out of what it learns from: donors, benchmark sections, sections that stand twice.

Donors are split, not sections: a model that saw one section of a tumour knows the next one. Three guards:

* :func:`guard_benchmark` keeps sections of public benchmarks, and of their donors, out of training;
* :func:`check_splits` refuses a donor in train (or val) and in test;
* :func:`check_duplicates` refuses one section under two ids in different splits, by its counts and its picture.
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
"""Splits that a model is made from; val stops training, so it leaks too."""
UNKNOWN_DONORS = {"", "unknown", "na", "n/a", "none", "nan", "?"}
UNSTATED = "unstated:"
SKETCH = 128
"""Spots whose hashes stand for a section: the smallest ones, so that two sketches share what two sections share."""
MIN_PRINT_COUNTS = 20
"""A spot with fewer counts may agree with another by chance."""
SHARED_SPOTS, PICTURE_BITS = 0.2, 12
"""Two sections are one when so large a share of the smaller one's spots has the same counts, or when so few of the 256
bits of their pictures differ. Serial sections share no spot, and in ``samples/`` their pictures differ in 26 bits or
more; a shrunk and compressed copy differs in at most 5 from its original."""


def enforce_split_policy(
    metas: Sequence[SectionMeta],
    *,
    allow: Collection[str] = (),
    benchmark_ids: Path | None = None,
    auto_split: Sequence[float] | None = None,
    seed: int = 0,
) -> tuple[list[SectionMeta], dict[str, str]]:
    """Settle donors and splits of a set before anything is built.

    Parameters
    ----------
    metas
        All sections, with the splits that source and user state.
    allow
        Ids of benchmark sections that may be trained on.
    benchmark_ids
        A further list of benchmark sections, see :func:`load_benchmark`.
    auto_split, seed
        Shares of train, val and test for sections without a split, see :func:`propose_split`.

    Returns
    -------
    metas, notes
        With donors and splits as they are built, and ``{section_id: note}`` where the guard spoke.

    Raises
    ------
    SourceError
        Leakage, or a request that cannot be met.
    """
    guarded, notes = guard_benchmark(own_donors(metas), allow=allow, benchmark=load_benchmark(benchmark_ids))
    if auto_split is not None:
        guarded = propose_split(guarded, auto_split, seed)
    check_splits(guarded)
    return guarded, notes


@dataclass(frozen=True)
class BenchmarkSection:
    """A section that a public benchmark scores, or one of the same donor."""

    task: str
    id: str
    role: str
    """``scored`` or ``same donor``."""
    donor: str
    """As the HEST reader names it: the study's title, cut, and the patient in it."""
    known_from: str


def load_benchmark(extra: Path | None = None) -> dict[str, BenchmarkSection]:
    """Return {id in lower case: section} of the list that comes with the package, and of ``extra``.

    Parameters
    ----------
    extra
        A table with the column ``id`` and, where known, ``task``, ``donor`` and ``role``; tab-separated, or just one id
        a line.

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
        raise SourceError(f"{path}: holds no benchmark id; write one a line, or a table with the column id")
    if "id" not in lines[0].split("\t"):
        if "\t" in lines[0]:
            raise SourceError(f"{path}: the table lacks the column id; it has {', '.join(lines[0].split(chr(9)))}")
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
    """Return the benchmark section that ``meta`` is, by its id.

    An id counts when it is the whole section id, or a word of it where section id or dataset mention HEST
    (``hest_TENX95``): a section of another study may be called ``patient-INT1``.
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
        All sections of a set, with the splits that source and user state.
    allow
        Ids of sections that may be trained on all the same.
    benchmark
        What is protected, by default :func:`load_benchmark`.

    Returns
    -------
    metas, notes
        Protected sections without a split are ``test`` now; ``{section_id: why}`` for each protected one.

    Raises
    ------
    SourceError
        A protected section is to be trained or validated on, or ``allow`` names none of the sections.
    """
    known = load_benchmark() if benchmark is None else benchmark
    why = _protected(metas, known)
    unknown = sorted(set(allow) - set(why))
    if unknown:
        near = difflib.get_close_matches(unknown[0], sorted(why), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise SourceError(f"--allow-benchmark {unknown[0]}: no section of that id is kept out of training here{hint}")
    barred = [m for m in metas if m.section_id in why and m.section_id not in allow and m.split in LEARNING]
    if barred:
        text = "\n".join(f"  {m.section_id} (split {m.split}): {why[m.section_id]}" for m in barred)
        raise SourceError(
            f"{len(barred)} sections are to be trained on, but a benchmark scores them or their donor:\n{text}\n"
            "leave them out (--samples), make them test (--split ID=test), or train on them knowingly (--allow-benchmark ID)"
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
    """Return a donor without what differs between versions of a table: case and spaces."""
    return "".join(donor.split()).lower()


def is_stated(donor: str) -> bool:
    """Tell whether a donor is known, rather than a stand-in for one section."""
    return donor.strip().lower() not in UNKNOWN_DONORS and not donor.startswith(UNSTATED)


def own_donors(metas: Sequence[SectionMeta]) -> list[SectionMeta]:
    """Give each section without a donor one of its own: it could be of any, and never is one big "unknown"."""
    return [m if is_stated(m.donor) else replace(m, donor=f"{UNSTATED}{m.section_id}") for m in metas]


def check_splits(metas: Sequence[SectionMeta]) -> None:
    """Refuse a donor in train (or val) and test. Train and val may share one; that is reported.

    Raises
    ------
    SourceError
        Naming donor and sections.
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
    """Fill in splits by donor: each donor falls where hash(seed, donor) does, whatever other donors there are.

    Parameters
    ----------
    metas
        With donors (:func:`own_donors`). A section that has a split keeps it, and its donor's others join it.
    shares
        Of train, val and test; they sum to 1.
    seed
        Another seed, another draw.

    Raises
    ------
    SourceError
        Shares that cannot be, or a split that stays empty: hashes of few donors may all fall on one side.
    """
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise SourceError(
            f"--auto-split {','.join(f'{s:g}' for s in shares)}: give shares of train, val and test that sum to 1"
        )
    out = _drawn(metas, shares, seed)
    empty = _empty(out, shares)
    if empty:
        works = next((s for s in range(1000) if not _empty(_drawn(metas, shares, s), shares)), None)
        fix = (
            f"--seed {works} fills all"
            if works is not None
            else "there are too few donors; state --split SECTION=SPLIT"
        )
        raise SourceError(f"--auto-split with seed {seed} leaves {' and '.join(empty)} empty; {fix}")
    return out


def _drawn(metas: Sequence[SectionMeta], shares: Sequence[float], seed: int) -> list[SectionMeta]:
    stated = {m.donor: m.split for m in reversed(metas) if m.split}
    bounds = np.cumsum(shares)[:2]

    def split(meta: SectionMeta) -> str:
        at = float(uniform(seed, "auto-split", meta.donor, index=0))
        return stated.get(meta.donor) or ("train", "val", "test")[int(np.searchsorted(bounds, at, side="right"))]

    return [m if m.split else replace(m, split=split(m)) for m in metas]


def _empty(metas: Sequence[SectionMeta], shares: Sequence[float]) -> list[str]:
    have = {m.split for m in metas}
    return [
        name for name, share in zip(("train", "val", "test"), shares, strict=True) if share > 0 and name not in have
    ]


# -- one section under two ids ----------------------------------------------------------------------------------


def section_fingerprint(counts: sparse.csr_matrix, keys: Sequence[str], picture_HW3: np.ndarray) -> dict[str, str]:
    """Return what a section is recognised by under another id, as text for the manifest.

    Parameters
    ----------
    counts
        Raw counts (spots, genes) by gene key, so that it does not matter how a source names genes or orders rows.
    keys
        Gene keys of the columns.
    picture_HW3
        uint8 RGB of the whole section, any size.
    """
    smallest = np.sort(spot_hashes(counts, keys))[:SKETCH]
    return {"spots": _text(smallest.astype("<u8").tobytes()), "picture": _text(picture_bits(picture_HW3).tobytes())}


def spot_hashes(counts: sparse.csr_matrix, keys: Sequence[str]) -> np.ndarray:
    """Return the distinct hashes, uint64, of the expression of spots with enough counts."""
    counts = sparse.csr_matrix(counts)
    genes = np.array([key(0, "gene", k) for k in keys], np.uint64)
    # A sum does not depend on the order of genes; hashing both parts keeps sums of different spots apart.
    entries = bits(0, "entry", index=genes[counts.indices] ^ bits(0, "count", index=counts.data))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(entries, dtype=np.uint64)])  # wraps, as it may
    enough = np.asarray(counts.sum(axis=1)).ravel() >= MIN_PRINT_COUNTS
    return np.unique((sums[counts.indptr[1:]] - sums[counts.indptr[:-1]])[enough])


def picture_bits(picture_HW3: np.ndarray) -> np.ndarray:
    """Return 256 bits, packed in 32 bytes: in a grid of 16 x 16, is a cell clearly brighter than the one to its left."""
    small = np.asarray(Image.fromarray(picture_HW3).convert("L").resize((17, 16), Image.Resampling.BOX), np.int16)
    return np.packbits(small[:, 1:] - small[:, :-1] > 2)


def check_duplicates(sections: Sequence[tuple[SectionMeta, Mapping[str, Any]]]) -> dict[str, str]:
    """Refuse one section under two ids in different splits; report one that stands twice in the same split.

    Parameters
    ----------
    sections
        (facts, :func:`section_fingerprint`) of all sections of a set.

    Returns
    -------
    ``{section_id: note}``.

    Raises
    ------
    SourceError
        Naming both sections and what they share.
    """
    notes: dict[str, str] = {}
    for i, j, shared in _alike([p for _, p in sections]) if len(sections) > 1 else ():
        (a, _), (b, _) = sections[i], sections[j]
        if a.split and b.split and a.split != b.split:
            raise SourceError(
                f"{a.section_id} (split {a.split}) and {b.section_id} (split {b.split}) are one section under two ids: "
                f"{shared}; leave one out (--samples), or give both the same donor and split"
            )
        notes[b.section_id] = f"perhaps the section {a.section_id} under another id: {shared}"
    return notes


def _alike(prints: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, int, str]]:
    """Yield (i, j, what they share), i < j; thousands of sections take a second, since only pairs that share are compared."""
    sketches = [np.frombuffer(base64.b64decode(p["spots"]), "<u8") for p in prints]
    holders: dict[int, list[int]] = {}
    for i, sketch in enumerate(sketches):
        for value in sketch.tolist():
            holders.setdefault(value, []).append(i)
    common = Counter(pair for held in holders.values() for pair in combinations(held, 2))
    raw = [np.frombuffer(base64.b64decode(p["picture"]), np.uint8) for p in prints]
    bits = np.unpackbits(np.array(raw, np.uint8).reshape(len(prints), -1), axis=1).astype(np.float32)
    apart = bits @ (1 - bits).T
    apart += apart.T
    # A blank picture has hardly a bit set, and would be like any other blank one.
    plain = bits.sum(1) <= 2 * PICTURE_BITS
    apart[plain] = apart[:, plain] = np.inf
    near = zip(*np.nonzero(np.triu(apart <= PICTURE_BITS, 1)), strict=True)
    for i, j in sorted({*common, *((int(i), int(j)) for i, j in near)}):
        shared = _shared_spots(sketches[i], sketches[j])
        if shared:
            yield i, j, shared
        elif apart[i, j] <= PICTURE_BITS:
            yield i, j, f"their pictures differ in {apart[i, j]:.0f} of 256 bits"


def _shared_spots(a: np.ndarray, b: np.ndarray) -> str:
    """Say how many spots two sketches share, "" where it is few."""
    # Of a sketch only what lies below the other's largest hash could be in it: a full sketch says nothing above.
    limit = min((s[-1] for s in (a, b) if len(s) == SKETCH), default=np.uint64(2**64 - 1))
    a, b = a[a <= limit], b[b <= limit]
    common, least = len(np.intersect1d(a, b)), min(len(a), len(b))
    if common < 2 or common < SHARED_SPOTS * least:
        return ""
    return f"{common} of {least} compared spots have exactly the same counts"


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
