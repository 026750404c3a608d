"""Inject failures into the ranks of a run, which torchrun restarts, and compare the run with an undisturbed one.

    python bench/train/fault_injection.py --kills 50            table: kind, rank, when, recovery time, same run or not
    python bench/train/fault_injection.py --kills 10 --fresh    new interpreters, as torchrun starts them (imports count)

Two gloo ranks train a tiny model on synthetic sections. *Same run* means that every row of metrics.jsonl (timings
excluded) and every byte of the exported weights are equal. Every kind of failure is injected once, then ``--kills``
seeded kills, five per run. Then a whole agent is killed with its ranks and replaced by another. Last, an agent is killed
and replaced only later, so that the run continues with fewer ranks: the losses then agree up to rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comtip_fast.config.io import dump_config, load_config
from comtip_fast.training.monitor.monitor import CLOCKED
from testkit.distributed import free_port
from testkit.elastic import Spec, start_agent
from testkit.fault_injection import InjectedFailure, read_events, recoveries
from testkit.tiny import tiny_shards

STEPS, PER_RUN = 40, 5
RESIZED_TOLERANCE = 1e-4
"""Largest relative difference of a loss when the number of ranks changed during the run."""
TINY = [
    "data.batch_size=32",
    "data.views=2",
    "genes.per_cohort=30",
    "genes.held_out_from=10",
    "genes.held_out_every=4",
    "panel.max_genes=24",
    "levels.n_levels=5",
    "levels.min_positive=10",
    "vision.patch_px=16",
    "vision.width=32",
    "vision.depth=1",
    "vision.heads=2",
    "text.width=32",
    "text.depth=1",
    "text.heads=2",
    "text.max_tokens=6",
    "align.dim=32",
    "optim.warmup_steps=5",
    f"train.steps={STEPS}",
    "train.validate_every=10",
    "train.checkpoint_every=4",
    "train.log_every=1",
    "train.patience=0",
    "train.threads=1",
    "train.device=cpu",
    "data.workers=1",
]
# One failure of each kind other than a kill, with the settings that keep the test short.
NAMED = (
    InjectedFailure("SIGTERM on one rank", 1, 3),
    InjectedFailure("disk full", 0, 3),
    InjectedFailure("checkpoint truncated, then killed", 0, 13),
    InjectedFailure("checkpoint bit-flipped, then killed", 1, 14),
    InjectedFailure("stalled", 1, 15, ("watch.stall_s=4", "watch.stall_stop_s=8")),
    InjectedFailure("frozen", 1, 18, ("engine.timeout_s=10",)),
)


@dataclass
class Outcome:
    """One run with its injected failures."""

    folder: Path
    code: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    """See :func:`testkit.fault_injection.recoveries`."""


def write_config(shards: Path | str, folder: Path, more: Sequence[str] = ()) -> Path:
    """Write the tiny config and return its path."""
    path = folder / "config.yaml"
    path.write_text(dump_config(load_config(None, [*TINY, f"data.shards={shards}", *more])), encoding="utf-8")
    return path


def spec_of(config: Path, folder: Path, failures: Sequence[InjectedFailure] = (), **more: Any) -> Spec:
    """Return the spec of one run in ``folder``."""
    folder.mkdir(parents=True)
    arguments = ["pretrain", "--config", str(config), "--out", str(folder / "run"), "--resume"]
    more = {"max_restarts": len(failures) + 1} | more
    return Spec(arguments, str(folder / "run"), str(folder), dict(enumerate(failures)), **more)


def run(
    config: Path, folder: Path, failures: Sequence[InjectedFailure] = (), *, limit_s: float = 600, **more: Any
) -> Outcome:
    """Run to the end under one agent, with one failure per attempt, within ``limit_s`` seconds."""
    spec = spec_of(config, folder, failures, **more)
    code = start_agent(spec.write()).wait(limit_s)
    return Outcome(folder, code, recoveries(read_events(spec.events)))


def replace_node(config: Path, folder: Path) -> Outcome:
    """Start two agents with one rank each, kill one of them, and start a third as its replacement."""
    spec = spec_of(config, folder, ranks=1, nodes=(2, 2), port=free_port(), max_restarts=3)
    with _two_agents(spec) as agents:
        _wait(lambda: _steps(spec, 10), agents)
        began = time.time()
        _end_node(agents[1])
        agents.append(start_agent(spec.path))
        code = _finish([agents[0], agents[2]])
    row = {"kind": "node lost, replaced", "rank": 1, "attempt": 0}
    return Outcome(folder, code, [row | {"seconds": _until_next_step(spec, began)}])


def shrink_and_grow(config: Path, folder: Path) -> Outcome:
    """Start two agents with one rank each (minimum one), kill one, continue with the other, then add a third."""
    spec = spec_of(config, folder, ranks=1, nodes=(1, 2), port=free_port(), max_restarts=3, step_s=0.4, alone_from=14)
    with _two_agents(spec) as agents:
        _wait(lambda: _steps(spec, 8, world=2), agents)
        began = time.time()
        _end_node(agents[1])
        alone = agents[:1]
        _wait(lambda: _steps(spec, 14, world=1), alone)
        alone_after = _until_next_step(spec, began)
        joined = time.time()
        agents.append(start_agent(spec.path))
        code = _finish([agents[0], agents[2]])
    if not any(r["world"] == 2 for r in _events(spec, "step") if r["time"] > joined):
        code = code or 1  # the third agent never joined
    row = {"rank": 1, "attempt": 0}
    return Outcome(
        folder,
        code,
        [
            row | {"kind": "node lost, not replaced", "seconds": alone_after},
            row | {"kind": "node added", "seconds": _until_next_step(spec, joined)},
        ],
    )


@contextmanager
def _two_agents(spec: Spec) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start two agents, the one that hosts the rendezvous first; kill the agents that still run at exit."""
    spec.write()
    agents = [start_agent(spec.path)]
    try:
        # The first agent hosts the rendezvous, which is lost with it: callers must kill the other one.
        _wait(lambda: _is_served(spec.port), agents)
        agents.append(start_agent(spec.path))
        yield agents
    finally:
        for agent in agents:
            if agent.poll() is None:
                _end_node(agent)
            agent.wait()


