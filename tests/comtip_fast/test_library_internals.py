"""Private names of DeepSpeed and PyTorch are used in one module each, exist in the installed versions, and are bounded."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from types import ModuleType

import comtip_kernels
import pytest
import torch

import comtip_fast
from comtip_fast.runtime import torch_internals
from comtip_fast.training.distributed import deepspeed_internals as internals

PACKAGE = Path(comtip_fast.__file__).parent
KERNELS = Path(comtip_kernels.__file__).parent
MODULE, TORCH_MODULE = Path(internals.__file__), Path(torch_internals.__file__)
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
OF_PARAMETERS = "_hp_mapping"
"""Attribute that ZeRO 1 and 2 add to parameters."""


@pytest.fixture(scope="module")
def deepspeed() -> ModuleType:
    return pytest.importorskip("deepspeed")


TORCH = {
    "torch.autograd.Variable": "_execution_engine",
    "torch": "_foreach_norm",
    "torch.nn.Module()": "_parameters",
    "torch.ops.aten.mm.default": "_overloadpacket",
    "torch.utils.cpp_extension": "_get_build_directory",
    "torch.utils": "_python_dispatch",
    "torch.ops.aten": "_scaled_dot_product_flash_attention_for_cpu",
}
"""{object: private name that it must have}; with the names below, all that are used."""
MORE_OF_TORCH = {"_foreach_copy_": "torch", "_pytree": "torch.utils", "_dynamo": "torch"}
MORE_OF_TORCH |= dict.fromkeys(("_compiled_call_impl", "_call_impl"), "torch.nn.Module()")
MORE_OF_TORCH |= dict.fromkeys(
    ("_foreach_sub", "_foreach_mul_", "_foreach_add_", "_fused_adamw_", "_fused_sdp_choice"), "torch"
)
BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"
STANDARD_LIBRARY = {"_exit": "os._exit is public", "_SubParsersAction": "argparse has no public name for it"}
STANDARD_LIBRARY |= {"_actions": "the options of an argparse parser"}


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
    listed = {*ZERO_3, *ZERO_1_2, "__compatible_ops__", OF_PARAMETERS}
    assert private_attributes(MODULE) == {name for name in listed if name.startswith("_")}
    assert private_attributes(TORCH_MODULE) | private_imports(TORCH_MODULE) == {
        *TORCH.values(),
        *MORE_OF_TORCH,
        BACKWARD,
    }


def private_imports(path: Path) -> set[str]:
    """Return private modules and names that the file imports from libraries."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("comtip_"):
            words = [*node.module.split("."), *(alias.name for alias in node.names)]
            found |= {word for word in words if re.match(r"_(?!_)", word)}
    return found


def own_names(files: list[Path]) -> set[str]:
    """Return the private names that the files define."""
    found = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
    return found


def test_no_other_module_uses_private_names_of_libraries():
    files = sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])
    own = own_names(files) - {*TORCH.values(), *MORE_OF_TORCH}
    for path in files:
        if path not in (MODULE, TORCH_MODULE):
            names = private_attributes(path) - own | private_imports(path)
            assert not names - set(STANDARD_LIBRARY), path


def test_names_of_pytorch():
    import torch.utils.cpp_extension  # PyTorch does not import it

    for owner, name in [*TORCH.items(), *((owner, name) for name, owner in MORE_OF_TORCH.items())]:
        assert hasattr(eval(owner, {"torch": torch}), name), f"PyTorch {torch.__version__}: {owner} has no {name}"
    assert torch_internals.packet_of(torch.ops.aten.mm.default) is torch.ops.aten.mm
    assert hasattr(torch.ops.aten, BACKWARD)
    linear = torch.nn.Linear(2, 1)
    torch_internals.parameters_of(linear)["bias"] = torch.full((1,), 3.0)
    assert linear.bias.item() == 3.0
    target = torch.zeros(2, dtype=torch.bfloat16)
    torch_internals.copy_all([target], [torch.tensor([1.0, 2.0])])
    assert target.tolist() == [1.0, 2.0]


def test_a_newer_pytorch_is_reported():
    major, minor = torch_internals.TESTED
    assert torch_internals.untested() is None, "test with this release, then raise TESTED"
    assert torch_internals.untested(f"{major}.{minor}.9+cu130") is None
    for version in (f"{major}.{minor + 1}.0", f"{major}.{minor + 1}.0a0+git12", f"{major + 1}.0.0"):
        assert f"PyTorch {version} is newer than {major}.{minor}" in str(torch_internals.untested(version))


@pytest.mark.parametrize("name", ZERO_3)
def test_names_of_zero_3(name: str, deepspeed: ModuleType):
    from deepspeed.runtime.zero import stage3

    assert defines(stage3, name), f"DeepSpeed {deepspeed.__version__} has no {name}"


@pytest.mark.parametrize("name", ZERO_1_2)
def test_names_of_zero_1_and_2(name: str, deepspeed: ModuleType):
    from deepspeed.runtime.zero import stage_1_and_2

    assert defines(stage_1_and_2, name), f"DeepSpeed {deepspeed.__version__} has no {name}"


def test_names_of_zero_1_and_2_on_parameters(deepspeed: ModuleType):
    from deepspeed.utils import mixed_precision_linkage
    from deepspeed.utils.tensor_fragment import tensor_fragment as fragment

    source = Path(mixed_precision_linkage.__file__).read_text(encoding="utf-8")
    assert f"lp_param.{OF_PARAMETERS} = None" in source
    assert f"lp_param.{OF_PARAMETERS} = get_hp_fragment_mapping(" in source
    assert "lp_fragment_address" in fragment.__dataclass_fields__
    assert "optim_fragment" in inspect.getsource(fragment.get_optim_state_fragment)


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
        torch_internals.call_after_backward(lambda: order.append("callback"))

    loss.register_hook(queue)
    loss.backward()
    assert order == ["gradient", "callback"]


def test_the_build_folder_of_an_extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert torch_internals.build_folder("some_extension").parent == tmp_path


def test_the_version_is_bounded():
    (line,) = re.findall(r"^deepspeed = \[\"(.*)\"\]$", (PACKAGE.parent / "pyproject.toml").read_text(), re.MULTILINE)
    assert re.fullmatch(r"deepspeed>=0\.19,<0\.20", line)


def test_no_module_imports_the_extension_compiler_at_import():
    """Regression test: every command warned of a missing CUDA runtime on machines with the CUDA toolkit and no GPU."""
    for path in Path(comtip_fast.__file__).parent.rglob("*.py"):
        imports = [n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.ImportFrom)]
        assert "cpp_extension" not in [a.name for n in imports for a in n.names], path
