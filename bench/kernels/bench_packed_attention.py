"""Compare attention over many short sentences on the CPU with padding to the longest one, in one run.

    python bench/kernels/bench_packed_attention.py [--sentences 4000] [--rounds 15] [--busy]

Lengths are those of the three kinds of gene sentences: symbols, symbols with full names, and the latter cut at 16 tokens. Measures
forward and backward; ratios are medians over rounds (see ``rounds.py``).

attention   called as by the encoder: one projection, sentences sorted by length. "padded" receives padded tensors, as in a
            padded model; the cost of padding in other layers is not counted.
unsorted    the same with sentences in random order.
block       a complete block of the encoder (norms, projections, attention, MLP, width 128), packed and padded, which shows the
            gain for a model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import rounds
import torch
from comtip_kernels import Impl, one_query_attention, packed_attention_qkv
from torch import nn
from torch.nn import functional as F

CASES = (("symbols", 5.5, 10), ("symbol and name", 13.7, 36), ("cut at 16", 10.0, 16))
HEADS, WIDTH = 4, 32


def draw(sentences: int, mean: float, longest: int) -> torch.Tensor:
    """Return random sentence lengths, int64 (sentences,), from 3 to ``longest``; the longest occurs."""
    g = torch.Generator().manual_seed(0)
    length = (torch.randn(sentences, generator=g) * mean * 0.35 + mean).round().clamp(3, longest).long()
    length[0] = longest
    return length


def packed(length: torch.Tensor) -> Callable[[], None]:
    """Return a function that runs our implementation, forward and backward, with q, k and v from one projection."""
    x = torch.randn(int(length.sum()), 3, HEADS, WIDTH).requires_grad_()
    upstream = torch.randn(x.shape[0], HEADS * WIDTH)

    def call() -> None:
        x.grad = None
        packed_attention_qkv(x, length, longest=int(length.max())).flatten(1).backward(upstream)

    return call


def one_query(length: torch.Tensor) -> dict[str, Callable[[], None]]:
    """Return {name: timed call} of attention with one query per sentence and head, which reads tokens of the encoder's width."""
    tokens = torch.randn(int(length.sum()), HEADS * WIDTH).requires_grad_()
    query = torch.randn(length.shape[0], HEADS, HEADS * WIDTH).requires_grad_()
    upstream, longest = torch.randn(query.shape), int(length.max())

    def timed(impl: Impl) -> Callable[[], None]:
        def call() -> None:
            tokens.grad = query.grad = None
            one_query_attention(query, tokens, length, scale=0.1, longest=longest, impl=impl).backward(upstream)

        return call

    return {"ours": timed("cpu"), "padded": timed("reference")}


def padded(length: torch.Tensor) -> Callable[[], None]:
    """Return a function that runs scaled-dot-product attention on padded sentences (N, T) with a mask."""
    T = int(length.max())
    x = torch.randn(length.shape[0], T, 3, HEADS, WIDTH).requires_grad_()
    keep = (torch.arange(T) < length[:, None])[:, None, None, :]
    upstream = torch.randn(length.shape[0], T, HEADS * WIDTH)

    def call() -> None:
        x.grad = None
        _padded_attention(x, keep).reshape(upstream.shape).backward(upstream)

    return call


def _padded_attention(qkv: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2)


class Block(nn.Module):
    """Block of the encoder, for tokens of any leading shape and a given attention."""

    def __init__(self, attend: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        d = HEADS * WIDTH
        self.attend = attend
        self.one, self.two = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the shape of ``x``."""
        qkv = self.qkv(self.one(x)).view(*x.shape[:-1], 3, HEADS, WIDTH)
        x = x + self.out(self.attend(qkv).reshape(x.shape))
        return x + self.mlp(self.two(x))


def block(length: torch.Tensor, pad: bool) -> Callable[[], None]:
    """Return a function that runs a complete block, forward and backward, on padded or packed sentences."""
    T = int(length.max())
    if pad:
        keep = (torch.arange(T) < length[:, None])[:, None, None, :]
        module, shape = Block(lambda qkv: _padded_attention(qkv, keep)), (length.shape[0], T)
    else:
        module, shape = Block(lambda qkv: packed_attention_qkv(qkv, length, longest=T)), (int(length.sum()),)
    x = torch.randn(*shape, HEADS * WIDTH).requires_grad_()
    upstream = torch.randn_like(x)

    def call() -> None:
        x.grad = None
        module.zero_grad()
        module(x).backward(upstream)

    return call


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=int, default=4000, help="number of sentences (default 4000)")
    rounds.add_options(parser, 15)
    args = parser.parse_args()
    for name, mean, longest in CASES:
        length = draw(args.sentences, mean, longest)
        by_length = length.sort().values
        pairs = {
            "attention": (packed(by_length), padded(length)),
            "unsorted": (packed(length), padded(length)),
            "block": (block(by_length, False), block(length, True)),
        }
        print(f"{name}: mean {float(length.float().mean()):.1f}, longest {longest}")
        for what, calls in pairs.items():
            times = rounds.run({"ours": calls[0], "padded": calls[1]}, args.rounds, args.busy)
            print(
                f"  {what:<10} ours {rounds.ms(times, 'ours'):>7.1f} ms   padded {rounds.ms(times, 'padded'):>7.1f} ms"
                f"   padded / ours {rounds.ratio(times, 'padded', 'ours'):.2f}"
            )


if __name__ == "__main__":
    main()
