"""A method as a training task: the trainer of pretraining gives it checkpoints, early stopping and logs."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from comtip_shards.slides.tiles import StainStats, normalise_stain
from safetensors.torch import save_file
from torch import Tensor, nn

from comtip_fast.config.schema import RunConfig
from comtip_fast.data.batch import Batch
from comtip_fast.data.tile_sources import TileSource
from comtip_fast.evaluation.trained.data import TrainingData, ValidationSection
from comtip_fast.metrics import mean_pcc
from comtip_fast.runtime.devices import autocast
from comtip_fast.training.protocol import Extension, ValidationResult

Share = list[tuple[str, dict[str, float]]]
"""Per validation section: its cohort and its scores by setting."""


class TargetBatch(NamedTuple):
    """A batch of spots with targets."""

    features: Tensor
    """Input of the image encoder."""
    z_BG: Tensor
    """Targets, see :class:`comtip_fast.evaluation.trained.targets.Targets`."""
    known_BG: Tensor
    """bool, whether the spot's section measured the gene."""


class ExpressionTask(ABC):
    """Trains a module to predict expression from tiles; implements :class:`comtip_fast.training.protocol.TrainingTask`.

    Parameters
    ----------
    data
        Training and validation spots.
    config
        Config of this training.
    module
        The module; its attribute ``vision`` is the image encoder.
    """

    def __init__(self, data: TrainingData, config: RunConfig, module: nn.Module) -> None:
        self.data, self.config = data, config
        self._module = module.to(data.device)

    @property
    def module(self) -> nn.Module:
        """The module with all parameters."""
        return self._module

    # -- what a method defines ----------------------------------------------------------------------------

    @abstractmethod
    def loss(self, module: Any, batch: TargetBatch) -> Tensor:
        """Return the loss of a batch."""

    @abstractmethod
    def predicted(self, features: Iterable[Tensor], cohort: str) -> dict[str, np.ndarray]:
        """Return predicted targets (N, G) by setting; ``features`` yields the encoder's inputs of N tiles in chunks.

        If there are several settings, validation chooses one with :meth:`choose`, and later calls return only this one.
        """

    def learnt(self, cohort: str) -> np.ndarray:
        """Return which target genes the method can predict in a cohort, bool (G,): those that a training section measured."""
        return self.data.targets.learnt_G

    def choose(self, setting: str) -> None:  # noqa: B027 - most methods have one setting
        """Use one of the settings of :meth:`predicted` from now on; does nothing for a method with one setting."""

    # -- interface to the trainer -------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, str]:
        """Return hashes of the shard set, of the model, and of the training sections and target genes."""
        targets = hashlib.sha256("\n".join([*self.data.section_ids, "", *self.data.targets.keys]).encode())
        inputs = {"shards": self.data.shards.manifest.digest, "model": self.data.predictor.fingerprint}
        return inputs | {"targets": targets.hexdigest()}

    def note_extensions(self, extensions: Sequence[Extension]) -> None:  # noqa: B027 - the data is that of a finished run
        """Do nothing."""

    def prepare(self) -> None:
        """Compute the features of a frozen stem, if the loader keeps them in memory."""
        self.data.loader.prepare()

    def close(self) -> None:
        """Stop the loader's workers."""
        self.data.loader.close()

    def metrics(self) -> dict[str, float]:
        """Return the loader's statistics."""
        return self.data.loader.metrics()

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return the epoch's batches as spot indices, a pure function of (seed, epoch)."""
        return self.data.loader.batches(epoch)

    def batch(self, spot_index: np.ndarray, step: int, epoch: int) -> TargetBatch:
        """Load the batch of the spots ``spot_index`` and its targets, on the device."""
        batch: Batch = self.data.loader.batch(spot_index, step, epoch).to(self.data.device)
        features = batch.features
        if features is None:
            assert batch.tiles is not None
            features = self.data.predictor.model.vision.stem_features(batch.tiles)
        return TargetBatch(features, *self.data.batch_targets(batch.spot_index))

    def losses(self, module: nn.Module, batch: TargetBatch) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return ``{"loss": total}``, and no further numbers to log."""
        return {"loss": self.loss(module, batch)}, {}

    def after_step(self, module: nn.Module, step: int, good: Tensor | None = None) -> None:  # noqa: B027 - nothing to do
        """Do nothing."""

    def is_validated(self, name: str) -> bool:
        """Return True: a validation reads all parameters."""
        return True

    @torch.no_grad()
    def validation_share(self, progress: Callable[[str], None]) -> Share:
        """Return the cohort and the mean PCC by setting of each validation section; NaN if a prediction is not finite."""
        out: Share = []
        for section in self.data.validation:
            progress(f"section {section.section_id}")
            scores = {k: self._score(section, z) for k, z in self.predict_section(section).items()}
            out.append((section.cohort, scores))
        return out

    def validation_result(self, shares: list[Share]) -> ValidationResult:
        """Return the score of the best setting, its scores by cohort and, if there are several settings, the score of each setting.

        Scores are means over cohorts of the means over their sections. Without sections, the score is NaN and the others are empty.
        """
        means = self._means([one for share in shares for one in share])
        if not means:
            return float("nan"), {}, {}
        scores = {k: float(np.mean(list(cohorts.values()))) for k, cohorts in means.items()}
        best = max(scores, key=lambda k: scores[k])
        return scores[best], means[best], {k: v for k, v in scores.items() if len(scores) > 1}

    def export(self, folder: Path) -> None:
        """Write the weights to ``model.safetensors`` in ``folder``."""
        folder.mkdir(exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.module.state_dict().items()}, folder / "model.safetensors")

    # -- prediction -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict_section(self, section: ValidationSection) -> dict[str, np.ndarray]:
        """Return predicted targets (n, H) of the scored genes of a validation section, by setting."""
        found = self.predicted(self.data.inputs(section), section.cohort)
        return {k: z[:, section.columns] for k, z in found.items()}

    @torch.no_grad()
    def predict_tiles(self, tiles: TileSource, stain: StainStats | None, cohort: str) -> dict[str, np.ndarray]:
        """Return the predicted targets (N, G) of N tiles by setting; the tiles are read in chunks."""
        out: dict[str, np.ndarray] = {}
        order: list[np.ndarray] = []

        def features() -> Iterator[Tensor]:
            for rows, chunk in tiles.ahead():
                order.append(rows)
                yield self._features(chunk, stain)

        for name, z in self.predicted(features(), cohort).items():
            out[name] = np.empty_like(z)
            out[name][np.concatenate(order)] = z
        return out

    def choose_by_validation(self) -> str:
        """Choose the setting with the best validation score under the current weights, and return its name.

        Without validation sections, nothing is chosen and the name is empty.
        """
        share = self.validation_share(lambda what: None)
        means = self._means(share)
        if not means:
            return ""
        best = max(means, key=lambda k: float(np.mean(list(means[k].values()))))
        self.choose(best)
        return best

    def autocast(self) -> Any:
        """Return the autocast context of the run's precision."""
        return autocast(self.config.train.precision, self.data.device)

    def _features(self, tiles_NSS3: np.ndarray, stain: StainStats | None) -> Tensor:
        if self.data.predictor.normalises_stain and stain is not None:
            tiles_NSS3 = normalise_stain(tiles_NSS3, stain)
        x = torch.from_numpy(np.ascontiguousarray(tiles_NSS3.transpose(0, 3, 1, 2))).to(self.data.device)
        return self.data.predictor.model.vision.stem_features(x)

    def _score(self, section: ValidationSection, z_nH: np.ndarray) -> float:
        return mean_pcc(section.measured_nH, z_nH) if np.isfinite(z_nH).all() else float("nan")

    @staticmethod
    def _means(sections: Share) -> dict[str, dict[str, float]]:
        """Return the mean score by setting and cohort."""
        found: dict[str, dict[str, list[float]]] = {}
        for cohort, scores in sections:
            for name, value in scores.items():
                found.setdefault(name, {}).setdefault(cohort, []).append(value)
        return {k: {c: float(np.mean(v)) for c, v in cohorts.items()} for k, cohorts in found.items()}
