"""comtip-fast: CoMTIP pretraining for H&E tiles and the gene expression measured under them."""

__version__ = "0.1.0"
