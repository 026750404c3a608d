"""What is in the ledger: every kernel, at the sizes and with the flags that ask most of it."""

from __future__ import annotations

from comtip_kernels.gene_sentence_embedding import triton_kernels as embedding
from comtip_kernels.infonce import triton_kernels as infonce
from comtip_kernels.ledger.aot import Entry
from comtip_kernels.packed_attention import triton_kernels as attention
from comtip_kernels.sentence_table import triton_kernels as table

ARCHITECTURES = (80, 90, 100)
_IDS = (
    "silent_x",
    "silent_y",
    "silent_q",
    "silent_k",
    "group_x",
    "group_y",
    "class_x",
    "class_y",
    "group_q",
    "group_k",
    "class_q",
    "class_k",
    "low_q",
    "low_k",
    "low_ptr",
)
_SIZES = ("B", "M", "D", "n_rows", "n_cols", "per_part", "n_out", "n_col_tiles", "x_row", "y_row", "q_row", "k_row")


def _infonce(name: str, kernel: object, tiles: dict[str, int], dtype: str, block: bool) -> Entry:
    """Return one InfoNCE kernel with every kind of mask on, vectors contiguous; classes are 64 bits wide, as hashes are."""
    names = list(kernel.arg_names)  # type: ignore[attr-defined]
    constants = {
        "HEADROOM": 40.0, "RULE": infonce.SAME_GROUP, "CLASSES": True, "SILENT": True, "DIAGONAL": not block,
        "UPCAST": False, "PRECISION": "ieee" if dtype == "bf16" else "tf32",
    } | {k: v for k, v in tiles.items() if k in names} | {n: 1 for n in names if n.endswith("_d")}  # fmt: skip
    if "HEADROOM" not in names:
        constants.pop("HEADROOM")
    types = {n: f"*{dtype}" if n in ("x_ptr", "y_ptr", "q_ptr", "k_ptr") else "*i32" if n in _IDS else "i32" if n in _SIZES else "*fp32"
             for n in names}  # fmt: skip
    types |= {n: "*i64" for n in names if n.startswith("class_")}
    aligned = frozenset(n for n in names if n not in constants and n not in ("scale_ptr", "n_col_tiles"))
    return Entry(
        "infonce",
        f"{name}{'_block' if block else ''}_{dtype}",
        kernel,
        types,
        constants,
        tiles["num_warps"],
        tiles["num_stages"],
        aligned,
    )


