"""Prevent leakage between training and test data: shared donors and benchmark sections.

Splits are by donor, not by section, because sections of one tumour are nearly identical. A build makes three checks, the first
two before it reads the sections (:func:`enforce_split_policy`):

* :func:`comtip_shards.sections.benchmark.guard_benchmark` keeps sections of public benchmarks, and of their donors, out of
  training;
* :func:`comtip_shards.sections.splits.check_splits` refuses a donor that is in train (or val) and in test;
* :func:`comtip_shards.sections.duplicates.check_duplicates` refuses duplicate sections in different splits, detected by
  counts and image.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from comtip_shards.sections.benchmark import guard_benchmark, load_benchmark
from comtip_shards.sections.section import SectionMeta
from comtip_shards.sections.splits import check_splits, own_donors, propose_split


def enforce_split_policy(
    metas: Sequence[SectionMeta],
    *,
    allow: Collection[str] = (),
    benchmark_ids: Path | None = None,
    auto_split: Sequence[float] | None = None,
    seed: int = 0,
) -> tuple[list[SectionMeta], dict[str, str]]:
    """Return the final donors and splits of a set, and check them for leakage, before it is built.

    Parameters
    ----------
    metas
        All sections, with the splits stated by source and user.
    allow
        Ids of benchmark sections that may be used for training.
    benchmark_ids
        Additional list of benchmark sections, see :func:`comtip_shards.sections.benchmark.load_benchmark`.
    auto_split, seed
        Shares of train, val and test for sections without a split, see :func:`comtip_shards.sections.splits.propose_split`.

    Returns
    -------
    metas, notes
        Metadata with final donors and splits, and ``{section_id: note}`` for benchmark sections.

    Raises
    ------
    SourceError
        A donor or a benchmark section would leak, ``allow`` names an unprotected section, the file ``benchmark_ids`` cannot
        be read, or ``auto_split`` is invalid or leaves a split empty.
    """
    guarded, notes = guard_benchmark(own_donors(metas), allow=allow, benchmark=load_benchmark(benchmark_ids))
    if auto_split is not None:
        guarded = propose_split(guarded, auto_split, seed)
    check_splits(guarded)
    return guarded, notes
