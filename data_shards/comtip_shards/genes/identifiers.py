"""Mapping of gene identifiers to one key per gene: ``species:symbol``.

Ensembl ids (with or without version), approved symbols, previous symbols and aliases are resolved in this order, then Ensembl
ids that are joined to a symbol. Names changed by spreadsheets (dates) and by R (dots, tails of make.unique) are repaired where
exactly one symbol fits. Ambiguous identifiers stay unmapped.
"""

from __future__ import annotations

import csv
import gzip
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import numpy as np
from scipy import sparse

from comtip_shards.errors import SourceError
from comtip_shards.genes.spreadsheet_dates import AMBIGUOUS, MONTHS, dates_of, serial_dates_of

SPECIES = ("human", "mouse")
RESOURCE = "genes_v1.tsv.gz"
_ENSEMBL = re.compile(r"(ENS(?:MUS)?G\d{11})(?:\.\d+)?(?:_PAR_Y)?$", re.IGNORECASE)
_JOINED = re.compile(
    r"(?:^|[_|:;,/ -])(ENS(?:MUS)?G\d{11})(?:\.\d+)?(?=[_|:;,/ -])|[_|:;,/ -](ENS(?:MUS)?G\d{11})(?:\.\d+)?$",
    re.IGNORECASE,
)
"""An Ensembl id that is joined to a symbol, as count tables of R have it (``ERBB2_ENSG00000141736``)."""
NAMES_PER_NUMBER = 20
"""Numbers are taken for dates of a spreadsheet only if the source has at least this many names for each name that is a number."""
_NUMBER = re.compile(r"X?\d+(?:\.0)?")
_TAIL = re.compile(r"(?P<stem>.+)[-.]\d{1,2}$")
_SEPARATOR = re.compile(r"[^A-Za-z0-9]")
REPAIRED = ("date", "dots", "tail")
"""Values of :attr:`GeneHit.how` for repaired names."""


@dataclass(frozen=True)
class GeneHit:
    """Result of resolving one gene identifier."""

    key: str
    """``human:KRT14``; for unknown identifiers, the species and the identifier."""
    species: str
    symbol: str
    ensembl: str
    name: str
    how: str
    """``ensembl``, ``symbol``, ``previous``, ``alias``, ``unmapped``, or one of :data:`REPAIRED`."""


class GeneEntry(NamedTuple):
    """A row of the gene-name table, in the order of its columns."""

    species: str
    symbol: str
    ensembl: str
    name: str
    previous: str
    """Previous symbols, separated by ``|``."""
    aliases: str
    """Alias symbols and older Ensembl ids, separated by ``|``."""
    kind: str
    """``protein``, ``pseudo`` or another kind of gene."""


