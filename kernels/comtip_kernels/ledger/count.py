"""Count what Triton kernels load, store and multiply while Triton's interpreter runs them (TRITON_INTERPRET=1)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Counted:
    """Bytes and FLOPs of the kernels launched in a ``with`` block of :func:`counting`."""

    loaded: int = 0
    """Bytes of all load requests, most of which caches serve."""
    stored: int = 0
    flops: int = 0
    """FLOPs of ``tl.dot``, including padding."""
    _pages: list[np.ndarray] = field(default_factory=list)

    @property
    def distinct(self) -> int:
        """Bytes of distinct addresses loaded: what is read from memory if caches serve every repeated load."""
        return int(np.unique(np.concatenate(self._pages)).size) if self._pages else 0


@contextmanager
def counting() -> Iterator[Counted]:
    """Return a context manager that counts the bytes and FLOPs of all Triton kernels launched inside the ``with`` block.

    Its value is the object in which they are counted.

    Raises
    ------
    RuntimeError
        The kernels are compiled instead of run by Triton's interpreter (``TRITON_INTERPRET=1``), so nothing would be counted.
    """
    from comtip_kernels.tl_common import INTERPRETING

    if not INTERPRETING:
        raise RuntimeError("counting() needs TRITON_INTERPRET=1, set before the kernels are imported")
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    out = Counted()
    load, store, dot = Builder.create_masked_load, Builder.create_masked_store, Builder.create_dot

    def addresses(ptrs: Any, mask: Any) -> tuple[np.ndarray, int]:
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        return np.broadcast_to(ptrs.data, np.shape(mask.data))[np.asarray(mask.data, dtype=bool)].ravel(), size

    def counted_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        where, size = addresses(ptrs, mask)
        out.loaded += where.size * size
        out._pages.append(np.unique((where.astype(np.int64)[:, None] + np.arange(size)).ravel()))
        return load(self, ptrs, mask, *rest)

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        where, size = addresses(ptrs, mask)
        out.stored += where.size * size
        return store(self, ptrs, value, mask, *rest)

    def counted_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        out.flops += 2 * a.data.shape[-2] * a.data.shape[-1] * b.data.shape[-1]
        return dot(self, a, b, *rest)

    Builder.create_masked_load, Builder.create_masked_store = counted_load, counted_store
    Builder.create_dot = counted_dot
    try:
        yield out
    finally:
        Builder.create_masked_load, Builder.create_masked_store, Builder.create_dot = load, store, dot
