"""Fit of the readout of an export on the training split."""
