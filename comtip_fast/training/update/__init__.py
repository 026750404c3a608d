"""What happens around an optimizer update: spikes of the gradient norm, and the moving average of the weights."""
