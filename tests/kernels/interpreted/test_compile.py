"""Every operation inside torch.compile without a graph break: see tests/kernels/test_interpreted.py."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs inside tests/kernels/test_interpreted.py", allow_module_level=True)

import torch._dynamo.testing
from comtip_kernels import (
    first_tokens,
    gene_sentence_embedding,
    infonce,
    level_cross_entropy,
    one_query_attention,
    packed_attention,
    pair_scores,
    plan_sentences,
    sentence_start,
    table_pool,
)
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from comtip_fast.models.gene_encoder import SentenceBlock
from comtip_fast.models.recompute import run_block


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


CASES = {
    "infonce": (lambda x, y, s, impl: infonce(x, y, s, impl=impl), (randn(6, 8), randn(9, 8), torch.tensor(5.0))),
    "level_cross_entropy": (
        lambda x, t, s, impl: level_cross_entropy(x, t, LEVELS, MASK, s, impl=impl),
        (unit(6, 8), unit(4, 3, 8), torch.tensor(5.0)),
    ),
    "table_pool": (lambda t, s, impl: table_pool(t, s, LEVELS, MASK, impl=impl), (unit(4, 3, 8), randn(4, 3))),
    "pair_scores": (lambda x, t, impl: pair_scores(x, t, LEVELS, impl=impl), (unit(6, 8), unit(4, 3, 8))),
    "packed_attention": (attend, (randn(14, 2, 8),)),
    "one_query_attention": (read_first, (randn(4, 2, 8), randn(14, 8))),
    "gene_sentence_embedding": (embed, (randn(7, 8), randn(3, 8), randn(5, 8), randn(4, 8), randn(8))),
}


@pytest.mark.parametrize("impl", ["triton", "cpu", "reference"])
@pytest.mark.parametrize("name", CASES)
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


GRAPH_BREAKS = {"image block": 0, "sentence block": 0, "last sentence block": 0}
"""Graph breaks of what ``engine.compile`` compiles, with the Triton kernels and in bf16."""


def block_and_inputs(name: str, n: int = 5) -> tuple[nn.Module, tuple[Tensor | int | None, ...]]:
    """Return a block and the inputs that the encoder gives it; ``n`` sentences of up to 6 tokens."""
    if name == "image block":
        return Block(32, num_heads=2), (torch.randn(2, n, 32),)
    block = SentenceBlock(32, 2)
    block.attention = "triton"
    length = torch.arange(n).remainder(4).add(3).sort().values
    S = int(length.sum())
    first = sentence_start(length) if name == "last sentence block" else None
    return block, (torch.randn(S, 32), length, 6, first, first, first_tokens(length, S))


@pytest.mark.parametrize("name", GRAPH_BREAKS)
def test_blocks_have_no_graph_break(name: str):
    torch.compiler.reset()
    block, inputs = block_and_inputs(name)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch._dynamo.explain(block)(*inputs)
    assert (found.graph_count, found.graph_break_count) == (1, GRAPH_BREAKS[name]), found.break_reasons


@pytest.mark.parametrize("name", ["sentence block", "last sentence block"])
def test_panels_of_all_sizes_compile_a_sentence_block_once_in_each_gradient_mode(name: str):
    """The number of sentences and tokens changes every step."""
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    block, inputs = block_and_inputs(name)
    block.compile(backend=counter)
    for grad in (False, True):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
            for n in (5, 8, 11):
                _, inputs = block_and_inputs(name, n)
                torch.testing.assert_close(run_block(block, *inputs, recompute=False), block._call_impl(*inputs))
    assert counter.frame_count == 2
