"""Run ``comtip pretrain`` under torchrun's elastic agent with failures injected into its ranks.

``python -m testkit.elastic SPEC.json ADDRESS`` runs one agent, which represents one node. By default, ranks are forked from a
server process that has already imported everything, so that a restart is cheap; with ``fresh``, they are started as new
interpreters, as by torchrun.
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
from torch.distributed.elastic.rendezvous import rendezvous_handler_registry
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from comtip_fast.training.distributed import rendezvous
from testkit.distributed import free_port
from testkit.fault_injection import EventLog, InjectedFailure, arm, on_every_step
from testkit.network import Host

PRELOAD = [f"comtip_fast.{m}" for m in ("cli.pretrain", "plan.live", "training.task", "training.trainer")]


@dataclass(frozen=True)
class Spec:
    """Configuration of the agents of one run, stored as JSON."""

    arguments: list[str]
    """Arguments of ``comtip``: ``["pretrain", ...]``."""
    run_dir: str
    """Folder of the training run."""
    folder: str
    """Folder for the ranks' logs and the event log."""
    failures: dict[int, InjectedFailure] = field(default_factory=dict)
    """{attempt: failure}; every restart is a new attempt."""
    ranks: int = 2
    """Ranks per agent."""
    nodes: tuple[int, int] = (1, 1)
    """Minimum and maximum number of agents."""
    max_restarts: int = 3
    port: int = 0
    """Port of the rendezvous when there are several agents; the first agent hosts it."""
    head: str = "127.0.0.1"
    """Address of the host of the rendezvous."""
    fresh: bool = False
    """Start ranks as new interpreters instead of forks."""
    step_s: float = 0.0
    """Pause in s before every step, so that another agent can join during the run."""
    alone_from: int | None = None
    """From this step on, a run of one rank pauses 5 s before every step: a new agent has time to join on a busy machine."""
    shutdown_s: int = 3
    """Time in s that the agent waits for ranks after asking them to exit."""
    join_s: int = 600
    """Time in s that an agent waits for the minimum number of agents; torchrun's ``join_timeout``."""
    heartbeats: int = 3
    """Missed heartbeats, one per second, after which an agent is lost; a busy machine delays them."""
    call_s: int = 60
    """Time in s that an agent waits for a response of the rendezvous host; torchrun's ``call_timeout``."""

    @property
    def events(self) -> Path:
        """Path of the event log."""
        return Path(self.folder) / "events.jsonl"

    @property
    def path(self) -> Path:
        """Path of the JSON file."""
        return Path(self.folder) / "spec.json"

    def write(self) -> Path:
        """Write the configuration as JSON to :attr:`path` and return this path."""
        self.path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return self.path

    @classmethod
    def read(cls, path: Path) -> Spec:
        """Read a file written by :meth:`write`."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        raw["failures"] = {
            int(k): InjectedFailure(**v | {"settings": tuple(v["settings"])}) for k, v in raw["failures"].items()
        }
        return cls(**raw | {"nodes": tuple(raw["nodes"])})


def worker(spec: Spec) -> int:
    """Run as one rank: arm its failure, run the command and return 0; if the command fails, exit with its code."""
    for number in (signal.SIGTERM, signal.SIGINT):  # undo the handlers inherited from the agent
        signal.signal(number, signal.SIG_DFL)
    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    events = EventLog(spec.events, rank, attempt)
    events.write("start", node=int(os.environ["GROUP_RANK"]))
    failure = spec.failures.get(attempt)
    if failure is not None and failure.rank == rank:
        arm(failure, Path(spec.run_dir), events)
    world = int(os.environ["WORLD_SIZE"])

    def log_step(step: int) -> None:
        events.write("step", step=step, world=world)
        hold = world == 1 and spec.alone_from is not None and step >= spec.alone_from
        time.sleep(5.0 if hold else spec.step_s)

    on_every_step(log_step)
    from comtip_fast.cli import main

    more = [word for setting in (failure.settings if failure else ()) for word in ("--set", setting)]
    code = main([*spec.arguments, *more])
    events.write("end", code=code)
    sys.stdout.flush(), sys.stderr.flush()
    if code:
        os._exit(code)
    return code


def agent(spec_path: Path, address: str) -> int:
    """Run as one torchrun agent on the host with ``address``; return 0, or 1 if ranks failed more than ``max_restarts`` times."""
    spec = Spec.read(spec_path)
    endpoint = f"{spec.head}:{spec.port or free_port()}"
    # torchrun registers this handler by the entry point of the installed package.
    rendezvous_handler_registry.register(rendezvous.NAME, rendezvous.create_handler)
    config = LaunchConfig(
        min_nodes=spec.nodes[0],
        max_nodes=spec.nodes[1],
        nproc_per_node=spec.ranks,
        run_id="faults",
        rdzv_backend=rendezvous.NAME,
        rdzv_endpoint=endpoint,
        max_restarts=spec.max_restarts,
        monitor_interval=0.05,
        start_method="forkserver",
        local_addr=address,
        shutdown_timeout=spec.shutdown_s,
        # A lost agent is detected when its heartbeats stop; torchrun's defaults are 5 s and 3 missed heartbeats.
        rdzv_configs={
            "keep_alive_interval": 1,
            "keep_alive_max_attempt": spec.heartbeats,
            "last_call_timeout": 2,
            "join_timeout": spec.join_s,
            "call_timeout": spec.call_s,
            # torchrun determines the host by its name, which the addresses of a test do not have.
            **({} if spec.head == "127.0.0.1" else {"is_host": address == spec.head}),
        },
        logs_specs=DefaultLogsSpecs(log_dir=str(Path(spec.folder) / f"agent{os.getpid()}"), redirects=Std.ALL),
    )
    try:
        if spec.fresh:
            elastic_launch(config, sys.executable)("-u", "-m", __spec__.name, "--worker", str(spec_path))
        else:
            # The fork server imports once and has no threads; forking the agent, which has threads, can deadlock.
            multiprocessing.set_forkserver_preload([__spec__.name, *PRELOAD])
            elastic_launch(config, importlib.import_module(__spec__.name).worker)(spec)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def start_agent(spec_path: Path, host: Host | None = None) -> subprocess.Popen[bytes]:
    """Start an agent in its own session, so that killing its process group kills the whole node.

    Parameters
    ----------
    spec_path
        File of :meth:`Spec.write`.
    host
        The simulated host on which it runs; None for this machine.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        **(host.environment if host else {}),
    }
    log = spec_path.with_suffix(f".agent{len(list(spec_path.parent.glob('*.agent*.log')))}.log").open("wb")
    command = [sys.executable, "-m", __spec__.name, str(spec_path), host.address if host else "127.0.0.1"]
    if host is not None:
        command = host.command(command)
    with log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def stderr_of(folder: Path, attempt: int, rank: int) -> str:
    """Return the stderr of one rank in one attempt, concatenated over all agents."""
    found = sorted(folder.glob(f"agent*/*/attempt_{attempt}/{rank}/stderr.log"))
    return "".join(p.read_text(encoding="utf-8", errors="replace") for p in found)


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        worker(Spec.read(Path(sys.argv[2])))
    else:
        sys.exit(agent(Path(sys.argv[1]), sys.argv[2]))
