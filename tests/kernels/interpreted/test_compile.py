"""Every operation inside torch.compile without a graph break: see tests/kernels/test_interpreted.py."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs inside tests/kernels/test_interpreted.py", allow_module_level=True)

import torch._dynamo.testing
from comtip_kernels import (
    bias_gelu,
    first_tokens,
    gene_sentence_embedding,
    image_attention,
    infonce,
    level_cross_entropy,
    one_query_attention,
    packed_attention,
    packed_attention_qkv,
    pair_scores,
    plan_sentences,
    prefer,
    residual_norm,
    sentence_start,
    table_pool,
)
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from comtip_fast.models.gene_encoder import GeneEncoder, SentenceBlock
from comtip_fast.models.recompute import run_block
from comtip_fast.models.vit_blocks import PartsBlock, take_parts


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(randn(*shape).detach(), dim=-1).requires_grad_()


LEVELS = torch.randint(3, (6, 4), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(6, 4, dtype=torch.bool)
LENGTH = torch.tensor([3, 5, 2, 4])
IDS = torch.randint(1, 7, (4, 5), generator=torch.Generator().manual_seed(1))
PLAN = plan_sentences(IDS, LENGTH, LENGTH - 2)


def attend(q: torch.Tensor, impl: str) -> torch.Tensor:
    return packed_attention(q, q * 2, q + 1, LENGTH, longest=5, impl=impl)


def embed(token, kinds, position, level, gain, impl: str) -> torch.Tensor:
    return gene_sentence_embedding(
        IDS, LENGTH, LENGTH - 2, token, kinds, position, level, gain_D=gain, plan=PLAN, impl=impl
    )


def read_first(query: torch.Tensor, x: torch.Tensor, impl: str) -> torch.Tensor:
    return one_query_attention(query, x, LENGTH, scale=0.5, longest=5, impl=impl)


def biased_sentences(qkv: torch.Tensor, bias: torch.Tensor, impl: str) -> torch.Tensor:
    first = first_tokens(LENGTH, 14)
    return packed_attention_qkv(qkv, LENGTH, longest=5, first_S=first, bias_C=bias, impl=impl)


def both_results(*given: torch.Tensor, impl: str) -> torch.Tensor:
    stream, norm = residual_norm(*given, impl=impl)
    return stream * norm.sin()


CASES = {
    "infonce": (lambda x, y, s, impl: infonce(x, y, s, impl=impl), (randn(6, 8), randn(9, 8), torch.tensor(5.0))),
    "level_cross_entropy": (
        lambda x, t, s, impl: level_cross_entropy(x, t, LEVELS, MASK, s, impl=impl),
        (unit(6, 8), unit(4, 3, 8), torch.tensor(5.0)),
    ),
    "table_pool": (lambda t, s, impl: table_pool(t, s, LEVELS, MASK, impl=impl), (unit(4, 3, 8), randn(4, 3))),
    "pair_scores": (lambda x, t, impl: pair_scores(x, t, LEVELS, impl=impl), (unit(6, 8), unit(4, 3, 8))),
    "packed_attention": (attend, (randn(14, 2, 8),)),
    "packed_attention_qkv": (biased_sentences, (randn(14, 3, 2, 8), randn(48))),
    "image_attention": (
        lambda qkv, bias, impl: image_attention(qkv, (5, 2), bias, impl=impl),
        (randn(21, 3, 2, 8), randn(48)),
    ),
    "residual_norm": (both_results, (randn(9, 12), randn(9, 12) * 2, randn(12), randn(12) + 1, randn(12) * 3)),
    "residual_norm, its norm alone": (
        lambda *given, impl: residual_norm(*given, impl=impl)[1].sin(),
        (randn(9, 12), randn(9, 12) * 2, randn(12), randn(12) + 1, randn(12) * 3),
    ),
    "bias_gelu": (lambda x, b, impl: bias_gelu(x, b, impl=impl), (randn(9, 12), randn(12))),
    "one_query_attention": (read_first, (randn(4, 2, 8), randn(14, 8))),
    "gene_sentence_embedding": (embed, (randn(7, 8), randn(3, 8), randn(5, 8), randn(4, 8), randn(8))),
}


WITHOUT_CPU = {"image_attention", "residual_norm", "residual_norm, its norm alone", "bias_gelu"}
"""Operations whose reference is their implementation for CPUs."""
PAIRS = [(n, impl) for n in CASES for impl in ("triton", "cpu", "reference") if impl != "cpu" or n not in WITHOUT_CPU]


@pytest.mark.parametrize(("name", "impl"), PAIRS)
def test_one_graph(name: str, impl: str):
    function, arguments = CASES[name]
    torch.compiler.reset()
    compiled = torch.compile(lambda *a: function(*a, impl=impl), fullgraph=impl == "triton", backend="aot_eager")
    for call in (compiled, lambda *a: function(*a, impl="reference")):
        leaves = [a.detach().clone().requires_grad_() for a in arguments]
        call(*leaves).square().sum().backward()
        grads = [leaf.grad for leaf in leaves]
        if call is compiled:
            first = grads
    for a, b in zip(first, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


GRAPH_BREAKS = {
    "image block": 0,
    "sentence block": 0,
    "last sentence block": 0,
    "fused image block": 0,
    "fused sentence block": 0,
    "fused last sentence block": 0,
}
"""Graph breaks of what ``engine.compile`` compiles, with the Triton kernels and in bf16."""
BETWEEN = {f"{op}{part}" for op in ("residual_norm", "bias_gelu") for part in ("", "_grads")}
BIASED = {"biased_attention", "biased_attention_grads"}
OPERATORS = {
    "sentence block": {"packed_attention_qkv"},
    "last sentence block": {"one_query_attention"},
    "fused image block": BETWEEN | BIASED,
    "fused sentence block": BETWEEN | BIASED,
    "fused last sentence block": BETWEEN | {"one_query_attention"},
}
"""Operators of this package that the graph calls; those of an autograd function include its backward pass."""


def block_and_inputs(name: str, n: int = 5) -> tuple[nn.Module, tuple[object, ...]]:
    """Return a block and the inputs that the encoder gives it; ``n`` sentences of up to 6 tokens, or ``n // 2`` images.

    A fused block gets the stream of another one: rows, the branch that is to be added, and its bias.
    """
    if name == "image block":
        return Block(32, num_heads=2), (torch.randn(2, n, 32),)
    if name == "fused image block":
        image_block = Block(32, num_heads=2, qkv_bias=True)
        assert take_parts([image_block])
        assert isinstance(image_block, PartsBlock)
        assert image_block.can_fuse
        image_block.fuse()
        rows = n // 2 * (5 + 2)
        return image_block, (torch.randn(rows, 32), (5, 2), *stream_rest(rows))
    block = SentenceBlock(32, 2)
    block.attention = "triton"
    length = torch.arange(n).remainder(4).add(3).sort().values
    S = int(length.sum())
    first = sentence_start(length) if "last" in name else None
    inputs = (torch.randn(S, 32), length, 6, first, first, first_tokens(length, S))
    if "fused" not in name:
        return block, inputs
    encoder = nn.Module()
    encoder.blocks = nn.ModuleList([block])
    GeneEncoder.fuse(encoder)  # type: ignore[arg-type]
    return block, (*inputs, None, *stream_rest(S))


def stream_rest(rows: int) -> tuple[Tensor, nn.Parameter]:
    """Return the branch of a stream and its bias."""
    return torch.randn(rows, 32, dtype=torch.bfloat16), nn.Parameter(torch.randn(32))


@pytest.mark.parametrize("name", GRAPH_BREAKS)
def test_blocks_have_no_graph_break(name: str):
    torch.compiler.reset()
    block, inputs = block_and_inputs(name)
    with torch.autocast("cpu", torch.bfloat16), prefer("triton" if "fused" in name else "auto"):
        found = torch._dynamo.explain(block)(*inputs)
    assert (found.graph_count, found.graph_break_count) == (1, GRAPH_BREAKS[name]), found.break_reasons
    assert operators(found.graphs[0]) == (OPERATORS.get(name, set()))


def operators(graph: torch.fx.GraphModule) -> set[str]:
    """Return the operators of this package in a graph and in the graphs of its autograd functions."""
    parts = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
    names = {str(node.target) for part in parts for node in part.graph.nodes if node.op == "call_function"}
    return {n.removeprefix("comtip.").removesuffix(".default") for n in names if n.startswith("comtip.")}


@pytest.mark.parametrize("name", [name for name in GRAPH_BREAKS if name != "image block"])
def test_blocks_of_all_sizes_compile_once_in_each_gradient_mode(name: str):
    """The number of sentences and tokens changes every step, that of images with the last batch."""
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    block, inputs = block_and_inputs(name)
    block.compile(backend=counter)
    with torch.autocast("cpu", torch.bfloat16), prefer("triton" if "fused" in name else "auto"):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                for n in (5, 8, 11):
                    _, inputs = block_and_inputs(name, n)
                    torch.testing.assert_close(run_block(block, *inputs, recompute=False), block._call_impl(*inputs))
    assert counter.frame_count == 2


@pytest.mark.parametrize("name", ["fused image block", "fused sentence block"])
def test_gradients_of_a_compiled_fused_block_are_those_of_the_block(name: str):
    """With sizes that change."""
    torch.compiler.reset()
    block, _ = block_and_inputs(name)
    block.compile(backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16), prefer("triton"):
        for n in (5, 8):
            _, (x, *rest, branch, bias) = block_and_inputs(name, n)
            found = []
            for call in (block._call_impl, lambda *args: run_block(block, *args, recompute=False)):
                leaves = [x.clone().requires_grad_(), branch.clone().requires_grad_(), bias]
                block.zero_grad()
                stream = call(leaves[0], *rest, *leaves[1:])
                (stream.whole().float() * torch.linspace(0, 1, 32)).sum().backward()
                found.append([*(t.grad for t in leaves), *(p.grad for p in block.parameters())])
                bias.grad = None
            for a, b in zip(*found, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    assert float((a.float() - b.float()).norm()) <= 1e-2 * float(a.float().norm())
