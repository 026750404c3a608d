"""Gene identifiers of any source to one key per gene: ``species:symbol``.

Ensembl ids (with or without version), approved symbols, previous symbols and unambiguous aliases are understood,
in this order; between two candidates nothing is guessed.
"""

from __future__ import annotations

import csv
import gzip
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
from scipy import sparse

SPECIES = ("human", "mouse")
RESOURCE = "genes_v1.tsv.gz"
_ENSEMBL = re.compile(r"(ENS(?:MUS)?G\d{11})(?:\.\d+)?(?:_PAR_Y)?$", re.IGNORECASE)
_EXCEL_DATE = re.compile(r"\d{1,2}-(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)$", re.IGNORECASE)


@dataclass(frozen=True)
class GeneHit:
    """How one identifier was understood."""

    key: str
    """``human:KRT14``; for what is not known, species and the identifier itself."""
    species: str
    symbol: str
    ensembl: str
    name: str
    how: str
    """``ensembl``, ``symbol``, ``previous``, ``alias`` or ``unmapped``."""


class GeneResource:
    """The gene-name table that ships with this package."""

    def __init__(self, rows: Sequence[dict[str, str]]) -> None:
        self.rows = rows
        self._ensembl: dict[tuple[str, str], int] = {}
        self._symbol: dict[tuple[str, str], int] = {}
        self._folded: dict[tuple[str, str], set[int]] = defaultdict(set)
        self._previous: dict[tuple[str, str], set[int]] = defaultdict(set)
        self._alias: dict[tuple[str, str], set[int]] = defaultdict(set)
        for i, row in enumerate(rows):
            species = row["species"]
            if row["ensembl"]:
                self._ensembl.setdefault((species, row["ensembl"]), i)
            self._symbol.setdefault((species, row["symbol"]), i)
            self._folded[species, row["symbol"].upper()].add(i)
            for text in filter(None, row["previous"].split("|")):
                self._previous[species, text.upper()].add(i)
            for text in filter(None, row["aliases"].split("|")):
                self._alias[species, text.upper()].add(i)

    @staticmethod
    @cache
    def load() -> GeneResource:
        """Read the table once per process."""
        raw = files("comtip_shards.genes").joinpath("resources", RESOURCE).read_bytes()
        lines = gzip.decompress(raw).decode("utf-8").splitlines()
        return GeneResource(list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)))

    def resolve(self, identifier: str, species: str) -> GeneHit:
        """Understand one identifier of one species.

        Raises
        ------
        ValueError
            For a species that the table does not hold.
        """
        if species not in SPECIES:
            raise ValueError(f"species {species!r}: the gene table holds {' and '.join(SPECIES)}")
        text = identifier.strip()
        found, how = self._find(text, species)
        if found is None:
            return GeneHit(f"{species}:{text}", species, text, "", "", "unmapped")
        row = self.rows[found]
        return GeneHit(f"{species}:{row['symbol']}", species, row["symbol"], row["ensembl"], row["name"], how)

    def _find(self, text: str, species: str) -> tuple[int | None, str]:
        match = _ENSEMBL.match(text)
        if match:
            stem = match.group(1).upper()
            if (species, stem) in self._ensembl:
                return self._ensembl[species, stem], "ensembl"
            return _only(self._alias.get((species, stem))), "ensembl"
        if (species, text) in self._symbol:
            return self._symbol[species, text], "symbol"
        for table, how in ((self._folded, "symbol"), (self._previous, "previous"), (self._alias, "alias")):
            candidates = table.get((species, text.upper()))
            if candidates:
                return _only(candidates), how
        return None, "unmapped"


def _only(candidates: set[int] | None) -> int | None:
    return next(iter(candidates)) if candidates is not None and len(candidates) == 1 else None


@dataclass
class GeneMap:
    """A source's gene columns in terms of keys."""

    hits: list[GeneHit]
    keys: list[str]
    """Distinct keys of mapped columns, in first-seen order."""
    column_to_key: np.ndarray
    """int64 (n_columns,), position in ``keys``; -1 for what is not mapped."""
    collisions: dict[str, list[str]]
    """Keys that more than one column maps to; their counts are summed."""
    unmapped: list[str]

    @property
    def counts_by_how(self) -> dict[str, int]:
        """Number of columns by how they were understood."""
        out: dict[str, int] = {}
        for hit in self.hits:
            out[hit.how] = out.get(hit.how, 0) + 1
        return out

    def sum_columns(self, counts: sparse.csr_matrix) -> sparse.csr_matrix:
        """Return counts by key, int32 (n, len(keys)); columns of one key are summed, unmapped ones left out."""
        known = np.flatnonzero(self.column_to_key >= 0)
        shape = (counts.shape[1], len(self.keys))
        ones = np.ones(known.size, np.int64)
        to_key = sparse.csr_matrix((ones, (known, self.column_to_key[known])), shape=shape)
        out = sparse.csr_matrix(counts.astype(np.int64) @ to_key, dtype=np.int64)
        out.sort_indices()
        if out.nnz and out.data.max() > np.iinfo(np.int32).max:
            raise OverflowError("a summed count exceeds 2,147,483,647")
        return out.astype(np.int32)

    def report(self) -> str:
        """Say what mapped, what was summed and what did not map."""
        parts = ", ".join(f"{n} by {how}" for how, n in sorted(self.counts_by_how.items()) if how != "unmapped")
        lines = [f"{len(self.hits)} gene columns: {parts or 'none mapped'}; {len(self.unmapped)} not mapped"]
        if self.collisions:
            shown = "; ".join(f"{k} <- {' + '.join(v)}" for k, v in list(self.collisions.items())[:3])
            lines.append(f"{len(self.collisions)} keys sum several columns: {shown}")
        if self.unmapped:
            lines.append(
                f"not mapped, left out: {', '.join(self.unmapped[:8])}{' ...' if len(self.unmapped) > 8 else ''}"
            )
        dates = [u for u in self.unmapped if _EXCEL_DATE.match(u)]
        if dates:
            lines.append(f"{len(dates)} look like symbols that a spreadsheet turned into dates: {', '.join(dates[:5])}")
        return "\n".join(lines)


def map_genes(
    identifiers: Sequence[str], species: str, resource: GeneResource | None = None, symbols: Sequence[str] = ()
) -> GeneMap:
    """Map a source's gene columns to keys.

    Parameters
    ----------
    identifiers
        One per column, as in the source.
    species
        ``human`` or ``mouse``.
    resource
        The gene-name table; the shipped one by default.
    symbols
        The source's own symbols, tried where an identifier is not known; empty or one per column.
    """
    resource = resource or GeneResource.load()
    hits = [resource.resolve(text, species) for text in identifiers]
    if symbols:
        second = [
            resource.resolve(s, species) if h.how == "unmapped" and s else h for h, s in zip(hits, symbols, strict=True)
        ]
        hits = [s if s.how != "unmapped" else h for h, s in zip(hits, second, strict=True)]
    place: dict[str, int] = {}
    columns: dict[str, list[str]] = defaultdict(list)
    index = np.full(len(hits), -1, np.int64)
    for i, (hit, text) in enumerate(zip(hits, identifiers, strict=True)):
        if hit.how != "unmapped":
            index[i] = place.setdefault(hit.key, len(place))
            columns[hit.key].append(text)
    collisions = {k: v for k, v in columns.items() if len(v) > 1}
    unmapped = [t for t, h in zip(identifiers, hits, strict=True) if h.how == "unmapped"]
    return GeneMap(hits, list(place), index, collisions, unmapped)
