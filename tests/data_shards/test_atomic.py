"""Atomic writes: an older file or folder is kept until the new one is complete."""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from comtip_shards import SourceError
from comtip_shards.storage import atomic
from comtip_shards.storage.atomic import (
    atomic_folder,
    atomic_path,
    publish_link,
    refuse_input_as_output,
    tmp_path_of,
    write_atomic,
)
from comtip_shards.storage.disk import disk_trouble, unwritable


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_replaced_when_it_is_whole(tmp_path: Path):
    target = tmp_path / "a.txt"
    write_atomic(target, "old")
    with atomic_path(target) as staged:
        staged.write_text("half")
        assert target.read_text() == "old"
        assert staged.parent == tmp_path
    assert (target.read_text(), names(tmp_path)) == ("half", ["a.txt"])
    with pytest.raises(ZeroDivisionError), atomic_path(target) as staged:
        staged.write_text(str(1 / len(staged.read_bytes())))
    assert (target.read_text(), names(tmp_path)) == ("half", ["a.txt"])


def test_what_a_killed_process_left_does_not_add_up_and_does_not_show(tmp_path: Path):
    target = tmp_path / "a.txt"
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom comtip_shards.storage.atomic import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as p:\n    p.write_text('x' * 1000)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    write_atomic(target, "old")
    path = os.pathsep.join(p for p in sys.path if p)
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", script, str(target)], env=os.environ | {"PYTHONPATH": path}, check=False
        )
        assert done.returncode < 0
        assert (target.read_text(), len(names(tmp_path))) == ("old", 2)
    write_atomic(target, "new")
    assert (target.read_text(), names(tmp_path)) == ("new", ["a.txt"])


def test_a_second_writer_of_the_same_file_is_refused(tmp_path: Path):
    target = tmp_path / "a.txt"
    with atomic_path(target) as staged:
        staged.write_text("first")
        with pytest.raises(FileExistsError, match=r"a\.txt: another process is writing it"), atomic_path(target):
            pass
    assert target.read_text() == "first"


def test_permissions_are_those_of_the_umask_or_of_the_file_that_was_there(tmp_path: Path):
    target = tmp_path / "a.txt"
    before = os.umask(0o027)
    try:
        with atomic_path(target) as staged:
            staged.unlink()
            staged.write_text("rewritten by a library, readable by its owner only")
            staged.chmod(0o600)
        assert stat.S_IMODE(target.stat().st_mode) == 0o640
        target.chmod(0o604)
        write_atomic(target, "again")
        assert stat.S_IMODE(target.stat().st_mode) == 0o604
        with atomic_folder(tmp_path / "f") as staged:
            staged.mkdir()
            (staged / "x").write_text("x")
            (staged / "x").chmod(0o600)
        assert stat.S_IMODE((tmp_path / "f" / "x").stat().st_mode) == 0o640
    finally:
        os.umask(before)


