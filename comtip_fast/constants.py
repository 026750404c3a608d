"""Keys of the AnnData objects that this package writes."""

OBSM_EMBEDDING = "X_comtip"
"""``obsm`` key of the image vectors that ``comtip embed`` writes."""
UNS = "comtip"
"""``uns`` key of the record of the model that produced the results."""
LAYER_CP10K, LAYER_RAW = "log1p_cp10k", "log1p_raw"
"""``layers`` keys of predicted expression."""
