"""``comtip bench step``: a whole training step compared with plain PyTorch and with steps of other methods, in one process."""
