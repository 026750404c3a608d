"""A run continues without the readers of its log and saves a checkpoint when its terminal is closed."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from comtip_shards import ShardSet

from comtip_fast import pretraining
from comtip_fast.cli import main
from comtip_fast.runtime import streams
from comtip_fast.training.checkpoint import store as checkpoint
from comtip_fast.training.checkpoint.resume import CHECKPOINTS
from comtip_fast.training.distributed import failures
from comtip_fast.training.monitor.loggers import BestEffort
from comtip_fast.training.trainer import FitResult
from tests.comtip_fast.trainer_standin import fit

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in (".", "kernels", "data_shards")),
    "OMP_NUM_THREADS": "1",
}
# Writes to both streams in each step, as warnings of any library do.
TRAIN = """
import logging, os, sys
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
from pathlib import Path
from tests.comtip_fast.trainer_standin import fit
from comtip_fast.runtime.streams import drain

def at_step(step):
    logging.getLogger("comtip_fast").warning("x" * 100)
    if step == 3 and os.environ.get("SEND"):
        os.kill(os.getpid(), int(os.environ["SEND"]))

result = fit(Path(sys.argv[1]), at_step=at_step)
Path(sys.argv[1] + ".json").write_text(f'["{result.stopped}", {result.step}]')
drain(sys.stdout), drain(sys.stderr)
"""


def train(folder: Path, **streams_of: object) -> subprocess.Popen[bytes]:
    send = str(streams_of.pop("send", ""))
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(folder)],
        cwd=ROOT,
        env=ENVIRONMENT | {"SEND": send},
        **streams_of,  # type: ignore[call-overload]
    )


def ended(folder: Path, process: subprocess.Popen[bytes]) -> tuple[int, list[object]]:
    code = process.wait(120)
    assert code == 0
    stopped, step = json.loads(folder.with_name(f"{folder.name}.json").read_text())
    return step, stopped


def test_a_log_without_a_reader_does_not_end_a_run(tmp_path: Path):
    runs = {}
    for kind in ("pipe", "full"):
        reader, writer = os.pipe()
        os.close(reader)
        target = writer if kind == "pipe" else os.open("/dev/full", os.O_WRONLY)
        runs[kind] = train(tmp_path / kind, stderr=target, stdout=target)
        os.close(writer)
    for kind, process in runs.items():
        assert ended(tmp_path / kind, process) == (17, "steps")
        assert (tmp_path / kind / "export" / "model.safetensors").is_file()
        assert len((tmp_path / kind / "metrics.jsonl").read_text().splitlines()) == 17 + 6


def test_a_hangup_saves_and_stops_and_nohup_is_honoured(tmp_path: Path):
    quiet = {"stderr": subprocess.DEVNULL, "send": int(signal.SIGHUP)}
    # The tests themselves may run under nohup.
    hung_up = train(tmp_path / "hup", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL), **quiet)
    # What nohup does: the signal is ignored before Python starts.
    nohup = train(tmp_path / "nohup", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN), **quiet)
    assert ended(tmp_path / "hup", hung_up) == (3, "sigterm")
    assert checkpoint.steps_of(tmp_path / "hup" / CHECKPOINTS) == [3]
    assert ended(tmp_path / "nohup", nohup) == (17, "steps")
    fit(tmp_path / "hup", resume=True)
    one, other = (tmp_path / name / "export" / "model.safetensors" for name in ("hup", "nohup"))
    assert one.read_bytes() == other.read_bytes()


class Failing:
    """A logger that fails in one row."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []

    def log(self, row: dict[str, object]) -> None:
        if row["step"] == 2:
            raise ConnectionError("the service is away")
        self.rows.append(row)

    def close(self) -> None:
        raise ConnectionError("the service is away")


def test_a_logger_that_fails_is_left_out(caplog: pytest.LogCaptureFixture):
    inner = Failing()
    logger = BestEffort(inner)
    for step in range(1, 5):
        logger.log({"step": step})
    logger.close()
    assert inner.rows == [{"step": 1}]
    assert [m for m in caplog.messages if m.startswith("Failing failed")] == [
        "Failing failed and is disabled, training continues: ConnectionError: the service is away"
    ]


