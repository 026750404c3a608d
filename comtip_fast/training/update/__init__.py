"""Additions to an optimizer update: reaction to spikes of the gradient norm, and the moving average of the weights."""
