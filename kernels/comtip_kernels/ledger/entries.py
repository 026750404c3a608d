"""The kernels in the ledger: at their largest tiles with every option, and in the variants that the shipped configs launch.

Each entry states what the JIT would know about a launch: argument types, constants, and which arguments are divisible by 16.
At the largest tiles, divisibility is derived from the kernels' ``do_not_specialize``; for launched variants it was recorded.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from comtip_kernels import tiles as sizes
from comtip_kernels.block_pointwise import triton_kernels as pointwise
from comtip_kernels.gene_sentence_embedding import triton_kernels as embedding
from comtip_kernels.infonce import triton_kernels as infonce
from comtip_kernels.ledger.aot import LedgerEntry
from comtip_kernels.one_query_attention import triton_kernels as one_query
from comtip_kernels.packed_attention import BIASED_MODES
from comtip_kernels.packed_attention import triton_kernels as attention
from comtip_kernels.sentence_table import triton_kernels as table

LAUNCHES = Path(__file__).with_name("launches.json")
"""Variants that training and inference launch with the shipped configs, recorded by ``python -m testkit.rehearsal``."""
PACKAGES = {
    "infonce": "infonce",
    "table": "sentence_table",
    "embedding": "gene_sentence_embedding",
    "attention": "packed_attention",
    "one_query": "one_query_attention",
    "pointwise": "block_pointwise",
}
"""Package of each operation's kernels."""
MODES = ("bf16", "tf32", "tf32x3")
"""How the products are computed (``tl_common.product_mode``)."""
ELEMENT = {"bf16": "bf16", "tf32": "fp32", "tf32x3": "fp32", "fp32": "fp32"}
_INT64 = (
    "class_q_ptr",
    "class_k_ptr",
    "token_id_ptr",
    "kind_id_ptr",
    "slot_id_ptr",
    "lo_id_ptr",
    "hi_id_ptr",
    "identity_id_ptr",
)
_INT32 = (
    "excluded_q_ptr",
    "excluded_k_ptr",
    "group_q_ptr",
    "group_k_ptr",
    "low_q_ptr",
    "low_k_ptr",
    "low_ptr",
    "first_ptr",
    "last_ptr",
    "target_ptr",
    "order_ptr",
    "row_id_ptr",
)


def _entry(
    op: str,
    name: str,
    kernel: Any,
    operands: dict[str, str],
    constants: dict[str, Any],
    unaligned: tuple[str, ...] = (),
    *,
    tensor_cores: bool = True,
) -> LedgerEntry:
    """Return an entry; ``operands`` gives the element type of pointers that are neither fp32 nor ids.

    ``unaligned`` names arguments that the JIT specialises but that are not multiples of 16 in practice.
    """
    names = list(kernel.arg_names)
    constants = dict(constants)
    options = {option: constants.pop(option) for option in ("num_warps", "num_stages")}
    constants = {k: v for k, v in constants.items() if k in names}
    types = {n: "*fp32" if n.endswith("_ptr") else "i32" for n in names}
    types |= {n: "*i64" for n in names if n in _INT64} | {n: "*i32" for n in names if n in _INT32}
    types |= {n: f"*{dtype}" for n, dtype in operands.items() if n in names}
    types |= {n: "fp32" for n in names if n in ("eps", "scale")}
    specialised = {p.name for p in kernel.params if not (p.do_not_specialize or p.do_not_specialize_on_alignment)}
    aligned = frozenset(specialised) - constants.keys() - {"eps", "scale"} - set(unaligned)
    return LedgerEntry(op, name, kernel, types, constants, aligned=aligned, wants_tensor_cores=tensor_cores, **options)


def _infonce(name: str, kernel: Any, tiles: dict[str, Any], mode: str, *, block: bool) -> LedgerEntry:
    """Return one InfoNCE kernel with every kind of mask, contiguous vectors and 64-bit classes."""
    constants = tiles | {
        "HEADROOM": 40.0,
        "RULE": infonce.SAME_GROUP,
        "CLASSES": True,
        "EXCLUDED": True,
        "DIAGONAL": not block,
        "UPCAST": False,
        "PRECISION": "ieee" if mode == "bf16" else mode,
        "q_stride_dim": 1,
        "k_stride_dim": 1,
    }
    stored = ("out_ptr",) if kernel is infonce.grad_tiles else ()
    vectors = dict.fromkeys(("q_ptr", "k_ptr", *stored), ELEMENT[mode])
    return _entry("infonce", f"{name}{'_block' if block else ''}_{mode}", kernel, vectors, constants)


