"""Weights cast a block at a time: the bits of autocast's own casts, in fewer operators."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from comtip_fast.config.io import load_config
from comtip_fast.runtime.weight_casts import cast_together, linear_parameters
from comtip_fast.training.engines import torch as torch_engine
from comtip_fast.training.engines.base import cast_groups_of
from comtip_fast.training.task import build_task
from comtip_fast.training.trainer import Trainer


class Counted(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func._schema.name] += 1
        return func(*args, **kwargs or {})


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8, bias=False), nn.Linear(8, 8))


def gradients(model: nn.Sequential, together: bool) -> tuple[list[Tensor | None], Counter[str]]:
    """Use the model twice, and its last layer never, as the two branches of the image encoder use a block."""
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    groups = [linear_parameters(model)] if together else []
    with Counted() as counted, torch.autocast("cpu", torch.bfloat16), cast_together(groups):
        (model[:4](x).square().sum() + model[:4](x * 2).float().sum()).backward()
    return [p.grad for p in model.parameters()], counted.names


def test_gradients_have_the_same_bits():
    one, two = net(), net()
    (plain, before), (cast, after) = gradients(one, False), gradients(two, True)
    assert plain[-1] is cast[-1] is None  # never used
    for a, b in zip(plain[:-2], cast[:-2], strict=True):
        assert a is not None
        assert b is not None
        assert b.dtype == torch.float32
        assert torch.equal(a, b)
    assert after["aten::_foreach_copy_"] == 2
    assert after["aten::_to_copy"] == before["aten::_to_copy"] - 2 * 3
    assert all(isinstance(p, nn.Parameter) for p in two.parameters())


def test_parameters_are_restored_after_an_error():
    model = net()
    before = dict(model.named_parameters())
    with pytest.raises(RuntimeError, match="normalized_shape"), cast_together([linear_parameters(model)]):
        model(torch.zeros(2, 8).to(torch.bfloat16)[:, :7])
    assert all(p is before[name] for name, p in model.named_parameters())


def test_frozen_parameters_are_left_to_autocast():
    model = net()
    model[1].requires_grad_(False)
    assert {module for module, _ in linear_parameters(model)} == {model[3], model[4]}


@pytest.mark.parametrize(
    ("settings", "groups"),
    [
        (("train.precision=bf16",), 1),
        (("train.precision=fp32",), 0),
        (("train.precision=bf16", "engine.compile=true"), 0),
    ],
)
def test_blocks_are_groups_in_bf16_unless_they_are_compiled(settings: tuple[str, ...], groups: int):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.norm = net(), nn.LayerNorm(8)

        def transformer_blocks(self) -> list[nn.Module]:
            return [self.block, self.norm]

    config, device = load_config(None, ["data.shards=x", *settings]), torch.device("cpu")
    assert len(cast_groups_of(Model(), config, device)) == groups
    assert cast_groups_of(net(), config, device) == []  # a task without blocks


@pytest.mark.parametrize("more", [(), ("engine.activation_checkpointing=true", "engine.micro_batches=2")], ids=str)
def test_a_run_has_the_same_bits(
    more: tuple[str, ...], tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def weights(name: str) -> dict[str, Tensor]:
        settings = ["train.steps=3", "train.validate_every=0", "train.precision=bf16", *more]
        config = load_config(None, [*tiny_overrides, *settings])
        trainer = Trainer(build_task(config, torch.device("cpu")), config, tmp_path / name)
        trainer.fit()
        return {k: v.clone() for k, v in trainer.engine.module.state_dict().items()}

    together = weights("together")
    groups: list[int] = []

    def none(*_args: object) -> list[Any]:
        groups.append(1)
        return []

    monkeypatch.setattr(torch_engine, "cast_groups_of", none)
    one_by_one = weights("one by one")
    assert groups
    assert all(torch.equal(together[name], value) for name, value in one_by_one.items())
