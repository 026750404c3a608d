"""Kernels into which Inductor fuses a compiled function on an H100, with the bytes that they move, counted without a GPU.

The function is traced on stand-ins, with the casts of autocast and the attention of a GPU, and then passes through
``torch._inductor.compile_fx``: AOTAutograd, its partition into forward and backward, Inductor's passes, lowering for CUDA and its
scheduler, which decides what is fused. Only the generation of code is left out. Sizes are those of the stand-ins; a run compiles
blocks for any size, which may fuse less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch._inductor.config as inductor_config
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx as inductor
from torch._inductor import scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from testkit.rehearsal.cuda_runtime import H100, enter_tensor_patches
from testkit.rehearsal.stand_in import CUDA, StandInMode


@dataclass(frozen=True)
class FusedKernel:
    """One kernel of compiled code."""

    backward: bool
    library: bool
    """Whether it is a call of a library or of an operator of this project: a product or an attention."""
    names: tuple[str, ...]
    """Operators whose results it stores."""
    bytes: int
    """Bytes that it reads and writes, every operand and result once, as Inductor counts them."""


@dataclass(frozen=True)
class Traced:
    """A function as a graph of ATen operators, with the stand-ins that it was traced with."""

    graph: Any
    tensors: list[Tensor]


def trace(function: Callable[..., Tensor], inputs: Sequence[Any]) -> Traced:
    """Return the graph of a function on stand-ins, inside of :func:`.cuda_runtime.stand_in_cuda`.

    Parameters
    ----------
    function
        Returns one tensor, and enters autocast itself if it uses it.
    inputs
        Its arguments; tensors among them are the inputs of the graph, other values its constants.
    """
    leaves = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]
    tensors = [x for x in leaves if isinstance(x, Tensor)]

    def of_tensors(*given: Tensor) -> Tensor:
        left = iter(given)
        return function(*(next(left) if isinstance(x, Tensor) else x for x in leaves))

    # The project's operators remain operators, of which only the shape of the result is needed.
    with mock.patch.object(StandInMode, "_own", StandInMode._compute):
        return Traced(make_fx(of_tensors)(*tensors), tensors)


def fused_kernels(traced: Traced) -> list[FusedKernel]:
    """Return the kernels of forward and backward pass, outside of :func:`.cuda_runtime.stand_in_cuda`."""
    found: list[FusedKernel] = []

    def compile_inner(module: Any, given: Any, **options: Any) -> Any:
        found.extend(_schedule(module, given, backward=bool(options.get("is_backward"))))
        return inductor.make_boxed_func(module.forward)

    with _inductor_on_stand_ins():
        compiled = inductor.compile_fx(traced.graph, traced.tensors, inner_compile=compile_inner)
        fake: Any = traced.tensors[0]
        with fake.fake_mode:  # the forward pass only states what the backward pass is compiled for
            out: Any = compiled(*traced.tensors)
            result = out if isinstance(out, Tensor) else out[0]
            result.backward(torch.empty(result.shape, dtype=result.dtype, device=CUDA))
    return found


def _schedule(module: Any, inputs: Any, *, backward: bool) -> Iterator[FusedKernel]:
    """Yield the kernels of a graph, by the steps of ``torch._inductor.compile_fx`` up to the generation of code."""
    inductor.view_to_reshape(module)
    with torch.no_grad():
        fake = inductor.fake_tensor_prop(module, inputs)
    inductor._recursive_record_original_output_strides(module)
    with V.set_fake_mode(fake):
        inductor._recursive_post_grad_passes(module, is_inference=False)
        shapes = inductor.shape_env_from_inputs(inputs)
        graph = GraphLowering(module, example_inputs=inputs, shape_env=shapes, is_backward=backward)
        with V.set_debug_handler(DebugContext()), V.set_graph_handler(graph), V.set_extern_kernel_nodes([]):
            graph.run(*inputs)
            graph._update_scheduler()
            for node in graph.scheduler.nodes:
                size = node.get_read_write_buffers_sizes()
                if size:
                    library = isinstance(node, scheduler.ExternKernelSchedulerNode)
                    yield FusedKernel(backward, library, tuple(map(_name, node.get_nodes())), size)


def _name(node: Any) -> str:
    origin = node.node.origin_node
    return str(
        getattr(node.node, "python_kernel_name", None) or (origin.target if origin is not None else node.get_name())
    )


def _on_gpu(graph: Any) -> None:
    """Remove moves to the meta device, which is the C++ device of stand-ins, from a graph of forward and backward pass."""
    for node in list(graph.nodes):
        if node.target is torch.ops.prims.device_put.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.kwargs.get("device") is not None and torch.device(node.kwargs["device"]).type == "meta":
            node.kwargs = node.kwargs | {"device": CUDA}


@contextmanager
def _inductor_on_stand_ins() -> Iterator[None]:
    """Let AOTAutograd and Inductor take stand-ins for tensors on an H100, inside the block."""
    dispatch = FakeTensorMode.dispatch

    def dispatch_on_gpu(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            kwargs["device"] = CUDA
        return dispatch(self, func, types, args, kwargs)

    with ExitStack() as stack:
        enter_tensor_patches(stack)
        for owner, name, value in (
            (FakeTensorMode, "dispatch", dispatch_on_gpu),
            (CudaInterface, "get_device_properties", lambda *_a: H100),
            (torch.cuda, "get_device_properties", lambda *_a: H100),
            (torch.cuda, "get_device_capability", lambda *_a: (H100.major, H100.minor)),
            (scheduler, "has_triton", lambda: True),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        # Tensors of the meta device have no lowering.
        stack.enter_context(mock.patch.object(FakeTensor, "is_meta", property(lambda _x: False), create=True))
        # Constants would be folded by computing them on the device.
        options = {"joint_custom_pre_pass": _on_gpu, "joint_graph_constant_folding": False}
        stack.enter_context(inductor_config.patch(options))
        yield
