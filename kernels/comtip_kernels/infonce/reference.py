"""InfoNCE between image and text vectors, in readable PyTorch: the definition of the operation.

Shapes: B image rows, M >= B text columns (the first B are the true texts, the others further negatives), width D.

    s_ij   = scale * <x_i, y_j>                    x, y unit vectors
    L_i2t  = -sum_i w_i (s_ii - lse_{j in N(i)} s_ij) / sum_i w_i        N(i) from all M columns
    L_t2i  = -sum_j w_j (s_jj - lse_{i in N(j)} s_ij) / sum_j w_j        for the B true columns only
    L      = (L_i2t + L_t2i) / 2

N(i) contains the positive itself and every column that the group rule, the classes, the weights and ``excluded_further`` allow;
N(j) likewise the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def allowed_pairs(
    n_rows: int,
    n_columns: int,
    *,
    negatives: str = "all",
    group_rows: Tensor | None = None,
    group_columns: Tensor | None = None,
    class_rows: Tensor | None = None,
    class_columns: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return the mask of the (image, text) pairs in the loss: positives, and the negatives that groups and classes allow.

    Parameters
    ----------
    n_rows, n_columns
        B and M.
    negatives, group_rows, group_columns, class_rows, class_columns
        As in :func:`comtip_kernels.infonce`.
    device
        Device of the mask.

    Returns
    -------
    Tensor
        bool (B, M), True for a positive or an allowed negative. Weights and ``excluded_further`` are not taken into account.

    Raises
    ------
    ValueError
        If ``negatives`` is unknown, or its group ids are missing.
    """
    ok = torch.ones(n_rows, n_columns, dtype=torch.bool, device=device)
    if negatives not in ("all", "same_group", "other_group"):
        raise ValueError(f"infonce: negatives={negatives!r} is unknown; choose 'all', 'same_group' or 'other_group'")
    if negatives != "all":
        if group_rows is None or group_columns is None:
            raise ValueError(f"infonce: negatives={negatives!r} needs group ids; pass group_rows and group_columns")
        same = group_rows[:, None] == group_columns[None, :]
        ok &= same if negatives == "same_group" else ~same
    if class_rows is not None and class_columns is not None:
        ok &= class_rows[:, None] != class_columns[None, :]
    return ok | torch.eye(n_rows, n_columns, dtype=torch.bool, device=device)


def infonce_reference(
    image_BD: Tensor,
    text_MD: Tensor,
    scale: Tensor,
    *,
    negatives: str = "all",
    group_rows: Tensor | None = None,
    group_columns: Tensor | None = None,
    class_rows: Tensor | None = None,
    class_columns: Tensor | None = None,
    weight_B: Tensor | None = None,
    excluded_further: Tensor | None = None,
) -> Tensor:
    """Return the symmetric InfoNCE loss with further text columns, a scalar; the docstring of this module has the formula.

    It is computed in the dtype of the vectors; vectors of two dtypes are promoted to the wider one.
    """
    dtype = torch.promote_types(image_BD.dtype, text_MD.dtype)
    image_BD, text_MD = image_BD.to(dtype), text_MD.to(dtype)
    B, M = image_BD.shape[0], text_MD.shape[0]
    weight = image_BD.new_ones(B) if weight_B is None else weight_B.to(dtype)
    ok = allowed_pairs(
        B,
        M,
        negatives=negatives,
        group_rows=group_rows,
        group_columns=group_columns,
        class_rows=class_rows,
        class_columns=class_columns,
        device=image_BD.device,
    )
    # A spot of weight 0 has no text (no measured gene of the panel), so it is not a negative either.
    excluded = weight == 0
    eye = torch.eye(B, M, dtype=torch.bool, device=image_BD.device)
    further = excluded.new_zeros(M - B) if excluded_further is None else excluded_further
    excluded_columns = torch.cat([excluded, further])
    ok = (ok & ~excluded_columns[None, :] & ~excluded[:, None]) | eye
    logits = scale * (F.normalize(image_BD, dim=-1) @ F.normalize(text_MD, dim=-1).T)
    logits = logits.masked_fill(~ok, float("-inf"))
    positive = logits.diagonal()
    i2t = torch.logsumexp(logits, dim=1) - positive
    t2i = torch.logsumexp(logits[:, :B], dim=0) - positive
    return (weight * (i2t + t2i)).sum() / (2 * weight.sum().clamp_min(1e-12))
