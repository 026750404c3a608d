"""Several shard sets as one, without copying: :func:`open_sets`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from comtip_shards.errors import ShardError
from comtip_shards.format.manifest import (
    MAX_SPOTS,
    GeneRow,
    Manifest,
    ManifestSection,
    ShardEntry,
    pack_bits,
    unpack_bits,
)
from comtip_shards.names import FOREIGN, same_file
from comtip_shards.reader.shard_set import ShardSet
from comtip_shards.sections.duplicates import check_duplicates
from comtip_shards.sections.section import meta_of
from comtip_shards.sections.splits import check_splits
from comtip_shards.storage.remote import is_url


def open_sets(paths: str | Path | Sequence[str | Path]) -> ShardSet:
    """Open one shard set, or several as one.

    Parameters
    ----------
    paths
        A folder or URL, or several.

    Raises
    ------
    ShardError, SourceError
        No set is given, a manifest is missing or damaged, or the sets do not fit together; see :class:`JoinedSet`.
    """
    given = [paths] if isinstance(paths, (str, Path)) else [*paths]
    if not given:
        raise ShardError("no shard set is given; give at least one folder or URL")
    if len(given) == 1:
        if "," in str(given[0]) and not is_url(given[0]) and not Path(given[0]).exists():
            raise ShardError(f"{given[0]}: no such folder; give several sets as a list, e.g. [hest, own]")
        return ShardSet(given[0])
    if len(set(map(str, given))) < len(given):
        raise ShardError(f"{max(map(str, given), key=[*map(str, given)].count)} is given twice; give each set once")
    return JoinedSet([ShardSet(path) for path in given])


class JoinedSet(ShardSet):
    """Shard sets that are read as one: their sections one after the other, with the union of their genes.

    Spots, sections and genes are numbered as in the set that ``comtip shards merge`` would write, so training on the joined set is
    the same as on the merged one. Nothing is copied. Each set may be in a folder or at a URL, and may have been built
    with other package versions.

    Parameters
    ----------
    sets
        The sets, in order; at least one.

    Raises
    ------
    ShardError
        The tile settings differ, a section is in two sets, or a set is one part of a larger build.
    SourceError
        A donor in ``test`` is also in ``train`` or ``val``, or duplicate sections are in different splits.
    """

    def __init__(self, sets: Sequence[ShardSet]) -> None:
        self.sets = [*sets]
        self.name, self.path = ", ".join(s.name for s in sets), sets[0].path
        _check_fit(self.sets)
        self._first_spot = np.cumsum([0, *(len(s) for s in sets)]).astype(np.int64)
        self._first_section = np.cumsum([0, *(len(s.manifest.sections) for s in sets)])
        self._first_shard = np.cumsum([0, *(len(s.manifest.shards) for s in sets)])
        if self._first_spot[-1] > MAX_SPOTS:
            raise ShardError(f"{self.name}: more than {MAX_SPOTS:,} spots; join fewer sets")
        row_of = {gene.key: row for row, gene in enumerate(self.genes)}
        self._rows = [np.array([row_of[gene.key] for gene in one.genes], np.int32) for one in sets]
        for one, rows in zip(sets, self._rows, strict=True):
            if (np.diff(rows) <= 0).any():
                raise ShardError(f"{one.name}: the gene table is not sorted by key; {FOREIGN}", kind="genes")
        self.manifest = self._joined_manifest()
        self._section_starts = np.array([s.first_spot for s in self.manifest.sections], np.int64)
        self._shard_starts = np.array([s.first_spot for s in self.manifest.shards], np.int64)
        metas = [meta_of(section) for section in self.manifest.sections]
        check_splits(metas)
        prints = [
            (m, s.source["print"]) for m, s in zip(metas, self.manifest.sections, strict=True) if "print" in s.source
        ]
        check_duplicates(prints)

    def _joined_manifest(self) -> Manifest:
        """Return a manifest of all sections and shards; files and their hashes remain those of the sets."""
        n_genes = len(self.genes)
        sections: list[ManifestSection] = []
        shards: list[ShardEntry] = []
        for one, first, rows in zip(self.sets, self._first_spot.tolist(), self._rows, strict=False):
            for section in one.manifest.sections:
                measured = np.zeros(n_genes, bool)
                measured[rows] = unpack_bits(section.assay_genes, one.manifest.n_genes)
                sections.append(
                    replace(section, first_spot=section.first_spot + first, assay_genes=pack_bits(measured))
                )
            shards += [replace(shard, first_spot=shard.first_spot + first) for shard in one.manifest.shards]
        digest = hashlib.sha256("\n".join(s.manifest.digest for s in self.sets).encode()).hexdigest()
        fingerprint = hashlib.sha256("\n".join(s.manifest.fingerprint for s in self.sets).encode()).hexdigest()
        return replace(
            self.sets[0].manifest,
            records_per_shard=max(s.manifest.records_per_shard for s in self.sets),
            n_genes=n_genes,
            n_spots=int(self._first_spot[-1]),
            sections=sections,
            shards=shards,
            fingerprint=fingerprint,
            digest=digest,
        )

    # -- the sets of spots, sections and shards -----------------------------------------------------------

    @property
    def paths(self) -> list[Path]:
        """See :attr:`ShardSet.paths`."""
        return [one.path for one in self.sets]

    @property
    def digests(self) -> list[str]:
        """See :attr:`ShardSet.digests`."""
        return [one.manifest.digest for one in self.sets]

    def set_of_section(self, section: int) -> int:
        """See :meth:`ShardSet.set_of_section`."""
        return int(np.searchsorted(self._first_section, section, side="right")) - 1

    def _by_set(self, index: np.ndarray) -> Iterator[tuple[ShardSet, np.ndarray, np.ndarray, np.ndarray]]:
        """Yield the sets that hold the spots ``index``.

        Each comes with the positions in ``index`` of the spots that it holds, their indices in the set, and the rows of the
        set's genes in the union.
        """
        number = np.searchsorted(self._first_spot, index, side="right") - 1
        for i in np.unique(number).tolist():
            at = np.flatnonzero(number == i)
            yield self.sets[i], at, index[at] - self._first_spot[i], self._rows[i]

    def _shard_at(self, shard: int) -> tuple[ShardSet, int]:
        """Return the set of a shard, and the shard's number there."""
        i = int(np.searchsorted(self._first_shard, shard, side="right")) - 1
        return self.sets[i], shard - int(self._first_shard[i])

    # -- what is read from the sets -----------------------------------------------------------------------

    @cached_property
    def genes(self) -> list[GeneRow]:
        """See :attr:`ShardSet.genes`; the union, sorted by key. For a gene in several sets, the row of the first set is used."""
        known: dict[str, GeneRow] = {}
        for one in self.sets:
            known |= {gene.key: gene for gene in one.genes if gene.key not in known}
        return [known[key] for key in sorted(known)]

    @cached_property
    def spots(self) -> pd.DataFrame:
        """See :attr:`ShardSet.spots`."""
        frames = [one.spots for one in self.sets]
        out = pd.concat(frames, ignore_index=True)
        out.index = out.index.rename(frames[0].index.name)
        for name in frames[0].select_dtypes("category").columns:
            out[name] = pd.api.types.union_categoricals([frame[name] for frame in frames])
        out["section"] = self.sections_of(np.arange(len(self)))
        for one in self.sets:
            vars(one).pop("spots", None)  # not kept twice in memory; a set that is asked for its own reads it again
        return out

    def members_of(self, spot_index: Iterable[int], parts: Sequence[str]) -> list[list[bytes]]:
        """See :meth:`ShardSet.members_of`; ``expr`` members refer to the genes of their own set, see :meth:`decode_counts`."""
        index = np.asarray(spot_index, np.int64)
        self._check_range(index)
        out: list[list[bytes]] = [[b""] * index.size for _ in parts]
        for one, at, own, _ in self._by_set(index):
            for into, members in zip(out, one.members_of(own, parts), strict=True):
                for row, member in zip(at.tolist(), members, strict=True):
                    into[row] = member
        return out

    def decode_counts(
        self, exprs: Sequence[bytes], spot_index: Iterable[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See :meth:`ShardSet.decode_counts`; gene rows refer to the union of the genes."""
        index, n_genes = np.asarray(spot_index, np.int64), self.manifest.n_genes
        positions, matrices = [np.zeros(0, np.int64)], [sparse.csr_matrix((0, n_genes), dtype=np.int32)]
        for one, at, own, rows in self._by_set(index):
            indptr, columns, counts = one.decode_counts([exprs[i] for i in at.tolist()], own)
            positions.append(at)
            matrices.append(sparse.csr_matrix((counts, rows[columns], indptr), shape=(at.size, n_genes)))
        joined = sparse.vstack(matrices, format="csr")
        if len(positions) > 2:
            joined = joined[np.argsort(np.concatenate(positions))]
        return joined.indptr.astype(np.int64), joined.indices.astype(np.int32), joined.data.astype(np.int32)

    def overview(self, section: int) -> tuple[np.ndarray, float]:
        """See :meth:`ShardSet.overview`."""
        i = self.set_of_section(section)
        return self.sets[i].overview(section - int(self._first_section[i]))

    def where(self, spot: int) -> str:
        """See :meth:`ShardSet.where`; the key of the record is that in its own set."""
        i = int(np.searchsorted(self._first_spot, spot, side="right")) - 1
        return self.sets[i].where(spot - int(self._first_spot[i]))

    def member_ranges(self, shard: ShardEntry) -> tuple[np.ndarray, np.ndarray]:
        """See :meth:`ShardSet.member_ranges`."""
        one, number = self._shard_at(int(np.searchsorted(self._shard_starts, shard.first_spot)))
        return one.member_ranges(one.manifest.shards[number])

    def shards_of(self, spot_index: Iterable[int]) -> np.ndarray:
        """See :meth:`ShardSet.shards_of`."""
        index = np.asarray(spot_index, np.int64)
        self._check_range(index)
        return np.unique(np.searchsorted(self._shard_starts, index, side="right") - 1)

    def fetch(self, shard: int) -> None:
        """See :meth:`ShardSet.fetch`."""
        one, number = self._shard_at(shard)
        if one.fetches_shards:  # another set may be the one that is fetched
            one.fetch(number)

    @property
    def fetches_shards(self) -> bool:
        """See :attr:`ShardSet.fetches_shards`; True if it is True for any of the sets."""
        return any(one.fetches_shards for one in self.sets)

    def read_by_ranges(self, ranges: bool) -> None:
        """See :meth:`ShardSet.read_by_ranges`."""
        for one in self.sets:
            one.read_by_ranges(ranges)

    @contextmanager
    def by_ranges(self) -> Iterator[None]:
        """See :meth:`ShardSet.by_ranges`."""
        with ExitStack() as stack:
            for one in self.sets:
                stack.enter_context(one.by_ranges())
            yield


def _check_fit(sets: Sequence[ShardSet]) -> None:
    """Check that tiles are the same in all sets, that no set is a part, and that no section is in two sets."""
    first, *others = sets
    for one in sets:
        if one.manifest.part is not None:
            part = one.manifest.part
            raise ShardError(
                f"{one.name}: part {part.index}/{part.of} of a build; merge its parts with `comtip shards merge`"
            )
    for other in others:
        if other.manifest.tile != first.manifest.tile:
            raise ShardError(
                f"{first.name} and {other.name}: the manifests differ in tile: {first.manifest.tile} and {other.manifest.tile}; "
                "build both sets with the same settings"
            )
    opened: dict[str, str] = {}
    for one in sets:
        if one.manifest.digest in opened:
            raise ShardError(
                f"{opened[one.manifest.digest]} and {one.name} are the same shard set; give only one of them"
            )
        opened[one.manifest.digest] = one.name
    holder: dict[str, str] = {}
    for one in sets:
        for section in one.manifest.sections:
            if section.section_id in holder:
                raise ShardError(
                    f"section {section.section_id} is in {holder[section.section_id]} and in {one.name}; build one of the sets "
                    "without it"
                )
            holder[section.section_id] = one.name
    alike = same_file(holder)
    if alike:
        raise ShardError(
            f"section {alike[0]} of {holder[alike[0]]} and {alike[1]} of {holder[alike[1]]} differ only in case; build one of "
            "them again with another id"
        )