class Broken(io.TextIOBase):
    def __init__(self, number: int) -> None:
        self.number = number

    def write(self, _text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))

    def flush(self) -> None:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EBADF])
def test_a_line_that_is_not_taken_is_no_error(number: int):
    assert streams.write_line("x", Broken(number)) is False
    assert streams.drain(Broken(number)) is not None
    assert streams.write_line("x", None) is False
    closed = io.StringIO()
    closed.close()
    assert streams.write_line("x", closed) is False
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert streams.write_line("µm", ascii_only) is True


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_a_write_to_the_log_of_a_command_never_raises(number: int, monkeypatch: pytest.MonkeyPatch):
    """Progress bars, warnings and tracebacks of libraries write to sys.stderr without a handler for errors."""
    closed = io.StringIO()
    closed.close()
    for stream in (Broken(number), closed):
        monkeypatch.setattr(sys, "stderr", stream)
        with streams.guarded_stderr():
            print("x", file=sys.stderr, flush=True)
        assert sys.stderr is stream
    monkeypatch.setattr(sys, "stderr", None)  # pythonw, or a service
    with streams.guarded_stderr():
        assert sys.stderr is None


def test_the_watchdog_ends_a_process_whose_streams_are_broken():
    script = (
        "import sys, io\n"
        "class Broken(io.TextIOBase):\n"
        "    def write(self, text): raise BrokenPipeError(32, 'Broken pipe')\n"
        "    def flush(self): raise BrokenPipeError(32, 'Broken pipe')\n"
        "sys.stdout = sys.stderr = Broken()\n"
        "from comtip_fast.training.distributed.failures import no_longer_than\n"
        "import time\n"
        "with no_longer_than(0.1, 'this'): time.sleep(120)\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=ENVIRONMENT, timeout=150, check=False)
    assert done.returncode == failures.RESTART_CODE
    assert time.monotonic() - began < 100


def comtip(*arguments: str, **kinds: object) -> subprocess.CompletedProcess[str]:
    code = "import sys; from comtip_fast.cli import main; sys.exit(main())"
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        timeout=240,
        check=False,
        **kinds,
    )


@pytest.fixture
def pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a command whose run ends without a validation: its score is -inf, for which JSON has no number."""
    result = FitResult(step=2, best_step=0, best_score=-math.inf, stopped="steps")
    monkeypatch.setattr(pretraining, "pretrain", lambda *_, **__: result)
    (tmp_path / "c.yaml").write_text("{}\n")
    return ["pretrain", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]


def test_the_summary_of_a_run_is_json(pretrained: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(pretrained) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["best_score"] is None


def test_a_run_whose_output_is_closed_has_ended_well(pretrained: list[str], monkeypatch: pytest.MonkeyPatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(pretrained) == 0


@pytest.mark.slow
def test_commands_whose_output_nobody_reads_end_without_a_traceback(
    tiny_shards: ShardSet, tiny_overrides: list[str], tmp_path: Path
):
    reader, writer = os.pipe()
    os.close(reader)
    done = comtip("genes", "ERBB2", stdout=writer, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (141, "")
    # Without validation there is no score: null, as JSON has no -Infinity.
    config = tmp_path / "c.yaml"
    config.write_text("{}\n")
    more = ["train.steps=2", "train.validate_every=0", "train.device=cpu"]
    settings = [f"--set={o}" for o in (*tiny_overrides, *more)]
    done = comtip("pretrain", "--config", str(config), "--out", str(tmp_path / "a"), *settings, stdout=subprocess.PIPE)
    assert json.loads(done.stdout.splitlines()[-1], parse_constant=pytest.fail)["best_score"] is None
    done = comtip(
        "pretrain",
        "--config",
        str(config),
        "--out",
        str(tmp_path / "b"),
        *settings,
        stdout=writer,
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
