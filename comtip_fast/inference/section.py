"""Prediction of a complete section in bounded memory.

Tiles are encoded in chunks. Their features are stored, because the readout needs statistics of the whole section and the
neighbours of each spot; if they are large, they are stored in a temporary file. Expression is then predicted for blocks of
spots and genes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

import numpy as np
from comtip_shards.slides.base import reading_order
from comtip_shards.slides.tiles import StainStats

from comtip_fast.data.tile_sources import TileSource
from comtip_fast.inference.feature_store import FeatureColumns, FeatureStore, SpooledFeatures
from comtip_fast.inference.levels import GENES_PER_CHUNK, NORMS, GeneQuery, SentenceLevels, predict_chunks
from comtip_fast.inference.predictor import EncodedTiles, Predictor
from comtip_fast.models.readout.features import frozen_columns
from comtip_fast.models.readout.heads import ReadoutDecoder, Scores
from comtip_fast.models.readout.section_statistics import Moments, Neighbours, mean_over

FEATURES_IN_MEMORY = 64 << 20
"""Bytes of features that are kept in memory; more go to a file in the folder for temporary files."""
BLOCK_BYTES = 32 << 20
MIN_BLOCK, MAX_BLOCK = 256, 4096
"""Bounds of the number of spots in a block."""


class SectionFeatures:
    """Features of all tiles of a section, encoded once; a context manager. Large features are kept in temporary files.

    Parameters
    ----------
    predictor
        The model.
    tiles
        Tiles of N spots.
    stain
        As in :meth:`Predictor.encode`.

    Attributes
    ----------
    stored
        The features that :class:`SectionPrediction` needs.
    pooled
        Mean patch feature of each tile before projection, float32 (N, d) in blocks.
    frozen
        Mean and standard deviation of the frozen stem's patch features, averaged over the readout's views, by name of the features:
        those that the encoder embeds and, if the readout has them, those of all stages. Empty without a frozen stem or a
        readout.
    """

    def __init__(self, predictor: Predictor, tiles: TileSource, stain: StainStats | None) -> None:
        self.n_spots, self._dim = len(tiles), predictor.config.align.dim
        readout = predictor.bundle.readout
        self.stored = SpooledFeatures(stored_width(predictor), FEATURES_IN_MEMORY)
        self.pooled = SpooledFeatures(predictor.model.vision.width, FEATURES_IN_MEMORY)
        self.frozen: dict[str, FeatureStore] = {}
        if readout is not None:
            columns = frozen_columns(predictor.model, readout.settings)
            self.frozen = {name: FeatureColumns(self.stored, self._dim + found) for name, found in columns.items()}
        try:
            for rows, chunk in tiles.ahead():
                encoded = predictor.encode(chunk, stain)
                self.stored.write(rows, to_store(encoded))
                self.pooled.write(rows, encoded.pooled_nd)
        except BaseException:
            self.close()
            raise

    def predict_levels(self, levels: SentenceLevels) -> dict[str, np.ndarray]:
        """Predict the expression of the g genes of ``levels`` without the readout; see :meth:`Predictor.predict_levels`.

        Returns
        -------
        dict
            ``cp10k`` (log1p of counts per 10,000) and ``raw`` (log1p of counts), each float32 (N, g).
        """
        parts = [levels.predict(self.stored.read(rows)[:, : self._dim]) for rows in row_blocks(self.n_spots)]
        return {name: np.concatenate([part[name] for part in parts]) for name in NORMS}

    def close(self) -> None:
        """Delete the features."""
        self.stored.close()
        self.pooled.close()

    def __enter__(self) -> SectionFeatures:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def stored_width(predictor: Predictor) -> int:
    """Return the number of features per tile that :func:`to_store` returns."""
    return predictor.config.align.dim + (0 if predictor.bundle.readout is None else predictor.view_width)


def to_store(encoded: EncodedTiles) -> np.ndarray:
    """Return the features to store, float32 (n, W): each tile's vector and, with a readout, its features averaged over views."""
    if encoded.views_nF is None:
        return encoded.vector_nD
    return np.concatenate([encoded.vector_nD, encoded.views_nF], axis=1)


