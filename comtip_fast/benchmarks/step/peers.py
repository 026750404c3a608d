"""Steps of other methods on the same tiles, with the task's image encoder, optimizer and precision, and the plain step's loader.

``open_clip`` trains its text tower (ViT-B-32's: 12 layers of width 512, 77 tokens) on captions that name the most expressed genes
of a spot. The BLEEP-like step has an MLP over the expression of the panel's genes instead of a text tower, and soft targets from the
similarities within images and within spots.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comtip_fast.benchmarks.step.contender import StepContender, Updater
from comtip_fast.benchmarks.step.pil_loader import PilLoader
from comtip_fast.data.batch import Batch
from comtip_fast.models.projection_head import ResidualProjection
from comtip_fast.objectives import soft_contrastive
from comtip_fast.runtime import devices
from comtip_fast.training.task import CoMTIPTask

CAPTION_GENES = 50
"""Genes that a caption names; open_clip truncates a caption to 77 tokens."""


def open_clip_is_installed() -> bool:
    """Return whether ``open_clip`` can be imported."""
    return importlib.util.find_spec("open_clip") is not None


class _Peer(StepContender):
    """A step with copies of the task's image encoder and projection, and its own encoder of the other modality."""

    def __init__(self, task: CoMTIPTask) -> None:
        super().__init__(task)
        self.module = nn.ModuleDict(
            {
                "vision": copy.deepcopy(task.model.vision),
                "project": copy.deepcopy(task.model.project_image),
                "other": self._other_side().to(task.device),
            }
        )
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)], device=task.device))
        self.module.register_parameter("log_scale", self.log_scale)
        self.update = Updater(self.module, task)
        self._loader = PilLoader(task, self.scheduled())

    @abstractmethod
    def _other_side(self) -> nn.Module:
        """Return the encoder of the other modality."""

    @abstractmethod
    def _vectors(self, batch: Batch, extra: Any) -> Tensor:
        """Return the vectors (B, D) of the other modality."""

    @abstractmethod
    def _loss(self, image: Tensor, other: Tensor) -> Tensor:
        """Return the contrastive loss."""

    def _prepare(self, batch: Batch) -> Any:
        """Return inputs of the other encoder that the batch lacks, by default None; this time counts as loading."""

    @property
    def prepared_ahead(self) -> int:
        """See :attr:`StepContender.prepared_ahead`."""
        return self._loader.prepared_ahead

    def load(self) -> tuple[Batch, Any]:
        """See :meth:`StepContender.load`."""
        with self.clock.part("loader"):
            batch = self._loader.batch()
            return batch, self._prepare(batch)

    def train(self, batch: tuple[Batch, Any]) -> Tensor:
        """See :meth:`StepContender.train`."""
        with devices.autocast(self.config.train.precision, self.device):
            image = self.clock.wrap(self._image, "vision full")(batch[0])
            other = self.clock.wrap(self._vectors, "table")(*batch)
            loss = self.clock.wrap(self._loss, "InfoNCE")(image, other)
        loss.backward()
        self.clock.end_backward()
        with self.clock.part("optimizer"):
            self.update.step()
        return loss.detach()

    def n_samples(self, batch: tuple[Batch, Any]) -> int:
        """See :meth:`StepContender.n_samples`."""
        return super().n_samples(batch[0])

    def close(self) -> None:
        """See :meth:`StepContender.close`."""
        self._loader.close()

    def _image(self, batch: Batch) -> Tensor:
        vision: Any = self.module["vision"]
        return self.module["project"](vision(vision.stem_features(batch.tiles)).pooled_Bd)


class OpenClip(_Peer):
    """open_clip's text tower, tokenizer and loss."""

    name = "open_clip"

    def _other_side(self) -> nn.Module:
        import open_clip
        from open_clip.transformer import TextTransformer

        self._tokenize = open_clip.SimpleTokenizer()
        self._clip_loss = open_clip.ClipLoss()
        self._symbols = [self.task.shards.genes[row].symbol for row in self.task.tables.genes.trained]
        return TextTransformer(output_dim=self.config.align.dim)

    def _prepare(self, batch: Batch) -> Tensor:
        order = batch.levels.masked_fill(~batch.measured, 0).argsort(1, descending=True)[:, :CAPTION_GENES]
        rows = batch.panel.long()[order].tolist()
        captions = [" ".join(self._symbols[row] for row in genes) for genes in rows]
        return self._tokenize(captions).to(self.device)

    def _vectors(self, batch: Batch, extra: Tensor) -> Tensor:
        return self.module["other"](extra)

    def _loss(self, image: Tensor, other: Tensor) -> Tensor:
        scale = self.log_scale.clamp(max=math.log(100)).exp()
        return self._clip_loss(F.normalize(image, dim=-1), F.normalize(other, dim=-1), scale)


class Bleep(_Peer):
    """A step like BLEEP's, with this image encoder."""

    name = "BLEEP-like"

    def _other_side(self) -> nn.Module:
        return ResidualProjection(self.task.tables.genes.trained.size, self.config.align.dim)

    def _vectors(self, batch: Batch, extra: Any) -> Tensor:
        expression = batch.levels.new_zeros(
            (len(batch.levels), self.task.tables.genes.trained.size), dtype=torch.float32
        )
        expression[:, batch.panel.long()] = batch.levels.float()
        return self.module["other"](expression)

    def _loss(self, image: Tensor, other: Tensor) -> Tensor:
        return soft_contrastive(image, other)
