"""Gene vectors from counts without images: principal components of co-expression.

The vector of a gene contains its loadings on the first K principal components of log1p CP10K, which is standardised per gene
within each source.

The decomposition is a truncated SVD by block subspace iteration over blocks of cells. Memory is bounded by one block and a
few matrices of genes x (K + oversampling); parsed blocks are kept in a temporary folder between passes.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from comtip_shards.genes.identifiers import GeneResource, map_genes
from comtip_shards.sections.duplicates import spot_hashes
from scipy import sparse

from comtip_fast._version import __version__
from comtip_fast.data.coexpression.counts import CountSource, open_counts, species_of
from comtip_fast.data.expression.levels import log1p_cp10k
from comtip_fast.genes.vectors import GeneVectors, smallest

log = logging.getLogger("comtip_fast")
OVERSAMPLING, MAX_PASSES, TOLERANCE = 20, 30, 1e-4


def gene_vectors(
    paths: Sequence[str | Path],
    *,
    components: int = 30,
    species: str | None = None,
    tissue: str = "",
    licence: str = "",
    weigh: str = "cells",
    min_detection: float = 0.0,
    orthologues: bool = False,
    seed: int = 0,
) -> GeneVectors:
    """Compute gene vectors from count matrices.

    Parameters
    ----------
    paths
        Count matrices, see :func:`comtip_fast.data.coexpression.counts.open_counts`.
    components
        Number of components, K; reduced if there are fewer genes or cells.
    species
        ``human`` or ``mouse``; required if the identifiers are symbols. Ensembl identifiers take precedence.
    tissue, licence
        Facts that are recorded in the header and do not affect the vectors.
    weigh
        ``cells``: equal weight for every cell; ``sources``: equal weight for every source.
    min_detection
        Smallest share of cells in which a gene is detected, among the cells of the sources that measured it; other genes are
        dropped.
    orthologues
        Whether genes of both species with the same upper-case symbol are one gene; the file then contains the keys of
        both species.
    seed
        Seed of the random start of the subspace iteration, which changes the result within its tolerance only.

    Returns
    -------
    GeneVectors
        The vectors of the genes that vary in at least one source and are detected often enough (``min_detection``).

    Raises
    ------
    ValueError
        A parameter is out of bounds; there is no source; the species of a source is unknown; a source has no known gene, or fewer
        than 2 cells; fewer than 2 genes vary and are detected often enough; or there are sources of two species without
        ``orthologues``.
    FileNotFoundError, SourceError
        A source does not exist or cannot be read.
    """
    _check_settings(paths, components, weigh, min_detection)
    with tempfile.TemporaryDirectory(prefix="comtip-vectors-") as scratch:
        spool = _Spool(Path(scratch), orthologues)
        for path in paths:
            spool.add(open_counts(path), species)
        if len(spool.all_species) > 1 and not orthologues:
            raise ValueError(
                "the matrices are of two species; set `orthologues` to join genes of the same symbol, or compute one file per species and join "
                "the files with `comtip genes vectors A.safetensors B.safetensors`"
            )
        standard = _Standard.fit(spool, weigh, min_detection)
        basis, spectrum, total = _subspace(spool, standard, components, seed)
    settings = {
        "components": int(basis.shape[1]),
        "weigh": weigh,
        "min_detection": min_detection,
        "orthologues": orthologues,
        "tissue": tissue,
        "licence": licence,
    }
    results = {"sources": spool.sources, "explained": float(spectrum.sum() / max(total, 1e-12))}
    # A loading is a sum over the cells that measured the gene; divided by their weight, it is a mean, comparable over genes.
    vectors = basis * np.sqrt(spectrum) / np.maximum(standard.coverage_G, 1e-12)[:, None]
    keys, rows = spool.keys_of(standard.kept)
    kept = standard.kept[rows]
    header = {"comtip_fast": __version__} | settings | results
    moments, detection = standard.moments_G4[kept].astype(np.float32), standard.detection_G[kept].astype(np.float32)
    return GeneVectors(keys, vectors[rows].astype(np.float32), moments, detection, header, spool.cells)


def _check_settings(paths: Sequence[str | Path], components: int, weigh: str, min_detection: float) -> None:
    """Raise ValueError for parameters of :func:`gene_vectors` that are out of bounds."""
    if weigh not in ("cells", "sources"):
        raise ValueError(f"`weigh` {weigh!r}: choose 'cells' or 'sources'")
    if components < 1:
        raise ValueError(f"`components` {components}: give at least 1")
    if not 0 <= min_detection <= 1:
        raise ValueError(f"`min_detection` {min_detection}: give a share of cells, 0 to 1")
    if not paths:
        raise ValueError("no count matrix given; give at least one")


class _Spool:
    """Parsed blocks of all sources in a temporary folder, with one list of genes that grows with every source."""

    def __init__(self, folder: Path, orthologues: bool) -> None:
        self.folder, self.orthologues = folder, orthologues
        self.names: list[str] = []
        self.sources: list[dict[str, Any]] = []
        self.all_species: set[str] = set()
        self.cells = np.zeros(0, np.uint64)
        """The smallest hashes of cells, see :class:`GeneVectors`."""
        self._index: dict[str, int] = {}
        self._files: list[list[Path]] = []
        self._columns: list[np.ndarray] = []

    def add(self, source: CountSource, species: str | None) -> None:
        """Parse a source and write its blocks to the temporary folder."""
        own = species_of(source.genes)
        known = own or species
        if known is None:
            raise ValueError(
                f"{source.path}: no gene has an Ensembl id of human or mouse, which would identify the species; set `species`"
            )
        genes = map_genes(source.genes, known, symbols=source.symbols if any(source.symbols) else ())
        if not genes.keys:
            fix = "check the identifiers and `species`" if own is None else "correct the identifiers"
            raise ValueError(f"{source.path}: no gene identifier is known for {known}, e.g. {source.genes[0]!r}; {fix}")
        log.info("%s: %s", source.path.name, genes.report().splitlines()[0])
        names = [k.split(":", 1)[1].upper() if self.orthologues else k for k in genes.keys]
        for name in names:
            self._index.setdefault(name, len(self._index))
        self.names = list(self._index)
        files: list[Path] = []
        cells = 0
        for block in source.blocks():
            files.append(self.folder / f"{len(self._files)}_{len(files)}.npz")
            counts = genes.sum_columns(block)
            counts.eliminate_zeros()  # a hash is of the positive counts
            sparse.save_npz(files[-1], counts, compressed=False)
            self.cells = smallest(self.cells, spot_hashes(counts, genes.keys))
            cells += block.shape[0]
        if cells < 2:
            raise ValueError(f"{source.path}: {cells} cells, but co-expression needs at least 2; give more cells")
        self._files.append(files)
        self._columns.append(np.array([self._index[n] for n in names], np.int64))
        self.all_species.add(known)
        self.sources.append(
            {
                "name": source.path.name,
                "sha256": source.sha256(),
                "species": known,
                "cells": cells,
                "genes": len(genes.keys),
                "unmapped": len(genes.unmapped),
            }
        )

    def measured(self) -> np.ndarray:
        """Return which genes each source measured, bool (sources, genes)."""
        out = np.zeros((len(self._columns), len(self.names)), bool)
        for row, columns in zip(out, self._columns, strict=True):
            row[columns] = True
        return out

    def blocks(self) -> Iterator[tuple[int, sparse.csr_matrix]]:
        """Yield (index of the source, int32 CSR counts over all genes) for every block."""
        for number, (files, columns) in enumerate(zip(self._files, self._columns, strict=True)):
            n_own = columns.size
            spread = sparse.csr_matrix(
                (np.ones(n_own, np.int32), (np.arange(n_own), columns)), shape=(n_own, len(self.names))
            )
            for file in files:
                yield number, sparse.csr_matrix(sparse.load_npz(file) @ spread)

    def keys_of(self, kept: np.ndarray) -> tuple[list[str], np.ndarray]:
        """Return the gene keys of the result and, for each key, the index of its gene in ``kept``."""
        if not self.orthologues:
            return [self.names[i] for i in kept], np.arange(kept.size)
        index = {self.names[i]: row for row, i in enumerate(kept)}
        rows = [r for r in GeneResource.load().rows if r.symbol.upper() in index]
        known = sorted({(f"{r.species}:{r.symbol}", index[r.symbol.upper()]) for r in rows})
        return [k for k, _ in known], np.array([row for _, row in known], np.int64)


@dataclass
class _Standard:
    """Mean and scale of each gene per source, applied to products with blocks, so that the blocks stay sparse."""

    mean_SG: np.ndarray
    """Mean log1p CP10K of each kept gene."""
    inverse_std_SG: np.ndarray
    """Inverse standard deviation of each kept gene; 0 where the gene does not vary in the source."""
    weight_S: np.ndarray
    """Weight of one cell of each source; the weights of all cells sum to 1."""
    coverage_G: np.ndarray
    """Total weight of the cells of the sources in which each kept gene varies, 0 to 1."""
    kept: np.ndarray
    """Indices of the genes that vary and are detected often enough."""
    moments_G4: np.ndarray
    """For all genes, not only the kept ones: mean and standard deviation of log1p CP10K, then of log1p raw counts, over the cells
    of the sources that measured the gene."""
    detection_G: np.ndarray
    """For all genes: share of cells in which the gene is detected, among the cells of the sources that measured it."""

    @classmethod
    def fit(cls, spool: _Spool, weigh: str, min_detection: float) -> _Standard:
        """Compute the statistics in one pass over the counts; raise ValueError if fewer than 2 genes are kept."""
        measured_SG = spool.measured()
        S, G = measured_SG.shape
        total, square = np.zeros((2, S, G)), np.zeros((2, S, G))
        seen_SG, cells = np.zeros((S, G)), np.zeros(S)
        for source, counts in spool.blocks():
            for norm, values in enumerate((log1p_cp10k(counts), _log1p(counts))):
                total[norm, source] += np.asarray(values.sum(axis=0)).ravel()
                square[norm, source] += np.asarray(values.multiply(values).sum(axis=0)).ravel()
            seen_SG[source] += counts.getnnz(axis=0)
            cells[source] += counts.shape[0]
        mean_SG = total[0] / cells[:, None]
        variance_SG = np.maximum(square[0] / cells[:, None] - mean_SG**2, 0)
        varies = variance_SG > 1e-9
        inverse_SG = np.where(varies, 1 / np.sqrt(np.where(varies, variance_SG, 1)), 0.0)
        cells_G = (measured_SG * cells[:, None]).sum(0)
        detection = seen_SG.sum(0) / np.maximum(cells_G, 1)
        moments = np.stack([m for n in (0, 1) for m in _moments(total[n].sum(0), square[n].sum(0), cells_G)], axis=1)
        kept = np.flatnonzero(varies.any(0) & (detection >= min_detection))
        if kept.size < 2:
            fix = "give more cells, or lower `min_detection`" if min_detection else "give more cells"
            often = f" and be detected in a share of at least {min_detection:g} of the cells" if min_detection else ""
            raise ValueError(
                f"at least 2 genes must vary{often}, but of {G:,} genes only {kept.size} {'does' if kept.size else 'do'}; {fix}"
            )
        weight = 1 / cells / S if weigh == "sources" else np.full(S, 1 / cells.sum())
        coverage = ((weight * cells)[:, None] * varies)[:, kept].sum(0)
        return cls(mean_SG[:, kept], inverse_SG[:, kept], weight, coverage, kept, moments, detection)


def _moments(total: np.ndarray, square: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and standard deviation from sums, sums of squares and numbers of values."""
    mean = total / np.maximum(n, 1)
    return mean, np.sqrt(np.maximum(square / np.maximum(n, 1) - mean**2, 0))


