"""Jobs, parts and kills do not change a byte; merging copies bytes and refuses incompatible sets."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from comtip_shards import ShardError, ShardSet, SourceError
from comtip_shards.builder import staging as stage
from comtip_shards.builder.build import build_shards
from comtip_shards.builder.jobs import run_jobs
from comtip_shards.builder.merge import merge_sets
from comtip_shards.builder.output_dir import STAGING, writing
from comtip_shards.reader.verify import verify
from comtip_shards.sources import open_source

from comtip_fast.cli import main
from testkit.shards import change_manifest, rewrite
from testkit.tiny import TinySection, write_tiny_source

SIZE = {"tile_px": 32, "tile_um": 224.0, "min_mpp": 5.0, "max_records": 20}
ROOT = Path(__file__).parents[2]
COMMAND = """
import sys
from pathlib import Path
from comtip_shards.builder import build_shards
from comtip_shards.sources import open_source
build_shards(open_source(sys.argv[1]), Path(sys.argv[2]), tile_px=32, tile_um=224.0, min_mpp=5.0, max_records=20,
             jobs=int(sys.argv[3]))
"""


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "set"
    build_shards(open_source(tiny_source), out, **SIZE)
    return files_of(out)


def start(source: Path, out: Path, jobs: int) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(str(ROOT / p) for p in (".", "kernels", "data_shards"))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", COMMAND, str(source), str(out), str(jobs)], env=env)


# -- jobs -------------------------------------------------------------------------------------------------------


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def complain(number: int) -> int:
    if number == 2:
        raise SourceError("section two is bad")
    return number


def test_a_worker_that_is_killed_or_complains_is_reported():
    with pytest.raises(ShardError, match=r"worker process was killed.*smaller `jobs`"):
        run_jobs(die, [(1,), (2,)], jobs=2, label="x")
    assert run_jobs(complain, [(5,), (4,), (3,)], jobs=2, label="x") == [5, 4, 3]
    with pytest.raises(SourceError, match="section two is bad"):
        run_jobs(complain, [(1,), (2,), (3,)], jobs=2, label="x")


@pytest.mark.parametrize(("jobs", "kills"), [(1, 4), (2, 1)])
def test_kills_at_random_points_lose_nothing(
    tiny_source: Path, tmp_path: Path, whole: dict[str, bytes], jobs: int, kills: int
):
    """SIGKILL the builder repeatedly, a little later each time; then let it finish and compare every byte.

    The result of two processes equals that of one undisturbed process.
    """
    rng = np.random.default_rng(jobs)
    out = tmp_path / "set"
    for kill in range(kills):
        builder = start(tiny_source, out, jobs)
        deadline = time.monotonic() + 60
        while builder.poll() is None and not (out / STAGING).exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1 * (kill + 1)))
        builder.kill()
        builder.wait()
        if (out / "manifest.json").exists():
            break
        with pytest.raises(ShardError, match=r"no manifest\.json"):
            ShardSet(out)
    assert start(tiny_source, out, jobs).wait() == 0
    assert files_of(out) == whole


def test_workers_end_with_the_builder(tmp_path: Path):
    script = tmp_path / "wait.py"
    script.write_text(
        "import os, sys, time\nfrom comtip_shards.builder.jobs import run_jobs\n"
        "def wait(i):\n    open(f'{sys.argv[1] if len(sys.argv) > 1 else i[0]}', 'a').write(f'{os.getpid()}\\n')\n    time.sleep(60)\n"
        "if __name__ == '__main__':\n    run_jobs(wait, [((sys.argv[2],),)] * 2, jobs=2, label='x')\n"
    )
    pids = tmp_path / "pids"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "data_shards")}
    parent = subprocess.Popen([sys.executable, str(script), str(pids), str(pids)], env=env)
    deadline = time.monotonic() + 60
    while (not pids.exists() or len(pids.read_text().split()) < 2) and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = [int(p) for p in pids.read_text().split()]
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(alive(p) for p in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(p) for p in workers)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def test_one_writer_at_a_time(tiny_source: Path, tmp_path: Path):
    with writing(tmp_path / "set"), pytest.raises(ShardError, match="another process is writing here"):
        build_shards(open_source(tiny_source), tmp_path / "set", **SIZE)


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "free disk space"),
        (errno.EDQUOT, "delete files of this user or ask for a larger quota"),
        (errno.EACCES, "make the folder writable"),
        (errno.EISDIR, "delete this folder"),
    ],
)
def test_an_error_of_writing_names_the_fix_for_its_cause(tmp_path: Path, number: int, fix: str):
    out = tmp_path / "set"
    with (
        pytest.raises(ShardError, match=f"{out}: cannot be written .*; {fix}, then run the same command"),
        writing(out),
    ):
        raise OSError(number, os.strerror(number))


def test_a_full_disk_ends_cleanly_and_the_build_continues_after(
    tiny_source: Path, tmp_path: Path, whole: dict[str, bytes]
):
    """A file size limit simulates a full disk; the builder is a separate process."""
    code = COMMAND.replace(
        "build_shards(",
        "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))\nbuild_shards(",
        1,
    )
    path = os.pathsep.join(str(ROOT / p) for p in (".", "kernels", "data_shards"))
    run = subprocess.run(
        [sys.executable, "-c", code, str(tiny_source), str(tmp_path / "set"), "1"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "cannot be written" in run.stderr
    assert "staged sections are kept" in run.stderr
    assert not (tmp_path / "set/manifest.json").exists()
    build_shards(open_source(tiny_source), tmp_path / "set", **SIZE)
    assert files_of(tmp_path / "set") == whole


# -- parts ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("parts")
    for i in (1, 2, 3):
        build_shards(open_source(tiny_source), folder / f"p{i}", part=(i, 3), **SIZE)
    return [folder / f"p{i}" for i in (1, 2, 3)]


def test_parts_are_sets_and_merge_to_the_whole(
    tiny_source: Path, parts: list[Path], tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    assert [[s.section_id for s in ShardSet(p).manifest.sections] for p in parts] == [["t1", "x1"], ["t2"], ["v1"]]
    assert all(verify(p).ok for p in parts)

    def refuse(*_: object) -> None:
        raise AssertionError("a tile was decoded or encoded")

    monkeypatch.setattr(stage, "encode_tile", refuse)
    monkeypatch.setattr("comtip_shards.format.record.decode_tile", refuse)
    report = merge_sets([parts[2], parts[0], parts[1]], tmp_path / "set")
    assert files_of(tmp_path / "set") == whole
    assert report.sections == ["t1", "t2", "v1", "x1"]
    # Merging again does nothing.
    merge_sets(parts, tmp_path / "set", jobs=2)
    assert files_of(tmp_path / "set") == whole
    with pytest.raises(ShardError, match="holds another shard set"):
        build_shards(open_source(tiny_source), parts[0], part=(2, 3), **SIZE)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ([0, 1], "missing parts of the build: 3/3"),
        ([0, 1, 1], "given twice"),
        ([], "nothing to merge"),
    ],
)
def test_parts_that_are_not_all_there(parts: list[Path], tmp_path: Path, chosen: list[int], message: str):
    with pytest.raises(ShardError, match=message):
        merge_sets([parts[i] for i in chosen], tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_parts_are_of_one_build(tiny_source: Path, parts: list[Path], tmp_path: Path):
    build_shards(open_source(tiny_source), tmp_path / "again", part=(1, 3), **SIZE)
    with pytest.raises(ShardError, match="are both part 1/3"):
        merge_sets([*parts, tmp_path / "again"], tmp_path / "set")
    build_shards(open_source(tiny_source), tmp_path / "split", part=(3, 3), splits={"v1": "train"}, **SIZE)
    with pytest.raises(ShardError, match="of another build"):
        merge_sets([*parts[:2], tmp_path / "split"], tmp_path / "set")
    build_shards(open_source(tiny_source), tmp_path / "whole", **SIZE)
    with pytest.raises(ShardError, match="is not a part of a build"):
        merge_sets([*parts, tmp_path / "whole"], tmp_path / "set")
    build_shards(open_source(tiny_source), tmp_path / "px", part=(1, 3), **{**SIZE, "tile_px": 48})
    with pytest.raises(ShardError, match=r"differ in tile: .*px=48.*px=32"):
        merge_sets([tmp_path / "px", *parts[1:]], tmp_path / "set")
    with pytest.raises(SourceError, match="`part` 5/5 is out of range for 4 sections"):
        build_shards(open_source(tiny_source), tmp_path / "five", part=(5, 5), **SIZE)


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two studies built separately, with different genes."""
    folder = tmp_path_factory.mktemp("studies")
    for number, name in enumerate("ab"):
        write_tiny_source(folder / f"s{name}", [TinySection(name, f"donor_{name}", "train")], side=4, seed=number)
    table = folder / "sb/b.tsv.gz"
    frame = pd.read_csv(table, sep="\t", index_col=0).rename(columns={"KRT14": "AMBP", "VIM": "ZYX"})
    frame.to_csv(table, sep="\t")
    for name in "ab":
        build_shards(open_source(folder / f"s{name}"), folder / name, **SIZE)
    return [folder / "a", folder / "b"]


