"""Hosts with links of their own: a link is slow, loses frames or is cut, and a host vanishes without a word."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from comtip_shards import ShardSet

from bench.train import fault_injection, lost_agents, lost_hosts
from testkit.network import missing

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3600)]
LATE = rf"a rank did not reach a collective within engine\.timeout_s={lost_hosts.TIMEOUT_S} s"


@pytest.fixture(scope="module", autouse=True)
def _hosts() -> None:
    reason = missing()
    if reason is not None:
        pytest.skip(f"hosts cannot be created here: {reason}")


@pytest.fixture(scope="module")
def config(tiny_shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fault_injection.write_config(tiny_shards.path, tmp_path_factory.mktemp("config"), lost_hosts.settings())


@pytest.fixture(scope="module")
def reference(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    outcome = fault_injection.run(config, tmp_path_factory.mktemp("reference") / "w", limit_s=1800)
    assert outcome.code == 0
    return outcome.folder / "run"


@pytest.mark.parametrize("fault", lost_hosts.FAULTS, ids=lambda f: f.name)
def test_a_run_over_two_hosts_ends_as_documented(
    fault: lost_hosts.Fault, config: Path, reference: Path, tmp_path: Path
):
    outcome = lost_hosts.run(fault, config, tmp_path / "run")
    lost_hosts.print_rows(outcome)
    assert outcome.code == 0
    largest = fault_injection.largest_difference(outcome.folder / "run", reference)
    if fault.harmless:
        assert largest == 0
        assert [end.code for end in outcome.ranks if end] == [0, 0]
        return
    assert largest < fault_injection.RESIZED_TOLERANCE
    left = [end for end in outcome.ranks if end is not None]
    assert left, "no host was left"
    for end in left:
        # The other side is silent, so only the timeout can tell; nothing may wait for longer.
        assert end.code == 75
        assert re.search(LATE, end.message), end.message
        assert end.seconds < lost_hosts.TIMEOUT_S + 60
    assert all(math.isfinite(end.seconds) for end in outcome.agents if end is not None), "an agent never ended"


@pytest.mark.parametrize("name", lost_agents.FAULTS)
def test_every_agent_ends_when_a_host_is_lost(name: str, tmp_path: Path):
    """With torchrun's own c10d backend, the agent that cannot reach the rendezvous host hangs."""
    ends = lost_agents.run(name, "comtip", tmp_path)
    left = {"link cut": [0, 1], "host vanished": [0], "rendezvous host vanished": [1]}[name]
    for agent, end in enumerate(ends):
        assert (end is None) == (agent not in left)
        if end is not None:
            assert end[0] < lost_agents.LATE_S + 2 * lost_agents.CALL_S
            # The host of the rendezvous continues alone; one that cannot reach it fails.
            assert end[1] == (0 if agent == 0 else 1)
