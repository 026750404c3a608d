"""``bench/gpu_evidence.py``: parts cost only their own rows, and a dry run reaches every branch without a GPU."""

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.evidence import bare, check, gather, runner
from bench.evidence.parts import cases_pytest, correct, step
from bench.evidence.rows import CHANNEL, COLUMNS, DRY_RUN, GPU, MEASURED, Rows, Table
from bench.evidence.runner import Outcome, Part, environment, run_parts
from comtip_fast.config.io import config_to_dict, load_config
from comtip_fast.config.schema import RunConfig

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("gpu_evidence", ROOT / "bench/gpu_evidence.py")
command = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(command)

PART = """
import os, subprocess, sys, time
from bench.evidence.rows import CHANNEL, Row, Rows
rows, kind = Rows(dry=False), sys.argv[1]
rows.add(Row("before", "x", 1.5))
if kind == "fails":
    raise RuntimeError("no such kernel")
if kind == "crashes":
    os.abort()
if kind == "hangs":
    os.write(int(os.environ[CHANNEL]), b'{"name": "half a ro')
    time.sleep(600)
if kind == "leaves a process":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], pass_fds=(int(os.environ[CHANNEL]),))
rows.add(Row("after", "x", 2.5))
"""


def run(
    tmp_path: Path, kinds: dict[str, float], seconds: float = 60.0
) -> tuple[list[dict[str, str]], dict[str, Outcome]]:
    """Run parts of the given kinds and deadlines; return the table's rows and the outcomes."""
    script = tmp_path / "part.py"
    script.write_text(PART)
    table = Table(tmp_path / "out.csv", {"mode": GPU, "commit": "abc"})
    outcomes = run_parts(
        [Part(kind, deadline, "") for kind, deadline in kinds.items()],
        lambda part: [sys.executable, str(script), part.name],
        table,
        seconds=seconds,
        log=tmp_path / "out.log",
        env=environment(False) | {"PYTHONPATH": str(ROOT)},
    )
    with (tmp_path / "out.csv").open(newline="") as file:  # not closed before: rows are flushed
        return list(csv.DictReader(file)), outcomes


def test_a_part_that_fails_or_hangs_costs_only_its_own_rows(tmp_path: Path):
    kinds = {"fails": 60.0, "crashes": 60.0, "hangs": 3.0, "leaves a process": 60.0, "runs": 60.0}
    rows, outcomes = run(tmp_path, kinds, seconds=300.0)
    sent = {kind: [r["name"] for r in rows if r["part"] == kind and r["name"] != "part"] for kind in kinds}
    assert sent == {
        "fails": ["before"],
        "crashes": ["before"],
        "hangs": ["before"],
        "leaves a process": ["before", "after"],
        "runs": ["before", "after"],
    }
    status = {kind: outcome.status for kind, outcome in outcomes.items()}
    assert status == dict(zip(kinds, ("failed", "failed", "deadline", "ok", "ok"), strict=True))
    assert "no such kernel" in outcomes["fails"].note
    assert outcomes["hangs"].seconds < 60
    assert [r["status"] for r in rows if r["name"] == "part"] == list(status.values())
    assert {r["commit"] for r in rows} == {"abc"}


