"""Features (rows) of 10x Genomics matrices: feature types, genomes of mixed references, and species detection."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from comtip_shards.errors import SourceError
from comtip_shards.genes.species import species_name

GENE_KIND = "Gene Expression"
OTHER_GENOME = "genome "
"""Prefix of the feature type that is assigned to genes of another genome."""
MIXED_SHARE = 0.05
"""Maximum share of genes of a second species; above it, the species must be stated."""
_GENOME = re.compile(r"(?P<genome>(?:GRCh3\d|GRCm3\d|hg\d\d|mm\d\d?)[A-Za-z0-9.\-]*)_+(?=[^_])", re.IGNORECASE)
_CHANGED_GENOME = re.compile(
    r"(?P<genome>(?:GRCh3\d|GRCm3\d|hg\d\d|mm\d\d?)(?:[-.]20\d\d[-.][A-Z])?)[-.]+(?=\w)|(?P<species>human|mouse)[-_.]+(?=\w)",
    re.IGNORECASE,
)
"""A prefix whose underscores Seurat or R changed (``GRCh38-ERBB2``, ``mm10---Stk4``), or the name of a species (``HUMAN_ERBB2``)."""
_ENSEMBL = {"ENSG": "human", "ENSMUSG": "mouse"}


@dataclass(frozen=True)
class Features:
    """Identifiers, symbols and types of the features of a matrix."""

    ids: list[str]
    symbols: list[str]
    kinds: list[str]
    """Feature types: ``Gene Expression`` or "" for genes; another text, such as ``Antibody Capture``, for other features."""

    def genes(self) -> np.ndarray:
        """Return the indices of gene rows, int64; antibodies, controls and other genomes are excluded."""
        return np.flatnonzero([kind in ("", GENE_KIND) for kind in self.kinds])

    def only_genes(self) -> Features:
        """Return the features that are genes, with the feature type ``Gene Expression``."""
        rows = self.genes()
        return Features([self.ids[i] for i in rows], [self.symbols[i] for i in rows], [GENE_KIND] * len(rows))

    def others(self) -> dict[str, int]:
        """Return {feature type: number of features} of the types other than genes of this species."""
        return dict(sorted(Counter(k for k in self.kinds if k not in ("", GENE_KIND)).items()))

    def others_note(self, tally: Mapping[str, int] | None = None) -> list[str]:
        """Return one note for each feature type that is excluded, with its number of features.

        Parameters
        ----------
        tally
            Sum of counts of each feature type, with genes under ``Gene Expression``. If given, the note on the genes of another
            genome also states which share of the counts is theirs, among these and the genes of the section's species.
        """
        notes = []
        for kind, n in self.others().items():
            if not kind.startswith(OTHER_GENOME):
                notes.append(f"{n} features are not genes: {kind}")
                continue
            genes, other = (tally or {}).get(GENE_KIND, 0), (tally or {}).get(kind, 0)
            share = f", with {other / (genes + other):.1%} of the counts" if genes + other else ""
            notes.append(f"{n} features excluded: {kind}{share}")
        return notes


def counts_by_kind(kinds: Sequence[str], sums: np.ndarray) -> dict[str, int]:
    """Return the sum of counts of each feature type, from the ``sums`` per feature.

    A sum that is not finite counts as 0: values of features that are not genes were not checked.
    """
    names = np.array([kind or GENE_KIND for kind in kinds])
    totals = {kind: float(sums[names == kind].sum()) for kind in np.unique(names).tolist()}
    return {kind: int(total) if np.isfinite(total) else 0 for kind, total in totals.items()}


def for_species(features: Features, stated: str | None, where: Path) -> tuple[Features, str]:
    """Mark the features of other species, and strip genome prefixes (``GRCh38_ENSG...``, ``mm10___Stk4``).

    Parameters
    ----------
    features
        Row names as in the file.
    stated
        The species stated by the caller or the source; if None or "", it is detected from Ensembl ids and genome names.
    where
        File name for messages.

    Returns
    -------
    The features, and the species. Genes of another species have the feature type ``genome NAME (SPECIES)``, or ``genome of another species
    (SPECIES)`` if the genome is not named.

    Raises
    ------
    SourceError
        The species is not stated and cannot be detected, or the stated species contradicts the ids.
    """
    split = [_split(i, s) for i, s in zip(features.ids, features.symbols, strict=True)]
    species = [_row_species(genome, i) for genome, i, _ in split]
    genes = set(features.genes().tolist())
    seen = Counter(species[i] for i in genes if species[i])
    unclear = [features.ids[i] for i in sorted(genes) if not species[i]]
    chosen = species_name(stated) if stated else _detected(seen, unclear, where)
    others = {name: n for name, n in seen.items() if name != chosen}
    if others and not seen.get(chosen) and sum(others.values()) > 0.5 * len(genes):
        name = max(others, key=lambda k: others[k])
        example = next(features.ids[i] for i in sorted(genes) if species[i] == name)
        raise SourceError(
            f"{where}: the species is stated as {chosen}, but gene ids such as {example} are of {name}; set `species` to {name}"
        )
    kinds = list(features.kinds)
    for row in genes:
        if species[row] not in ("", chosen):
            genome = split[row][0] or "of another species"
            kinds[row] = f"{OTHER_GENOME}{genome} ({species[row]})"
    return replace(features, ids=[i for _, i, _ in split], symbols=[s for _, _, s in split], kinds=kinds), chosen


def species_of(ids: Sequence[str], where: Path) -> str:
    """Detect the species from gene ids; raises SourceError, starting with ``where``, if it cannot be detected."""
    return for_species(Features(list(ids), [""] * len(ids), [GENE_KIND] * len(ids)), "", where)[1]


def _detected(seen: Mapping[str, int], unclear: Sequence[str], where: Path) -> str:
    """Return the species of most genes; raises SourceError if half of the ids or more are ``unclear`` or species are mixed."""
    total = sum(seen.values())
    if total <= len(unclear):
        why = f"gene ids such as {', '.join(unclear[:3])} are not Ensembl ids" if unclear else "there are no genes"
        raise SourceError(f"{where}: species not detected, because {why}; set `species`")
    first = max(seen, key=lambda k: seen[k])
    if seen[first] < (1 - MIXED_SHARE) * total:
        found = " and ".join(f"{n} of {name}" for name, n in sorted(seen.items()))
        raise SourceError(f"{where}: genes of two species, {found}; set `species` to the one to read")
    return first


def _split(identifier: str, symbol: str) -> tuple[str, str, str]:
    """Return (genome or "", identifier, symbol) without genome prefixes."""
    ids, names = (_GENOME.match(text) or _CHANGED_GENOME.match(text) for text in (identifier, symbol))
    match = ids or names
    genome = "" if match is None else next(part for part in match.groups() if part)
    return genome, identifier[ids.end() :] if ids else identifier, symbol[names.end() :] if names else symbol


def _row_species(genome: str, identifier: str) -> str:
    if genome:
        return "human" if genome.lower().startswith(("grch", "hg", "human")) else "mouse"
    match = re.match(r"(ENS(?:MUS)?G)\d{6,}", identifier, re.IGNORECASE)
    return "" if match is None else _ENSEMBL[match[1].upper()]
