"""``comtip doctor`` names what the demo lacks, in the unit in which it is compared."""

from pathlib import Path
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


@pytest.mark.parametrize("lacking", ["", "compiler", "headers"])
def test_what_triton_compiles_with_is_checked_on_a_gpu(lacking: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Triton compiles a C module when the first kernel starts: in an image without a compiler, training would end there."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(doctor, "_version", lambda package: "3.6.0")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None if lacking == "compiler" else f"/usr/bin/{name}")
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    if lacking != "headers":
        (tmp_path / "Python.h").touch()
    found = doctor._triton()
    assert found.state == ("broken" if lacking else "ok")
    assert ("gcc" in found.fix) == (lacking == "compiler")
    assert ("python3-dev" in found.fix) == (lacking == "headers")
    monkeypatch.setenv("CC", "cc")
    assert doctor._triton().state == ("broken" if lacking == "headers" else "ok")
