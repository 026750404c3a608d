"""Replacements for ``torch.cuda`` and for calls that would query the driver, so that code on stand-ins runs without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from testkit.rehearsal import autocast
from testkit.rehearsal.record import Record
from testkit.rehearsal.stand_in import CUDA, StandInMode, aten, is_stand_in

_FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray)


class PythonCalls(TorchFunctionMode):
    """Replaces Python-level calls for which C++ would query the driver."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_with_index, (args, dict(kwargs or {})))
        if is_stand_in(kwargs.get("out")):
            kwargs.pop("device", None)  # C++ compares it with the meta device of ``out``
        device = kwargs.get("device")
        if (
            func in _FROM_DATA
            and isinstance(device, torch.device)
            and device.type == "cuda"
            and not is_stand_in(args[0])
        ):
            # C++ creates the tensor on the CPU and copies it, which blocks.
            built = func(*args, **{k: v for k, v in kwargs.items() if k not in ("device", "requires_grad")})
            return built.to(device).requires_grad_(kwargs.get("requires_grad", False))
        return func(*args, **kwargs)


def _with_index(x: Any) -> Any:
    """Return a CUDA device with its index, because C++ queries the driver for the current device if it has none."""
    if isinstance(x, torch.device):
        return CUDA if x.type == "cuda" and x.index is None else x
    return CUDA if isinstance(x, str) and x == "cuda" else x


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Run the attention that PyTorch selects on an H100: flash for fp16 and bf16 without a mask, otherwise memory-efficient."""
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    if q.dtype in (torch.bfloat16, torch.float16) and attn_mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


class _Event:
    """Stand-in for ``torch.cuda.Event``."""

    mode: StandInMode

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def record(self, *_args: Any) -> None: ...

    def wait(self, *_args: Any) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.mode.record.wait("an event is waited for")

    def elapsed_time(self, _other: Any) -> float:
        return 1.0


class _Stream:
    """Stand-in for ``torch.cuda.Stream``."""

    mode: StandInMode
    cuda_stream, device = 0, CUDA

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def wait_stream(self, *_args: Any) -> None: ...

    def wait_event(self, *_args: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event

    def synchronize(self) -> None:
        self.mode.record.wait("a stream is waited for")


class H100:
    """Properties of the simulated device."""

    name = "NVIDIA H100 80GB HBM3"
    major, minor, multi_processor_count = 9, 0, 132
    total_memory = 80 * 2**30
    warp_size, max_threads_per_multi_processor, regs_per_multiprocessor = 32, 2048, 65536
    gcnArchName = ""


_module_apply = torch.nn.Module._apply


def _apply(module: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
    """Replace parameters and buffers by converted ones; PyTorch would swap storages, which stand-ins do not support."""
    if not any(is_stand_in(x) for x in (*module.parameters(), *module.buffers())):
        return _module_apply(module, fn, recurse)
    for child in module.children() if recurse else ():
        child._apply(fn)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                module._parameters[name] = torch.nn.Parameter(fn(parameter), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else fn(buffer)
    return module


class CurrentDevice:
    """The current CUDA device, which ``torch.cuda.device`` changes."""

    def __init__(self) -> None:
        self.index = 0
        self.entered = 0
        """Number of ``torch.cuda.device`` blocks that are entered now."""

    @contextmanager
    def guard(self, device: Any) -> Iterator[None]:
        """Act as ``torch.cuda.device``."""
        index = 0 if device is None else device if isinstance(device, int) else torch.device(device).index or 0
        before, self.index = self.index, index
        self.entered += 1
        try:
            yield
        finally:
            self.index, self.entered = before, self.entered - 1


def _runtime(mode: StandInMode, current: CurrentDevice) -> dict[str, Any]:
    """Return {attribute of ``torch.cuda``: replacement} that simulate one H100 and record waits."""
    event, stream = type("Event", (_Event,), {"mode": mode}), type("Stream", (_Stream,), {"mode": mode})
    state = torch.zeros(16, dtype=torch.uint8)
    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_a, **_k: True,
        "current_device": lambda: current.index,
        "set_device": lambda _d: None,
        "device": current.guard,
        "_DeviceGuard": current.guard,
        "synchronize": lambda *_a: mode.record.wait("torch.cuda.synchronize"),
        "current_stream": lambda *_a: stream(),
        "default_stream": lambda *_a: stream(),
        "stream": lambda _s: current.guard(None),
        "Event": event,
        "Stream": stream,
        "get_device_properties": lambda *_a: H100,
        "get_device_name": lambda *_a: H100.name,
        "get_device_capability": lambda *_a: (9, 0),
        "max_memory_allocated": lambda *_a: 0,
        "memory_allocated": lambda *_a: 0,
        "empty_cache": lambda: None,
        "get_rng_state": lambda *_a: state,
        "set_rng_state": lambda *_a: None,
        "manual_seed": lambda _s: None,
        "manual_seed_all": lambda _s: None,
    }


def _grouped(lists: Any, with_indices: bool = False) -> Any:
    """Act as ``_group_tensors_by_device_and_dtype``, which would group by the meta device."""
    out: dict[Any, Any] = {}
    for i, first in enumerate(lists[0]):
        columns, indices = out.setdefault((first.device, first.dtype), ([[] for _ in lists], []))
        for column, values in zip(columns, lists, strict=True):
            if values:
                column.append(values[i])
        if with_indices:
            indices.append(i)
    return out


def enter_tensor_patches(stack: ExitStack) -> None:
    """Replace methods of tensors and modules that depend on the C++ device, until ``stack`` closes."""
    make = torch.Tensor._make_subclass

    def make_subclass(cls: Any, data: Tensor, *args: Any, dispatch_device: bool = False, **kwargs: Any) -> Tensor:
        return make(cls, data, *args, **kwargs)  # the C++ device stays meta

    stack.enter_context(mock.patch.object(torch.Tensor, "_make_subclass", staticmethod(make_subclass)))
    stack.enter_context(mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", _grouped))
    is_cuda = property(lambda x: x.device.type == "cuda")
    stack.enter_context(mock.patch.object(FakeTensor, "is_cuda", is_cuda, create=True))
    stack.enter_context(mock.patch.object(FakeTensor, "tolist", lambda x: x.cpu().tolist()))  # one copy
    stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", _apply))


def _enter_attention_and_autocast(stack: ExitStack) -> None:
    """Select attention as on a GPU and replace autocast, until ``stack`` closes."""
    # The mode cannot do this: it is off inside its own calls, such as ``backward``, where checkpointing runs forward passes.
    sdpa, clear = torch.nn.functional.scaled_dot_product_attention, torch.clear_autocast_cache

    def attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (_attention if is_stand_in(query) else sdpa)(query, *args, **kwargs)

    def clear_both() -> None:
        clear()
        autocast.clear_cache()

    stack.enter_context(mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention))
    stack.enter_context(mock.patch.object(torch, "clear_autocast_cache", clear_both))
    stack.enter_context(autocast.replaced())


def _enter_optimizer_patches(stack: ExitStack) -> None:
    """Let optimizers use their foreach implementation on stand-ins, until ``stack`` closes."""
    import torch.optim.optimizer as optim
    import torch.utils._foreach_utils as foreach

    graphs = "_accelerator_graph_capture_health_check"
    if hasattr(torch.optim.Optimizer, graphs):
        stack.enter_context(mock.patch.object(torch.optim.Optimizer, graphs))
    for module in (optim, foreach):
        types = [*module._foreach_supported_types, FakeTensor]
        stack.enter_context(mock.patch.object(module, "_foreach_supported_types", types))


@contextmanager
def stand_in_cuda(record: Record) -> Iterator[StandInMode]:
    """Simulate one H100 inside the block: ``torch.cuda`` is replaced, and tensors on the GPU are stand-ins."""
    mode, current = StandInMode(record), CurrentDevice()
    precision = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        for name, value in _runtime(mode, current).items():
            if hasattr(torch.cuda, name):
                stack.enter_context(mock.patch.object(torch.cuda, name, value))
        enter_tensor_patches(stack)
        _enter_optimizer_patches(stack)
        _enter_attention_and_autocast(stack)
        stack.callback(torch.set_float32_matmul_precision, precision)
        mode.current = current
        stack.enter_context(PythonCalls())
        stack.enter_context(mode)
        yield mode
