"""Faults of InfoNCE, the sentence table and the embedding, for ``mutate.py``."""

from __future__ import annotations

from bench.kernels.mutant import EMBEDDING, INFONCE, LOGITS, TABLE, of

_TAIL = ("range(0, n_cols, BN)", "range(0, n_cols - n_cols % BN, BN)")
MUTANTS = [
    *of(
        LOGITS,
        "logits",
        ("slice", "dim = start + tl.arange(0, BK)", "dim = tl.arange(0, BK)"),
        ("mask", "(rows[:, None] < n_rows) & (dim[None, :] < width)", "(rows[:, None] < n_rows)"),
    ),
    *of(
        LOGITS,
        "allowed",
        ("mask of classes", "ok = ok & (class_q[:, None] != class_k[None, :])", "ok = ok"),
        ("mask of excluded rows", "(excluded_q[:, None] == 0) & ", ""),
        ("swapped rule", "group_q[:, None] != group_k[None, :]", "group_q[:, None] == group_k[None, :]"),
    ),
    *of(
        LOGITS,
        "grouped",
        ("tail", "rows = tl.minimum(n_row_tiles - first, ROW_GROUP)", "rows = ROW_GROUP"),
        ("wrong group", "return first + local % rows", "return local % rows"),
    ),
    *of(
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
    *of(
        INFONCE,
        "exact_lse",
        ("mask", 's = tl.where(ok, s, float("-inf"))', "s = s * 1.0"),
        ("tail", *_TAIL),
        ("stale maximum", "total = total * tl.exp2((top - safe) * LOG2E) + ", "total = total + "),
        ("never stored", "(low > 0))", "(low > 1))"),
    ),
    *of(
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
    *of(
        TABLE,
        "_scores",
        ("slice", "dim = start + tl.arange(0, BK)", "dim = tl.arange(0, BK)"),
        ("mask", "mask=(spots[:, None] < n_spots) & (dim[None, :] < width)", "mask=(spots[:, None] < n_spots)"),
    ),
    *of(
        TABLE,
        "_adjusted",
        ("missing scale", " * tl.load(scale_ptr)", ""),
        ("mask of levels", "tl.where((q < n_levels)[None, None, :], s, ", "tl.where((q < QP)[None, None, :], s, "),
    ),
    *of(
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
    *of(
        TABLE,
        "_weights",
        ("wrong level", "selected[:, :, None] == tl.arange(0, QP)", "selected[:, :, None] == tl.arange(0, QP) + 1"),
        (
            "other genes",
            "w = tl.load(weight_ptr + offset, mask=inside",
            "w = tl.load(weight_ptr + offset, mask=inside & (genes > 0)[None, :]",
        ),
    ),
    *of(
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
    *of(
        TABLE,
        "weighted_sum",
        ("slice", "row_ptr + dim[None, :] * t_stride_dim", "row_ptr + (dim % BD)[None, :] * t_stride_dim"),
        ("tail", "range(first, end, NG)", "range(first, end - end % NG, NG)"),
        ("wrong part", "first = tl.program_id(2) * part_genes", "first = 0 * part_genes"),
        ("dtype", ".to(table_ptr.dtype.element_ty)", ".to(tl.float32)"),
        ("mask", "(gene[:, None] < n_genes) & (level[:, None] < n_levels) & ", "(gene[:, None] < n_genes) & "),
    ),
    *of(
        TABLE,
        "weighted_sum_transpose",
        ("slice", "+ dim[None, :] * v_stride_dim", "+ (dim % BD)[None, :] * v_stride_dim"),
        ("tail", "range(0, n_spots, BM)", "range(0, n_spots - n_spots % BM, BM)"),
        ("dtype", ".to(vector_ptr.dtype.element_ty)", ".to(tl.float32)"),
    ),
    *of(
        EMBEDDING,
        "_sum_of_tables",
        ("mask of identities", "(kind == 0) & (own > 0)", "own > 0"),
        ("missing share", "(1 - mix) * word", "word"),
    ),
    *of(
        EMBEDDING,
        "make_rows",
        ("mask", "x = tl.where(inside, x - tl.sum(x, axis=0) / width, 0.0)", "x = x - tl.sum(x, axis=0) / width"),
        ("tail", "x, mask=inside)", "x, mask=inside & (dim < width - 1))"),
        ("missing scale", "x * rstd * gain", "x * gain"),
    ),
    *of(
        EMBEDDING,
        "norm_grads",
        ("mask", "x = tl.where(inside, x - tl.sum(x, axis=0) / width, 0.0)", "x = x - tl.sum(x, axis=0) / width"),
        ("tail", "tl.minimum(first + ROWS, n_rows)", "tl.minimum(first + ROWS, n_rows - 1)"),
        ("swapped operand", "dgain += g * x", "dgain += g"),
        ("missing term", " - x * (tl.sum(g * x, axis=0) / width)", ""),
    ),
    *of(
        EMBEDDING,
        "copy_rows",
        ("tail", "(token[:, None] < n_tokens) & ", "(token[:, None] < n_tokens - 1) & "),
        ("wrong row", "row_id_ptr + token,", "row_id_ptr + token * 0,"),
    ),
    *of(
        EMBEDDING,
        "sum_pieces",
        ("tail", "(index[:, None] < last) & ", "(index[:, None] < last - 1) & "),
        ("stale sum", "acc += tl.load(", "acc = tl.load("),
        ("first row lost", "if target >= 0:", "if target > 0:"),
    ),
]
