"""Compare the gene-sentence embedding on the CPU with embedding_bag and LayerNorm, in one run.

    python bench/kernels/bench_embedding.py [--genes 256] [--levels 32] [--dim 256] [--rounds 7] [--busy]

Measures forward and backward with LayerNorm; ratios are medians over rounds (see ``rounds.py``). The plan (which tokens are
equal) is computed in every call. The peer is one ``F.embedding_bag`` over the concatenated tables, with precomputed ids, and
LayerNorm.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import rounds
import torch
from comtip_kernels import copy_sentence_rows, gene_sentence_embedding, plan_sentences
from torch.nn import functional as F

VOCABULARY, LONGEST = 4099, 17


def calls(genes: int, levels: int, dim: int) -> tuple[dict[str, Callable[[], None]], int]:
    """Return {name: timed call} and the number of embedded tokens, 3 to 16 per gene and level."""
    g = torch.Generator().manual_seed(0)
    length = torch.randint(3, LONGEST, (genes,), generator=g).repeat_interleave(levels)
    ids = torch.randint(VOCABULARY, (genes, LONGEST), generator=g)
    ids[:, 0] = 0
    ids, level = ids.repeat_interleave(levels, 0), torch.arange(levels).repeat(genes)
    tables = [torch.randn(n, dim, generator=g).requires_grad_() for n in (VOCABULARY, 3, LONGEST, levels)]
    gain, bias = torch.ones(dim, requires_grad=True), torch.zeros(dim, requires_grad=True)
    slot = torch.arange(LONGEST)
    inside, value = slot < length[:, None], slot == length[:, None] - 1
    word = torch.where(value, VOCABULARY + 3 + LONGEST + level[:, None], ids)[inside]
    kind = VOCABULARY + torch.where(value, 2, torch.where(slot == 0, 0, 1))[inside]
    bag = torch.stack([word, kind, VOCABULARY + 3 + slot.expand_as(inside)[inside]], 1)
    one = torch.cat([t.detach() for t in tables]).requires_grad_()
    upstream = torch.randn(bag.shape[0], dim, generator=g)
    x = torch.randn(bag.shape[0], dim, generator=g).requires_grad_()
    leaves = (*tables, gain, bias, one, x)

    def timed(forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def call() -> None:
            for leaf in leaves:
                leaf.grad = None
            forward().backward(upstream)

        return call

    return {
        "ours": timed(lambda: gene_sentence_embedding(ids, length, level, *tables, gain_D=gain, bias_D=bias)),
        "embedding_bag + LayerNorm": timed(
            lambda: F.layer_norm(F.embedding_bag(bag, one, mode="sum"), (dim,), gain, bias)
        ),
        "LayerNorm alone": timed(lambda: F.layer_norm(x, (dim,), gain, bias)),
    }, bag.shape[0]


def copies(genes: int, levels: int, dim: int) -> dict[str, Callable[[], None]]:
    """Return {name: timed call} of copying the distinct rows of a panel, whose sentences have 3 to 16 tokens, to all tokens."""
    g = torch.Generator().manual_seed(0)
    length = torch.randint(3, LONGEST, (genes,), generator=g).repeat_interleave(levels)
    ids = torch.randint(VOCABULARY, (genes, LONGEST), generator=g).repeat_interleave(levels, 0)
    plan = plan_sentences(ids, length, torch.arange(levels).repeat(genes))
    rows = torch.randn(plan.sentence_U.shape[0], dim, generator=g).requires_grad_()
    upstream = torch.randn(plan.row_S.shape[0], dim, generator=g)

    def timed(forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def call() -> None:
            rows.grad = None
            forward().backward(upstream)

        return call

    return {
        "ours": timed(lambda: copy_sentence_rows(rows, plan)),
        "embedding": timed(lambda: F.embedding(plan.row_S, rows)),
    }


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("genes", 256), ("levels", 32), ("dim", 256)):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    rounds.add_options(parser, 7)
    args = parser.parse_args()
    forms, tokens = calls(args.genes, args.levels, args.dim)
    times = rounds.run(forms, args.rounds, args.busy)
    print(f"{tokens} tokens of width {args.dim}")
    for name in forms:
        print(f"{name:<28}{rounds.ms(times, name):>9.1f} ms  {rounds.ratio(times, name, 'ours'):>5.2f} x ours")


if __name__ == "__main__":
    main()
