"""Readout: low-rank heads from image features to expression, fitted in closed form.

The training spots of one cohort (species and organ) give standardised expression Y (N, G) per gene. Its leading right
singular vectors are K programmes. Ridge regression maps mapped image features X (N, F) to the programme scores T (N, K), and a
gene is decoded with its loadings L (K, G):

    W = (X^T X + alpha I)^-1 X^T T          value[:, g] = mean_g + std_g * (X W L)[:, g]

There is one head per block of features: ``vector``, the tile's vector z in the shared space, and ``frozen``, the mean and
standard deviation, over patches, of the features of every stage of a frozen stem. Features are averaged over flips and rotations
of the tile, concatenated with their means over the neighbouring spots within several radii, and standardised within the section.
They are mapped to the values of a kernel, or to themselves (:mod:`.kernel_map`). Every stage has equal weight: stage i with c_i
channels is scaled by sqrt(mean of c / c_i). The prediction is a fixed mixture of the heads and of the prediction from level
sentences. A gene that was not trained is decoded with loadings that are regressed on gene vectors, if there are any.

Shapes: N spots, F features, G genes, K programmes, V components of a gene vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from comtip_fast.genes.vectors import GeneVectors
from comtip_fast.models.readout.features import ReadoutSettings
from comtip_fast.models.readout.kernel_map import FeatureMap, KernelMap
from comtip_fast.models.readout.section_statistics import Moments, neighbour_means, standardise

FORMAT, VERSION = "comtip-readout", 3
READABLE_VERSIONS = (1, 2, 3)
NORMS = ("cp10k", "raw")
VECTOR_RIDGE = 1.0
VALUES_AT_ONCE = 2**21
"""Kernel values in memory at once, 16 MB: those of 1,024 spots with 2,048 landmarks, of fewer spots with more landmarks."""
Scores = dict[str, dict[str, np.ndarray]]
"""Programme scores (N, K) of one head, by block of features and normalisation."""


@dataclass
class NormHead:
    """The head of one cohort, for one block of features and one normalisation of counts."""

    weight_FK: np.ndarray
    """Ridge weights W from mapped features to programme scores."""
    loading_KG: np.ndarray
    """Loadings L of the genes on the programmes."""
    mean_G: np.ndarray
    """Mean of each gene, log1p."""
    std_G: np.ndarray
    """Standard deviation of each gene, log1p."""

    def scores(self, x_NF: np.ndarray) -> np.ndarray:
        """Return programme scores (N, K) from mapped features (:class:`.kernel_map.FeatureMap`)."""
        out: np.ndarray = x_NF @ self.weight_FK
        return out


@dataclass
class CohortHead:
    """The readout of one cohort (species and organ)."""

    cohort: str
    keys: list[str]
    """Keys of the G genes."""
    mean_F: np.ndarray
    """Mean of the training features, which standardises sections with few spots."""
    std_F: np.ndarray
    """Standard deviation of the training features, for the same purpose."""
    blocks: dict[str, dict[str, NormHead]]
    """Head of each block of features and, within it, of each normalisation of counts."""
    mix: dict[str, dict[str, float]]
    """Of each normalisation: weight of each block, and of the prediction from level sentences (``levels``), which is the same for all;
    the sum is 1."""
    maps: dict[str, FeatureMap] = field(default_factory=dict)
    """What the weights of a block multiply; the features themselves for a block without an entry."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Ridge penalty and number of programmes of each block with their scores, and facts about an adaptation."""

    def head_mix(self, norm: str) -> dict[str, float]:
        """Return the weights of the blocks, rescaled to a sum of 1."""
        total = sum(self.mix[norm][b] for b in self.blocks)
        return {b: self.mix[norm][b] / total for b in self.blocks}

    @property
    def levels(self) -> float:
        """Weight of the prediction from level sentences."""
        return self.mix[NORMS[0]]["levels"]

    def map_of(self, block: str) -> FeatureMap:
        """Return what the weights of a block multiply."""
        return self.maps.get(block, FeatureMap())

    def kind_of(self, block: str, norm: str) -> str:
        """Return how a block predicts a normalisation: ``kernel`` or ``linear`` or, after an adaptation, ``kernel and linear``."""
        weight, n = np.asarray(self.blocks[block][norm].weight_FK), self.map_of(block).n_kernel_values
        used = [kind for kind, part in (("kernel", weight[:n]), ("linear", weight[n:])) if part.any()]
        return " and ".join(used) or ("kernel" if n and not self.map_of(block).linear else "linear")

    def scores(self, block: str, x_NF: np.ndarray) -> dict[str, np.ndarray]:
        """Return the programme scores (N, K) of both normalisations from the standardised features of a block."""
        mapped, norms = self.map_of(block), self.blocks[block]
        parts, n = [], max(1, VALUES_AT_ONCE // max(mapped.n_kernel_values, 1))
        for start in range(0, max(len(x_NF), 1), n):
            features = mapped(x_NF[start : start + n])
            parts.append({norm: part.scores(features) for norm, part in norms.items()})
        return {norm: np.concatenate([part[norm] for part in parts]) for norm in norms}


@dataclass
class Readout:
    """The readout of a model: settings of the features, and one head per cohort."""

    settings: ReadoutSettings
    heads: list[CohortHead]

    def head_features(self, x_NF: np.ndarray, xy_N2: np.ndarray | None) -> np.ndarray:
        """Return tile features (N, F') concatenated with their means over neighbours, or with themselves if ``xy_N2`` is None.

        Without ``settings.radii``, ``x_NF`` is returned unchanged.
        """
        radii = self.settings.radii
        if not radii:
            return x_NF
        around = [x_NF for _ in radii] if xy_N2 is None else neighbour_means(x_NF, xy_N2, radii)
        return np.concatenate([x_NF, *around], axis=1).astype(np.float32)

    def levels_weight(self, keys: Sequence[str], cohort: str | None = None) -> np.ndarray:
        """Return the weight of the level-sentence prediction in the mixture, float64 (G,).

        For each gene, it is the mean over the heads of :meth:`predict` whose ``keys`` contain the gene, or 0 if no head has it.
        """
        heads = [(set(h.keys), h.levels) for h in self._of(cohort)]
        own = ([weight for known, weight in heads if key in known] for key in keys)
        return np.array([float(np.mean(weights)) if weights else 0.0 for weights in own])

    def predict(
        self, x_NF: np.ndarray, keys: Sequence[str], cohort: str | None = None, vectors: GeneVectors | None = None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Predict the expression of genes in one section with the heads alone, without the level sentences.

        Parameters
        ----------
        x_NF
            Features of the section, from :meth:`head_features`.
        keys
            Keys of the G genes.
        cohort
            ``species_organ``. For a cohort without a head, or None, the mean over all heads that decode the gene is used.
        vectors
            Gene vectors, with which a head also decodes genes that it does not have; None decodes the genes of the heads only.

        Returns
        -------
        values, known
            ``cp10k`` and ``raw``: log1p of CP10K and of raw counts, float32 (N, G); and whether a head decodes each gene, bool
            (G,). Columns of other genes are 0.

        Raises
        ------
        ValueError
            A gene needs ``vectors``, but these contain fewer than 2 genes of the head, or only vectors of 0 for them.
        """
        decoder = self.decoder(keys, cohort, vectors)
        return decoder.predict(self.scores(x_NF, cohort)), decoder.known

    def scores(self, x_NF: np.ndarray, cohort: str | None = None, section: Moments | None = None) -> list[Scores]:
        """Return the programme scores of each head of :meth:`predict`, which :meth:`decoder` decodes for any genes.

        Parameters
        ----------
        x_NF
            Features from :meth:`head_features`.
        cohort
            As in :meth:`predict`.
        section
            Moments of the section if ``x_NF`` is a part of it; None if ``x_NF`` is the complete section.
        """
        out = []
        for head in self._of(cohort):
            x = standardise(x_NF, head.mean_F, head.std_F, section)
            out.append({b: head.scores(b, x[:, self.settings.columns(b, x.shape[1])]) for b in head.blocks})
        return out

    def decoder(
        self, keys: Sequence[str], cohort: str | None = None, vectors: GeneVectors | None = None
    ) -> ReadoutDecoder:
        """Return a decoder for these genes, which can predict a section in parts from :meth:`scores` of the same cohort.

        Parameters and errors are those of :meth:`predict`.
        """
        heads = [(head, _Decoders.of(head, keys, vectors)) for head in self._of(cohort)]
        return ReadoutDecoder(heads, len(keys))

    def _of(self, cohort: str | None) -> list[CohortHead]:
        """Return a list with the head of the cohort; if the cohort has no head or is None, return all heads."""
        own = [h for h in self.heads if h.cohort == cohort]
        return own or self.heads

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return {cohort: {block: {normalisation: kind and weight}}} for records of results; ``levels`` is the weight of the sentences."""
        return {
            head.cohort: {
                block: {
                    norm: {"kind": head.kind_of(block, norm), "weight": float(head.mix[norm][block])} for norm in norms
                }
                for block, norms in head.blocks.items()
            }
            | {"levels": head.levels}
            for head in self.heads
        }

    # -- for an export ----------------------------------------------------------------------------------------

    def to_arrays(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return float32 arrays by name, and a JSON-serialisable header."""
        arrays: dict[str, np.ndarray] = {}
        for i, head in enumerate(self.heads):
            arrays |= {f"{i}.mean": head.mean_F, f"{i}.std": head.std_F}
            for block, norms in head.blocks.items():
                for norm, part in norms.items():
                    arrays |= {f"{i}.{block}.{norm}.{name}": value for name, value in vars(part).items()}
                for j, kernel in enumerate(head.map_of(block).kernels):
                    arrays |= {f"{i}.{block}.kernel{j}.{name}": value for name, value in vars(kernel).items()}
        heads = [
            {
                "cohort": h.cohort,
                "keys": h.keys,
                "mix": h.mix,
                "blocks": list(h.blocks),
                "maps": {b: {"kernels": len(h.map_of(b).kernels), "linear": h.map_of(b).linear} for b in h.blocks},
                "facts": h.facts,
            }
            for h in self.heads
        ]
        header = {"format": FORMAT, "version": VERSION, "settings": asdict(self.settings), "heads": heads}
        return {k: np.ascontiguousarray(v, np.float32) for k, v in arrays.items()}, header

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> Readout:
        """Build the readout from the result of :meth:`to_arrays`; the caller checks it, see ``export_checks.readout``."""
        heads = []
        for i, h in enumerate(header["heads"]):
            blocks = {
                block: {
                    norm: NormHead(*(arrays[f"{i}.{block}.{norm}.{name}"] for name in NormHead.__dataclass_fields__))
                    for norm in NORMS
                }
                for block in h["blocks"]
            }
            maps = {
                block: FeatureMap(
                    [
                        KernelMap(*(arrays[f"{i}.{block}.kernel{j}.{n}"] for n in KernelMap.__dataclass_fields__))
                        for j in range(stated["kernels"])
                    ],
                    stated["linear"],
                )
                for block, stated in h.get("maps", {}).items()
            }
            mean, std = arrays[f"{i}.mean"], arrays[f"{i}.std"]
            # Before version 3, the weights were those of both normalisations.
            mix = h["mix"] if header["version"] >= 3 else dict.fromkeys(NORMS, h["mix"])
            heads.append(CohortHead(h["cohort"], h["keys"], mean, std, blocks, mix, maps, h["facts"]))
        return cls(ReadoutSettings.of_header(header["settings"]), heads)


class ReadoutDecoder:
    """Predicts the requested genes with the heads; built by :meth:`Readout.decoder`."""

    def __init__(self, heads: Sequence[tuple[CohortHead, _Decoders]], n_genes: int) -> None:
        self._heads = heads
        self._count = np.zeros(n_genes)
        for _, decoders in heads:
            self._count[decoders.columns] += 1

    @property
    def known(self) -> np.ndarray:
        """Whether a head decodes each gene, bool (G,)."""
        return self._count > 0

    def predict(self, scores: Sequence[Scores]) -> dict[str, np.ndarray]:
        """Predict ``cp10k`` and ``raw`` from :meth:`Readout.scores`: log1p of CP10K and of raw counts, float32 (N, G).

        A gene is predicted by the mean over the heads that decode it; columns of genes that no head decodes are 0.
        """
        n_spots = len(next(iter(scores[0].values()))[NORMS[0]])
        values = {norm: np.zeros((n_spots, len(self._count))) for norm in NORMS}
        for (head, decoders), of_head in zip(self._heads, scores, strict=True):
            for block, norms in head.blocks.items():
                for norm, part in norms.items():
                    weight = head.head_mix(norm)[block]
                    for columns, mean, std, loading in decoders.of_norm(part, norm):
                        values[norm][:, columns] += weight * (mean + std * (of_head[block][norm] @ loading))
        return {n: (v / np.maximum(self._count, 1)).astype(np.float32) for n, v in values.items()}


@dataclass
class _Decoders:
    """The requested genes that one head decodes: genes of the head, and others through gene vectors."""

    trained: np.ndarray
    """Indices, in the request, of genes of the head."""
    rows: np.ndarray
    """Indices of these genes in the head."""
    unseen: np.ndarray
    """Indices, in the request, of genes that are decoded with gene vectors."""
    moments_G4: np.ndarray
    """Moments of the unseen genes, see :class:`GeneVectors`."""
    mixing: np.ndarray | None
    """Result of :func:`_vector_map` (genes of the head, unseen genes); None without unseen genes."""

    @classmethod
    def of(cls, head: CohortHead, keys: Sequence[str], vectors: GeneVectors | None) -> _Decoders:
        """Find the genes that ``head`` decodes: its own and, with gene vectors, genes of its species that have a vector."""
        index = {k: i for i, k in enumerate(head.keys)}
        rows = np.array([index.get(k, -1) for k in keys], np.int64)
        trained, unseen = np.flatnonzero(rows >= 0), np.zeros(0, np.int64)
        moments_G4, mixing = np.zeros((0, 4)), None
        if vectors is not None:
            species = {k.split(":")[0] for k in head.keys}
            others = np.flatnonzero(rows < 0).tolist()
            decodable = [i for i in others if keys[i] in vectors.row and keys[i].split(":")[0] in species]
            if decodable:
                unseen, vector_rows = np.array(decodable, np.int64), [vectors.row[keys[i]] for i in decodable]
                moments_G4, mixing = vectors.moments_G4[vector_rows], _vector_map(head.keys, vectors, vector_rows)
        return cls(trained, rows[trained], unseen, moments_G4, mixing)

    @property
    def columns(self) -> np.ndarray:
        """Indices, in the request, of all genes that the head decodes."""
        return np.concatenate([self.trained, self.unseen])

    def of_norm(self, part: NormHead, norm: str) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Return (columns, mean, std, loadings (K, g)) of the head's genes and, with gene vectors, of the unseen genes."""
        rows = self.rows
        out = [(self.trained, part.mean_G[rows], part.std_G[rows], part.loading_KG[:, rows])]
        if self.mixing is not None:
            first = 2 * NORMS.index(norm)
            mean, std = self.moments_G4[:, first], self.moments_G4[:, first + 1]
            out.append((self.unseen, mean, std, part.loading_KG @ self.mixing))
        return out


def _vector_map(keys: Sequence[str], vectors: GeneVectors, rows: Sequence[int]) -> np.ndarray:
    """Return weights (G, new) that give the loadings of new genes as a combination of the trained genes' loadings.

    Ridge regression of the loadings L^T (G, K) on gene vectors V (G, D), scaled to a mean squared length of 1, maps a new vector v
    to v (V^T V + r I)^-1 V^T L^T, which is linear in L. Genes without a vector have weight 0.
    """
    index = np.array([vectors.row.get(k, -1) for k in keys], np.int64)
    known = np.flatnonzero(index >= 0)
    if known.size < 2:
        raise ValueError(
            f"the gene vectors contain {known.size} of the {len(keys)} genes of a head of the readout ({keys[0]} ...), but at "
            "least 2 are needed; give a file of vectors that contains more of them"
        )
    v = vectors.vector_GK[index[known]].astype(np.float64)
    scale = np.sqrt((v**2).sum(1).mean())
    if not scale > 0:
        raise ValueError(
            f"the gene vectors of all {known.size} genes of a head of the readout that have one ({keys[known[0]]} ...) are 0, so that "
            "no other gene can be related to them; give a file of vectors that distinguish these genes"
        )
    v, new = v / scale, vectors.vector_GK[rows].astype(np.float64) / scale
    gram = v.T @ v + VECTOR_RIDGE * np.eye(v.shape[1])
    out = np.zeros((len(keys), len(new)))
    out[known] = v @ np.linalg.solve(gram, new.T)
    return out
