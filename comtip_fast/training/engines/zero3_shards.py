"""A rank's part of parameters and optimizer state under ZeRO 3, read and written without gathering large parameters.

ZeRO 3 divides the n elements of a flattened parameter over W ranks: rank r owns up to ceil(n/W) elements, the first at index
r ceil(n/W), and the shards of the last ranks are padded to ceil(n/W) elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from comtip_fast.collectives import Group
from comtip_fast.training.distributed import deepspeed_internals as internals
from comtip_fast.training.engines.base import ParameterPart
from comtip_fast.training.protocol import MOMENTS, WEIGHT, PartSource
from comtip_fast.training.update.ema import OwnWeights


class Zero3Shards:
    """Implementation of :class:`.base.Shards` on DeepSpeed's functions for local partitions.

    Parameters
    ----------
    module
        The partitioned module.
    utils
        ``deepspeed.utils``.
    group
        Ranks of the run.
    steps
        Returns the number of optimizer steps of each trained parameter, by name.
    """

    def __init__(
        self,
        module: nn.Module,
        utils: Any,
        group: Group,
        steps: Callable[[], dict[str, float]],
    ) -> None:
        self._module, self._utils, self._group, self._steps = module, utils, group, steps

    def parts(self) -> Iterator[ParameterPart]:
        """Yield this rank's part of every parameter; see :meth:`.base.Shards.parts`."""
        steps = self._steps()
        for name, parameter in self._named():
            start, length = self._range(parameter)
            tensors = {
                key: value.detach().flatten()[:length]
                for key, value in self._own(parameter).items()
                if value is not None
            }
            yield ParameterPart(name, tuple(parameter.ds_shape), start, tensors, steps.get(name))

    def restore_weights(self, source: PartSource) -> None:
        """See :meth:`.base.Shards.restore_weights`."""
        for name, parameter in self._named():
            if parameter.requires_grad:
                if parameter.ds_status.name == "AVAILABLE":  # gathered: the copy would hide the new weights
                    parameter.partition()
                self._read(source, name, parameter, WEIGHT)

    def restore_moments(self, source: PartSource) -> None:
        """Replace this rank's part of the moments; those that ``source`` lacks are not changed."""
        for name, parameter in self._named():
            if parameter.requires_grad:
                for key in MOMENTS:
                    self._read(source, name, parameter, key)

    def own_weights(self) -> Iterator[OwnWeights]:
        """See :meth:`.base.Engine.own_weights`; DeepSpeed keeps the shard of a parameter as one tensor, whatever its memory."""
        for name, parameter in self._named():
            loaded = partial(internals.loaded_shard, parameter) if internals.is_in_file(parameter) else None
            shard = parameter.ds_tensor
            yield OwnWeights(name, parameter.requires_grad, shard, *self._range(parameter), loaded)

    def whole_average(self, parameter: Any, own: Tensor) -> Tensor:
        """Return the average of a parameter in its shape, from the padded shards of all ranks; a collective call."""
        counts = [own.numel()] * self._group.size
        padded = self._group.gather_rows(own, counts) if self._group.size > 1 else own.clone()
        return padded[: parameter.ds_numel].view(parameter.ds_shape)

    @contextmanager
    def elementwise(self) -> Iterator[None]:
        """As :meth:`.base.Engine.elementwise`; inside the context, the ``data`` of each parameter is only this rank's shard of it.

        Exceptions are small parameters, which ZeRO 3 keeps gathered between steps: they are whole on every rank. No other parameter
        is gathered.
        """
        before = [(p, p.data) for _, p in self._named()]
        for parameter, _ in before:
            if not parameter.ds_persist:
                parameter.data = parameter.ds_tensor.data
            elif parameter.ds_status.name != "AVAILABLE":
                parameter.all_gather()
        try:
            yield
        finally:
            for parameter, data in before:
                start, length = self._range(parameter)
                if not parameter.ds_persist:
                    parameter.data = data
                    if parameter.ds_status.name == "AVAILABLE":  # a copy of the earlier values
                        parameter.partition()
                elif not parameter.requires_grad and length:
                    parameter.ds_tensor[:length].copy_(parameter.data.view(-1)[start : start + length])

    def _named(self) -> Iterator[tuple[str, Any]]:
        """Return names and parameters, to which DeepSpeed has added attributes."""
        yield from self._module.named_parameters()

    def _range(self, parameter: Any) -> tuple[int, int]:
        """Return the first own element of a flattened parameter and the number of own elements."""
        size = int(parameter.ds_tensor.ds_numel)
        start = min(self._group.rank * size, int(parameter.ds_numel))
        return start, min(size, int(parameter.ds_numel) - start)

    def _own(self, parameter: Any) -> dict[str, Tensor | None]:
        """Return the padded shards of the weights and moments of a parameter; only the weights if the parameter is frozen."""
        if not parameter.requires_grad:
            return {WEIGHT: parameter.ds_tensor}
        moments = {key: self._utils.safe_get_local_optimizer_state(parameter, key) for key in MOMENTS}
        return {WEIGHT: self._utils.safe_get_local_fp32_param(parameter), **moments}

    @torch.no_grad()
    def _read(self, source: PartSource, name: str, parameter: Any, key: str) -> None:
        """Read the shard of the weights or of a moment, which has no padding; do nothing if ``source`` has none."""
        start, length = self._range(parameter)
        value = source.read(name, key, start, start + length)
        if value is None:
            return
        missing = int(parameter.ds_tensor.ds_numel) - length
        padded = nn.functional.pad(value, (0, missing)) if missing else value
        if key == WEIGHT:
            # The optimizer's copy and the copy that forward passes gather; without offloading they are one tensor.
            self._utils.safe_set_local_fp32_param(parameter, padded)
            parameter.ds_tensor.copy_(padded)
        else:
            self._utils.safe_set_local_optimizer_state(parameter, padded, key)
