"""Other releases of Triton are installed outside the environment, and the ledger runs on them."""

import os
import subprocess
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("triton")

from comtip_kernels.ledger import toolchain
from comtip_kernels.ledger.__main__ import main

ROOT = Path(__file__).parents[2]


class Pip:
    """Replaces ``subprocess.run``: installs an empty release, or fails."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.calls, self.env = status, [], {}

    def __call__(self, words: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        self.calls.append(words)
        self.env = options.get("env", {})
        if "--target" in words and not self.status:
            (Path(words[words.index("--target") + 1]) / "triton-3.6.0.dist-info").mkdir()
        return subprocess.CompletedProcess(words, self.status, "", "no matching distribution")


def test_a_release_is_installed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pip = Pip()
    monkeypatch.setattr(subprocess, "run", pip)
    folder = toolchain.installed("3.6", tmp_path)
    assert folder == tmp_path / "3.6"
    assert toolchain.version_in(folder) == "3.6.0"
    assert toolchain.installed("3.6", tmp_path) == folder
    assert [words[-1] for words in pip.calls] == ["triton==3.6.*"]
    assert "--no-deps" in pip.calls[0]
    toolchain.installed("3.6.0", tmp_path)
    assert pip.calls[1][-1] == "triton==3.6.0"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3.6", "3.6.0"]


def test_a_failed_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subprocess, "run", Pip(1))
    with pytest.raises(RuntimeError, match=r"pip could not install triton==3\.6\.\*.*no matching distribution"):
        toolchain.installed("3.6", tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"'3.6; rm' is not a version; give e.g. 3.6"):
        toolchain.installed("3.6; rm", tmp_path)


def test_the_ledger_runs_on_the_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pip = Pip()
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["--check", "--triton", "3.6", "--jobs", "1"]) == 0
    # Without --triton: a subprocess that imported another release would start itself for ever.
    assert pip.calls[-1][1:] == ["-m", "comtip_kernels.ledger", "--check", "--jobs", "1"]
    paths = pip.env["PYTHONPATH"].split(os.pathsep)
    assert paths == [str(tmp_path / "comtip-fast/triton/3.6"), str(ROOT / "kernels"), "elsewhere"]


def test_a_release_in_the_folder_wins_over_the_installed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    release = tmp_path / "3.6"
    (release / "triton-3.6.0.dist-info").mkdir(parents=True)
    # PyTorch reads the version from the metadata.
    (release / "triton-3.6.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: triton\nVersion: 3.6.0\n")
    (release / "triton").mkdir()
    (release / "triton/__init__.py").write_text("import os\n\nos._exit(36)\n")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert toolchain.run_ledger("3.6", ["--check"], tmp_path) == 36


def test_the_floor_of_torch_is_the_release_with_the_oldest_triton():
    floors = set()
    for path in (ROOT / "pyproject.toml", ROOT / "kernels/pyproject.toml"):
        needs = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["dependencies"]
        floors |= {need for need in needs if need.startswith("torch>=")}
    assert floors == {"torch>=2.10"}  # its metadata: triton==3.6.0
    assert toolchain.OLDEST == "3.6"
    assert f"Needs PyTorch {floors.pop().removeprefix('torch>=')} or newer" in (ROOT / "kernels/README.md").read_text()
    grid = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"--check --triton {release}" in grid for release in (toolchain.OLDEST, toolchain.NEWEST))