class GeneResource:
    """Gene-name table with indices for look-ups; :meth:`load` returns the one in the package."""

    def __init__(self, rows: Sequence[GeneEntry]) -> None:
        self.rows = rows
        self._ensembl: dict[tuple[str, str], int] = {}
        self._symbol: dict[tuple[str, str], int] = {}
        self._folded: dict[tuple[str, str], set[int]] = defaultdict(set)
        self._previous: dict[tuple[str, str], set[int]] = defaultdict(set)
        self._alias: dict[tuple[str, str], set[int]] = defaultdict(set)
        self._dotted: dict[tuple[str, str], set[int]] = defaultdict(set)
        for i, row in enumerate(rows):
            species = row.species
            if row.ensembl:
                self._ensembl.setdefault((species, row.ensembl), i)
            self._symbol.setdefault((species, row.symbol), i)
            self._folded[species, row.symbol.upper()].add(i)
            for text in (row.symbol, *filter(None, row.previous.split("|"))):
                if _SEPARATOR.search(text):
                    self._dotted[species, _dotted(text)].add(i)
            for text in filter(None, row.previous.split("|")):
                self._previous[species, text.upper()].add(i)
            for text in filter(None, row.aliases.split("|")):
                self._alias[species, text.upper()].add(i)

    @staticmethod
    @cache
    def load() -> GeneResource:
        """Load the table in the package; cached per process."""
        raw = files("comtip_shards.genes").joinpath("resources", RESOURCE).read_bytes()
        lines = gzip.decompress(raw).decode("utf-8").splitlines()
        _, *rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        return GeneResource([GeneEntry(*row) for row in rows])

    def resolve(self, identifier: str, species: str) -> GeneHit:
        """Resolve one identifier, a symbol or an Ensembl id, of one species (``human`` or ``mouse``).

        An identifier that is unknown or fits several genes gives a hit with ``how="unmapped"``.

        Raises
        ------
        ValueError
            The species is not in the table.
        """
        if species not in SPECIES:
            raise ValueError(f"unknown species {species!r}; use {' or '.join(SPECIES)}")
        text = identifier.strip()
        found, how = self._find(text, species)
        if found is None and how == "unmapped":
            inner = {self._find(m[1] or m[2], species)[0] for m in _JOINED.finditer(text)} - {None}
            found, how = (inner.pop(), "ensembl") if len(inner) == 1 else (None, "unmapped")
        if found is None and how == "unmapped":
            found, how = self._repair(text, species)
        if found is None:
            return GeneHit(f"{species}:{text}", species, text, "", "", "unmapped")
        row = self.rows[found]
        return GeneHit(f"{species}:{row.symbol}", species, row.symbol, row.ensembl, row.name, how)

    def candidates(self, identifier: str, species: str) -> list[str]:
        """Return the original symbols, sorted, that a spreadsheet or R may have changed to this identifier."""
        text = identifier.strip()
        rows = self._dates(text, species) | self._dots(text, species) | self.serials(text, species)
        return sorted({self.rows[i].symbol for i in rows if i >= 0})

    def _repair(self, text: str, species: str) -> tuple[int | None, str]:
        for rows, how in ((self._dates(text, species), "date"), (self._dots(text, species), "dots")):
            if rows:
                return _only(rows), how
        return None, "unmapped"

    def _dates(self, text: str, species: str) -> set[int]:
        return self._of_dates(dates_of(text), species)

    def serials(self, text: str, species: str) -> set[int]:
        """Return the rows of symbols that a spreadsheet may have turned into this number; see :meth:`candidates`."""
        return self._of_dates(serial_dates_of(text), species)

    def _of_dates(self, dates: Sequence[tuple[str, int]], species: str) -> set[int]:
        """Return the rows of symbols that a spreadsheet turns into one of these dates; also -1 and -2 if two gene families fit."""
        out: set[int] = set()
        for month, day in dates:
            found = [row for s in MONTHS[month] if (row := self._find(f"{s}{day}", species)[0]) is not None]
            out |= {*found, -1, -2} if (month, day) in AMBIGUOUS else set(found[:1])
        return out

    def _dots(self, text: str, species: str) -> set[int]:
        """Return the rows of symbols that R or Seurat may have changed to ``text``: separators replaced (HLA.A), X before a digit."""
        if _SEPARATOR.search(text):
            return self._dotted.get((species, _dotted(text)), set())
        if text[:1] in "Xx" and text[1:2].isdigit():
            row = self._find(text[1:], species)[0]
            return set() if row is None else {row}
        return set()

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


def _dotted(text: str) -> str:
    return _SEPARATOR.sub(".", text).upper()


def _only(candidates: set[int] | None) -> int | None:
    return next(iter(candidates)) if candidates is not None and len(candidates) == 1 else None


