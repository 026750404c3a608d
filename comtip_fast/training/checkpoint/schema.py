"""Checks of a checkpoint's content before it is used: hashes show that a file is complete, but not that a run wrote it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from torch import nn

from comtip_fast.training.checkpoint.content import DELETE, MISFIT, Checkpoint, CheckpointError

Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Hex = Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$", max_length=1 << 20)]


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
    if found.step != step or max(found.best_step, found.validated) > step:
        raise CheckpointError(
            f"{where}: step {found.step}, best_step {found.best_step} and validated {found.validated} do not fit the "
            f"folder of step {step}; {DELETE}"
        )
    if len(found.torch_rng) != 2 * torch.get_rng_state().numel():
        raise CheckpointError(f"{where}: torch_rng is not a random state of this PyTorch; {DELETE}")


def load_weights(module: nn.Module, checkpoint: Checkpoint, where: Path) -> None:
    """Load the weights of a checkpoint into a module; check its optimizer state and averages against the module's parameters.

    ``where`` is the folder of the checkpoint, for messages.

    Raises
    ------
    CheckpointError
        A tensor is missing, unknown, of another shape, or not finite, or the optimizer state of a parameter is incomplete.
    """
    try:
        module.load_state_dict(checkpoint.model)
    except RuntimeError as error:  # missing, unknown, another shape
        text = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{where}: the weights do not fit the model of the config ({text}); {MISFIT}") from error
    for name, tensor in (*checkpoint.model.items(), *checkpoint.optim.items(), *checkpoint.ema.items()):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{where}: {name} holds values that are not finite; {DELETE}")
    parameters = dict(module.named_parameters())
    for name, tensor in checkpoint.ema.items():
        if name not in parameters or tensor.shape != parameters[name].shape:
            raise CheckpointError(
                f"{where}: the moving average {name!r} does not fit a parameter of the model, by name or shape; {DELETE}"
            )
    keys: dict[str, set[str]] = {}
    for full, tensor in checkpoint.optim.items():
        name, _, key = full.rpartition("/")
        if name not in parameters or tuple(tensor.shape) not in ((), (1,), tuple(parameters[name].shape)):
            raise CheckpointError(
                f"{where}: optimizer state {full!r} does not fit a parameter of the model, by name or shape; {DELETE}"
            )
        keys.setdefault(name, set()).add(key)
    for name, found in keys.items():
        if found != set.union(*keys.values()):
            raise CheckpointError(f"{where}: the optimizer state of {name} is incomplete; {DELETE}")
