"""Gene sets from GMT files, orthologues, and the similarity of genes within a set.

Shapes: G genes, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse

from comtip_fast.genes.families import MIN_GENES

GeneSets = dict[str, list[str]]
MAX_BYTES = 64 << 20
MAX_PAIRS = 200_000
"""Largest number of pairs of genes that are sampled for comparison."""


def read_gmt(path: Path) -> GeneSets:
    """Read gene sets: per line a name, a description and genes, separated by tabs.

    Raises
    ------
    FileNotFoundError, ValueError
        There is no such file, it is too large or not UTF-8 or has no gene set, a line has no name or no genes, or a name occurs
        twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give gene sets in GMT format")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES >> 20} MiB; keep only the gene sets to score")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8, in GMT format"
        ) from None
    sets: GeneSets = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, *rest = [cell.strip() for cell in line.split("\t")]
        genes = list(dict.fromkeys(filter(None, rest[1:])))
        if not name or not genes:
            raise ValueError(
                f"{path}, line {number}: no {'genes' if name else 'name'}; expected name, description and genes, separated by tabs"
            )
        if name in sets:
            raise ValueError(f"{path}, line {number}: {name} occurs twice; name each set once")
        sets[name] = genes
    if not sets:
        raise ValueError(f"{path}: no gene set; expected name, description and genes, separated by tabs")
    return sets


def orthologues(keys: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs of keys of two species with the same upper-case symbol."""
    first: dict[str, str] = {}
    pairs = []
    for key in keys:
        symbol = key.partition(":")[2].upper()
        other = first.setdefault(symbol, key)
        if other.partition(":")[0] != key.partition(":")[0]:
            pairs.append((other, key))
    return pairs


def members(sets: Mapping[str, Sequence[str]], keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the indices into ``keys`` of each set's genes, int64, for the sets with at least three genes in ``keys``.

    Genes are given as keys (``human:KRT5``) or as symbols, which match every species.
    """
    index: dict[str, list[int]] = {}
    for i, key in enumerate(keys):
        for name in {key.upper(), key.partition(":")[2].upper()}:
            index.setdefault(name, []).append(i)
    found = {name: np.unique([i for g in genes for i in index.get(g.upper(), [])]) for name, genes in sets.items()}
    return {name: rows.astype(np.int64) for name, rows in found.items() if rows.size >= MIN_GENES}


@dataclass(frozen=True)
class SetCloseness:
    """Similarity of two genes of one set, compared with that of two genes without a common set."""

    auc: float
    """Probability that a pair within a set is more alike than a pair without a common set, averaged over sets; 0.5 is
    chance. NaN if every sampled pair has a common set."""
    set_auc_S: np.ndarray
    """This probability for each set."""
    shuffled: float
    """``auc`` with genes assigned to sets at random."""


def set_closeness(vectors_GD: np.ndarray, rows: Sequence[np.ndarray], seed: int) -> SetCloseness:
    """Compare cosine similarities of pairs of genes within sets with those of pairs without a common set.

    Pairs without a common set are sampled from all genes, including those in no set. Vectors are centred over the genes. The
    result is the mean over sets, so that every set has the same weight.

    Parameters
    ----------
    vectors_GD
        One vector per gene.
    rows
        Indices of the genes of each set.
    seed
        Seed of the sampled pairs and of the random assignment.
    """
    rng = np.random.default_rng(seed)
    x = np.asarray(vectors_GD, np.float64)
    x = x - x.mean(0)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    own = _set_aucs(x, rows, rng)
    used = np.unique(np.concatenate(rows))
    order = np.arange(len(x))
    order[used] = rng.permutation(used)
    return SetCloseness(float(own.mean()), own, float(_set_aucs(x[order], rows, rng).mean()))


def closeness_by_species(
    vectors_GD: np.ndarray, keys: Sequence[str], sets: Mapping[str, Sequence[str]], seed: int
) -> SetCloseness | None:
    """Return :func:`set_closeness` of the genes of each species, joined; None if no set has enough genes of one species.

    Pairs are of one species: a gene and its orthologue share their name, and both are in a set that lists the symbol, so that they
    would make any set look close. A set that occurs in two species counts twice.

    Parameters
    ----------
    vectors_GD, keys
        Vectors and keys of the genes.
    sets
        Gene sets, as for :func:`members`.
    seed
        As for :func:`set_closeness`.
    """
    species = np.array([key.partition(":")[0] for key in keys])
    parts = []
    for name in np.unique(species):
        own = np.flatnonzero(species == name)
        rows = list(members(sets, [keys[i] for i in own.tolist()]).values())
        if rows:
            parts.append(set_closeness(vectors_GD[own], rows, seed))
    # A species whose genes are all in common sets has no pairs to compare with.
    parts = [p for p in parts if np.isfinite(p.auc)] or parts[:1]
    if not parts:
        return None
    every = np.concatenate([p.set_auc_S for p in parts])
    shuffled = np.average([p.shuffled for p in parts], weights=[p.set_auc_S.size for p in parts])
    return SetCloseness(float(every.mean()), every, float(shuffled))


def _set_aucs(x_GD: np.ndarray, rows: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Return the AUC of each set's pairs against sampled pairs without a common set, float64 (S,)."""
    G = len(x_GD)
    left, right = rng.integers(0, G, (2, MAX_PAIRS if G > 1000 else 20 * G))
    apart = (left != right) & ~_share_a_set(rows, G, left, right)
    across = np.sort(np.einsum("nd,nd->n", x_GD[left[apart]], x_GD[right[apart]]))
    if not across.size:
        return np.full(len(rows), np.nan)
    out = []
    for r in rows:
        # From the matrix of similarities: vectors of all pairs of a large set would need gigabytes.
        within = (x_GD[r] @ x_GD[r].T)[np.triu_indices(r.size, 1)]
        below, at_most = (np.searchsorted(across, within, side=side) for side in ("left", "right"))
        out.append(float(((below + at_most) / 2).mean() / across.size))
    return np.array(out)


def _share_a_set(rows: Sequence[np.ndarray], n_genes: int, left_P: np.ndarray, right_P: np.ndarray) -> np.ndarray:
    """Return whether the two genes of each pair are in a common set, bool (P,)."""
    number = np.repeat(np.arange(len(rows)), [r.size for r in rows])
    ones = np.ones(number.size, np.int32)
    of_gene = sparse.csr_matrix((ones, (np.concatenate(rows), number)), shape=(n_genes, len(rows)))
    common = np.asarray(of_gene[left_P].multiply(of_gene[right_P]).sum(axis=1)).ravel()
    shared: np.ndarray = common > 0
    return shared


def set_scores(values_NG: np.ndarray, rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return the score of each set in each spot, float64 (N, S): the mean of its genes, each standardised over the spots."""
    x = np.asarray(values_NG, np.float64)
    std = x.std(0)
    z = (x - x.mean(0)) / np.where(std > 1e-12, std, 1.0)
    return np.stack([z[:, r].mean(1) for r in rows], axis=1) if len(rows) else np.zeros((len(x), 0))
