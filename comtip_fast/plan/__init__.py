"""Predict memory, FLOPs, communication and time of a run from its config (docs/scaling.md)."""
