"""Checks of a checkpoint's content before it is used: hashes show that a file is complete, but not that a run wrote it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from torch import nn

from comtip_fast.training.checkpoint.content import DELETE, MISFIT, CheckpointError
from comtip_fast.training.checkpoint.reading import STEP, TensorReader
from comtip_fast.training.protocol import AVERAGE, MOMENTS, WEIGHT

Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Hex = Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$", max_length=1 << 20)]


@with_config(ConfigDict(strict=True, extra="ignore", allow_inf_nan=False))
@dataclass(frozen=True)
class _Extension:
    """An entry of ``RunState.extensions``."""

    step: Count
    epoch: Count
    sets: Annotated[list[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]], Field(min_length=1, max_length=10_000)]


@with_config(ConfigDict(strict=True, extra="ignore", allow_inf_nan=False))
@dataclass(frozen=True)
class _State:
    """Content of ``state.json`` as :class:`CheckpointSaver` writes it; further keys are ignored."""

    step: Count
    epoch: Count
    position: Count
    best_step: Count
    best_score: float | None
    bad_validations: Count
    skips: Count
    stopped: Literal["", "steps", "patience"]
    torch_rng: Hex
    config: dict[str, Any]
    fingerprint: dict[str, str]
    validated: Count = 0
    spikes: Count = 0
    norms: Annotated[list[Annotated[float, Field(ge=0)]], Field(max_length=4096)] = field(default_factory=list)
    extensions: Annotated[list[_Extension], Field(max_length=10_000)] = field(default_factory=list)
    world_size: Annotated[int, Field(ge=1, lt=1 << 31)] = 1
    cuda_rng: Hex = "00"
    device: str = ""
    torch: str = ""


_STATE = TypeAdapter(_State)


def check_state(state: dict[str, Any], folder: Path, step: int) -> None:
    """Check the state of a checkpoint.

    Parameters
    ----------
    state
        Content of its ``state.json``.
    folder
        Its folder, for messages.
    step
        The step in the folder's name.

    Raises
    ------
    CheckpointError
        A key is missing or has a value that no run writes, the state belongs to another step, or the random state is not one of the
        installed PyTorch.
    """
    where = folder / "state.json"
    try:
        found = _STATE.validate_json(json.dumps(state))
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}; {DELETE}") from error
    if found.step != step or max(found.best_step, found.validated, *(e.step for e in found.extensions)) > step:
        raise CheckpointError(
            f"{where}: step {found.step}, best_step {found.best_step}, validated {found.validated} and the steps of extensions do "
            f"not fit the folder of step {step}; {DELETE}"
        )
    if len(found.torch_rng) != 2 * torch.get_rng_state().numel():
        raise CheckpointError(f"{where}: torch_rng is not a random state of this PyTorch; {DELETE}")


@torch.no_grad()
def load_weights(module: nn.Module, reader: TensorReader) -> None:
    """Load the weights and buffers of a checkpoint into a module, one tensor at a time.

    Optimizer state and averages are compared with the module's parameters by name and shape, and read later.

    Raises
    ------
    CheckpointError
        A tensor is missing, unknown, of another shape, or not finite, or the optimizer state of a parameter is incomplete.
    """
    check_optimizer_state(module, reader)
    # Tensors of one value in the stated shapes: PyTorch checks the names, and the module adds what earlier versions lack.
    stated = {name: reader.content.tensors[name, WEIGHT] for name in reader.content.names(WEIGHT)}
    try:
        module.load_state_dict({name: torch.zeros((), dtype=s.dtype).expand(s.shape) for name, s in stated.items()})
    except RuntimeError as error:  # missing, unknown, another shape
        text = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{reader.folder}: the weights do not fit the model of the config ({text}); {MISFIT}"
        ) from error
    targets = module.state_dict()
    for name, value in reader.all_of(WEIGHT):
        targets[name].copy_(value.reshape(targets[name].shape))


def check_optimizer_state(module: nn.Module, reader: TensorReader) -> None:
    """Compare optimizer state and averages of a checkpoint with the parameters of a module; raise :class:`CheckpointError`."""
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    keys: dict[str, set[str]] = {name: {STEP} for name in reader.content.steps}
    for (name, key), stored in reader.content.tensors.items():
        equal = name in shapes and stored.shape == shapes[name]
        # Earlier versions had scalars of another shape, whose moments an engine reads as one value.
        fits = equal or (name in shapes and stored.numel == math.prod(shapes[name]) == 1)
        if key == AVERAGE and not equal:
            raise CheckpointError(
                f"{reader.folder}: the moving average {name!r} does not fit a parameter of the model, by name or shape; {DELETE}"
            )
        if key in MOMENTS:
            keys.setdefault(name, set()).add(key)
            if not fits:
                raise CheckpointError(
                    f"{reader.folder}: optimizer state {f'{name}/{key}'!r} does not fit a parameter of the model, by name or "
                    f"shape; {DELETE}"
                )
    for name, found in keys.items():
        if name not in shapes:
            raise CheckpointError(
                f"{reader.folder}: optimizer state {f'{name}/{STEP}'!r} does not fit a parameter of the model, by name or shape; "
                f"{DELETE}"
            )
        if found != {STEP, *MOMENTS}:
            raise CheckpointError(f"{reader.folder}: the optimizer state of {name} is incomplete; {DELETE}")
