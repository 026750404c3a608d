"""Stateless random numbers for data and training: hash(seed, purpose, counters, index).

No state is kept between calls, so any worker, on any number of ranks, in any order and after any restart, gets the
same number for the same arguments. The definition below is part of the data contract: changing it changes the order of
every run, and ``tests/data_shards/test_keyed.py`` pins its values.

Definition
----------
*key* is BLAKE2b with an 8-byte digest, read as a little-endian integer, over the bytes

    ``comtip-keyed-1`` NUL, then seed, purpose and every counter in turn, each as
    tag (``i`` or ``s``), length of the payload (uint32, little endian), payload

where an integer v is signed little-endian in ``v.bit_length() // 8 + 1`` bytes and a string is UTF-8.
The lengths make the encoding injective: different arguments never hash the same bytes.

*uniform* number ``index`` is the SplitMix64 finaliser (Stafford's mix 13) of
``key + (index + 1) * 0x9E3779B97F4A7C15`` modulo 2**64, its upper 53 bits divided by 2**53.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from hashlib import blake2b
from typing import SupportsIndex

import numpy as np
from numpy.typing import ArrayLike

_DOMAIN = b"comtip-keyed-1\0"
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _encode(part: SupportsIndex | str) -> bytes:
    if isinstance(part, str):
        tag, payload = b"s", part.encode()
    else:
        value = operator.index(part)
        tag, payload = b"i", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return tag + len(payload).to_bytes(4, "little") + payload


def key(seed: SupportsIndex, purpose: str, *counters: SupportsIndex | str) -> int:
    """Return the 64-bit key of (seed, purpose, counters).

    Parameters
    ----------
    seed
        The run's seed; any integer.
    purpose
        Name of the use; different purposes get independent numbers.
    counters
        Epoch, step, section ... in an order fixed by the caller; integers or strings.
    """
    parts = (operator.index(seed), purpose, *counters)
    return int.from_bytes(blake2b(_DOMAIN + b"".join(map(_encode, parts)), digest_size=8).digest(), "little")


def bits(seed: SupportsIndex, purpose: str, *counters: SupportsIndex | str, index: ArrayLike) -> np.ndarray:
    """Return 64 random bits for each index: uint64, the shape of ``index``; raises TypeError like :func:`uniform`."""
    index = np.asarray(index)
    if index.dtype.kind not in "iu":
        raise TypeError(f"index must be integers, not {index.dtype}; pass an integer array")
    return _mix(np.atleast_1d(index), np.uint64(key(seed, purpose, *counters))).reshape(index.shape)


def _mix(index: np.ndarray, key: np.uint64 | np.ndarray) -> np.ndarray:
    """Return the SplitMix64 finaliser of ``key + (index + 1) * golden``; arrays broadcast."""
    # Wrap-around modulo 2**64 is intended; arrays (unlike scalars) wrap without a warning.
    z = (index.astype(np.uint64) + np.uint64(1)) * _GOLDEN + key
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def uniform(seed: SupportsIndex, purpose: str, *counters: SupportsIndex | str, index: ArrayLike) -> np.ndarray:
    """Return a uniform number in [0, 1) for each index: float64, the shape of ``index``.

    Raises
    ------
    TypeError
        ``index`` or the seed is not an integer, or a counter is neither an integer nor a string.
    """
    return (bits(seed, purpose, *counters, index=index) >> np.uint64(11)) * 2.0**-53


def uniform_rows(keys: Sequence[int], n: int) -> np.ndarray:
    """Return the first ``n`` uniform numbers of each key: float64 (len(keys), n)."""
    rows = np.array(keys, np.uint64)[:, None]
    return (_mix(np.arange(n)[None], rows) >> np.uint64(11)) * 2.0**-53


def permutation(seed: SupportsIndex, purpose: str, *counters: SupportsIndex | str, n: int) -> np.ndarray:
    """Return a permutation of ``range(n)``, int64 (n,): the stable rank order of ``n`` keyed numbers."""
    return np.argsort(bits(seed, purpose, *counters, index=np.arange(n)), kind="stable")


def generator(seed: SupportsIndex, purpose: str, *counters: SupportsIndex | str) -> np.random.Generator:
    """Return a new NumPy generator (Philox) seeded with :func:`key`, for draws from other distributions."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *counters)))
