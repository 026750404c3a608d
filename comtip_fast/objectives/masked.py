"""L_mfm, the distance between predicted and target features of hidden patches, and metrics that detect feature collapse."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

HEALTH = ("patch_variance", "patch_rank")
"""Keys of the dict that :func:`feature_health` returns."""


def masked_feature_loss(predicted_BKd: Tensor, target_BKd: Tensor, distance: str = "smooth_l1") -> Tensor:
    """Return the mean distance between predicted features and layer-normalised, detached target features, a scalar.

    It is computed in fp32, or in fp64 for features in fp64.

    Parameters
    ----------
    predicted_BKd, target_BKd
        Features (B, K, d) of the K hidden patches of B tiles.
    distance
        ``"smooth_l1"`` or ``"mse"`` (mean over elements), or ``"cosine"`` (1 - cos, mean over patches).

    Raises
    ------
    ValueError
        ``distance`` is none of these.
    """
    wide = torch.promote_types(predicted_BKd.dtype, torch.float32)
    target = F.layer_norm(target_BKd.detach().to(wide), target_BKd.shape[-1:])
    predicted = predicted_BKd.to(wide)
    if distance == "smooth_l1":
        return F.smooth_l1_loss(predicted, target)
    if distance == "mse":
        return F.mse_loss(predicted, target)
    if distance == "cosine":
        return (1 - F.cosine_similarity(predicted, target, dim=-1)).mean()
    raise ValueError(f"distance={distance!r}: choose 'smooth_l1', 'mse' or 'cosine'")


@torch.no_grad()
def feature_health(patches_BPd: Tensor) -> dict[str, float]:
    """Return two measures of how much the encoder's features differ between patches.

    Returns
    -------
    dict
        ``patch_variance``: variance of the layer-normalised features over the patches of a tile, averaged over tiles and
        channels; 0 if all patches are equal. ``patch_rank``: effective rank of the features of up to 1024 patches, the
        exponential of the entropy of their normalised singular values; 1 means collapse. Both are NaN without tiles, and for
        features that are not finite, for which the singular value decomposition would raise.
    """
    x = F.layer_norm(patches_BPd.float(), patches_BPd.shape[-1:])
    if x.numel() == 0 or not bool(x.isfinite().all()):
        return dict.fromkeys(HEALTH, float("nan"))
    variance = x.var(dim=1, unbiased=False).mean()
    flat = x.flatten(0, 1)
    flat = flat - flat.mean(0)
    singular = torch.linalg.svdvals(flat[:1024])
    share = singular / singular.sum().clamp_min(1e-12)
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    return dict(zip(HEALTH, (float(variance), float(entropy.exp())), strict=True))
