"""Report when torchrun's agents end after a host is cut off or killed: ``lost_hosts.py`` with idle workers, without training.

    sudo python bench/train/lost_agents.py [--backend c10d] [--only PART]

The workers act as ranks: some seconds after the fault they exit with 75, as ranks whose collective is late; a restarted worker
exits with 0. Two processes import PyTorch, and a fault takes less than a minute.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from testkit.network import Host, missing, network

AGENT = (
    "from torch.distributed.elastic.rendezvous import rendezvous_handler_registry as registry\n"
    "from comtip_fast.training.distributed import rendezvous\n"
    "registry.register(rendezvous.NAME, rendezvous.create_handler)\n"
    "from torch.distributed.run import main\nmain()"
)
LATE_S, CALL_S, LIMIT_S, START_S = 5, 20, 120, 900
WORKER = (
    '[ "$TORCHELASTIC_RESTART_COUNT" = 0 ] || exit 0; [ -e "$0/fault" ] && exit 0; touch "$0/started$GROUP_RANK"; '
    f'until [ -e "$0/fault" ]; do sleep 0.5; done; sleep {LATE_S}; exit 75'
)
FAULTS = {"link cut": None, "host vanished": 1, "rendezvous host vanished": 0}
"""{fault: the host whose link is cut and whose agent is killed}; None only cuts the link of host 1. Host 0 serves the rendezvous."""


def start(host: Host, head: str, folder: Path, backend: str) -> subprocess.Popen[bytes]:
    """Start an agent with one worker on a host."""
    settings = {"join_timeout": 600, "last_call_timeout": 2, "keep_alive_interval": 1, "keep_alive_max_attempt": 5}
    settings |= {"call_timeout": CALL_S, "is_host": host.address == head}
    command = [sys.executable, "-c", AGENT, "--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3"]
    command += ["--rdzv-backend", backend, "--rdzv-endpoint", f"{head}:29400", "--local-addr", host.address]
    command += ["--rdzv-conf", ",".join(f"{k}={v}" for k, v in settings.items())]
    command += ["--no-python", "sh", "-c", WORKER, str(folder)]
    environment = os.environ | host.environment | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with (folder / f"agent-{host.address}.log").open("wb") as log:
        return subprocess.Popen(
            host.command(command), env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def run(name: str, backend: str, folder: Path) -> list[tuple[float, int] | None]:
    """Return seconds from the fault until each agent ended, and its exit code (-1: it did not end); None if it was killed."""
    killed = FAULTS[name]
    with network(2) as hosts:
        agents = [start(host, hosts[0].address, folder, backend) for host in hosts]
        try:
            until = time.monotonic() + START_S
            while len(list(folder.glob("started*"))) < len(hosts):
                if time.monotonic() > until or any(agent.poll() is not None for agent in agents):
                    raise RuntimeError(
                        f"{name}: the agents did not start; see their logs in {folder} (--work keeps them)"
                    )
                time.sleep(0.1)
            (folder / "fault").touch()
            began = time.monotonic()
            hosts[1 if killed is None else killed].link.up = False
            if killed is not None:
                os.killpg(agents[killed].pid, signal.SIGKILL)
            out: list[tuple[float, int] | None] = [None, None]
            for i, agent in enumerate(agents):
                if i == killed:
                    continue
                try:
                    agent.wait(max(0.1, began + LIMIT_S - time.monotonic()))
                    out[i] = time.monotonic() - began, agent.returncode
                except subprocess.TimeoutExpired:
                    out[i] = float("inf"), -1
            return out
        finally:
            for agent in agents:
                if agent.poll() is None:
                    os.killpg(agent.pid, signal.SIGKILL)
                agent.wait()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="comtip", help="rendezvous of torchrun: comtip (default) or c10d")
    parser.add_argument("--only", default="", help="only faults whose names contain this text")
    parser.add_argument("--work", type=Path, help="keep the logs of the agents in this folder")
    args = parser.parse_args(argv)
    reason = missing()
    if reason is not None:
        parser.error(f"cannot make hosts on this machine: {reason}")
    print("| fault | backend | agent | seconds until it ended | exit code |\n|---|---|---|---|---|")
    for name in (n for n in FAULTS if args.only in n):
        with tempfile.TemporaryDirectory() as temporary:
            folder = args.work / name.replace(" ", "_") if args.work else Path(temporary)
            folder.mkdir(parents=True, exist_ok=not args.work)
            for i, end in enumerate(run(name, args.backend, folder)):
                text = "killed | " if end is None else f"{end[0]:.1f} | {end[1]}"
                print(f"| {name} | {args.backend} | {i} | {text} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
