"""Names that other tools read, spelt once."""

OBSM_EMBEDDING = "X_comtip"
"""Where ``comtip embed`` puts image vectors in an AnnData."""
UNS = "comtip"
"""Where we say in an AnnData which model made it."""
LAYER_CP10K, LAYER_RAW = "log1p_cp10k", "log1p_raw"
"""Layers of predicted expression."""
