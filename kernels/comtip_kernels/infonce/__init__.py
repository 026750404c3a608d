"""InfoNCE over B images and M >= B texts with learnable temperature, groups, classes and further negatives."""

from __future__ import annotations

from torch import Tensor

from comtip_kernels.dispatch import Impl, choose, with_triton
from comtip_kernels.infonce.cpu import infonce_cpu
from comtip_kernels.infonce.reference import allowed_pairs, infonce_reference
from comtip_kernels.infonce.unit import unit_vectors

__all__ = ["allowed_pairs", "infonce", "infonce_reference", "unit_vectors"]
_IMPLEMENTATIONS = {
    "reference": infonce_reference,
    "cpu": infonce_cpu,
    "triton": with_triton("comtip_kernels.infonce.triton_op", "infonce_triton"),
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
    excluded_further: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Return the symmetric InfoNCE loss (van den Oord et al. 2018; CLIP, Radford et al. 2021) of B images and M texts.

    The first B texts belong to the images; the others are further negatives. See :mod:`comtip_kernels.infonce.reference` for the
    formula.

    Parameters
    ----------
    image_BD, text_MD
        Floating-point vectors of any length; they are normalised here. The Triton kernels round the unit vectors once, to
        bf16 if either tensor is bf16 or bf16 autocast is enabled, and use the rounded vectors for positives and negatives
        alike. ``cpu`` computes in at least fp32, ``reference`` in the wider dtype of the vectors.
    scale
        Inverse temperature, a scalar tensor; it is moved to the device of the vectors and receives a gradient.
    negatives
        ``"all"``, ``"same_group"`` or ``"other_group"``; the last two compare the group ids.
    group_rows, group_columns
        (B,) and (M,) integers of up to 32 bits.
    class_rows, class_columns
        (B,) and (M,) integers of up to 64 bits, for example hashes: rows and columns of one class are the same text
        and never negatives of each other.
    weight_B
        Weight of each spot (B,); a spot of weight 0 is excluded, also as a negative of others.
    excluded_further
        bool (M - B,): columns after the first B that are not negatives. Masking keeps the number of columns fixed; selecting
        columns would make it depend on data that the host has to read.
    impl
        Implementation; see :mod:`comtip_kernels.dispatch`.

    Returns
    -------
    Tensor
        Scalar loss in nats, fp32 (fp64 for fp64 vectors); from ``reference``, in the wider dtype of the vectors.

    Raises
    ------
    ValueError
        If M < B, ``negatives`` is unknown or its group ids are missing, or ``impl`` does not support the operands.
    """
    B, M = image_BD.shape[0], text_MD.shape[0]
    if M < B:
        raise ValueError(
            f"infonce: {M} text columns for {B} images; pass at least one text per image, the {B} true texts first"
        )
    if negatives not in ("all", "same_group", "other_group"):
        raise ValueError(f"infonce: negatives={negatives!r} is unknown; choose 'all', 'same_group' or 'other_group'")
    if negatives != "all" and (group_rows is None or group_columns is None):
        raise ValueError(f"infonce: negatives={negatives!r} needs group ids; pass group_rows and group_columns")
    out: Tensor = choose("infonce", impl, (image_BD, text_MD), _IMPLEMENTATIONS)(
        image_BD,
        text_MD,
        scale.to(image_BD.device),
        negatives=negatives,
        group_rows=group_rows,
        group_columns=group_columns,
        class_rows=class_rows,
        class_columns=class_columns,
        weight_B=weight_B,
        excluded_further=excluded_further,
    )
    return out
