"""Attention within each of many short sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from comtip_kernels.dispatch import Impl, choose, runs_kernels, with_triton
from comtip_kernels.packed_attention.cpu import packed_attention_cpu, packed_attention_qkv_cpu
from comtip_kernels.packed_attention.peers import (
    packed_attention_flash,
    packed_attention_sdpa,
    packed_attention_varlen,
    ready_peers,
    require_peer,
)
from comtip_kernels.packed_attention.reference import (
    image_attention_reference,
    packed_attention_reference,
    with_bias,
)
from comtip_kernels.tl_common import TRITON_DTYPES, operand_dtype, product_mode

__all__ = [
    "attention_name",
    "image_attention",
    "packed_attention",
    "packed_attention_qkv",
    "packed_attention_reference",
]
Attention = Literal["auto", "triton", "cpu", "reference", "flash", "varlen", "sdpa"]
LONGEST = {"bf16": 48, "tf32": 48, "tf32x3": 24}
"""Tokens of the longest sentence that the Triton kernels support, by the mode of their products
(:func:`comtip_kernels.tl_common.product_mode`); on a GPU, longer sentences use flash-attn or torch."""
IMAGE_TOKENS = {"bf16": 64, "tf32": 64, "tf32x3": 32}
"""Tokens of the largest image that the Triton kernels support, by the mode of their products."""
BIASED_MODES = ("bf16", "tf32x3")
"""Modes in which the Triton kernels add a bias: with tf32 they would spill registers."""
_IMPLEMENTATIONS = {
    "reference": packed_attention_reference,
    "cpu": packed_attention_cpu,
    "triton": with_triton("comtip_kernels.packed_attention.triton_op", "packed_attention_triton"),
    "flash": packed_attention_flash,
    "varlen": packed_attention_varlen,
    "sdpa": packed_attention_sdpa,
}


def _unbound(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda qkv_S3HE, *rest: function(*qkv_S3HE.unbind(1), *rest)


_IMPLEMENTATIONS_QKV = {name: _unbound(function) for name, function in _IMPLEMENTATIONS.items()}
_IMPLEMENTATIONS_QKV["cpu"] = packed_attention_qkv_cpu
_IMPLEMENTATIONS_QKV["triton"] = with_triton("comtip_kernels.packed_attention.triton_op", "packed_attention_qkv_triton")


_biased_sentences = with_triton("comtip_kernels.packed_attention.biased_triton_op", "sentence_attention_triton")
_IMPLEMENTATIONS_IMAGES = {
    "reference": image_attention_reference,
    "triton": with_triton("comtip_kernels.packed_attention.biased_triton_op", "image_attention_triton"),
}


def _choose(operands: tuple[Tensor, ...], longest: int, impl: str, implementations: Mapping[str, Any]) -> Any:
    """Return the implementation that ``impl`` selects for these operands and the longest sentence."""
    limit = LONGEST[product_mode(operand_dtype(*operands))]
    if longest <= limit:
        return choose("packed_attention", impl, operands, implementations)
    if impl == "triton":
        raise ValueError(
            f"packed_attention: a sentence has {longest} tokens and impl='triton' supports {limit}; use impl='auto'"
        )
    order = (*ready_peers(operands[0]), "sdpa") if operands[0].is_cuda else None
    return choose("packed_attention", impl, operands, implementations, order)


def _longest(length_N: Tensor) -> int:
    return int(length_N.max()) if length_N.numel() else 0


def packed_attention(
    q_SHE: Tensor,
    k_SHE: Tensor,
    v_SHE: Tensor,
    length_N: Tensor,
    *,
    longest: int | None = None,
    impl: Attention = "auto",
) -> Tensor:
    """Return the attention softmax(q k^T / sqrt(E)) v within each of N concatenated sentences (Vaswani et al. 2017).

    Parameters
    ----------
    q_SHE, k_SHE, v_SHE
        Queries, keys and values (S, H, E): S tokens in all, H heads of width E; any strides. The Triton kernels multiply in
        bf16 if any of them is bf16 or bf16 autocast is enabled.
    length_N
        Tokens of each sentence (>= 0), integers that sum to S.
    longest
        Maximum of ``length_N``, if known; otherwise it is read from the tensor, which synchronises with a GPU.
    impl
        Implementation (:mod:`comtip_kernels.dispatch`), or one of ``flash`` (flash-attn 2, 3 or 4), ``varlen`` (torch's
        variable-length attention) and ``sdpa`` (torch's, padded). On a GPU, ``auto`` selects the Triton kernel for bf16 and
        fp32 sentences of up to 48 tokens (24 in fp32 without tf32), ``reference`` for other dtypes, and beyond that length the
        first of ``flash``, ``varlen`` and ``sdpa`` that is available for the dtype.

    Returns
    -------
    Tensor
        (S, H, E), in the dtype of the products.

    Raises
    ------
    ValueError
        If a sentence is longer than ``impl='triton'`` supports, or ``impl`` is not installed or does not support the operands.
    """
    longest = _longest(length_N) if longest is None else longest
    run = _choose((q_SHE, k_SHE, v_SHE), longest, impl, _IMPLEMENTATIONS)
    out: Tensor = run(q_SHE, k_SHE, v_SHE, length_N, longest)
    return out


def packed_attention_qkv(
    qkv_S3HE: Tensor,
    length_N: Tensor,
    *,
    longest: int | None = None,
    first_S: Tensor | None = None,
    bias_C: Tensor | None = None,
    impl: Attention = "auto",
) -> Tensor:
    """Return the attention of :func:`packed_attention` for q, k and v in one tensor, the output of one projection.

    The gradient is one tensor, too; those of three tensors would be copied into it.

    Parameters
    ----------
    qkv_S3HE
        Queries, keys and values of S tokens, (S, 3, H, E).
    length_N, longest, impl
        As in :func:`packed_attention`.
    first_S
        :func:`comtip_kernels.first_tokens` of the lengths, which only the Triton kernels read; they compute it if it is None. A
        model computes it once for all layers.
    bias_C
        Bias of q, k and v, (3 H E), as in :func:`image_attention`.

    Returns
    -------
    Tensor
        (S, H, E), in the dtype of the products.

    Raises
    ------
    ValueError
        As in :func:`packed_attention`.
    """
    longest = _longest(length_N) if longest is None else longest
    run = _choose((qkv_S3HE,), longest, impl, _IMPLEMENTATIONS_QKV)
    if bias_C is not None and first_S is not None and run is _IMPLEMENTATIONS_QKV["triton"]:
        biased: Tensor = _biased_sentences(qkv_S3HE, bias_C, longest, first_S)
        return biased
    qkv_S3HE = with_bias(qkv_S3HE, bias_C)
    if first_S is not None and run is _IMPLEMENTATIONS_QKV["triton"]:
        return run(qkv_S3HE, length_N, longest, first_S)
    out: Tensor = run(qkv_S3HE, length_N, longest)
    return out


def image_attention(
    qkv_N3HE: Tensor, tokens: Sequence[int], bias_C: Tensor | None = None, *, impl: Impl = "auto"
) -> Tensor:
    """Return the attention of :func:`packed_attention` within images, for q, k and v in one tensor.

    Parameters
    ----------
    qkv_N3HE
        Queries, keys and values (N, 3, H, E): those of B images of ``tokens[0]`` rows each, then of B images of ``tokens[1]`` rows
        each, and so on.
    tokens
        Rows of an image in each part; their sum divides N.
    bias_C
        Bias of q, k and v, (3 H E), which the kernel adds; its gradient is summed where it is computed. None adds nothing.
    impl
        Implementation (:mod:`comtip_kernels.dispatch`). On a GPU, ``auto`` selects the Triton kernel for images of up to 64 tokens
        (32 in fp32 without tf32), and ``reference``, which is PyTorch's ``scaled_dot_product_attention``, beyond.

    Returns
    -------
    Tensor
        (N, H, E), in the dtype of the products.

    Raises
    ------
    ValueError
        If an image has more tokens than ``impl='triton'`` supports, or ``impl`` is not available.
    """
    longest, limit = max(tokens), _image_limit(operand_dtype(qkv_N3HE))
    if impl == "triton" and longest > limit:
        raise ValueError(
            f"image_attention: an image has {longest} tokens and impl='triton' supports {limit}; use impl='auto'"
        )
    order = ("reference",) if longest > limit else None
    out: Tensor = choose("image_attention", impl, (qkv_N3HE,), _IMPLEMENTATIONS_IMAGES, order)(qkv_N3HE, tokens, bias_C)
    return out


def image_attention_runs(device: torch.device, dtype: torch.dtype, tokens: int) -> bool:
    """Return whether :func:`image_attention` selects the Triton kernel for images of ``tokens`` tokens."""
    return runs_kernels(device) and dtype in TRITON_DTYPES and tokens <= _image_limit(dtype)


def adds_bias(
    device: torch.device, dtype: torch.dtype, longest: int, *, images: bool = False, impl: Attention = "auto"
) -> bool:
    """Return whether attention adds the bias of q, k and v in its kernel; otherwise it costs less in their linear layer.

    Parameters
    ----------
    device, dtype
        Device and dtype of q, k and v.
    longest
        Tokens of the longest sentence, or of the largest image.
    images
        Whether these are images (:func:`image_attention`), not sentences (:func:`packed_attention_qkv`).
    impl
        Implementation for sentences.
    """
    mode = product_mode(dtype)
    limit = (IMAGE_TOKENS if images else LONGEST)[mode]
    return (
        mode in BIASED_MODES
        and impl in ("auto", "triton")
        and runs_kernels(device)
        and dtype in TRITON_DTYPES
        and longest <= limit
    )


def _image_limit(dtype: torch.dtype) -> int:
    return IMAGE_TOKENS[product_mode(dtype)]


def attention_name(impl: Attention, device: torch.device, dtype: torch.dtype, longest: int) -> str:
    """Return the name of the implementation that ``impl`` selects for such operands, without running it.

    Parameters
    ----------
    impl
        As in :func:`packed_attention`.
    device, dtype
        Device and dtype of queries, keys and values.
    longest
        Tokens of the longest sentence.

    Raises
    ------
    ValueError
        The implementation is not installed, or does not support the device, the dtype or the length.
    """
    like = torch.empty(0, device=device, dtype=dtype)
    name: str = _choose((like,), longest, impl, {name: name for name in _IMPLEMENTATIONS})
    require_peer(name, like)
    return name
