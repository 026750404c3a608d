"""Facts about a section in the columns of ``obs`` and in ``uns`` of an AnnData."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd

from comtip_shards.genes.species import species_name
from comtip_shards.sections.facts import SectionFacts
from comtip_shards.sources.anndata_parts.store import Store

_COLUMNS = {
    "tissue": ("tissue", "organ"),
    "donor": ("donor", "donor_id", "patient"),
    "species": ("species", "organism", "organism_ontology_term_id"),
    "platform": ("platform", "assay", "technology"),
}
_UNKNOWN = {"", "na", "n/a", "nan", "<na>", "none", "null", "unknown"}
"""Texts for a missing value, in lower case; R writes NA. Taken as a donor, such a text would join sections of different donors."""
_FLAGS = {"true", "false"}


@dataclass(frozen=True)
class ObsFacts:
    """Facts that the caller stated or that were found in the AnnData; empty if unknown."""

    species: str = ""
    """As stated or found, so not necessarily human or mouse."""
    tissue: str = ""
    donor: str = ""
    platform: str = ""

    @property
    def is_visium(self) -> bool:
        """Whether the platform is Visium (not Visium HD)."""
        return self.platform.lower() == "visium"


def facts_of(obs: pd.DataFrame, facts: SectionFacts, store: Store | None = None) -> ObsFacts:
    """Return the stated facts, completed from columns of ``obs`` and entries of ``uns`` with a single value."""
    return ObsFacts(
        facts.species or species_name(_found("species", obs, store)),
        facts.tissue or _found("tissue", obs, store),
        facts.donor or _found("donor", obs, store),
        facts.platform or _platform(_found("platform", obs, store)),
    )


def _found(name: str, obs: pd.DataFrame, store: Store | None) -> str:
    columns = _COLUMNS[name]
    found = [str(obs[c].iloc[0]) for c in columns if c in obs and len(obs) and obs[c].astype(str).nunique() == 1]
    if store is not None:
        stored = [store[f"uns/{c}"] for c in columns if f"uns/{c}" in store and not store.keys(f"uns/{c}")]
        found += [str(np.ravel(v)[0]) for v in stored if np.size(v) == 1]  # R writes scalars as lists with one value
    found = [v.strip() for v in found if v.strip().lower() not in _UNKNOWN]
    if name == "tissue":  # obs["tissue"] may also be the flag or the share of tissue under a spot
        found = [v for v in found if any(c.isalpha() for c in v) and v.lower() not in _FLAGS]
    return next(iter(found), "")


def _platform(assay: str) -> str:
    """Return ``Visium HD`` or ``Visium`` for an assay with this name in its text; other assays are not changed."""
    plain = assay.lower()
    # Other spellings than these would make bins of 2 to 16 um spots with a pitch of 100 um.
    return "Visium HD" if re.search(r"visium[\W_]*hd", plain) else "Visium" if "visium" in plain else assay
