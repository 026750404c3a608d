"""The ledger's counts are correct, and rows that got worse are reported."""

import dataclasses
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted kernel cannot be compiled", allow_module_level=True)

import triton
from comtip_kernels.infonce import triton_kernels as infonce
from comtip_kernels.ledger import __main__ as ledger
from comtip_kernels.ledger import entries as ledger_entries
from comtip_kernels.ledger import traffic
from comtip_kernels.ledger.__main__ import (
    compiled,
    dropped,
    main,
    merged,
    parsed,
    problems,
    read,
    sized_problems,
    write,
)
from comtip_kernels.ledger.aot import LedgerRow, compile_entry
from comtip_kernels.ledger.entries import entries
from comtip_kernels.ledger.sizes import ROOFS, sizes
from comtip_kernels.ledger.toolchain import ARCHITECTURES, NEWEST, OLDEST, architectures
from comtip_kernels.sentence_table import triton_kernels as table
from comtip_kernels.sentence_table.triton_op import choose_tiles

GOOD = LedgerRow(
    "infonce", "forward", 90, 120, 0, 0, 96, "HGMMA", 8, 24, 24, 6, 8, 2, "64x128x16", 100, 100, 100, 100, 100, 100
)


def as_text(row: LedgerRow) -> dict[str, str]:
    return {k: str(v) for k, v in dataclasses.asdict(row).items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"registers": 129}, "129 registers, the table has 120"),
        ({"spills": 2}, "spills"),
        ({"stack": 8}, "spills"),
        ({"shared_kib": 97}, "97 KiB of shared memory, the table has 96"),
        ({"shared_kib": 228}, "the limit is 227 KiB"),
        ({"mma": "HMMA"}, "HMMA, the table has HGMMA"),
        ({"loads_128": 23}, "23 128-bit loads, the table has 24"),
        ({"async_copies": 0}, "asynchronous copies"),
        ({"mma_count": 9}, "9 tensor-core instructions, the table has 8"),
        ({"special": 7}, "7 special-function instructions, the table has 6"),
        ({"resident": 1}, "1 programs per multiprocessor, the table has 2"),
        ({"mma_shape": "64x64x16"}, "shape of tensor-core instructions 64x64x16, the table has 64x128x16"),
        ({"memory": 103}, "103 instructions of class memory, the table has 100"),
        ({"shared": 103}, "of class shared"),
        ({"waiting": 103}, "of class waiting"),
        ({"branch": 103}, "of class branch"),
        ({"fp": 103}, "of class fp"),
        ({"integer": 103}, "of class integer"),
    ],
)
def test_a_worse_row_is_reported(change: dict, message: str):
    assert problems(GOOD, as_text(GOOD)) == []
    assert any(message in p for p in problems(dataclasses.replace(GOOD, **change), as_text(GOOD)))


def test_the_order_of_the_code_may_change_a_little():
    assert problems(dataclasses.replace(GOOD, integer=102, fp=102), as_text(GOOD)) == []


def test_spills_need_no_earlier_row():
    assert problems(dataclasses.replace(GOOD, spills=4), None)
    assert problems(dataclasses.replace(GOOD, arch=100, spills=4), None) == []


def test_a_kernel_without_an_entry_is_reported():
    known = {("infonce", name, 90): as_text(dataclasses.replace(GOOD, name=name)) for name in ("forward", "gradient")}
    assert dropped([GOOD], known) == [
        "infonce/gradient sm_90: in the table, but no entry of the ledger any more; run python -m comtip_kernels.ledger"
    ]
    assert dropped([GOOD, dataclasses.replace(GOOD, name="gradient")], known) == []


