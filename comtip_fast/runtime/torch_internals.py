"""All uses of private names of PyTorch, and the newest release that was tested with them.

``tests/comtip_fast/test_library_internals.py`` lists the names and fails if the installed version lacks one. Private names of
DeepSpeed are used in :mod:`comtip_fast.training.distributed.deepspeed_internals`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

__all__ = [
    "CPU_ATTENTION",
    "CPU_ATTENTION_BACKWARD",
    "TESTED",
    "TorchDispatchMode",
    "add_to_all",
    "attention_backend",
    "build_folder",
    "call_after_backward",
    "call_uncompiled",
    "copy_all",
    "fused_adamw",
    "is_compiled",
    "keep_blocks_whole",
    "mark_dynamic",
    "move_towards",
    "norms",
    "packet_of",
    "parameters_of",
    "scale_all",
    "tree_map",
    "untested",
]

TESTED = (2, 14)
"""Newest release of PyTorch that the tests ran with. ``pyproject.toml`` has the oldest."""
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
"""Operators of the fused attention on CPUs, for which PyTorch's FLOP counter has no formula."""


def attention_backend(heads: int, tokens: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend that ``scaled_dot_product_attention`` chooses in training, in lower case, such as ``flash`` or ``math``.

    Parameters
    ----------
    heads, tokens, head_dim
        Sizes of q, k and v, which have the strides of one projection to all three.
    device, dtype
        Device and dtype of q, k and v.
    """
    qkv = torch.empty(1, tokens, 3, heads, head_dim, device=device, dtype=dtype, requires_grad=True)
    q, k, v = qkv.transpose(1, 3).unbind(2)
    chosen = torch._fused_sdp_choice(q, k, v)
    return SDPBackend(chosen).name.lower().removesuffix("_attention")


def untested(version: str | None = None) -> str | None:
    """Return a warning if PyTorch is newer than :data:`TESTED`, else None.

    Private names can change in any release. A missing name raises an error; the warning is for a name that behaves differently.

    Parameters
    ----------
    version
        Version of PyTorch; None takes the installed one.
    """
    version = version or torch.__version__
    release = re.match(r"(\d+)\.(\d+)", version)
    if release is None or (int(release[1]), int(release[2])) <= TESTED:
        return None
    newest, first = f"{TESTED[0]}.{TESTED[1]}", f"{TESTED[0]}.{TESTED[1] + 1}"
    return (
        f"PyTorch {version} is newer than {newest}, the newest release tested with the private functions that this package uses; "
        f"check that results agree with those of PyTorch {newest}, or install torch<{first}"
    )


def call_after_backward(callback: Callable[[], None]) -> None:
    """Queue ``callback`` for the end of the running backward pass, after the callbacks that are already queued."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm of each tensor, (n,), in one call, as PyTorch's ``get_total_norm`` computes it."""
    if not tensors:
        return torch.zeros(0)
    return torch.stack(torch._foreach_norm(list(tensors)))


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into the target of the same shape, with a cast if the dtypes differ, in one call."""
    torch._foreach_copy_(list(targets), list(sources))


def move_towards(values: Sequence[Tensor], targets: Sequence[Tensor], share: float | Tensor) -> None:
    """Add ``share * (target - value)`` to every value, in place; ``share`` may be a scalar on the device.

    PyTorch's ``_foreach_lerp_`` needs a number, which the host would have to read from the device.
    """
    change = torch._foreach_sub(list(targets), list(values))
    torch._foreach_mul_(change, share)
    torch._foreach_add_(list(values), change)


def add_to_all(values: Sequence[Tensor], term: Tensor) -> None:
    """Add the scalar ``term`` to every tensor, in place and in one call."""
    torch._foreach_add_(list(values), [term] * len(values))


def scale_all(values: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply every tensor by the scalar ``factor``, in place and in one call."""
    torch._foreach_mul_(list(values), factor)


def fused_adamw(
    parameters: list[Tensor],
    gradients: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    counters: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
    skip: Tensor,
) -> None:
    """Call the kernel of PyTorch's fused AdamW on parameters of one device and dtype.

    Parameters
    ----------
    parameters, gradients
        Parameters, which are updated in place, and their gradients.
    averages, squares
        Moments of the gradients, which are updated in place.
    counters
        Number of the step of each parameter, from 1: scalars on the device.
    lr, betas, weight_decay, eps
        As in ``torch.optim.AdamW``.
    skip
        fp32 scalar on the device; if it is 1, nothing changes.
    """
    torch._fused_adamw_(
        parameters,
        gradients,
        averages,
        squares,
        [],
        counters,
        amsgrad=False,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
        grad_scale=None,
        found_inf=skip,
    )


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """Return the dict of a module's own parameters by attribute name, in which an entry may be replaced by any tensor."""
    return module._parameters


def is_compiled(module: nn.Module) -> bool:
    """Return whether calls of the module run the code that :meth:`torch.nn.Module.compile` built for it."""
    return module._compiled_call_impl is not None


def call_uncompiled(module: nn.Module, *args: Any) -> Any:
    """Call a compiled module without its compiled code, but with its hooks."""
    return module._call_impl(*args)


def mark_dynamic(tensor: Tensor, dims: list[int]) -> None:
    """Let compiled code accept any size of these dimensions; a size that the code needs as a constant remains constant."""
    from torch._dynamo.decorators import maybe_mark_dynamic  # imported here: it takes seconds, and few runs compile

    maybe_mark_dynamic(tensor, dims)


def keep_blocks_whole() -> None:
    """Compile a block inside DDP's forward pass as one graph, in this process from now on.

    By default PyTorch cuts such a graph where its weights fill a bucket of DDP, the last one after 1 MiB, so that gradients are
    reduced before the backward pass of the graph ends. Models compiled as a whole need that. A block of a few layers would be cut
    after most of its layers, each part compiled separately, while the reduction already overlaps with the backward pass of the
    blocks before it.
    """
    from torch._dynamo import config  # imported here: it takes seconds, and few runs compile

    config.optimize_ddp = False


def build_folder(name: str) -> Path:
    """Return the folder in which PyTorch compiles the extension ``name``."""
    # The import warns on a machine with the CUDA toolkit and no GPU, and is needed for DeepSpeed alone.
    from torch.utils import cpp_extension

    return Path(cpp_extension._get_build_directory(name, verbose=False))


def packet_of(operator: Any) -> Any:
    """Return the operator without its overload, e.g. ``aten.mm`` of ``aten.mm.default``."""
    return operator._overloadpacket
