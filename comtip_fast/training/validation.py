"""Validation: the zero-shot score for early stopping, statistics of the shared space, and the scores of an export."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from comtip_kernels import table_pool
from comtip_shards import ShardSet
from scipy import sparse
from torch import Tensor
from torch.nn import functional as F

from comtip_fast.config.schema import RunConfig
from comtip_fast.data.expression.levels import log1p_cp10k
from comtip_fast.data.expression.training_tables import TrainingTables
from comtip_fast.data.loaders.base import BaseLoader
from comtip_fast.data.upload import upload
from comtip_fast.genes.tokens import GeneTokens, take_genes
from comtip_fast.inference import GeneQuery, Predictor, predict_trained
from comtip_fast.metrics import mean_pcc, pcc_per_gene
from comtip_fast.models import CoMTIP
from comtip_fast.training.engines.base import autocast_of
from comtip_fast.training.monitor.diagnostics import diagnostic, undefined
from comtip_fast.training.protocol import ValidationResult
from comtip_fast.training.readout.fit import neighbouring_spots

log = logging.getLogger("comtip_fast")
LOG_S = 30.0
"""Seconds between progress messages."""
VALIDATION_GENES = 50
"""Largest number of trained genes that are scored per section: the most variable ones."""
SCORED_SPOTS, MIN_SCORED_SPOTS, MAX_SCORED_SPOTS = 20_000, 200, 2000
"""Number of spots on which an export is scored: over all validation sections, and smallest and largest number per section."""
SPACE = ("alignment", "uniformity_image", "uniformity_text", "r1", "r5", "t1", "t5")
"""Keys returned by :func:`space_numbers`."""
CHUNK = 512
"""Number of tiles that are encoded at once."""
STEM_CHUNK = 128
"""The same for a frozen stem on a CPU, as in training: activations of 512 tiles take 2 GB."""
KEPT_BYTES = 1 << 30
"""Largest size in bytes of tiles or stem features that are cached in host memory between validations; other tiles are read in
every validation."""
SPACE_SPOTS, SPACE_GENES = 256, 256
"""Largest numbers of spots and genes per section for the statistics of the shared space; fixed, so that runs can be compared."""


@dataclass(frozen=True)
class SectionScore:
    """Result of one validation section."""

    section: int
    cohort: str
    pcc: float
    """Mean zero-shot PCC of the cohort's most variable trained genes that the section measured; NaN for non-finite predictions."""
    space: dict[str, float]
    """See :func:`space_numbers`."""


