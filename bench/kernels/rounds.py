"""Timing for the CPU benchmarks: calls are timed alternately in rounds, so that each ratio compares adjacent times."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch

Times = dict[str, list[float]]


def add_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add ``--rounds`` and ``--busy``."""
    parser.add_argument("--rounds", type=int, default=rounds, help=f"number of rounds (default {rounds})")
    parser.add_argument(
        "--busy", action="store_true", help="measure CPU time on one thread, for a machine that is not idle"
    )


def run(calls: Mapping[str, Callable[[], object]], rounds: int, busy: bool) -> Times:
    """Return the times of each call in s, one per round; an untimed call before each timed one fills caches.

    ``busy`` measures CPU time on one thread instead of wall-clock time.
    """
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
    """Return the median over rounds of the time of ``of`` divided by that of ``to``."""
    return statistics.median(a / b for a, b in zip(times[of], times[to], strict=True))


def ms(times: Times, name: str) -> float:
    """Return the median time of a call in ms."""
    return statistics.median(times[name]) * 1e3
