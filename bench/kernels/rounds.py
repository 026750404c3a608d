"""Shared by the CPU benchmarks: calls are timed alternately in rounds, so that each ratio compares adjacent times."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch

Times = dict[str, list[float]]


def add_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add ``--rounds`` and ``--busy``."""
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--busy", action="store_true", help="for a machine that is not idle: one thread, CPU time")


def run(calls: Mapping[str, Callable[[], object]], rounds: int, busy: bool) -> Times:
    """Return the seconds of each call in every round; an untimed call before each one fills memory and caches."""
    clock = time.process_time if busy else time.perf_counter
    if busy:
        torch.set_num_threads(1)
    times: Times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            began = clock()
            call()
            times[name].append(clock() - began)
    return times


def ratio(times: Times, of: str, to: str) -> float:
    """Return the median over rounds of one's time over the other's."""
    return statistics.median(a / b for a, b in zip(times[of], times[to], strict=True))


def ms(times: Times, name: str) -> float:
    """Return the median in milliseconds."""
    return statistics.median(times[name]) * 1e3
