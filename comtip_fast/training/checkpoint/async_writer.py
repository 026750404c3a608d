"""Checkpoints written beside the steps: the caller copies, a thread writes, hashes and renames; at most one is on its way."""

from __future__ import annotations

import threading
from collections.abc import Callable

from torch import Tensor

from comtip_fast.training.checkpoint.store import Checkpoint


class Writer:
    """Runs one piece of work at a time in a thread; what it raises is raised by the next call that asks."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def failed(self) -> bool:
        """Whether an error waits to be raised."""
        return self._error is not None

    def submit(self, work: Callable[[], None]) -> None:
        """Start ``work`` once the work before it is done; raise what that raised."""
        self.drain()

        def run() -> None:
            try:
                work()
            except Exception as error:
                self._error = error

        # Not a daemon: the interpreter's end waits for it, so a checkpoint that was begun is finished.
        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise what the last work raised, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def drain(self) -> None:
        """Wait until nothing is on its way, and :meth:`check`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def join_quietly(self) -> None:
        """Wait without raising: for a run that ends by another error, which must be the one that is seen."""
        if self._thread is not None:
            self._thread.join()


def copied(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint on the CPU that the next step cannot change."""
    return Checkpoint(_copied(checkpoint.model), _copied(checkpoint.optim), checkpoint.state)


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # A tensor from a GPU is a copy already.
    return {
        k: v.detach().cpu() if v.device.type != "cpu" else v.detach().clone().contiguous() for k, v in tensors.items()
    }