def test_studies_merge_and_their_counts_follow_their_genes(studies: list[Path], tmp_path: Path):
    merge_sets(studies, tmp_path / "set")
    both = ShardSet(tmp_path / "set")
    assert verify(tmp_path / "set").ok
    names = [g.symbol for g in both.genes]
    for number, path in enumerate(studies):
        one = ShardSet(path)
        spots = both.select(sections=[number])
        columns = [names.index(g.symbol) for g in one.genes]
        got = both.counts(spots).toarray()
        np.testing.assert_array_equal(got[:, columns], one.counts(range(len(one))).toarray())
        assert got.sum() == one.counts(range(len(one))).sum()
        assert both.members(spots, "tile") == one.members(range(len(one)), "tile")
        assert both.spots.loc[spots, "spot_id"].tolist() == one.spots["spot_id"].tolist()
        assert set(np.flatnonzero(both.measured(number))) == set(columns)


def test_merging_refuses_duplicates_leaks_and_damage(studies: list[Path], tmp_path: Path):
    write_tiny_source(tmp_path / "s", [TinySection("a", "someone", "train")], side=4)
    build_shards(open_source(tmp_path / "s"), tmp_path / "twin", **SIZE)
    with pytest.raises(ShardError, match=r"section a is in .*/a and in .*/twin"):
        merge_sets([studies[0], tmp_path / "twin"], tmp_path / "set")
    write_tiny_source(tmp_path / "t", [TinySection("c", "donor_a", "test")], side=4)
    build_shards(open_source(tmp_path / "t"), tmp_path / "leak", **SIZE)
    with pytest.raises(SourceError, match="donor donor_a is in the test section c and in a"):
        merge_sets([studies[0], tmp_path / "leak"], tmp_path / "set")
    write_tiny_source(tmp_path / "u", [TinySection("d", "someone", "train")], side=4)
    build_shards(open_source(tmp_path / "u"), tmp_path / "hurt", **SIZE)
    rewrite(
        tmp_path / "hurt/shards/d-0000.tar", lambda m: m.update({"000000003.expr": m["000000003.expr"][:-1] + b"\0"})
    )
    with pytest.raises(ShardError, match=r"d-0000\.tar: record 000000003.*CRC-32"):
        merge_sets([studies[0], tmp_path / "hurt"], tmp_path / "set")
    assert not (tmp_path / "set/manifest.json").exists()