def _table(name: str, kernel: Any, config: dict[str, Any], mode: str, weight: int) -> LedgerEntry:
    """Return one kernel over a sentence table of 32 levels, with contiguous tables and vectors."""
    loss = weight == table.CROSS_ENTROPY
    constants = config | {
        "QP": 32,
        "NG": max(1, config["BN"] // 32),
        "MODE": weight,
        "PRIOR": loss,
        "UPCAST": False,
        "PRECISION": "ieee" if mode == "bf16" else mode,
        "v_stride_dim": 1,
        "t_stride_dim": 1,
    }
    stored = ("out_ptr",) if kernel is table.level_gradient else ()
    operands = dict.fromkeys(("vector_ptr", "table_ptr", *stored), ELEMENT[mode])
    operands |= {"levels_ptr": "u8", "weight_ptr": "u8" if loss else "fp32"}
    suffix = "_loss" if loss else ""
    return _entry("table", f"{name}{suffix}_{mode}", kernel, operands, constants, ("n_levels",))


def _embedding(name: str, kernel: Any, config: dict[str, Any], dtype: str) -> LedgerEntry:
    """Return one kernel of the embedding at width 512, with mixing, identities and LayerNorm."""
    constants = config | {"MIXED": True, "IDENTITY": True, "NORM": True, "ORDERED": True, "BD": 512, "x_stride_dim": 1}
    constants["ROWS"] = embedding.NORM_ROWS
    pointers = [n for n in kernel.arg_names if n.endswith("_ptr") and n not in (*_INT64, *_INT32)]
    sums = ("out_ptr", "grad_ptr", "dgain_ptr", "dbias_ptr") if name in ("sum_pieces", "norm_grads") else ()
    operands = {n: "fp32" if n in sums else dtype for n in pointers}
    return _entry("embedding", f"{name}_{dtype}", kernel, operands, constants, tensor_cores=False)


def _attention(mode: str, tile: int, *, backward: bool) -> LedgerEntry:
    """Return packed attention at head width 64, with q, k and v as views of one projection."""
    kernel = attention.attention_grads if backward else attention.attention_forward
    constants = attention.config(mode, tile, backward=backward) | {
        "BT": tile,
        "BE": 64,
        "PARTS": 3,
        "EQUAL": False,
        "BIAS": mode in BIASED_MODES,
        "UPCAST": False,
        "PRECISION": "ieee" if mode == "bf16" else mode,
    }
    constants |= {n: 1 for n in kernel.arg_names if n.endswith("_stride_dim")}
    others = ("first_ptr", "bias_ptr", "sums_ptr")
    pointers = [n for n in kernel.arg_names if n.endswith("_ptr") and n not in others]
    name = f"{'backward' if backward else 'forward'}_{tile}_{mode}"
    return _entry("attention", name, kernel, dict.fromkeys(pointers, ELEMENT[mode]), constants, ("n_heads",))


def _one_query(mode: str, longest: int, *, backward: bool) -> LedgerEntry:
    """Return attention with one query for sentences of up to ``longest`` tokens of width 512, and 8 heads."""
    kernel = one_query.one_query_grads if backward else one_query.one_query_forward
    constants = sizes.one_query_tiles(mode, 8, 512, longest) | {
        "UPCAST": False,
        "PRECISION": "ieee" if mode == "bf16" else mode,
    }
    constants |= {n: 1 for n in kernel.arg_names if n.endswith("_stride_dim")}
    ids = {"first_ptr": "i64", "length_ptr": "i64"}
    operands = {n: ELEMENT[mode] for n in kernel.arg_names if n.endswith("_ptr")} | ids
    name = f"{'backward' if backward else 'forward'}_{constants['BT']}_{mode}"
    return _entry("one_query", name, kernel, operands, constants, ("n_heads",))


def _pointwise(kernel: Any, config: dict[str, Any], dtype: str) -> LedgerEntry:
    """Return one kernel between the products of a block of width 1,024, with an fp32 stream and products in ``dtype``."""
    constants = config | {"STREAM_GRAD": True, "COPY": dtype != "fp32", "ROWS": sizes.POINTWISE_ROWS}
    of_products = ("branch_ptr", "dbranch_ptr", "out_ptr", "grad_ptr")
    if "gelu" in kernel.__name__:
        of_products = ("x_ptr", "out_ptr", "grad_ptr", "dx_ptr")
    operands = dict.fromkeys(of_products, dtype)
    return _entry("pointwise", f"{kernel.__name__}_{dtype}", kernel, operands, constants, tensor_cores=False)


def entries() -> list[LedgerEntry]:
    """Return every entry: the largest tiles with every option, then the variants that the shipped configs launch."""
    return [*_largest(), *launched()]


def launched(path: Path = LAUNCHES) -> list[LedgerEntry]:
    """Return the kernel variants recorded in ``path``; an empty list if the file does not exist.

    Two groups are omitted: variants with the signature of an entry at the largest tiles, which the ledger lists already, and
    variants recorded before their kernel's arguments changed.
    """
    known = {e.signature for e in _largest()}
    out = []
    for row in json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []:
        module = import_module(f"comtip_kernels.{PACKAGES[row['op']]}.triton_kernels")
        entry = LedgerEntry(
            row["op"],
            row["name"],
            getattr(module, row["kernel"]),
            row["types"],
            row["constants"],
            row["num_warps"],
            row["num_stages"],
            frozenset(row["aligned"]),
        )
        if set(entry.types) | set(entry.constants) == set(entry.kernel.arg_names) and entry.signature not in known:
            out.append(entry)
    return out


def _largest() -> list[LedgerEntry]:
    """Return the entries of all kernels at their largest tiles, with every option."""
    out = []
    for dtype in ("bf16", "fp32"):
        out += [
            _embedding("make_rows", embedding.make_rows, embedding.MAKE, dtype),
            _embedding("copy_rows", embedding.copy_rows, embedding.COPY, dtype),
            _embedding("sum_pieces", embedding.sum_pieces, embedding.SUM, dtype),
            _embedding("norm_grads", embedding.norm_grads, embedding.NORM, dtype),
        ]
        norms = (sizes.norm_tiles(1024), sizes.norm_grads_tiles(1024))
        out += [
            _pointwise(pointwise.residual_norm, norms[0], dtype),
            _pointwise(pointwise.residual_norm_grads, norms[1], dtype),
            _pointwise(pointwise.bias_gelu, sizes.GELU, dtype),
            _pointwise(pointwise.bias_gelu_grads, sizes.GELU_GRADS, dtype),
        ]
    for mode, tile in attention.LAUNCH:
        out += [_attention(mode, tile, backward=backward) for backward in (False, True)]
    for mode in MODES:
        for longest in (16, 32, 64):
            out += [_one_query(mode, longest, backward=backward) for backward in (False, True)]
    for mode in MODES:
        out += [
            _table("sampled_dot", table.sampled_dot, table.SAMPLED_DOT[mode], mode, table.PICK),
            _table("sampled_dot", table.sampled_dot, table.LEVEL_LOSS[mode], mode, table.CROSS_ENTROPY),
            _table("gradient", table.level_gradient, table.LEVEL_GRADIENT[mode], mode, table.CROSS_ENTROPY),
            _table("weighted_sum", table.weighted_sum, table.WEIGHTED_SUM[mode], mode, table.PICK),
            _table("transpose", table.weighted_sum_transpose, table.WEIGHTED_SUM_TRANSPOSE[mode], mode, table.PICK),
        ]
        for block in (False, True):
            out.append(_infonce("forward", infonce.lse_tiles, infonce.FORWARD[mode], mode, block=block))
            out.append(_infonce("exact", infonce.exact_lse, infonce.EXACT[mode], mode, block=block))
            out.append(_infonce("gradient", infonce.grad_tiles, infonce.GRADIENT[mode], mode, block=block))
    return out
