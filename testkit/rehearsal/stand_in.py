"""Stand-ins for CUDA tensors, with which forward and backward passes and optimizers run without a GPU or a driver.

A stand-in is a :class:`FakeTensor`: it has a shape, a dtype and a device, but no data. PyTorch's own fake CUDA tensors support
only the forward pass, because autograd's engine queries the CUDA stream of a tensor's C++ device. Here the C++ device is
``meta``, for which the engine uses the calling thread, while Python code and the dispatcher's keys (autocast, autograd) see
``cuda``.

Tensors on the CPU are real. A stand-in built from an integer tensor keeps its values, so that sizes that depend on data (the
number of tokens of a panel) are those of a real step.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from testkit.rehearsal.costs import moved_bytes, operator_flops, tensor_bytes
from testkit.rehearsal.record import Record, RehearsalError

CUDA = torch.device("cuda", 0)
VALUES_LIMIT = 1 << 22
"""Maximum number of elements of an integer tensor on the device that keeps its values."""
_MOST = {torch.float64: 1 << 16} | dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), -1)
"""The same for other dtypes; float64 keeps its values because the random draws of a panel's genes have this dtype."""
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
_SUMS = ("c10d::allreduce", "c10d::reduce", "c10d::_reduce_scatter_base")
"""Prefixes of the collectives that add operands of several ranks."""
_PINNED: weakref.WeakSet[Any] = weakref.WeakSet()


def is_stand_in(x: Any) -> bool:
    """Return whether ``x`` is a stand-in for a tensor on the GPU."""
    return isinstance(x, FakeTensor)


class StandInMode(TorchDispatchMode):
    """Runs and records operators on stand-ins; operators with only CPU tensors run as usual."""

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
        self._count(func, args, kwargs, out)
        self._keep_values(func, args, kwargs, out)
        return out

    # -- running -----------------------------------------------------------------------------------------

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        with self.fake:
            return func(*args, **kwargs)

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func._schema.name
        launches = not name.startswith(_NO_KERNEL) and not (func.is_view and _shares_storage((args, kwargs), out))
        if self.record.observer is not None:
            self.record.observer.operator(name, (args, kwargs), out, launches=launches)
        if not self.record.paused and launches:
            self.record.operators[name] += 1
            self.record.flops += operator_flops(func, args, kwargs, out)
            self.record.moved_bytes += moved_bytes(args, kwargs, out)

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
        """Run the implementation of one of the project's operators, and compare the result with that of its fake."""
        with self:
            out = _implementation(func)(*args, **kwargs)
        declared = self._compute(func, args, kwargs)
        for a, b in zip(tree_leaves(out), tree_leaves(declared), strict=True):
            if isinstance(a, Tensor) and (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
                kinds = [f"{x.dtype} {tuple(x.shape)} on {x.device}" for x in (a, b)]
                raise RehearsalError(f"{func}: returns {kinds[0]}, its fake {kinds[1]}; make both the same")
        return out

    def _collective(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Count and run a collective; gathered integers have the values as if every rank had sent the same ones."""
        if not self.record.paused:
            self.record.collectives[name] += 1
            self.record.sent[name] += _sent_bytes(name, args)
        self._refuse_cpu(name, tree_leaves(args))
        _refuse_16_bits(name, tree_leaves(args))
        with torch._C._DisableTorchDispatch():
            out = func(*args, **kwargs)
        if self.record.observer is not None:
            self.record.observer.operator(name, (args, kwargs), out)
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
        """Compute the values of integer results if the values of all operands are known; otherwise discard them."""
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
        values = [_values(x) for x in tree_leaves((args, kwargs)) if is_stand_in(x)]
        if any(v is None for v in values):
            # The values are unknown: assume that all elements of a mask are True, and all elements are distinct.
            plain = [torch.ones(x.shape, dtype=x.dtype) for x in tree_leaves((args, kwargs)) if is_stand_in(x)]
            if name.startswith("aten::uni"):
                plain = [torch.arange(x.numel()).view(x.shape).to(x.dtype) for x in plain]
        else:
            plain = [v for v in values if v is not None]
        left = iter(plain)
        plain_args, real = tree_map(lambda x: next(left) if is_stand_in(x) else x, (args, kwargs))
        with torch._C._DisableTorchDispatch():
            out = func(*plain_args, **real)
        self._count(func, args, kwargs, out)
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
        """Run an indexing operator: masks are converted to indices, which is a wait; indices on the CPU are uploaded."""
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
        self._count(func, args, kwargs, out)
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
        self._count(func, args, kwargs, out)
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
            # ``x.to(device)`` returns x on a GPU; C++ arrives here because it compares with the meta device.
            with self:
                return aten.alias(x)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking")}
        out = self._compute(func, args, kwargs)
        self._count(func, args, kwargs, out)
        self._keep_values(func, args, kwargs, out)
        return out

    def _upload(self, x: Tensor, kwargs: Any, blocking: bool) -> Tensor:
        pinned = x.untyped_storage() in _PINNED
        self.record.upload(x.numel() * x.element_size(), pinned=pinned, blocking=blocking)
        dtype = kwargs.get("dtype")
        out = self.stand_in(x if dtype is None else x.to(dtype))
        if self.record.observer is not None:
            self.record.observer.upload(out)
        return out

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
        self._count(func, (source,), {}, out)
        self._keep_values(func, (target, source), {}, out)
        return out

    def stand_in(self, x: Tensor) -> FakeTensor:
        """Return a stand-in on the GPU for a CPU tensor, with its values if :func:`_keeps_values` is True."""
        with self.fake:
            out = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA)
        if _keeps_values(x):
            out.values = x.detach().clone()
        return out


def _sent_bytes(name: str, args: Any) -> int:
    """Return the bytes that a rank passes to a collective: those of the first operand, or of the second if the first is the result."""
    given = args[1] if name.startswith(("c10d::_allgather_base", "c10d::_reduce_scatter_base")) else args[0]
    return tensor_bytes(tree_leaves(given))


def _refuse_16_bits(name: str, leaves: list[Any]) -> None:
    """Raise RehearsalError for a sum over ranks in 16 bits: NCCL rounds every partial sum to the dtype of the operand."""
    dtypes = {x.dtype for x in leaves if isinstance(x, Tensor)} & {torch.bfloat16, torch.float16}
    if name.startswith(_SUMS) and dtypes:
        raise RehearsalError(f"{name}: sums {dtypes.pop()} over ranks; convert the operand to fp32")


def _shares_storage(given: Any, out: Any) -> bool:
    """Return whether every result has the storage of an operand.

    Inside the project's operators, ``to``, ``contiguous`` and ``reshape`` arrive here as they were called. Their schema says that
    they return a view, but a cast or a change of the layout is a copy.
    """
    storages = {x.untyped_storage()._cdata for x in tree_leaves(given) if isinstance(x, Tensor)}
    return all(x.untyped_storage()._cdata in storages for x in tree_leaves(out) if isinstance(x, Tensor))


def _values(x: Any) -> Tensor | None:
    return x.__dict__.get("values") if is_stand_in(x) else None


def _keeps_values(x: Tensor) -> bool:
    """Return whether a tensor keeps its values: small ones of the right dtype, except tables of spots by genes."""
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
