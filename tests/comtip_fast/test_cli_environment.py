"""What ``comtip`` sets in its environment before PyTorch is imported."""

from __future__ import annotations

import os

import pytest

from comtip_fast.cli import SPIN_COUNT, main


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_idle_threads_sleep_soon_unless_the_environment_decides(
    given: dict[str, str], found: str | None, monkeypatch: pytest.MonkeyPatch
):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that the original value is restored
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert os.environ.get("GOMP_SPINCOUNT") == found
