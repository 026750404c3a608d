"""torchrun's rendezvous with a time limit on every call."""

from __future__ import annotations

import threading
import time
import tomllib
from pathlib import Path

import pytest
from torch.distributed import HashStore
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend

from comtip_fast.training.distributed import rendezvous
from testkit.distributed import free_port


class SilentBackend(C10dRendezvousBackend):
    """A backend whose host does not answer while the link is cut."""

    def __init__(self) -> None:
        super().__init__(HashStore(), "run")
        self.link = threading.Event()
        self.link.set()

    def get_state(self) -> tuple[bytes, object] | None:
        self.link.wait()
        return super().get_state()


def test_a_call_without_an_answer_ends_and_the_next_ones_do_not_wait() -> None:
    inner = SilentBackend()
    backend = rendezvous.LimitedBackend(inner, 2.0)
    assert backend.get_state() is None
    assert backend.set_state(b"state") is not None
    inner.link.clear()
    began = time.monotonic()
    with pytest.raises(RendezvousConnectionError, match=r"did not answer within call_timeout=2 s"):
        backend.get_state()
    assert time.monotonic() - began < 30
    began = time.monotonic()
    with pytest.raises(RendezvousConnectionError):
        backend.set_state(b"other")
    assert time.monotonic() - began < 1.5, "a call behind a blocked one must fail without a wait"
    inner.link.set()
    assert backend._blocked is not None
    backend._blocked.join(5)
    found = backend.get_state()
    assert found is not None
    assert found[0] == b"state", "the agent continues if the link is back"


class FailingBackend(SilentBackend):
    """A backend whose connection is closed."""

    def get_state(self) -> tuple[bytes, object] | None:
        raise RendezvousConnectionError("closed")


def test_errors_of_the_backend_are_passed_on() -> None:
    with pytest.raises(RendezvousConnectionError, match=r"^closed$"):
        rendezvous.LimitedBackend(FailingBackend(), 5).get_state()


def test_torchrun_gets_a_c10d_rendezvous_with_the_limit() -> None:
    parameters = RendezvousParameters(
        rendezvous.NAME, f"127.0.0.1:{free_port()}", "run", 1, 1, local_addr="127.0.0.1", is_host=True, call_timeout=7
    )
    handler = rendezvous.handler_creator()(parameters)
    assert handler.get_backend() == rendezvous.NAME
    info = handler.next_rendezvous()
    assert (info.rank, info.world_size) == (0, 1)
    handler.shutdown()
    with pytest.raises(ValueError, match="call_timeout=0"):
        rendezvous.create_handler(RendezvousParameters(rendezvous.NAME, "localhost:0", "run", 1, 1, call_timeout=0))


def test_the_entry_point_of_torchrun_is_declared() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["torchrun.handlers"][rendezvous.NAME].partition(":")
    assert module == rendezvous.__name__
    assert getattr(rendezvous, name)() is rendezvous.create_handler
