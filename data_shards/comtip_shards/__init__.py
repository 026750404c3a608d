"""comtip_shards: spatial transcriptomics sections in, WebDataset shards out."""
