"""All uses of private names of DeepSpeed.

``tests/comtip_fast/test_library_internals.py`` lists the names and fails if the installed version lacks one;
``pyproject.toml`` bounds the version of DeepSpeed to the tested one. Private names of PyTorch are used in
:mod:`comtip_fast.runtime.torch_internals`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def disable_shm_comm(deepspeed: ModuleType) -> None:
    """Mark the shared-memory all-reduce as unavailable, so that DeepSpeed does not compile it."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def comm_backend(deepspeed: ModuleType) -> Any:
    """Return the backend that runs all collectives of DeepSpeed."""
    return deepspeed.comm.comm.cdb


def gradient_norm(zero_optimizer: Any, like: Tensor) -> Tensor:
    """Return the global gradient norm of the last step of a ZeRO optimizer, before clipping, on the device of ``like``.

    DeepSpeed stores a number or a tensor. A number is not copied to the device, but passed to a kernel that fills the result.
    """
    norm = zero_optimizer._global_grad_norm
    return norm.detach() if isinstance(norm, Tensor) else like.new_full((), float(norm), dtype=torch.float32)


class NormLimit:
    """Makes a ZeRO optimizer skip updates whose gradient norm exceeds a limit, as it skips updates whose norm is not finite.

    ZeRO computes the norm inside its step, so the limit has to be applied there.

    Parameters
    ----------
    zero_optimizer
        ZeRO optimizer of stage 1, 2 or 3; its method that returns the norm is replaced.
    stage
        Its stage.
    """

    def __init__(self, zero_optimizer: Any, stage: int) -> None:
        self._limit: Tensor | None = None
        self._norm: Tensor | None = None
        if stage < 3:
            norm = zero_optimizer.scaled_global_norm
            zero_optimizer.scaled_global_norm = lambda *args, **kwargs: self._limited([norm(*args, **kwargs)])[0]
        else:
            norms = zero_optimizer._get_norm_groups
            zero_optimizer._get_norm_groups = lambda: self._limited(norms())

    def set(self, limit: Tensor) -> None:
        """Set the limit on the norm of the next step, a scalar on the device."""
        self._limit, self._norm = limit, None

    def norm(self, otherwise: Tensor) -> Tensor:
        """Return the norm of the last step, or ``otherwise`` if ZeRO found the step not finite and computed no norm."""
        return otherwise if self._norm is None else self._norm.to(otherwise)

    def _limited(self, norms: list[Any]) -> list[Any]:
        """Return the norms, or infinity for all of them if the total norm exceeds the limit; keep the total norm."""
        assert self._limit is not None
        known = torch.stack([torch.as_tensor(n, dtype=torch.float32, device=self._limit.device) for n in norms])
        # DeepSpeed reports a norm that is not finite as -1.
        total = torch.linalg.vector_norm(known.masked_fill(known < 0, torch.inf))
        self._norm = total
        return list(known.masked_fill(total > self._limit, torch.inf).unbind())


def shards_of(zero_optimizer: Any, stage: int) -> list[tuple[int, Tensor]]:
    """Return (index of the parameter group, flat buffer) for every buffer that a ZeRO optimizer of stage 1, 2 or 3 updates."""
    if stage < 3:
        return list(enumerate(zero_optimizer.single_partition_of_fp32_groups))
    shards = zero_optimizer.fp32_partitioned_groups_flat
    return [(zero_optimizer.sub_group_to_group_id[i], shard) for i, shard in enumerate(shards)]


def own_moments(parameter: Any, names: Sequence[str]) -> tuple[int, dict[str, Tensor]]:
    """Return this rank's part of the moments of a parameter under ZeRO 1 or 2.

    Parameters
    ----------
    parameter
        A trained parameter.
    names
        Names of the moments.

    Returns
    -------
    tuple
        Index of the first own element in the flattened parameter, and views of the own elements, 1-D, by name; empty if this rank
        owns none.
    """
    mapping = parameter._hp_mapping
    if mapping is None:
        return 0, {}
    own = {name: mapping.get_optim_state_fragment(name) for name in names}
    return int(mapping.lp_fragment_address.start), own


def create_moments(
    zero_optimizer: Any, stage: int, state: dict[Any, dict[str, Tensor]], names: Sequence[str], *, fused: bool = False
) -> None:
    """Create the optimizer state of every shard before the first step, filled with zeros.

    DeepSpeed links the state of a shard to its parameters only if the state exists before the first step.

    Parameters
    ----------
    zero_optimizer
        ZeRO optimizer of stage 1, 2 or 3.
    stage
        Its stage.
    state
        ``state`` of the wrapped optimizer, by shard; ``step`` and the moments of every shard are added.
    names
        Names of the moments.
    fused
        Whether the wrapped optimizer is fused.
    """
    partitioned = stage == 3
    for i, (_, shard) in enumerate(shards_of(zero_optimizer, stage)):
        # With NVMe offload a shard is a file and must be swapped in to be changed.
        swapped = partitioned and zero_optimizer._swappable_optimizer_subgroup(i)
        if swapped:
            zero_optimizer._optimizer_states_and_gradient_swap_in(i)
        moments = {name: torch.zeros_like(shard, requires_grad=False) for name in names}
        # A fused optimizer counts steps on the device of the shard.
        state[shard].update(step=torch.zeros((), device=shard.device if fused else "cpu"), **moments)
        if swapped:
            zero_optimizer._optimizer_states_and_gradient_swap_out(i)
    if not partitioned:
        zero_optimizer._lazy_init_hp_params_optimizer_state()


def is_in_file(parameter: Any) -> bool:
    """Return whether ZeRO 3 keeps the shard of a parameter in a file between steps (NVMe); small ones stay in memory."""
    return parameter.ds_tensor.final_location is not None


@contextmanager
def loaded_shard(parameter: Any) -> Iterator[None]:
    """Read this rank's shard of a parameter, ``ds_tensor``, from its file for the block, unless it is in memory."""
    reads = parameter.ds_tensor.status.name == "NOT_AVAILABLE"
    if reads:
        parameter.nvme_swapper.swap_in([parameter], async_op=False)
    try:
        yield
    finally:
        if reads:
            parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])
