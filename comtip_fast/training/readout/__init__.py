"""Fit of the linear readout of an export on the training split."""
