"""The SLURM scripts, run by bash with stubs of the SLURM commands: what they start, and how they handle signals."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "configs" / "slurm").glob("*.sbatch"))
STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$@" >> "$HERE/scontrol"; fi',
    # scancel signals the steps of a job, not its batch script.
    "scancel": 'echo "$@" >> "$HERE/scancel"; kill -TERM "$(cat "$HERE/pid")"',
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    # Like comtip: on SIGTERM it needs a moment to save, then exits with 143.
    "comtip": """
echo "$@" > "$HERE/arguments"; echo $$ > "$HERE/pid"
[ -z "${ENDS_WITH:-}" ] || exit "$ENDS_WITH"
trap 'sleep 0.3; echo saved > "$HERE/saved"; exit 143' TERM
while true; do sleep 0.05; done""",
    "torchrun": 'echo "$@" > "$HERE/torchrun"; while [ "$1" != comtip ]; do shift; done; exec "$@"',
    "apptainer": 'echo "$@" > "$HERE/apptainer"; while [ "$1" != torchrun ]; do shift; done; exec "$@"',
}


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which the SLURM commands are stubs that record their calls in ``HERE``."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in STAND_INS.items():
        path = commands / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    return {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "HERE": str(tmp_path),
        "CONFIG": "c.yaml",
        "RUN": str(tmp_path / "run"),
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS": "16",
        "SLURM_GPUS_ON_NODE": "8",
        "IMAGE": "comtip.sif",
        "SLURM_SUBMIT_DIR": str(SCRIPTS[0].parents[2]),
    }


def read(here: str, name: str) -> str:
    path = Path(here) / name
    return path.read_text() if path.exists() else ""


def wait_for(path: Path) -> None:
    for _ in range(200):
        if path.exists() and path.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path.name} was not written")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_a_script_is_sound(script: Path):
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not here; it comes with the extra 'test'")
    checked = subprocess.run(
        [shellcheck, "-x", script.name], cwd=script.parent, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_sigterm_saves_and_requeues(script: Path, cluster: dict[str, str]):
    with subprocess.Popen(
        ["bash", script], env=cluster, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        wait_for(Path(cluster["HERE"]) / "pid")
        job.send_signal(signal.SIGTERM)
        output, _ = job.communicate(timeout=20)
    assert job.returncode == 0, output
    assert read(cluster["HERE"], "saved") == "saved\n"
    assert read(cluster["HERE"], "scancel").split() == ["--signal=TERM", "42"]
    assert read(cluster["HERE"], "scontrol").split() == ["requeue", "42"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_what_is_started(script: Path, cluster: dict[str, str]):
    more = {"ENDS_WITH": "0", "SHARDS": "my/shards", "EXTRA": "--set train.seed=3", "BIND": "/data"}
    done = subprocess.run(["bash", script], env=cluster | more, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wanted = f"pretrain --config c.yaml --out {cluster['RUN']} --resume --set data.shards=my/shards --set train.seed=3"
    assert read(cluster["HERE"], "arguments").strip() == wanted
    assert read(cluster["HERE"], "scontrol") == ""
    if script.stem != "pretrain_srun":
        launched = read(cluster["HERE"], "torchrun")
        for part in (
            "--nnodes=2",
            "--nproc-per-node=8",
            "--rdzv-endpoint=node7:20042",
            "--rdzv-id=42",
            "--max-restarts=3",
        ):
            assert part in launched
    if script.stem == "pretrain_container":
        assert read(cluster["HERE"], "apptainer").startswith(
            f"exec --nv --bind {Path.cwd()},/data --pwd {Path.cwd()} comtip.sif torchrun"
        )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_bad_input_ends_the_job(script: Path, cluster: dict[str, str]):
    done = subprocess.run(
        ["bash", script], env=cluster | {"ENDS_WITH": "2"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert read(cluster["HERE"], "scontrol") == ""
    del cluster["RUN"]
    done = subprocess.run(["bash", script], env=cluster, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "set RUN" in done.stderr


def test_a_rank_that_dies_without_torchrun_sends_the_job_back(cluster: dict[str, str]):
    script = next(s for s in SCRIPTS if s.stem == "pretrain_srun")
    done = subprocess.run(
        ["bash", script], env=cluster | {"ENDS_WITH": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert read(cluster["HERE"], "scontrol").split() == ["requeue", "42"]
    again = subprocess.run(
        ["bash", script],
        env=cluster | {"ENDS_WITH": "1", "SLURM_RESTART_COUNT": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 1
