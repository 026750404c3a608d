"""What evaluation learns from the training sections: which genes vary, and the ridge baselines. Nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from comtip_shards import ShardSet
from comtip_shards.tiles import normalise_stain
from scipy import sparse

from comtip_fast.data.levels import log1p_cp10k
from comtip_fast.data.panel import rank_by_variance
from comtip_fast.evaluation.baselines import RidgeModel, fit_ridge
from comtip_fast.inference import Predictor


@dataclass
class _TrainData:
    """The training spots of one task."""

    section: np.ndarray
    cp10k: sparse.csr_matrix
    raw: sparse.csr_matrix
    inputs: dict[str, np.ndarray]
    measured: dict[int, np.ndarray]
    """Section number -> bool over the gene table."""


class TrainReference:
    """Training sections of a model, read once per task."""

    def __init__(self, predictor: Predictor, shards: ShardSet) -> None:
        self.predictor, self.shards = predictor, shards
        trained = {s["section_id"] for s in predictor.train_sections if s["split"] == "train"}
        self.numbers = [i for i, s in enumerate(shards.manifest.sections) if s.section_id in trained]
        if not self.numbers:
            raise ValueError(
                f"{shards.path} holds none of the sections that the model was trained on ({', '.join(sorted(trained))}); "
                "the baselines need them: give their shard set with --train-shards"
            )
        self._keys = [g.key for g in shards.genes]
        self._row = {k: i for i, k in enumerate(self._keys)}
        self._ranked: dict[str, list[str]] = {}
        self._data: dict[str, _TrainData | None] = {}
        self._fits: dict[tuple[str, str, str, tuple[str, ...]], list[tuple[np.ndarray, RidgeModel]] | None] = {}

    def variable_genes(
        self, task: str, known: set[str], n: int, *, fallback: tuple[ShardSet, int]
    ) -> tuple[list[str], str]:
        """Return the ``n`` most variable genes among ``known``, and where that was judged.

        Judged on the task's training sections; on the evaluated section only where training had none of its task.
        """
        ranked = self._ranking(task)
        if ranked:
            return [k for k in ranked if k in known][:n], "training sections"
        shards, number = fallback
        values = log1p_cp10k(shards.counts(shards.select(sections=[number])))
        rows, _ = rank_by_variance([values], [shards.measured(number)], self.predictor.config.genes.min_detection)
        return [shards.genes[r].key for r in rows[:n]], "the evaluated section (training had none of this task)"

    def order(self, task: str) -> dict[str, int]:
        """Return each gene's rank of variability on the task's training sections."""
        return {k: i for i, k in enumerate(self._ranking(task))}

    def ridge(self, task: str, name: str, norm: str, keys: list[str], x_NF: np.ndarray) -> np.ndarray | None:
        """Predict genes by ridge trained on the task's training sections; None where there are none.

        A gene that no training section measured is predicted constant, so that its PCC is undefined and counted.
        """
        fits = self._fit(task, name, norm, keys)
        if fits is None:
            return None
        out = np.zeros((len(x_NF), len(keys)))
        for columns, model in fits:
            out[:, columns] = model.predict(np.asarray(x_NF, np.float64))
        return out

    def _fit(self, task: str, name: str, norm: str, keys: list[str]) -> list[tuple[np.ndarray, RidgeModel]] | None:
        question = (task, name, norm, tuple(keys))
        if question not in self._fits:
            data = self._load(task)
            self._fits[question] = None if data is None else self._fit_groups(data, name, norm, keys)
        return self._fits[question]

    def _fit_groups(
        self, data: _TrainData, name: str, norm: str, keys: list[str]
    ) -> list[tuple[np.ndarray, RidgeModel]]:
        """Fit one model per set of genes that the same training sections measured."""
        values = data.cp10k if norm == "cp10k" else data.raw
        pattern = np.array(
            [[k in self._row and bool(m[self._row[k]]) for m in data.measured.values()] for k in keys], bool
        )
        numbers = np.array(list(data.measured))
        out = []
        for sections in np.unique(pattern, axis=0):
            columns = np.flatnonzero((pattern == sections).all(1))
            spots = np.isin(data.section, numbers[sections])
            if spots.sum() >= 10:
                y = values[spots][:, [self._row[keys[c]] for c in columns]].toarray()
                out.append((columns, fit_ridge(data.inputs[name][spots], y, data.section[spots])))
        return out

    def _task_sections(self, task: str) -> list[int]:
        return [n for n in self.numbers if self.shards.task_of_section(n) == task]

    def _ranking(self, task: str) -> list[str]:
        if task not in self._ranked:
            own = self._task_sections(task)
            values = [log1p_cp10k(self.shards.counts(self.shards.select(sections=[n]))) for n in own]
            detection = self.predictor.config.genes.min_detection
            measured = [self.shards.measured(n) for n in own]
            rows = rank_by_variance(values, measured, detection)[0].tolist() if own else []
            self._ranked[task] = [self._keys[r] for r in rows]
        return self._ranked[task]

    def _load(self, task: str) -> _TrainData | None:
        if task not in self._data:
            own = self._task_sections(task)
            self._data[task] = self._read(own) if own else None
        return self._data[task]

    def _read(self, numbers: list[int]) -> _TrainData:
        spots = self.shards.select(sections=numbers)
        section = self.shards.spots.loc[spots, "section"].to_numpy()
        counts = self.shards.counts(spots)
        raw = counts.astype(np.float64)
        raw.data = np.log1p(raw.data)
        colour, features = [], []
        for n in numbers:
            tiles, stain = self.shards.tiles(spots[section == n]), self.shards.stain(n)
            features.append(self.predictor.image_features(tiles.transpose(0, 3, 1, 2), stain).pooled_Nd)
            seen = normalise_stain(tiles, stain) if self.predictor.config.data.stain == "section" else tiles
            colour.append(seen.reshape(len(tiles), -1, 3).mean(1))
        inputs = {"ridge_colour": np.concatenate(colour), "ridge_features": np.concatenate(features)}
        return _TrainData(section, log1p_cp10k(counts), raw, inputs, {n: self.shards.measured(n) for n in numbers})
