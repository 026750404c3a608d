"""Measured counts of a SECTION by gene key; spots are in the order of :func:`comtip_fast.data.sections.open_section`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import anndata as ad
import numpy as np
from comtip_shards import ShardSet, SourceError
from comtip_shards.genes.identifiers import map_genes
from comtip_shards.sections.facts import SourceOptions
from comtip_shards.sources import open_source
from comtip_shards.sources.anndata_parts.counts import raw_counts
from comtip_shards.sources.anndata_parts.spots import gene_names
from comtip_shards.sources.anndata_parts.store import MemoryStore, is_anndata_file
from comtip_shards.storage.remote import is_url
from scipy import sparse

from comtip_fast.data.anndata_file import chosen_library, read_h5ad
from comtip_fast.data.sections import split_spec


@dataclass(frozen=True)
class MeasuredCounts:
    """Raw counts of N spots and the G genes that the section measured."""

    counts: sparse.csr_matrix
    """int32 (N, G)."""
    keys: list[str]
    """Keys of the G genes."""

    def select(self, keys: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return, for the n ``keys`` that are measured, their columns and their indices in ``keys``: int64 (n,) each."""
        row = {key: i for i, key in enumerate(self.keys)}
        found = np.array([i for i, key in enumerate(keys) if key in row], np.int64)
        return np.array([row[keys[i]] for i in found], np.int64), found


def measured_counts(
    spec: str | Path | ad.AnnData, species: str, options: SourceOptions, fmt: str = "auto"
) -> MeasuredCounts:
    """Read the raw counts of a SECTION.

    Parameters
    ----------
    spec
        A SECTION as for :func:`comtip_fast.data.sections.open_section`, or an AnnData.
    species
        ``human`` or ``mouse``; not used for a shard set, whose genes have keys.
    options
        Facts (scale, image, species, ...) and options given by the caller, for a source or an AnnData.
    fmt
        Format of a source; ``auto`` detects it.

    Raises
    ------
    FileNotFoundError
        The path does not exist.
    SourceError
        The input cannot be read, has no such section or no raw counts, or an AnnData has several sections and none is named; or no
        gene identifier belongs to the species.
    ShardError
        The shard set has no such section, or is damaged.
    """
    if isinstance(spec, ad.AnnData):
        return _of_anndata(spec, Path("the AnnData"), species, options, "")
    path, section_id = (Path(), "") if is_url(str(spec)) else split_spec(str(spec))
    if is_anndata_file(path):
        return _of_anndata(read_h5ad(path), path, species, options, section_id)
    if is_url(str(spec)) or (path / "manifest.json").is_file():
        url, _, own = str(spec).rpartition(":")
        return _of_shards(ShardSet(url if is_url(str(spec)) else path), own if is_url(str(spec)) else section_id)
    options = replace(options, facts=replace(options.facts, tissue=options.facts.tissue or "unstated"))
    # Not read_spots(), with which AnnData and SpatialData read positions only.
    wanted = [section_id] if section_id else None
    section = open_source(path, samples=wanted, fmt=fmt, overrides=options)[0].read()
    return _mapped(section.counts, section.gene_ids, section.gene_symbols, species, str(path))


def _of_shards(shards: ShardSet, section_id: str) -> MeasuredCounts:
    """Read the counts of a section of a shard set, for the genes that the section measured."""
    number = shards.section_number(section_id)
    measured = np.flatnonzero(shards.measured(number))
    counts = shards.counts(shards.source_order(number))[:, measured]
    return MeasuredCounts(sparse.csr_matrix(counts), [shards.genes[i].key for i in measured])


def _of_anndata(data: ad.AnnData, where: Path, species: str, options: SourceOptions, section_id: str) -> MeasuredCounts:
    """Read the counts of a section of an AnnData."""
    store = MemoryStore(data, where)
    rows = chosen_library(store, section_id)[1].rows(data.obs)
    matrix, var, _ = raw_counts(store, where, options.counts)
    ids, symbols = gene_names(var)
    return _mapped(matrix[rows], ids, symbols, species, str(where))


def _mapped(counts: sparse.csr_matrix, ids: list[str], symbols: list[str], species: str, where: str) -> MeasuredCounts:
    """Return the counts by gene key, summed over columns of the same gene."""
    genes = map_genes(ids, species, symbols=symbols if any(symbols) else ())
    if not genes.keys:
        raise SourceError(
            f"{where}: none of the {len(ids)} gene columns is a {species} gene; set `species` to the section's species, or use "
            "symbols or Ensembl ids"
        )
    return MeasuredCounts(genes.sum_columns(counts), genes.keys)