def test_fewer_programs_and_sizes_that_are_not_compared_are_reported(monkeypatch: pytest.MonkeyPatch):
    table, all_sizes = Path(__file__).parents[2] / "bench/traffic.csv", sizes()
    assert sized_problems(table) == []
    # 128 programs instead of 512: the same bytes and FLOPs, on some of an H100's 132 multiprocessors.
    idle = [dataclasses.replace(s, programs=128) if s.programs == 512 else s for s in all_sizes]
    monkeypatch.setattr(ledger, "sizes", lambda: idle)
    worse = sized_problems(table)
    assert {line.split(" is ")[0] for line in worse} >= {
        f"table_pool forward, {size}, G = 2k, Q = 32, D = 512: predicted_us_a100" for size in ("B = 4k", "B = 1k")
    }
    assert all("predicted_us_" in line for line in worse)
    monkeypatch.setattr(ledger, "sizes", lambda: all_sizes[1:])
    assert sized_problems(table) == [
        f"infonce forward, B = M = 32k, D = 512: only in {table}; run python -m comtip_kernels.ledger"
    ]


def test_no_operation_loads_less_than_its_floor_of_l2():
    """The floor of a product is that of the best tile of 65,536 sums, which are the registers of a multiprocessor in fp32."""
    assert all(s.moved.loaded >= s.floor_loaded >= s.moved.distinct for s in sizes())
    forward = next(s for s in sizes() if (s.op, s.part) == ("infonce", "forward"))
    n, side = 32768, 256
    assert forward.floor_loaded == 2 * (n // side) * n * 512 * 2 + 4 * (n // side) ** 2
    shapes = [(1 << i, 1 << j) for i in range(17) for j in range(17 - i)]
    summed = [
        traffic.weighted_sum(4096, 2048, 32, 512, 2, {"BM": h, "NG": 1, "QP": 32, "BD": w}).loaded for h, w in shapes
    ]
    pool = next(s for s in sizes() if (s.op, s.part) == ("table_pool", "forward"))
    assert pool.floor_loaded == min(summed)
    assert traffic.fewest_loads(lambda h, w: -(h * w), unit=32) == -65536 // 32


def test_products_of_every_kind_are_in_the_table():
    """The scores of one query per head are products of 16 rows: HMMA, in a kernel whose other products are HGMMA on sm_90."""
    entry = next(e for e in entries() if e.name == "backward_64_bf16" and e.op == "one_query")
    key = {"triton": triton.__version__, "op": entry.op, "name": entry.name, "arch": "90"}
    committed = [r for r in read(Path(__file__).parents[2] / "bench/ledger.csv") if key.items() <= r.items()]
    row = compile_entry(entry, 90)
    assert row.mma == "HGMMA"
    assert row.mma_count > 10  # two of them are HGMMA
    assert [parsed(r) for r in committed] in ([], [row])  # no rows of this Triton


def test_rows_of_other_tritons_are_kept(tmp_path: Path):
    table = tmp_path / "ledger.csv"
    write(table, [GOOD], "3.6.0", [])
    write(table, [dataclasses.replace(GOOD, registers=99)], "3.8.0", read(table))
    assert [(r["triton"], r["registers"]) for r in read(table)] == [("3.6.0", "120"), ("3.8.0", "99")]


def test_entries_with_an_unchanged_source_are_not_compiled_again():
    found = entries()
    known = {
        (e.op, e.name, a): {"triton": "3.8.0"}
        | as_text(dataclasses.replace(GOOD, op=e.op, name=e.name, arch=a, source=e.source(a)))
        for e in found
        for a in ARCHITECTURES
    }
    assert len(known) == len(found) * len(ARCHITECTURES)
    rows = list(compiled(known, 1))  # compiling would give other numbers
    assert [r.op for r in rows] == [e.op for e in found for _ in ARCHITECTURES]
    assert {r.registers for r in rows} == {GOOD.registers}
    one = found[0]
    hashes = {one.source(80), one.source(90), dataclasses.replace(one, num_warps=one.num_warps * 2).source(80)}
    hashes |= {dataclasses.replace(one, aligned=frozenset()).source(80), found[1].source(80)}
    assert len(hashes) == 5


def test_a_kernel_compiles_and_is_counted():
    forward = next(e for e in entries() if e.name == "forward_bf16")
    rows = {arch: compile_entry(forward, arch) for arch in (80, 90)}
    assert rows[80].mma == "HMMA"
    assert rows[90].mma == "HGMMA"
    for row in rows.values():
        assert 32 <= row.registers <= 255
        assert row.spills == row.stack == 0
        assert row.loads_128 > 0
        assert row.async_copies > 0
    # Without the JIT's hints it is another program: nothing is loaded 128 bits at a time.
    blind = compile_entry(dataclasses.replace(forward, aligned=frozenset()), 80)
    assert blind.loads_128 < rows[80].loads_128


def test_no_kernel_adds_atomically():
    """The result of atomic additions depends on the order of programs, and in bf16 they are a loop on sm_80."""
    sources = sorted((Path(__file__).parents[2] / "kernels").rglob("triton_kernels.py"))
    assert len(sources) == 6
    assert not [p for p in sources if "atomic_" in p.read_text(encoding="utf-8")]


def test_the_committed_table_covers_every_kernel():
    rows = read(Path(__file__).parents[2] / "bench/ledger.csv")
    # The Triton of CI has all of them. Of the oldest and newest, kernels without a row are compiled and checked for spills.
    counts = Counter(r["triton"] for r in rows)
    complete = max(counts, key=counts.__getitem__)
    have = {(r["op"], r["name"], int(r["arch"])) for r in rows if r["triton"] == complete}
    assert {(e.op, e.name, a) for e in entries() for a in architectures(complete)} <= have
    assert {v.rpartition(".")[0] for v in counts} >= {OLDEST, NEWEST}
    for row in rows:
        if int(row["arch"]) in (80, 90):
            assert row["spills"] == row["stack"] == "0"
    assert any(r["op"] == "infonce" and r["arch"] == "90" and r["mma"] == "HGMMA" for r in rows)


@pytest.mark.nightly
@pytest.mark.parametrize("levels", [2, 4, 8, 10, 32, 64, 128, 256])
@pytest.mark.parametrize(
    ("name", "config", "mode"),
    [
        ("sampled_dot", table.SAMPLED_DOT, table.PICK),
        ("sampled_dot", table.LEVEL_LOSS, table.CROSS_ENTROPY),
        ("level_gradient", table.LEVEL_GRADIENT, table.CROSS_ENTROPY),
        ("weighted_sum", table.WEIGHTED_SUM, table.PICK),
        ("weighted_sum_transpose", table.WEIGHTED_SUM_TRANSPOSE, table.PICK),
    ],
)
def test_no_number_of_levels_spills(name: str, config: dict[str, dict[str, Any]], mode: int, levels: int):
    """The ledger has 32 levels only."""
    kernel = getattr(table, name)
    tiles = choose_tiles(config, torch.empty(1, dtype=torch.bfloat16), levels, 512)
    entry = ledger_entries._table(name, kernel, config["bf16"], "bf16", mode)
    constants = {k: v for k, v in ({**entry.constants} | tiles).items() if k in kernel.arg_names}
    for arch in (80, 90):
        row = compile_entry(dataclasses.replace(entry, constants=constants), arch)
        assert (row.stack, row.spills) == (0, 0), (arch, tiles)


def test_every_product_occupies_the_gpu():
    """At B = 1,024, the smallest named batch, one wave of an A100 is full; the sums over rows of LayerNorm are short."""
    few = {(s.op, s.size): s.programs for s in sizes() if s.programs < 128 and s.op != "gene_sentence_embedding"}
    assert not few


def test_idle_multiprocessors_cost_time():
    sized = next(s for s in sizes() if s.op == "infonce" and s.size.startswith("B = 1k"))
    busy, half = (dataclasses.replace(sized, programs=n).seconds(ROOFS["h100"]) for n in (132, 66))
    assert half["l2"] == pytest.approx(2 * busy["l2"])
    assert half["memory"] == busy["memory"]
    assert dataclasses.replace(sized, programs=133).seconds(ROOFS["h100"])["compute"] == pytest.approx(
        busy["compute"] * 264 / 133
    )


def test_tiles_of_sm_80_fit_into_the_shared_memory_of_sm_86_and_sm_89():
    """A block has 99 KiB there, 163 KiB on an A100; a kernel that needs more fails at its first launch."""
    rows = ledger.read(Path(__file__).parents[2] / "bench" / "ledger.csv")
    needed = {(r["triton"], r["op"], r["name"]): int(r["shared_kib"]) for r in rows if r["arch"] == "80"}
    assert len(needed) > 100
    assert {row: kib for row, kib in needed.items() if kib > 99} == {}


def test_columns_that_exceed_the_cache_are_read_once_per_group_of_tiles():
    tiles = infonce.FORWARD["bf16"]
    small, large = (traffic.infonce_forward(n, n, 512, 2, tiles) for n in (32768, 131072))
    assert small.memory - small.stored == small.distinct == 2 * 32768 * 1024 + 4
    assert large.memory - large.stored == (131072 + 1024 // 8 * 131072) * 1024 + 4


def test_a_table_that_exceeds_the_cache_is_read_once():
    """Neighbouring programs of the scores and of their derivatives have the same genes; only vectors beyond the cache are read again."""
    D, Q, G = 512, 32, 2048
    dot, level, gradient = (
        c["bf16"] | {"QP": Q, "NG": 4} for c in (table.SAMPLED_DOT, table.LEVEL_LOSS, table.LEVEL_GRADIENT)
    )
    for B, beyond in ((4096, 0), (65536, 1)):  # vectors of 4 and 67 MB; the cache has 42 MB
        again = beyond * (G // 4 - 1) * B * D * 2
        assert traffic.sampled_dot(B, G, Q, D, 2, dot).again == again
        assert traffic.sampled_dot(B, G, Q, D, 2, level, loss=True).again == again
        assert traffic.level_gradient(B, G, Q, D, 2, gradient).again == again
        assert traffic.weighted_sum(B, G, Q, D, 2, dot | {"BD": 128}).again == 0  # all spots take a gene at a time
    loss = next(s for s in sizes() if s.op == "level_cross_entropy" and s.part == "forward")
    assert loss.seconds(ROOFS["a100"])["memory"] == pytest.approx(loss.moved.once / ROOFS["a100"].reachable_memory)


def test_old_compilers_are_used_without_blackwell():
    assert architectures("3.6.0") == architectures("3.7.1") == (80, 90)
    assert architectures("3.8.0") == architectures("3.10.0") == ARCHITECTURES


def test_a_compiler_that_ends_the_process_is_reported(monkeypatch: pytest.MonkeyPatch):
    class Broken:
        def __enter__(self) -> "Broken":
            return self

        def __exit__(self, *_error: object) -> None: ...

        def submit(self, *_call: object) -> Future[LedgerRow]:
            future: Future[LedgerRow] = Future()
            future.set_exception(BrokenProcessPool("a child process terminated abruptly"))
            return future

    monkeypatch.setattr(ledger, "ProcessPoolExecutor", lambda _jobs: Broken())
    with pytest.raises(RuntimeError, match=r"embedding/make_rows_bf16 sm_80: Triton .* ended the process"):
        list(compiled({}, 1))


def test_an_interrupted_run_keeps_its_rows():
    known = {
        ("infonce", "old", 80): {"triton": "3.8.0"}
        | as_text(dataclasses.replace(GOOD, op="infonce", name="old", arch=80))
    }
    new = dataclasses.replace(GOOD, op="infonce", name="new", arch=80)
    assert {r.name for r in merged([new], known)} == {"old", "new"}
    assert merged([dataclasses.replace(new, name="old", registers=7)], known)[0].registers == 7
    assert len(merged([dataclasses.replace(new, name="old")], known)) == 1


def test_the_interpreter_is_refused():
    words = [sys.executable, "-m", "comtip_kernels.ledger", "--check"]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(words, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 2
    assert "cannot be compiled" in done.stderr
    assert callable(main)
