"""Weights of a model that no rank has to hold whole while it is built and loaded, until ZeRO 3 takes them over.

Every rank runs the same code with the same random numbers, so the weights have the same bits as under DDP. In the context of
:func:`paging`, the storage of a large parameter is filled when an operation uses it, and reduced to this rank's elements
when others need the space. Rank r of W keeps the elements from r ceil(n/W) of the n elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from comtip_fast.collectives import Group
from comtip_fast.config.schema import RunConfig
from comtip_fast.runtime.torch_internals import TorchDispatchMode, storage_key, tree_map

RESIDENT_BYTES = 64 << 20
"""Size in bytes of the parameters that are kept whole beside those that an operation uses."""
SMALLEST_BYTES = 64 << 10
"""Size in bytes from which a parameter is divided; smaller ones stay whole."""
_aten = torch.ops.aten
_ALIASES = {_aten.detach.default, _aten.alias.default}
"""Operators that do not read their argument."""
_FILLS = {_aten.uniform_.default, _aten.normal_.default, _aten.zero_.default, _aten.fill_.Scalar, _aten.copy_.default}
"""Operators that overwrite every element of their first argument."""
_OF_MODULE: WeakKeyDictionary[nn.Module, PagedWeights] = WeakKeyDictionary()


@dataclass(eq=False)
class _Page:
    """A parameter of n elements, of which this rank keeps a part."""

    tensor: Tensor
    """1-D tensor of n elements over the storage of the parameter, which is empty while the parameter is divided."""
    shard: Tensor | None = None
    """This rank's elements; None while the parameter is whole."""

    @property
    def bytes(self) -> int:
        """Return the size of the whole parameter in bytes."""
        return self.tensor.numel() * self.tensor.element_size()


