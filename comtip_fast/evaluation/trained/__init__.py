"""Supervised methods that ``comtip evaluate`` trains on the model's training sections, to compare with the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

METHODS = {
    "finetune": "fine-tuned prediction: the pretrained image encoder with a regression head, trained further",
    "supervised": "supervised regressor: the image encoder from its initial weights with a regression head",
    "bleep": "BLEEP-like model: contrastive, predicts the mean expression of the nearest training spots",
}
"""Methods by name; each is a task of ``comtip evaluate --tasks`` and a predictor of ``metrics.json``."""
LABELS = {"finetune": "comtip fine-tuned", "supervised": "supervised regressor", "bleep": "BLEEP-like"}
"""Names of the methods in tables of results."""
EPOCHS = 40


@dataclass(frozen=True)
class TrainOptions:
    """Methods to train, and their budget, checkpoints and seed."""

    methods: tuple[str, ...] = ()
    """Names in :data:`METHODS`."""
    epochs: int = EPOCHS
    """Largest number of passes over the training spots, per learning rate."""
    folder: Path | None = None
    """Folder of the checkpoints, from which an interrupted training resumes; None trains in a temporary folder."""
    seed: int = 0

    def check(self) -> None:
        """Check the options.

        Raises
        ------
        ValueError
            A method is unknown, or the number of epochs is below 1.
        """
        unknown = [m for m in self.methods if m not in METHODS]
        if unknown:
            raise ValueError(f"trained {', '.join(unknown)}: no such method; choose from {', '.join(METHODS)}")
        if self.epochs < 1:
            raise ValueError(f"`epochs` {self.epochs}: must be at least 1")
