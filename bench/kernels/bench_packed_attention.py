"""Attention over many short sentences on the CPU, beside padding to the longest, in one run.

    python bench/kernels/bench_packed_attention.py [--sentences 4000] [--rounds 7]

Lengths follow the three cases that gene sentences make: symbols, symbols with full names, and those cut at 16 tokens.
Forward and backward, interleaved, medians of the ratio within a round. "padded" is handed tensors that are padded already, as
a padded model would have them: what padding itself costs, and what it costs the layers around it, is not counted. "products"
are the matrix products of the packed form alone, on operands that lie ready: what no packed form can do without.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from comtip_kernels import packed_attention
from torch.nn import functional as F

CASES = (("symbols", 5.5, 10), ("symbol and name", 13.7, 36), ("cut at 16", 10.0, 16))
HEADS, WIDTH = 4, 32


def packed(length: torch.Tensor) -> Callable[[], None]:
    """Return a call of ours: q, k, v as views of one projection, heads joined afterwards."""
    x = torch.randn(int(length.sum()), 3, HEADS, WIDTH).requires_grad_()
    upstream = torch.randn(x.shape[0], HEADS * WIDTH)

    def call() -> None:
        x.grad = None
        q, k, v = x.unbind(1)
        packed_attention(q, k, v, length, longest=int(length.max())).flatten(1).backward(upstream)

    return call


def padded(length: torch.Tensor) -> Callable[[], None]:
    """Return a call of scaled-dot-product attention on (N, T) with a mask."""
    T = int(length.max())
    x = torch.randn(length.shape[0], T, 3, HEADS, WIDTH).requires_grad_()
    keep = (torch.arange(T) < length[:, None])[:, None, None, :]
    upstream = torch.randn(length.shape[0], T, HEADS * WIDTH)

    def call() -> None:
        x.grad = None
        q, k, v = (t.transpose(1, 2) for t in x.unbind(2))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        out.transpose(1, 2).reshape(upstream.shape).backward(upstream)

    return call


def products(length: torch.Tensor) -> Callable[[], None]:
    """Return the seven products of forward and backward, per bucket of one length."""
    ready = []
    for L in length.unique().tolist():
        n = int((length == L).sum()) * HEADS
        ready.append((torch.randn(n, L, WIDTH), torch.randn(n, WIDTH, L), torch.randn(n, L, L)))

    def call() -> None:
        for rows, columns, square in ready:
            for _ in range(3):
                torch.bmm(rows, columns)
            for _ in range(4):
                torch.bmm(square, rows)

    return call


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    for name, mean, longest in CASES:
        g = torch.Generator().manual_seed(0)
        length = (torch.randn(args.sentences, generator=g) * mean * 0.35 + mean).round().clamp(3, longest).long()
        length[0] = longest
        calls = {"ours": packed(length), "padded": padded(length), "products": products(length)}
        times: dict[str, list[float]] = {k: [] for k in calls}
        for call in calls.values():
            call()
        for _ in range(args.rounds):
            for key, call in calls.items():
                began = time.perf_counter()
                call()
                times[key].append(time.perf_counter() - began)
        ms = {k: statistics.median(v) * 1e3 for k, v in times.items()}
        ratio = statistics.median(b / a for a, b in zip(times["ours"], times["padded"], strict=True))
        print(f"{name:<16} mean {float(length.float().mean()):.1f}, longest {longest:<3}"
              + "".join(f" {k} {v:>6.1f} ms " for k, v in ms.items()) + f" padded / ours {ratio:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
