"""Attention over many short sentences on the CPU, beside padding to the longest, in one run.

    python bench/kernels/bench_packed_attention.py [--sentences 4000] [--rounds 7]

Lengths follow the three cases that gene sentences make: symbols, symbols with full names, and those cut at 16 tokens.
Forward and backward, interleaved, medians of the ratio within a round.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from comtip_kernels import packed_attention

CASES = (("symbols", 5.5, 10), ("symbol and name", 13.7, 36), ("cut at 16", 10.0, 16))
HEADS, WIDTH = 4, 32


def once(impl: str, packed: torch.Tensor, length: torch.Tensor, upstream: torch.Tensor) -> float:
    """Time one forward and backward, called as the encoder does: q, k, v as views of one projection, heads joined."""
    packed.grad = None
    q, k, v = packed.unbind(2)
    began = time.perf_counter()
    out = packed_attention(q, k, v, length, impl=impl)  # type: ignore[arg-type]
    out.reshape(upstream.shape).backward(upstream)
    return time.perf_counter() - began


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
        packed = torch.randn(args.sentences, longest, 3, HEADS, WIDTH, generator=g).requires_grad_()
        inside = (torch.arange(longest) < length[:, None])[..., None]
        upstream = torch.randn(args.sentences, longest, HEADS * WIDTH, generator=g) * inside
        times: dict[str, list[float]] = {"cpu": [], "reference": []}
        for impl in times:
            once(impl, packed, length, upstream)
        for _ in range(args.rounds):
            for impl, values in times.items():
                values.append(once(impl, packed, length, upstream))
        ratio = statistics.median(b / a for a, b in zip(times["cpu"], times["reference"], strict=True))
        ours, padded = (statistics.median(times[k]) * 1e3 for k in ("cpu", "reference"))
        print(f"{name:<18} mean {float(length.float().mean()):.1f}, longest {longest:<3} ours {ours:>6.1f} ms   padded {padded:>6.1f} ms   "
              f"padded / ours {ratio:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
