"""InfoNCE over B images and M >= B texts with learnable temperature, groups and mispaired columns."""

from __future__ import annotations

from torch import Tensor

from comtip_kernels.dispatch import Impl, choose, with_triton
from comtip_kernels.infonce.cpu import infonce_cpu
from comtip_kernels.infonce.reference import allowed_pairs, infonce_reference

__all__ = ["allowed_pairs", "infonce", "infonce_reference"]


_HAVE = {
    "reference": infonce_reference,
    "cpu": infonce_cpu,
    "triton": with_triton("comtip_kernels.infonce.op", "infonce_triton"),
}


def infonce(
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
    impl: Impl = "auto",
) -> Tensor:
    """Symmetric InfoNCE; columns B..M-1 are further negatives of every image.

    Parameters
    ----------
    image_BD, text_MD
        Vectors of any length (they are normalised here), floating point.
    scale
        Inverse temperature, a scalar tensor; its gradient is returned too.
    negatives
        ``"all"``, ``"same_group"`` or ``"other_group"``; the last two compare the group ids.
    group_rows, group_columns
        (B,) and (M,) integers of up to 32 bits.
    class_rows, class_columns
        (B,) and (M,) integers of up to 64 bits (hashes will do): equal ones are the same text and never negatives of
        each other.
    weight_B
        Weight of each spot; 0 takes it out, also as a negative.
    impl
        Which implementation; see :mod:`comtip_kernels.dispatch`.

    Returns
    -------
    Tensor
        Scalar loss in nats.

    Raises
    ------
    ValueError
        If M < B, an option is unknown, or ``impl`` cannot run.
    """
    B, M = image_BD.shape[0], text_MD.shape[0]
    if M < B:
        raise ValueError(f"infonce: {M} text columns for {B} images; the first {B} must be the true texts")
    if negatives not in ("all", "same_group", "other_group"):
        raise ValueError(f"negatives={negatives!r}: choose 'all', 'same_group' or 'other_group'")
    if negatives != "all" and (group_rows is None or group_columns is None):
        raise ValueError(f"negatives={negatives!r} needs group ids of rows and columns")
    return choose("infonce", impl, image_BD, _HAVE)(
        image_BD, text_MD, scale, negatives=negatives, group_rows=group_rows, group_columns=group_columns,
        class_rows=class_rows, class_columns=class_columns, weight_B=weight_B,
    )  # fmt: skip
