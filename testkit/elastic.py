"""Run ``comtip pretrain`` under torchrun's agent with breakdowns set off in its ranks.

``python -m testkit.elastic SPEC.json`` is one agent (a node). Ranks are forks of a server unless the spec asks
for fresh interpreters, as torchrun starts them: a fork has its imports done, so that many restarts fit into a test.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from testkit.breakdowns import Breakdown, Stamps, arm, at_every_step
from testkit.distributed import free_port

PRELOAD = [f"comtip_fast.{m}" for m in ("cli.pretrain", "plan.live", "training.task", "training.trainer")]


@dataclass(frozen=True)
class Spec:
    """What an agent runs; written to JSON."""

    arguments: list[str]
    """Of ``comtip``: ``["pretrain", ...]``."""
    run_dir: str
    folder: str
    """Logs of ranks and stamps."""
    breakdowns: dict[int, Breakdown] = field(default_factory=dict)
    """{attempt: breakdown}; a restart is the next attempt."""
    ranks: int = 2
    nodes: tuple[int, int] = (1, 1)
    """Least and most agents."""
    max_restarts: int = 3
    port: int = 0
    """Of the rendezvous, where there are several agents; the first agent to come serves it."""
    fresh: bool = False
    step_s: float = 0.0
    """Sleep before every step, so that an agent has time to come while the run lasts."""
    shutdown_s: int = 3
    """How long the agent waits for ranks that it asked to end."""

    @property
    def stamps(self) -> Path:
        """File of stamps."""
        return Path(self.folder) / "stamps.jsonl"

    @property
    def path(self) -> Path:
        """Where it is written."""
        return Path(self.folder) / "spec.json"

    def write(self) -> Path:
        """Write as JSON to :attr:`path` and return it."""
        self.path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return self.path

    @classmethod
    def read(cls, path: Path) -> Spec:
        """Read what :meth:`write` wrote."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        raw["breakdowns"] = {
            int(k): Breakdown(**v | {"settings": tuple(v["settings"])}) for k, v in raw["breakdowns"].items()
        }
        return cls(**raw | {"nodes": tuple(raw["nodes"])})


def worker(spec: Spec) -> int:
    """Be one rank: arm its breakdown, run the command; another code than 0 ends the process with it."""
    for number in (signal.SIGTERM, signal.SIGINT):  # the agent's handlers are not ours
        signal.signal(number, signal.SIG_DFL)
    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    stamps = Stamps(spec.stamps, rank, attempt)
    stamps.write("start", node=int(os.environ["GROUP_RANK"]))
    breakdown = spec.breakdowns.get(attempt)
    if breakdown is not None and breakdown.rank == rank:
        arm(breakdown, Path(spec.run_dir), stamps)
    world = int(os.environ["WORLD_SIZE"])

    def stamp(step: int) -> None:
        stamps.write("step", step=step, world=world)
        time.sleep(spec.step_s)

    at_every_step(stamp)
    from comtip_fast.cli import main

    more = [word for setting in (breakdown.settings if breakdown else ()) for word in ("--set", setting)]
    code = main([*spec.arguments, *more])
    stamps.write("end", code=code)
    sys.stdout.flush(), sys.stderr.flush()
    if code:
        os._exit(code)
    return code


def agent(spec_path: Path) -> int:
    """Be one torchrun agent; return 0, or 1 where ranks failed more often than ``max_restarts``."""
    spec = Spec.read(spec_path)
    endpoint = f"127.0.0.1:{spec.port or free_port()}"
    config = LaunchConfig(
        min_nodes=spec.nodes[0],
        max_nodes=spec.nodes[1],
        nproc_per_node=spec.ranks,
        run_id="faults",
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        max_restarts=spec.max_restarts,
        monitor_interval=0.05,
        start_method="forkserver",
        local_addr="127.0.0.1",
        shutdown_timeout=spec.shutdown_s,
        # A lost agent is noticed when its heartbeats stop; torchrun's own values are 5 s and 3.
        rdzv_configs={"keep_alive_interval": 1, "keep_alive_max_attempt": 3, "last_call_timeout": 2},
        logs_specs=DefaultLogsSpecs(log_dir=str(Path(spec.folder) / f"agent{os.getpid()}"), redirects=Std.ALL),
    )
    try:
        if spec.fresh:
            elastic_launch(config, sys.executable)("-u", "-m", __spec__.name, "--worker", str(spec_path))
        else:
            # A server without threads imports once and forks; forking the agent, which has threads, can deadlock.
            multiprocessing.set_forkserver_preload([__spec__.name, *PRELOAD])
            elastic_launch(config, importlib.import_module(__spec__.name).worker)(spec)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def start_agent(spec_path: Path) -> subprocess.Popen[bytes]:
    """Start an agent in a session of its own, so that a whole node can be killed by its group."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    log = spec_path.with_suffix(f".agent{len(list(spec_path.parent.glob('*.agent*.log')))}.log").open("wb")
    command = [sys.executable, "-m", __spec__.name, str(spec_path)]
    with log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def said_by(folder: Path, attempt: int, rank: int) -> str:
    """Return what a rank of a one-agent run wrote to stderr in an attempt."""
    found = sorted(folder.glob(f"agent*/*/attempt_{attempt}/{rank}/stderr.log"))
    return "".join(p.read_text(encoding="utf-8", errors="replace") for p in found)


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        worker(Spec.read(Path(sys.argv[2])))
    else:
        sys.exit(agent(Path(sys.argv[1])))