class PagedWeights(TorchDispatchMode):
    """Divides the parameters that are registered inside this context over the ranks.

    Inside the context, every rank must run the same operations on parameters, because they can be collective calls. Outside of
    it, divided parameters have shape and dtype, but must not be read or written.

    Parameters
    ----------
    group
        Ranks of the run.
    """

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group
        self._pages: dict[int, _Page] = {}
        self._resident: dict[int, _Page] = {}
        """Whole parameters, the one that was used last at the end."""
        self._adopted: set[int] | None = None
        """Keys of the parameters of the complete module, once there is one."""
        self._hook: Any = None

    def __enter__(self) -> PagedWeights:
        self._hook = register_module_parameter_registration_hook(self._registered)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hook.remove()
        if self._adopted is not None:  # forget the parameters of other modules, such as the parent of train.start_from
            self._keep(self._adopted)
        self._make_space(0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator on parameters that are whole."""
        kwargs = kwargs or {}
        if self._pages and func not in _ALIASES:
            used: dict[int, _Page] = {}
            first = args[0] if args else None

            def use(value: Any) -> Any:
                page = self._pages.get(storage_key(value)) if isinstance(value, Tensor) else None
                if page is not None and id(page) not in used:
                    used[id(page)] = page
                    self._make_whole(page, read=not (value is first and _fills(func, args, page.tensor)))
                return value

            tree_map(use, (args, kwargs))
            if used:
                self._make_space(RESIDENT_BYTES, set(used))
        out = func(*args, **kwargs)
        copies = func is _aten.clone.default and kwargs.get("memory_format") is torch.preserve_format
        if copies and storage_key(args[0]) in self._pages:  # a deep copy of a parameter, as for an EMA teacher
            self._track(out)
        return out

    def adopt(self, module: nn.Module, keep: Iterable[nn.Parameter] = ()) -> None:
        """Divide all large parameters of a complete module except those of ``keep``, and forget parameters it does not have."""
        whole = {id(p) for p in keep}
        wanted: dict[int, _Page] = {}
        for parameter in module.parameters():
            key = storage_key(parameter)
            if id(parameter) in whole:
                if key in self._pages:
                    self._make_whole(self._pages[key])
            elif key in self._pages or _is_large(parameter):
                wanted[key] = self._pages.get(key) or self._new_page(parameter)
        self._pages = wanted
        self._adopted = set(wanted)
        self._keep(self._adopted)
        self._make_space(0)
        _OF_MODULE[module] = self

    def move(self, module: nn.Module, device: torch.device) -> None:
        """Move the divided parameters of a module to a device."""
        moved: dict[int, _Page] = {}
        for parameter in module.parameters():
            page = self._pages.get(storage_key(parameter))
            if page is None:
                continue
            assert page.shard is not None
            if parameter.device == device:
                moved[storage_key(parameter)] = page
                continue
            parameter.data = torch.empty_like(parameter, device=device)
            moved[storage_key(parameter)] = new = self._new_page(parameter)
            new.shard = page.shard.to(device)
            parameter.untyped_storage().resize_(0)
        self._pages, self._adopted = moved, set(moved)

    @property
    def bytes(self) -> int:
        """Return the size in bytes of this rank's elements of the divided parameters."""
        return sum(page.shard.nbytes for page in self._pages.values() if page.shard is not None)

    def names(self, module: nn.Module) -> set[str]:
        """Return the names of the divided parameters of a module."""
        return {name for name, p in module.named_parameters() if storage_key(p) in self._pages}

    def hand_over(self, module: nn.Module, take: Callable[[nn.Parameter], None]) -> None:
        """Call ``take`` with every parameter of a module, one after another; the parameter is whole during the call.

        ``take`` must replace the parameter's data.
        """
        for parameter in module.parameters():
            page = self._pages.pop(storage_key(parameter), None)
            if page is not None:
                self._make_whole(page)
                self._resident.clear()
            take(parameter)

    def _registered(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        """Track a parameter when it is assigned to a module."""
        if parameter is not None:
            self._track(parameter)

    def _track(self, parameter: Tensor) -> None:
        """Divide a parameter when its space is needed, if it is large."""
        key = storage_key(parameter)
        if key not in self._pages and _is_large(parameter):
            self._pages[key] = self._resident[key] = self._new_page(parameter)

    def _keep(self, keys: set[int]) -> None:
        """Forget all parameters but these."""
        self._pages = {k: page for k, page in self._pages.items() if k in keys}
        self._resident = {k: page for k, page in self._pages.items() if page.shard is None}

    def _new_page(self, parameter: Tensor) -> _Page:
        return _Page(parameter.detach().view(-1))

    def _range(self, n: int) -> tuple[int, int]:
        """Return the first own element of n, and the end."""
        size = -(-n // self.group.size)
        return min(self.group.rank * size, n), min((self.group.rank + 1) * size, n)

    def _make_whole(self, page: _Page, *, read: bool = True) -> None:
        """Fill the storage of a parameter with the elements of all ranks, unless they will be overwritten."""
        key = storage_key(page.tensor)
        if page.shard is not None:
            shard, page.shard = page.shard, None
            page.tensor.untyped_storage().resize_(page.bytes)
            if read:
                n, W = page.tensor.numel(), self.group.size
                size = -(-n // W)
                counts = [min((r + 1) * size, n) - min(r * size, n) for r in range(W)]
                page.tensor.copy_(self.group.gather_rows(shard, counts))
        self._resident.pop(key, None)
        self._resident[key] = page

    def _make_space(self, limit: int, used: Iterable[int] = ()) -> None:
        """Divide whole parameters beyond ``limit`` bytes, the least recently used ones first, but none that is in use."""
        in_use = set(used)
        free = {k: page for k, page in self._resident.items() if id(page) not in in_use}
        excess = sum(page.bytes for page in free.values()) - limit
        for key, page in free.items():
            if excess <= 0:
                break
            start, stop = self._range(page.tensor.numel())
            page.shard = page.tensor[start:stop].clone()
            page.tensor.untyped_storage().resize_(0)
            del self._resident[key]
            excess -= page.bytes


def _fills(func: Any, args: tuple[Any, ...], whole: Tensor) -> bool:
    """Return whether an operator overwrites all elements of the parameter ``whole``, its first argument, without reading it."""
    key = storage_key(whole)
    reads = any(isinstance(value, Tensor) and storage_key(value) == key for value in args[1:])
    return func in _FILLS and args[0].numel() == whole.numel() and not reads


def _is_large(parameter: Tensor) -> bool:
    """Return whether a parameter can and should be divided."""
    bytes_ = parameter.numel() * parameter.element_size()
    storage = parameter.untyped_storage()
    own = storage.nbytes() == bytes_ and storage.resizable() and parameter.is_contiguous()
    return own and bytes_ >= SMALLEST_BYTES and parameter.device.type != "meta"


def is_paged(config: RunConfig, group: Group) -> bool:
    """Return whether the model of a run is built in pieces: under ZeRO 3 on several ranks, without offloading to NVMe."""
    engine = config.engine
    nvme = "nvme" in (engine.offload_optimizer, engine.offload_param)
    return engine.kind == "deepspeed" and engine.zero_stage == 3 and group.size > 1 and not nvme


def paged_weights(module: nn.Module) -> PagedWeights | None:
    """Return what divides the parameters of a module; None if they are whole."""
    return _OF_MODULE.get(module)


def paging(module: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which the parameters of a module can be read and written, also if they are divided over ranks."""
    return paged_weights(module) or nullcontext()


def release(module: nn.Module) -> None:
    """Forget the parameters of a module, which an engine has taken over."""
    _OF_MODULE.pop(module, None)
