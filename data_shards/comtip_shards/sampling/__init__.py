"""Epoch order, balanced sampling and keyed random numbers."""
