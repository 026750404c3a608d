"""The output folder of a build: what counts as finished, who may write, and file systems without locks."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from comtip_shards import ShardError, ShardSet
from comtip_shards.builder import output_dir as out_dir
from comtip_shards.builder.build import build_shards
from comtip_shards.builder.merge import merge_sets
from comtip_shards.builder.output_dir import STAGING, writing
from comtip_shards.reader.verify import verify
from comtip_shards.sources import open_source
from comtip_shards.storage.remote import Remote

from testkit.tiny import TinySection, write_tiny_source

TILES = {"tile_px": 32, "tile_um": 224.0, "min_mpp": 5.0}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sections = [TinySection("t1", "a", "train"), TinySection("t2", "b", "train")]
    return write_tiny_source(tmp_path_factory.mktemp("output") / "source", sections, side=3).parent


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "set"
    build_shards(open_source(source), out, **TILES)
    return out


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "set"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    "pattern", ["shards/*.tar", "shards/t2-0000.tar", "shards/*.idx", "overview/*", "genes.tsv", "spots.parquet"]
)
@pytest.mark.parametrize("how", ["gone", "cut", "changed", "a folder"])
@pytest.mark.parametrize("command", ["build", "merge"])
def test_a_set_with_files_missing_is_not_already_built(
    source: Path, built: Path, copy: Path, pattern: str, how: str, command: str
):
    if (pattern.endswith(".tar"), how) == (True, "changed"):
        pytest.skip("the size of a tar is compared, its hash is for verify")
    for path in copy.glob(pattern):
        data = path.read_bytes()
        path.unlink()
        if how == "cut":
            path.write_bytes(data[:-1])
        elif how == "changed":
            path.write_bytes(data[:-1] + b"?")
        elif how == "a folder":
            path.mkdir()
    if how == "a folder" and "/" not in pattern:
        with pytest.raises(ShardError, match="cannot be written"):
            _again(command, source, built, copy)
        return
    report = _again(command, source, built, copy)
    assert "already built" not in report.text
    assert files_of(copy) == files_of(built)
    assert verify(copy).ok


def _again(command: str, source: Path, built: Path, out: Path):
    return build_shards(open_source(source), out, **TILES) if command == "build" else merge_sets([built], out)


def test_a_whole_set_is_not_touched(source: Path, copy: Path):
    times = {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file()}
    assert "(already built)" in build_shards(open_source(source), copy, **TILES).text
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file()} == times
    (copy / STAGING / "left").mkdir(parents=True)
    build_shards(open_source(source), copy, **TILES)
    assert not (copy / STAGING).exists()


def test_the_second_of_two_builds_finds_what_the_first_finished(source: Path, built: Path, tmp_path: Path, monkeypatch):
    """The first ends after the second looked at the folder and before it has the lock."""
    out = tmp_path / "set"
    check = out_dir.built_already

    def late(folder: Path, *rest: object):
        found = check(folder, *rest)
        if not out.exists():
            shutil.copytree(built, out)
        return found

    monkeypatch.setattr("comtip_shards.builder.build.built_already", late)
    monkeypatch.setattr(
        "comtip_shards.builder.build.write_set", lambda *_: pytest.fail("a finished set is written over")
    )
    assert "(already built)" in build_shards(open_source(source), out, **TILES).text
    assert files_of(out) == files_of(built)


def _hold(out: Path, counter: Any, overlaps: Any) -> None:
    for _ in range(150):
        try:
            with writing(out):
                with counter.get_lock():
                    counter.value += 1
                    if counter.value > 1:
                        overlaps.value += 1
                time.sleep(0.0005)
                with counter.get_lock():
                    counter.value -= 1
        except ShardError:
            continue


def test_the_lock_is_held_until_the_staging_folder_is_gone(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    counter, overlaps = context.Value("i", 0), context.Value("i", 0)
    workers = [context.Process(target=_hold, args=(tmp_path / "set", counter, overlaps)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [w.exitcode for w in workers] == [0] * 4
    assert overlaps.value == 0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gives_a_warning(
    source: Path,
    built: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
):
    def refuse(*_: object) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    build_shards(open_source(source), tmp_path / "set", **TILES)
    assert files_of(tmp_path / "set") == files_of(built)
    assert "this file system has no locks" in capsys.readouterr().err
    remote = Remote(f"file://{built}", tmp_path / "cache")
    manifest = ShardSet(built).manifest
    assert remote.fetch("genes.tsv", sha256=manifest.genes_sha256).read_bytes() == (built / "genes.tsv").read_bytes()


def test_another_error_of_the_lock_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EACCES, "denied")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ShardError, match="cannot be written"), writing(tmp_path / "set"):
        pass


def test_a_removal_that_meets_that_of_another_process_ends(tmp_path: Path, monkeypatch):
    remove, calls = shutil.rmtree, []

    def other_process_first(path: Path, **options: bool) -> None:
        calls.append(path)
        if not options and len(calls) == 2:  # the other removes the files of this folder, and its own is there now
            remove(path)
            Path(path).mkdir()
            (Path(path) / "lock").touch()
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", "lock")
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", other_process_first)
    with writing(tmp_path / "set") as staging:
        (staging / "file").touch()
    assert len(calls) == 3
    assert not list((tmp_path / "set").iterdir())