def row_blocks(n: int) -> Iterator[np.ndarray]:
    """Yield the indices below ``n`` in blocks of :data:`MAX_BLOCK`; if ``n`` is 0, yield one empty block."""
    for start in range(0, max(n, 1), MAX_BLOCK):
        yield np.arange(start, min(start + MAX_BLOCK, n))


class PredictedBlock(NamedTuple):
    """Predictions for some spots and genes."""

    rows: np.ndarray
    """int64 (n,), spots."""
    columns: slice
    """Genes."""
    values: dict[str, np.ndarray]
    """``cp10k`` and ``raw``, float32 (n, g)."""


@dataclass
class _GeneChunk:
    """Consecutive genes of a query, with the readout and the level sentences that predict them."""

    columns: slice
    decoder: ReadoutDecoder | None
    weight: np.ndarray
    """Weight of the prediction from level sentences, float64 (g,)."""
    mixed: np.ndarray
    """Indices of genes predicted by the readout and from level sentences."""
    rest: np.ndarray
    """Indices of genes predicted from level sentences alone."""
    mixed_levels: list[SentenceLevels]
    """Sentences of the genes ``mixed``."""
    rest_levels: list[SentenceLevels]
    """Sentences of the genes ``rest``."""


@dataclass
class _Whole:
    """State of the complete section that all blocks share."""

    store: FeatureStore
    neighbours: Neighbours | None
    """None if neighbours are not used."""
    moments: Moments | None
    """Moments of the features of the readout's heads; None without a readout."""


@dataclass
class _Around:
    """A block of spots with its neighbours."""

    features: np.ndarray
    """float32 (m, W) of the block and its neighbours."""
    own: np.ndarray
    """Indices of the block's spots in ``features``."""
    index: np.ndarray | None
    """int64 (n, k), indices of candidate neighbours in ``features``; None without neighbours."""
    near: list[np.ndarray]
    """bool (n, k) for each radius of the readout: which candidates are neighbours; empty without neighbours."""

    def mean(self, values_mF: np.ndarray, radius: int = 0) -> np.ndarray:
        """Return the mean of ``values_mF`` over each spot's neighbours within the radius of this number.

        A spot without neighbours keeps its own values.
        """
        own: np.ndarray = values_mF[self.own]
        return own if self.index is None else mean_over(own, values_mF, self.index, self.near[radius])

    def adjacent(self) -> _Around:
        """Return the block with its neighbours within the first radius only, which is the smallest."""
        if self.index is None:
            return self
        near = self.near[0][:, : 1 + int(np.flatnonzero(self.near[0].any(0)).max(initial=0))]
        index = np.where(near, self.index[:, : near.shape[1]], self.own[:, None])
        need = np.unique(np.concatenate([self.own, index.ravel()]))
        own, local = np.searchsorted(need, self.own), np.searchsorted(need, index)
        return _Around(self.features[need], own, local, [near])