@dataclass
class GeneMap:
    """Mapping of gene columns to keys."""

    hits: list[GeneHit]
    keys: list[str]
    """Distinct keys of mapped columns, in order of first occurrence."""
    column_to_key: np.ndarray
    """int64 (n_columns,), index into ``keys``; -1 for unmapped columns."""
    collisions: dict[str, list[str]]
    """{key: columns} of the keys with more than one column, whose counts are summed."""
    unmapped: list[str]
    """Identifiers of unmapped columns."""
    identifiers: list[str] = field(default_factory=list)
    """Identifiers of all columns, as in the source."""
    ambiguous: dict[str, list[str]] = field(default_factory=dict)
    """{unmapped identifier: symbols that a spreadsheet or R may have changed to it}; these identifiers were not repaired."""

    @property
    def counts_by_how(self) -> dict[str, int]:
        """Number of columns per kind of resolution."""
        out: dict[str, int] = {}
        for hit in self.hits:
            out[hit.how] = out.get(hit.how, 0) + 1
        return out

    def sum_columns(self, counts: sparse.csr_matrix, where: str = "the counts") -> sparse.csr_matrix:
        """Return counts per key, int32 (n, len(keys)): the columns of a key are summed, unmapped columns are dropped.

        Raises
        ------
        SourceError
            A summed count exceeds int32; the message starts with ``where`` and names the key.
        """
        return sum_columns(counts, self.column_to_key, self.keys, where)

    def report(self) -> str:
        """Return a summary of the mapped, summed, repaired and unmapped columns, one per line."""
        parts = ", ".join(f"{n} by {how}" for how, n in sorted(self.counts_by_how.items()) if how != "unmapped")
        lines = [f"{len(self.hits)} gene columns: {parts or 'none mapped'}; {len(self.unmapped)} not mapped"]
        if self.collisions:
            shown = "; ".join(f"{k} <- {' + '.join(v)}" for k, v in list(self.collisions.items())[:3])
            lines.append(f"keys that sum several columns: {len(self.collisions)}, e.g. {shown}")
        if self.unmapped:
            lines.append(
                f"not mapped, left out: {', '.join(self.unmapped[:8])}{' ...' if len(self.unmapped) > 8 else ''}"
            )
        repaired = {t: h.symbol for t, h in zip(self.identifiers, self.hits, strict=True) if h.how in REPAIRED}
        if repaired:
            shown = ", ".join(f"{t} -> {s}" for t, s in list(repaired.items())[:8])
            lines.append(f"{len(repaired)} names changed by a spreadsheet or by R were repaired: {shown}")
        if self.ambiguous:
            shown = "; ".join(f"{t} ({' or '.join(s)})" for t, s in list(self.ambiguous.items())[:5])
            lines.append(
                f"{len(self.ambiguous)} names that a spreadsheet or R may have changed were not repaired, rename them: {shown}"
            )
        dates = [u for u in self.unmapped if dates_of(u) and u not in self.ambiguous]
        if dates:
            lines.append(f"{len(dates)} look like symbols that a spreadsheet turned into dates: {', '.join(dates[:5])}")
        return "\n".join(lines)


def map_genes(
    identifiers: Sequence[str], species: str, resource: GeneResource | None = None, symbols: Sequence[str] = ()
) -> GeneMap:
    """Map gene columns to keys.

    Parameters
    ----------
    identifiers
        One per column, as in the source.
    species
        ``human`` or ``mouse``.
    resource
        Gene-name table; by default the one in the package.
    symbols
        Symbols from the source, used for identifiers that are not resolved; empty, or one per column.

    Raises
    ------
    ValueError
        The species is not in the table, or ``symbols`` and ``identifiers`` have different lengths.
    """
    resource = resource or GeneResource.load()
    hits = [resource.resolve(text, species) for text in identifiers]
    if symbols:
        second = [
            resource.resolve(s, species) if h.how == "unmapped" and s else h for h, s in zip(hits, symbols, strict=True)
        ]
        hits = [s if s.how != "unmapped" else h for h, s in zip(hits, second, strict=True)]
    hits = _with_serials(identifiers, hits, species, resource)
    hits = _with_tails(identifiers, hits)
    position: dict[str, int] = {}
    columns: dict[str, list[str]] = defaultdict(list)
    index = np.full(len(hits), -1, np.int64)
    for i, (hit, text) in enumerate(zip(hits, identifiers, strict=True)):
        if hit.how != "unmapped":
            index[i] = position.setdefault(hit.key, len(position))
            columns[hit.key].append(text)
    collisions = {k: v for k, v in columns.items() if len(v) > 1}
    unmapped = [t for t, h in zip(identifiers, hits, strict=True) if h.how == "unmapped"]
    # The only symbol of a number is stated too: it was not repaired, because the names may be of another kind.
    least = {u: 1 if serial_dates_of(u) else 2 for u in unmapped}
    ambiguous = {u: found for u in unmapped if len(found := resource.candidates(u, species)) >= least[u]}
    return GeneMap(hits, list(position), index, collisions, unmapped, list(identifiers), ambiguous)