def _log1p(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return log1p of raw counts as float32 CSR."""
    out = counts.astype(np.float32)
    out.data = np.log1p(out.data)
    return out


def _gram(spool: _Spool, standard: _Standard, basis_GP: np.ndarray) -> np.ndarray:
    """Return A^T A Q for the weighted, standardised cells A and the basis Q, in one pass without a dense A."""
    out = np.zeros_like(basis_GP)
    for source, counts in spool.blocks():
        values = log1p_cp10k(counts)[:, standard.kept].astype(np.float64)
        scaled = basis_GP * standard.inverse_std_SG[source][:, None]
        mean = standard.mean_SG[source]
        scores_NP = values @ scaled - mean @ scaled
        back = values.T @ scores_NP - np.outer(mean, scores_NP.sum(0))
        out += standard.weight_S[source] * standard.inverse_std_SG[source][:, None] * back
    return out


def _subspace(spool: _Spool, standard: _Standard, components: int, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the leading eigenvectors (G, K) of A^T A (:func:`_gram`), their eigenvalues, and the trace of A^T A."""
    genes = standard.kept.size
    cells = sum(s["cells"] for s in spool.sources)
    K = min(components, genes, cells - 1)
    width = min(K + OVERSAMPLING, genes)
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(genes, width)))[0]
    last = np.zeros(K)
    for _ in range(MAX_PASSES):
        image = _gram(spool, standard, basis)
        values, turn = np.linalg.eigh(basis.T @ image)
        order = np.argsort(values)[::-1]
        vectors, spectrum = basis @ turn[:, order[:K]], np.maximum(values[order[:K]], 0)
        if np.abs(spectrum - last).max() <= TOLERANCE * max(spectrum[0], 1e-12):
            break
        last, basis = spectrum, np.linalg.qr(image)[0]
    # The sign of a component is arbitrary; it is fixed so that files can be compared.
    strongest = vectors[np.abs(vectors).argmax(0), np.arange(K)]
    return vectors * np.where(strongest < 0, -1.0, 1.0), spectrum, float(standard.coverage_G.sum())
