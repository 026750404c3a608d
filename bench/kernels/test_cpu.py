"""Microbenchmarks of the CPU paths and their peers with pytest-benchmark (``make bench``).

Sizes are small enough for CI; COMTIP_BENCH=full uses those of kernels/README.md. They do not fail because of a time:
``cpu_ratios.py`` compares with the committed ratios, and the tables of the docs come from the ``bench_*.py`` scripts, which time
alternately.
"""

import os
from collections.abc import Callable

import bench_embedding
import bench_infonce
import bench_packed_attention
import bench_table
import pytest
import torch

FULL = os.environ.get("COMTIP_BENCH") == "full"
ROWS, DIM = (8192, 512) if FULL else (1024, 128)


def infonce_calls() -> dict[str, Callable[[], object]]:
    return {
        "ours": bench_infonce.both_ways(bench_infonce.ours, ROWS, DIM),
        "open_clip's loss": bench_infonce.both_ways(bench_infonce.clip_loss, ROWS, DIM),
        "four products": bench_infonce.products(ROWS, DIM, 4),
    }


def embedding_calls() -> dict[str, Callable[[], object]]:
    return dict(bench_embedding.calls(*((256, 32, 256) if FULL else (32, 16, 128)))[0])


def attention_calls(op: str) -> dict[str, Callable[[], object]]:
    g = torch.Generator().manual_seed(0)
    length = (torch.randn(4000 if FULL else 500, generator=g) * 2 + 5.5).round().clamp(3, 10).long()
    lengths = {"packed_attention": length.sort().values, "packed_attention (unsorted)": length}
    return {"ours": bench_packed_attention.packed(lengths[op]), "padded": bench_packed_attention.padded(length)}


def one_query_calls() -> dict[str, Callable[[], object]]:
    g = torch.Generator().manual_seed(0)
    length = (torch.randn(4000 if FULL else 500, generator=g) * 2 + 5.5).round().clamp(3, 10).long()
    return dict(bench_packed_attention.one_query(length.sort().values))


def table_calls(op: str) -> dict[str, Callable[[], object]]:
    x = bench_table.make(*((512, 512, 32, 256) if FULL else (128, 64, 10, 64)))
    return {name: lambda form=form: bench_table.once(form, x) for name, form in bench_table.CASES[op].items()}


GROUPS = {
    "infonce": infonce_calls,
    "gene_sentence_embedding": embedding_calls,
    "copy_sentence_rows": lambda: bench_embedding.copies(*((256, 32, 256) if FULL else (32, 16, 128))),
    "packed_attention": lambda: attention_calls("packed_attention"),
    "packed_attention (unsorted)": lambda: attention_calls("packed_attention (unsorted)"),
    "one_query_attention": one_query_calls,
    "table_pool": lambda: table_calls("table_pool"),
    "level_cross_entropy": lambda: table_calls("level_cross_entropy"),
    "pair_scores": lambda: table_calls("pair_scores"),
}
CASES = [(op, name) for op, make in GROUPS.items() for name in make()]


@pytest.mark.parametrize(("op", "provider"), CASES)
def test_forward_and_backward(op: str, provider: str, benchmark):
    benchmark.group = op
    benchmark(GROUPS[op]()[provider])