@pytest.mark.parametrize("length", [255, 250, 246, 100])
def test_any_name_that_the_file_system_takes(length: int, tmp_path: Path):
    target = tmp_path / ("é" * ((length - 1) // 2) + "x")
    write_atomic(target, "a")
    assert target.read_text() == "a"
    assert len(names(tmp_path)) == 1


def test_a_link_is_followed_and_devices_are_refused(tmp_path: Path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_atomic(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    for bad in (Path("/dev/null"), tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match="is not a regular file"):
            write_atomic(bad, "x")
    # A link that somebody put where the temporary file goes is not written through.
    (tmp_path / "victim").write_text("victim")
    tmp_path_of(tmp_path / "b").symlink_to("victim")
    with pytest.raises(OSError, match="symbolic link"):
        write_atomic(tmp_path / "b", "x")
    assert (tmp_path / "victim").read_text() == "victim"


def test_a_folder_is_replaced_when_it_is_whole(tmp_path: Path):
    target = tmp_path / "f"
    for text in ("one", "two"):
        with atomic_folder(target) as staged:
            staged.mkdir()
            (staged / "x").write_text(text)
        assert ((target / "x").read_text(), names(tmp_path)) == (text, ["f"])
    with pytest.raises(FileNotFoundError), atomic_folder(target) as staged:
        (staged / "missing").write_text("x")
    assert ((target / "x").read_text(), names(tmp_path)) == ("two", ["f"])


def test_a_folder_that_cannot_be_renamed_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "f"
    target.mkdir()
    (target / "x").write_text("old")
    plain = Path.rename

    def rename(self: Path, other: Any) -> Path:
        if self == tmp_path_of(target):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return plain(self, other)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output error"), atomic_folder(target) as staged:
        staged.mkdir()
    assert ((target / "x").read_text(), names(tmp_path)) == ("old", ["f"])


def test_a_full_disk_names_the_target_and_leaves_it_as_it_was(tmp_path: Path):
    import numpy as np
    from safetensors.numpy import save_file

    (tmp_path / "a").write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=str(tmp_path / "a")) as caught:
            write_atomic(tmp_path / "a", b"x" * 2000)
        assert disk_trouble(caught.value) is not None
        with pytest.raises(OSError, match=str(tmp_path / "a")) as caught, atomic_path(tmp_path / "a") as staged:
            save_file({"x": np.zeros(5000)}, staged)
        assert disk_trouble(caught.value) == f"{tmp_path / 'a'}: the file exceeds the maximum file size"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ((tmp_path / "a").read_text(), names(tmp_path)) == ("old", ["a"])


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_file_systems_without_flush_or_locks_are_written_too(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(atomic.fcntl, "flock", refuse)
    write_atomic(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"


def test_an_output_that_is_an_input_is_refused_by_every_name(tmp_path: Path):
    one, folder = tmp_path / "x.h5ad", tmp_path / "source"
    one.write_text("input")
    folder.mkdir()
    (folder / "counts.h5").write_text("input")
    (tmp_path / "soft").symlink_to(one)
    os.link(one, tmp_path / "hard")
    os.link(folder / "counts.h5", tmp_path / "hard_counts")
    for out in ("x.h5ad", "soft", "hard", "source/../x.h5ad"):
        with pytest.raises(ValueError, match=r"`out` .* is the input .*x\.h5ad"):
            refuse_input_as_output(tmp_path / out, [tmp_path / "none", one])
    for out in ("source/counts.h5", "source", "hard_counts"):
        with pytest.raises(ValueError, match=r"`out` .* is the input .*source"):
            refuse_input_as_output(tmp_path / out, [folder])
    refuse_input_as_output(folder / "new.h5ad", [one, folder])
    refuse_input_as_output(one, [folder])


@pytest.mark.parametrize("text", ["I/O error: No space left on device (os error 28)", "unable to x (errno = 28, error"])
def test_numbers_in_the_text_of_libraries_are_read(text: str):
    assert "no space is left" in str(disk_trouble(RuntimeError(text)))
    assert unwritable(RuntimeError(text)) is None


def test_read_only_is_another_class_than_full():
    error = OSError(errno.EROFS, "Read-only file system", "f")
    assert (disk_trouble(error), unwritable(error)) == (None, "f: the file system is read-only")
    assert "permission" in str(unwritable(RuntimeError("Permission denied (os error 13)")))
    assert unwritable(PermissionError(errno.EACCES, "Permission denied", "f")) is None, "its own class says enough"
    assert disk_trouble(ValueError("x")) is None


def test_a_folder_that_another_process_has_finished_is_kept(tmp_path: Path):
    target, own = tmp_path / "folder", tmp_path / "folder.1.writing"
    with atomic_folder(target, own, keep_existing=True) as folder:
        assert folder == own
        folder.mkdir()
        (folder / "a").write_text("mine")
        target.mkdir()
        (target / "a").write_text("theirs")
    assert (target / "a").read_text() == "theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_an_input_error_is_not_taken_for_a_disk_error(tmp_path: Path):
    """The message contains an errno of HDF5, which is about the input and not about the output folder."""

    def write() -> None:
        with atomic_folder(tmp_path / "folder") as folder:
            folder.mkdir()
            raise SourceError("a.h5: cannot be read (errno = 2)")

    with pytest.raises(SourceError, match="errno = 2"):
        write()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("links", [True, False])
def test_a_link_or_a_copy_replaces_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("new")
    target.write_text("old")
    if not links:
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    publish_link(source, target)
    assert target.read_text() == "new"
    assert target.samefile(source) is links
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "target"]


def test_one_module_flushes():
    package = Path(atomic.__file__).parents[1]
    assert [p.name for p in package.rglob("*.py") if "fsync" in p.read_text(encoding="utf-8")] == ["atomic.py"]
