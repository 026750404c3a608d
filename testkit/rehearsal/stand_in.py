"""Stand-ins for CUDA tensors that carry forward, backward and optimizer without a GPU or a driver.

A stand-in is a :class:`FakeTensor`: it has a shape, a dtype and a device, and no data. PyTorch's own fake CUDA tensors carry
a forward pass only, because autograd's engine asks a tensor's C++ device for its CUDA stream. Here the C++ device is
``meta``, which the engine runs on the calling thread, while Python code and the dispatcher's keys (autocast, autograd) see
``cuda``.

Tensors on the CPU are real. A stand-in built from one keeps its values while they are integers, so that sizes which depend
on data (the number of tokens of a panel) are those of a real step.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from testkit.rehearsal import autocast
from testkit.rehearsal.record import Record, RehearsalError

CUDA = torch.device("cuda", 0)
VALUES_LIMIT = 1 << 22
"""Elements up to which integers on the device keep their values."""
_MOST = {torch.float64: 1 << 16} | dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), -1)
"""The same of other dtypes: draws of a panel's genes are float64."""
aten = torch.ops.aten
_NO_KERNEL = ("aten::empty", "aten::new_empty", "aten::detach", "aten::alias", "aten::lift_fresh", "aten::_unsafe_view")
_DATA_SHAPES = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
}
_WAITING = {"aten::equal", "aten::linalg_svd", "aten::_linalg_svd", "aten::linalg_lstsq", "aten::linalg_cholesky_ex"}
"""Operators whose CUDA implementation waits for the device."""
_PINNED: weakref.WeakSet[Any] = weakref.WeakSet()


def is_stand_in(x: Any) -> bool:
    """Return whether ``x`` stands for a tensor on the GPU."""
    return isinstance(x, FakeTensor)