def _end_node(agent: subprocess.Popen[bytes]) -> None:
    """Kill the process group: agent, ranks and fork server end at once, as on a node that loses power."""
    os.killpg(agent.pid, signal.SIGKILL)


def _finish(agents: Sequence[subprocess.Popen[bytes]]) -> int:
    # When one agent has failed, the other would wait for a second node until its timeout.
    _wait_until(lambda: all(a.poll() is not None for a in agents) or any(a.poll() for a in agents), 300)
    return 0 if all(agent.poll() == 0 for agent in agents) else 1


def _events(spec: Spec, event: str) -> list[dict[str, Any]]:
    return [r for r in read_events(spec.events) if r["event"] == event]


def _steps(spec: Spec, step: int, world: int | None = None) -> bool:
    return any(r["step"] >= step and world in (None, r["world"]) for r in _events(spec, "step"))


def _until_next_step(spec: Spec, began: float) -> float:
    """Return the seconds from ``began`` to the first step of an attempt that started later, NaN if there is none."""
    starts = [r["time"] for r in _events(spec, "start") if r["time"] > began]
    steps = [r["time"] for r in _events(spec, "step") if starts and r["time"] > min(starts)]
    return min(steps) - began if steps else math.nan


def _is_served(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def _wait(ready: Callable[[], bool], agents: Sequence[subprocess.Popen[bytes]], limit_s: float = 120) -> None:
    if not _wait_until(lambda: ready() or any(a.poll() is not None for a in agents), limit_s) or not ready():
        raise RuntimeError("the run ended or stalled before the fault; see the logs of its agents (--work keeps them)")


def _wait_until(ready: Callable[[], bool], limit_s: float) -> bool:
    until = time.monotonic() + limit_s
    while not ready():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def differences(one: Path, other: Path) -> list[str]:
    """Return the names of the files, or of the folder of checkpoints, in which two run folders differ."""
    out = [] if trace(one) == trace(other) else ["metrics.jsonl"]
    a, b = one / "export/model.safetensors", other / "export/model.safetensors"
    if not (a.is_file() and b.is_file() and a.read_bytes() == b.read_bytes()):
        out.append(a.name)
    # No partial checkpoint is left, and no checkpoint that should have been deleted.
    names = [
        sorted(p.name for p in (d / "checkpoints").glob("*") if not p.name.startswith("damaged_")) for d in (one, other)
    ]
    return out if names[0] == names[1] else [*out, "checkpoints"]


def largest_difference(one: Path, other: Path) -> float:
    """Return the largest relative difference of a loss; infinite unless both runs have the same steps, each once."""
    a, b = ({r["step"]: r["loss"] for r in trace(d) if r["kind"] == "train"} for d in (one, other))
    once = all(sum(r["kind"] == "train" for r in trace(d)) == len(t) for d, t in ((one, a), (other, b)))
    if not once or a.keys() != b.keys() or not a:
        return math.inf
    return max(abs(a[step] - b[step]) / abs(b[step]) for step in a)


def trace(run_dir: Path) -> list[dict[str, Any]]:
    """Return the metrics rows of a run without timings."""
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    return [{k: v for k, v in row.items() if k not in CLOCKED} for row in rows]


def random_kills(n: int, seed: int) -> list[InjectedFailure]:
    """Return ``n`` seeded kills at different points of the run."""
    rng = random.Random(seed)
    out = []
    for i in range(n):
        rank = rng.randrange(2)
        # All count from the start of the attempt and trigger before the run can end.
        out.append(
            (
                InjectedFailure("killed in a step", rank, rng.randint(1, 7)),
                InjectedFailure("killed at a file operation", 0, rng.randint(1, 90)),
                InjectedFailure("killed in a collective", rank, rng.randint(1, 60)),
                InjectedFailure("killed by a timer", rank, round(rng.uniform(0.0, 0.15), 3)),
            )[i % 4]
        )
    return out


def table(config: Path, folder: Path, kills: int, seed: int, fresh: bool) -> list[dict[str, Any]]:
    """Run all experiments and return one row per failure."""
    whole = run(config, folder / "whole")
    if whole.code:
        raise RuntimeError(
            f"the undisturbed run exited with code {whole.code}; see the logs in {folder / 'whole'} (--work keeps them)"
        )
    drawn = random_kills(kills, seed)
    rounds = [list(NAMED), *(drawn[i : i + PER_RUN] for i in range(0, kills, PER_RUN))]
    outcomes = []
    for number, failures in enumerate(rounds):
        outcomes.append((run(config, folder / f"round{number}", failures, fresh=fresh), failures))
    rows = []
    for outcome, failures in outcomes:
        same = outcome.code == 0 and not differences(outcome.folder / "run", whole.folder / "run")
        for row in outcome.rows:
            rows.append(row | {"at": failures[row["attempt"]].at, "same": same})
    lost = replace_node(config, folder / "node")
    same = lost.code == 0 and not differences(lost.folder / "run", whole.folder / "run")
    rows.append(lost.rows[0] | {"at": 10, "same": same})
    # A different number of ranks sums in a different order.
    resized = shrink_and_grow(config, folder / "resized")
    largest = largest_difference(resized.folder / "run", whole.folder / "run") if resized.code == 0 else math.inf
    print(f"one node fewer, then one more: losses differ by at most {largest:.1e}")
    return [*rows, *(r | {"at": 8, "same": largest < RESIZED_TOLERANCE} for r in resized.rows)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="number of seeded kills (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kills (default 0)")
    parser.add_argument("--fresh", action="store_true", help="start ranks as new interpreters")
    parser.add_argument("--work", type=Path, help="keep the runs and their logs in this folder")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = args.work or Path(name)
        folder.mkdir(exist_ok=True)
        config = write_config(tiny_shards(folder / "tiny"), folder)
        rows = table(config, folder, args.kills, args.seed, args.fresh)
    print("| kind | rank | at | recovery, s | same run |\n|---|---|---|---|---|")
    for r in rows:
        print(f"| {r['kind']} | {r['rank']} | {r['at']:g} | {r['seconds']:.1f} | {'yes' if r['same'] else 'NO'} |")
    seconds = [r["seconds"] for r in rows if r["kind"].startswith("killed") and math.isfinite(r["seconds"])]
    same = sum(r["same"] for r in rows)
    print(
        f"\n{len(rows)} failures, {same} in runs with the same result; recovery after a kill: median "
        f"{statistics.median(seconds):.1f} s, maximum {max(seconds):.1f} s"
    )
    return 0 if same == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
