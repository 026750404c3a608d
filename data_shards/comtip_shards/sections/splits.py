"""Assignment and checks of splits by donor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from comtip_shards.errors import SourceError
from comtip_shards.sampling.rng import uniform
from comtip_shards.sections.section import SectionMeta

LEARNING = ("train", "val")
"""Splits that influence the model; val controls early stopping, so it leaks too."""
UNKNOWN_DONORS = {"", "unknown", "na", "n/a", "none", "nan", "?"}
UNSTATED = "unstated:"


def is_stated(donor: str) -> bool:
    """Return whether a donor is known; placeholders of :func:`own_donors` and names such as "unknown" are not."""
    return donor.strip().lower() not in UNKNOWN_DONORS and not donor.startswith(UNSTATED)


def donor_name(donor: str) -> str:
    """Return a donor's name for comparison: lower case without white space; empty if the donor is not stated."""
    return "".join(donor.split()).lower() if is_stated(donor) else ""


def own_donors(metas: Sequence[SectionMeta]) -> list[SectionMeta]:
    """Return the sections; a section that states no donor gets a placeholder of its own instead of a shared "unknown"."""
    return [m if is_stated(m.donor) else replace(m, donor=f"{UNSTATED}{m.section_id}") for m in metas]


def check_splits(metas: Sequence[SectionMeta]) -> None:
    """Check that no donor is both in test and in train or val; train and val may share donors, which a build reports.

    Names are compared by :func:`donor_name`, as an evaluation compares them.

    Raises
    ------
    SourceError
        A donor is in test and in train or val; the message names the donor and the sections.
    """
    names = [donor_name(m.donor) or m.donor for m in metas]
    learning: dict[str, list[str]] = {}
    for meta, name in zip(metas, names, strict=True):
        if meta.split in LEARNING:
            learning.setdefault(name, []).append(meta.section_id)
    for meta, name in zip(metas, names, strict=True):
        if meta.split == "test" and name in learning:
            raise SourceError(
                f"donor {meta.donor} is in the test section {meta.section_id} and in {', '.join(learning[name])}; "
                "build with the same split for all sections of a donor (`splits`)"
            )


def propose_split(metas: Sequence[SectionMeta], shares: Sequence[float], seed: int) -> list[SectionMeta]:
    """Return the sections with splits assigned by hash(seed, donor), so that the split of a donor does not depend on other donors.

    A donor with several spellings, equal by :func:`donor_name`, is drawn by the first of them.

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
        The shares are invalid, or a split is left empty, which can happen with few donors.
    """
    if len(shares) != 3 or min(shares) < 0 or not abs(sum(shares) - 1) <= 1e-6:
        raise SourceError(
            f"`auto_split` {','.join(f'{s:g}' for s in shares)}: invalid shares; give shares of train, val and test that "
            "sum to 1"
        )
    out = _drawn(metas, shares, seed)
    empty = _empty(out, shares)
    if empty:
        works = next((s for s in range(1000) if not _empty(_drawn(metas, shares, s), shares)), None)
        fix = (
            f"use `seed={works}`, which fills all splits"
            if works is not None
            else "there are too few donors; set the share of the empty split to 0, or state the split of each section (`splits`) instead"
        )
        raise SourceError(f"`auto_split` with seed {seed} leaves {' and '.join(empty)} empty; {fix}")
    return out


def _drawn(metas: Sequence[SectionMeta], shares: Sequence[float], seed: int) -> list[SectionMeta]:
    names = {m.donor: donor_name(m.donor) or m.donor for m in metas}
    stated = {names[m.donor]: m.split for m in reversed(metas) if m.split}
    spelling = {names[m.donor]: m.donor for m in reversed(metas)}
    bounds = np.cumsum(shares)[:2]

    def split(meta: SectionMeta) -> str:
        name = names[meta.donor]
        draw = float(uniform(seed, "auto-split", spelling[name], index=0))
        return stated.get(name) or ("train", "val", "test")[int(np.searchsorted(bounds, draw, side="right"))]

    return [m if m.split else replace(m, split=split(m)) for m in metas]


def _empty(metas: Sequence[SectionMeta], shares: Sequence[float]) -> list[str]:
    have = {m.split for m in metas}
    return [
        name for name, share in zip(("train", "val", "test"), shares, strict=True) if share > 0 and name not in have
    ]