def _table(name: str, kernel: object, config: dict[str, int], dtype: str, mode: int) -> Entry:
    """Return one kernel over a sentence table of 32 levels, tables and vectors contiguous."""
    names = list(kernel.arg_names)  # type: ignore[attr-defined]
    tiles = config | (table.FP32 if dtype == "fp32" and "BD" in config else {})
    tiles = tiles | {"QP": 32, "NG": max(1, tiles["BN"] // 32)}
    loss = mode == table.CROSS_ENTROPY
    constants = {
        "MODE": mode, "PRIOR": loss, "UPCAST": False, "PRECISION": "ieee" if dtype == "bf16" else "tf32", "c_d": 1, "t_d": 1,
    } | {k: v for k, v in tiles.items() if k in names}  # fmt: skip
    kinds = {"c_ptr": dtype, "t_ptr": dtype, "levels_ptr": "u8", "w_ptr": "u8" if loss else "fp32"}
    types = {n: f"*{kinds.get(n, 'fp32')}" if n.endswith("_ptr") else "i32" for n in names}
    aligned = frozenset(names) - constants.keys() - {"scale_ptr", "factor_ptr", "n_gene_tiles", "Q"}
    return Entry("table", f"{name}_{dtype}", kernel, types, constants, tiles["num_warps"], tiles["num_stages"], aligned)


def _embedding(name: str, kernel: object, config: dict[str, int], dtype: str) -> Entry:
    """Return one kernel of the embedding, width 512, with everything on."""
    names = list(kernel.arg_names)  # type: ignore[attr-defined]
    constants = {"MIXED": True, "IDENTITY": True, "NORM": True, "ORDERED": True, "BD": 512, "x_d": 1, **config}
    constants["ROWS"] = embedding.NORM_ROWS
    constants = {k: v for k, v in constants.items() if k in names}
    ids = (
        "row_id",
        "order_ptr",
        "first_ptr",
        "last_ptr",
        "place_ptr",
        "token_id",
        "kind_id",
        "slot_id",
        "lo_id",
        "hi_id",
        "identity_id",
    )
    narrow = ("row_id", "order_ptr", "first_ptr", "last_ptr", "place_ptr")
    types = {
        n: "*i32" if n in narrow else "*i64" if n in ids else f"*{dtype}" if n.endswith("_ptr") else "i32"
        for n in names
    } | {"eps": "fp32"}
    if name in ("sum_pieces", "norm_grads"):
        types |= dict.fromkeys({"out_ptr", "grad_ptr", "dgain_ptr", "dbias_ptr"} & set(names), "*fp32")
    aligned = frozenset(names) - constants.keys() - {"eps", "S", "U"}
    return Entry(
        "embedding",
        f"{name}_{dtype}",
        kernel,
        types,
        constants,
        config["num_warps"],
        config["num_stages"],
        aligned,
        False,
    )


def _attention(name: str, kernel: object, tile: int, dtype: str) -> Entry:
    """Return packed attention at head width 64, q, k and v as views of one projection."""
    names = list(kernel.arg_names)  # type: ignore[attr-defined]
    config = attention.config(tile, dtype == "fp32", name == "backward")
    precision = "ieee" if dtype == "bf16" else "tf32"
    constants = {"BT": tile, "BE": 64, "UPCAST": False, "PRECISION": precision} | {
        n: 1 for n in names if n.endswith("_e")
    }
    types = {n: f"*{dtype}" if n.endswith("_ptr") else "i32" for n in names} | {"first_ptr": "*i32", "scale": "fp32"}
    aligned = frozenset(names) - constants.keys() - {"S", "H", "W", "scale"}
    return Entry(
        "attention",
        f"{name}_{tile}_{dtype}",
        kernel,
        types,
        constants,
        config["num_warps"],
        config["num_stages"],
        aligned,
    )


def entries() -> list[Entry]:
    """Return every entry."""
    out = []
    for dtype in ("bf16", "fp32"):
        out += [
            _embedding("make_rows", embedding.make_rows, embedding.MAKE, dtype),
            _embedding("copy_rows", embedding.copy_rows, embedding.COPY, dtype),
            _embedding("sum_pieces", embedding.sum_pieces, embedding.SUM, dtype),
            _embedding("norm_grads", embedding.norm_grads, embedding.NORM, dtype),
        ]
        for tile in attention.TILES:
            out.append(_attention("forward", attention.attend_tiles, tile, dtype))
            out.append(_attention("backward", attention.attend_grads, tile, dtype))
        for mode, suffix in ((table.PICK, ""), (table.CROSS_ENTROPY, "_loss")):
            out += [
                _table(f"{name}{suffix}", kernel, dict(config), dtype, mode)
                for name, kernel, config in (
                    ("take", table.take_tiles, table.TAKE),
                    ("spread", table.spread_rows, table.SPREAD),
                    ("collect", table.collect_rows, table.COLLECT),
                )
            ]
    for dtype in ("bf16", "fp32"):
        for block in (False, True):
            out.append(_infonce("forward", infonce.lse_tiles, dict(infonce.FORWARD), dtype, block))
            out.append(_infonce("exact", infonce.exact_lse, infonce.exact_tiles(dtype == "fp32"), dtype, block))
            for width in (128, 512):
                tiles = infonce.backward_tiles(dtype == "fp32") | {"BD": width}
                out.append(_infonce(f"backward_d{width}", infonce.grad_rows, tiles, dtype, block))
    return out
