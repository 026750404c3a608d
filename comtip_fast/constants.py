"""Keys of the AnnData objects that this package writes, and a help text that commands share."""

OBSM_EMBEDDING = "X_comtip"
"""``obsm`` key of the image vectors of :meth:`comtip_fast.Model.embed`."""
UNS = "comtip"
"""``uns`` key of the provenance of results: version, model, its lineage and licences, and facts about the section."""
LAYER_CP10K, LAYER_RAW = "log1p_cp10k", "log1p_raw"
"""``layers`` keys of predicted expression."""
LAYER_MEASURED_CP10K, LAYER_MEASURED_RAW = "measured_log1p_cp10k", "measured_log1p_raw"
"""``layers`` keys of measured expression, next to predicted expression."""
ENCODER_HELP = (
    "RUN or EXPORT (features of its image encoder; RUN@vector: vectors of the shared space), timm:NAME (random weights), "
    "timm:NAME@FILE (weights from a file), lite0 (ImageNet features of the demo extra), colour, or embeddings:PATH "
    "(a folder of SECTION.h5, or a table with the columns section and spot)"
)
"""Help text of options that name an image encoder."""
