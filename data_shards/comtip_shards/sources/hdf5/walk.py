"""Walk HDF5 files in a separate process, which a timer ends if the HDF5 library does not return.

:mod:`comtip_shards.sources.hdf5.probe` runs this script; it imports only h5py, so that it starts fast. Each line of
standard input is a path as JSON. The name of an object is written to standard output as JSON before its content is read, and
``null`` after the last one.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import h5py

STEP_S, FILE_S = 2.0, 300.0
"""Maximum CPU time in s for one object and for one file. A valid object takes milliseconds, a damaged one may loop forever. CPU
time excludes waiting for a disk or for a busy machine."""
MAX_OBJECTS = 1_000_000
"""Objects after which the walk ends. The reader refuses files with more."""
_MEMORY = 4 << 30
_ROWS, _MANY = 1 << 16, 1000


class _Walk:
    def __init__(self) -> None:
        self.left_s = FILE_S

    def step(self, name: str) -> None:
        """Report the object that is read next, and restart the timer."""
        self.left_s -= max(0.0, STEP_S - signal.getitimer(signal.ITIMER_PROF)[0])
        print(json.dumps(name), flush=True)
        signal.setitimer(signal.ITIMER_PROF, min(STEP_S, max(self.left_s, 0.01)))

    def file(self, path: str) -> None:
        """Walk one file."""
        signal.setitimer(signal.ITIMER_PROF, STEP_S)
        with h5py.File(path, "r") as file:
            seen: set[Any] = set()
            left: list[Iterator[Any]] = [iter([file])]
            while left and len(seen) <= MAX_OBJECTS:
                item = next(left[-1], None)
                if item is None:
                    left.pop()
                    continue
                address = h5py.h5o.get_info(item.id).addr
                if address in seen:  # hard links can form a cycle
                    continue
                seen.add(address)
                left.append(self.referred(item))
                if isinstance(item, h5py.Group):
                    left.append(self.children(item))
                elif isinstance(item, h5py.Dataset):
                    with suppress(Exception):
                        self.dataset(item)

    def referred(self, item: Any) -> Iterator[Any]:
        """Read all attributes, and iterate over the objects that they refer to."""
        with suppress(Exception):
            for number, name in enumerate(item.attrs):
                if number % _MANY == 0:
                    self.step(item.name or "")
                with suppress(Exception):
                    value = item.attrs[name]
                    if isinstance(value, h5py.Reference) and value:
                        yield item.file[value]

    def children(self, group: h5py.Group) -> Iterator[Any]:
        """Iterate over the objects in a group; soft and external links are not followed."""
        with suppress(Exception):
            for number, name in enumerate(group):
                if number % _MANY == 0:
                    self.step(group.name or "")
                with suppress(Exception):
                    if isinstance(group.get(name, getlink=True), h5py.HardLink):
                        yield group[name]

    def dataset(self, data: h5py.Dataset) -> None:
        """Walk the chunk index, and read values of variable length, which are stored separately from the dataset."""
        self.step(data.name or "")
        data.id.get_storage_size()
        if data.is_virtual or data.external or data.shape is None or not data.dtype.hasobject:
            return
        if not data.shape:
            data[()]
        for start in range(0, data.shape[0] if data.shape else 0, _ROWS):
            self.step(data.name or "")
            data[start : start + _ROWS]


def main() -> None:
    """Walk the files that are named on standard input."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process even inside the library
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the reader kills this process
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    for line in sys.stdin:
        with suppress(Exception):  # other damage is reported by the reader
            _Walk().file(json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print("null", flush=True)


if __name__ == "__main__":
    main()
