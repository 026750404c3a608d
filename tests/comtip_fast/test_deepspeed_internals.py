"""Private names of DeepSpeed and PyTorch that the package uses exist in the installed versions."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import comtip_fast
from comtip_fast.training.distributed import deepspeed_internals as internals

PACKAGE = Path(comtip_fast.__file__).parent
MODULE = Path(internals.__file__)
SWAP_METHODS = (
    "_swappable_optimizer_subgroup",
    "_optimizer_states_and_gradient_swap_in",
    "_optimizer_states_and_gradient_swap_out",
)
ZERO_3 = (
    *SWAP_METHODS,
    "fp32_partitioned_groups_flat",
    "sub_group_to_group_id",
    "_global_grad_norm",
    "_get_norm_groups",
    "clip_grad",
)
ZERO_1_2 = (
    "_lazy_init_hp_params_optimizer_state",
    "single_partition_of_fp32_groups",
    "_global_grad_norm",
    "scaled_global_norm",
    "clip_grad",
)


@pytest.fixture(scope="module")
def deepspeed() -> ModuleType:
    return pytest.importorskip("deepspeed")


def private_attributes(path: Path) -> set[str]:
    """Return private attributes that the file reads from anything but ``self`` and ``cls``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and re.match(r"_(?!_)|__compatible", node.attr):
            owner = node.value
            if not (isinstance(owner, ast.Name) and owner.id in {"self", "cls"}):
                found.add(node.attr)
    return found


def defines(module: ModuleType, name: str) -> bool:
    """Return whether the source of a module defines a method or assigns an attribute of this name."""
    source = Path(module.__file__ or "").read_text(encoding="utf-8")
    return re.search(rf"def {name}\(|self\.{name}(: [^=]+)? = ", source) is not None


def test_every_private_name_is_listed_here():
    foreach = {"_foreach_norm", "_foreach_sub", "_foreach_mul_", "_foreach_add_"}
    listed = {*ZERO_3, *ZERO_1_2, *foreach, "_execution_engine", "_get_build_directory", "__compatible_ops__"}
    assert private_attributes(MODULE) <= listed
    assert {name for name in listed if name.startswith("_")} <= private_attributes(MODULE)


def test_no_other_module_of_training_uses_private_names_of_libraries():
    for path in sorted((PACKAGE / "training").rglob("*.py")):
        if path != MODULE:
            assert not private_attributes(path) - {"_exit"}, path  # os._exit is public


@pytest.mark.parametrize("name", ZERO_3)
def test_names_of_zero_3(name: str, deepspeed: ModuleType):
    from deepspeed.runtime.zero import stage3

    assert defines(stage3, name), f"DeepSpeed {deepspeed.__version__} has no {name}"


@pytest.mark.parametrize("name", ZERO_1_2)
def test_names_of_zero_1_and_2(name: str, deepspeed: ModuleType):
    from deepspeed.runtime.zero import stage_1_and_2

    assert defines(stage_1_and_2, name), f"DeepSpeed {deepspeed.__version__} has no {name}"


def test_names_of_the_deepspeed_package(deepspeed: ModuleType):
    assert "cdb" in vars(deepspeed.comm.comm)
    before = dict(deepspeed.ops.__compatible_ops__)
    assert "deepspeed_shm_comm" in before
    try:
        internals.disable_shm_comm(deepspeed)
        assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
    finally:
        deepspeed.ops.__compatible_ops__.update(before)


def test_the_callback_runs_after_the_backward_pass():
    order: list[str] = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda _: order.append("gradient"))
    loss = x.sum()

    def queue(_gradient: torch.Tensor) -> None:
        internals.call_after_backward(lambda: order.append("callback"))

    loss.register_hook(queue)
    loss.backward()
    assert order == ["gradient", "callback"]


def test_the_build_folder_of_an_extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert internals.build_folder("some_extension").parent == tmp_path


def test_the_version_is_bounded():
    (line,) = re.findall(r"^deepspeed = \[\"(.*)\"\]$", (PACKAGE.parent / "pyproject.toml").read_text(), re.MULTILINE)
    assert re.fullmatch(r"deepspeed>=0\.19,<0\.20", line)
