"""Forward and backward pass of a step, in one piece or with gradient caching.

Gradient caching (GradCache, Gao et al. 2021) keeps the negatives of the global batch, but only the activations of one piece in
memory, at the cost of one more forward pass:

1. Embed every piece without storing activations.
2. Compute the losses over spots and sentences on all vectors, and the gradient of each vector.
3. Embed every piece again with activations, and backpropagate its vectors' gradients together with its share of L_mfm.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from comtip_fast.training.engines.base import Engine
from comtip_fast.training.protocol import TrainingTask

Tensors = dict[str, Tensor]


@runtime_checkable
class PieceableTask(Protocol):
    """A task with the methods that gradient caching needs in addition to :class:`TrainingTask`."""

    def pieces(self, batch: Any, n: int) -> list[Any]:
        """Split this rank's share of a batch into at most ``n`` pieces; every rank gets the same number of pieces."""
        ...

    def embed(self, module: nn.Module, piece: Any, table: bool) -> Tensors:
        """Return the piece's vectors and, with ``table`` (set for one piece), the tensors shared by the batch."""
        ...

    def join(self, embedded: list[Tensors]) -> Tensors:
        """Concatenate the vectors of all pieces, and add the tensors shared by the batch."""
        ...

    def losses_of(self, batch: Any, tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the same values as :meth:`TrainingTask.losses`, computed from the output of :meth:`join` without the model's parameters."""
        ...

    def replay(
        self, module: nn.Module, batch: Any, piece: Any, gradients: Tensors, table: bool
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
        """Return (scalar whose backward pass gives the piece's gradients, loss parts of the piece, numbers to log)."""
        ...

    def cut(self, gradients: Tensors, pieces: list[Any]) -> list[Tensors]:
        """Return, for each piece, its part of the gradients of the joined tensors."""
        ...


def forward_backward(engine: Engine, task: TrainingTask, batch: Any, n: int) -> tuple[Tensors, dict[str, float]]:
    """Run the forward and backward pass of one step.

    Parameters
    ----------
    engine
        Runs the module and accumulates gradients.
    task
        Computes the losses.
    batch
        This rank's share of the global batch.
    n
        Largest number of pieces. Gradient caching is not used for 1, or if the task is not a :class:`PieceableTask`.

    Returns
    -------
    tuple
        Detached losses of this rank's share, and numbers to log.
    """
    if n == 1 or not isinstance(task, PieceableTask):
        with engine.piece(last=True):
            losses, numbers = engine.call(task.losses, batch)
            engine.backward(losses["loss"])
        return {name: value.detach() for name, value in losses.items()}, numbers
    return _in_pieces(engine, task, batch, n)


def _in_pieces(engine: Engine, task: PieceableTask, batch: Any, n: int) -> tuple[Tensors, dict[str, float]]:
    """Run a step with gradient caching in at most ``n`` pieces; see the module docstring."""
    pieces = task.pieces(batch, n)
    final = len(pieces) - 1
    table_piece = 0 if engine.table_first else final
    with torch.no_grad():
        embedded = [engine.call(task.embed, piece, i == table_piece) for i, piece in enumerate(pieces)]
    leaves = {name: t.detach().requires_grad_() for name, t in task.join(embedded).items()}
    with engine.autocast():  # the losses multiply in the same precision as in one piece
        losses, numbers = task.losses_of(batch, leaves)
    names = list(leaves)
    found = torch.autograd.grad(losses["loss"], [leaves[k] for k in names], allow_unused=True)
    gradients = {k: torch.zeros_like(leaves[k]) if g is None else g for k, g in zip(names, found, strict=True)}
    out = {name: value.detach() for name, value in losses.items()}
    per_piece: dict[str, list[float]] = {}
    for i, (piece, own) in enumerate(zip(pieces, task.cut(gradients, pieces), strict=True)):
        with engine.piece(last=i == final):
            scalar, parts, more = engine.call(task.replay, batch, piece, own, i == table_piece)
            # If the image side is frozen, only the piece with the table has gradients.
            if scalar.requires_grad or i == final:
                engine.backward(scalar)
        for name, number in more.items():
            per_piece.setdefault(name, []).append(number)
        for name, value in parts.items():
            out[name] = out[name] + value.detach() if name in out else value.detach()
    return out, numbers | {name: _mean_of_finite(values) for name, values in per_piece.items()}


def _mean_of_finite(values: list[float]) -> float:
    """Return the mean of the finite values; NaN if there are none."""
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan
