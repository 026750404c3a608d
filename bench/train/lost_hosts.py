"""Cut or slow down the link of a host, or kill the host, during a run, and report how every rank ends.

    sudo python bench/train/lost_hosts.py            table: what happened, rank, seconds, exit code, message

Two hosts are network namespaces with links of their own (:mod:`testkit.network`); each runs torchrun's agent with one gloo
rank. Files are shared, as by a file server that both hosts still reach. *Seconds* are from the fault until the rank or agent
ended. The run then continues with the hosts that are left, or is started again by the same command; its losses are compared
with those of an undisturbed run.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.train import fault_injection as faults
from testkit.elastic import Spec, start_agent
from testkit.fault_injection import read_events
from testkit.network import Host, missing, network
from testkit.tiny import tiny_shards

TIMEOUT_S = 15
PORT, LIMIT_S, JOIN_S, AT_STEP = 29400, 400, 100, 10
START_S, CALL_S, HEARTBEATS = 900, 20, 10
Agents = list[subprocess.Popen[bytes]]


@dataclass(frozen=True)
class Ended:
    """How a rank or an agent ended."""

    seconds: float
    code: int
    message: str


@dataclass(frozen=True)
class Fault:
    """One thing that happens to two hosts; host 0 serves the rendezvous and runs rank 0."""

    name: str
    act: Callable[[Sequence[Host], Agents], None]
    alone: bool = False
    """Whether a run may continue with one host."""
    again: bool = False
    """Whether the same command has to be started again."""
    harmless: bool = False
    """Whether the run must end as if nothing had happened."""


@dataclass
class Outcome:
    """One run with its fault."""

    fault: Fault
    folder: Path
    agents: list[Ended | None]
    """By host; None for the agent of a host that was lost."""
    ranks: list[Ended | None]
    """By host: how the rank that ran at the time of the fault ended."""
    code: int
    """Lowest exit code of the agents that were left, or that of the second start."""
    rows: list[str] = field(default_factory=list)


def settings(timeout_s: int = TIMEOUT_S) -> tuple[str, ...]:
    """Return the settings of a run whose collectives wait for ``timeout_s``."""
    return f"engine.timeout_s={timeout_s}", f"engine.wait_timeout_s={timeout_s + 5}"


def cut(hosts: Sequence[Host], agents: Agents) -> None:
    """Cut the link of host 1; both hosts stay up."""
    hosts[1].link.up = False


def slow(hosts: Sequence[Host], agents: Agents) -> None:
    """Delay every frame by 20 ms each way, and limit the rate to 1 MB/s."""
    hosts[1].link.delay_s, hosts[1].link.bytes_per_s = 0.02, 1e6


def lossy(hosts: Sequence[Host], agents: Agents) -> None:
    """Lose 3 % of the frames each way."""
    hosts[1].link.loss = 0.03


def vanish(hosts: Sequence[Host], agents: Agents, number: int = 1) -> None:
    """Kill a host: no connection is closed, no signal is handled."""
    hosts[number].link.up = False
    os.killpg(agents[number].pid, signal.SIGKILL)


def head_vanishes(hosts: Sequence[Host], agents: Agents) -> None:
    """Kill the host of the rendezvous."""
    vanish(hosts, agents, 0)


FAULTS = (
    Fault("link slow", slow, harmless=True),
    Fault("link lossy", lossy, harmless=True),
    Fault("link cut", cut, alone=True),
    Fault("host vanished", vanish, alone=True),
    Fault("host vanished, not replaced", vanish, again=True),
    Fault("rendezvous host vanished", head_vanishes, alone=True, again=True),
)


def run(fault: Fault, config: Path, folder: Path) -> Outcome:
    """Start two hosts, apply the fault at step :data:`AT_STEP`, and wait until every agent that is left has ended."""
    with network(2) as hosts:
        spec = faults.spec_of(
            config,
            folder,
            ranks=1,
            nodes=(1 if fault.alone else 2, 2),
            port=PORT,
            head=hosts[0].address,
            max_restarts=3,
            step_s=0.1,
            join_s=JOIN_S,
            call_s=CALL_S,
            heartbeats=HEARTBEATS,
        )
        spec.write()
        agents = [start_agent(spec.path, host) for host in hosts]
        try:
            faults._wait(lambda: faults._steps(spec, AT_STEP, world=2), agents, START_S)
            began = time.time()
            fault.act(hosts, agents)
            ends = _ends(agents, began)
        finally:
            for agent in agents:
                if agent.poll() is None:
                    os.killpg(agent.pid, signal.SIGKILL)
                agent.wait()
    codes = [end.code for end in ends if end is not None]
    code = min(codes) if codes else 1
    if fault.again:
        again = Spec(spec.arguments, spec.run_dir, str(folder / "again"), ranks=2)
        (folder / "again").mkdir()
        code = start_agent(again.write()).wait(LIMIT_S)
    return Outcome(fault, folder, ends, [_rank(spec, rank, agents[rank], began) for rank in (0, 1)], code)


def _ends(agents: Agents, began: float) -> list[Ended | None]:
    """Wait for the agents and return how each ended; None for one that SIGKILL ended, as the fault does."""
    ends: list[Ended | None] = [None] * len(agents)
    left = set(range(len(agents)))
    until = time.monotonic() + LIMIT_S
    while left and time.monotonic() < until:
        for i in [i for i in left if agents[i].poll() is not None]:
            if agents[i].returncode != -signal.SIGKILL:
                ends[i] = Ended(time.time() - began, agents[i].returncode, "")
            left.remove(i)
        time.sleep(0.1)
    return [Ended(math.inf, -1, "did not end") if i in left else end for i, end in enumerate(ends)]


def _rank(spec: Spec, rank: int, agent: subprocess.Popen[bytes], began: float) -> Ended | None:
    """Return how the rank of an agent ended after the fault, from its log and the event log; None if it logged no end."""
    logs = Path(spec.folder).glob(f"agent{agent.pid}/*/attempt_*/0/stderr.log")
    text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(logs))
    found = re.findall(r"^comtip: error: (.*)$", text, re.MULTILINE)
    ends = [e for e in read_events(spec.events) if e["event"] == "end" and e["rank"] == rank]
    events = [e for e in ends if e["time"] > began]
    if not events:
        return None
    return Ended(events[0]["time"] - began, events[0]["code"], found[0] if found else "")


def print_rows(outcome: Outcome) -> None:
    """Print one table row per rank and agent."""
    for host in (0, 1):
        for kind, end in (("rank", outcome.ranks[host]), ("agent", outcome.agents[host])):
            how = "killed" if outcome.agents[host] is None else "stopped by its agent"
            text = f"| {how} | | |" if end is None else f"| {end.seconds:.1f} | {end.code} | {end.message} |"
            print(f"| {outcome.fault.name} | {kind} {host} {text}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="only faults whose names contain this text; may be repeated")
    parser.add_argument("--work", type=Path, help="keep the runs in this folder")
    parser.add_argument(
        "--timeout-s",
        type=int,
        default=TIMEOUT_S,
        help=f"engine.timeout_s; more on a busy machine (default {TIMEOUT_S})",
    )
    args = parser.parse_args(argv)
    reason = missing()
    if reason is not None:
        parser.error(f"cannot make hosts on this machine: {reason}")
    with tempfile.TemporaryDirectory() as name:
        folder = args.work or Path(name)
        folder.mkdir(exist_ok=True)
        config = faults.write_config(tiny_shards(folder / "tiny"), folder, settings(args.timeout_s))
        whole = faults.run(config, folder / "whole", limit_s=3600)
        print("| fault | process | seconds until it ended | exit code | message |\n|---|---|---|---|---|")
        bad = 0
        chosen = [f for f in FAULTS if any(part in f.name for part in args.only or [""])]
        for number, fault in enumerate(chosen):
            outcome = run(fault, config, folder / f"fault{number}")
            print_rows(outcome)
            off = faults.largest_difference(outcome.folder / "run", whole.folder / "run")
            print(f"| {fault.name} | run | | {outcome.code} | losses differ by at most {off:.1e} |", flush=True)
            bad += outcome.code != 0 or off > faults.RESIZED_TOLERANCE
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
