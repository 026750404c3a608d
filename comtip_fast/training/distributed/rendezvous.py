"""torchrun's c10d rendezvous with a time limit on every call to its store: ``torchrun --rdzv-backend comtip``.

PyTorch's store waits for an answer without a limit. On a host whose link was cut, the agent then hangs until the kernel drops
the connection, which takes about 15 minutes on Linux. With the limit, the agent ends with ``RendezvousConnectionError``, as it
does if the connection is closed. The limit is ``--rdzv-conf call_timeout=SECONDS`` (60 by default); all other settings are those
of ``c10d``.

torchrun finds the backend by the entry point ``torchrun.handlers`` of the package. This module is therefore imported by every
torchrun, and imports nothing but PyTorch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from torch.distributed.elastic.rendezvous.api import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousHandlerCreator,
    RendezvousParameters,
)
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousBackend, Token

NAME = "comtip"
CALL_TIMEOUT_S = 60
T = TypeVar("T")


class LimitedBackend(RendezvousBackend):
    """A rendezvous backend whose calls raise an error after a time limit.

    Parameters
    ----------
    backend
        The backend to call.
    limit_s
        Seconds until a call raises ``RendezvousConnectionError``.
    """

    def __init__(self, backend: RendezvousBackend, limit_s: float) -> None:
        self._backend, self._limit_s = backend, limit_s
        self._blocked: threading.Thread | None = None

    @property
    def name(self) -> str:
        """See base class; torchrun compares it with ``--rdzv-backend``."""
        return NAME

    def get_state(self) -> tuple[bytes, Token] | None:
        """See base class."""
        return self._limited(self._backend.get_state)

    def set_state(self, state: bytes, token: Token | None = None) -> tuple[bytes, Token, bool] | None:
        """See base class."""
        return self._limited(lambda: self._backend.set_state(state, token))

    def _limited(self, call: Callable[[], T]) -> T:
        """Return ``call()``, run in a thread; raise if it takes longer than the limit, or if an earlier call still blocks."""
        if self._blocked is not None and self._blocked.is_alive():
            # The store answers one call at a time, so another call would only wait behind the blocked one.
            raise self._error()
        found: list[T] = []
        failed: list[Exception] = []

        def run() -> None:
            try:
                found.append(call())
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=run, name="rendezvous", daemon=True)
        thread.start()
        thread.join(self._limit_s)
        if thread.is_alive():
            self._blocked = thread
            raise self._error()
        if failed:
            raise failed[0]
        return found[0]

    def _error(self) -> RendezvousConnectionError:
        return RendezvousConnectionError(
            f"the rendezvous host did not answer within call_timeout={self._limit_s:g} s: the host or its link is down; start this "
            "agent again once the host answers"
        )


def create_handler(params: RendezvousParameters) -> RendezvousHandler:
    """Return torchrun's dynamic rendezvous over a c10d store whose calls have a time limit.

    Raises
    ------
    ValueError
        ``call_timeout`` is below 1 second or not an integer, or another setting is not valid for ``c10d``.
    RendezvousConnectionError
        The store cannot be opened or reached.
    """
    # Imported on use: torchrun imports this module while it imports its own.
    from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend, dynamic_rendezvous

    limit_s: Any = params.get_as_int("call_timeout", CALL_TIMEOUT_S)
    if limit_s <= 0:
        raise ValueError(f"--rdzv-conf call_timeout={limit_s}: give at least 1 second")
    backend, store = c10d_rendezvous_backend.create_backend(params)
    return dynamic_rendezvous.create_handler(store, LimitedBackend(backend, limit_s), params)


def handler_creator() -> RendezvousHandlerCreator:
    """Return :func:`create_handler`, as the entry point ``torchrun.handlers`` requires."""
    return create_handler