class StandInMode(TorchDispatchMode):
    """Runs operators on stand-ins and records them; operators on CPU tensors alone run as usual."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        inside = any(is_stand_in(x) for x in leaves)
        device = kwargs.get("device")
        if device is not None:
            device = torch.device(device)
            if device.type == "meta":  # C++ code that read a stand-in's device
                device = kwargs["device"] = CUDA
        if not inside and (device is None or device.type != "cuda"):
            return self._on_cpu(func, args, kwargs)
        name = func._schema.name
        if name.startswith("comtip::"):
            return self._own(func, args, kwargs)
        if name.startswith(("c10d::", "_c10d_functional::")):
            return self._collective(func, name, args, kwargs)
        special = getattr(self, "_" + name.replace("::", "_"), None)
        if special is not None:
            return special(func, args, kwargs)
        if name in _DATA_SHAPES:
            return self._data_shape(func, name, args, kwargs)
        self._refuse_cpu(name, leaves)
        if name in _WAITING:
            self.record.wait(name)
        out = self._compute(func, args, kwargs)
        self._count(func, name)
        self._keep_values(func, args, kwargs, out)
        return out

    # -- running -----------------------------------------------------------------------------------------

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        with self.fake:
            return func(*args, **kwargs)

    def _count(self, func: Any, name: str) -> None:
        if not self.record.paused and not func.is_view and not name.startswith(_NO_KERNEL):
            self.record.operators[name] += 1

    def _on_cpu(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func._schema.name == "aten::_pin_memory":
            out = args[0].clone()
            _PINNED.add(out.untyped_storage())
            return out
        if func._schema.name == "aten::is_pinned":
            return args[0].untyped_storage() in _PINNED
        pinned = kwargs.pop("pin_memory", None)
        out = func(*args, **kwargs)
        if pinned:
            _PINNED.add(out.untyped_storage())
        return out

    def _refuse_cpu(self, name: str, leaves: list[Any]) -> None:
        for x in leaves:
            if isinstance(x, Tensor) and not is_stand_in(x) and x.device.type == "cpu" and x.ndim > 0:
                if name.startswith(("aten::index", "aten::_index_put", "aten::copy_", "aten::_foreach")):
                    continue  # index tensors are uploaded, see _aten_index
                raise RehearsalError(
                    f"{name}: an operand of shape {tuple(x.shape)} is on the CPU, others are on the GPU; move it"
                )

    def _own(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the implementation of an own operator, which launches kernels, and compare it with its fake."""
        with self:
            out = _implementation(func)(*args, **kwargs)
        declared = self._compute(func, args, kwargs)
        for a, b in zip(tree_leaves(out), tree_leaves(declared), strict=True):
            if isinstance(a, Tensor) and (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
                raise RehearsalError(f"{func}: returns {a.dtype} {tuple(a.shape)}, its fake {b.dtype} {tuple(b.shape)}")
        return out

    def _collective(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Count a collective; integers arrive as if every rank had sent the same ones."""
        if not self.record.paused:
            self.record.collectives[name] += 1
        self._refuse_cpu(name, tree_leaves(args))
        with torch._C._DisableTorchDispatch():
            out = func(*args, **kwargs)
        if name == "c10d::_allgather_base_":
            target, source = args[:2]
            values = _values(source)
            if values is None:
                _forget(target)
            else:
                target.values = values.repeat(target.shape[0] // max(1, source.shape[0]), *[1] * (source.ndim - 1))
        return out

    # -- values of integers ---------------------------------------------------------------------------------

    def _keep_values(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Give integer results their values if all operands have theirs."""
        results = [x for x in tree_leaves(out) if is_stand_in(x)]
        mutated = bool(func._schema.is_mutable)
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = all(_values(x) is not None or not is_stand_in(x) for x in leaves)
        whole = all(_keeps_values(x) for x in results)
        if not (known and whole and results):
            if mutated:
                for x in results:
                    _forget(x)
            return
        real = {k: torch.device("cpu") if k == "device" else v for k, v in kwargs.items()}
        real.pop("pin_memory", None)
        plain_args, plain = tree_map(_plain, (args, real))
        with torch._C._DisableTorchDispatch():
            computed = func(*plain_args, **plain)
        for x, value in zip(tree_leaves(out), tree_leaves(computed), strict=True):
            if is_stand_in(x) and isinstance(value, Tensor):
                x.values = value

    # -- waits ---------------------------------------------------------------------------------------------

    def _aten__local_scalar_dense(self, func: Any, args: Any, kwargs: Any) -> Any:
        (x,) = args
        self.record.wait("a number is read")
        values = _values(x)
        if values is not None:
            return values.item()
        if x.dtype == torch.bool:
            return True
        if x.is_floating_point():
            return 1.0
        raise RehearsalError(
            "item: the host reads an integer whose value is unknown here; compute it on the host, or keep it on the device"
        )

    def _data_shape(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        self.record.data_shape(name)
        self._count(func, name)
        values = [_values(x) for x in tree_leaves((args, kwargs)) if is_stand_in(x)]
        if any(v is None for v in values):
            # Nothing is known: every element of a mask is True, every element is distinct.
            plain = [torch.ones(x.shape, dtype=x.dtype) for x in tree_leaves((args, kwargs)) if is_stand_in(x)]
            if name.startswith("aten::uni"):
                plain = [torch.arange(x.numel()).view(x.shape).to(x.dtype) for x in plain]
        else:
            plain = [v for v in values if v is not None]
        left = iter(plain)
        plain_args, real = tree_map(lambda x: next(left) if is_stand_in(x) else x, (args, kwargs))
        with torch._C._DisableTorchDispatch():
            out = func(*plain_args, **real)
        return tree_map(lambda x: self.stand_in(x) if isinstance(x, Tensor) else x, out)

    def _aten_index(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self._indexed(func, args, kwargs)

    def _aten_index_put(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self._indexed(func, args, kwargs)

    def _aten_index_put_(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self._indexed(func, args, kwargs)

    def _aten__index_put_impl_(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self._indexed(func, args, kwargs)

    def _indexed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Index: a mask is turned into indices, which waits for their number; indices on the CPU are uploaded."""
        x, indices, *rest = args
        out_indices: list[Any] = []
        with self:
            for index in indices:
                if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                    out_indices += index.nonzero().unbind(1)
                elif isinstance(index, Tensor) and not is_stand_in(index) and is_stand_in(x):
                    out_indices.append(index.to(CUDA))
                else:
                    out_indices.append(index)
        args = (x, out_indices, *rest)
        out = self._compute(func, args, kwargs)
        self._count(func, func._schema.name)
        self._keep_values(func, args, kwargs, out)
        return out

    def _aten_repeat_interleave(self, func: Any, args: Any, kwargs: Any) -> Any:
        if kwargs.get("output_size") is None:
            self.record.data_shape("aten::repeat_interleave")
            values = _values(args[0])
            if values is None:
                raise RehearsalError(
                    "repeat_interleave: the output size is unknown, because the counts have no values here; pass output_size"
                )
            kwargs = kwargs | {"output_size": int(values.sum())}
        out = self._compute(func, args, kwargs)
        self._count(func, "aten::repeat_interleave")
        self._keep_values(func, args, kwargs, out)
        return out

    # -- copies --------------------------------------------------------------------------------------------

    def _aten__to_copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        (x,) = args
        target = kwargs.get("device")
        blocking = not kwargs.get("non_blocking", False)
        if not is_stand_in(x):
            return self._upload(x, kwargs, blocking)
        dtype = kwargs.get("dtype") or x.dtype
        if target is not None and target.type == "cpu":
            return self._download(x, dtype, blocking)
        if dtype == x.dtype and kwargs.get("memory_format") is None:
            # ``x.to(device)``, which returns x on a GPU; C++ compared with the meta device.
            with self:
                return aten.alias(x)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking")}
        out = self._compute(func, args, kwargs)
        self._count(func, "aten::_to_copy")
        self._keep_values(func, args, kwargs, out)
        return out

    def _upload(self, x: Tensor, kwargs: Any, blocking: bool) -> Tensor:
        pinned = x.untyped_storage() in _PINNED
        self.record.upload(x.numel() * x.element_size(), pinned=pinned, blocking=blocking)
        dtype = kwargs.get("dtype")
        return self.stand_in(x if dtype is None else x.to(dtype))

    def _download(self, x: Tensor, dtype: torch.dtype, blocking: bool) -> Tensor:
        self.record.wait("copy to the host" + ("" if blocking else ", not blocking"))
        values = _values(x)
        if values is None:
            return torch.ones(x.shape, dtype=dtype)
        return values.to(dtype, copy=True)

    def _aten_copy_(self, func: Any, args: Any, kwargs: Any) -> Any:
        target, source, *rest = args
        blocking = not (rest[0] if rest else kwargs.get("non_blocking", False))
        if not is_stand_in(target):
            return target.copy_(self._download(source, source.dtype, blocking))
        if not is_stand_in(source):
            source = self._upload(source, {}, blocking)
        out = self._compute(func, (target, source), {})
        self._count(func, "aten::copy_")
        self._keep_values(func, (target, source), {}, out)
        return out

    def stand_in(self, x: Tensor) -> FakeTensor:
        """Return a stand-in on the GPU for a CPU tensor, with the values of integers."""
        with self.fake:
            out = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA)
        if _keeps_values(x):
            out.values = x.detach().clone()
        return out


_FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray)


class PythonCalls(TorchFunctionMode):
    """Python-level calls that C++ would answer by asking the driver."""

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
            # C++ makes the tensor on the CPU and copies it, which blocks.
            built = func(*args, **{k: v for k, v in kwargs.items() if k not in ("device", "requires_grad")})
            return built.to(device).requires_grad_(kwargs.get("requires_grad", False))
        return func(*args, **kwargs)


def _with_index(x: Any) -> Any:
    """Return the device with its index: without one, C++ asks the driver for the current device."""
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
    """Choose as PyTorch does on an H100: flash attention for bf16 without a mask, else the memory-efficient kernel."""
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    if q.dtype in (torch.bfloat16, torch.float16) and attn_mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


def _values(x: Any) -> Tensor | None:
    return x.__dict__.get("values") if is_stand_in(x) else None


def _keeps_values(x: Tensor) -> bool:
    """Return whether a result keeps its values: integers, except large tables of spots by genes."""
    wide = x.ndim > 1 and x.shape[-1] > 64 and x.numel() > 1 << 16
    return not wide and x.numel() <= _MOST.get(x.dtype, VALUES_LIMIT)


def _plain(x: Any) -> Any:
    return x.__dict__["values"] if is_stand_in(x) else x


def _forget(x: Tensor) -> None:
    x.__dict__.pop("values", None)


def _implementation(func: Any) -> Any:
    """Return the Python function behind an operator that ``torch.library.custom_op`` defined."""
    from torch._library.custom_ops import OPDEFS

    return OPDEFS[func._schema.name]._init_fn


# -- the CUDA runtime -----------------------------------------------------------------------------------------


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


class _Properties:
    name = "NVIDIA H100 80GB HBM3"
    major, minor, multi_processor_count = 9, 0, 132
    total_memory = 80 * 2**30
    warp_size, max_threads_per_multi_processor, regs_per_multiprocessor = 32, 2048, 65536
    gcnArchName = ""


_module_apply = torch.nn.Module._apply


def _apply(module: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
    """Replace parameters and buffers by converted ones: PyTorch would swap storages, which stand-ins do not allow."""
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
        """Nested ``torch.cuda.device`` blocks."""

    @contextmanager
    def guard(self, device: Any) -> Iterator[None]:
        """Stand in for ``torch.cuda.device``."""
        index = 0 if device is None else device if isinstance(device, int) else torch.device(device).index or 0
        before, self.index = self.index, index
        self.entered += 1
        try:
            yield
        finally:
            self.index, self.entered = before, self.entered - 1


@contextmanager
def stand_in_cuda(record: Record) -> Iterator[StandInMode]:
    """Make ``torch.cuda`` look like one H100 inside the block, and tensors on it stand-ins."""
    mode, current = StandInMode(record), CurrentDevice()
    event, stream = type("Event", (_Event,), {"mode": mode}), type("Stream", (_Stream,), {"mode": mode})
    state = torch.zeros(16, dtype=torch.uint8)
    runtime: dict[str, Any] = {
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
        "get_device_properties": lambda *_a: _Properties,
        "get_device_name": lambda *_a: _Properties.name,
        "get_device_capability": lambda *_a: (9, 0),
        "max_memory_allocated": lambda *_a: 0,
        "memory_allocated": lambda *_a: 0,
        "empty_cache": lambda: None,
        "get_rng_state": lambda *_a: state,
        "set_rng_state": lambda *_a: None,
        "manual_seed": lambda _s: None,
        "manual_seed_all": lambda _s: None,
    }
    make = torch.Tensor._make_subclass

    def make_subclass(cls: Any, data: Tensor, *args: Any, dispatch_device: bool = False, **kwargs: Any) -> Tensor:
        return make(cls, data, *args, **kwargs)  # the C++ device stays meta

    def grouped(lists: Any, with_indices: bool = False) -> Any:
        out: dict[Any, Any] = {}
        for i, first in enumerate(lists[0]):
            columns, indices = out.setdefault((first.device, first.dtype), ([[] for _ in lists], []))
            for column, values in zip(columns, lists, strict=True):
                if values:
                    column.append(values[i])
            if with_indices:
                indices.append(i)
        return out

    import torch.optim.optimizer as optim
    import torch.utils._foreach_utils as foreach

    precision, clear = torch.get_float32_matmul_precision(), torch.clear_autocast_cache

    def clear_both() -> None:
        clear()
        autocast.clear_cache()

    with ExitStack() as stack:
        for name, value in runtime.items():
            if hasattr(torch.cuda, name):
                stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch.Tensor, "_make_subclass", staticmethod(make_subclass)))
        stack.enter_context(mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", grouped))
        # Not by the mode: it is off inside its own calls, such as ``backward``, and checkpointing runs forward passes there.
        sdpa = torch.nn.functional.scaled_dot_product_attention

        def attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return (_attention if is_stand_in(query) else sdpa)(query, *args, **kwargs)

        stack.enter_context(mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention))
        stack.enter_context(mock.patch.object(torch, "clear_autocast_cache", clear_both))
        is_cuda = property(lambda x: x.device.type == "cuda")
        stack.enter_context(mock.patch.object(FakeTensor, "is_cuda", is_cuda, create=True))
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", lambda x: x.cpu().tolist()))  # one copy
        graphs = "_accelerator_graph_capture_health_check"
        stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", _apply))
        if hasattr(torch.optim.Optimizer, graphs):
            stack.enter_context(mock.patch.object(torch.optim.Optimizer, graphs))
        for module in (optim, foreach):
            types = [*module._foreach_supported_types, FakeTensor]
            stack.enter_context(mock.patch.object(module, "_foreach_supported_types", types))
        stack.enter_context(autocast.replaced())
        stack.callback(torch.set_float32_matmul_precision, precision)
        mode.current = current
        stack.enter_context(PythonCalls())
        stack.enter_context(mode)
        yield mode
