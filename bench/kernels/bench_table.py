"""Compare the operations over the sentence table on the CPU with their dense forms and peers, in one run.

    python bench/kernels/bench_table.py [--spots 512] [--genes 512] [--levels 32] [--dim 256] [--rounds 7] [--busy]

Measures forward and backward, medians over rounds (see ``rounds.py``). Memory is the peak of live tensor bytes beyond the inputs,
from the allocations that the profiler records, which does not depend on the load of the machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import rounds
import torch
from comtip_kernels import level_cross_entropy, pair_scores, pool_weights, table_pool
from torch.nn import functional as F


def make(spots: int, genes: int, levels: int, dim: int) -> dict[str, torch.Tensor]:
    """Return {name: input}; trained inputs require gradients."""
    g = torch.Generator().manual_seed(0)
    return {
        "image": F.normalize(torch.randn(spots, dim, generator=g), dim=-1).requires_grad_(),
        "table": F.normalize(torch.randn(genes, levels, dim, generator=g), dim=-1).requires_grad_(),
        "scores": torch.randn(genes, levels, generator=g).requires_grad_(),
        "prior": torch.randn(genes, levels, generator=g),
        "levels": torch.randint(levels, (spots, genes), generator=g).to(torch.uint8),
        "mask": torch.rand(spots, genes, generator=g) < 0.8,
        "scale": torch.tensor(10.0, requires_grad=True),
    }


def embedding_bag(x: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the sum of pooling by F.embedding_bag and a masked softmax, the peer."""
    G, Q, D = x["table"].shape
    rows = torch.arange(G) * Q + x["levels"].long()
    weight = F.embedding(rows, x["scores"].reshape(-1, 1)).squeeze(-1).masked_fill(~x["mask"], float("-inf")).softmax(1)
    return F.embedding_bag(rows, x["table"].reshape(G * Q, D), per_sample_weights=weight, mode="sum").sum()


def gathered(x: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the sum of pooling by gathering B x G x D rows."""
    rows = x["table"][torch.arange(x["table"].shape[0]), x["levels"].long()]
    return (pool_weights(x["scores"], x["levels"], x["mask"])[..., None] * rows).sum(1).sum()


CASES: dict[str, dict[str, Callable[[dict[str, torch.Tensor]], torch.Tensor]]] = {
    "table_pool": {
        "cpu": lambda x: table_pool(x["table"], x["scores"], x["levels"], x["mask"], impl="cpu").sum(),
        "one-hot product": lambda x: table_pool(
            x["table"], x["scores"], x["levels"], x["mask"], impl="reference"
        ).sum(),
        "embedding_bag": embedding_bag,
        "gather B x G x D": gathered,
    },
    "level_cross_entropy": {
        name: lambda x, impl=impl: level_cross_entropy(
            x["image"], x["table"], x["levels"], x["mask"], x["scale"], x["prior"], impl=impl
        )
        for name, impl in (("cpu", "cpu"), ("dense", "reference"))
    },
    "pair_scores": {
        name: lambda x, impl=impl: pair_scores(x["image"], x["table"], x["levels"], impl=impl).sum()
        for name, impl in (("cpu", "cpu"), ("dense", "reference"))
    },
}


def once(loss: Callable[[dict[str, torch.Tensor]], torch.Tensor], x: dict[str, torch.Tensor]) -> None:
    """Run one forward and backward pass."""
    for t in x.values():
        t.grad = None
    loss(x).backward()


def peak_mib(loss: Callable[[dict[str, torch.Tensor]], torch.Tensor], x: dict[str, torch.Tensor]) -> float:
    """Return the peak of allocated tensor memory in MiB, including the gradients of the inputs."""
    for t in x.values():
        t.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run:
        loss(x).backward()
    live = top = 0
    for event in sorted(
        (e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        live += event.nbytes()
        top = max(top, live)
    return top / 2**20


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("spots", 512), ("genes", 512), ("levels", 32), ("dim", 256)):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    rounds.add_options(parser, 7)
    args = parser.parse_args()
    x = make(args.spots, args.genes, args.levels, args.dim)
    for op, forms in CASES.items():
        memory = {name: peak_mib(loss, x) for name, loss in forms.items()}
        times = rounds.run(
            {name: lambda loss=loss: once(loss, x) for name, loss in forms.items()}, args.rounds, args.busy
        )
        for name in forms:
            ratio = rounds.ratio(times, name, "cpu")
            print(
                f"{op:<22}{name:<18}{rounds.ms(times, name):>9.1f} ms  {ratio:>5.2f} x ours "
                f"{memory[name]:>8.0f} MiB  {memory[name] / memory['cpu']:>5.2f} x ours"
            )


if __name__ == "__main__":
    main()
