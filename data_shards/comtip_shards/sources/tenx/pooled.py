"""Helpers shared by the readers that pool bins, cells or transcripts to pseudo-spots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from comtip_shards.errors import SourceError
from comtip_shards.sections.facts import SectionFacts
from comtip_shards.sections.pooling import Pooled
from comtip_shards.sections.section import Section, SectionMeta
from comtip_shards.sources.tenx.features import Features


def pooled_meta(
    path: Path,
    name: str,
    facts: SectionFacts,
    *,
    species: str,
    platform: str,
    mpp: float,
    pool_um: float,
    pooling: str,
) -> SectionMeta:
    """Return the metadata of a section of square pseudo-spots."""
    if not facts.tissue:
        raise SourceError(f"{path}: the folder does not state the tissue; set --tissue")
    return SectionMeta(
        section_id=name,
        dataset=name,
        species=species.lower(),
        tissue=facts.tissue,
        donor=facts.donor or "",
        platform=facts.platform or platform,
        licence=facts.licence or "",
        attribution=facts.attribution or "",
        mpp=mpp,
        spot_diameter_um=pool_um,
        spot_pitch_um=pool_um,
        pooling=pooling,
    )


def pooled_section(
    meta: SectionMeta,
    image: Path,
    pooled: Pooled,
    xy: np.ndarray,
    genes: Features,
    *,
    dropped: Mapping[str, int],
    units: str,
    notes: Sequence[str],
) -> Section:
    """Return a section of pseudo-spots.

    Parameters
    ----------
    xy
        float64 (N, 2), centres in image px.
    genes
        Columns of ``pooled.counts``.
    dropped
        Number of excluded pseudo-spots by reason.
    units
        Name of the pooled units, e.g. ``bins``.
    """
    held = f"excluded pseudo-spots: {pooled.dropped_units:,} {units} with {pooled.dropped_counts:,} counts"
    return Section(
        meta,
        image,
        pooled.counts,
        genes.ids,
        genes.symbols,
        pooled.ids(),
        xy,
        pooled.square_N2.astype(np.float64),
        [""] * len(xy),
        {reason: n for reason, n in dropped.items() if n},
        [*notes, held] if pooled.dropped_squares else list(notes),
        n_pooled=pooled.n_units,
    )