@pytest.mark.parametrize(
    ("takes", "allowed"),
    [
        ({}, {"a": 50.0, "b": 25.0, "c": 25.0}),  # every part hangs: each is stopped at its share
        ({"a": 10.0}, {"a": 50.0, "b": 50.0, "c": 40.0}),  # what a leaves, b and c may use
        ({"a": 95.0}, {"a": 50.0}),  # a could not be killed in time
    ],
)
def test_no_part_keeps_a_later_one_from_running(
    takes: dict[str, float], allowed: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Deadlines that sum to more than the total once left no time for the last parts."""
    clock, given = [0.0], {}

    def run_part(part: Part, command: list[str], table: Table, seconds: float, *_: object) -> Outcome:
        given[part.name] = seconds
        clock[0] += takes.get(part.name, seconds)
        return Outcome("deadline", 0, seconds)

    monkeypatch.setattr(runner, "run_part", run_part)
    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    parts = [Part("a", 100.0, ""), Part("b", 50.0, ""), Part("c", 50.0, "")]
    table = Table(tmp_path / "out.csv", {"mode": GPU})
    outcomes = run_parts(parts, lambda part: [], table, seconds=100.0, log=tmp_path / "out.log")
    assert given == pytest.approx(allowed)
    assert clock[0] <= 100.0
    for name in outcomes.keys() - allowed.keys():
        assert outcomes[name].note.startswith("not started")


STOPPED = """
import os, sys
from pathlib import Path
from bench.evidence.rows import Table
from bench.evidence.runner import Part, exiting_on_signals, run_parts
folder = Path(sys.argv[1])
hangs = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
with exiting_on_signals():
    table = Table(folder / "out.csv", {"mode": "gpu"})
    run_parts([Part("hangs", 600, "")], lambda p: [sys.executable, "-c", hangs], table, seconds=600, log=folder / "log")
"""


def test_a_stopped_runner_kills_its_part(tmp_path: Path):
    """``timeout`` sends SIGTERM to the runner alone: a part that it left would keep the GPU."""
    runner_process = subprocess.Popen([sys.executable, "-c", STOPPED, str(tmp_path)], cwd=ROOT)
    log = tmp_path / "log"
    try:
        for _ in range(600):
            found = log.read_text().split("\n")[2:] if log.exists() else []
            if found and found[0].isdigit():
                break
            time.sleep(0.1)
        part = int(found[0])
        runner_process.terminate()
        assert runner_process.wait(60) == 128 + signal.SIGTERM
    finally:
        runner_process.kill()
        runner_process.wait()
    with pytest.raises(ProcessLookupError):
        os.kill(part, 0)


def test_kernels_are_interpreted_in_a_dry_run_only(monkeypatch: pytest.MonkeyPatch):
    """Otherwise a run on a GPU would time the interpreter, if a shell still has the variable."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" not in environment(False)
    assert environment(True)["TRITON_INTERPRET"] == "1"


def test_a_table_holds_one_mode(tmp_path: Path):
    path = tmp_path / "out.csv"
    table = Table(path, {"mode": DRY_RUN})
    table.write("p", {"name": "x"})
    table.close()
    with pytest.raises(ValueError, match="has rows of mode dry_run; give another --out"):
        Table(path, {"mode": GPU})
    Table(path, {"mode": DRY_RUN}).close()
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has other columns"):
        Table(path, {"mode": GPU})


def test_no_row_of_a_dry_run_is_committed():
    path = ROOT / "bench/gpu_evidence.csv"
    if not path.exists():
        pytest.skip("no GPU has run it yet")
    with path.open(newline="") as file:
        assert {row["mode"] for row in csv.DictReader(file)} == {GPU}


def test_without_a_gpu_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(command, "describe", lambda dry, env: {"gpu": "none", "mode": GPU})
    assert command.main(["--out", str(tmp_path / "x.csv")]) == 2
    assert "use --dry-run to run every branch" in capsys.readouterr().err
    assert not (tmp_path / "x.csv").exists()
    assert command.main(["--only", "step,stpe"]) == 2
    assert "choose from ceilings, " in capsys.readouterr().err


def test_deadlines_and_order_fit_nine_minutes():
    names = [p.name for p in command.PARTS]
    core = ["ceilings", "correct", "step", "timings", "curve", "resume", "nccl"]
    assert names[: len(core)] == core
    assert sum(p.seconds for p in command.PARTS[: len(core)]) <= 9 * 60 - 15


@pytest.mark.parametrize(("more", "factor"), [(["--dry-run"], runner.DRY_FACTOR), ([], 1.0)])
def test_a_dry_run_has_longer_deadlines(
    more: list[str], factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given = {}

    def record(parts: list[Part], *_: object, seconds: float, **__: object) -> dict[str, Outcome]:
        given.update({p.name: p.seconds for p in parts}, total=seconds)
        return {}

    monkeypatch.setattr(command, "run_parts", record)
    monkeypatch.setattr(command, "describe", lambda dry, env: {"gpu": "one", "mode": DRY_RUN if dry else GPU})
    assert command.main([*more, "--minutes", "2", "--out", str(tmp_path / "x.csv")]) == 0
    assert given == {p.name: factor * p.seconds for p in command.PARTS} | {"total": factor * 120}
    assert f"{runner.DRY_FACTOR:.0f} times as long" in command.__doc__


@pytest.fixture(scope="module")
def dry_rows() -> list[dict[str, str]]:
    """Rows of every part; in one process, because imports take longer than the parts."""
    code = (
        "import runpy; space = runpy.run_path('bench/gpu_evidence.py', run_name='walk')\n"
        "for part in space['PARTS']:\n"
        "    print('PART', part.name, flush=True); space['run_here'](part.name, True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(True),
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    rows, part = [], ""
    for line in done.stdout.splitlines():
        if line.startswith("PART "):
            part = line.split()[1]
        elif "{" in line:  # pytest prints a dot before a row
            rows.append({"part": part} | json.loads(line[line.index("{") :]))
    return rows


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the first of them runs all parts: about a minute on an idle machine
def test_a_dry_run_reaches_every_part(dry_rows: list[dict[str, str]]):
    assert {r["part"] for r in dry_rows} == {p.name for p in command.PARTS}
    failed = [r for r in dry_rows if r["status"] == "failed"]
    assert not failed, failed
    assert set(dry_rows[0]) - {"part"} <= set(COLUMNS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_dry_run_keeps_no_measured_number(dry_rows: list[dict[str, str]]):
    measured = [r for r in dry_rows if r["unit"] in MEASURED]
    assert len(measured) > 50
    assert all(r["value"] == r["low"] == r["high"] == "" for r in measured)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_dry_run_checks_and_times_every_operation(dry_rows: list[dict[str, str]]):
    ops = {
        "infonce",
        "infonce_block",
        "gene_sentence_embedding",
        "packed_attention",
        "one_query_attention",
        "table_pool",
        "level_cross_entropy",
        "pair_scores",
        "residual_norm",
        "bias_gelu",
        "image_attention",
    }
    checked = {r["name"] for r in dry_rows if r["metric"] == "largest error of a row" and r["part"] == "correct"}
    assert checked == ops
    for which in ("forward", "backward"):
        ours = {
            r["name"] for r in dry_rows if r["part"] == "timings" and r["metric"] == which and r["provider"] == "ours"
        }
        assert ours == ops
    providers = {r["provider"] for r in dry_rows if r["part"] == "timings"}
    assert {
        "eager",
        "sdpa, padded",
        "sdpa",
        "cuBLAS, the products alone",
        "liger, both directions",
        "flash",
        "varlen",
    } <= providers
    metrics = {r["metric"] for r in dry_rows if r["part"] == "step"}
    assert {"speed", "utilisation", "peak memory of tensors", "time in one step", "steps with a finite loss"} <= metrics


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "configs").glob("*.yaml")))
def test_configs_are_read_without_pydantic(name: str):
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert bare.build(RunConfig, json.loads(json.dumps(config_to_dict(config)))) == config


REFUSE = """
import importlib.abc, importlib.machinery, sys
class Refused(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        packages = "pydantic pandas pyarrow scipy anndata h5py joblib deepspeed tensorboard sklearn matplotlib".split()
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] in packages else None
    def create_module(self, spec):
        raise ModuleNotFoundError(spec.name + " is refused", name=spec.name)
    def exec_module(self, module): ...
sys.meta_path.insert(0, Refused())
import runpy
space = runpy.run_path("bench/gpu_evidence.py", run_name="walk")
space["run_here"]("resume", True)
import importlib
for part in space["PARTS"]:
    importlib.import_module(part.target)
import pandas
try:
    pandas.read_csv("x").columns
except ModuleNotFoundError as error:
    print(error)
"""


@pytest.mark.slow
def test_parts_run_without_the_packages_of_shards_and_reports():
    done = subprocess.run(
        [sys.executable, "-c", REFUSE], cwd=ROOT, env=environment(True), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *rows, last = done.stdout.splitlines()
    assert {json.loads(row)["status"] for row in rows} == {"ok"}
    assert last == "pandas is not installed; install it to run this part"


def test_spans_of_annotations_are_no_kernels():
    kernel, span = (SimpleNamespace(device_type="DeviceType.CUDA", is_user_annotation=u) for u in (False, True))
    assert step._is_kernel(kernel, on_gpu=True)
    assert not step._is_kernel(span, on_gpu=True)
    assert not step._is_kernel(SimpleNamespace(device_type="DeviceType.CPU"), on_gpu=True)


def test_a_machine_without_git_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command.commit() == ""


def test_the_test_cases_are_skipped_without_pytest(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.delenv(CHANNEL, raising=False)
    monkeypatch.setattr(cases_pytest, "why_not", lambda module: f"{module} cannot be imported")
    cases_pytest.run(Rows(dry=True), dry=True)
    row = json.loads(capsys.readouterr().out)
    assert (row["status"], row["note"]) == ("skipped", "pytest cannot be imported")


def test_gather_states_sizes_and_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    calls = []

    def pip(arguments: list[str], **variables: str) -> int:
        calls.append(arguments)
        name = arguments[-1].split("=")[0].split(">")[0]
        if name == "pydantic":
            with zipfile.ZipFile(tmp_path / "pydantic-2.9-py3-none-any.whl", "w") as wheel:
                wheel.writestr("pydantic-2.9.dist-info/METADATA", "Name: x\nRequires-Dist: pydantic-core==2.23.4\n")
        elif name == "liger-kernel":
            return 1
        else:
            (tmp_path / f"{name}-1-py3-none-any.whl").write_bytes(b"x" * 1000)
        return 0

    monkeypatch.setattr(gather, "_pip", pip)
    assert gather.gather(tmp_path) == 0
    wanted = [words[-1] for words in calls]
    assert "pydantic-core==2.23.4" in wanted
    assert all("--no-deps" in words for words in calls)
    out = capsys.readouterr().out
    assert "its comparison will be skipped: liger-kernel" in out
    assert "of at most 64 MiB" in out
    monkeypatch.setattr(gather, "LIMIT", 1000)
    assert gather.gather(tmp_path) == 1


def test_correctness_is_checked_in_several_processes(monkeypatch: pytest.MonkeyPatch):
    started, codes = [], [0] * correct.PROCESSES

    class Process:
        def __init__(self, command: list[str], env: dict[str, str], pass_fds: list[int]) -> None:
            started.append((env[correct.SHARE], pass_fds))

        def wait(self) -> int:
            return codes[len(started) - 1]

    monkeypatch.setattr(correct.subprocess, "Popen", Process)
    monkeypatch.setenv(CHANNEL, "7")
    monkeypatch.delenv(correct.SHARE, raising=False)
    correct.run(Rows(dry=False), dry=False)
    assert started == [(f"{i}/{correct.PROCESSES}", [7]) for i in range(correct.PROCESSES)]
    started.clear()
    codes[-1] = 1
    with pytest.raises(RuntimeError, match="of 6 failed"):
        correct.run(Rows(dry=False), dry=False)


def test_the_cases_are_the_files_that_the_interpreter_shares():
    spec = importlib.util.spec_from_file_location("interpreted", ROOT / "tests/kernels/test_interpreted.py")
    interpreted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(interpreted)
    assert sorted(cases_pytest.FILES) == sorted(interpreted.SHARED)


def test_every_file_of_cases_has_cases_for_a_gpu():
    found = set()

    class Collected:
        def pytest_collection_finish(self, session: pytest.Session) -> None:
            found.update(item.path.name for item in session.items)

    files = [str(ROOT / "tests/kernels" / name) for name in cases_pytest.FILES]
    options = ["--collect-only", "-q", "-m", "gpu", f"--confcutdir={ROOT / 'tests/kernels'}", f"--rootdir={ROOT}"]
    options += ["-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider"]
    assert pytest.main([*files, *options], plugins=[Collected()]) == 0
    assert found == set(cases_pytest.FILES)


def test_a_precision_that_the_kernels_refuse_is_not_checked(monkeypatch: pytest.MonkeyPatch, capsys):
    """Regression test: on a GPU, ``bench/kernels/gpu.py`` ended at sentences of 32 tokens, which fp32 without tf32 does not support."""

    def compare(case: object, precision: check.Precision) -> check.Checked:
        if precision.name == "fp32":
            raise ValueError(
                "packed_attention: a sentence has 32 tokens and impl='triton' supports 24; use impl='auto'"
            )
        return check.Checked(0, 0.0, None, 1.0)

    monkeypatch.setattr(check, "compare", compare)
    check.check(SimpleNamespace(op="packed_attention", size="longest=32"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["impl='auto'", "correct"]
    assert "not checked in fp32" in lines[0]
    monkeypatch.setattr(check, "is_refusal", lambda error: False)
    with pytest.raises(ValueError, match="supports 24"):
        check.check(SimpleNamespace(op="packed_attention", size="longest=32"))
