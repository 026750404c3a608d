"""Asynchronous checkpoints: the caller copies the tensors, and a thread writes, hashes and renames the files, one job at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable

from torch import Tensor

from comtip_fast.training.checkpoint.content import Checkpoint


class Writer:
    """Runs one job at a time in a thread; the next :meth:`submit`, :meth:`check` or :meth:`drain` raises an error of the job."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def failed(self) -> bool:
        """Whether a job failed with an exception that has not been raised yet."""
        return self._error is not None

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, work: Callable[[], None]) -> None:
        """Wait for the previous job, raise its exception if there is one, and start ``work``."""
        self.drain()

        def run() -> None:
            try:
                work()
            except Exception as error:
                self._error = error

        # Not a daemon: the interpreter waits for the thread at exit, so a started checkpoint is completed.
        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise the exception of the last job, if it failed; a second call does not raise it again."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def drain(self) -> None:
        """Wait for the running job, and raise its exception if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def join_quietly(self) -> None:
        """Wait for the running job without raising its exception, for a run that ends with another error."""
        if self._thread is not None:
            self._thread.join()


def copied(checkpoint: Checkpoint) -> Checkpoint:
    """Return a copy of the checkpoint on the CPU, which the next step cannot change."""
    return Checkpoint(_copied(checkpoint.model), _copied(checkpoint.optim), checkpoint.state, _copied(checkpoint.ema))


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # Moving a tensor from a GPU already copies it.
    return {
        k: v.detach().cpu() if v.device.type != "cpu" else v.detach().clone().contiguous() for k, v in tensors.items()
    }
