"""Mutation test of the Triton kernels: a test must fail for each fault that is put into a kernel.

    python bench/kernels/mutate.py [--only lse_tiles,grad_tiles] [--sample 6] [--list]

For each mutant, one expression of one kernel is replaced in a temporary copy of ``kernels/`` and ``tests/kernels/``, and the tests
of that kernel run in Triton's interpreter until the first failure. The exit status is 1 if a mutant survives. All mutants take
about an hour of CPU time, so they run nightly; ``tests/kernels/test_mutants.py`` checks that every mutant can still be applied.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
INFONCE = "infonce/triton_kernels.py"
LOGITS = "infonce/logit_tiles.py"
TABLE = "sentence_table/triton_kernels.py"
ATTENTION = "packed_attention/triton_kernels.py"
ONE_QUERY = "one_query_attention/triton_kernels.py"
EMBEDDING = "gene_sentence_embedding/triton_kernels.py"
ROUNDING = "interpreted/test_rounding.py"
TESTS = {
    INFONCE: ("test_infonce.py", "interpreted/test_blocks.py"),
    LOGITS: ("test_infonce.py", "interpreted/test_blocks.py"),
    TABLE: ("test_table.py", "interpreted/test_table.py"),
    ATTENTION: ("test_packed_attention.py",),
    ONE_QUERY: ("test_one_query_attention.py",),
    EMBEDDING: ("interpreted/test_gene_sentence_embedding.py", "test_gene_sentence_embedding.py"),
}
QUICK = {
    INFONCE: "(equals_the_reference and 40-71-48) or (hostile and fp32) or beyond_the_end or (wide and 600 and all)",
    LOGITS: "(equals_the_reference and 40-71-48) or (hostile and fp32) or beyond_the_end or (wide and 600 and all)",
    TABLE: "(equals_the_reference and size2) or (wide and 600) or beyond_the_end",
    ATTENTION: "(equals_the_reference and size1) or beyond_the_end or only_its_sentence",
    ONE_QUERY: "(equals_the_reference and sorted and size1) or only_its_sentence or without_a_query or (bf16 and dtypes)",
    EMBEDDING: "two_rounds or (equals_the_reference and size1) or beyond_the_end",
}
"""{file: expression for ``pytest -k`` that selects tests which kill most mutants}; the other tests run only if these pass."""


@dataclass(frozen=True)
class Mutant:
    """One fault: an expression of a kernel and its replacement."""

    file: str
    """File below ``kernels/comtip_kernels``."""
    kernel: str
    """Name of the function."""
    kind: str
    """Kind of the fault, for reports."""
    old: str
    """Expression that occurs once in the function."""
    new: str

    @property
    def name(self) -> str:
        """Kernel and kind of the fault."""
        return f"{self.kernel}: {self.kind}"

    def tests(self) -> tuple[str, ...]:
        """Return the test files of which one test must fail."""
        return (ROUNDING,) if self.kind == "dtype" else TESTS[self.file]

    def apply(self, source: str) -> str:
        """Return the source of the file with the fault.

        Raises
        ------
        ValueError
            The expression does not occur exactly once in the kernel.
        """
        found = re.search(rf"^def {self.kernel}\(.*?(?=\n\n\n|\Z)", source, flags=re.DOTALL | re.MULTILINE)
        if found is None or found[0].count(self.old) != 1:
            count = 0 if found is None else found[0].count(self.old)
            raise ValueError(
                f"{self.name}: {self.old!r} occurs {count} times in {self.file}; update bench/kernels/mutate.py"
            )
        return source[: found.start()] + found[0].replace(self.old, self.new) + source[found.end() :]


def _of(file: str, kernel: str, *faults: tuple[str, str, str]) -> list[Mutant]:
    return [Mutant(file, kernel, *fault) for fault in faults]


_TAIL = ("range(0, n_cols, BN)", "range(0, n_cols - n_cols % BN, BN)")
MUTANTS = [
    *_of(
        LOGITS,
        "logits",
        ("slice", "dim = start + tl.arange(0, BK)", "dim = tl.arange(0, BK)"),
        ("mask", "(rows[:, None] < n_rows) & (dim[None, :] < width)", "(rows[:, None] < n_rows)"),
    ),
    *_of(
        LOGITS,
        "allowed",
        ("mask of classes", "ok = ok & (class_q[:, None] != class_k[None, :])", "ok = ok"),
        ("mask of excluded rows", "(excluded_q[:, None] == 0) & ", ""),
        ("swapped rule", "group_q[:, None] != group_k[None, :]", "group_q[:, None] == group_k[None, :]"),
    ),
    *_of(
        LOGITS,
        "grouped",
        ("tail", "rows = tl.minimum(n_row_tiles - first, ROW_GROUP)", "rows = ROW_GROUP"),
        ("wrong group", "return first + local % rows", "return local % rows"),
    ),
    *_of(
        INFONCE,
        "lse_tiles",
        ("mask", "e = tl.where(ok, e, 0.0)", "e = e * 1.0"),
        ("tail", "mask=cols < n_cols)", "mask=cols < n_cols - 1)"),
        ("missing scale", "s = scale * logits(", "s = logits("),
        (
            "wrong positive",
            "tl.where(rows[:, None] == cols[None, :], s, 0.0)",
            "tl.where(rows[:, None] == cols[None, :] + 1, s, 0.0)",
        ),
    ),
    *_of(
        INFONCE,
        "exact_lse",
        ("mask", 's = tl.where(ok, s, float("-inf"))', "s = s * 1.0"),
        ("tail", *_TAIL),
        ("stale maximum", "total = total * tl.exp2((top - safe) * LOG2E) + ", "total = total + "),
        ("never stored", "(low > 0))", "(low > 1))"),
    ),
    *_of(
        INFONCE,
        "grad_tiles",
        ("mask", "g = tl.where(ok, g, 0.0)", "g = (g * 1.0)"),
        (
            "tail",
            "mask=(rows[:, None] < n_rows) & (cols[None, :] < n_cols)",
            "mask=(rows < n_rows - 1)[:, None] & (cols < n_cols)[None, :]",
        ),
        ("wrong chunk", "rows, cols = first + local,", "rows, cols = local,"),
        ("stale log-sum-exp", "tl.load(lse_k_ptr + cols,", "tl.load(lse_k_ptr + cols * 0,"),
        ("swapped operand", "(a[:, None] + b[None, :])", "(a[:, None] + a[:, None])"),
    ),
    *_of(
        TABLE,
        "_scores",
        ("slice", "dim = start + tl.arange(0, BK)", "dim = tl.arange(0, BK)"),
        ("mask", "mask=(spots[:, None] < n_spots) & (dim[None, :] < width)", "mask=(spots[:, None] < n_spots)"),
    ),
    *_of(
        TABLE,
        "_adjusted",
        ("missing scale", " * tl.load(scale_ptr)", ""),
        ("mask of levels", "tl.where((q < n_levels)[None, None, :], s, ", "tl.where((q < QP)[None, None, :], s, "),
    ),
    *_of(
        TABLE,
        "level_gradient",
        ("no target", "tl.where(hot, 1.0, 0.0)", "0.0"),
        ("missing factor", " * tl.load(factor_ptr)", ""),
        (
            "mask",
            "tl.load(weight_ptr + offset, mask=inside, other=0)",
            "tl.load(weight_ptr + offset, mask=inside, other=1)",
        ),
        (
            "tail",
            "mask=(spots[:, None] < n_spots) & exists[None, :]",
            "mask=(spots < n_spots - 1)[:, None] & exists[None, :]",
        ),
        ("wrong chunk", "index = (gene - first) * n_levels", "index = gene * n_levels"),
        ("sums of another tile", "sums_ptr + tile_m.to(tl.int64)", "sums_ptr + 0 * tile_m.to(tl.int64)"),
    ),
    *_of(
        TABLE,
        "_weights",
        ("wrong level", "selected[:, :, None] == tl.arange(0, QP)", "selected[:, :, None] == tl.arange(0, QP) + 1"),
        (
            "other genes",
            "w = tl.load(weight_ptr + offset, mask=inside",
            "w = tl.load(weight_ptr + offset, mask=inside & (genes > 0)[None, :]",
        ),
    ),
    *_of(
        TABLE,
        "sampled_dot",
        ("mask", "loss = tl.where(w != 0, (lse - own) * w, 0.0)", "loss = tl.where(w >= 0, lse - own, 0.0)"),
        (
            "tail",
            "tl.store(out_ptr + offset, own, mask=inside)",
            "tl.store(out_ptr + offset, own, mask=inside & (genes < n_genes - 1)[None, :])",
        ),
        ("wrong level", "selected[:, :, None] == tl.arange(0, QP)", "selected[:, :, None] == tl.arange(0, QP) + 1"),
    ),
    *_of(
        TABLE,
        "weighted_sum",
        ("slice", "row_ptr + dim[None, :] * t_stride_dim", "row_ptr + (dim % BD)[None, :] * t_stride_dim"),
        ("tail", "range(first, end, NG)", "range(first, end - end % NG, NG)"),
        ("wrong part", "first = tl.program_id(2) * part_genes", "first = 0 * part_genes"),
        ("dtype", ".to(table_ptr.dtype.element_ty)", ".to(tl.float32)"),
        ("mask", "(gene[:, None] < n_genes) & (level[:, None] < n_levels) & ", "(gene[:, None] < n_genes) & "),
    ),
    *_of(
        TABLE,
        "weighted_sum_transpose",
        ("slice", "+ dim[None, :] * v_stride_dim", "+ (dim % BD)[None, :] * v_stride_dim"),
        ("tail", "range(0, n_spots, BM)", "range(0, n_spots - n_spots % BM, BM)"),
        ("dtype", ".to(vector_ptr.dtype.element_ty)", ".to(tl.float32)"),
    ),
    *_of(
        ATTENTION,
        "_load",
        ("mask", "mask=owned[:, None] & (dim[None, :] < head_dim)", "mask=owned[:, None]"),
        ("wrong head", "head * stride_head", "head * 0"),
    ),
    *_of(
        ATTENTION,
        "_softmax",
        ("mask", "(first[:, None] == first[None, :]) & owned[:, None]", "owned[:, None]"),
        ("missing scale", " * (scale * LOG2E)", " * LOG2E"),
    ),
    *_of(
        ATTENTION,
        "_store",
        ("tail", "(dim[None, :] < head_dim)", "(dim[None, :] < head_dim - 1)"),
        ("wrong head", "* n_heads + head)", "* n_heads)"),
    ),
    *_of(ATTENTION, "_rounded", ("dtype", "x.to(ptr.dtype.element_ty)", "x.to(tl.float32)")),
    *_of(
        ATTENTION,
        "attention_forward",
        ("tail", "mask=token < n_tokens", "mask=token < n_tokens - 1"),
        ("swapped operand", "tl.dot(p, v,", "tl.dot(tl.trans(p), v,"),
        ("off-by-one window", "(first >= tile * window)", "(first > tile * window)"),
    ),
    *_of(
        ATTENTION,
        "attention_grads",
        ("tail", "mask=token < n_tokens", "mask=token < n_tokens - 1"),
        ("swapped operand", "tl.dot(tl.trans(ds), q,", "tl.dot(ds, q,"),
        ("missing scale", "[:, None]) * scale, q_ptr", "[:, None]), q_ptr"),
        ("no row sum", "(dp - tl.sum(p * dp, axis=1)[:, None])", "dp"),
    ),
    *_of(
        ONE_QUERY,
        "_load",
        ("slice", "dim = start + tl.arange(0, BD)", "dim = tl.arange(0, BD)"),
        ("mask", "mask=inside[:, None] & (dim[None, :] < width)", "mask=inside[:, None]"),
    ),
    *_of(
        ONE_QUERY,
        "_store",
        ("slice", "dim = start + tl.arange(0, BD)", "dim = tl.arange(0, BD)"),
        ("tail", "(dim[None, :] < width)", "(dim[None, :] < width - 1)"),
    ),
    *_of(
        ONE_QUERY,
        "_softmax",
        ("mask", 'tl.where(own[None, :], s * (scale * LOG2E), float("-inf"))', "s * (scale * LOG2E)"),
        ("missing scale", "s * (scale * LOG2E)", "s * LOG2E"),
        ("no maximum", 'tl.where(top == float("-inf"), 0.0, top)[:, None]', "top[:, None] * 0"),
    ),
    *_of(ONE_QUERY, "_rounded", ("dtype", "x.to(ptr.dtype.element_ty)", "x.to(tl.float32)")),
    *_of(
        ONE_QUERY,
        "one_query_forward",
        (
            "tail",
            "tl.arange(0, BT) < tl.load(length_ptr + sentence)",
            "tl.arange(0, BT) < tl.load(length_ptr + sentence) - 1",
        ),
        ("wrong sentence", "tl.load(first_ptr + sentence)", "tl.load(first_ptr)"),
        ("stale sum", "tl.dot(q, tl.trans(x), s, input_precision", "tl.dot(q, tl.trans(x), input_precision"),
    ),
    *_of(
        ONE_QUERY,
        "one_query_grads",
        (
            "tail",
            "tl.arange(0, BT) < tl.load(length_ptr + sentence)",
            "tl.arange(0, BT) < tl.load(length_ptr + sentence) - 1",
        ),
        ("sentence without a query", " & (sentence < n_queries)", ""),
        ("missing scale", "[:, None]) * scale, query_ptr", "[:, None]), query_ptr"),
        ("no row sum", "(dp - tl.sum(p * dp, axis=1)[:, None])", "dp"),
        (
            "missing term",
            "dx = tl.dot(tl.trans(p), g, dx, input_precision",
            "dx = tl.dot(tl.trans(p), g, input_precision",
        ),
        ("swapped operand", "tl.dot(ds, x, input_precision", "tl.dot(p, x, input_precision"),
    ),
    *_of(
        EMBEDDING,
        "_sum_of_tables",
        ("mask of identities", "(kind == 0) & (own > 0)", "own > 0"),
        ("missing share", "(1 - mix) * word", "word"),
    ),
    *_of(
        EMBEDDING,
        "make_rows",
        ("mask", "x = tl.where(inside, x - tl.sum(x, axis=0) / width, 0.0)", "x = x - tl.sum(x, axis=0) / width"),
        ("tail", "x, mask=inside)", "x, mask=inside & (dim < width - 1))"),
        ("missing scale", "x * rstd * gain", "x * gain"),
    ),
    *_of(
        EMBEDDING,
        "norm_grads",
        ("mask", "x = tl.where(inside, x - tl.sum(x, axis=0) / width, 0.0)", "x = x - tl.sum(x, axis=0) / width"),
        ("tail", "tl.minimum(first + ROWS, n_rows)", "tl.minimum(first + ROWS, n_rows - 1)"),
        ("swapped operand", "dgain += g * x", "dgain += g"),
        ("missing term", " - x * (tl.sum(g * x, axis=0) / width)", ""),
    ),
    *_of(
        EMBEDDING,
        "copy_rows",
        ("tail", "(token[:, None] < n_tokens) & ", "(token[:, None] < n_tokens - 1) & "),
        ("wrong row", "row_id_ptr + token,", "row_id_ptr + token * 0,"),
    ),
    *_of(
        EMBEDDING,
        "sum_pieces",
        ("tail", "(index[:, None] < last) & ", "(index[:, None] < last - 1) & "),
        ("stale sum", "acc += tl.load(", "acc = tl.load("),
        ("first row lost", "if target >= 0:", "if target > 0:"),
    ),
]


def run(mutant: Mutant) -> tuple[bool, str]:
    """Return whether a test failed or the interpreter crashed, and the name of the test, "" if it is not known.

    Raises
    ------
    RuntimeError
        pytest could not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "kernels", copy / "kernels", ignore=ignore)
        shutil.copytree(ROOT / "tests/kernels", copy / "tests/kernels", ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", copy)
        path = copy / "kernels/comtip_kernels" / mutant.file
        path.write_text(mutant.apply(path.read_text(encoding="utf-8")), encoding="utf-8")
        paths = [str(copy / "kernels"), str(ROOT), str(ROOT / "data_shards")]
        env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        tests = [f"tests/kernels/{name}" for name in mutant.tests()]
        words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--rootdir", ".", *tests]
        for selected in (["-k", QUICK[mutant.file]], []) if mutant.kind != "dtype" else ([],):
            done = subprocess.run([*words, *selected], cwd=copy, env=env, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                break
    failed = re.search(r"^(?:FAILED|ERROR) \S*?(\w+\.py\S*)", done.stdout, flags=re.MULTILINE)
    # Status 1: a test failed. A crash of the interpreter (negative status) also kills; any other status is no result.
    if done.returncode not in (0, 1) and done.returncode > 0:
        raise RuntimeError(f"{mutant.name}: pytest could not run: {done.stdout[-500:]}{done.stderr[-500:]}")
    return done.returncode != 0, failed[1] if failed else ""


def main() -> int:
    """Run or list the chosen mutants; return 1 if one survives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="names of kernels, separated by commas (default: all)")
    parser.add_argument("--sample", type=int, default=0, help="number of evenly spaced mutants to run (default 0: all)")
    parser.add_argument("--list", action="store_true", help="list the mutants without running them")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if not args.only or m.kernel in args.only.split(",")]
    if args.sample:
        chosen = chosen[:: max(1, len(chosen) // args.sample)][: args.sample]
    survivors = []
    for mutant in chosen:
        if args.list:
            print(f"{mutant.name:<44}{mutant.old}  ->  {mutant.new}")
            continue
        began = time.perf_counter()
        killed, test = run(mutant)
        print(
            f"{mutant.name:<44}{'killed by ' + test if killed else 'SURVIVED'} ({time.perf_counter() - began:.0f} s)",
            flush=True,
        )
        survivors += [] if killed else [mutant.name]
    if not args.list:
        print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
