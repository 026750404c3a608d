"""Keyed uniform numbers on any device; bit-identical to :func:`comtip_shards.sampling.rng.uniform`.

Indices and numbers stay on the device, so a draw needs neither synchronization nor a transfer. Only the 64-bit key is
computed on the host; it is passed to the kernels as a scalar.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

import torch
from comtip_shards.sampling.rng import key
from torch import Tensor

# SplitMix64 as in comtip_shards.sampling.rng, as signed 64-bit integers: products and sums wrap in two's complement.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def uniform(seed: SupportsIndex, purpose: str, *counters: SupportsIndex | str, index: Tensor) -> Tensor:
    """Return a uniform number in [0, 1) for each index: float64, with the shape and device of ``index``.

    Parameters
    ----------
    seed, purpose, counters
        The key, as in :func:`comtip_shards.sampling.rng.key`.
    index
        Integers of any shape.

    Raises
    ------
    TypeError
        The dtype of ``index`` is not an integer type.
    """
    return _mixed(_scaled(index) + _offset(key(seed, purpose, *counters)))


def uniforms_of(*draws: tuple[Sequence[int], Tensor]) -> list[Tensor]:
    """Return several draws, computed together in as many operations as one draw needs.

    Parameters
    ----------
    draws
        The n keys of each draw (:func:`comtip_shards.sampling.rng.key`) and its index, integers of any shape, all on one device.

    Returns
    -------
    list
        For each draw, a view, float64 (n, *index.shape): row i equals :func:`uniform` with the i-th key.

    Raises
    ------
    TypeError
        The dtype of an index is not an integer type.
    """
    states = []
    for keys, index in draws:
        scaled = _scaled(index).flatten()
        states += [scaled + _offset(key) for key in keys]
    parts = _mixed(torch.cat(states)).split([len(keys) * index.numel() for keys, index in draws])
    return [part.view(len(keys), *index.shape) for part, (keys, index) in zip(parts, draws, strict=True)]


def _scaled(index: Tensor) -> Tensor:
    """Return the indices times SplitMix64's increment; raise TypeError unless they are integers."""
    if index.dtype.is_floating_point or index.dtype.is_complex or index.dtype == torch.bool:
        raise TypeError(f"index must be integers, not {index.dtype}; pass an integer tensor")
    return index.long() * _GOLDEN


def _offset(value: int) -> int:
    """Return the key plus SplitMix64's increment, as a signed integer: the state at index 0."""
    return _signed((value + _GOLDEN) % 2**64)


def _mixed(z: Tensor) -> Tensor:
    """Return the uniform numbers in [0, 1) of SplitMix64 for the states ``z``, float64; ``z`` is overwritten."""
    z.bitwise_xor_(_shift(z, 30)).mul_(_MIX_1)
    z.bitwise_xor_(_shift(z, 27)).mul_(_MIX_2)
    z.bitwise_xor_(_shift(z, 31))
    return _shift(z, 11).double().mul_(2.0**-53)


def _shift(z: Tensor, n: int) -> Tensor:
    """Return ``z`` shifted right by ``n`` bits without sign extension."""
    return (z >> n).bitwise_and_((1 << (64 - n)) - 1)


def _signed(value: int) -> int:
    """Return an unsigned 64-bit value as a signed one."""
    return value - 2**64 if value >= 2**63 else value