def test_other_package_versions_do_not_mix(studies: list[Path], tmp_path: Path):
    shutil.copytree(studies[1], tmp_path / "b")
    change_manifest(tmp_path / "b", lambda m: m["made_with"].update(pillow="1.0"), seal=True)
    with pytest.raises(ShardError, match=r"differ in made_with.*pillow"):
        merge_sets([studies[0], tmp_path / "b"], tmp_path / "set")


def test_numbers_are_written_one_way(tiny_source: Path, tmp_path: Path):
    """A source that states 4 and one that states 4.0 give the same bytes, merged or not."""
    sources = open_source(tiny_source, samples=["t1"])
    whole = [dataclasses.replace(s, meta=dataclasses.replace(s.meta, mpp=5, spot_diameter_um=100)) for s in sources]
    build_shards(whole, tmp_path / "int", **SIZE)  # type: ignore[arg-type]
    merge_sets([tmp_path / "int"], tmp_path / "merged")
    assert files_of(tmp_path / "int") == files_of(tmp_path / "merged")


def test_the_commands(tiny_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    how = ["--tile-px", "32", "--tile-um", "224", "--min-mpp", "5"]
    for part in ("1/2", "2/2"):
        out = str(tmp_path / part[0])
        assert main(["shards", "build", str(tiny_source), "--out", out, "--part", part, *how]) == 0
    assert main(["shards", "merge", str(tmp_path / "1"), str(tmp_path / "2"), "--out", str(tmp_path / "set")]) == 0
    assert "4 sections, 196 spots" in capsys.readouterr().out
    assert main(["shards", "verify", f"file://{tmp_path}/set"]) == 0
    assert "valid; 196 records" in capsys.readouterr().out
    assert main(["shards", "merge", str(tmp_path / "1"), "--out", str(tmp_path / "half")]) == 2
    assert "missing parts of the build: 2/2" in capsys.readouterr().err
    assert main(["shards", "build", str(tiny_source), "--out", str(tmp_path / "x"), "--quality", "0", *how]) == 2
    assert "quality 0 is out of range; use 1 to 100" in capsys.readouterr().err
    for bad in (["--part", "1-2"], ["--jobs", "0"]):
        with pytest.raises(SystemExit):
            main(["shards", "build", str(tiny_source), "--out", str(tmp_path / "x"), *bad])
