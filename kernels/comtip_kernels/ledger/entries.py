"""What is in the ledger: every kernel, at the sizes and with the flags that ask most of it."""

from __future__ import annotations

from comtip_kernels.infonce import triton_kernels as infonce
from comtip_kernels.ledger.aot import Entry

ARCHITECTURES = (80, 90, 100)
_IDS = (
    "silent",
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
_SIZES = ("B", "M", "D", "n_rows", "n_cols", "n_pairs", "n_out", "n_col_tiles", "x_row", "y_row", "q_row", "k_row")


def _infonce(name: str, kernel: object, tiles: dict[str, int], dtype: str) -> Entry:
    """Return one InfoNCE kernel with every kind of mask on, vectors contiguous."""
    names = list(kernel.arg_names)  # type: ignore[attr-defined]
    constants = {
        "HEADROOM": 40.0, "RULE": infonce.SAME_GROUP, "CLASSES": True, "SILENT": True, "UPCAST": False,
        "PRECISION": "ieee" if dtype == "bf16" else "tf32",
    } | {k: v for k, v in tiles.items() if k in names} | {n: 1 for n in names if n.endswith("_d")}  # fmt: skip
    if "HEADROOM" not in names:
        constants.pop("HEADROOM")
    types = {n: f"*{dtype}" if n in ("x_ptr", "y_ptr", "q_ptr", "k_ptr") else "*i32" if n in _IDS else "i32" if n in _SIZES else "*fp32"
             for n in names}  # fmt: skip
    aligned = frozenset(n for n in names if n not in constants and n not in ("scale_ptr", "n_col_tiles"))
    return Entry(
        "infonce", f"{name}_{dtype}", kernel, types, constants, tiles["num_warps"], tiles["num_stages"], aligned
    )


def entries() -> list[Entry]:
    """Return every entry."""
    out = []
    for dtype in ("bf16", "fp32"):
        forward = dict(infonce.FORWARD)
        out.append(_infonce("forward", infonce.lse_tiles, forward, dtype))
        out.append(_infonce("exact", infonce.exact_lse, dict(infonce.EXACT), dtype))
        for width in (128, 512):
            out.append(
                _infonce(
                    f"backward_d{width}",
                    infonce.grad_rows,
                    infonce.backward_tiles(dtype == "fp32") | {"BD": width},
                    dtype,
                )
            )
    return out
