"""``comtip doctor`` names what the demo lacks, in the unit in which it is compared."""

import importlib
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


@pytest.mark.parametrize(("major", "state"), [(7, "broken"), (8, "ok"), (9, "ok")])
def test_a_gpu_that_is_too_old_is_named(major: int, state: str, monkeypatch: pytest.MonkeyPatch):
    """PyTorch says that every GPU supports bf16, because it emulates it."""
    props = SimpleNamespace(name="GPU", total_memory=16 * 2**30, major=major, minor=5)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: props)
    found = doctor._gpu()
    assert found.state == state
    assert found.detail == f"2 x GPU, 16 GiB, sm_{major}5"
    assert ("sm_80 (A100) or newer" in found.fix) == (state == "broken")


def test_a_triton_that_is_too_old_for_the_gpu_ends_no_report(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> str:
        raise ValueError("packed_attention: Triton 3.6.0 cannot compile; install a newer one, or use impl='reference'")

    monkeypatch.setattr(importlib.import_module("comtip_kernels.packed_attention"), "attention_name", refuse)
    found = doctor._attention()
    assert (found.state, found.detail) == ("broken", "packed_attention: Triton 3.6.0 cannot compile")
    assert found.fix == "install a newer one"
