"""One step's forward and backward pass: whole, or in pieces that keep the negatives of the global batch.

In pieces (gradient caching): every piece is embedded without keeping anything; the losses over spots and sentences are
taken on all vectors at once, which gives each vector its gradient; then every piece is embedded again, now with its
activations, and takes its vectors' gradients back to the parameters, together with its own share of L_mfm. Activations
are held for one piece at a time, at the cost of one further forward pass.
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
    """What a task must offer beyond :class:`TrainingTask` to be worked through in pieces."""

    def pieces(self, batch: Any, n: int) -> list[Any]:
        """Cut this rank's share into at most ``n`` pieces."""
        ...

    def embed(self, module: nn.Module, piece: Any, table: bool) -> Tensors:
        """Return the piece's vectors, and with ``table``, which one piece has, what the whole batch shares."""
        ...

    def join(self, embedded: list[Tensors]) -> Tensors:
        """Put the pieces' vectors together."""
        ...

    def losses_of(self, batch: Any, tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the losses over joined tensors, as :meth:`TrainingTask.losses` does; no parameter is read."""
        ...

    def replay(
        self, module: nn.Module, batch: Any, piece: Any, gradients: Tensors, table: bool
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
        """Return a scalar whose gradient is the piece's, and the parts of the loss that the piece has by itself."""
        ...

    def cut(self, gradients: Tensors, pieces: list[Any]) -> list[Tensors]:
        """Undo :meth:`join`."""
        ...


def forward_backward(engine: Engine, task: TrainingTask, batch: Any, n: int) -> tuple[Tensors, dict[str, float]]:
    """Run one step up to its gradients; return detached losses of this rank's share, and numbers to log."""
    if n == 1 or not isinstance(task, PieceableTask):
        with engine.piece(last=True):
            losses, numbers = engine.call(task.losses, batch)
            engine.backward(losses["loss"])
        return {name: value.detach() for name, value in losses.items()}, numbers
    return _in_pieces(engine, task, batch, n)


def _in_pieces(engine: Engine, task: PieceableTask, batch: Any, n: int) -> tuple[Tensors, dict[str, float]]:
    pieces = task.pieces(batch, n)
    final = len(pieces) - 1
    whole = 0 if engine.table_first else final
    with torch.no_grad():
        embedded = [engine.call(task.embed, piece, i == whole) for i, piece in enumerate(pieces)]
    leaves = {name: t.detach().requires_grad_() for name, t in task.join(embedded).items()}
    losses, numbers = task.losses_of(batch, leaves)
    names = list(leaves)
    found = torch.autograd.grad(losses["loss"], [leaves[k] for k in names], allow_unused=True)
    gradients = {k: torch.zeros_like(leaves[k]) if g is None else g for k, g in zip(names, found, strict=True)}
    out = {name: value.detach() for name, value in losses.items()}
    per_piece: dict[str, list[float]] = {}
    for i, (piece, own) in enumerate(zip(pieces, task.cut(gradients, pieces), strict=True)):
        with engine.piece(last=i == final):
            scalar, parts, more = engine.call(task.replay, batch, piece, own, i == whole)
            engine.backward(scalar)
        for name, number in more.items():
            per_piece.setdefault(name, []).append(number)
        for name, value in parts.items():
            out[name] = out[name] + value.detach() if name in out else value.detach()
    return out, numbers | {name: _mean_of_finite(values) for name, values in per_piece.items()}


def _mean_of_finite(values: list[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan
