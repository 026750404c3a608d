"""Mutated sources of every format are read or refused by name; the nightly run is ``python -m testkit.fuzz``."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from comtip_shards import SourceError
from comtip_shards.errors import UnforeseenError
from comtip_shards.sources.base import named

from testkit.source_fuzz import run as source_fuzz
from testkit.source_fuzz.corpus import SOURCES
from testkit.source_fuzz.mutate import REPLACEMENTS
from testkit.source_fuzz.run import SourceFuzzer

pytest.importorskip("tifffile")
N_CASES, BLOCKS = 300, 10


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> SourceFuzzer:
    return SourceFuzzer(tmp_path_factory.mktemp("fuzz"), seed=0, limit_s=30)


def test_intact_sources_are_read(fuzzer: SourceFuzzer):
    outcomes = {name: fuzzer.intact_outcome(name) for name in SOURCES}
    assert {name: o.detail for name, o in outcomes.items() if o.outcome != "reads"} == {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", range(BLOCKS))
def test_mutated_sources_are_read_or_refused_by_name(fuzzer: SourceFuzzer, block: int):
    size = N_CASES // BLOCKS
    outcomes = [fuzzer.run(number) for number in range(block * size, (block + 1) * size)]
    assert [o for o in outcomes if o.outcome == "escaped"] == []
    assert {o.outcome for o in outcomes} == {"reads", "refused"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("seed", "number"),
    [
        (29111, 117),
        (29111, 1010),
        (29111, 1796),
        (29112, 1024),
        (29111, 4797),
        (29112, 4311),
        (30000, 4982),
        (30000, 8636),
    ],
)
def test_cases_that_once_escaped(tmp_path: Path, seed: int, number: int):
    """A pitch of 0, counts in half precision, an attribute that is an array, a flag that is binary, a JPEG that ends in a hole,
    an image named by its temporary copy, counts of bins that are not finite, a distance that is a URL, counts that are text."""
    outcome = SourceFuzzer(tmp_path, seed=seed, limit_s=30).run(number)
    assert outcome.outcome in ("reads", "refused"), outcome.detail


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SOURCES)
def test_every_file_of_a_source_may_be_no_file(fuzzer: SourceFuzzer, name: str):
    """Every file in turn is missing, a folder, a pipe, a link to nothing, or a web page."""
    kinds = [kind for kind in REPLACEMENTS if kind not in ("other file", "sparse", "endless")]
    outcomes = [fuzzer.run_replaced(name, file, kind) for file in fuzzer.files_of(name) for kind in kinds]
    assert [o for o in outcomes if o.outcome == "escaped"] == []


@pytest.mark.filterwarnings("ignore")
def test_a_matrix_of_counts_may_be_any_file(fuzzer: SourceFuzzer):
    """SciPy's reader of Matrix Market files once ended the process on a PNG."""
    root = fuzzer.intact / "visium_mex"

    def change(case: Path) -> str:
        shutil.copy(root / "spatial" / "tissue_hires_image.png", next(case.rglob("matrix.mtx.gz")))
        return "a PNG"

    outcome = fuzzer._judge("visium mex", fuzzer.folder / "case", change, -1)
    assert (outcome.outcome, "matrix.mtx.gz" in outcome.detail) == ("refused", True)


# -- the judge ---------------------------------------------------------------------------------------------------------


def hang(path: Path, source: object, out: Path) -> None:
    try:
        time.sleep(30)
    except Exception:  # a reader that handles everything
        return


def write_outside(path: Path, source: object, out: Path) -> None:
    (out.parent / "outside.txt").write_text("x")


def write_into_the_source(path: Path, source: object, out: Path) -> None:
    os.utime(next(p for p in path.rglob("*") if p.is_file()))


def use_memory(path: Path, source: object, out: Path) -> None:
    blocks = []  # as many as it takes: the operating system may take back pages of other data meanwhile
    wanted = source_fuzz._rss_bytes() + (400 << 20)
    while source_fuzz._rss_bytes() < wanted and len(blocks) < 100:
        blocks.append(np.ones(20 << 20, np.uint8))


def start_a_process(path: Path, source: object, out: Path) -> None:
    os.system("true")


def refuse_without_a_name(path: Path, source: object, out: Path) -> None:
    raise SourceError("something is wrong")


def crash(path: Path, source: object, out: Path) -> None:
    raise KeyError("x")


def unforeseen(path: Path, source: object, out: Path) -> None:
    with named("section a", ()):
        raise KeyError("x")


@pytest.mark.parametrize(
    ("through", "told"),
    [
        (hang, "hang"),
        (write_outside, "changes outside the output folder.*outside"),
        (write_into_the_source, "the source was changed"),
        (use_memory, "MiB of memory"),
        (start_a_process, "os.system"),
        (refuse_without_a_name, "names neither file nor section"),
        (crash, "KeyError"),
        (unforeseen, "KeyError"),
    ],
)
def test_the_judge_sees_what_escapes(fuzzer: SourceFuzzer, through, told: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fuzzer, "through", through)
    monkeypatch.setattr(fuzzer, "limit_s", 1 if through is hang else 60)
    if through is use_memory:
        gc.collect()
        # Whatever this process holds already, the 400 MB of the case exceed the limit.
        ballast = np.ones(500 << 20, np.uint8)
        assert ballast[0]
        monkeypatch.setattr(source_fuzz, "MEMORY_BYTES", source_fuzz.REST_BYTES + (100 << 20))
    outcome = fuzzer.intact_outcome("visium h5")
    assert outcome.outcome == "escaped"
    assert re.search(told, outcome.detail)


def write_and_remove_a_folder(path: Path, source: object, out: Path) -> None:
    (out / "a" / "b").mkdir(parents=True)
    (out / "a" / "b" / "c").write_text("x")
    shutil.rmtree(out / "a")  # removes files by their names in an open folder


def test_changes_in_the_output_folder_are_allowed(fuzzer: SourceFuzzer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fuzzer, "through", write_and_remove_a_folder)
    assert fuzzer.intact_outcome("visium h5").outcome == "reads"


def test_a_case_is_reproduced_by_its_number(fuzzer: SourceFuzzer, tmp_path: Path):
    again = SourceFuzzer(tmp_path, seed=0)
    for number in (3, 7):
        one, two = fuzzer.run(number), again.run(number)
        assert (one.source, one.what, one.outcome) == (two.source, two.what, two.outcome)


def test_a_run_resumes_and_counts_a_case_that_ended_the_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = tmp_path / "log.jsonl"
    log.write_text('{"seed": 5, "through": "readers", "start": 1}\n')
    assert source_fuzz.main(["--seed", "5", "--count", "2", "--log", str(log)]) == 1
    assert "the process ended" in capsys.readouterr().out
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [r["number"] for r in rows if "number" in r] == [1, 0]
    size = log.stat().st_size
    source_fuzz.main(["--seed", "5", "--count", "2", "--log", str(log)])
    assert log.stat().st_size == size


def test_any_error_of_a_library_names_the_section():
    with (
        pytest.raises(UnforeseenError, match=r"section s1: cannot be read \(ZeroDivisionError: .*check that its files"),
        named("section s1", ()),
    ):
        1 / 0  # noqa: B018
    with pytest.raises(SourceError, match="section s1: no name"), named("section s1", ()):
        raise SourceError("no name")
    with pytest.raises(SourceError, match=r"^a\.csv: bad"), named("section s1", (Path("x/a.csv"),)):
        raise SourceError("a.csv: bad")
