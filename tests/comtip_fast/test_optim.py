"""Learning rate schedule, parameter groups and state of the optimizer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from comtip_fast.config.schema import OptimConfig
from comtip_fast.training.checkpoint.content import Checkpoint
from comtip_fast.training.checkpoint.reading import HeldReader
from comtip_fast.training.masked_adamw import MaskedAdamW
from comtip_fast.training.optim import learning_rate, make_optimizer, mask_steps, optimizer_tensors, restore_optimizer

CONFIG = OptimConfig(lr=0.5, warmup_steps=10, final_lr=0.1, weight_decay=0.3)


def test_schedule_at_its_corners() -> None:
    assert learning_rate(1, 110, CONFIG) == pytest.approx(0.05)
    assert learning_rate(5, 110, CONFIG) == pytest.approx(0.25)
    assert learning_rate(10, 110, CONFIG) == 0.5
    assert learning_rate(60, 110, CONFIG) == pytest.approx(0.5 * (0.1 + 0.9 / 2))
    assert learning_rate(110, 110, CONFIG) == pytest.approx(0.05)


def test_schedule_is_the_cosine() -> None:
    for step in range(10, 111):
        share = (step - 10) / 100
        expected = 0.5 * (0.1 + 0.9 * (math.cos(math.pi * share) + 1) / 2)
        assert learning_rate(step, 110, CONFIG) == pytest.approx(expected, rel=1e-12)
    rates = [learning_rate(s, 110, CONFIG) for s in range(1, 111)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 5), (1, 1), (5, 5), (50, 3)])
def test_short_runs_have_positive_rates(warmup: int, total: int) -> None:
    config = OptimConfig(lr=1.0, warmup_steps=warmup, final_lr=0.02)
    assert all(0 < learning_rate(s, total, config) <= 1 for s in range(1, total + 1))


def net() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    module.register_parameter("scale", nn.Parameter(torch.tensor(2.0)))
    module.register_parameter("frozen", nn.Parameter(torch.ones(2, 2), requires_grad=False))
    return module


def test_only_matrices_are_decayed_and_frozen_ones_left_out() -> None:
    module = net()
    decayed, plain = make_optimizer(module, CONFIG).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = {id(p): n for n, p in module.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {"0.weight", "2.weight"}
    assert {names[id(p)] for p in plain["params"]} == {"0.bias", "1.weight", "1.bias", "2.bias", "scale"}


def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    (module(torch.ones(5, 3)).square().sum() * module.scale).backward()
    optimizer.step()


def test_state_restored_continues_bit_exactly() -> None:
    a = net()
    first = make_optimizer(a, CONFIG)
    for _ in range(3):
        step(a, first)
    b = net()
    b.load_state_dict(a.state_dict())
    second = make_optimizer(b, CONFIG)
    tensors = {k: v.clone() for k, v in optimizer_tensors(a, first).items()}
    assert {"0.weight/step", "0.weight/exp_avg", "scale/exp_avg_sq"} <= tensors.keys()
    restore_optimizer(b, second, HeldReader(Checkpoint({}, tensors, {})))
    for _ in range(2):
        step(a, first)
        step(b, second)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


def run_of_updates(masked: bool, restored_after: int) -> dict[str, torch.Tensor]:
    """Return weights and state after eight updates: the third is bad, and in the fifth a parameter has no gradient."""
    module = net()
    optimizer = make_optimizer(module, CONFIG, fused=True, masked=masked)
    for i in range(8):
        torch.manual_seed(i)
        for name, p in module.named_parameters():
            p.grad = None if not p.requires_grad or (i == 4 and name == "2.weight") else torch.randn_like(p)
        good = torch.tensor(i != 2)
        if isinstance(optimizer, MaskedAdamW):
            optimizer.masked_step(good)
        else:
            mask_steps(optimizer, good)
            optimizer.step()
        if i == restored_after:
            tensors = {k: v.clone() for k, v in optimizer_tensors(module, optimizer).items()}
            optimizer = make_optimizer(module, CONFIG, fused=True, masked=masked)
            restore_optimizer(module, optimizer, HeldReader(Checkpoint({}, tensors, {})))
    weights = {name: p.detach() for name, p in module.named_parameters()}
    return weights | optimizer_tensors(module, optimizer)


@pytest.mark.parametrize("restored_after", [-1, 1, 2, 5])
def test_the_masked_optimizer_equals_the_fused_one_to_the_bit(restored_after: int) -> None:
    expected, found = run_of_updates(False, -1), run_of_updates(True, restored_after)
    assert expected.keys() == found.keys()
    assert {name: int(found[f"{name}/step"]) for name in ("0.weight", "2.weight", "scale")} == {
        "0.weight": 7,
        "2.weight": 6,
        "scale": 7,
    }
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_parameters_that_are_updated_together_share_a_counter() -> None:
    module = net()
    optimizer = make_optimizer(module, CONFIG, masked=True)
    step(module, optimizer)
    tensors = optimizer_tensors(module, optimizer)
    steps = [state["step"] for state in optimizer.state.values()]
    assert len(steps) == 7
    assert len({s.data_ptr() for s in steps}) == 1
    # A file of tensors cannot hold several names of one memory.
    stored = [tensors[name] for name in tensors if name.endswith("/step")]
    assert len({s.data_ptr() for s in stored}) == 7
    restore_optimizer(module, optimizer, HeldReader(Checkpoint({}, tensors, {})))
    assert len({state["step"].data_ptr() for state in optimizer.state.values()}) == 1


def test_a_parameter_without_gradient_is_not_counted_in_another_group() -> None:
    module = nn.Linear(2, 1)  # a group of one parameter each
    optimizer = make_optimizer(module, CONFIG, masked=True)
    for i in range(2):
        module.weight.grad = torch.ones(1, 2)
        module.bias.grad = torch.ones(1) if i == 0 else None
        optimizer.step()
    tensors = optimizer_tensors(module, optimizer)
    assert (float(tensors["weight/step"]), float(tensors["bias/step"])) == (2, 1)