def _with_serials(
    identifiers: Sequence[str], hits: list[GeneHit], species: str, resource: GeneResource
) -> list[GeneHit]:
    """Resolve gene names that a spreadsheet turned into numbers (44624 for MARCHF4), where exactly one symbol fits.

    If more than one name in :data:`NAMES_PER_NUMBER` is a number, of a date or not, the names may be row numbers or Entrez ids, and
    none is changed.
    """
    rows = {t: resource.serials(t, species) for t, h in zip(identifiers, hits, strict=True) if h.how == "unmapped"}
    rows = {text: found for text, found in rows.items() if found}
    numbers = sum(_NUMBER.fullmatch(text.strip()) is not None for text in identifiers)
    if not rows or max(len(rows), numbers) * NAMES_PER_NUMBER > len(identifiers):
        return hits
    own = {t: resource.rows[row] for t, found in rows.items() if (row := _only(found)) is not None}
    return [
        h
        if t not in own
        else GeneHit(f"{species}:{own[t].symbol}", species, own[t].symbol, own[t].ensembl, own[t].name, "date")
        for t, h in zip(identifiers, hits, strict=True)
    ]


def _with_tails(identifiers: Sequence[str], hits: list[GeneHit]) -> list[GeneHit]:
    """Resolve an unmapped name with a suffix of R's make.unique (TBCE-1) like the name without the suffix, if that is mapped."""
    known = {text: hit for text, hit in zip(identifiers, hits, strict=True) if hit.how != "unmapped"}
    out = []
    for text, hit in zip(identifiers, hits, strict=True):
        match = _TAIL.match(text) if hit.how == "unmapped" else None
        stem = known.get(match["stem"]) if match is not None else None
        out.append(hit if stem is None else replace(stem, how="tail"))
    return out


def sum_columns(counts: sparse.csr_matrix, key_of: np.ndarray, keys: Sequence[str], where: str) -> sparse.csr_matrix:
    """Return counts per key, int32 CSR (n, len(keys)): the columns of a key are summed.

    Parameters
    ----------
    counts
        Raw counts, integers (n, n_columns).
    key_of
        Row of ``keys`` of each column, (n_columns,); columns with a negative value are dropped.
    keys
        Names for messages.
    where
        Source of the counts, with which messages start.

    Raises
    ------
    SourceError
        A summed count exceeds int32.
    """
    known = np.flatnonzero(key_of >= 0)
    ones = np.ones(known.size, np.int64)
    to_key = sparse.csr_matrix((ones, (known, key_of[known])), shape=(counts.shape[1], len(keys)))
    out = sparse.csr_matrix(counts.astype(np.int64) @ to_key, dtype=np.int64)
    out.sort_indices()
    if out.nnz and out.data.max() > np.iinfo(np.int32).max:
        key = keys[int(out.indices[out.data.argmax()])]
        raise SourceError(
            f"{where}: the columns of {key} sum to {out.data.max():,} in one spot, but at most 2,147,483,647 can be stored; check "
            "that the counts are raw"
        )
    return out.astype(np.int32)
