"""Damage HDF5 files as a failing disk may, so that the HDF5 library loops forever."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

_HEAP, _HEADER = b"GCOL", 16
"""Signature of a global heap, which holds text of variable length, and the size in bytes of its header and of an object's."""


def zero_heaps(path: Path, *, from_heap: int = 0, objects: int = 1) -> None:
    """Zero object headers in the global heaps of a file, so that the library's loop over a heap never advances.

    Parameters
    ----------
    path
        A file with text of variable length, changed in place.
    from_heap
        Number of heaps that stay intact.
    objects
        Number of objects that stay intact in each damaged heap.

    Raises
    ------
    ValueError
        The file has no such heap.
    """
    data = bytearray(path.read_bytes())
    starts, at = [], data.find(_HEAP)
    while at >= 0:
        starts.append(at)
        at = data.find(_HEAP, at + 1)
    if len(starts) <= from_heap:
        raise ValueError(f"{path}: {len(starts)} global heaps, so none is left to damage; reduce from_heap={from_heap}")
    for start in starts[from_heap:]:
        size, at = int.from_bytes(data[start + 8 : start + 16], "little"), start + _HEADER
        for _ in range(objects):
            length = int.from_bytes(data[at + 8 : at + 16], "little")
            at += _HEADER + (length + 7) // 8 * 8
        data[at : at + _HEADER] = bytes(_HEADER)
        assert at < start + size
    path.write_bytes(data)


def endless_attribute(path: Path) -> Path:
    """Write a file with an attribute on which the HDF5 library loops forever, and return its path."""
    with h5py.File(path, "w") as file:
        file["X"] = np.zeros(3)
        file["X"].attrs["encoding-type"] = "array"
    zero_heaps(path)
    return path


def endless_text(path: Path) -> Path:
    """Write a file with text values on which the HDF5 library loops forever, and return its path."""
    with h5py.File(path, "w") as file:
        file["group/names"] = np.array(["a" * 40] * 5, h5py.string_dtype())
    zero_heaps(path)
    return path
