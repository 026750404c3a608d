"""Limit on the gradient norm of a step, computed from the norms of earlier steps, to detect spikes (``optim.spike``).

Norms stay on the device: the limit is computed and applied there, and the host reads whether a step was a spike when a row is
logged. All ranks have the same norms, and therefore the same limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from comtip_fast.config.optim import SpikeConfig

WINDOW = 64
"""Number of steps over which the median of the norms is taken. A lasting change of the norm stops being a spike after half of
these steps."""
LEAST = 20
"""Number of norms that must be known before a step can be a spike."""


@dataclass(frozen=True)
class SpikeLimit:
    """Limit on the gradient norm of one step."""

    norm: Tensor
    """Largest norm that is not a spike, fp32 scalar on the device; infinite while fewer than :data:`LEAST` norms are known, or if
    their median is 0."""
    skip: bool
    """Whether the update of a spike is skipped; otherwise its gradients are clipped to the limit."""


class NormHistory:
    """The gradient norms of the last :data:`WINDOW` steps, on the device.

    Single spikes hardly change the median of the norms. The median includes the norms of spikes, so that steps stop being spikes
    after a lasting change. Norms that are not finite are left out.

    Parameters
    ----------
    config
        Policy and factor; with the policy ``none``, nothing is kept.
    device
        Device of the gradients.
    norms
        Norms of earlier steps, oldest first, as returned by :meth:`values`.
    """

    def __init__(self, config: SpikeConfig, device: torch.device, norms: Sequence[float] = ()) -> None:
        self.config = config
        known = list(norms)[-WINDOW:]
        padded = [math.nan] * (WINDOW - len(known)) + known
        self._norms = torch.tensor(padded, dtype=torch.float32, device=device)

    def limit(self) -> SpikeLimit | None:
        """Return the limit on the norm of the next step; None with the policy ``none``."""
        if self.config.policy == "none":
            return None
        ordered = self._norms.sort().values  # missing norms are NaN, which sorts last
        known = (~ordered.isnan()).sum()
        middle = ordered.index_select(0, ((known - 1) // 2).clamp_min(0).reshape(1)).reshape(())
        usable = (known >= LEAST) & (middle > 0)
        return SpikeLimit((self.config.factor * middle).masked_fill(~usable, math.inf), self.config.policy == "skip")

    def add(self, norm: Tensor) -> None:
        """Append the gradient norm of one step to the history, which then omits its oldest norm.

        Parameters
        ----------
        norm
            Norm of the gradients before they are clipped, a scalar tensor on the device. It is ignored if it is not finite.
        """
        if self.config.policy == "none":
            return
        norm = norm.to(self._norms.dtype)
        shifted = torch.cat([self._norms[1:], norm.reshape(1)])
        # Written into the same tensor: a CUDA graph of the step would read the norms at the address of its capture.
        torch.where(norm.isfinite(), shifted, self._norms, out=self._norms)

    def values(self) -> list[float]:
        """Return the norms, oldest first; waits for the device, except with the policy ``none``, which keeps none."""
        if self.config.policy == "none":
            return []
        return [norm for norm in self._norms.tolist() if not math.isnan(norm)]
