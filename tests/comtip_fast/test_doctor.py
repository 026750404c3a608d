"""``comtip doctor`` names what the demo lacks, in the unit in which it is compared."""

from types import SimpleNamespace

import pytest

from comtip_fast import doctor


@pytest.mark.parametrize("lacking", ["", "memory", "disk"])
def test_the_machine_is_compared_with_the_demo(lacking: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "DEMO_MEMORY", 1e18 if lacking == "memory" else 0)
    free = 1.96e9 if lacking == "disk" else 2.04e9
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    found = doctor._memory()
    assert found.state == ("missing" if lacking else "ok")
    assert ("GB of memory; run it on another machine" in found.fix) == (lacking == "memory")
    assert ("more than 2 GB of free disk; free space" in found.fix) == (lacking == "disk")
    assert "2.0 GB of disk free" in found.detail