class Validation:
    """Scores a model on the sections of split ``val``.

    Memory is bounded by one section's expression, one chunk of tiles and :data:`KEPT_BYTES`; it does not grow with the
    number of sections.

    Parameters
    ----------
    model
        The model; :meth:`share` uses its current weights.
    shards, tables, loader, genes
        Shard set, training tables, loader and gene tokens of the run.
    config
        Config of the run.
    """

    def __init__(
        self,
        model: CoMTIP,
        shards: ShardSet,
        tables: TrainingTables,
        loader: BaseLoader,
        genes: GeneTokens,
        config: RunConfig,
    ) -> None:
        self.model, self.shards, self.tables, self.loader, self.genes = model, shards, tables, loader, genes
        self.config = config
        self.device = next(model.parameters()).device
        self._autocast = autocast_of(config, self.device)
        self._kept: dict[bytes, tuple[np.ndarray, Tensor]] = {}
        self._kept_bytes = 0

    def score(self) -> ValidationResult:
        """Return the result of a validation by this process alone."""
        return self.result([self.share(0, 1)])

    @torch.no_grad()
    def share(self, rank: int, size: int, progress: Callable[[str], None] = lambda what: None) -> list[SectionScore]:
        """Score the sections that belong to ``rank`` of ``size`` ranks; not a collective call.

        A section's score does not depend on the rank that computes it. Sections without a gene to score or without a readable spot
        are left out. ``progress`` is called before every chunk of spots is read, with text such as ``section 1 of 3``.

        Raises
        ------
        ShardError
            More records are damaged than ``data.faults`` and ``data.max_faults`` allow.
        """
        own = self._sections_of(rank, size)
        out, logged = [], time.monotonic()
        for i, section in enumerate(own):
            what = f"section {i + 1} of {len(own)}" + (f" of rank {rank}" if size > 1 else "")
            if time.monotonic() - logged > LOG_S:
                logged = time.monotonic()
                log.info("validation: %s", what)
            one = self._score_section(section, lambda what=what: progress(what))  # type: ignore[misc]
            if one is not None:
                out.append(one)
        return out

    @staticmethod
    def result(shares: Sequence[Sequence[SectionScore]]) -> ValidationResult:
        """Combine the shares of all ranks.

        Returns
        -------
        score, per_cohort, space
            Mean zero-shot PCC over cohorts, the mean of each cohort over its sections, and the mean of each of
            :func:`space_numbers` over the sections where it is finite. Without sections, the score is NaN and the dicts are empty.
        """
        # In the order of the sections, so that the means do not depend on the number of ranks.
        sections = sorted((one for share in shares for one in share), key=lambda one: one.section)
        scores: dict[str, list[float]] = {}
        for one in sections:
            scores.setdefault(one.cohort, []).append(one.pcc)
        per_cohort = {cohort: float(np.mean(values)) for cohort, values in scores.items()}
        mean = float(np.mean(list(per_cohort.values()))) if per_cohort else float("nan")
        space = {k: _mean_of_finite([one.space[k] for one in sections]) for k in SPACE} if sections else {}
        return mean, per_cohort, space

    def _sections_of(self, rank: int, size: int) -> list[int]:
        """Return the indices of a rank's validation sections, ascending; ranks are balanced by the number of scored spots."""
        sections = self.shards.manifest.sections
        val = [i for i, s in enumerate(sections) if s.split == "val"]
        spots = [min(sections[i].n_spots, self.config.train.validate_spots) for i in val]
        return [val[k] for k in balanced_share(spots, rank, size)]

    def _score_section(self, section: int, progress: Callable[[], None]) -> SectionScore | None:
        """Return the scores of a section; None if it has no gene to score or no readable spot."""
        cohort = self.shards.cohort_of_section(section)
        rows = self._rows(section, cohort, max(VALIDATION_GENES, SPACE_GENES))
        if rows.size == 0:
            return None
        spots, values = self._expression(section, rows, progress)
        encoded, image = self._encode(spots, progress)
        if encoded.size == 0:
            log.warning(
                "validation: section %s has no readable spot and is left out; check the set with `comtip shards verify`",
                self.shards.manifest.sections[section].section_id,
            )
            return None
        values = values[np.isin(spots, encoded)]  # without the spots whose tile is damaged
        pcc = self._pcc(rows[:VALIDATION_GENES], values[:, :VALIDATION_GENES], image)
        chosen = evenly(encoded.size, SPACE_SPOTS)
        compute = partial(self._space, rows[:SPACE_GENES], values[chosen, :SPACE_GENES], image, chosen)
        space = diagnostic("the statistics of the shared space", compute, undefined(SPACE))
        return SectionScore(section, cohort, pcc, space)

    def _rows(self, section: int, cohort: str, most: int) -> np.ndarray:
        """Return the cohort's most variable trained genes that the section measured: rows of the gene table."""
        ranked = self.tables.genes.ranked.get(cohort)
        if ranked is None:
            return np.zeros(0, np.int64)
        return ranked[self.shards.measured(section)[ranked] & np.isin(ranked, self.tables.genes.trained)][:most]

    def _pcc(self, rows: np.ndarray, measured: np.ndarray, image: Tensor) -> float:
        """Return the mean zero-shot PCC of genes; NaN if a prediction is not finite."""
        index = np.searchsorted(self.tables.genes.trained, rows)
        genes = self._genes(index)
        with self._autocast():  # as in Predictor.sentence_levels, so that scores are those of an export
            predicted = predict_trained(self.model, genes, image, self.tables.table, torch.from_numpy(index))
        # A gene without variance counts as 0. A NaN prediction gives no score, so that it cannot become the best one.
        return mean_pcc(measured, predicted["cp10k"]) if np.isfinite(predicted["cp10k"]).all() else float("nan")

    def _space(self, rows: np.ndarray, values: np.ndarray, image: Tensor, chosen: np.ndarray) -> dict[str, float]:
        """Return :func:`space_numbers` of the ``chosen`` spots' image vectors and the text vectors of their values (n, genes)."""
        index = np.searchsorted(self.tables.genes.trained, rows)
        levels = upload(torch.from_numpy(self.tables.table.levels(values, index)).long(), self.device)
        with self._autocast():
            table = self.model.sentence_table(self._genes(index))
            text = table_pool(table.rows_GQD, table.scores_GQ, levels, torch.ones_like(levels, dtype=torch.bool))
        return space_numbers(image[upload(torch.from_numpy(chosen), image.device)], text)

    def _genes(self, index: np.ndarray) -> GeneTokens:
        """Return the tokens of some trained genes, with their lengths in host memory, so that no size is read from the device."""
        return take_genes(self.genes, upload(torch.from_numpy(index), self.device), index)

    def _expression(
        self, section: int, rows: np.ndarray, progress: Callable[[], None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return up to ``train.validate_spots`` evenly spaced spots of a section, and log1p CP10K of the genes ``rows``, (N, genes).

        Spots whose record of counts is damaged are left out.
        """
        meta = self.shards.manifest.sections[section]
        all_spots = meta.first_spot + evenly(meta.n_spots, self.config.train.validate_spots)
        spots, values = [], []
        for start in range(0, all_spots.size, CHUNK):
            progress()
            readable, counts = self.loader.counts(all_spots[start : start + CHUNK])
            spots.append(readable)
            values.append(log1p_cp10k(counts)[:, rows].toarray())
        return np.concatenate(spots), np.concatenate(values)

    def _encode(self, spots: np.ndarray, progress: Callable[[], None]) -> tuple[np.ndarray, Tensor]:
        """Return the spots whose tiles are undamaged, and their image vectors, fp32 (N, D)."""
        encoded, vectors = [], []
        for start in range(0, spots.size, CHUNK):
            progress()
            chunk, inputs = self._inputs(spots[start : start + CHUNK])
            features = upload(inputs, self.device)
            if self.model.vision.stem is None:
                features = self.model.vision.stem_features(features)
            with self._autocast():
                vectors.append(self.model.encode_image(features).vector_BD.float())
            encoded.append(chunk)
        if not encoded:
            return np.zeros(0, np.int64), torch.zeros(0, self.config.align.dim, device=self.device)
        return np.concatenate(encoded), torch.cat(vectors)

    def _inputs(self, spots: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Return the undamaged spots of a chunk, and their tiles or frozen-stem features in host memory."""
        requested = spots.tobytes()  # not the first spot alone: a record may be readable once and not the next time
        if requested in self._kept:
            return self._kept[requested]
        spots, inputs = self.loader.tiles(spots, np.zeros(spots.shape, np.int64))
        if self.model.vision.stem is not None:
            size = STEM_CHUNK if self.device.type == "cpu" else CHUNK
            parts = [self.model.vision.stem_features(upload(x, self.device)).cpu() for x in inputs.split(size)]
            inputs = torch.cat(parts)
        if self._kept_bytes + inputs.nbytes <= KEPT_BYTES:
            self._kept_bytes += inputs.nbytes
            self._kept[requested] = spots, inputs
        return spots, inputs


def balanced_share(sizes: Sequence[int], rank: int, world: int) -> list[int]:
    """Return the indices of the items of one rank, ascending; items go, largest first, to the rank with the least work."""
    work = [0] * world
    own = []
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = work.index(min(work))
        work[least] += sizes[item]
        if least == rank:
            own.append(item)
    return sorted(own)


def evenly(n: int, most: int) -> np.ndarray:
    """Return at most ``most`` distinct, evenly spaced indices below ``n``, int64."""
    return np.linspace(0, n - 1, min(n, most)).round().astype(np.int64)


def validation_scores(
    predictor: Predictor, shards: ShardSet, tables: TrainingTables, loader: BaseLoader, seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Score a model on the sections of split ``val``, with the same prediction as :meth:`comtip_fast.Model.predict`.

    Each section contributes an equal share of :data:`SCORED_SPOTS`, at least :data:`MIN_SCORED_SPOTS` and at most
    :data:`MAX_SCORED_SPOTS` neighbouring spots. Sections without a readable spot are left out. PCCs are those of log1p CP10K; an
    undefined PCC counts as 0.

    Returns
    -------
    per_cohort
        ``{cohort: PCC}``, the mean over the cohort's sections of the mean over the (up to 50) most variable trained genes that
        the section measured.
    per_gene
        ``{key: PCC}`` of the trained and held-out genes, the mean over the sections that measured the gene.

    Raises
    ------
    ShardError
        As for :meth:`Validation.share`.
    """
    pcc: dict[str, list[float]] = {}
    cohorts: dict[str, list[float]] = {}
    n_sections = sum(s.split == "val" for s in shards.manifest.sections)
    most = min(MAX_SCORED_SPOTS, max(MIN_SCORED_SPOTS, SCORED_SPOTS // max(1, n_sections)))
    rows = np.concatenate([tables.genes.trained, tables.genes.held_out]).astype(np.int64)
    for number, meta in enumerate(shards.manifest.sections):
        own = rows[shards.measured(number)[rows]] if meta.split == "val" else rows[:0]
        found = _readable(shards, loader, number, most, seed) if own.size else None
        if found is None:
            continue
        spots, tiles, counts = found
        cohort = shards.cohort_of_section(number)
        xy = shards.spots.loc[spots, ["x_px", "y_px"]].to_numpy(float)
        features = predictor.image_features(tiles, None, xy)  # the loader has normalised the stain
        queries = [GeneQuery(shards.genes[r].symbol, shards.genes[r].name, shards.genes[r].key) for r in own]
        predicted = predictor.predict(features, queries, cohort=cohort)["cp10k"]
        scores = np.nan_to_num(pcc_per_gene(log1p_cp10k(counts)[:, own].toarray(), predicted))
        for row, value in zip(own, scores.tolist(), strict=True):
            pcc.setdefault(shards.genes[row].key, []).append(value)
        ranked = tables.genes.ranked.get(cohort, rows[:0])
        top = ranked[np.isin(ranked, own) & np.isin(ranked, tables.genes.trained)][:VALIDATION_GENES]
        if top.size:
            cohorts.setdefault(cohort, []).append(float(scores[np.isin(own, top)].mean()))
    return _means(cohorts), _means(pcc)


def _means(values: dict[str, list[float]]) -> dict[str, float]:
    """Return the mean of each list, sorted by key."""
    return {k: float(np.mean(v)) for k, v in sorted(values.items())}


def _readable(
    shards: ShardSet, loader: BaseLoader, section: int, most: int, seed: int
) -> tuple[np.ndarray, np.ndarray, sparse.csr_matrix] | None:
    """Return at most ``most`` undamaged spots of a section, their uint8 tiles (n, 3, S, S) and counts; None if there are none."""
    chosen = neighbouring_spots(shards, shards.select(sections=[section]), most, seed, section)
    spots, counts = loader.counts(chosen)
    found, tiles = loader.tiles(spots, np.zeros(spots.shape, np.int64))
    return (found, tiles.cpu().numpy(), counts[np.isin(spots, found)]) if found.size else None


def _mean_of_finite(values: list[float]) -> float:
    """Return the mean of the finite values; NaN if there are none."""
    finite = [v for v in values if np.isfinite(v)]
    return float(np.mean(finite)) if finite else float("nan")


def space_numbers(image_ND: Tensor, text_ND: Tensor) -> dict[str, float]:
    """Return alignment, uniformity and retrieval of N paired vectors.

    Parameters
    ----------
    image_ND, text_ND
        Float (N, D); row i of one is paired with row i of the other.

    Returns
    -------
    dict
        ``alignment``: mean squared distance within pairs, 0 to 4, lower is closer. ``uniformity_image`` and
        ``uniformity_text``: log of the mean of exp(-2 d^2) over pairs of different rows, at most 0, lower is more uniform
        (Wang and Isola 2020); 0 for a single row. ``r1``, ``r5``: image-to-text recall at 1 and 5; ``t1``, ``t5``: text-to-image
        recall. A vector that is as similar as the paired one is ranked before it. All are NaN if N is 0 or a vector is not finite.
    """
    image, text = F.normalize(image_ND.float(), dim=-1), F.normalize(text_ND.float(), dim=-1)
    s_NN = image @ text.T
    own = s_NN.diagonal()
    if image.shape[0] == 0 or not bool(image.isfinite().all() & text.isfinite().all()):
        return undefined(SPACE)
    out = {"alignment": float((2 - 2 * own).mean())}
    for name, x in (("image", image), ("text", text)):
        distance = (2 - 2 * (x @ x.T)).clamp_min(0)
        off = ~torch.eye(x.shape[0], dtype=torch.bool, device=x.device)
        out[f"uniformity_{name}"] = float((-2 * distance[off]).exp().mean().log()) if x.shape[0] > 1 else 0.0
    for letter, ahead in (("r", s_NN >= own[:, None]), ("t", s_NN >= own[None, :])):
        rank = ahead.sum(1 if letter == "r" else 0)
        out |= {f"{letter}{k}": float((rank <= k).float().mean()) for k in (1, 5)}
    return out