class SectionPrediction:
    """Prediction of genes of one section from stored features. The sentences of the genes are encoded once.

    Parameters
    ----------
    predictor
        The model.
    genes
        The G genes.
    cohort
        ``species_organ``, whose heads of the readout are used; None uses the mean over the heads that predict the gene.
    """

    def __init__(self, predictor: Predictor, genes: Sequence[GeneQuery], cohort: str | None = None) -> None:
        self.predictor, self.n_genes, self.readout = predictor, len(genes), predictor.bundle.readout
        self._cohort = cohort
        self._dim = predictor.config.align.dim
        self.width = stored_width(predictor)
        """Number of stored features per tile."""
        starts = range(0, len(genes), GENES_PER_CHUNK)
        self._chunks = [self._chunk(genes, slice(i, min(i + GENES_PER_CHUNK, len(genes))), cohort) for i in starts]

    @property
    def radii(self) -> tuple[float, ...]:
        """Radii within which the features of a spot's neighbours are used."""
        return () if self.readout is None else self.readout.settings.radii

    @property
    def block_spots(self) -> int:
        """Largest number of spots in a block."""
        return int(np.clip(BLOCK_BYTES // (16 * self.width), MIN_BLOCK, MAX_BLOCK))

    def encode(self, tiles_NSS3: np.ndarray, stain: StainStats | None) -> np.ndarray:
        """Encode a chunk of tiles (:meth:`Predictor.encode`) and return the features to store, see :func:`to_store`."""
        return to_store(self.predictor.encode(tiles_NSS3, stain))

    def summarise(self, store: FeatureStore, n_spots: int, xy_N2: np.ndarray | None) -> _Whole:
        """Return what :meth:`predict_rows` needs of the whole section: features, neighbours of the spots, and feature moments."""
        neighbours = Neighbours(xy_N2, self.radii) if self.radii and xy_N2 is not None and n_spots > 1 else None
        whole = _Whole(store, neighbours, None if self.readout is None else Moments())
        if whole.moments is not None:
            for rows in self._blocks(n_spots, xy_N2, neighbours):
                whole.moments.add(self._head_features(self._around(whole, rows)))
        return whole

    def blocks(self, store: FeatureStore, n_spots: int, xy_N2: np.ndarray | None) -> Iterator[PredictedBlock]:
        """Predict all spots and genes, block by block.

        Parameters
        ----------
        store
            Features of :meth:`encode`.
        n_spots
            Number of spots, N.
        xy_N2
            Positions in any unit, which define neighbours; None uses each spot alone.
        """
        whole = self.summarise(store, n_spots, xy_N2)
        for rows in self._blocks(n_spots, xy_N2, whole.neighbours):
            yield from self.predict_rows(whole, rows)

    def predict_all(self, store: FeatureStore, n_spots: int, xy_N2: np.ndarray | None) -> dict[str, np.ndarray]:
        """Return the predictions of :meth:`blocks` for all spots and genes: ``cp10k`` and ``raw``, float32 (N, G)."""
        out = {name: np.zeros((n_spots, self.n_genes), np.float32) for name in NORMS}
        for block in self.blocks(store, n_spots, xy_N2):
            for name, value in block.values.items():
                out[name][block.rows, block.columns] = value
        return out

    def predict_rows(self, whole: _Whole, rows: np.ndarray) -> Iterator[PredictedBlock]:
        """Predict all genes of some spots; ``whole`` is from :meth:`summarise`."""
        around = self._around(whole, rows)
        scores = None
        if self.readout is not None:  # once for all genes: kernel values cost more than the genes' loadings
            scores = self.readout.scores(self._head_features(around), self._cohort, whole.moments)
        for chunk in self._chunks:
            yield PredictedBlock(rows, chunk.columns, self._predict(chunk, around, scores))

    def _chunk(self, genes: Sequence[GeneQuery], columns: slice, cohort: str | None) -> _GeneChunk:
        """Encode the sentences of some genes, and choose for each gene whether the readout, level sentences or both predict it."""
        part = list(genes[columns])
        keys = [g.key or "" for g in part]
        if self.readout is None:
            everything = np.arange(len(part))
            levels = list(self.predictor.sentence_levels(part))
            return _GeneChunk(columns, None, np.ones(len(part)), everything[:0], everything, [], levels)
        decoder = self.readout.decoder(keys, cohort, self.predictor.vectors)
        weight = self.readout.levels_weight(keys, cohort)
        mixed, rest = np.flatnonzero(weight > 0), np.flatnonzero(~decoder.known)
        tables = [list(self.predictor.sentence_levels([part[i] for i in those])) for those in (mixed, rest)]
        return _GeneChunk(columns, decoder, weight, mixed, rest, *tables)

    def _blocks(self, n: int, xy_N2: np.ndarray | None, neighbours: Neighbours | None) -> Iterator[np.ndarray]:
        """Yield the spots in blocks, each ascending; if neighbours are used, most neighbours of a spot are in its block."""
        order = np.arange(n)
        if neighbours is not None and xy_N2 is not None:
            order = reading_order(np.asarray(xy_N2, np.float64), neighbours.spacing)
        for start in range(0, n, self.block_spots):
            yield np.sort(order[start : start + self.block_spots])

    def _around(self, whole: _Whole, rows: np.ndarray) -> _Around:
        """Read the features of a block of spots and, if neighbours are used, of their neighbours."""
        if whole.neighbours is None:
            return _Around(whole.store.read(rows), np.arange(rows.size), None, [])
        index, near = whole.neighbours.of(rows)
        index = np.where(np.any(near, axis=0), index, rows[:, None])
        need = np.unique(np.concatenate([rows, index.ravel()]))
        own, local = np.searchsorted(need, rows), np.searchsorted(need, index)
        return _Around(whole.store.read(need), own, local, near)

    def _head_features(self, around: _Around) -> np.ndarray:
        """Return the features of the readout's heads for the block's spots, float32, before they are standardised."""
        views = around.features[:, self._dim :]
        own: np.ndarray = views[around.own]
        means = [around.mean(views, i) for i in range(len(self.radii))]
        return np.concatenate([own, *means], axis=1).astype(np.float32)

    def _predict(self, chunk: _GeneChunk, around: _Around, scores: list[Scores] | None) -> dict[str, np.ndarray]:
        """Predict the genes of one chunk for the block's spots."""
        vectors = around.features[:, : self._dim]
        if chunk.decoder is None or scores is None:
            return predict_chunks(chunk.rest_levels, vectors[around.own])
        values = chunk.decoder.predict(scores)
        if chunk.mixed.size:
            adjacent = around.adjacent()
            levels = predict_chunks(chunk.mixed_levels, self.predictor.view_vectors(adjacent.features[:, self._dim :]))
            weight = chunk.weight[chunk.mixed]
            for name, level in levels.items():
                value = level[adjacent.own]
                if adjacent.index is not None:
                    value = 0.5 * (value + adjacent.mean(level))
                values[name][:, chunk.mixed] = (1 - weight) * values[name][:, chunk.mixed] + weight * value
        if chunk.rest.size:
            for name, value in predict_chunks(chunk.rest_levels, vectors[around.own]).items():
                values[name][:, chunk.rest] = value
        return values


def predict_section(
    predictor: Predictor,
    tiles: TileSource,
    stain: StainStats | None,
    xy_N2: np.ndarray | None,
    genes: Sequence[GeneQuery],
    cohort: str | None = None,
) -> dict[str, np.ndarray]:
    """Predict expression of one section; only the output and the positions grow with the section in memory.

    Parameters
    ----------
    predictor
        The model.
    tiles
        Tiles of N spots.
    stain
        As in :meth:`Predictor.encode`.
    xy_N2
        Positions in any unit, which define neighbours; None uses each spot alone.
    genes
        The G genes.
    cohort
        See :class:`SectionPrediction`.

    Returns
    -------
    dict
        ``cp10k`` (log1p of counts per 10,000) and ``raw`` (log1p of counts), float32 (N, G), as from
        :meth:`Predictor.predict` up to rounding.
    """
    prediction, n = SectionPrediction(predictor, genes, cohort), len(tiles)
    with SpooledFeatures(prediction.width, FEATURES_IN_MEMORY) as store:
        for rows, chunk in tiles.ahead():
            store.write(rows, prediction.encode(chunk, stain))
        return prediction.predict_all(store, n, xy_N2)
