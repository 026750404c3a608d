"""Losses, their mispairings and their metrics as pure functions of tensors, without parameters, random draws or file access."""

from comtip_fast.objectives.contrastive import PairMetadata, global_infonce, same_text_hash
from comtip_fast.objectives.expression import masked_mse, soft_contrastive
from comtip_fast.objectives.masked import HEALTH, feature_health, masked_feature_loss
from comtip_fast.objectives.mispair import (
    choose_hardest,
    counted_swaps,
    permute_within_strata,
    take_from_other_spots,
)
from comtip_fast.objectives.pair import pair_auc, pair_loss

__all__ = [
    "HEALTH",
    "PairMetadata",
    "choose_hardest",
    "counted_swaps",
    "feature_health",
    "global_infonce",
    "masked_feature_loss",
    "masked_mse",
    "pair_auc",
    "pair_loss",
    "permute_within_strata",
    "same_text_hash",
    "soft_contrastive",
    "take_from_other_spots",
]
