"""No part of a plan takes less time than the lowest roof of its kernels in the ledger."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from comtip_kernels.ledger import sizes
from comtip_kernels.rates import read_rates

from comtip_fast.config.io import load_config
from comtip_fast.plan.cost import AUTOCAST, FP32, Cost
from comtip_fast.plan.hardware import make_cluster
from comtip_fast.plan.loss_parts import infonce, level, pooling
from comtip_fast.plan.plan import make_plan
from comtip_fast.plan.rank_share import RankShare
from comtip_fast.plan.sizes import Sizes
from comtip_fast.plan.timing import compute_time, rates

CONFIG = Path(__file__).parents[2] / "configs" / "1gpu.yaml"
SHARE = RankShare(spots=4096, images=4096, columns=8192, table_rows=65536, precision=AUTOCAST, gpu=True)


@pytest.fixture(scope="module")
def at() -> Sizes:
    plan = make_plan(load_config(CONFIG, []), make_cluster("h100"))
    return replace(plan.sizes, G=2048, Q=32, D=512)


@pytest.mark.parametrize("gpu", ["h100", "a100-80"])
@pytest.mark.parametrize("operation", ["infonce", "table_pool", "level_cross_entropy"])
def test_the_time_is_at_least_that_of_every_roof(at: Sizes, operation: str, gpu: str):
    costs, passes = {
        "infonce": lambda: (infonce(at, SHARE), sizes.infonce(4096, 8192, 512, "")),
        "table_pool": lambda: (pooling(at, SHARE, 4096), sizes.sentence_table(4096, 2048, 32, 512, "")),
        "level_cross_entropy": lambda: (level(at, SHARE), sizes.sentence_table(4096, 2048, 32, 512, "")),
    }[operation]()
    time = compute_time(costs, make_cluster(gpu), AUTOCAST)
    forward, backward = (p.seconds(read_rates()[gpu]) for p in passes if p.op == operation)
    for planned, roofs in ((time.forward, forward), (time.backward, backward)):
        assert planned >= roofs["l2"] * (1 - 1e-9)
        assert planned >= roofs["compute"] * 0.98  # the plan has no idle multiprocessors for products
        assert planned >= roofs["memory"] * 0.85  # and further operators, at 80 instead of 90 % of the bandwidth


def test_vectors_beyond_l2_are_read_again_from_memory(at: Sizes):
    """134 MB of texts do not fit into the L2 cache of an H100; without what is read again, a memory-bound pass would take too little time."""
    n = 131072
    (cost,) = infonce(at, replace(SHARE, images=n, columns=n))
    forward, backward = sizes.infonce(n, n, 512, "")
    assert (cost.again, cost.back_again) == (forward.moved.again, backward.moved.again)
    assert cost.again > 10 * cost.moved
    bound = replace(cost, flops=0.0, loaded=0.0, back_flops=0.0, back_moved=0.0, back_loaded=0.0, back_again=0.0)
    cluster = make_cluster("h100")
    seconds = compute_time([bound], cluster, AUTOCAST).forward
    assert seconds == pytest.approx((cost.moved + cost.again) / rates(cluster, AUTOCAST)[1])
    assert compute_time([bound.repeated(3)], cluster, AUTOCAST).forward == pytest.approx(3 * seconds)


def test_the_l2_cache_limits_the_forward_pass_of_infonce_on_an_h100(at: Sizes):
    assert compute_time(infonce(at, SHARE), make_cluster("h100"), AUTOCAST).by_bound["l2"] > 0


def test_a_cpu_and_fp32_have_no_limit_of_l2(at: Sizes):
    for share in (replace(SHARE, gpu=False, precision=FP32), replace(SHARE, precision=FP32)):
        assert all(not c.loaded for c in infonce(at, share))


def test_idle_multiprocessors_load_nothing():
    busy, idle = (Cost("kernel", loaded=1e9, programs=n) for n in (132, 66))
    one, two = (compute_time([c], make_cluster("h100"), AUTOCAST).forward for c in (busy, idle))
    assert one == pytest.approx(1e9 / 5.5e12)
    assert two == pytest.approx(2 * one)


def test_no_efficiency_is_assumed_for_measured_rates():
    cluster = make_cluster("h100")
    measured = replace(cluster, device=replace(cluster.device, measured=True))
    assert rates(cluster, AUTOCAST) == (cluster.device.bf16 * 0.5, cluster.device.memory_bytes_per_s * 0.8)
    assert rates(measured, AUTOCAST) == (cluster.device.bf16, cluster.device.memory_bytes_per_s)
    assert rates(measured, FP32)[0] == cluster.device.fp32 * 0.5
