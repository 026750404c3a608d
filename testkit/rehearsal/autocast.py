"""CUDA autocast for stand-ins, which PyTorch's own casts would skip, because the C++ device of stand-ins is not CUDA.

The dispatcher still enters the autocast key for stand-ins. Its kernels are replaced by Python functions with the rules of
ATen/autocast_mode.h: products in the lower precision, some operators in fp32, and some in the widest dtype of their operands.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

LOWER = [
    "conv1d",
    "conv2d",
    "conv3d",
    "convolution",
    "_convolution",
    "conv_transpose2d.input",
    "prelu",
    "addmm",
    "addmv",
    "addr",
    "matmul",
    "einsum",
    "mm",
    "mv",
    "linear",
    "addbmm",
    "baddbmm",
    "bmm",
    "linalg_vecdot",
    "linalg_multi_dot",
    "chain_matmul",
    "scaled_dot_product_attention",
]
FP32 = [
    "acos",
    "asin",
    "cosh",
    "erfinv",
    "exp",
    "expm1",
    "log",
    "log10",
    "log2",
    "log1p",
    "reciprocal",
    "rsqrt",
    "sinh",
    "tan",
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "pow.Scalar",
    "softplus",
    "layer_norm",
    "native_layer_norm",
    "group_norm",
    "cosine_similarity",
    "nll_loss",
    "kl_div",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "mse_loss",
    "soft_margin_loss",
    "binary_cross_entropy_with_logits",
    "dist",
    "pdist",
    "cdist",
    "renorm",
    "rms_norm",
    "poisson_nll_loss",
    "margin_ranking_loss",
    "hinge_embedding_loss",
    "triplet_margin_loss",
    "cosine_embedding_loss",
    "logsumexp",
    "norm.Scalar",
    "norm.ScalarOpt_dim",
]
FP32_RESULT = [
    "prod",
    "prod.dim_int",
    "softmax.int",
    "log_softmax.int",
    "cumprod",
    "cumsum",
    "linalg_vector_norm",
    "linalg_matrix_norm",
    "sum",
    "sum.dim_IntList",
]
WIDEST = [
    "addcdiv",
    "addcmul",
    "atan2",
    "bilinear",
    "cross",
    "dot",
    "vdot",
    "grid_sampler",
    "index_put",
    "tensordot",
    "scatter_add",
    "cat",
    "stack",
]
_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
_cache: dict[int, tuple[Tensor, Tensor]] = {}


def _eligible(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 and x.device.type == "cuda"


def _cast(x: Any, dtype: torch.dtype) -> Any:
    """Cast a tensor as autocast does; a weight is cast once per region and cached."""
    if not _eligible(x) or x.dtype == dtype:
        return x
    weight = x.requires_grad and x.is_leaf and x.dtype == torch.float32 and dtype != torch.float32
    if not (weight and torch.is_autocast_cache_enabled()):
        return x.to(dtype)
    known = _cache.get(id(x))
    if known is None or known[0] is not x:
        known = _cache[id(x)] = (x, x.to(dtype))
    return known[1]


def _kernel(op: Any, prepare: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_KEY):
            args, kwargs = prepare(args, kwargs)
            return op(*args, **kwargs)

    return call


def _lower(args: Any, kwargs: Any) -> Any:
    dtype = torch.get_autocast_dtype("cuda")
    return tree_map(lambda x: _cast(x, dtype), (args, kwargs))


def _fp32(args: Any, kwargs: Any) -> Any:
    return tree_map(lambda x: _cast(x, torch.float32), (args, kwargs))


def _fp32_result(args: Any, kwargs: Any) -> Any:
    dtypes = [a for a in args if isinstance(a, torch.dtype)]
    if _eligible(args[0]) and not dtypes and kwargs.get("dtype") is None:
        kwargs = kwargs | {"dtype": torch.float32}
    return args, kwargs


def _widest(args: Any, kwargs: Any) -> Any:
    dtypes = [x.dtype for x in tree_leaves((args, kwargs)) if _eligible(x)]
    widest = torch.float32 if torch.float32 in dtypes else torch.get_autocast_dtype("cuda")
    return tree_map(lambda x: _cast(x, widest), (args, kwargs))


@contextmanager
def replaced() -> Iterator[None]:
    """Replace PyTorch's kernels of the autocast key inside the block."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for names, prepare in ((LOWER, _lower), (FP32, _fp32), (FP32_RESULT, _fp32_result), (WIDEST, _widest)):
            for full in names:
                name, _, overload = full.partition(".")
                op = getattr(getattr(torch.ops.aten, name), overload or "default")
                library.impl(full, _kernel(op, prepare), "AutocastCUDA", allow_override=True)
    try:
        yield
    finally:
        library._destroy()
        _cache.clear()


def clear_cache() -> None:
    """Clear the cache of cast weights, as at the end of the outermost autocast region."""
    _cache.clear()
