"""``bench/kernels/cpu_ratios.py``: a CPU path that takes three times as long fails, one that waits too, and noise does not."""

import importlib.util
import inspect
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import comtip_kernels
import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("cpu_ratios", ROOT / "bench/kernels/cpu_ratios.py")
gate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(gate)


class Clock:
    """A clock that the calls advance."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def call(self, durations: Iterator[float]) -> Callable[[], None]:
        def run() -> None:
            self.now += next(durations)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(gate, "CLOCKS", (clock,))
    return clock


def test_a_path_that_takes_three_times_as_long_fails(clock: Clock):
    committed = dict.fromkeys(gate.PEERS, 0.5)
    groups = {
        op: lambda names=names: {name: clock.call(cycle([1.5 if name == names[0] else 1.0])) for name in names}
        for op, names in gate.PEERS.items()
    }
    limits = {op: gate.MARGIN * ratio for op, ratio in committed.items()}
    told = gate.problems(gate.measure(groups, limits), committed)
    assert len(told) == len(gate.PEERS)
    assert all("takes 1.50 x the time of" in line for line in told)
    assert gate.problems({"infonce": 0.99}, committed) == []
    assert "not in cpu_ratios.csv" in gate.problems({"new": 0.1}, committed)[0]


def test_one_quiet_round_is_enough_to_pass(clock: Clock):
    noisy = [40.0] * 20 + [0.5] + [40.0] * 60
    assert gate.fastest_ratio(clock.call(iter(noisy)), clock.call(cycle([1.0])), 1.0) == 0.5


def test_a_path_that_waits_is_slow_by_the_wall_clock():
    def work() -> None:
        sum(range(2000))

    assert gate.fastest_ratio(lambda: time.sleep(0.01), work, 1.0, most=2) > 3
    assert "thread_time" in {clock.__name__ for clock in gate.CLOCKS}


def test_the_committed_table_has_every_operation():
    assert set(gate.read()) == set(gate.PEERS)


def test_every_operation_with_a_cpu_path_is_compared():
    functions = [getattr(comtip_kernels, name) for name in comtip_kernels.__all__]
    parameters = {f.__name__: inspect.signature(f).parameters for f in functions if inspect.isfunction(f)}
    operations = {name for name, own in parameters.items() if "impl" in own and own["impl"].default == "auto"}
    # The cases of packed_attention have one tensor for q, k and v. The last three run in fused blocks, which a CPU does not have.
    others = {"packed_attention_qkv", "image_attention", "residual_norm", "bias_gelu"}
    assert operations - others <= set(gate.PEERS)
    assert "pair_scores" in operations
